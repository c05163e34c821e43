"""What a run says: one safe way to the terminal, why nothing is learned, what a fork's reward does wrong."""

import io
import json
import random
import shutil
import sys
from unittest.mock import Mock

import pytest
from runs import arguments, begun, letters, refused
from tqdm import tqdm

import currreft
from currreft import main
from rewards import Example, accuracy_reward, safe_reward
from support.tiny import write_jsonl
from support.warnings import Watch
from support.words import RunError, UserError, command, last_words, one_line, say, terminal

TRAIN = "grpo_data/train/judge.jsonl"


def test_one_way_to_the_terminal_makes_everything_safe(capsys):
    with terminal():
        print("a\x1b[2J\x07b\x9b31m‮c\td")
        say("\x1b]0;title\x07 said")
        sys.stderr.write("\r 50 %")
    out, err = capsys.readouterr()
    assert out == "a?[2J?b?31m?c\td\n" and err == "?]0;title? said\n\r 50 %"
    assert one_line("a\nb\x1b") == "a b "


@pytest.mark.parametrize("logged", [False, True])
def test_last_words_have_a_line_and_are_in_the_log(logged, monkeypatch):
    screen, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", log if logged else screen)
    bar = tqdm(total=9, file=screen)
    last_words("currreft: stopped")
    del bar
    assert screen.getvalue().endswith("\ncurrreft: stopped\n") and log.getvalue() == "currreft: stopped\n" * logged


