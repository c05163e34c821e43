"""The ablation: which run carries a row, what a cell says, and a whole tiny one by its command."""

import itertools
import json
import re
from collections import Counter

import pytest
from runs import refused

from currreft import Config
from demo import ablation, plan
from demo.figures import cell, escapes, paired, spread
from demo.plan import carriers, label

OPEN = ("open_id", "all")


def test_a_row_is_read_off_the_longest_run_that_begins_with_it():
    rows = {"Base": "", "Curr-RL": "binary:1 open:2", "Curr-ReFT": "binary:1 open:2 reject:3", "RL": "open:2",
            "RL for longer": "open:20 reject:1"}
    assert carriers(rows) == rows | dict.fromkeys(("Base", "Curr-RL"), rows["Curr-ReFT"])


def test_the_demos_plan():
    """Eight runs of three rows in a setting, and every row in the first, of equal updates."""
    args = ablation.parse_flags([])
    rows, jobs = plan.plan(args, plan.demo_bases("out", args.base_seeds))
    assert len({job.folder for job in jobs}) == len(jobs)
    runs = Counter((row, job.base.setting) for row, stages in rows.items() for job in jobs
                   if job.carries(stages))
    for row in plan.COMPARED:
        assert [runs[row, setting] for setting in plan.SETTINGS] == [8, 8, 8, 2, 2], row
    assert [runs[row, "habit"] for row in ("SFT", "Reverse", "ReFT")] == [2, 2, 2]
    for row, text in rows.items():
        curriculum = Config(stages=tuple(text.split())).curriculum if text else ()
        assert label(text) == (curriculum[-1].label if text else "base")
        steps = sum(stage.steps for stage in curriculum if stage.name != "reject")
        assert steps == (0 if row in ("Base", "ReFT") else 200), row


def results(*accuracies, n=100):
    return {(base, seed): {OPEN: (accuracy, n)} for base, seed, accuracy in accuracies}


def test_a_cell_holds_mean_interval_and_range_by_hand():
    runs = results(("base0", 0, 40), ("base0", 1, 60))
    mean, half, each = spread(runs, OPEN)
    # Wilson at 50 of 100: 1.96 / (1 + 0.0384) * sqrt(0.0025 + 0.000096); two seeds on one test are not 200
    # questions, but two bases are
    assert (mean, each) == (pytest.approx(50), [40, 60]) and half == pytest.approx(9.6, abs=0.05)
    more = runs | results(("base1", 0, 50))
    assert spread(more, OPEN)[1] == pytest.approx(6.9, abs=0.05)
    there = {"two": runs, "one": results(("base0", 0, 50))}
    assert [cell(there, OPEN, row) for row in ("two", "one", "none")] == ["50 ±10 (40-60)", "50 ±10", "-"]


def test_differences_are_between_runs_of_the_same_base_and_seed():
    there = {"a": results(("x", 0, 50), ("x", 1, 90)), "b": results(("x", 1, 40), ("x", 2, 0))}
    assert cell(there, OPEN, "a", "b") == "+50 (+50 to +50), 1 of 1 above"
    assert cell(there, OPEN, "a", "c") == "-"
    there["b"] |= results(("x", 0, 5))
    assert cell(there, OPEN, "a", "b") == "+48 ±32 (+45 to +50), 2 of 2 above, p 0.5"


def test_a_paired_difference_by_hand():
    """Mean 2, deviations -1, 0, 1: t(2) = 4.303 times 1 / sqrt(3). Of eight signs two bring 6."""
    assert paired([1, 2, 3]) == (2, pytest.approx(4.303 / 3**0.5), 2 / 8)
    assert paired([-3, 1, 2])[2] == 1.0 and paired([1] * 8)[2] == 2 / 256
    # p is exact, so under no effect at most one sample in twenty is below 0.05
    found = [paired(row)[2] for row in itertools.product(*((n, -n) for n in range(1, 7)))]
    assert sum(p <= 0.05 for p in found) <= 0.05 * 64


