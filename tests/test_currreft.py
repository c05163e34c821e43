"""The method and the run: equations against slower ones, and every invariance that a user relies on."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers

import currreft
import engine
import support.directory as run_module
from currreft import Config, Stage, group_advantages, grpo_loss, learning_rate, main, seed_from
from data import batch_indices, load_data
from support.optimizer import ShardedAdamW
from support.ranks import join_ranks
from support.tiny import tiny_checkpoint, tiny_data
from support.words import RunError, UserError

HERE = Path(__file__).parent


def letters_reward(text, example=None, **_):
    """A reward that a random model can learn within a minute: the share of ASCII letters among 20 characters."""
    return min(1.0, sum(c.isascii() and c.isalpha() for c in text) / 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    return tiny_checkpoint(path / "model"), tiny_data(path / "data")


@pytest.fixture
def flags(base, monkeypatch):
    monkeypatch.setattr(currreft, "accuracy_reward", letters_reward)
    model, data = base
    return ["--model", str(model), "--data", str(data), "--prompts_per_step", "2", "--num_generations", "4", "--threads", "1",
            "--max_completion_length", "12", "--sft_batch", "2", "--lr", "1e-3", "--lr_schedule", "constant",
            "--reject_samples", "2", "--reject_threshold", "0", "--eval_limit", "2", "--sft_lr", "1e-3"]


def metrics(run, timeless=True):
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (timeless and ("second" in k))} for row in rows]


def weights(path):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype="auto").state_dict()


def assert_same_weights(a, b, **tolerance):
    a, b = weights(a), weights(b)
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Equations


def test_advantages_by_hand():
    a = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 1.0, 1.0]], dtype=torch.float64))
    s = 0.5 / (math.sqrt(1 / 3) + 1e-4)  # unbiased std of 1, 0, 0, 1 is sqrt(1/3)
    t = 1 / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(a, torch.tensor([[s, -s, -s, s], [t, -t, 0, 0]], dtype=torch.float64))


def test_equal_rewards_give_exactly_no_advantage():
    """Rounding in the mean of eight 1.2's, divided by 1e-4, would otherwise be a gradient."""
    assert not group_advantages(torch.full((3, 8), 1.2)).any()
    assert not group_advantages(torch.full((3, 7), 0.1)).any()


def slow_loss(logp, old, ref, A, lengths, beta, eps):
    total = 0.0
    for i, length in enumerate(lengths):
        own = 0.0
        for t in range(length):
            rho = math.exp(logp[i][t] - old[i][t])
            clipped = min(max(rho, 1 - eps), 1 + eps)
            d = min(max(ref[i][t] - logp[i][t], -20), 20)
            own += min(rho * A[i], clipped * A[i]) - beta * (math.exp(d) - d - 1)
        total += own / length
    return -total / len(lengths)


def random_case(seed=0, R=6, T=5):
    g = torch.Generator().manual_seed(seed)
    logp, old, ref = (-2 * torch.rand(R, T, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = torch.randint(1, T + 1, (R,), generator=g)
    mask = (torch.arange(T) < lengths[:, None]).double()
    return logp, old, ref, torch.randn(R, generator=g, dtype=torch.float64), mask, lengths


def test_loss_equals_a_slow_scalar_computation():
    logp, old, ref, A, mask, lengths = random_case()
    loss, sums = grpo_loss(logp, old, ref, A, mask, 0.04, 0.2)
    slow = slow_loss(logp.tolist(), old.tolist(), ref.tolist(), A.tolist(), lengths.tolist(), 0.04, 0.2)
    assert loss.item() == pytest.approx(slow, rel=1e-12)
    assert sums["tokens"] == lengths.sum() and 0 < sums["clipped"] < sums["tokens"]


def test_loss_by_hand():
    """One completion of two tokens, A = 1: rho = e^0.5 is clipped to 1.2, rho = e^-0.1 is not; no KL."""
    logp, old = torch.tensor([[-0.5, -1.1]]), torch.tensor([[-1.0, -1.0]])
    loss, sums = grpo_loss(logp, old, None, torch.tensor([1.0]), torch.ones(1, 2), beta=0.04, epsilon=0.2)
    assert loss.item() == pytest.approx(-(1.2 + math.exp(-0.1)) / 2)
    assert sums == {"kl": 0.0, "clipped": 1.0, "tokens": 2.0}


def test_gradient_on_policy_is_the_policy_gradient():
    """At rho = 1 and ref = logp the gradient is -A_i / (R |o_i|): the KL term is flat there."""
    logp, _, _, A, mask, lengths = random_case(1)
    logp.requires_grad_()
    grpo_loss(logp, logp.detach(), logp.detach(), A, mask)[0].backward()
    torch.testing.assert_close(logp.grad, -(A / lengths / len(A))[:, None] * mask)


def test_clip_stops_the_gradient_only_where_it_would_overshoot():
    logp = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]], requires_grad=True)
    A = torch.tensor([1.0, -1.0, 1.0, -1.0])
    grpo_loss(logp, torch.zeros(4, 1), None, A, torch.ones(4, 1))[0].backward()
    assert (logp.grad[:, 0] == 0).tolist() == [True, False, False, True]