def test_a_closed_pipe_or_no_stream_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken := io.StringIO())
    monkeypatch.setattr(broken, "write", Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr(sys, "stderr", None)
    with terminal():
        print("y", file=sys.stderr)
        say("z")
        for _ in range(2):
            print("x" * 9, flush=True)


@pytest.mark.parametrize("error, code", [
    (None, 0), (UserError("no such row"), 2), (RunError("disk gone"), 1), (FileNotFoundError(2, "No", "a.json"), 2),
    (KeyboardInterrupt(), 130)])
def test_a_command_ends_with_a_sentence_and_a_code(error, code, capsys):
    @command
    def main(argv):
        if error:
            raise error
    assert main([]) == code
    assert bool(capsys.readouterr().err) == (code in (1, 2))


def test_hostile_rows_reach_the_terminal_as_marks(base, learnable, tmp_path, capsys):
    shutil.copytree(base[1], data := tmp_path / "data")
    rows = [json.loads(line) for line in (data / TRAIN).read_text().splitlines()]
    write_jsonl(data / TRAIN, [row | {"problem": row["problem"] + "\x1b[31m"} for row in rows])
    main(arguments((base[0], data), tmp_path / "run", "--stages", "binary:1"))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "binary" in out


# ---- Forks ----

@pytest.mark.parametrize("reward, words", [
    (lambda *_, **__: None, "raises TypeError"), (lambda *_, **__: "good", "raises ValueError"),
    (lambda *_, **__: float("nan"), "gives nan"), (lambda *_, **__: sys.exit(0), "raises SystemExit")])
def test_a_reward_of_a_fork_that_fails_names_question_and_answer(reward, words, base, tmp_path, monkeypatch, capsys):
    calls = iter(range(999))

    def later(*args, **settings):
        return letters(*args) if next(calls) < 9 else reward(*args, **settings)     # in the second step
    monkeypatch.setattr(currreft, "accuracy_reward", later)
    run = arguments(base, tmp_path / "run", "--stages", "binary:4", "--save_every", "1", "--eval_limit", "1")
    said = refused(capsys, run, 1)
    assert f"later {words}" in said and "for the question" in said and "judge.jsonl:" in said and "--resume" in said
    assert (tmp_path / "run" / "checkpoints" / "0000001").exists(), "what was done is kept"


def test_every_reward_is_called_by_one_that_tells():
    math, poetry = (Example(problem="?", solution="2", task=task, where="rows:7") for task in ("math", "poetry"))
    assert safe_reward(accuracy_reward, "<answer>2</answer>", math) == 1.0
    with pytest.raises(RunError, match="rows:7"):
        safe_reward(accuracy_reward, "<answer>2</answer>", poetry)


# ---- Why nothing is learned, and what is lost ----

def steps(*accuracies, **values):
    plain = {"reward": 0.5, "truncated": 0.0, "equal_groups": 0.0, "logp_gap": 1e-6, "kl": 0.01}
    return [{"stage": "open", "stage_index": 0, "stage_step": n, **plain, "reward/accuracy": accuracy, **values}
            for n, accuracy in enumerate(accuracies, 1)]


def noisy(count, middle, seed=0):
    """Accuracies of a healthy run, 32 completions a step."""
    rng = random.Random(seed)
    return [sum(rng.random() < middle for _ in range(32)) / 32 for _ in range(count)]


FELL = [0.84, 0.41, *[0.0] * 48]


@pytest.mark.parametrize("rows, words", [
    (steps(*[0.5] * 40, truncated=0.9), "90% of the completions were cut"),
    (steps(*[0.0] * 40, reward=0.0, equal_groups=1.0), "every reward was 0"),
    (steps(*[0.0] * 40, reward=1.0), "no answer was right"),
    (steps(*[0.5] * 40, equal_groups=0.95), "95% of the groups all rewards were equal"),
    (steps(*[0.5] * 2, logp_gap=0.018), "samples another distribution"),
    (steps(*[0.5] * 20) + steps(*[0.5] * 20, logp_gap=5e-4), "0.0005 apart, 1e-06 at first"),
    (steps(*[0.5] * 20) + steps(*[0.5] * 20, kl=5.0), "KL is 5 nats a token, 0.01 at first"),
    (steps(*FELL, kl=0.5), "0.84 in the first 1 of its steps and is 0.00 in the last 20; KL is 0.5"),
    (steps(*noisy(20, 0.8), *noisy(30, 0.1)), "what was known is being lost"),
    (steps(*[0.5] * 19, truncated=0.9), ""), (steps(*[0.5] * 40), ""), (steps(*noisy(40, 0.1), *noisy(400, 0.5)), ""),
    *((steps(*noisy(600, middle, seed)), "") for middle in (0.05, 0.5, 0.8) for seed in range(3))])
def test_why_nothing_is_learned_is_said_once(rows, words, capsys):
    watch = Watch()
    for row in rows:
        watch(row)
    said = capsys.readouterr().err
    assert said.count(words or "the last") == bool(words) and said.count("\n") == bool(words)
    for row in rows:
        watch(row | {"stage_index": 1})
    assert capsys.readouterr().err.count("\n") == bool(words), "and once a stage"


@pytest.mark.parametrize("accuracies, says", [
    (FELL, True), ([*noisy(30, 0.8), *noisy(60, 0.5)], True), (noisy(90, 0.5), False), ([0.0] * 9, False),
    ([*noisy(30, 0.5), *noisy(60, 0.8)], False), ([1.0], False), ([1.0, 0.0], False)])
def test_a_stage_that_ends_below_its_start_says_so(accuracies, says, capsys):
    """Also resumed, where it remembers how the stage began; what was said is not said again."""
    whole, resumed = Watch(), Watch()
    for row in steps(*accuracies):
        whole(row)
    capsys.readouterr()
    resumed.recall([row | {"kl": None} for row in steps(*accuracies[:-1])])
    assert capsys.readouterr().err == ""
    resumed(steps(*accuracies)[-1])
    for watch in (whole, resumed):
        capsys.readouterr()
        watch.end()
        assert ("open ends below its start" in capsys.readouterr().err) == says


def test_a_resumed_stage_knows_how_it_began(base, tmp_path, monkeypatch, capsys):
    calls = iter(range(999))
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: float(next(calls) < 24))  # for three steps
    run = arguments(base, tmp_path / "run", "--stages", "binary:6", "choice:1", "--save_every", "3")
    main(begun(run, at=4))
    said = capsys.readouterr().err
    assert "binary ends below its start" in said and "accuracy was 1.00 in the first" in said


def test_settings_that_can_hardly_be_meant_are_told_at_the_start(base, learnable, tmp_path, capsys):
    begun(arguments(base, tmp_path / "run", "--stages", "binary:400", "--eval_limit", "0"), at=1)
    said = capsys.readouterr().err
    assert "stage 1-binary: 400 steps of 2 are 66.7 passes over 12 examples with 2 different answers" in said
    assert "test binary_ood: 6 of 6 rows are training rows" in said
