"""What a run needs, estimated, against the same step added up on fake tensors at full size."""

import contextlib
import copy
import inspect
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import vision_utils

from currreft import Config, grpo_loss, parse_args
from data import Prompt
from engine import Engine, load_policy, shares_prompts
from packed import Packed, attach_attention, pack, packed_hidden, rectangle, token_logps
from support.memory import OVERHEAD, PREFILL, check_memory, host_needed, memory_needed
from support.optimizer import ShardedAdamW
from support.tiny import tiny_checkpoint
from support.words import UserError
from tools.memory import CARDS, LEAN, configuration, estimate, main


def settings(**flags):
    return Config(data="d", dtype="bfloat16", **flags)


# ---- Estimated ----

def test_memory_of_the_real_3b_configuration():
    """3,754,622,976 parameters, the tied head counted once."""
    config, lean = configuration("3b"), settings(checkpoint_activations=True)
    one, eight = (memory_needed(config, lean, ranks) for ranks in (1, 8))
    assert one["weights"] == one["gradients"] == one["reference"] == 2 * 3_754_622_976
    assert one["optimizer"] == 12 * 3_754_622_976 == 8 * eight["optimizer"]
    assert 68e9 < sum(one.values()) < 80e9 and sum(eight.values()) < 40e9
    many = memory_needed(config, lean, 32)["optimizer"]
    assert many == 12 * 151_936 * 2048, "the rank that owns the embedding holds all of it"
    less = memory_needed(config, settings(beta=0.0, freeze_vision=True), 1)
    assert less["reference"] == 0 and less["gradients"] < one["gradients"]
    assert memory_needed(config, settings(), 1)["activations"] > 5 * one["activations"]


def test_the_longest_prompt_that_was_read_decides_not_a_guess():
    short, long = (memory_needed(configuration("3b"), settings(), 1, n) for n in (None, 4096))
    assert short["cache"] < 3 * 2**30 and long["activations"] > short["activations"]
    assert long["cache"] == 64 * (512 + 4096) * 36 * 2 * 128 * 2 * 2
    tests, few = (memory_needed(configuration("3b"), settings(max_rows=n), 8, None, 4096) for n in (1024, 64))
    assert few["evaluation"] == 0 and tests["cache"] == few["cache"], "a rollout of 8 rows, whatever is tested"
    assert 160 * 2**30 < sum(tests.values()) < 190 * 2**30


def test_the_hosts_memory_that_offload_takes_is_known_before_a_model_is_loaded(monkeypatch, tmp_path):
    """Masters, two moments and sums in float32; weights pass through, of every rank of a machine."""
    config, n, process = configuration("3b"), 3_754_622_976, 2**31
    one = host_needed(config, settings(offload=True), 1)
    assert one == process + (2 + 16) * n and host_needed(config, settings(), 8, here=8) == 8 * (process + 2 * n)
    assert host_needed(config, settings(offload=True), 8, here=4) == 4 * (process + 2 * n + 4 * n + 12 * n // 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**45))
    monkeypatch.setattr(inspect.getmodule(host_needed), "LIMIT", tmp_path / "memory.max")  # of a container
    monkeypatch.setattr("os.sysconf", lambda name: 2**20)
    needed, said = memory_needed(config, settings(offload=True), 1), []
    for text, refused in ((one, False), (one - 1, True)):
        (tmp_path / "memory.max").write_text(f"{text}\n")
        with pytest.raises(UserError, match="need 64.9.*--offload keeps") if refused else contextlib.nullcontext():
            check_memory(needed, settings(), said.append, host=one)
    assert said[0].endswith("; of this machine's: 64.9 GiB")


def test_the_cache_is_the_one_that_the_engine_allocates(tmp_path):
    """Lengths that fill its buckets; every row has its prompt, as on a GPU."""
    model, processor = load_policy(tiny_checkpoint(tmp_path))
    cache = Engine(model, processor, 1600, 64, 128, width=8, shared=shares_prompts("cuda", 1600, 64, 8)).cache
    assert not cache.prompts and sum(t.shape[1] * t.shape[3] for t in cache.tails) / 2 == 64 * (1600 + 128)


def test_what_cannot_fit_is_refused_with_a_sentence(monkeypatch):
    needed = {"weights": 2**33, "gradients": 0, "reference": 0, "optimizer": 0, "cache": 2**40}
    said = []
    with pytest.raises(UserError, match="about 1,032 GiB in each process, most of it for cache"):
        check_memory(needed, settings(), said.append)
    assert "1032.0 GiB" in said[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(total_memory=6 * 2**30))
    with pytest.raises(UserError, match="about 10 GiB in each process, most of it for weights, and there are 6"):
        check_memory({**needed, "cache": 0}, settings(), said.append)


def table():
    """The cells of each line of the table of docs/3b.md."""
    text = (Path(__file__).parents[1] / "docs" / "3b.md").read_text()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith(("| 3b |", "| 7b |"))]


