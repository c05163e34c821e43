"""The run: what a stage, a step and a flag do, and what they leave alone."""

import dataclasses
import itertools
import json
import re
import weakref

import pytest
import torch
import transformers
from runs import HERE, SMALL, assert_near, letters, metrics, outcome, refused, weights

import currreft
import sample
from currreft import Config, Stage, group_advantages, main, seed_from
from data import batch_indices, load_data
from packed import forbidden_bias, pack, packed_hidden
from support.optimizer import ShardedAdamW
from tools import check


@pytest.fixture
def flags(base, learnable):
    return ["--model", str(base[0]), "--data", str(base[1]), *SMALL]


@pytest.fixture
def train(flags, tmp_path):
    """train(*more flags, name) -> metrics of a run in the directory `name`."""
    def train(*more, name="run"):
        main([*flags, "--out", str(tmp_path / name), *more])
        return metrics(tmp_path / name)
    return train


def test_every_row_of_the_paper_is_a_command_line():
    for row in ("sft:9", "open:9", "binary:9", "choice:9", "open:3 choice:3 binary:3", "binary+choice+open:9",
                "binary:3 choice:3 open:3", "reject:9", "open:9 reject:3", "binary:3 choice:3 open:3 reject:3"):
        curriculum = Config(data="d", stages=tuple(row.split())).curriculum
        assert [f"{stage.name}:{stage.steps}" for stage in curriculum] == row.split()
    assert Stage.parse(0, "binary+choice:7").forms == ("binary", "choice") and Stage.parse(0, "reject:7").forms == ()


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"--{field.name} " in said for field in dataclasses.fields(Config)) and "paper 2e-5" in said


def test_the_check_takes_a_step_of_each_grpo_stage_and_writes_nothing(flags, tmp_path, capsys):
    assert check.main([*flags, "--out", str(tmp_path / "run"), "--stages", "binary:4", "open:3", "reject:2"]) == 0
    said = capsys.readouterr().err
    assert said.count("time of a step") == 2 and "7 steps of GRPO planned" in said and not (tmp_path / "run").exists()


def test_a_tiny_run_learns_through_all_stages(train, tmp_path):
    rows = train("--stages", "binary:20", "choice+open:3", "reject:2", "--lr", "5e-3", "--num_generations", "8")
    out = tmp_path / "run"
    first, last = (sum(r["reward/accuracy"] for r in part) / 5 for part in (rows[:5], rows[15:20]))
    assert last > first + 0.1, (first, last)
    assert [r["stage"] for r in rows] == ["binary"] * 20 + ["choice+open"] * 3 + ["reject"] * 2
    assert [r["step"] for r in rows] == list(range(1, 26))
    assert all((out / name).stat().st_size > 0 for name in ("config.json", "samples.jsonl"))
    assert [r["name"] for r in json.loads((out / "results.json").read_text())["rows"]] == \
        ["base", "1-binary", "2-choice+open", "3-reject"]
    kept = [json.loads(line) for line in (out / "rejected-3.jsonl").read_text().splitlines()]
    assert kept and all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in kept)


def test_logged_numbers_are_what_their_names_say(train):
    """reward = accuracy + format; the per-task parts average to the whole; on-policy nothing is clipped."""
    rows = train("--stages", "open:2", "--prompts_per_step", "4")
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward/accuracy"] + row["reward/format"], abs=1e-4)
        assert row["clip_fraction"] == 0 and row["lr"] == 1e-3 and row["kl"] >= 0
        assert 0 <= row["truncated"] <= 1 and 1 <= row["completion_length"] <= 12
        tasks = [v for k, v in row.items() if k.startswith("reward/accuracy/")]
        assert min(tasks) - 1e-4 <= row["reward/accuracy"] <= max(tasks) + 1e-4
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9), "the first policy is the reference"
    assert torch.are_deterministic_algorithms_enabled(), "with two threads no run was another's equal"


