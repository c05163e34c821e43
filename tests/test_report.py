"""The model card and --report_to: both say what the run's own files say, and neither can harm a run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import yaml
from runs import SMALL, refused

import currreft
import support.card as card
from currreft import Config, main
from support.report import Reporter
from support.tables import wilson


@pytest.fixture(scope="module")
def named(base, tmp_path_factory):
    """(checkpoint with a name that means something to Markdown, data)."""
    return shutil.copytree(base[0], tmp_path_factory.mktemp("base") / "my|`base`"), base[1]


@pytest.fixture
def flags(named):
    return ["--model", str(named[0]), "--data", str(named[1]), *SMALL, "--num_generations", "2",
            "--max_completion_length", "8", "--eval_limit", "3", "--stages", "binary:3", "reject:2", "--lr", "1e-6"]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(text, heading):
    """Cells of the rows of the table that follows a heading of a card."""
    lines = text.split(f"## {heading}\n")[1].split("## ")[0].splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


# ---- The card ----

def test_a_card_says_what_the_runs_files_say(flags, tmp_path):
    main([*flags, "--out", str(tmp_path / "run"), "--beta", "0.125"])
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    results = {row["name"]: row["splits"] for row in rows}
    kept = len(read_jsonl(tmp_path / "run" / "rejected-2.jsonl"))
    for label in ("1-binary", "2-reject"):
        text = (tmp_path / "run" / "stages" / label / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
        assert "license" not in front and "base_model" not in front, "neither is known"
        assert str(tmp_path) not in text and str(Path(flags[1]).parent) not in text and "my\\|'base'" in text
        stages = table(text, "Training")
        assert stages[1] == ["1-binary", "3 of 3", "12", "0.5", "`judge.jsonl` (12)"]
        if label == "2-reject":
            assert stages[2] == ["2-reject", "2 of 2", f"{kept} kept of 5 questions", f"{4 / kept:.3g}", "`questions.jsonl` (5)"]
        shown = table(text, "Results")[1:]
        assert len(shown) == sum(map(len, results[label].values())) > 2
        for split, task, n, before, after in shown:
            for cell, name in ((before, "base"), (after, label)):
                scores = results[name][split.strip("`")][task.strip("`")]
                half = 100 * wilson(scores["accuracy"] * scores["n"], scores["n"])
                assert int(n) == scores["n"] and cell == f"{100 * scores['accuracy']:.1f} ±{half:.1f}"
        settings = dict(row for row in table(text, "Training") if row[0].startswith("`"))
        assert settings["`beta`"] == "`0.125`" and settings["`stages`"] == "`binary:3 reject:2`"
        assert "`lr`" not in settings and "`model`" not in settings and "`data`" not in settings


def test_a_run_that_dies_before_its_card_writes_it_on_resume_and_keeps_the_others(flags, tmp_path, monkeypatch, capsys):
    run, stages = [*flags, "--out", str(tmp_path / "run")], tmp_path / "run" / "stages"

    def full(path, text):
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        original(path, text)
    original = card.write_aside
    monkeypatch.setattr(card, "write_aside", full)
    said = refused(capsys, run, 1)
    assert "No space left" in said and not (stages / "1-binary" / "README.md").exists()
    monkeypatch.undo()
    main([*run, "--resume"])
    first = (stages / "1-binary" / "README.md").read_text()
    assert "3 of 3" in first and "1-binary" in first and "2-reject" not in table(first, "Training")
    (stages / "1-binary" / "README.md").write_text("edited by its owner")
    main([*run, "--resume"])
    assert (stages / "1-binary" / "README.md").read_text() == "edited by its owner"


def test_a_card_of_a_run_without_tests_claims_no_results(base, flags, tmp_path):
    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    (data / "images").symlink_to(base[1] / "images")
    shutil.copy(base[1] / "grpo_data" / "train" / "open.jsonl", data / "train")
    main([*flags, "--data", str(data), "--out", str(tmp_path / "run"), "--stages", "choice:1", "--skip_bad_rows"])
    text = (tmp_path / "run" / "stages" / "1-choice" / "README.md").read_text()
    assert "Not evaluated" in text and table(text, "Training")[1][2:] == ["12", "0.167", "`open.jsonl` (12)"]


@pytest.mark.parametrize("name, hub", [
    ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("{tmp}/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/0123abcd", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("{tmp}/private/base", None)])
def test_a_base_model_is_named_without_the_machines_path(tmp_path, name, hub):
    if name.startswith("{tmp}"):
        name = name.format(tmp=tmp_path)
        Path(name).mkdir(parents=True)
    found, said = card.base_model(name)
    assert found == hub and str(tmp_path) not in said and (hub or "`base`") in said
    assert yaml.safe_load(card.front_matter(found)).get("base_model") == hub


def test_a_card_names_the_commit_of_the_project():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert card.commit().removesuffix("-dirty") == (head.stdout.strip() or "unknown")


@pytest.mark.parametrize("text", ["a|b", "`rm`", "x\n# y\n---\n", "\x1b[31m<script>", "", "|", "é ✓"])
def test_hostile_text_stays_in_its_cell(text):
    cell = card.code(text)
    assert cell[0] == cell[-1] == "`" and cell.count("`") == 2 and "\n" not in cell and "\x1b" not in cell
    assert len(re.split(r"(?<!\\)\|", f"| {cell} |")) == 3


def test_settings_of_addresses_and_paths_are_not_published():
    cfg = Config(data="/mine/data", model="/mine/base", judge_url="https://key@host", questions="/mine/q", lr=1e-5)
    assert card.setting_table(cfg) == "| `lr` | `1e-05` |"


# ---- --report_to ----

@pytest.fixture
def tensorboard(monkeypatch):
    """Stands for SummaryWriter."""
    def begin(folder, purge_step):
        Path(folder).mkdir(exist_ok=True)
        return module.SummaryWriter.return_value
    module = Mock()
    module.SummaryWriter.side_effect = begin
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module.SummaryWriter


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the wandb module; `rows`: what it logged before its network went away at step `broken_at`."""
    def log(row):
        if row["step"] == module.broken_at:
            raise ConnectionError("network is down")
        module.rows.append(row)
    module = Mock(rows=[], broken_at=None)
    module.init.return_value, module.log.side_effect = module, log
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def evaluations(run):
    rows = json.loads((run / "results.json").read_text())["rows"]
    return [{f"eval/{split}/{task}/{name}": value for split, tasks in row["splits"].items()
             for task, figures in tasks.items() for name, value in figures.items()} for row in rows]


