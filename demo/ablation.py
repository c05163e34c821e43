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

On the demo's world all rows run on one base model. Three of them (COMPARED) run in other settings as well, with two
seeds of training: from bases that reason more or less often before they answer an open question (--reasons), which says
how often open questions alone score; from a base whose skills are weak instead (--base_steps); in other worlds with
their own bases (--base_seeds); and under other flags (--variant), which a real model can have as well.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data import FORMS, find_files
from distributed import UserError
from tools.pictures import bars, curves, grid, line_chart, read_metrics, wilson
from tools.terminal import terminal

ROOT = Path(__file__).resolve().parents[1]
ROWS = {  # b, c, o: steps of the three forms in the curriculum; n: their sum, which every RL row takes; r: of reject
    "Base": "",
    "SFT": "sft:{n}",
    "RL_Judge (binary only)": "binary:{n}",
    "RL_Choice (choice only)": "choice:{n}",
    "RL (open only)": "open:{n}",
    "Reverse": "open:{o} choice:{c} binary:{b}",
    "Mix": "binary+choice+open:{n}",
    "Curr-RL": "binary:{b} choice:{c} open:{o}",
    "ReFT": "reject:{r}",
    "RL-ReFT": "open:{n} reject:{r}",
    "Curr-ReFT": "binary:{b} choice:{c} open:{o} reject:{r}",
}
COMPARED = ("RL (open only)", "Mix", "Curr-RL")  # the rows that are also run in the other settings
PAIRS = (("Curr-RL", "RL (open only)"), ("Curr-RL", "Mix"), ("Curr-RL", "Reverse"), ("Curr-RL", "SFT"),
         ("Curr-ReFT", "Curr-RL"))  # differences that the report shows run by run
DEMO_FLAGS = ("--prompts_per_step 4 --num_generations 8 --micro_batch 4 --max_completion_length 64 --lr 1e-4 "
              "--sft_lr 1e-4 --lr_schedule constant --reject_samples 4 --eval_limit 120 --threads 1 "
              "--sample_every 1000")


@dataclass(frozen=True)
class Base:
    """What runs start from: a name below --out, checkpoint, data, further flags; and for the demo's, what makes it."""

    name: str
    model: str
    data: str
    flags: str = ""
    seeds: int = 0  # seeds of training it is run with, COMPARED rows only; 0: all of them, and all rows
    reasons: float | None = None  # how often it reasons before an open answer
    demo: tuple = ()  # flags of demo/base.py


@dataclass(frozen=True)
class Job:
    """One run of currreft.py: the rows of the paper that it carries are the beginnings of its stages."""

    base: Base
    stages: str
    seed: int
    folder: Path

    @property
    def last(self):
        """Name of the last stage in the run's results."""
        return label(self.stages)


def label(stages):
    """What the run's results call the end of these stages: label("binary:50 open:50") -> "2-open"; "base" for none."""
    parts = stages.split()
    return f"{len(parts)}-{parts[-1].split(':')[0]}" if parts else "base"


def carriers(rows):
    """{row: stages of the run that it is read off}: the longest row that begins with it."""
    return {name: max((other for other in rows.values() if other.split()[:len(stages.split())] == stages.split()),
                      key=lambda other: len(other.split())) for name, stages in rows.items()}


def plan(args, bases):
    """Every job, those of the main bases and those that carry COMPARED rows first."""
    b, c, o = args.steps
    rows = {name: text.format(b=b, c=c, o=o, n=b + c + o, r=args.reject_steps) for name, text in ROWS.items()}
    jobs = []
    for base in bases:
        wanted = {name: rows[name] for name in (COMPARED if base.seeds else rows) if name in args.rows}
        for seed in args.seeds[:base.seeds or None]:
            for stages in dict.fromkeys(carriers(wanted).values()):
                name = stages.replace(":", "").replace(" ", "-")
                jobs.append(Job(base, stages, seed, Path(args.out) / base.name / f"{name}-seed{seed}"))
    return rows, sorted(jobs, key=lambda job: (job.base.seeds > 0, job.seed))


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


