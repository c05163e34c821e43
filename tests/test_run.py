"""A run knows what it is made of, whatever happens to its files, and ends with one sentence whatever ends it."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import currreft
import rewards
import support.words as terminal
from currreft import main
from support.files import digest
from support.tiny import tiny_checkpoint, tiny_data, tiny_image, write_jsonl
from support.warnings import Watch
from support.words import RunError, one_line, say
from tools import attack

HERE = Path(__file__).parent
STAGES = ["--stages", "binary:4", "reject:3", "--save_every", "2", "--keep", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    return tiny_checkpoint(path / "model"), tiny_data(path / "data")


def arguments(base, out, *more):
    model, data = base
    return ["--model", str(model), "--data", str(data), "--prompts_per_step", "2", "--num_generations", "4", "--threads", "1",
            "--max_completion_length", "12", "--sft_batch", "2", "--lr", "1e-3", "--sft_lr", "1e-3", "--lr_schedule",
            "constant", "--reject_samples", "2", "--reject_threshold", "0", "--eval_limit", "2", "--out", str(out), *STAGES,
            "--sample_every", "1", *more]


def letters(text, example=None, **_):
    return min(1.0, sum(c.isascii() and c.isalpha() for c in text) / 20)


@pytest.fixture(autouse=True)
def learnable(monkeypatch):
    monkeypatch.setattr(currreft, "accuracy_reward", letters)


class Cut(BaseException):
    """A run ends here, as by SIGKILL: nothing tidies up."""


def begun(base, out, monkeypatch, at=3):
    """A run that was killed after `at` steps; returns its arguments."""
    log = currreft.Run.log

    def killing(self, *args):
        means = log(self, *args)
        if self.global_step == at:
            raise Cut
        return means
    with monkeypatch.context() as patch:
        patch.setattr(currreft.Run, "log", killing)
        with pytest.raises(Cut):
            main(arguments(base, out))
    return arguments(base, out, "--resume")


def outcome(out):
    """All that a finished run has to show for itself, timings aside."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"metrics": [{k: v for k, v in row.items() if "second" not in k} for row in rows],
            "results": json.loads((out / "results.json").read_text())["rows"], "samples": (out / "samples.jsonl").read_text(),
            "kept": (out / "rejected-2.jsonl").read_text(),
            **{str(file.relative_to(out)): digest(file) for file in out.glob("stages/*/model.safetensors")}}


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(currreft, "accuracy_reward", letters)
        main(arguments(base, out))
    return out, outcome(out)


