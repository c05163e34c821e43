"""What tests of whole runs share: small flags, a reward that can be learned, kills, and what a run has to show."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import currreft
from data import load_examples
from support.files import digest
from support.tiny import write_jsonl

HERE = Path(__file__).parent
SMALL = ["--prompts_per_step", "2", "--num_generations", "4", "--max_completion_length", "12", "--sft_batch", "2",
         "--lr", "1e-3", "--sft_lr", "1e-3", "--lr_schedule", "constant", "--reject_samples", "2",
         "--reject_threshold", "0", "--eval_limit", "2"]


def letters(text, example=None, **_):
    """A reward that a random model can learn within a minute: the share of ASCII letters among 20 characters."""
    return min(1.0, sum(c.isascii() and c.isalpha() for c in text) / 20)


def arguments(base, out, *more):
    model, data = base
    return ["--model", str(model), "--data", str(data), *SMALL, "--out", str(out), *more]


def metrics(run):
    """Rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def outcome(out):
    """All that a finished run has to show for itself, times aside."""
    kept = sorted(out.glob("rejected-*.jsonl"))
    return {"metrics": metrics(out), "results": json.loads((out / "results.json").read_text())["rows"],
            "samples": (out / "samples.jsonl").read_text() if (out / "samples.jsonl").exists() else "", "kept": [file.read_text() for file in kept],
            **{str(file.relative_to(out)): digest(file) for file in out.glob("stages/*/model.safetensors")}}


def weights(path):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype="auto").state_dict()


def assert_near(a, b, **tolerance):
    """Weights of two checkpoints, within a tolerance."""
    a, b = weights(a), weights(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)


def approximately(row, rel=1e-4, absolute=1e-6):
    return {k: pytest.approx(v, rel=rel, abs=absolute) if isinstance(v, float) else v for k, v in row.items()}


def refused(capsys, arguments, code=2, program=None):
    """What a program says when it refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sys.exit((program or currreft.main)(list(map(str, arguments))))
    said = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in said and 0 < len(said) < 6000, said
    return said


class Cut(BaseException):
    """A run ends here, as by SIGKILL: nothing tidies up."""


@contextlib.contextmanager
def after_step(step, act):
    """Within: `act(run)` once a run has logged its step number `step`."""
    original = currreft.Run.record

    def record(self, *args):
        stopping = original(self, *args)
        if self.global_step == step:
            act(self)
        return stopping
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(currreft.Run, "record", record)
        yield


def cut(run):
    raise Cut


def begun(arguments, at=3):
    """A run that was killed after `at` steps; returns the arguments that resume it."""
    with after_step(at, cut), pytest.raises(Cut):
        currreft.main(arguments)
    return [*arguments, "--resume"]


# ---- Processes ----

PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import currreft, sample
from runs import letters
currreft.accuracy_reward = letters
kill = dict(item.split("=") for item in os.environ.get("KILL", "").split())
record, judge, judged = currreft.Run.record, sample.Rules.__call__, []
def end(run):
    if "raise" in kill:
        raise OSError(kill["raise"])
    who = 0 if "group" in kill else os.getppid() if "parent" in kill else os.getpid()  # 0: all processes
    os.kill(who, int(kill.get("signal", signal.SIGKILL)))
def record_and_end(self, *args):
    stopping = record(self, *args)
    if self.global_step == int(kill.get("step", -1)) and self.rank == int(kill.get("rank", 0)):
        end(self)
    return stopping
def judge_and_end(self, *args):
    judged.append(1)
    if len(judged) == int(kill.get("judged", -1)):
        end(self)
    return judge(self, *args)
currreft.Run.record, sample.Rules.__call__ = record_and_end, judge_and_end
currreft.main()
"""


def start(folder, arguments, ranks=1, kill=""):
    """A process, or as many under torchrun; kill: "step=3 rank=1 signal=15 parent=1 (group=1)", "judged=3", "raise=words"."""
    script = folder / "program.py"
    script.write_text(PROGRAM.format(root=str(HERE.parent), tests=str(HERE)))
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "support.launch", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*launcher, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "KILL": kill, "OMP_NUM_THREADS": "1"}, cwd=HERE.parent, start_new_session=True)


def launch(folder, arguments, ranks=1, kill=""):
    """(exit code, what it said on stderr) of `start`."""
    process = start(folder, arguments, ranks, kill)
    try:
        _, said = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def load_rows(folder, *rows, **options):
    """The examples of a file of these rows in a folder."""
    return load_examples(write_jsonl(Path(folder) / "rows.jsonl", rows), **options)
