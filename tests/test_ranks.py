"""How ranks meet, and what stands in the way of it; the optimizer that they share, by itself."""

import pytest
import torch

from support.optimizer import ShardedAdamW
from support.ranks import join_ranks, leave
from support.words import RunError, UserError

OPEN_MODULE = ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
               "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n")
OWN_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n"
SET_BY_TORCHRUN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("text, named", [
    (OPEN_MODULE, "driver 570.86.15"), (OWN_MODULE, "driver 535.183.01"), (None, "driver")])
def test_a_gpu_with_a_driver_too_old_is_a_sentence_and_no_run_on_the_cpu(
        text, named, tmp_path, monkeypatch):
    """device_count() asks the driver's library, which answers; is_available() asks CUDA itself."""
    monkeypatch.setattr("support.ranks.DRIVER", tmp_path / "version")
    if text:
        (tmp_path / "version").write_text(text)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"{named} is too old.*CUDA 13.0.*cu126.*CUDA_VISIBLE"):
        join_ranks(1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # CUDA_VISIBLE_DEVICES= says so
    assert join_ranks(1).type == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("environment, error, words", [
    ({"RANK": "zero"}, UserError, "RANK.*'zero'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},
     RunError, "MASTER_ADDR.*GLOO_SOCKET_IFNAME"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "nowhere.invalid",
      "MASTER_PORT": "29"}, RunError, "rank 1 of 2.*nowhere.invalid:29 .*GLOO_SOCKET_IFNAME"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
      "MASTER_PORT": "0"}, RunError, "rank 0 of 2 has not met .*can they reach it[?]$")])
def test_ranks_that_cannot_meet_say_so_in_time(environment, error, words, monkeypatch):
    for name in SET_BY_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        join_ranks(0.01)


def test_gpus_connect_when_ranks_join_and_not_at_the_first_gradient(monkeypatch):
    """A broken fabric shows before data are read and a model is loaded; a device_id is what asks for it."""
    asked = []
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr("support.ranks.dist.init_process_group", lambda backend, timeout, device_id: asked.append(
        (backend, device_id)))
    assert join_ranks(1) == torch.device("cuda", 1) and asked == [("cpu:gloo,cuda:nccl", torch.device("cuda", 1))]


def test_a_rank_without_a_number_can_leave(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setattr("support.ranks.time.sleep", lambda seconds: None)
    monkeypatch.setattr("support.ranks.signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        leave("why", 2)
    assert ended.value.code == 2 and capsys.readouterr().err == "currreft (rank zero): why\n"


def steps(optimizer, weights, micro_batches=2):
    """Three steps of gradients that add up over micro-batches; the norms."""
    g, norms = torch.Generator().manual_seed(0), []
    for _ in range(3):
        for _ in range(micro_batches):
            noise = [torch.randn(w.shape, generator=g).to(w.dtype) for w in weights[:2]]
            sum((w * x).sum() for w, x in zip(weights, noise)).backward()
        norms.append(optimizer.reduce_gradients(1.0))
        optimizer.step(0.1)
        optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_takes_gradients_to_the_host_once_a_step_and_changes_no_number(dtype, monkeypatch):
    """In float32 to the last bit. A weight without a gradient counts as zeros."""
    start = [torch.randn(5, 3).to(dtype), torch.randn(7).to(dtype), torch.ones(2).to(dtype)]
    weights = {flag: [torch.nn.Parameter(w.clone()) for w in start] for flag in (False, True)}
    optimizers = {flag: ShardedAdamW(enumerate(weights[flag]), offload=flag) for flag in weights}
    copies, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: copies.append(to) or copy(to, x))
    norms = {flag: steps(optimizers[flag], weights[flag]) for flag in weights}
    buffers = optimizers[True].on_host.values()
    gone = [to for to in copies if any(to is buffer for buffer in buffers)]
    assert len(gone) == 3 * 3, "every gradient once a step, however many micro-batches"
    assert all(buffer.dtype == torch.float32 for buffer in buffers)
    for one, other in zip(weights[False], weights[True]):
        torch.testing.assert_close(one, other, **(
            {"atol": 0, "rtol": 0} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}))
        assert other.grad is None
    assert norms[True] == pytest.approx(norms[False], rel=1e-2 if dtype == torch.bfloat16 else 0)
    assert torch.equal(weights[True][2], start[2]) and not torch.equal(weights[True][0], start[0])


def test_masters_go_to_the_host_before_they_grow(monkeypatch):
    """Copied as they are and made float32 there: all masters at once are 14 GB of a GPU at 3B."""
    seen, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: seen.append(x.dtype) or cpu(x))
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = ShardedAdamW([("w", weight)], offload=True)
    assert seen == [torch.bfloat16] and optimizer.masters["w"].dtype == torch.float32
    assert optimizer.adam.defaults["weight_decay"] == 0
