"""The paper's ablation (table 3): every row at equal updates, over several seeds, with intervals.

    python -m demo.ablation                                    # the demo's worlds, on a CPU
    python -m demo.ablation --model MODEL --data DIR --out OUT --steps 600 500 2300 \\
        --reject_steps 400 --seeds 0 1 2 --flags=--checkpoint_activations    # with a real model

A row is a curriculum, and a row that is the beginning of another is read off that one's run. Every run is a
command that anybody can run: demo/base.py makes a base model, currreft.py trains. What is finished is not
done again; a run that was killed is resumed. OUT gets the run directories, BASE/RUN-SEED/, and of what is
there so far results.md, tables, and settings.png, three rows in every setting, run by run. With the demo's
worlds all rows run on one base model, three of them in other settings as well (SETTINGS in demo/plan.py), on
each of two worlds with bases of their own.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from currreft import parse_args as run_settings
from demo.figures import report
from demo.plan import COMPARED, DEMO_FLAGS, ROWS, Base, demo_bases, plan
from support.directory import HARMLESS
from support.rows import find_files
from support.words import UserError, command, say

PROJECT = Path(__file__).resolve().parents[1]


def call(words, log, gpus=0):
    """Run a command of this project, its output in `log`; RuntimeError with the last line of it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if gpus else {"OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        code = subprocess.run(words, cwd=PROJECT, env={**os.environ, **threads}, stdin=subprocess.DEVNULL,
                              stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = log.read_text().strip().rpartition("\n")[2] or "it said nothing"
        raise RuntimeError(f"{shlex.join(words[:2])} ended with {code}: {last} (see {log})")


def make_bases(calls):
    """demo/base.py with the flags of bases in one folder, one after another; finished ones are left alone."""
    for flags in dict.fromkeys(calls):
        call([sys.executable, "-m", "demo.base", "--threads", "1", *flags], Path(f"{flags[1]}.log"))


def train_job(job, args):
    """Run or resume one job unless it is finished; UserError if that was with other settings."""
    base, config = job.base, job.folder / "config.json"
    words = ["--model", base.model, "--data", base.data, "--out", str(job.folder), "--stages",
             *job.stages.split(), "--seed", str(job.seed), *shlex.split(args.flags + base.flags)]
    if not job.results(job.stages):
        program = ["bash", "train.sh"] if args.gpus else [sys.executable, "currreft.py"]
        words += ["--resume"] if config.exists() else []
        return call([*program, *words], job.folder.with_suffix(".log"), args.gpus)
    was = json.loads(config.read_text())
    asked = json.loads(json.dumps(asdict(run_settings(words))))
    if changed := [f"--{name} was {was.get(name)!r}, is {value!r}" for name, value in asked.items()
                   if name not in HARMLESS and was.get(name) != value]:
        raise UserError(f"it was run with other settings ({'; '.join(changed)}): change --out")


def work(tasks, jobs):
    """Run tasks {name: function}, `jobs` at a time; returns {name: sentence} of the failed ones."""
    failed = {}

    def do(name):
        started = time.perf_counter()
        try:
            tasks[name]()
        except (RuntimeError, OSError, ValueError, UserError) as error:
            failed[name] = str(error)
        say(f"{name}: {failed.get(name, f'{time.perf_counter() - started:.0f} s')}")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(tqdm(pool.map(do, tasks), total=len(tasks), unit="run", dynamic_ncols=True, disable=None))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs was interrupted, too
            raise
    return failed


def parse_flags(argv):
    """The command line; a user's mistake exits with 2 and a sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", default="runs/ablation")
    add("--model", default="", help="checkpoint to start from (default: the demo's bases)")
    add("--data", default="", help="data directory, as currreft.py's; needed with --model")
    add("--steps", type=int, nargs=3, default=(60, 60, 80), metavar=("BINARY", "CHOICE", "OPEN"),
        help="steps of the curriculum's stages; every RL row takes their sum")
    add("--reject_steps", type=int, default=20)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (default: all)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of training")
    add("--other_seeds", type=int, default=2, help="as many of them for rows not in other settings")
    add("--base_seeds", type=int, nargs="+", default=[0, 1], help="of worlds; all rows run on the first")
    add("--variant", action="append", default=[], metavar="FLAGS",
        help='other flags of currreft.py to run three rows under: --variant="--beta 0"; repeatable')
    add("--flags", default="", help='more flags of currreft.py in one word, --flags="--beta 0"')
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time on a CPU")
    add("--report", action="store_true", help="run nothing: tables and picture of what is there")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data) or min(*args.steps, args.reject_steps, args.jobs) < 1:
        parser.error("--model and --data go together; --steps, --reject_steps and --jobs must be at least 1")
    for name in ("out", "model", "data"):  # commands run in this project, wherever they are called
        if (value := getattr(args, name)) and (name != "model" or Path(value).exists()):
            setattr(args, name, str(Path(value).absolute()))
    return args


@command
def main(argv=None):
    """Make the bases, run every row, write the report; returns 1 if a run failed."""
    args = parse_flags(argv)
    args.gpus = torch.cuda.device_count()
    args.jobs = 1 if args.gpus else args.jobs
    args.flags = f"{'' if args.model else DEMO_FLAGS} {args.flags} "
    bases = [Base("base", args.model, args.data)] if args.model else demo_bases(args.out, args.base_seeds)
    bases += [replace(bases[0], name=bases[0].name + flags.replace(" ", ""), setting=flags,
                      flags=flags, rows=COMPARED, seeds=2) for flags in args.variant]
    # what is not there, and what currreft.py would refuse, is said before anything runs
    if args.data:
        find_files(args.data)
    config = [run_settings(shlex.split(args.flags + base.flags)) for base in bases][0]
    rows, jobs = plan(args, bases)
    made, failed = [base.made for base in bases if base.made], {}
    if not args.report:
        folders = {flags[1]: [other for other in made if other[1] == flags[1]] for flags in made}
        failed = work({name: partial(make_bases, calls) for name, calls in folders.items()}, args.jobs)
        failed |= work({str(job.folder): partial(train_job, job, args) for job in jobs}, args.jobs)
    for name, sentence in failed.items():
        say(f"not finished: {name}: {sentence}")
    print(report(args, bases, jobs, rows, config.prompts_per_step * config.num_generations))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