def results_of(folder):
    """{stage label: splits} of a run so far."""
    file = folder / "results.json"
    return {row["name"]: row["splits"] for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


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


def demo_bases(args):
    """The demo's base models: the first, then other --reasons on its world, ones of weaker skills, other worlds."""
    (first, *others), (steps, *fewer) = args.base_seeds, args.base_steps
    wanted = [(first, steps, reasons) for reasons in args.reasons]
    wanted += [(first, weak, args.reasons[-1]) for weak in fewer] + [(seed, steps, args.reasons[0]) for seed in others]
    bases = []
    for seed, n, reasons in wanted:
        weak, name = f"-{n}steps" if n != 500 else "", f"reasons-{reasons:g}"  # 500: demo/base.py's own
        folder = Path(args.out) / f"world-{seed}{weak}"
        flags = ("--out", str(folder), "--name", name, "--seed", str(seed), "--steps", str(n),
                 "--reasons", "0.15", "0.15", str(reasons))  # yes/no and letters: as demo/base.py
        bases.append(Base(f"base-{seed}-{reasons:g}{weak}", str(folder / name), str(folder / "data"),
                          seeds=2 if bases else 0, reasons=reasons, demo=flags))
    return bases


def make_bases(bases):
    """demo/base.py for every base of one world, one after another; finished ones are left alone."""
    for base in bases:
        log = Path(f"{Path(base.model).parent}.log")
        call([sys.executable, "-m", "demo.base", "--threads", "1", *base.demo], log, 1)


def work(tasks, jobs):
    """Run tasks {name: function} `jobs` at a time under a progress bar; returns {name: sentence} of the failed."""
    failed, lock = {}, threading.Lock()
    with tqdm(total=len(tasks), unit="run", dynamic_ncols=True) as bar, ThreadPoolExecutor(jobs) as pool:
        def do(name, function):
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
# Figures


def figures_of(jobs, rows, bases):
    """{row: {(base name, seed): splits}} of what is finished on `bases`; splits as in a run's results.json."""
    there = {}
    for name, stages in rows.items():
        for job in jobs:
            splits = results_of(job.folder).get(label(stages))
            if job.base in bases and splits and job.stages.split()[:len(stages.split())] == stages.split():
                there.setdefault(name, {}).setdefault((job.base.name, job.seed), splits)
    return there


def score(splits, split, task="all"):
    """(accuracy in %, number of questions) of one split and task, or None."""
    found = splits.get(split, {}).get(task)
    return (100 * found["accuracy"], found["n"]) if found and found["n"] else None


def spread(runs, split, task="all"):
    """(mean over runs, half its interval, [each run's]) in %, or None where no run has the split.

    The interval is Wilson's for as many questions as the bases have together: it says how well the questions measure
    a model. How much runs differ is said by their range.
    """
    scores = {key: found for key, splits in runs.items() if (found := score(splits, split, task))}
    if not scores:
        return None
    each = [accuracy for accuracy, _ in scores.values()]
    n = sum({base: n for (base, _), (_, n) in scores.items()}.values())
    mean = statistics.mean(each)
    return mean, 100 * wilson(mean / 100 * n, n), each


def cell(found):
    """(56.1, 3.2, [53, 59]) -> "56 ±3 (53-59)"."""
    if not found:
        return "-"
    mean, half, each = found
    return f"{mean:.0f} ±{half:.0f}" + (f" ({min(each):.0f}-{max(each):.0f})" if len(each) > 1 else "")


def short(x):
    """53.2 -> "53", 0.0412 -> "0.041"."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def markdown(heading, lines):
    """A Markdown table of texts."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [heading, ["---"] * len(heading), *lines])


def results_tables(there):
    """Two tables: every split over all tasks, and the open splits by task."""
    first = [splits for runs in there.values() for splits in runs.values()]
    splits = list(dict.fromkeys(split for found in first for split in found))
    by_task = [(split, task) for split in splits for task in dict.fromkeys(t for f in first for t in f.get(split, {}))
               if task != "all" and split.startswith("open")]
    return [markdown(["row", *columns], [[name, *(cell(spread(runs, *key)) for key in keys)]
                                         for name, runs in there.items()])
            for columns, keys in ((splits, [(split,) for split in splits]),
                                  ([f"{split} {task}" for split, task in by_task], by_task)) if keys]


def difference(there, one, other, split):
    """Row `one` minus row `other`, run by run of the same base and seed: "+55 (+50 to +58), 6 of 6 above"."""
    pairs = [(score(there[one][key], split), score(there[other][key], split))
             for key in there.get(one, {}) if key in there.get(other, {})]
    each = [a[0] - b[0] for a, b in pairs if a and b]
    if not each:
        return "-"
    return (f"{statistics.mean(each):+.0f} ({min(each):+.0f} to {max(each):+.0f}), "
            f"{sum(x > 0 for x in each)} of {len(each)} above")


def metrics_of(jobs, stages):
    """[[metrics of each RL step]] of the runs that begin with `stages`, as far as these go."""
    parts = stages.split()
    runs = []
    for job in jobs:
        try:
            runs += [read_metrics(job.folder).values()] if job.stages.split()[:len(parts)] == parts else []
        except UserError:  # not begun
            continue
    return [[row for row in run if row["stage_index"] < len(parts) and "equal_groups" in row] for run in runs]


def equal_groups(runs):
    """Mean share of groups whose rewards are all equal, as text."""
    shares = [row["equal_groups"] for run in runs for row in run]
    return f"{100 * statistics.mean(shares):.0f} %" if shares else "-"


def takeoff(runs, steps=10, level=0.1):
    """When open answers begin to score, as text, run by run: "113, never, 180", the first open step at which the
    accuracy reward of the last `steps` is above `level` on average. Runs without an open stage are left out.
    """
    said = []
    for run in runs:
        rewards = [row["reward/accuracy"] for row in run if row["stage"] == "open"]
        ends = (n for n in range(steps, len(rewards) + 1) if statistics.mean(rewards[n - steps:n]) > level)
        said += [str(next(ends, "never"))] if rewards else []
    return ", ".join(said) or "-"


def per_step(args, base):
    """Rollouts of one step of the runs on `base`."""
    return args.configs[base.name].prompts_per_step * args.configs[base.name].num_generations


def expected_hits(figures, rollouts, args):
    """pass@1 x rollouts as text; where nothing was right, what 95 % of such a measurement exclude (rule of three)."""
    share = figures["pass@1"] or 3 / (figures["n"] * args.samples)
    return f"{'' if figures['pass@1'] else '< '}{short(share * rollouts)}"


def predictors(bases, jobs, rows, args):
    """What predicts the outcome in each setting: pass@k of the three forms, expected hits, groups without signal."""
    lines = []
    for base in bases:
        rollouts = sum(args.steps) * per_step(args, base)
        file = pass_file(args, base)
        figures = json.loads(file.read_text()) if file.exists() else {}
        ks = {form: [100 * share for k, share in at.items() if k.startswith("pass@")] for form, at in figures.items()}
        mine = [job for job in jobs if job.base == base]
        lines.append([base.name, *(f"{short(ks[form][0])} / {short(ks[form][-1])}" if form in ks else "-"
                                   for form in FORMS),
                      expected_hits(figures["open"], rollouts, args) if "open" in ks else "-",
                      short(base.reasons * rollouts) if base.reasons else "-",
                      *(equal_groups(metrics_of(mine, rows[row])) for row in ("RL (open only)", "Curr-RL"))])
    return markdown(["base", *(f"{form}, pass@1 / pass@{args.samples} %" for form in FORMS),
                     "expected hits, all rollouts open", "expected to reason, as built",
                     "equal groups, all steps of open only", "equal groups, all steps of Curr-RL"], lines)


def regimes(bases, jobs, rows, splits):
    """Tables of the COMPARED rows in every setting: accuracy split by split, and when open answers began to score."""
    found = {base: figures_of(jobs, rows, [base]) for base in bases}
    ours, *others = COMPARED[::-1]
    heading = ["setting", *COMPARED, *(f"{ours} - {other}" for other in others)]
    parts = [f"{split}:\n\n" + markdown(heading, [
        [base.name, *(cell(spread(there.get(row, {}), split)) for row in COMPARED),
         *(difference(there, ours, other, split) for other in others)] for base, there in found.items()]) + "\n"
        for split in splits]
    return [*parts, "Open step at which the accuracy reward of the last 10 steps first averaged above 0.1:\n",
            markdown(["setting", *COMPARED[::2]],  # no step of Mix has open questions alone
                     [[base.name, *(takeoff(metrics_of([job for job in jobs if job.base == base], rows[row]))
                                    for row in COMPARED[::2])] for base in bases])]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(bases, jobs, rows, args, splits):
    """Every picture that there is something for; returns their paths."""
    out, main = Path(args.out), [base for base in bases if not base.seeds]
    there = figures_of(jobs, rows, main)
    paths = [bars({name: {split: spread(runs, split) for split in splits} for name, runs in there.items()},
                  out / "rows.png", "Open questions: mean, 95 % interval of the questions, every run", "accuracy in %")]
    panels = []
    for name, stages in rows.items():
        runs = [job.folder for job in jobs if job.base in main and job.stages == stages and ":" in stages
                and not stages.startswith(("sft", "reject")) and (job.folder / "metrics.jsonl").exists()]
        if runs:
            panels.append(curves(runs, out / f"curve-{len(panels)}.png", "reward/accuracy", title=name))
    if panels:
        paths.append(grid(panels, out / "curves.png"))
        for panel in panels:
            panel.unlink()
    world = [base for base in bases if base.reasons and base.data == main[0].data and not base.flags]
    points = {row: sorted((base.reasons, mean[0]) for base in world
                          if (mean := spread(figures_of(jobs, rows, [base]).get(row, {}), splits[0])))
              for row in COMPARED}
    if any(len(line) > 1 for line in points.values()):
        paths.append(line_chart(points, out / "regimes.png", "Open questions after each row, mean over runs",
                                "how often the base reasons before an open answer", "accuracy in %", logx=True))
    forms = [json.loads(file.read_text()) for base in main if (file := pass_file(args, base)).exists()]
    if forms:
        lines = {form: [(int(k[5:]), 100 * statistics.mean(at[form][k] for at in forms)) for k in forms[0][form]
                        if k.startswith("pass@")] for form in FORMS if form in forms[0]}
        paths.append(line_chart(lines, out / "pass_at_k.png", "pass@k of the base model by form of the question", "k",
                                "%", logx=True))
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Report and command line


def report(bases, jobs, rows, args):
    """Write results.md, results.json and the pictures from whatever is finished; returns the text."""
    main = [base for base in bases if not base.seeds]
    there = figures_of(jobs, rows, main)
    if not there:
        raise UserError(f"{args.out} holds no finished run yet")
    every = list(next(iter(next(iter(there.values())).values())))
    splits = [split for split in every if split.startswith("open")] or every
    b, c, o = args.steps
    differences = [[f"{one} - {other}", *(difference(there, one, other, split) for split in splits)]
                   for one, other in PAIRS]
    parts = [f"# What did every row of the ablation score?\n\n{b + c + o} updates of {per_step(args, main[0])} rollouts a "
             f"row ({b} + {c} + {o} in the curriculum), seeds {', '.join(map(str, args.seeds))}. Greedy accuracy in %, "
             "strict scorer: mean over runs, half the 95 % interval for as many questions, range over runs in brackets.\n",
             "## What predicts the outcome\n", predictors(bases, jobs, rows, args), "",
             "## Rows\n", *[table + "\n" for table in results_tables(there)], "## Run by run, the same base and seed\n",
             markdown(["difference", *splits], differences)]
    if len(bases) > len(main):
        parts += ["\n## In other settings\n\nTwo seeds, on the first base all. The demo's are base-WORLD-REASONS: how "
                  "often a base reasons before an open answer.\n", *regimes(bases, jobs, rows, splits)]
    after = {}
    for name, _, base, file in measured(bases, jobs, rows, args):
        if base == main[0] and file.exists():
            after.setdefault(name, []).append(json.loads(file.read_text()))
    parts += ["\n## pass@k before and after\n\nSampled answers, mean over seeds.\n", pass_table(after, args)]
    text = "\n".join(parts) + "\n"
    (Path(args.out) / "results.md").write_text(text)
    (Path(args.out) / "results.json").write_text(json.dumps(
        {name: {f"{base} seed {seed}": splits for (base, seed), splits in runs.items()}
         for name, runs in there.items()}, indent=1))
    draw(bases, jobs, rows, args, splits)
    return text


def pass_file(args, base, name="base"):
    """Where pass@k of a base, or of the end of a row on it, is kept."""
    return Path(args.out) / base.name / f"pass{args.samples}-{name}.json"


def measured(bases, jobs, rows, args):
    """[(name, checkpoint, base, file)] to measure pass@k of: the bases, and on the first the COMPARED rows' stages."""
    found = [("base", base.model, base, pass_file(args, base)) for base in bases if not base.flags]
    for row in COMPARED:
        parts = rows[row].split()
        ends = [label(" ".join(parts[:end])) for end in range(1, len(parts) + 1)]
        mine = [job for job in jobs if job.base == bases[0] and job.stages.split()[:len(parts)] == parts]
        for end, job in itertools.product(ends, mine):
            name = row if len(ends) == 1 else f"{row}, {end}"
            file = pass_file(args, job.base, f"{name}-seed{job.seed}")
            found.append((name, job.folder / "stages" / end, job.base, file))
    return found


def pass_table(after, args):
    """pass@1 and pass@k of each form, a line each {name: [figures of a seed]}."""
    ks = ("pass@1", f"pass@{args.samples}")
    return markdown(["after", *(f"{form} {k}" for form in FORMS for k in ks)],
                    [[name, *(short(100 * statistics.mean(at[form][k] for at in seeds)) if form in seeds[0] else "-"
                              for form in FORMS for k in ks)] for name, seeds in after.items()])


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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--base_seeds", type=int, nargs="+", default=[0, 1, 2],
                        help="of the demo's worlds and base models; all rows run on the first")
    parser.add_argument("--reasons", type=float, nargs="+", default=[5e-5, 1e-5, 3e-4, 0.15],
                        help="how often the demo's bases reason before an open answer; all rows run on the first")
    parser.add_argument("--base_steps", type=int, nargs="+", default=[500, 200],
                        help="of the demo's pre-training; fewer: a base of weak skills, and the last of --reasons")
    parser.add_argument("--variant", action="append",
                        help='other flags of currreft.py in one word to run three rows under, as --variant="--beta 0"; '
                             "may be given again (default in the demo: that one)")
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
    if args.variant is None:
        args.variant = [] if args.model else ["--beta 0"]
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
    bases += [replace(bases[0], name=bases[0].name + flags.replace(" ", ""), flags=flags, seeds=2)
              for flags in args.variant if flags]
    args.configs = {base.name: settings(shlex.split(f"{args.flags} {base.flags}")) for base in bases}
    rows, jobs = plan(args, bases)
    failed, worlds = {}, {}
    for base in bases:
        if base.demo and not base.flags:
            worlds.setdefault(base.data, []).append(base)
    if not args.report:
        failed = work({data: partial(make_bases, made) for data, made in worlds.items()}, args.jobs)
        failed |= work({str(job.folder): partial(train, job, args) for job in jobs}, args.jobs)
        failed |= work({f"pass@k of {file.stem} in {file.parent.name}": partial(measure, model, base, file, args)
                        for name, model, base, file in measured(bases, jobs, rows, args)}, args.jobs)
    for name, sentence in failed.items():
        print(f"ablation: not finished: {sentence}", file=sys.stderr)
    print(report(bases, jobs, rows, args))
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