def refused(capsys, arguments, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in said, said
    return said


# ---- Identity ----

def lines(path, change):
    return lambda data: (data / path).write_text("\n".join(change((data / path).read_text().splitlines())) + "\n")


TRAIN, TEST, ASKED = "grpo_data/train/judge.jsonl", "grpo_data/test/open_id.jsonl", "SFT_data/reject/questions.jsonl"
CHANGES = {  # name: (what is done to the data, words of the sentence)
    "rows reversed": (lines(TRAIN, lambda rows: rows[::-1]), "judge.jsonl has changed, in its 12 rows"),
    "rows halved": (lines(TRAIN, lambda rows: rows[:6]), "judge.jsonl had 12 rows, has 6"),
    "one truth": (lines(TRAIN, lambda rows: [rows[0].replace("yes", "no"), *rows[1:]]), "judge.jsonl has changed"),
    "test rows": (lines(TEST, lambda rows: rows[::-1]), "open_id.jsonl has changed"),
    "a split removed": (lambda data: (data / TEST).unlink(), "open_id.jsonl, 2 rows, is not used any more"),
    "a split added": (lambda data: shutil.copy(data / TEST, data / "grpo_data/test/open_new.jsonl"), "open_new.jsonl is new"),
    "an image": (lambda data: tiny_image(data / "images/a.png", (84, 56), "black"), "images have changed"),
    "questions": (lines(ASKED, lambda rows: rows[::-1]), "questions.jsonl has changed"),
    "questions halved": (lines(ASKED, lambda rows: rows[:2]), "questions.jsonl had 5 rows, has 2"),
    "train form": (lambda data: (data / TRAIN).rename(data / "grpo_data/train/binary.jsonl"), "binary.jsonl is new"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_data_is_named_and_refused_or_accepted_by_name(name, base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base[1], data := tmp_path / "data", copy_function=shutil.copy2)
    resume = begun((base[0], data), tmp_path / "run", monkeypatch)
    change, words = CHANGES[name]
    change(data)
    assert words in (said := refused(capsys, resume)) and "--allow_changes" in said
    main([*resume, "--allow_changes"])
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert words in str(record["changes"]) and record["changes"][0]["after_step"] == 2
    assert len(outcome(tmp_path / "run")["metrics"]) == 7
    if name == "rows reversed":
        main(resume)      # what was accepted is what the run is made of now


def test_another_base_or_setting_is_named(base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base[0], model := tmp_path / "model")
    resume = begun((model, base[1]), tmp_path / "run", monkeypatch)
    assert "--reject_samples was 2, is 3" in refused(capsys, [*resume, "--reject_samples", "3"])
    assert "--seed was 0, is 1" in refused(capsys, [*resume, "--seed", "1"])
    tiny_checkpoint(model, seed=1)
    assert "the base model" in (said := refused(capsys, resume)) and "model.safetensors" in said
    for harmless in (["--micro_batch", "2"], ["--judge_model", "x"], ["--save_every", "3"]):
        assert "the base model" in (said := refused(capsys, [*resume, *harmless])) and harmless[0] not in said


@pytest.mark.parametrize("stages, words", [
    (["binary:6", "reject:3"], "stage 1 is finished as binary:4, and --stages has binary:6"),
    (["open:4", "reject:3"], "stage 1 is finished as binary:4, and --stages has open:4"),
    (["binary:4"], "stage 2 is finished as reject:3, and --stages has nothing")])
def test_a_finished_stage_is_known_by_what_it_was(undisturbed, base, tmp_path, capsys, stages, words):
    shutil.copytree(undisturbed[0], out := tmp_path / "run")
    before = outcome(out)
    resume = [*arguments(base, out, "--resume", "--allow_changes"), "--stages", *stages]
    assert words in refused(capsys, resume) and outcome(out) == before
    if len(stages) == 1:    # a stage more is trained, and its row is its own
        main([*resume[:-len(stages)], "binary:4", "reject:3", "sft:1"])
        assert [row["name"] for row in outcome(out)["results"]] == ["base", "1-binary", "2-reject", "3-sft"]
        assert len(outcome(out)["metrics"]) == 8


# ---- Whole or not at all ----

DAMAGE = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[:file.stat().st_size // 2]),
    "its last byte gone": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a byte flipped": lambda file: file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2)),
    "64 bytes flipped near the end": lambda file: file.write_bytes(flipped(file.read_bytes(), -100, 64)),
    "doubled": lambda file: file.write_bytes(file.read_bytes() * 2),
    "zeros": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "an empty object": lambda file: file.write_text("{}"),
    "another file's": lambda file: file.write_text('["a list"]'),
    "deleted": lambda file: file.unlink(),
}


def flipped(data, place, count=1):
    data = bytearray(data)
    for n in range(count):
        data[(place + n) % len(data)] ^= 0x55
    return bytes(data)


def files_of_a_run(out):
    """One file of each kind that a run of 3 steps holds."""
    return ["config.json", "metrics.jsonl", "samples.jsonl", "results.json", "predictions/base.jsonl",
            *(f"checkpoints/0000002/{name}" for name in (
                "model.safetensors", "optimizer-0.pt", "state.json", "metrics.jsonl", "config.json", "tokenizer_config.json",
                "tokenizer.json"))]


@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(currreft, "accuracy_reward", letters)
        begun(base, out, patch)
    return out


def test_every_kind_of_file_is_there(killed):
    there = {str(file.relative_to(killed)) for file in killed.rglob("*") if file.is_file()}
    assert set(files_of_a_run(killed)) <= there


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.slow
def test_a_damaged_file_gives_the_undisturbed_result_or_a_sentence(damage, killed, undisturbed, base, tmp_path, capsys):
    """Nothing is silently different: what is not whole is named, and the checkpoint before it is taken."""
    for number, name in enumerate(files_of_a_run(killed)):
        shutil.copytree(killed, out := tmp_path / str(number), copy_function=shutil.copy2)
        DAMAGE[damage](out / name)
        capsys.readouterr()
        try:
            main(arguments(base, out, "--resume"))
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code in (1, 2) and "Traceback" not in said and Path(name).name in said, (name, said)
            continue
        said, found = capsys.readouterr().err, outcome(out)
        if name == "samples.jsonl":
            found["samples"] = undisturbed[1]["samples"]        # what was lost of it is no part of the run
        assert found == undisturbed[1], name
        if name.startswith("checkpoints") or name == "predictions/base.jsonl":
            assert Path(name).name in said, (name, said)


@pytest.mark.parametrize("damage", ["cut in half"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(damage, killed, undisturbed, base, tmp_path, capsys):
    for name in ("model.safetensors", "optimizer-0.pt", "state.json"):
        shutil.copytree(killed, out := tmp_path / name, copy_function=shutil.copy2)
        DAMAGE[damage](out / "checkpoints" / "0000002" / name)
        main(arguments(base, out, "--resume"))
        said = capsys.readouterr().err
        assert name in said and "starts again from the base model" in said
        assert outcome(out) == undisturbed[1]


def test_what_is_damaged_in_an_end_of_a_stage_is_trained_again(undisturbed, base, tmp_path, capsys):
    shutil.copytree(undisturbed[0], out := tmp_path / "run", copy_function=shutil.copy2)
    shutil.rmtree(out / "checkpoints")
    DAMAGE["a byte flipped"](out / "stages" / "2-reject" / "model.safetensors")
    main(arguments(base, out, "--resume"))
    assert "2-reject is damaged (model.safetensors is not what was written)" in capsys.readouterr().err
    assert outcome(out) == undisturbed[1]


def test_the_windows_at_the_start_are_closed(base, tmp_path, undisturbed, capsys):
    """Killed while config.json was written aside: the same command begins the run, and leftovers of the dead are cleared."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".writing-config.json").write_text("{")
    main(arguments(base, out))
    (out / "checkpoints" / ".writing-0000009").mkdir()
    main(arguments(base, out, "--resume"))
    assert outcome(out) == undisturbed[1] and not list(out.rglob(".writing-*"))


# ---- Signals and kills, by processes ----

PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import currreft
from test_run import letters
currreft.accuracy_reward = letters
log = currreft.Run.log
def told(self, *args):
    means = log(self, *args)
    if self.global_step == int(os.environ.get("AT", -1)):
        os.kill(os.getppid() if os.environ.get("PARENT") else os.getpid(), int(os.environ["SIGNAL"]))
    return means
currreft.Run.log = told
currreft.main()
"""


def start(tmp_path, arguments, ranks=1, at=-1, number=0, parent=False):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(root=str(HERE.parent), tests=str(HERE)))
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "tools.launch", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "AT": str(at), "SIGNAL": str(int(number)), "OMP_NUM_THREADS": "1"}
    environment |= {"PARENT": "1"} if parent else {}
    return subprocess.Popen([*launcher, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment, cwd=HERE.parent, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_saves_says_so_and_has_a_code_of_its_own(number, base, undisturbed, tmp_path):
    process = start(tmp_path, arguments(base, tmp_path / "run"), at=3, number=number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert f"stopped by {number.name}; everything is saved, continue with --resume" in said.splitlines()[-1]
    main(arguments(base, tmp_path / "run", "--resume"))
    assert outcome(tmp_path / "run") == undisturbed[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_whose_launcher_is_gone_save_and_leave(number, base, tmp_path):
    process = start(tmp_path, arguments(base, tmp_path / "run", "--stages", "binary:4000"), 2, at=3, number=number, parent=True)
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    alive = time.monotonic() + 60
    while time.monotonic() < alive and subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True).stdout:
        time.sleep(0.5)
    assert not subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True).stdout, "orphans"
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert steps and int(steps[-1]) >= 3


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(capsys):
    """Seeded; the same command kills as often as one wants, with one rank or two."""
    assert attack.main(["--kills", "4", "--runs", "1", "--seed", "1"]) == 0
    lives, = re.findall(r"run 0: ([0-9]+) lives, the same", capsys.readouterr().out)
    assert int(lives) >= 2


# ---- Finite ----

def test_weights_that_are_not_finite_are_never_saved(base, tmp_path, monkeypatch, capsys):
    step = currreft.Run.optimizer_step

    def spoiled(self, stage, number, lr):
        step(self, stage, number, lr)
        if self.global_step == 3:
            next(self.policy.parameters()).data.view(-1)[0] = float("nan")
    monkeypatch.setattr(currreft.Run, "optimizer_step", spoiled)
    said = refused(capsys, arguments(base, tmp_path / "run"), 1)
    assert "weights are not finite" in said and "0000002" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002"]
    assert not list((tmp_path / "run" / "stages").glob("*")) if (tmp_path / "run" / "stages").exists() else True


def test_the_log_is_json_and_a_skipped_step_says_so(base, tmp_path, monkeypatch, capsys):
    reduce = currreft.ShardedAdamW.reduce_gradients
    count = iter(range(99))
    monkeypatch.setattr(currreft.ShardedAdamW, "reduce_gradients", lambda self, most: (
        reduce(self, most), float("nan") if next(count) == 1 else 1.0)[1])
    main(arguments(base, tmp_path / "run", "--stages", "binary:3"))

    def constant(name):
        raise AssertionError(name)
    rows = [json.loads(line, parse_constant=constant) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["grad_norm"] is None and rows[2]["skipped_steps"] == 1
    assert "binary, step 2: the gradient is not finite, so the step is skipped (1 so far)" in capsys.readouterr().err


# ---- Terminal ----

def test_one_way_to_the_terminal_makes_everything_safe(capsys):
    with terminal.terminal():
        print("a\x1b[2J\x07b\x9b31m‮c\td")
        say("\x1b]0;title\x07 said")
        sys.stderr.write("\r 50 %")
    out, err = capsys.readouterr()
    assert out == "a?[2J?b?31m?c\td\n" and err == "?]0;title? said\n\r 50 %"
    assert one_line("a\nb\x1b") == "a b "


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_pipe_or_no_stream_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", None)
    with terminal.terminal():
        print("x" * 9)
        print("y", file=sys.stderr)
        say("z")
        print("again", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{run} | head -1", "{run} >&- 2>&-", "PYTHONIOENCODING=ascii LC_ALL=C {run}"])
def test_a_run_is_not_upset_by_its_terminal(shell, base, undisturbed, tmp_path):
    command = " ".join(["AT=-1", sys.executable, str(tmp_path / "program.py"), *arguments(base, tmp_path / "run")])
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(HERE.parent), tests=str(HERE)))
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + shell.format(run=command)], capture_output=True, text=True,
                          timeout=120, cwd=HERE.parent)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert outcome(tmp_path / "run") == undisturbed[1]


def test_hostile_rows_reach_the_terminal_as_marks(base, tmp_path, capsys):
    shutil.copytree(base[1], data := tmp_path / "data")
    rows = [json.loads(line) for line in (data / TRAIN).read_text().splitlines()]
    write_jsonl(data / TRAIN, [row | {"problem": row["problem"] + "\x1b[31m"} for row in rows])
    main(arguments((base[0], data), tmp_path / "run", "--stages", "binary:1", "--check"))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "binary" in err


# ---- Forks ----

@pytest.mark.parametrize("reward, words", [
    (lambda *_, **__: None, "raises TypeError"), (lambda *_, **__: "good", "raises ValueError"),
    (lambda *_, **__: float("nan"), "gives nan"), (lambda *_, **__: 1 / 0, "raises ZeroDivisionError"),
    (lambda *_, **__: sys.exit(0), "raises SystemExit")])
def test_a_reward_of_a_fork_that_fails_names_question_and_answer(reward, words, base, tmp_path, monkeypatch, capsys):
    calls = iter(range(999))

    def later(*args, **settings):
        return letters(*args) if next(calls) < 17 else reward(*args, **settings)     # in the third step
    monkeypatch.setattr(currreft, "accuracy_reward", later)
    said = refused(capsys, arguments(base, tmp_path / "run"), 1)
    assert f"later {words}" in said and "for the question" in said and "judge.jsonl:" in said and "--resume" in said
    assert (tmp_path / "run" / "checkpoints" / "0000002").exists(), "what was done is kept"


def test_every_reward_is_called_by_one_that_tells(base):
    example = replace(currreft.Example(problem="1 + 1?", solution="2", task="math"), where="rows:7")
    assert rewards.paid(rewards.accuracy_reward, "<answer>2</answer>", example) == 1.0
    with pytest.raises(RunError, match="rows:7"):
        rewards.paid(rewards.accuracy_reward, "<answer>2</answer>", replace(example, task="poetry"))


# ---- Why nothing is learned ----

def steps(count, **values):
    row = {"stage": "open", "stage_index": 0, "reward": 0.5, "truncated": 0.0, "equal_groups": 0.0, "reward/format": 1.0}
    return [row | values] * count


@pytest.mark.parametrize("rows, words", [
    (steps(40, truncated=0.9), "90% of the completions were cut"), (steps(40, reward=0.0, equal_groups=1.0), "every reward was 0"),
    (steps(40, equal_groups=0.95), "95% of the groups all rewards were equal"), (steps(19, truncated=0.9), ""), (steps(40), "")])
def test_why_nothing_is_learned_is_said_once(rows, words, capsys):
    watch, cfg = Watch(), currreft.Config(data="d")
    for row in rows:
        watch(cfg, row)
    said = capsys.readouterr().err
    assert said.count(words or "the last") == bool(words) and said.count("\n") == bool(words)
    for row in rows:
        watch(cfg, row | {"stage_index": 1})
    assert capsys.readouterr().err.count("\n") == bool(words), "and once a stage"


def test_settings_that_can_hardly_be_meant_are_told_at_the_start(base, tmp_path, capsys):
    main(arguments(base, tmp_path / "run", "--stages", "binary:400", "open:5", "--warmup_steps", "7", "--advance_at", "0.9",
                   "--check"))
    said = capsys.readouterr().err
    assert "stage 1-binary: 400 steps of 2 are 66.7 passes over 12 examples, which have 2 different answers" in said
    assert "stage 2-open ends after 5 steps, within its --warmup_steps 7" in said
    assert "stage 2-open: --advance_at looks at 50 steps" in said
    assert "test open_id: 6 of 6 rows are training rows" in said or "rows are training rows" in said


# ---- What a person looks for first ----

def test_samples_hold_whole_groups_with_what_each_was_worth(undisturbed):
    rows = [json.loads(line) for line in (undisturbed[0] / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert len(row["completions"]) == 4 and row["where"].endswith(tuple("0123456789"))
        assert abs(sum(c["advantage"] for c in row["completions"])) < 1e-3
        assert all(c["accuracy"] == letters(c["text"]) for c in row["completions"])
    assert {"reward_std", "entropy", "truncated"} <= undisturbed[1]["metrics"][0].keys()


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_whatever_other_programs_read_holds_the_runs_pixel_limits(name, base, tmp_path):
    """AutoProcessor prefers processor_config.json; transformers 4.49 to 4.52 read min_pixels and max_pixels alone."""
    from data import Processor
    shutil.copytree(base[0], model := tmp_path / "model")
    own = json.loads((model / "preprocessor_config.json").read_text()) | {"max_pixels": 12_845_056}
    (model / name).write_text(json.dumps({"image_processor": own, "processor_class": "Qwen2_5_VLProcessor"}
                                         if name == "processor_config.json" else own))
    out = tmp_path / "saved"
    out.mkdir()
    Processor.from_pretrained(model, 50_176).save_pretrained(out)
    settings = json.loads((out / name).read_text())
    limits = settings.get("image_processor", settings)
    assert (limits["min_pixels"], limits["max_pixels"]) == (3136, 50_176)
    assert limits["size"] == {"shortest_edge": 3136, "longest_edge": 50_176}
    assert settings.get("processor_class") == ("Qwen2_5_VLProcessor" if name == "processor_config.json" else None)
    assert Processor.from_pretrained(out, None).max_pixels == 50_176, "sample.py shows images as the run did"


def test_a_run_is_not_begun_by_what_is_refused(base, tmp_path, capsys):
    refused(capsys, arguments(base, tmp_path / "run", "--prompts_per_step", "0"))
    shutil.copytree(base[0], model := tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    refused(capsys, arguments((model, base[1]), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_seed_of_torch_is_no_part_of_a_run(base, undisturbed, tmp_path):
    torch.manual_seed(time.time_ns() % 2**31)
    random.seed()
    main(arguments(base, tmp_path / "run"))
    assert outcome(tmp_path / "run") == undisturbed[1]
