"""Kills of a run at random moments: is the finished run what an undisturbed one is? Bit for bit, timings aside.

    python -m tools.attack --kills 30 --ranks 2         # the demo-sized run of the tests; minutes

Each life of the run is ended by SIGKILL, SIGTERM, SIGINT or SIGHUP, to the process, or with two ranks to all of them,
after a random time; then the same command goes on with --resume, until one life reaches the end.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.terminal import terminal
from tools.tiny import tiny_checkpoint, tiny_data

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def processes(group):
    """Ids of the processes of a process group."""
    return list(map(int, subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True).stdout.split()))


def attack(start, rng, kills, patience=6.0, whole_group=False):
    """Kill up to `kills` lives of the run that start(resume) begins, then let one finish; returns the number of lives.

    start: whether to resume -> subprocess.Popen in a session of its own. RuntimeError for a traceback, for a
    life that fails by itself, and for processes that stay behind.
    """
    for life in range(1, kills + 2):
        process = start(life > 1)
        number, said = None, ""
        try:
            if life <= kills:
                time.sleep(rng.uniform(2.0, patience))
                number = rng.choice(NUMBERS)
                if process.poll() is None:
                    targets = processes(process.pid) if whole_group or rng.random() < 0.5 else [process.pid]
                    for target in targets:
                        os.kill(target, number)
            said = process.communicate(timeout=300)[1]
        except ProcessLookupError:
            said = process.communicate(timeout=300)[1]
        for left in processes(process.pid):
            os.kill(left, signal.SIGKILL) if number == signal.SIGKILL else None
        if "Traceback" in said or process.returncode and number is None:
            raise RuntimeError(f"life {life}, signal {number}, exit code {process.returncode}:\n{said[-3000:]}")
        if process.returncode == 0:
            return life
    return kills + 1


def resumed(out, resume):
    """["--resume"] where a run was begun: the first life may have ended before that."""
    return ["--resume"] if resume and (Path(out) / "config.json").exists() else []


def fingerprint(out):
    """What a finished run comes to: {file: digest}, timings left out."""
    found = {}
    for file in sorted(Path(out).rglob("*")):
        if file.name == "metrics.jsonl" and file.parent == Path(out):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[file.name] = str([{k: v for k, v in row.items() if "second" not in k} for row in rows])
        elif "checkpoints" not in file.parts and file.name != "metrics.jsonl" and (
                file.name == "results.json" or file.suffix in (".safetensors", ".jsonl")):
            found[str(file.relative_to(out))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def main(argv=None):
    """Prints how many lives each run took, and what differs; exits with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, help="at most, in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder, rng = Path(tempfile.mkdtemp()), random.Random(args.seed)
    model, data = tiny_checkpoint(folder / "model"), tiny_data(folder / "data")
    flags = ["--model", model, "--data", data, "--prompts_per_step", "2", "--num_generations", "4", "--threads", "1",
             "--max_completion_length", "24", "--sft_batch", "2", "--lr", "1e-3", "--sft_lr", "1e-3", "--reject_samples", "4",
             "--reject_threshold", "0", "--stages", "binary:30", "open:20", "reject:20", "--save_every", "5"]

    def start(out, resume):
        launcher = [sys.executable] if args.ranks == 1 else [
            sys.executable, "-m", "tools.launch", "--standalone", "--nproc_per_node", str(args.ranks)]
        words = [*launcher, "currreft.py", *map(str, flags), "--out", str(out), *resumed(out, resume)]
        return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    attack(lambda resume: start(folder / "whole", resume), rng, 0)
    expected, wrong = fingerprint(folder / "whole"), 0
    for number in range(args.runs):
        out = folder / f"run{number}"
        lives = attack(lambda resume: start(out, resume), rng, args.kills, whole_group=args.ranks > 1)
        found = fingerprint(out)
        different = [name for name in expected | found if expected.get(name) != found.get(name)]
        wrong += bool(different)
        print(f"run {number}: {lives} lives, {'DIFFERENT: ' * bool(different)}{', '.join(different) or 'the same'}",
              flush=True)
    shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
