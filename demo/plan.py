"""What the ablation runs: the paper's rows, their settings, and the runs that carry them."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

# b, c, o: steps of the curriculum's three forms; n: their sum, for every RL row; r: of reject
ROWS = {
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
COMPARED = ("RL (open only)", "Mix", "Curr-RL")  # the rows that are run in the other settings, too
PAIRS = (("Curr-RL", "RL (open only)"), ("Curr-RL", "Mix"), ("Curr-RL", "Reverse"), ("Curr-RL", "SFT"),
         ("Curr-ReFT", "Curr-RL"))  # differences that the report shows

# The demo's settings: the model and the data that demo/base.py makes below OUT/world-N, its flags, and with
# how many seeds of training they are run (None: all). With habit the base hardly ever reasons before an open
# answer, with reasons-0.15 more often, so that open questions score from the start; parts-N has no habit, but
# N parts in an open answer, where yes/no and letters ask one alone.
SETTINGS = {
    "habit": ("habit", "data", "--name habit --reasons 0.15 0.15 0.00005", None),
    "reasons-0.15": ("reasons-0.15", "data", "--name reasons-0.15 --reasons 0.15 0.15 0.15", None),
    "parts-3": ("parts/careful", "parts/parts-3", "--parts --steps 150", None),
    "parts-2": ("parts/careful", "parts/parts-2", "--parts --steps 150", 1),
    "parts-1": ("parts/careful", "parts/parts-1", "--parts --steps 150", 1),
}
DEMO_FLAGS = ("--prompts_per_step 4 --num_generations 8 --micro_batch 4 --max_completion_length 64 --lr 1e-4 "
              "--sft_lr 1e-4 --lr_schedule constant --reject_samples 4 --eval_limit 120")


@dataclass(frozen=True)
class Base:
    """What runs start from: a checkpoint, data, flags. One `setting` is one line of the report."""
    name: str  # of its directory below --out
    model: str
    data: str
    setting: str = "main"
    flags: str = ""  # of currreft.py
    made: tuple = ()  # by demo/base.py with these flags
    rows: tuple = tuple(ROWS)  # that are run on it
    seeds: int | None = None  # of training that it is run with, the first ones; None: all


@dataclass(frozen=True)
class Job:
    """One run of currreft.py: the rows that it carries are the beginnings of its stages."""
    base: Base
    stages: str
    seed: int
    folder: Path

    def carries(self, stages):
        """Whether the run begins with these stages."""
        return self.stages.split()[:len(stages.split())] == stages.split()

    def results(self, stages):
        """{(split, task): (accuracy in %, questions)} after these stages; {} if not there yet."""
        file = self.folder / "results.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        splits = {row["name"]: row["splits"] for row in rows}.get(label(stages), {})
        return {(split, task): (100 * found["accuracy"], found["n"])
                for split, tasks in splits.items() for task, found in tasks.items() if found["n"]}


def label(stages):
    """What a run's results call the end of these stages: "binary:5 open:5" -> "2-open"."""
    parts = stages.split()
    return f"{len(parts)}-{parts[-1].split(':')[0]}" if parts else "base"


def carriers(rows):
    """{row: stages of the run that it is read off}: of the longest row that begins with it."""
    texts = [text.split() for text in rows.values()]
    return {name: " ".join(max((other for other in texts if other[:len(own)] == own), key=len))
            for name, own in zip(rows, texts)}


def demo_bases(out, worlds):
    """The demo's settings in every world; all rows are run in the first setting of the first."""
    bases = []
    for world, (name, (model, data, flags, seeds)) in itertools.product(worlds, SETTINGS.items()):
        folder = Path(out) / f"world-{world}"
        made = ("--out", str(folder / Path(model).parent), "--seed", str(world), *flags.split())
        bases.append(Base(f"{name}-{world}", str(folder / model), str(folder / data), name, made=made,
                          rows=COMPARED if bases else tuple(ROWS), seeds=seeds))
    return bases


def plan(args, bases):
    """({row: its stages}, all jobs): COMPARED rows first, others last and with fewer seeds."""
    b, c, o = args.steps
    rows = {name: ROWS[name].format(b=b, c=c, o=o, n=b + c + o, r=args.reject_steps) for name in args.rows}
    jobs = []
    for base in bases:
        carried = carriers({name: rows[name] for name in rows if name in base.rows})
        compared = {carried[name] for name in COMPARED if name in carried}
        seeds = enumerate(args.seeds[:base.seeds])
        for (n, seed), stages in itertools.product(seeds, dict.fromkeys(carried.values())):
            if stages in compared or n < args.other_seeds:
                run = f"{stages.replace(':', '').replace(' ', '-')}-seed{seed}"
                job = Job(base, stages, seed, Path(args.out) / base.name / run)
                jobs.append((stages not in compared, seed, job))
    return rows, [job for *_, job in sorted(jobs, key=lambda found: found[:2])]