def test_the_table_in_the_docs_is_what_the_command_prints(capsys):
    """But for its last column, the step added up; and every run fits its card."""
    assert main([]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if " GB |" in line]
    assert printed == ["| " + " | ".join(cells[:-1]) + " |" for cells in table()]
    for (_, _, card, _), (*_, estimated, _, added) in zip(CARDS, table(), strict=True):
        assert float(added) == pytest.approx(float(estimated), rel=0.05)
        assert float(estimated) + OVERHEAD / 2**30 < card - 1  # 80 GB cards have 79.1 GiB
    assert main(["--size", "7b", "--ranks", "4", "--beta", "0"]) == 0
    assert "| 7b | 4 x ? GB | --beta 0 | 15.4 | 15.4 | 0.0 |" in capsys.readouterr().out


# ---- Added up: the project's own decode step, scoring, backward and optimizer, without data ----

class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live while it is on: `now`, and their `peak`; not the host's."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes, self.host = 0, 0, {}, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0 if self.host else storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)


@contextlib.contextmanager
def pretended(config, grid, counts, ranks, mode):
    """So many ranks, whose collectives do nothing; a vision tower that is told what it would read
    off the grids of so many images, as fake tensors have no values; AdamW fused as on CUDA."""
    vision, merge, tables = config.vision_config, config.vision_config.spatial_merge_size, {}
    for count in counts:
        grids = grid.repeat(count, 1)
        cu, _ = vision_utils.get_vision_attention_seqlens(grids, vision)
        index, cu_window = vision_utils.get_vision_window_index(
            grids, merge, vision.window_size, vision.patch_size)
        tower = {"position_ids": vision_utils.get_vision_position_ids(grids, merge), "cu_seqlens": cu,
                 "window_index": index, "cu_window_seqlens": cu_window}
        fake = {name: mode.from_tensor(value) for name, value in tower.items()}
        for name in ("cu_seqlens", "cu_window_seqlens"):  # as packed.windowed_attention makes them
            places, slots, real = rectangle(tower[name].diff(), 0)
            fake[name].windows = (mode.from_tensor(places), mode.from_tensor(slots),
                                  None if real.all() else mode.from_tensor(real[:, None, None]))
        tables[count] = fake | {"max_seqlen": int(cu.diff().max()),
                                "max_window_seqlen": int(cu_window.diff().max())}

    def features(model, pixels, grids):
        pixels = pixels.to(model.dtype)
        return model.model.visual(pixels, grid_thw=grids, **tables[len(grids)]).pooler_output
    adam, optimizer = torch.optim.AdamW, inspect.getmodule(ShardedAdamW)
    norm = type("Norm", (float,), {"item": float.__float__})(1)
    done = SimpleNamespace(wait=lambda: None)
    nothing = SimpleNamespace(broadcast=lambda *_: None, all_reduce=lambda *_, **__: done)
    with mock.patch.multiple(optimizer, world=lambda: (0, ranks), dist=nothing), \
            mock.patch.object(inspect.getmodule(packed_hidden), "image_features", features), \
            mock.patch.object(torch.optim, "AdamW", lambda *args, **kwargs: adam(
                *args, **kwargs | {"fused": True})), \
            mock.patch.object(torch.nn.utils, "get_total_norm", lambda _: norm):
        yield


