"""The ablation's book-keeping: which run carries a row, what a cell says, and a whole tiny ablation by its command."""

import json

import pytest

from demo import ablation, figures, plan
from demo.figures import cell, difference, escapes, paired, spread
from demo.plan import carriers, label
from tools.tiny import tiny_checkpoint, tiny_data


def test_a_row_is_read_off_the_longest_run_that_begins_with_it():
    rows = {"Base": "", "Curr-RL": "binary:1 open:2", "Curr-ReFT": "binary:1 open:2 reject:3", "RL": "open:2"}
    assert carriers(rows) == {"Base": rows["Curr-ReFT"], "Curr-RL": rows["Curr-ReFT"],
                              "Curr-ReFT": rows["Curr-ReFT"], "RL": "open:2"}


def test_a_stage_of_another_length_is_no_beginning():
    assert carriers({"a": "open:1", "b": "open:10 reject:1"})["a"] == "open:1"


def test_every_rl_row_takes_equally_many_updates():
    text = {name: stages.format(b=3, c=4, o=5, n=12, r=2) for name, stages in plan.ROWS.items()}
    for name, stages in text.items():
        steps = sum(int(part.split(":")[1]) for part in stages.split() if not part.startswith("reject"))
        assert steps == (0 if name in ("Base", "ReFT") else 12), name


def test_labels_are_those_of_a_runs_results():
    from currreft import Config
    stages = "binary+choice:5 reject:2"
    assert label(stages) == Config(stages=tuple(stages.split())).curriculum[-1].label and label("") == "base"


def splits(accuracy, n=100):
    return {"open_id": {"all": {"accuracy": accuracy, "n": n}}}


def test_a_cell_holds_mean_interval_and_range_by_hand():
    runs = {("base0", 0): splits(0.4), ("base0", 1): splits(0.6)}
    mean, half, each = spread(runs, "open_id")
    # Wilson at 50 of 100: 1.96 / (1 + 0.0384) * sqrt(0.0025 + 0.000096); two seeds on one test are not 200 questions
    assert (mean, each) == (pytest.approx(50), [pytest.approx(40), pytest.approx(60)])
    assert half == pytest.approx(9.6, abs=0.05)
    assert spread(runs | {("base1", 0): splits(0.5)}, "open_id")[1] == pytest.approx(6.9, abs=0.05)  # 200 questions
    assert cell((50.2, 9.6, [40, 60])) == "50 ±10 (40-60)" and cell((50, 9.6, [50])) == "50 ±10" and cell(None) == "-"


def test_differences_are_between_runs_of_the_same_base_and_seed():
    there = {"a": {("x", 0): splits(0.5), ("x", 1): splits(0.9)}, "b": {("x", 1): splits(0.4), ("x", 2): splits(0.0)}}
    assert difference(there, "a", "b", "open_id") == "+50 (+50 to +50), 1 of 1 above"
    assert difference(there, "a", "c", "open_id") == "-"
    there["b"]["x", 0] = splits(0.05)
    assert difference(there, "a", "b", "open_id") == "+48 ±32 (+45 to +50), 2 of 2 above, p 0.5"
    assert difference(there, "a", "b", "open_id", "open_id") == "+50 (+50 to +50), 1 of 1 above"  # 5 % has not escaped


def test_a_paired_difference_by_hand():
    """Mean 2, deviations -1, 0, 1: t(2) = 4.303 times 1 / sqrt(3). Of eight sign changes two bring 6 or -6."""
    mean, half, p = paired([1, 2, 3])
    assert (mean, half, p) == (2, pytest.approx(4.303 / 3**0.5), 2 / 8)
    assert paired([-3, 1, 2])[2] == 1.0 and paired([1] * 8)[2] == 2 / 256
    # p is exact, so under no effect at most one sample in twenty is below 0.05; sixteen pairs of fair coins say so
    signs = [[1 if n >> i & 1 else -1 for i in range(6)] for n in range(64)]
    assert sum(paired([s * (i + 1) for i, s in enumerate(row)])[2] <= 0.05 for row in signs) <= 0.05 * 64


def test_escapes_are_counted_with_their_interval():
    runs = {("x", n): splits(accuracy) for n, accuracy in enumerate((0.5, 0.6, 0.7, 0.11, 0.9, 0.1, 0.0, 0.04))}
    assert escapes(runs, "open_id") == "5 of 8 (31-86 %)"  # Wilson, as any table of it says
    assert escapes({}, "open_id") == "-"


def test_takeoff_is_the_step_that_ends_the_first_ten_above_a_tenth(tmp_path):
    def run(name, *stages):
        rows = [{"stage": stage, "stage_index": n, "reward/accuracy": reward, "equal_groups": 0.5}
                for n, (stage, rewards) in enumerate(stages) for reward in rewards]
        rows = [{"step": n, **row} for n, row in enumerate(rows, 1)]
        job = plan.Job(None, " ".join(f"{stage}:{len(rewards)}" for stage, rewards in stages), 0, tmp_path / name)
        job.folder.mkdir()
        job.folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return job
    jobs = [run("late", ("open", [0.0] * 14 + [0.5] * 6)), run("never", ("open", [0.1] * 20)),
            run("after", ("binary", [0.9] * 20), ("open", [0.0] * 8 + [0.6] * 12)),
            run("mix", ("binary+open", [0.9] * 20))]
    # 14 zeros: the ten that end at step 17 average 0.15; a stage of yes/no before does not count
    runs = [figures.metrics_of([job], job.stages)[0] for job in jobs]
    assert figures.takeoff(runs) == "17, never, 10" and figures.takeoff(runs[3:]) == "-"
    assert figures.metrics_of(jobs, "binary:20")[0] == runs[2][:20] and figures.equal_groups(runs) == "50 %"
    assert figures.ends_of(runs, "open") == [pytest.approx(30), pytest.approx(10), pytest.approx(60)]