def test_what_saves_time_or_memory_changes_nothing(train):
    run = ["--stages", "open:1", "sft:1", "--prompts_per_step", "4", "--sft_batch", "4"]
    one = train(*run)
    others = [*train(*run, "--micro_batch", "4", name="two"),
              *train(*run, "--micro_batch", "3", "--checkpoint_activations", name="three")]
    for a, b in zip(one * 2, others, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["grad_norm"] > 0
        assert a.get("reward") == b.get("reward") and a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)


def test_the_reference_is_a_copy_of_the_policy_and_scored_once_however_many_updates(train, monkeypatch):
    """Taken from memory at a stage's start: it must stay behind, bring no rollout engine, and want no gradient.

    It is frozen: scoring it again in every update gives the same numbers for a fifth of the time.
    """
    seen, freed, scored = [], [], []
    update, evaluate, score = currreft.update, currreft.Run.evaluate, currreft.token_logps
    monkeypatch.setattr(currreft, "update", lambda run, *a: seen.append((run, run.reference)) or update(run, *a))
    monkeypatch.setattr(currreft.Run, "evaluate", lambda run, name: freed.append(
        run.optimizer is run.reference is None) or evaluate(run, name))
    monkeypatch.setattr(currreft, "token_logps", lambda model, *a: scored.append(model) or score(model, *a))
    train("--stages", "open:1", "--updates_per_rollout", "3")
    assert sorted(map(scored.count, set(scored))) == [2, 6], "two micro-batches: once, the policy three times"
    reference, policy = seen[0][1], seen[0][0].policy
    assert freed == [True, True], "an evaluation has the memory of optimizer and reference"
    assert not torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    assert reference.engine is None and not any(p.requires_grad for p in reference.parameters())
    assert not {p.data_ptr() for p in reference.parameters()} & {p.data_ptr() for p in policy.parameters()}


def test_without_kl_a_group_of_equal_rewards_costs_nothing_and_changes_nothing(train, tmp_path, monkeypatch):
    """Its gradient is exactly zero; the statistics are still those of all groups."""
    scored, original = [], currreft.token_logps
    monkeypatch.setattr(currreft, "accuracy_reward", lambda text, example, **_: (
        0.5 if example.task == "math" else letters(text)))

    def counting(model, packed, *args):
        scored.append(len(packed.mask))
        return original(model, packed, *args)
    monkeypatch.setattr(currreft, "token_logps", counting)
    run = ["--stages", "open:3", "--beta", "0", "--prompts_per_step", "4", "--max_completion_length", "6"]
    rows = train(*run, name="some")
    equal = [round(4 * row["equal_groups"]) for row in rows]
    assert sum(scored) == 4 * sum(4 - n for n in equal) and 0 < sum(equal) < 12
    scored.clear()
    monkeypatch.setattr(currreft, "group_advantages", lambda rewards: group_advantages(rewards) + 1e-30)  # none is left out
    every = train(*run, name="all")
    assert sum(scored) == 48
    for a, b in zip(rows, every, strict=True):
        assert {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) and k != "logp_gap" else b[k]
                for k, v in a.items()} == b
    assert_near(*(tmp_path / name / "stages" / "1-open" for name in ("some", "all")), atol=1e-5, rtol=0)


def test_a_step_whose_groups_are_all_equal_is_taken_all_the_same(train, monkeypatch):
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 0.5)
    monkeypatch.setattr(currreft, "format_reward", lambda *_, **__: 0.0)
    rows = train("--stages", "open:2", "--beta", "0")
    assert [(row["grad_norm"], row["kl"], row["equal_groups"]) for row in rows] == [(0, 0, 1)] * 2


def test_the_reference_stays_the_base_if_told(train):
    """That it else restarts with the stage, and what a resume takes for it, tests/test_method.py recomputes."""
    kl = [row["kl"] for row in train("--stages", "binary:2", "choice:1", "--reference", "base")]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[1] > 1e-6 and kl[2] > 1e-6


