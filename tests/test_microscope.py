"""The picture of a step shows what the step did, against the reference that was trained against."""

import shutil

import pytest
import torch

import currreft
from support.files import read_jsonl, read_record, write_record
from support.tiny import tiny_checkpoint, tiny_data
from tools.microscope import REFERENCES, draw_step, look, main


def reward(text, example=None, **_):
    return sum(map(ord, text)) % 10 / 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two short runs of the random stand-in, by paths relative to where they stood; then moved."""
    path, patch = tmp_path_factory.mktemp("here"), pytest.MonkeyPatch()
    patch.setattr(currreft, "accuracy_reward", reward)
    patch.chdir(path)
    tiny_checkpoint(path / "model"), tiny_data(path / "data")
    for name in ("stage", "base"):
        currreft.main(["--model", "model", "--data", "data", "--out", f"runs/{name}", "--stages",
                       "choice:3", "open:2", "--prompts_per_step", "2", "--num_generations", "4",
                       "--max_completion_length", "10", "--lr", "1e-2", "--save_every", "2",
                       "--eval_limit", "1", "--reference", name])
    patch.chdir(path.parent)
    moved = shutil.move(path, path.parent / "elsewhere")
    yield moved / "runs"
    patch.undo()


@pytest.mark.parametrize("name, step", [("stage", 1), ("stage", 3), ("stage", 4), ("base", 4)])
def test_the_step_is_the_one_that_the_run_took(run, name, step, capsys):
    """Rewards and KL are those of the log; pushes A / |o| / G where policy and reference agree."""
    row = read_jsonl(run / name / "metrics.jsonl")[step - 1]
    groups = [look(run / name, step, number) for number in (1, 2)]
    assert "not quite" not in capsys.readouterr().err
    rewards = torch.cat([seen.group.rewards for seen in groups])
    assert row["reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    tokens = sum(len(each) for seen in groups for each in seen.tokens)
    kl = sum(seen.kl.sum().item() for seen in groups) / tokens
    assert row["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert groups[0].reference == REFERENCES[name]
    fresh = row["stage_step"] == 1 and name == "stage"
    assert (kl < 1e-6) == fresh
    seen = groups[0]
    for push, advantage, tokens in zip(seen.push, seen.group.advantages, seen.tokens):
        expected = (advantage / len(tokens) / 4).expand(len(tokens))
        assert not fresh or torch.allclose(push[:len(tokens)], expected, atol=1e-6, rtol=1e-4)
        assert not push[len(tokens):].any(), "nothing pushes padding"


def test_the_picture_lies_beside_the_run_wherever_its_data_have_gone(run, tmp_path, capsys):
    shutil.copytree(run / "stage", alone := tmp_path / "a" / "b" / "alone")
    assert main([str(alone)]) == 2 and "--data" in capsys.readouterr().err
    assert main([str(alone), "--data", str(run.parent / "data")]) == 0
    assert (alone / "step.png").exists()


def test_what_cannot_be_shown_is_a_sentence(run, monkeypatch, capsys):
    for argv, words in (([run / "stage", "--step", "2"], "--step can be 1, 3, 4"),
                        ([run / "stage", "--group", "9"], "groups 1 to 2"),
                        ([run], "no directory of a run")):
        assert main(list(map(str, argv))) == 2 and words in capsys.readouterr().err
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 1.0)
    assert main([str(run / "stage"), "--step", "1"]) == 2
    said = capsys.readouterr().err
    assert "every advantage is 0" in said and "not quite the step" in said


def test_a_step_without_reference_says_so_and_hostile_tokens_are_drawn(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs")
    file = tmp_path / "runs" / "stage" / "config.json"
    write_record(file, read_record(file) | {"beta": 0.0})
    seen = look(tmp_path / "runs" / "stage", 4, 1, run.parent / "data")
    assert "beta is 0" in seen.reference and not seen.kl.any() and seen.push.any()
    hostile = ["\u202e" * 40, "\U0001f600", "a" * 300, "\n"]
    seen.tokens = [(hostile + tokens)[:len(tokens)] for tokens in seen.tokens]
    assert draw_step(seen, tmp_path / "hostile.png").stat().st_size > 0