def test_kl_is_positive_and_finite_for_any_difference():
    far = torch.tensor([[-1e4, 0.0, -3.0]])
    for logp, ref in ((far, -far), (-far, far), (far, far)):
        loss, sums = grpo_loss(logp.clone(), logp, ref, torch.zeros(1), torch.ones(1, 3))
        assert math.isfinite(loss.item()) and sums["kl"] >= 0


def test_padding_and_micro_batches_do_not_change_the_loss():
    logp, old, ref, A, mask, _ = random_case(2)
    whole = grpo_loss(logp, old, ref, A, mask)[0]
    wide = [torch.cat([x, torch.full((6, 3), fill, dtype=torch.float64)], 1) for x, fill in
            ((logp, -9.0), (old, -1.0), (ref, -5.0), (mask, 0.0))]
    torch.testing.assert_close(grpo_loss(*wide[:3], A, wide[3])[0], whole)
    parts = [grpo_loss(*(x[s] for x in (logp, old, ref, A, mask)), num_completions=6)[0]
             for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_learning_rate_schedule():
    cfg, stage = Config(data="d", warmup_steps=2), Stage(0, "open", 12)
    values = [learning_rate(cfg, stage, step, 1.0) for step in range(12)]
    assert values[:3] == [0.5, 1.0, 1.0] and values[7] == pytest.approx(0.5) and 0 < values[11] < 0.03
    constant = Config(data="d", lr_schedule="constant")
    assert {learning_rate(constant, stage, step, 0.1) for step in range(12)} == {0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_keep_updates_that_bfloat16_would_lose(dtype):
    """20 AdamW steps at 1e-6 equal float32 AdamW, rounded; without masters bfloat16 weights would not move at all."""
    start = (torch.randn(64, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    weight, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float().clone())
    ours, theirs = ShardedAdamW([("w", weight)]), torch.optim.AdamW([exact], lr=1e-6, weight_decay=0.0)
    for step in range(20):
        grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).to(dtype)
        weight.grad, exact.grad = grad.clone(), grad.float()
        ours.reduce_gradients(1e9)
        ours.step(1e-6)
        ours.zero_grad()
        theirs.step()
    torch.testing.assert_close(ours.masters["w"], exact.detach(), atol=0, rtol=0)
    assert torch.equal(weight, exact.to(dtype))
    assert not torch.equal(ours.masters["w"], start.float())


class Bomb:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_optimizer_state_runs_no_code_and_damage_is_a_sentence(tmp_path):
    optimizer = ShardedAdamW([("w", torch.nn.Parameter(torch.ones(2)))])
    torch.save({"w": {"step": Bomb(tmp_path / "loaded")}}, tmp_path / "optimizer-0.pt")
    with pytest.raises(RunError, match="optimizer-0.pt"):
        optimizer.load([tmp_path / "optimizer-0.pt"])
    assert not (tmp_path / "loaded").exists()
    (tmp_path / "optimizer-0.pt").write_bytes(b"torn")
    with pytest.raises(RunError, match="optimizer-0.pt"):
        optimizer.load([tmp_path / "optimizer-0.pt"])


def test_pickled_weights_are_not_read(base, tmp_path):
    """Only safetensors come from outside: a checkpoint that holds a pickle in their place is refused unread."""
    for file in base[0].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"w": Bomb(tmp_path / "loaded")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        currreft.load_policy(tmp_path)
    assert not (tmp_path / "loaded").exists()


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = ShardedAdamW([("w", weight)])
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizer.reduce_gradients(1.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_everything_but_gradients_travels_by_gloo_on_gpus_too(monkeypatch):
    """With NCCL alone a dead peer is found by a watchdog that aborts the process: no sentence, and no checkpoint."""
    begun = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: begun.append(backend))
    assert join_ranks(30).type == "cuda" and begun == ["cpu:gloo,cuda:nccl"]


def test_every_row_of_the_paper_is_a_command_line():
    rows = ["sft:9", "open:9", "binary:9", "choice:9", "open:3 choice:3 binary:3", "binary+choice+open:9",
            "binary:3 choice:3 open:3", "reject:9", "open:9 reject:3", "binary:3 choice:3 open:3 reject:3"]
    for row in rows:
        curriculum = Config(data="d", stages=tuple(row.split())).curriculum
        assert [f"{stage.name}:{stage.steps}" for stage in curriculum] == row.split()
    assert Stage.parse(0, "binary+choice:7").forms == ("binary", "choice") and Stage.parse(0, "reject:7").forms == ()


@pytest.mark.parametrize("bad", [
    "--stages=open", "--stages=open:0", "--stages=opne:10", "--stages=open:1e3", "--stages=binary+sft:10",
    "--num_generations=1", "--temperature=0", "--lr=-1", "--epsilon=2", "--reference=none", "--dtype=int8",
    "--partial_credit=2", "--max_pixels=10", "--task=poetry", "--keep=0", "--lr=fast", "--learning_rate=1", "--adv=1"])
def test_a_bad_flag_exits_2_with_a_sentence_that_names_it(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data", "nowhere", bad])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert bad.split("=")[0] in said and "Traceback" not in said


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for field in ("--stages", "--num_generations", "--beta", "--reject_threshold"):
        assert field in said
    assert "paper 2e-5" in " ".join(said.split())


def test_missing_data_is_a_sentence_before_any_model_loads(base, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--model", "nowhere", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_tiny_run_learns_through_all_stages(flags, tmp_path):
    out = tmp_path / "run"
    main([*flags, "--out", str(out), "--stages", "binary:25", "choice+open:5", "reject:2", "--lr", "5e-3",
          "--num_generations", "8"])
    rows = metrics(out)
    first, last = (sum(r["reward/accuracy"] for r in part) / 5 for part in (rows[:5], rows[20:25]))
    assert last > first + 0.1, (first, last)
    assert [r["stage"] for r in rows] == ["binary"] * 25 + ["choice+open"] * 5 + ["reject"] * 2
    assert [r["step"] for r in rows] == list(range(1, 33))
    for name in ("config.json", "results.json", "curves.png", "sheet.png", "rejected-3.jsonl"):
        assert (out / name).stat().st_size > 0
    assert [r["name"] for r in json.loads((out / "results.json").read_text())["rows"]] == \
        ["base", "1-binary", "2-choice+open", "3-reject"]
    kept = [json.loads(line) for line in (out / "rejected-3.jsonl").read_text().splitlines()]
    assert kept and all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in kept)


def test_logged_numbers_are_what_their_names_say(flags, tmp_path):
    """reward = accuracy + format; the per-task parts average to the whole; on-policy nothing is clipped."""
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:2", "--prompts_per_step", "4"])
    for row in metrics(tmp_path / "run"):
        assert row["reward"] == pytest.approx(row["reward/accuracy"] + row["reward/format"], abs=1e-4)
        assert row["clip_fraction"] == 0 and row["lr"] == 1e-3 and row["kl"] >= 0
        assert 0 <= row["truncated"] <= 1 and 1 <= row["completion_length"] <= 12
        tasks = [v for k, v in row.items() if k.startswith("reward/accuracy/")]
        assert min(tasks) - 1e-4 <= row["reward/accuracy"] <= max(tasks) + 1e-4
    assert metrics(tmp_path / "run")[0]["kl"] == pytest.approx(0, abs=1e-9), "the first policy is the reference"


@pytest.mark.parametrize("other", [["--micro_batch", "4"], ["--micro_batch", "3", "--checkpoint_activations"]])
def test_what_saves_time_or_memory_changes_nothing(flags, tmp_path, other):
    for name, extra in (("one", []), ("other", other)):
        main([*flags, "--out", str(tmp_path / name), "--stages", "open:1", "sft:1", "--prompts_per_step", "4",
              "--sft_batch", "4", *extra])
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "other"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"] > 0
        assert a.get("reward") == b.get("reward") and a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offload_changes_no_bit_and_a_run_may_be_resumed_across_it(flags, tmp_path, monkeypatch, dtype):
    """In bfloat16 sums of gradients are float32 on the host: better than on the device, so only float32 is bit-equal."""
    run = [*flags, "--stages", "binary:4", "sft:2", "--prompts_per_step", "2", "--save_every", "2", "--dtype", dtype]
    main([*run, "--out", str(tmp_path / "plain")])
    main([*run, "--out", str(tmp_path / "offload"), "--offload"])
    log = currreft.Run.log

    def stopping(self, *args):
        means = log(self, *args)
        if self.global_step == 2 and not self.cfg.resume:
            signal.raise_signal(signal.SIGTERM)
        return means
    monkeypatch.setattr(currreft.Run, "log", stopping)
    with pytest.raises(SystemExit):
        main([*run, "--out", str(tmp_path / "across"), "--offload"])
    main([*run, "--out", str(tmp_path / "across"), "--resume"])
    if dtype == "float32":
        for other in ("offload", "across"):
            assert metrics(tmp_path / other) == metrics(tmp_path / "plain")
            assert_same_weights(tmp_path / other / "stages" / "2-sft", tmp_path / "plain" / "stages" / "2-sft")
    else:
        for a, b in zip(metrics(tmp_path / "offload"), metrics(tmp_path / "plain"), strict=True):
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1)


def test_offload_keeps_no_gradient_on_the_device_between_micro_batches():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = ShardedAdamW([("w", weight)], offload=True)
    for value in (1.0, 2.0):
        weight.grad = torch.full((3,), value, dtype=torch.bfloat16)
        optimizer.collect()
        assert weight.grad is None
    assert optimizer.reduce_gradients(1e9) == pytest.approx(math.sqrt(27)) and optimizer.sums["w"].tolist() == [3.0] * 3
    optimizer.step(0.1)
    optimizer.zero_grad()
    assert optimizer.sums["w"].dtype == torch.float32 and not optimizer.sums["w"].any()


def test_the_reference_is_a_copy_of_the_policy_not_the_policy(flags, tmp_path, monkeypatch):
    """Taken from memory at a stage's start: it must stay behind, bring no rollout engine, and want no gradient."""
    seen, original = [], currreft.update
    monkeypatch.setattr(currreft, "update", lambda run, *a: seen.append(run) or original(run, *a))
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:2"])
    reference, policy = seen[0].reference, seen[0].policy
    assert not torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    assert reference.engine is None and not any(p.requires_grad for p in reference.parameters())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in policy.parameters()}


def test_the_reference_is_scored_once_however_many_updates(flags, tmp_path, monkeypatch):
    """It is frozen: scoring it again in every update gives the same numbers for a fifth of the time."""
    scored, original = [], currreft.token_logps
    monkeypatch.setattr(currreft, "token_logps", lambda model, *a: scored.append(model) or original(model, *a))
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:1", "--updates_per_rollout", "3"])
    assert sorted(map(scored.count, set(scored))) == [2, 6], "two micro-batches: the reference once, the policy three times"


def test_without_kl_a_group_of_equal_rewards_costs_nothing_and_changes_nothing(flags, tmp_path, monkeypatch):
    """Its gradient is exactly zero; the statistics are still those of all groups."""
    scored, original = [], currreft.token_logps
    monkeypatch.setattr(currreft, "accuracy_reward", lambda text, example, **_: (
        0.5 if example.task == "math" else letters_reward(text)))

    def counting(model, packed, *args):
        scored.append(len(packed.mask))
        return original(model, packed, *args)
    monkeypatch.setattr(currreft, "token_logps", counting)
    run = [*flags, "--stages", "open:3", "--beta", "0", "--prompts_per_step", "4", "--max_completion_length", "6"]
    main([*run, "--out", str(tmp_path / "some")])
    rows = metrics(tmp_path / "some")
    equal = [round(4 * row["equal_groups"]) for row in rows]
    assert sum(scored) == 4 * sum(4 - n for n in equal) and 0 < sum(equal) < 12
    scored.clear()
    monkeypatch.setattr(currreft, "group_advantages", lambda rewards: group_advantages(rewards) + 1e-30)  # none is left out
    main([*run, "--out", str(tmp_path / "all")])
    assert sum(scored) == 48
    for a, b in zip(rows, metrics(tmp_path / "all"), strict=True):
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) and k != "logp_gap" else b[k]
                for k, v in a.items()} == b
    assert_same_weights(tmp_path / "some" / "stages" / "1-open", tmp_path / "all" / "stages" / "1-open", atol=1e-5, rtol=0)