def test_a_stage_switch_frees_the_last_optimizer_and_beta_zero_loads_no_reference(train, monkeypatch):
    """Two sets of float32 masters and moments at once would not fit on a GPU that one fills."""
    alive, made, loaded, load_policy = weakref.WeakSet(), ShardedAdamW.__init__, [], currreft.load_policy
    monkeypatch.setattr(currreft, "load_policy", lambda *a, **k: loaded.append(a[0]) or load_policy(*a, **k))

    def counting(self, *args):
        assert not len(alive), "the last stage's optimizer is still held"
        alive.add(self)
        made(self, *args)
    monkeypatch.setattr(ShardedAdamW, "__init__", counting)
    train("--stages", "binary:1", "choice:1", "sft:1", "--beta", "0")
    assert len(loaded) == 1


def test_sft_loss_is_that_of_transformers_on_the_assistant_turn_alone(train, flags, base):
    """Labels are the answer's tokens and its end token; prompt and image tokens carry no loss."""
    (row,) = train("--stages", "sft:1", "--sft_batch", "4", "--micro_batch", "2")
    examples, _, _ = load_data(currreft.parse_args([*flags, "--stages", "sft:1", "--sft_batch", "4"]))
    policy, processor = currreft.load_policy(base[0])
    bias = forbidden_bias(policy, processor)
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


def test_checkpoints_open_in_plain_transformers_with_the_same_logits(train, flags, tmp_path, base):
    train("--stages", "open:1")
    path = tmp_path / "run" / "stages" / "1-open"
    plain = transformers.AutoModelForImageTextToText.from_pretrained(path).eval()
    policy, processor = currreft.load_policy(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template and (path / "preprocessor_config.json").exists()
    assert (path / "generation_config.json").read_text() and "architectures" in (path / "config.json").read_text()
    assert not {"shared_prefix", "windowed_flash"} & set((path / "config.json").read_text().split('"'))
    example = load_data(currreft.parse_args([*flags, "--stages", "open:1"]))[0]["open"][0]
    prompt = processor(example)
    hidden = packed_hidden(policy, pack(policy, [prompt], [[]]))
    logits = plain(input_ids=prompt.input_ids[None], pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw,
                   mm_token_type_ids=(prompt.input_ids == processor.image_token_id).int()[None]).logits[0]
    torch.testing.assert_close(policy.lm_head(hidden), logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(weights(base[0])["lm_head.weight"], policy.lm_head.weight), "training must have moved it"


def test_frozen_vision_stays_and_gives_the_same_step(train, tmp_path, base):
    (free,) = train("--stages", "open:1", name="free")
    (frozen,) = train("--stages", "open:1", "--freeze_vision", name="frozen")
    assert free["reward"] == frozen["reward"] and frozen["grad_norm"] < free["grad_norm"]
    before, after = weights(base[0]), weights(tmp_path / "frozen" / "stages" / "1-open")
    assert all(torch.equal(before[name], after[name]) for name in before if ".visual." in name)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def make_nan(monkeypatch, *which):
    """The losses of these calls, or of all, are not finite."""
    original, calls = currreft.grpo_loss, itertools.count(1)

    def loss_or_nan(*args, **kwargs):
        loss, sums = original(*args, **kwargs)
        return (loss * float("nan") if next(calls) in which or not which else loss), sums
    monkeypatch.setattr(currreft, "grpo_loss", loss_or_nan)


def test_a_step_with_a_non_finite_gradient_is_skipped_and_counted(train, tmp_path, monkeypatch):
    make_nan(monkeypatch, 1, 2)
    assert [row["skipped_steps"] for row in train("--stages", "open:2", "--micro_batch", "1")] == [1, 1]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "stages" / "1-open").values())


def test_non_finite_gradients_in_a_row_end_the_run_naming_the_last_checkpoint(flags, tmp_path, monkeypatch, capsys):
    make_nan(monkeypatch)
    run = [*flags, "--out", tmp_path / "run", "--stages", "open:9", "--save_every", "2"]
    assert "0000004" in refused(capsys, run, 1)


def test_long_prompts_are_refused_or_dropped_and_counted_never_cut(flags, tmp_path, capsys):
    run = [*flags, "--out", str(tmp_path / "run"), "--stages", "open:1", "--max_prompt_length", "112"]
    said = refused(capsys, run)
    assert "--max_prompt_length 112" in said and ".jsonl:" in said
    main([*run, "--skip_bad_rows"])
    assert "dropped" in capsys.readouterr().err


