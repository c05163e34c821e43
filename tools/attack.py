"""Kills of a run at random moments: is the finished run what an undisturbed one is? Bit for bit.

    python -m tools.attack --kills 30 --ranks 2         # a tiny run; minutes

Each life of the run is ended by SIGKILL, SIGTERM, SIGINT or SIGHUP, to all of its processes, after
a random time; then the same command goes on with --resume, until one life reaches the end.
"""

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.tiny import tiny_checkpoint, tiny_data
from support.words import command

SIGNALS_SENT = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RUN_FLAGS = ("--prompts_per_step 2 --num_generations 4 --max_completion_length 24 --sft_batch 2 "
         "--lr 1e-3 --sft_lr 1e-3 --reject_samples 4 --reject_threshold 0 --save_every 5 "
         "--stages binary:30 open:20 reject:20").split()


def attack(words, out, rng, kills):
    """Kill up to `kills` lives of the run that `words` begin, then let one finish; their number.

    RuntimeError for a traceback, and for a life that fails by itself.
    """
    for life in range(1, kills + 2):
        resume = ["--resume"] if (out / "config.json").exists() else []
        process = subprocess.Popen(
            [*words, "--out", str(out), *resume], cwd=Path(__file__).parents[1], text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        number = rng.choice(SIGNALS_SENT) if life <= kills else None
        if number:
            time.sleep(rng.uniform(2, 6))
            os.killpg(process.pid, number)  # a zombie, too, has an id
        said = process.communicate(timeout=300)[1]
        if "Traceback" in said or process.returncode == 2 or process.returncode and not number:
            raise RuntimeError(f"life {life}, {number}: {process.returncode}, {said[-3000:]}")
        if process.returncode == 0:
            break
    return life


def fingerprint(out):
    """What a finished run comes to: {file: digest}, timings left out."""
    found = {}
    for file in out.rglob("*"):
        kept = file.name == "results.json" or file.suffix in (".safetensors", ".jsonl")
        if kept and "checkpoints" not in file.parts:
            content = file.read_bytes()
            if file.name == "metrics.jsonl":
                content = re.sub(rb'"[a-z_]*second[a-z_]*": [^,}]*', b"", content)
            found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


@command
def main(argv=None):
    """Print how many lives each run took, and what differs; exits with 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=10, help="at most, in each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng, different = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny_checkpoint(f"{folder}/model"), tiny_data(f"{folder}/data")
        launcher = ["-m", "support.launch", "--standalone", f"--nproc_per_node={args.ranks}"]
        words = [sys.executable, *launcher[:4 * (args.ranks > 1)], "currreft.py",
                 "--model", str(model), "--data", str(data), *RUN_FLAGS]
        attack(words, whole := Path(folder, "whole"), rng, 0)
        expected = fingerprint(whole)
        for number in range(args.runs):
            lives = attack(words, out := Path(folder, f"run{number}"), rng, args.kills)
            found = fingerprint(out)
            wrong = [name for name in expected | found if expected.get(name) != found.get(name)]
            verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else "the same"
            print(f"run {number}: {lives} lives, {verdict}", flush=True)
            different = different or bool(wrong)
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