def test_escapes_are_counted_with_their_interval():
    runs = results(*(("x", n, a) for n, a in enumerate((50, 60, 70, 11, 90, 10, 0, 4))))
    assert escapes(runs, OPEN) == "5 of 8 (31-86 %)"  # Wilson, as any table of it says
    assert escapes({}, OPEN) == "-"


@pytest.mark.parametrize("page, least", [("README.md", 3), ("docs/ablation.md", 20)])
def test_tables_of_results_are_those_that_the_command_wrote(page, least):
    written = (ablation.PROJECT / "docs" / "results.md").read_text().splitlines()
    found = [text for text in (ablation.PROJECT / page).read_text().splitlines()
             if text.startswith("|") and re.search(r"±\d|\d of \d \(", text)]
    assert len(found) >= least and set(found) <= set(written)


@pytest.fixture(scope="module")
def command(base, tmp_path_factory):
    """(folder, argv) of an ablation on the tiny random model, cut to what its data can show."""
    folder, (model, data) = tmp_path_factory.mktemp("ablation"), base
    flags = ("--prompts_per_step 1 --num_generations 2 --max_completion_length 4 --sft_batch 1 "
             "--reject_threshold 0 --reject_samples 2")
    return folder, ["--model", str(model), "--data", str(data), "--out", str(folder / "out"), "--steps", "1", "1",
                    "1", "--reject_steps", "1", "--seeds", "0", "--flags", flags]


@pytest.mark.slow
def test_one_command_makes_every_row_and_a_second_call_runs_nothing(command, monkeypatch, capsys):
    folder, argv = command
    argv = ["--rows", "Base", "RL (open only)", "Curr-RL", "ReFT", "--variant=--beta 0", *argv]
    assert ablation.main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert (folder / "out" / "results.md").read_text() == said.removesuffix("\n")
    runs = {path.parent.name: [row["name"] for row in json.loads(path.read_text())["rows"]]
            for path in (folder / "out" / "base").glob("*/results.json")}
    assert runs == {"open3-seed0": ["base", "1-open"], "reject1-seed0": ["base", "1-reject"],
                    "binary1-choice1-open1-seed0": ["base", "1-binary", "2-choice", "3-open"]}
    for line in ("Base", "RL (open only)", "Curr-RL", "ReFT", "main", "--beta 0"):
        assert f"\n| {line} | " in said
    monkeypatch.setattr(ablation, "call", lambda *_: pytest.fail("what is finished is done again"))
    assert ablation.main(argv) == 0 and capsys.readouterr().out == said
    assert ablation.main([*argv[:-1], argv[-1] + " --lr 1e-3"]) == 1  # results of other settings
    assert "--lr was 1e-06, is 0.001" in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_are_reported(command, monkeypatch, capsys, tmp_path):
    def call(words, log, gpus=0):
        if "open:3" in words:
            raise RuntimeError("the disk is full")
        stages = words[words.index("--stages") + 1:words.index("--seed")]
        names = [label(" ".join(stages[:i])) for i in range(len(stages) + 1)]
        splits = {"open_id": {"all": {"accuracy": 0.5, "n": 100}}}
        out = tmp_path / words[words.index("--out") + 1]
        out.mkdir(parents=True)
        rows = [{"name": name, "splits": splits} for name in names]
        (out / "results.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(ablation, "call", call)
    assert ablation.main([*command[1], "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "the disk is full" in err and "| Mix | 50 " in out and "\n| RL (open only) |" not in out


@pytest.mark.parametrize("argv, words", [
    (["--model", "x", "--data", "nowhere"], "nowhere"), (["--flags=--lr 0"], "must lie between"),
    (["--variant=--clip 3"], "--clip"), (["--flags=--soft_iou", "--report"], "no finished run yet"),
    (["--model", "x"], "--data"), (["--steps", "0", "1", "1"], "--steps"), (["--sed"], "--sed")])
def test_a_mistake_is_a_sentence_before_anything_runs(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "work", lambda *_: pytest.fail("something ran"))
    assert words in refused(capsys, [*argv, "--out", tmp_path], program=ablation.main)
