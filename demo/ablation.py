"""The paper's ablation (table 3): every row at equal numbers of updates, over several seeds, with its uncertainty.

    python -m demo.ablation                                                         # the demo's world, on a CPU
    python -m demo.ablation --model MODEL --data DIR --out OUT --steps 600 500 2300 --reject_steps 400 --seeds 0 1 2 \\
        --flags=--checkpoint_activations                                            # the same with a real model

A row is a curriculum, and a row that is the beginning of another is read off that one's run. Everything is a command
that anybody can run: demo/base.py makes a base model, currreft.py trains a run, sample.py measures pass@k. What is
finished is not done again; a run that was killed is resumed. OUT gets

    BASE/RUN-SEED/          run directories of currreft.py, each with its predictions, checkpoints and log
    results.md, *.png       tables and pictures of what is there so far
    results.json            the figures of the rows for machines

On the demo's world all rows run on one base model, three of them (COMPARED) in other settings as well, so many seeds of
training on each of two worlds with bases of their own:

    habit-WORLD        the base hardly ever reasons before an open answer (--reasons): all rows on the first world
    reasons-R-WORLD    it reasons more often, so that open questions alone score from the start
    parts-N-WORLD      no habit: an open answer is composed of N parts, of which yes/no and letters ask one alone
    leaky-WORLD        the curriculum alone, its yes/no questions and options such that they tell without a look
    improve-..-WORLD   phase 2 alone, after the curriculum, with another judge or more passes (--improve)

--variant runs COMPARED under other flags, which a real model can have as well.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data import FORMS, find_files
from demo.figures import measured, report
from demo.plan import COMPARED, DEMO_FLAGS, ROWS, Base, demo_bases, improve_jobs, plan, results_of
from distributed import UserError
from tools.terminal import terminal

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Commands


def call(words, log, threads=None):
    """Run a command of this project with its output in `log`; returns stdout. RuntimeError with its last line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with open(log, "a") as file:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=file, text=True)
        said = log.read_text().strip()  # stderr, which ends with the sentence of a failure
        file.write(done.stdout)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, words[:2]))} ended with {done.returncode}: "
                           f"{said.rpartition(chr(10))[2] or 'it said nothing'} (see {log})")
    return done.stdout


def train(job, args):
    """Run or resume one job unless it is finished; UserError if it was begun with other settings."""
    from currreft import parse_args as settings
    from tools.identity import check_out
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    words = ["--model", job.base.model, "--data", job.base.data, "--out", str(job.folder), "--stages",
             *job.stages.split(), "--seed", str(job.seed), *shlex.split(f"{args.flags} {job.base.flags}"), *resume]
    if job.last not in results_of(job.folder):
        program = ["bash", "train.sh"] if args.gpus else [sys.executable, "currreft.py"]
        call([*program, *words], job.folder.with_suffix(".log"), None if args.gpus else 1)
    elif resume:
        check_out(settings(words))


def in_domain(files, form):
    """The test file of a form: open_id before open_ood_.., and before general, whose questions are open as well."""
    names = sorted((name for name, (of, _) in files.items() if of == form), key=lambda name: not name.startswith(form))
    return files[names[0]][1] if names else None


def measure(model, base, out, args):
    """{form: {pass@k: share}} of a checkpoint on the in-domain test questions of each form."""
    if not out.exists():
        files, figures, cfg = find_files(base.data)["test"], {}, args.configs[base.name]
        for form in FORMS:
            path = in_domain(files, form)
            if path:
                text = call([sys.executable, "sample.py", "evaluate", "--model", str(model), "--data", str(path),
                             "--form", form, "--image_root", cfg.image_root or base.data, "--samples",
                             str(args.samples), "--out", f"{out}.{form}.jsonl", "--max_completion_length",
                             str(cfg.max_completion_length), "--max_pixels", str(cfg.max_pixels)],
                            out.with_suffix(".log"), None if args.gpus else 1)
                figures[form] = json.loads(text)[path.stem]["all"]
        out.write_text(json.dumps(figures, indent=1))
    return json.loads(out.read_text())


def make_bases(bases):
    """demo/base.py for every base of one world, one after another; finished ones are left alone."""
    for demo in dict.fromkeys(base.demo for base in bases):
        call([sys.executable, "-m", "demo.base", "--threads", "1", *demo], Path(f"{demo[1]}.log"), 1)