def simulate(config, cfg, ranks, length=None):
    """{moment: peak bytes} of the life of one rank, whose prompts and tests have `length` tokens."""
    side, length = 2 * int((cfg.max_pixels // 784) ** 0.5), length or cfg.max_pixels // 784 + 200
    ids = torch.zeros(length, dtype=torch.long)
    ids[10:10 + side * side // 4] = config.image_token_id  # one square image
    prompt = Prompt(ids, torch.zeros(side * side, 1176), torch.tensor([[1, side, side]]),
                    position_ids=torch.arange(len(ids)).expand(3, -1))
    own, together = -(-cfg.prompts_per_step // ranks), PREFILL // length
    mode, live, peaks = FakeTensorMode(allow_non_fake_inputs=True), Live(), {}
    rows = {count: vars(pack(SimpleNamespace(config=config, dtype=torch.bfloat16, device="cpu"), [prompt] * count[0],
                             [[[0] * cfg.max_completion_length] * count[1]] * count[0])) for count in (
        (together, 0), (min(own, together), 0), (cfg.micro_batch, cfg.num_generations))}

    def packed(*count):
        row = Packed(**{name: value if value is None else mode.from_tensor(value) for name, value in rows[count].items()})
        for tensor in filter(lambda x: x is not None, vars(row).values()):
            live.add(tensor.untyped_storage())
        return row

    def model():
        return attach_attention(transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            copy.deepcopy(config), dtype=torch.bfloat16))

    @contextlib.contextmanager
    def moment(name, host=False):
        live.peak, live.host = live.now, host
        yield
        peaks[name], live.host = live.peak, False

    def generates(rows, prompts):
        decoder = Engine(policy, processor, length, rows, cfg.max_completion_length, shared=False)
        decoder.cache.prefill = [(torch.zeros(1).long(), 0, length)]
        with torch.no_grad():
            packed_hidden(policy, packed(prompts, 0), decoder.cache)
            decoder._decode(rows, decoder.tail)
        return decoder

    def learn():
        optimizer.reduce_gradients(1.0)
        optimizer.step(cfg.lr)
    with pretended(config, prompt.image_grid_thw, {count for count, _ in rows}, ranks, mode), mode, live:
        policy, processor = model(), SimpleNamespace(end_ids=(1, 2), forbidden_ids=lambda v: (0,))
        with moment("evaluation"):
            generates(cfg.max_rows, together)
        if cfg.checkpoint_activations:
            policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        with moment("making the optimizer", host=cfg.offload):
            optimizer = ShardedAdamW(policy.named_parameters(), offload=cfg.offload)
        reference = model().requires_grad_(False) if cfg.beta else None
        with moment("first step", host=cfg.offload):  # which makes the moments
            learn()
        optimizer.zero_grad()
        with moment("rollout"):
            decoder = generates(min(cfg.max_rows, cfg.num_generations * own), min(own, together))  # noqa: F841  lives on
        with moment("backward"):
            row, bias = packed(cfg.micro_batch, cfg.num_generations), torch.zeros(config.text_config.vocab_size)
            policy.train()
            for parameter in policy.parameters():  # zeros, as of the micro-batch before, if there is one
                parameter.grad = torch.zeros_like(parameter) if own > cfg.micro_batch else None
            logp = token_logps(policy, row, bias, cfg.temperature)
            with torch.no_grad():
                logp_ref = token_logps(reference, row, bias, cfg.temperature) if cfg.beta else None
            grpo_loss(logp, logp.detach(), logp_ref, torch.ones(len(logp)), row.mask)[0].backward()
        with moment("optimizer", host=cfg.offload):
            learn()
    return peaks


ROWS = [(size, ranks, flags, None) for size, ranks, _, flags in CARDS] + [
    ("3b", 8, LEAN + " --max_rows 512", 4096), ("3b", 1, LEAN + " --micro_batch 4", 1500)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_the_estimate_is_that_of_the_life_of_a_run_added_up(row):
    """Of each line of docs/3b.md; of long tests, many at once; and of masks of several groups."""
    size, ranks, flags, length = ROWS[row]
    estimated, cfg = estimate(size, ranks, flags.split(), length), parse_args(flags.split())
    peaks = simulate(configuration(size), cfg, ranks, length)
    most = max(peaks.values()) / 2**30
    assert estimated["estimated"] == pytest.approx(most, rel=0.05), peaks
    assert (peaks["evaluation"] / 2**30 == most) == (estimated["evaluation"] > 0) == (row == len(CARDS))
    assert row >= len(CARDS) or most == pytest.approx(float(table()[row][-1]), abs=0.1)
