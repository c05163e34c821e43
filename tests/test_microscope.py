"""The picture of a step shows what the step did: its numbers against slower ones, and sentences where there is none."""

import json

import pytest
import torch
from PIL import Image
from tools import microscope, overview
from tools.tiny import tiny_checkpoint, tiny_data

import currreft
from currreft import main
from tools.microscope import draw, label_of, look, token_rows


def reward(text, example=None, **_):
    return sum(map(ord, text)) % 10 / 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the random stand-in, with a reward that differs between answers."""
    path, patch = tmp_path_factory.mktemp("microscope"), pytest.MonkeyPatch()
    patch.setattr(currreft, "accuracy_reward", reward)
    main(["--model", str(tiny_checkpoint(path / "model")), "--data", str(tiny_data(path / "data")), "--out",
          str(path / "run"), "--stages", "choice:3", "open:2", "--prompts_per_step", "2", "--num_generations", "4",
          "--max_completion_length", "10", "--lr", "1e-2", "--save_every", "2", "--eval_limit", "1", "--threads", "1"])
    yield path / "run"
    patch.undo()


@pytest.mark.parametrize("step", [1, 3, 4])
def test_the_step_is_the_one_that_the_run_took(run, step):
    """Same rewards as logged; pushes are A / |o| / G where policy and reference agree; KL as logged."""
    seen = look(run, step, 1)
    line = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()][step - 1]
    other = look(run, step, 2)
    rewards = torch.cat([seen.group.rewards, other.group.rewards])
    assert line["reward"] == pytest.approx(rewards.mean().item(), rel=1e-5)
    tokens = sum(map(len, seen.tokens + other.tokens))
    assert line["kl"] == pytest.approx((seen.kl.sum() + other.kl.sum()).item() / tokens, rel=1e-3, abs=1e-6)
    assert [len(t) for t in seen.tokens] == [len(o.tokens) for o in seen.group.completions]
    if line["stage_step"] == 1:
        for row, advantage, tokens in zip(seen.push, seen.group.advantages, seen.tokens):
            expected = torch.full((len(tokens),), advantage.item() / len(tokens) / 4)
            torch.testing.assert_close(row[:len(tokens)], expected, atol=1e-6, rtol=1e-4)
            assert not row[len(tokens):].any(), "nothing pushes padding"
    else:
        assert seen.kl.max() > 0


def test_the_picture_is_drawn_for_an_open_and_a_choice_step(run, tmp_path, capsys):
    for step in ("3", "4"):
        assert microscope.main([str(run), "--step", step, "--out", str(tmp_path / "step.png")]) == 0
        with Image.open(tmp_path / "step.png") as image:
            assert image.width == microscope.WIDTH and image.height > 500
    assert microscope.main([str(run), "--out", str(tmp_path / "step.png")]) == 0


@pytest.mark.parametrize("argv, words", [(["--step", "2"], "--step can be 1, 3, 4"), (["--step", "1", "--group", "9"],
                                                                                     "groups 1 to 2")])
def test_what_cannot_be_shown_is_a_sentence(run, argv, words, capsys):
    assert microscope.main([str(run), *argv]) == 2 and words in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_a_sentence(tmp_path, capsys):
    assert microscope.main([str(tmp_path)]) == 2 and "no directory of a run" in capsys.readouterr().err


def test_equal_rewards_have_nothing_to_show(run, monkeypatch, capsys):
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 1.0)
    assert microscope.main([str(run), "--step", "1"]) == 2 and "every advantage is 0" in capsys.readouterr().err


def test_hostile_tokens_stay_in_their_boxes(run, tmp_path):
    assert label_of("") == "·" and label_of("\x1b[31m") == "[31m" and len(label_of("x" * 500)) == 25
    lines = token_rows(["word" * 9] * 200)
    assert len(lines) == 8 and lines[0][0] == 0 and lines[1][0] == lines[0][-1] + 1
    seen = look(run, 1, 1)
    seen.tokens = [["\u202e" * 40, "\U0001f600", "a" * 300, "\n"][:len(t)] + t[4:] for t in seen.tokens]
    assert draw(seen, tmp_path / "hostile.png").stat().st_size > 0


def test_the_method_is_drawn_from_a_row_of_the_data(run, tmp_path, capsys):
    data = str(run.parent / "data")
    assert overview.main(["--data", data, "--out", str(tmp_path / "method.png")]) == 0
    with Image.open(tmp_path / "method.png") as image:
        assert image.size == (overview.WIDTH, overview.HEIGHT)
    assert overview.main(["--data", data, "--row", "99"]) == 2 and "4 detection rows" in capsys.readouterr().err