def test_a_step_whose_groups_are_all_equal_is_taken_all_the_same(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 0.5)
    monkeypatch.setattr(currreft, "format_reward", lambda *_, **__: 0.0)
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:2", "--beta", "0"])
    assert [(row["grad_norm"], row["kl"], row["equal_groups"]) for row in metrics(tmp_path / "run")] == [(0, 0, 1)] * 2


def test_several_updates_per_rollout_leave_the_old_policy_behind(flags, tmp_path):
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:1", "--updates_per_rollout", "3", "--lr", "3e-2"])
    (row,) = metrics(tmp_path / "run")
    assert row["clip_fraction"] > 0 and row["kl"] > 0


@pytest.mark.parametrize("reference", ["stage", "base"])
def test_the_reference_restarts_with_the_stage_unless_told(flags, tmp_path, reference):
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "binary:3", "choice:2", "--reference", reference])
    kl = [row["kl"] for row in metrics(tmp_path / "run")]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] > 1e-6
    assert (kl[3] < 1e-9) == (reference == "stage")


def test_a_stage_switch_frees_the_last_optimizer_before_it_makes_the_next(flags, tmp_path, monkeypatch):
    """Two sets of float32 masters and moments at once would not fit on a GPU that one fills."""
    alive, made = weakref.WeakSet(), ShardedAdamW.__init__

    def counting(self, *args):
        assert not len(alive), "the last stage's optimizer is still held"
        alive.add(self)
        made(self, *args)
    monkeypatch.setattr(ShardedAdamW, "__init__", counting)
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "binary:1", "choice:1", "sft:1"])