def work(tasks, jobs):
    """Run tasks {name: function} `jobs` at a time under a progress bar; returns {name: sentence} of the failed."""
    failed, lock = {}, threading.Lock()
    with tqdm(total=len(tasks), unit="run", dynamic_ncols=True) as bar, ThreadPoolExecutor(jobs) as pool:
        def do(name, function):
            """Run one task, and say how it ended."""
            started = time.perf_counter()
            try:
                function()
                said = f"{name}: {time.perf_counter() - started:.0f} s"
            except (RuntimeError, OSError, ValueError, UserError) as error:
                failed[name] = said = f"{name}: {error}"
            with lock:
                tqdm.write(said, file=sys.stderr)
                bar.update()
        try:
            for future in [pool.submit(do, *task) for task in tasks.items()]:
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that run were interrupted too, and save
            raise
    return failed


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """The command line; a user's mistake exits with 2 and a sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--model", default="", help="checkpoint to start from (default: the demo's bases)")
    parser.add_argument("--data", default="", help="data directory, as currreft.py's; needed with --model")
    parser.add_argument("--steps", type=int, nargs=3, default=(60, 60, 80), metavar=("BINARY", "CHOICE", "OPEN"),
                        help="steps of the curriculum's stages; every RL row takes their sum")
    parser.add_argument("--reject_steps", type=int, default=20)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of training")
    parser.add_argument("--other_seeds", type=int, default=2, help="as many of them for rows that are not compared")
    parser.add_argument("--base_seeds", type=int, nargs="+", default=[0, 1],
                        help="of the demo's worlds and base models; all rows run on the first")
    parser.add_argument("--reasons", type=float, nargs="+", default=[5e-5, 0.15],
                        help="how often the demo's bases reason before an open answer; all rows run on the first")
    parser.add_argument("--parts_steps", type=int, default=150,
                        help="of pre-training of the demo's bases without a habit, which know their parts by half")
    parser.add_argument("--variant", action="append", default=[],
                        help='other flags of currreft.py in one word to run three rows under, as --variant="--beta 0"; '
                             "may be given again")
    parser.add_argument("--improve", action="store_true",
                        help="phase 2 alone as well, under several judges (the demo's ablation has it in any case)")
    parser.add_argument("--samples", type=int, default=16, help="answers to each question for pass@k")
    parser.add_argument("--flags", default="", help='more flags of currreft.py in one word, --flags="--beta 0"')
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time on a CPU, a thread each")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and pictures of what is there")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if min(*args.steps, args.reject_steps, args.jobs) < 1 or args.samples not in (8, 16, 32, 64):
        parser.error("--steps, --reject_steps and --jobs must be at least 1, --samples 8, 16, 32 or 64")
    for name in ("out", "model", "data"):  # commands run in this file's directory, wherever they are called from
        path = Path(getattr(args, name))
        if getattr(args, name) and (name != "model" or path.exists()):
            setattr(args, name, str(path.absolute()))
    return args


def run(args):
    """Make the bases, run every row, measure pass@k, write the report; 1 if a run failed. Raises UserError."""
    import torch  # heavy: after this command's own flags are known to be good
    from currreft import parse_args as settings
    args.gpus = torch.cuda.device_count()
    args.jobs = 1 if args.gpus else args.jobs
    args.flags = f"{'' if args.model else DEMO_FLAGS} {args.flags}"
    if args.data:
        find_files(args.data)  # what is not there is said before anything runs
    bases = [Base("base", args.model, args.data)] if args.model else demo_bases(args)
    bases += [replace(bases[0], name=bases[0].name + flags.replace(" ", ""), setting=flags, flags=flags,
                      rows=COMPARED, seeds=2) for flags in args.variant]
    args.configs = {base.name: settings(shlex.split(f"{args.flags} {base.flags}")) for base in bases}
    rows, jobs = plan(args, bases)
    failed, worlds = {}, {}
    for base in bases:
        if base.demo and not base.flags:
            worlds.setdefault(base.demo[1], []).append(base)
    later = improve_jobs(args, bases[0], rows) if "Curr-RL" in args.rows and (args.improve or not args.model) else []
    if not args.report:
        failed = work({world: partial(make_bases, made) for world, made in worlds.items()}, args.jobs)
        for part in (jobs, later):
            failed |= work({str(job.folder): partial(train, job, args) for job in part}, args.jobs)
        failed |= work({f"pass@k of {file.stem} in {file.parent.name}": partial(measure, model, base, file, args)
                        for name, model, base, file in measured(bases, jobs, rows, args)}, args.jobs)
    for name, sentence in failed.items():
        print(f"ablation: not finished: {sentence}", file=sys.stderr)
    print(report(bases, jobs + later, rows, args))
    return 1 if failed else 0


def main(argv=None):
    """The command; returns its exit code."""
    args = parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ablation: stopped; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