def test_tensorboard_gets_every_number_under_its_step_and_resume_goes_on_there(flags, tmp_path, tensorboard):
    run = [*flags, "--out", str(tmp_path / "run"), "--report_to", "tensorboard"]
    main(run)
    writer, folder = tensorboard.return_value, str(tmp_path / "run" / "tensorboard")
    assert "    num_generations: 2" in writer.add_text.call_args.args[1]
    evaluated = [{"step": step, **figures} for step, figures in zip((0, 3, 5), evaluations(tmp_path / "run"))]
    expected = [call(name, value, row["step"]) for row in evaluated + read_jsonl(tmp_path / "run" / "metrics.jsonl")
                for name, value in row.items() if not isinstance(value, str) and name != "step"]
    assert sorted(writer.add_scalar.call_args_list) == sorted(expected), "each once"
    main([*run, "--resume"])
    assert writer.add_scalar.call_count == len(expected)
    assert tensorboard.call_args_list == [call(folder, purge_step=1), call(folder, purge_step=6)]


def test_wandb_continues_its_run_and_gets_every_row_once(flags, tmp_path, wandb):
    run = [*flags, "--out", str(tmp_path / "run"), "--report_to", "wandb"]
    main(run)
    main([*run, "--resume"])
    first, second = (begun.kwargs for begun in wandb.init.call_args_list)
    assert first["id"] == second["id"] and first["resume"] == second["resume"] == "allow"
    assert first["config"]["lr"] == 1e-6 and call("*", step_metric="step") in wandb.define_metric.call_args_list
    assert [row for row in wandb.rows if "stage" in row] == read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in wandb.rows if "stage" not in row] == [0, 3, 5]


def test_a_tracker_that_breaks_is_said_once_and_the_run_goes_on(flags, tmp_path, wandb, capsys):
    wandb.broken_at = 2
    main([*flags, "--out", str(tmp_path / "run"), "--report_to", "wandb"])
    said = capsys.readouterr().err
    assert said.count("--report_to wandb failed at step 2 (network is down)") == said.count("failed at step") == 1
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in wandb.rows] == [0, 1]


def test_a_tracker_taken_up_on_resume_is_told_the_steps_before(flags, tmp_path, wandb):
    run = [*flags, "--out", str(tmp_path / "run")]
    main(run)
    assert not wandb.mock_calls
    main([*run, "--resume", "--report_to", "wandb"])                # free to change
    assert wandb.rows == read_jsonl(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_tracker_is_a_sentence_before_a_model_loads(flags, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setitem(sys.modules, kind, None)                    # truly absent, or made so: the import fails
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(currreft, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    said = refused(capsys, [*flags, "--out", str(tmp_path / "run"), "--report_to", kind], 2)
    assert f"--report_to {kind}" in said and f"pip install {kind}" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_ends_the_run_before_training(flags, tmp_path, wandb, capsys):
    wandb.init.side_effect = RuntimeError("no api key")
    run = [*flags, "--out", str(tmp_path / "run")]
    said = refused(capsys, [*run, "--report_to", "wandb"], 1)
    assert "no api key" in said and "--resume" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    main([*run, "--resume"])
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 5


def test_without_the_flag_no_tracker_is_imported(flags, tmp_path, monkeypatch, capsys):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    reporter = Reporter()
    reporter.start(tmp_path, {}, 0)
    reporter({"step": 1})
    assert not list(tmp_path.iterdir())
    assert "--report_to must be tensorboard or wandb" in refused(capsys, [*flags, "--report_to", "mlflow"])