def test_beta_zero_loads_no_reference(flags, tmp_path, monkeypatch):
    loaded = []
    original = run_module.load_policy
    monkeypatch.setattr(run_module, "load_policy", lambda *a, **k: loaded.append(a[0]) or original(*a, **k))
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:1", "--beta", "0"])
    assert len(loaded) == 1


def test_sft_loss_is_that_of_transformers_on_the_assistant_turn_alone(flags, tmp_path, base):
    """Labels are the answer's tokens and its end token; prompt and image tokens carry no loss."""
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "sft:1", "--sft_batch", "4", "--micro_batch", "2"])
    (row,) = metrics(tmp_path / "run")
    cfg = currreft.parse_args([*flags, "--stages", "sft:1", "--sft_batch", "4"])
    examples, _, _ = load_data(cfg)
    policy, processor = currreft.load_policy(base[0])
    bias = engine.forbidden_bias(policy, processor)
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base[0], dtype=torch.float32)
    total, count = 0.0, 0
    for i in batch_indices(len(examples["sft"]), 4, 0, seed_from(0, 0)):
        example = examples["sft"][i]
        prompt = processor(example)
        answer = processor.tokenizer(example.solution + "<|im_end|>")["input_ids"]
        ids = torch.cat([prompt.input_ids, torch.tensor(answer)])
        images = {} if prompt.pixel_values is None else {
            "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        logits = plain(input_ids=ids[None], mm_token_type_ids=(ids == processor.image_token_id).int()[None],
                       **images).logits[0, len(prompt.input_ids) - 1:-1]
        total += torch.nn.functional.cross_entropy(logits + bias, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert row["loss"] == pytest.approx(total / count, rel=1e-4)


def test_checkpoints_open_in_plain_transformers_with_the_same_logits(flags, tmp_path, base):
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:1"])
    path = tmp_path / "run" / "stages" / "1-open"
    plain = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    policy, processor = currreft.load_policy(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template and (path / "preprocessor_config.json").exists()
    assert (path / "generation_config.json").read_text() and "architectures" in (path / "config.json").read_text()
    assert not {"shared_prefix", "windowed_flash"} & set((path / "config.json").read_text().split('"'))
    example = load_data(currreft.parse_args([*flags, "--stages", "open:1"]))[0]["open"][0]
    prompt = processor(example)
    hidden = currreft.packed_hidden(policy, engine.pack(policy, [prompt], [[]]))
    logits = plain(input_ids=prompt.input_ids[None], pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                   mm_token_type_ids=(prompt.input_ids == processor.image_token_id).int()[None]).logits[0]
    torch.testing.assert_close(policy.lm_head(hidden), logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(weights(base[0])["lm_head.weight"], policy.lm_head.weight), "training must have moved it"


def test_frozen_vision_stays_and_gives_the_same_step(flags, tmp_path, base):
    for name, extra in (("free", []), ("frozen", ["--freeze_vision"])):
        main([*flags, "--out", str(tmp_path / name), "--stages", "open:1", *extra])
    free, frozen = metrics(tmp_path / "free")[0], metrics(tmp_path / "frozen")[0]
    assert free["reward"] == frozen["reward"] and frozen["grad_norm"] < free["grad_norm"]
    before, after = weights(base[0]), weights(tmp_path / "frozen" / "stages" / "1-open")
    for name in before:
        if ".visual." in name:
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.slow
def test_a_stage_ends_early_at_its_threshold(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 1.0)
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "binary:60", "choice:1", "--advance_at", "0.9",
          "--max_completion_length", "2"])
    assert [row["stage"] for row in metrics(tmp_path / "run")] == ["binary"] * 50 + ["choice"]


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(flags, tmp_path, monkeypatch):
    original, calls = currreft.grpo_loss, []

    def sometimes_nan(*args, **kwargs):
        loss, sums = original(*args, **kwargs)
        calls.append(1)
        return (loss * float("nan") if len(calls) in (1, 2) else loss), sums
    monkeypatch.setattr(currreft, "grpo_loss", sometimes_nan)
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:2", "--micro_batch", "1"])
    assert [row["skipped_steps"] for row in metrics(tmp_path / "run")] == [1, 1]
    for value in weights(tmp_path / "run" / "stages" / "1-open").values():
        assert value.isfinite().all()


def test_non_finite_gradients_in_a_row_end_the_run_naming_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    original = currreft.grpo_loss
    monkeypatch.setattr(currreft, "grpo_loss", lambda *a, **k: (original(*a, **k)[0] * float("nan"), original(*a, **k)[1]))
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--out", str(tmp_path / "run"), "--stages", "open:9", "--save_every", "2"])
    assert stop.value.code == 1 and "0000004" in capsys.readouterr().err


def test_an_existing_run_is_refused_and_changed_settings_are_named(flags, tmp_path, capsys):
    run = [*flags, "--out", str(tmp_path / "run"), "--stages", "open:1"]
    main(run)
    for extra, words in (([], "--resume"), (["--resume", "--beta", "0.1"], "--beta was 0.04, is 0.1")):
        with pytest.raises(SystemExit) as stop:
            main([*run, *extra])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    main([*run, "--resume", "--beta", "0.1", "--allow_changes"])
    main([*run, "--resume", "--beta", "0.1", "--micro_batch", "2"])  # changes time, not results


def test_a_full_disk_ends_with_a_sentence_and_keeps_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    run = [*flags, "--out", str(tmp_path / "run"), "--stages", "open:6", "--save_every", "2"]
    original = torch.save

    def full(value, path):
        if "0000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(value, path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        main(run)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "No space left" in said and "0000002" in said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002"]
    monkeypatch.setattr(torch, "save", original)
    main([*run, "--resume"])
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Processes: ranks, kills, resumes

PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import currreft, sample
from test_currreft import letters_reward
currreft.accuracy_reward = letters_reward
kill = dict(item.split("=") for item in os.environ.get("KILL", "").split() )
log, judge = currreft.Run.log, sample.Judge.__call__
judged = []
def killing_log(self, stage, step, stats, seconds):
    means = log(self, stage, step, stats, seconds)
    if self.global_step == int(kill.get("step", -1)) and self.rank == int(kill.get("rank", 0)):
        if "raise" in kill:
            raise OSError(kill["raise"])
        os.kill(os.getpid(), int(kill.get("signal", signal.SIGKILL)))
    return means
def killing_judge(self, *args):
    judged.append(1)
    if len(judged) == int(kill.get("judged", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(self, *args)
currreft.Run.log, sample.Judge.__call__ = killing_log, killing_judge
currreft.main()
"""


def launch(tmp_path, arguments, ranks=1, kill=""):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(root=str(HERE.parent), tests=str(HERE)))
    python = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return subprocess.run([*python, str(script), *arguments], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "KILL": kill, "OMP_NUM_THREADS": "1"})


STAGES = ["--stages", "binary:4", "reject:3", "--save_every", "2", "--keep", "1"]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """{ranks: run directory} of runs that nobody disturbed."""
    model, data = base
    path = tmp_path_factory.mktemp("whole")
    arguments = ["--model", str(model), "--data", str(data), "--prompts_per_step", "2", "--num_generations", "4",
                 "--threads", "1", "--max_completion_length", "12", "--sft_batch", "2", "--lr", "1e-3", "--sft_lr", "1e-3",
                 "--reject_samples", "2", "--reject_threshold", "0", "--eval_limit", "2", *STAGES]
    runs = {}
    for ranks in (1, 2):
        done = launch(path, [*arguments, "--out", str(path / str(ranks))], ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[ranks] = path / str(ranks)
    return arguments, runs


def test_a_step_without_images_reduces_the_same_tensors():
    """A text-only micro-batch leaves the vision tower without gradients; they count as zeros, and nothing hangs."""
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    optimizer = ShardedAdamW([("used", used), ("unused", unused)])
    used.grad = torch.ones(2)
    optimizer.reduce_gradients(10.0)
    assert torch.equal(unused.grad, torch.zeros(3))
    optimizer.step(0.1)
    assert torch.equal(unused, torch.ones(3)) and not torch.equal(used, torch.ones(2))


def test_two_ranks_take_the_steps_of_one(uninterrupted):
    _, runs = uninterrupted
    one, two = metrics(runs[1]), metrics(runs[2])
    for a, b in zip(one, two, strict=True):
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for k, v in a.items()} == b
    assert_same_weights(runs[1] / "stages" / "2-reject", runs[2] / "stages" / "2-reject", atol=1e-4, rtol=0)
    assert json.loads((runs[1] / "results.json").read_text())["rows"][0] == \
        json.loads((runs[2] / "results.json").read_text())["rows"][0]


@pytest.mark.parametrize("ranks, kill", [(1, "step=3"), (1, "step=6"), (1, "judged=3"), (2, "step=3 rank=1"),
                                         (2, "judged=3 rank=1")])
def test_a_killed_run_resumes_bit_for_bit(uninterrupted, tmp_path, ranks, kill):
    arguments, runs = uninterrupted
    arguments = [*arguments, "--out", str(tmp_path / "run")]
    killed = launch(tmp_path, arguments, ranks, kill)
    assert killed.returncode != 0
    resumed = launch(tmp_path, [*arguments, "--resume"], ranks)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert metrics(tmp_path / "run") == metrics(runs[ranks])
    assert_same_weights(tmp_path / "run" / "stages" / "2-reject", runs[ranks] / "stages" / "2-reject")
    assert (tmp_path / "run" / "results.json").read_text() == (runs[ranks] / "results.json").read_text()


def test_sigterm_saves_first(uninterrupted, tmp_path):
    arguments, runs = uninterrupted
    arguments = [*arguments, "--out", str(tmp_path / "run")]
    stopped = launch(tmp_path, arguments, 1, f"step=3 signal={signal.SIGTERM.value}")
    assert stopped.returncode == 143 and "--resume" in stopped.stderr
    assert latest_checkpoint(tmp_path / "run")[1]["global_step"] == 3
    assert launch(tmp_path, [*arguments, "--resume"]).returncode == 0
    assert metrics(tmp_path / "run") == metrics(runs[1])


def test_a_run_of_one_rank_resumes_on_two(uninterrupted, tmp_path):
    arguments, runs = uninterrupted
    arguments = [*arguments, "--out", str(tmp_path / "run")]
    launch(tmp_path, arguments, 1, "step=3")
    resumed = launch(tmp_path, [*arguments, "--resume"], 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    for a, b in zip(metrics(tmp_path / "run"), metrics(runs[1]), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_stalled_rank_ends_the_run_with_a_sentence(uninterrupted, tmp_path, monkeypatch):
    """No collective waits for ever: a rank that stops answering is given up after --timeout_minutes."""
    arguments, _ = uninterrupted
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    done = launch(tmp_path, [*arguments, "--out", str(tmp_path / "run"), "--timeout_minutes", "0.1"], 2,
                  f"step=3 rank=1 signal={signal.SIGSTOP.value}")
    assert done.returncode != 0 and "--timeout_minutes" in done.stderr and "--resume" in done.stderr


def test_an_error_on_one_rank_ends_all_with_its_sentence(uninterrupted, tmp_path):
    """The others, which wait for it, are ended by torchrun within seconds; what the rank said comes first."""
    arguments, _ = uninterrupted
    started = time.monotonic()
    done = launch(tmp_path, [*arguments, "--out", str(tmp_path / "one")], 2, "step=3 rank=1 raise=disk-gone")
    assert done.returncode != 0 and time.monotonic() - started < 90  # not --timeout_minutes 30
    assert "currreft (rank 1): disk-gone; what was finished is kept, continue with --resume" in done.stderr


def test_a_mistake_that_all_ranks_see_is_said_once(uninterrupted, tmp_path):
    arguments, _ = uninterrupted
    done = launch(tmp_path, [*arguments, "--out", str(tmp_path / "run"), "--prompts_per_step", "3"], 2)
    assert done.returncode != 0
    assert done.stderr.count("--prompts_per_step 3 is not a multiple of the 2 ranks") == 1


def test_user_error_is_no_traceback(uninterrupted, tmp_path):
    done = launch(tmp_path, ["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")])
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(tmp_path / "nothing") in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Before a run


def test_check_trains_nothing_and_shows_what_a_careful_person_would_look_at(flags, tmp_path, capsys):
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "binary:3", "reject:2", "--check"])
    said = capsys.readouterr().err
    for words in ("5 steps planned", "largest difference", "accuracy", "truth", "memory", "time of a step", "tokens"):
        assert words in said
    difference = float(said.split("largest difference ")[1].split()[0])
    assert difference < 1e-4 and not (tmp_path / "run").exists()


def test_long_prompts_are_refused_or_dropped_and_counted_never_cut(flags, tmp_path, capsys):
    run = [*flags, "--out", str(tmp_path / "run"), "--stages", "open:1", "--max_prompt_length", "112"]
    with pytest.raises(SystemExit) as stop:
        main(run)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "--max_prompt_length 112" in said and ".jsonl:" in said
    main([*run, "--skip_bad_rows"])
    assert "dropped" in capsys.readouterr().err