def test_a_generator_that_knows_no_entropy_and_samples_otherwise_is_told(train, monkeypatch, capsys):
    """Another engine may not report entropies; log-probabilities far from the scored ones are said once a stage."""
    original = currreft.generate

    def elsewhere(*args, **kwargs):
        groups = original(*args, **kwargs)
        for completion in sum(groups, []):
            completion.entropy, completion.logps = None, completion.logps + 0.01
        return groups
    monkeypatch.setattr(currreft, "generate", elsewhere)
    assert "entropy" not in train("--stages", "open:2")[0]
    assert capsys.readouterr().err.count("samples another distribution") == 1


# ---- Every flag reaches what it sets ----

BASELINE = ["--stages", "open:2", "reject:1", "--updates_per_rollout", "2", "--lr", "1e-2", "--num_generations", "3",
            "--max_completion_length", "6", "--eval_limit", "1"]
CHANGES = ["--seed 1", "--temperature 0.5", "--prompts_per_step 1", "--num_generations 2", "--beta 0.5", "--epsilon 0.001",
           "--updates_per_rollout 1", "--max_completion_length 5", "--max_pixels 4704", "--lr 1e-3", "--sft_lr 1e-4",
           "--lr_schedule cosine", "--partial_credit 0.7", "--soft_iou", "--freeze_vision", "--sft_batch 1",
           "--reject_samples 1", "--reject_threshold 30", "--stages choice:2 reject:1", "--dtype bfloat16",
           "--eval_limit 2", "--questions {few}"]


def shown(base, out, monkeypatch, *changes):
    """All numbers and weights of a run, whose reward depends on the settings of rewards."""
    def reward(text, example, partial_credit, soft_iou):
        return letters(text) * (partial_credit + soft_iou + 1) / 3
    monkeypatch.setattr(currreft, "accuracy_reward", reward)
    monkeypatch.setattr(sample, "quality_score", lambda text, example: 100 * letters(text) * ("Look." not in text))
    main(["--model", str(base[0]), "--data", str(base[1]), *SMALL, *BASELINE, *changes, "--out", str(out)])
    return outcome(out)


@pytest.fixture(scope="module")
def baseline(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return shown(base, tmp_path_factory.mktemp("flags") / "run", patch)


@pytest.mark.parametrize("change", CHANGES)
def test_a_flag_of_the_results_changes_them(change, base, baseline, tmp_path, monkeypatch):
    few = tmp_path / "few.jsonl"
    few.write_text((base[1] / "SFT_data" / "reject" / "questions.jsonl").read_text().split("\n")[0])
    words = change.format(few=few).split()
    assert shown(base, tmp_path / "run", monkeypatch, *words) != baseline


def test_the_judges_flags_reach_the_judge_before_and_within_phase_2(flags, tmp_path, monkeypatch):
    class Far(sample.Rules):
        asked = []

        def __init__(self, url, model):
            self.name = f"{model} at {url}"

        def probe(self):
            self.asked.append("probed")

        def __call__(self, completion, example):
            return 99.0
    monkeypatch.setattr(currreft, "EndpointJudge", Far)
    main([*flags, "--out", str(tmp_path / "run"), "--stages", "reject:1", "--judge_url", "http://j", "--judge_model", "m"])
    kept = [json.loads(line) for line in (tmp_path / "run" / "rejected-1.jsonl").read_text().splitlines()]
    assert Far.asked and kept and {(row["judge"], row["score"]) for row in kept} == {("m at http://j", 99.0)}


def test_every_flag_is_read():
    """The table above has those that change results; the others are in tests of their own, and none is read nowhere."""
    source = "".join(file.read_text() for file in (HERE.parent / "currreft.py", HERE.parent / "data.py",
                                                   *(HERE.parent / "support").glob("*.py")))
    for field in dataclasses.fields(Config):
        assert re.search(rf"(cfg\.{field.name}\b|settings\[.{field.name}.\])", source), field.name