def test_pass_at_k_is_measured_on_the_in_domain_questions_of_each_form():
    files = {"general": ("open", "g"), "judge": ("binary", "j"), "open_id": ("open", "o"), "open_more": ("open", "m")}
    assert [ablation.in_domain(files, form) for form in ("binary", "choice", "open")] == ["j", None, "o"]
    assert ablation.in_domain({"val": ("open", "v")}, "open") == "v"


def result_lines(page):
    """The lines of a page's tables that begin with | row |, | setting | or | after |: figures of the ablation."""
    lines, inside = [], False
    for text in (ablation.ROOT / page).read_text().splitlines():
        inside = text.startswith(("| row |", "| setting |", "| after |")) or inside and text.startswith("|")
        lines += [text] if inside and not text.startswith("| ---") else []
    return lines


@pytest.mark.parametrize("page, least", [("README.md", 6), ("docs/ablation.md", 25)])
def test_tables_of_results_are_those_that_the_command_wrote(page, least):
    written = (ablation.ROOT / "docs" / "results.md").read_text().splitlines()
    assert len(result_lines(page)) >= least
    assert [text for text in result_lines(page) if text not in written] == []


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A whole ablation on the tiny random model, rows cut to what its data can show."""
    folder = tmp_path_factory.mktemp("ablation")
    flags = ("--prompts_per_step 1 --num_generations 2 --max_completion_length 4 --reject_threshold 0 --sft_batch 1 "
             "--reject_samples 2 --threads 1")
    argv = ["--model", str(tiny_checkpoint(folder / "base")), "--data", str(tiny_data(folder / "data")), "--out",
            str(folder / "out"), "--steps", "1", "1", "1", "--reject_steps", "1", "--seeds", "0", "--samples", "8",
            "--flags", flags]
    return folder, argv


@pytest.mark.slow
def test_one_command_makes_every_row_and_a_second_call_runs_nothing(command, monkeypatch, capsys):
    folder, argv = command
    kept = {name: plan.ROWS[name] for name in ("Base", "RL (open only)", "Curr-RL", "ReFT")}
    for module in (ablation, plan):
        monkeypatch.setattr(module, "ROWS", kept)
    monkeypatch.setattr(figures, "COMPARED", ("Curr-RL",))
    monkeypatch.setattr(figures, "PAIRS", (("Curr-RL", "RL (open only)"),))
    argv = ["--rows", *kept, "--improve", *argv]
    assert ablation.main(argv) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert list(rows) == ["Base", "RL (open only)", "Curr-RL", "ReFT"]
    assert "| improve, no judge | 5 (5-5) |" in said
    for name in rows:
        assert f"| {name} | " in said
    own = json.loads(next((folder / "out" / "base").glob("binary1*seed0")).joinpath("results.json").read_text())["rows"]
    assert rows["Curr-RL"]["base seed 0"] == own[-1]["splits"] and own[-1]["name"] == "3-open"
    assert {path.name for path in (folder / "out").glob("*.png")} == {"rows.png", "curves.png", "pass_at_k.png"}
    monkeypatch.setattr(ablation, "call", lambda *_: pytest.fail("what is finished was done again"))
    assert ablation.main(argv) == 0 and capsys.readouterr().out == said
    assert ablation.main([*argv[:-1], argv[-1] + " --lr 1e-3"]) == 1  # results of other settings are not passed on
    assert "--lr was 1e-06, is 0.001" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [
    (["--model", "x", "--data", "nowhere"], "nowhere"), (["--flags=--lr 0"], "must lie between"),
    (["--variant=--clip 3"], "--clip"), (["--flags=--soft_iou", "--report"], "holds no finished run yet")])
def test_a_mistake_is_a_sentence_before_anything_runs(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "work", lambda *_: pytest.fail("something ran"))
    try:
        code = ablation.main([*argv, "--out", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err


def test_a_failed_run_is_named_and_the_others_are_reported(command, monkeypatch, capsys, tmp_path):
    folder, argv = command
    argv = [*argv, "--out", str(tmp_path)]

    def call(words, log, threads=None):
        if "currreft.py" in words and "open:3" in words:
            raise RuntimeError("the disk is full")
        if "currreft.py" in words:
            out = words[words.index("--out") + 1]
            stages = words[words.index("--stages") + 1:words.index("--seed")]
            names = ["base", *(label(" ".join(stages[:i + 1])) for i in range(3))]
            tmp_path.joinpath(out).mkdir(parents=True)
            tmp_path.joinpath(out, "results.json").write_text(json.dumps(
                {"rows": [{"name": name, "splits": splits(0.5)} for name in dict.fromkeys(names)]}))
            tmp_path.joinpath(out, "rejected-1.jsonl").write_text("")
            return ""
        raise RuntimeError("no samples")
    monkeypatch.setattr(ablation, "call", call)
    assert ablation.main(argv) == 1
    said = capsys.readouterr()
    assert "the disk is full" in said.err and "| Mix | 50 " in said.out and "\n| RL (open only) |" not in said.out


@pytest.mark.parametrize("bad, word", [(["--model", "x"], "--data"), (["--steps", "0", "1", "1"], "--steps"),
                                       (["--samples", "12"], "--samples"), (["--sed", "1"], "--sed")])
def test_a_bad_flag_exits_2_and_is_named(bad, word, capsys):
    with pytest.raises(SystemExit) as error:
        ablation.main(bad)
    assert error.value.code == 2 and word in capsys.readouterr().err
