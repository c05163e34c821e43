"""What the ablation runs: rows of the paper's table, bases to start from, and the runs that carry the rows."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from demo.world import PARTS

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
    """What runs start from: a name below --out, checkpoint, data, further flags; and for the demo's, what makes it.

    Bases of one `setting` are one line of the report, the first setting's first base its main table.
    """

    name: str
    model: str
    data: str
    flags: str = ""
    setting: str = "main"
    rows: tuple = ()  # that are run on it; all of them if empty
    seeds: int = 0  # seeds of training it is run with; all of them if 0
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


def results_of(folder):
    """{stage label: splits} of a run so far."""
    file = folder / "results.json"
    return {row["name"]: row["splits"] for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


def carriers(rows):
    """{row: stages of the run that it is read off}: the longest row that begins with it."""
    return {name: max((other for other in rows.values() if other.split()[:len(stages.split())] == stages.split()),
                      key=lambda other: len(other.split())) for name, stages in rows.items()}


def plan(args, bases):
    """Every job; rows that are not COMPARED are run with the first --other_seeds seeds only, and last."""
    b, c, o = args.steps
    rows = {name: text.format(b=b, c=c, o=o, n=b + c + o, r=args.reject_steps) for name, text in ROWS.items()}
    first, last = [], []
    for base in bases:
        wanted = {name: rows[name] for name in base.rows or rows if name in args.rows}
        carried = carriers(wanted)
        compared = {carried[name] for name in COMPARED if name in carried}
        for n, seed in enumerate(args.seeds[:base.seeds or None]):
            for stages in dict.fromkeys(carried.values() if n < args.other_seeds else compared):
                job = Job(base, stages, seed, Path(args.out) / base.name / f"{slug(stages)}-seed{seed}")
                (first if stages in compared else last).append(job)
    return rows, sorted(first, key=lambda job: job.seed) + sorted(last, key=lambda job: job.seed)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's settings


def demo_bases(args):
    """The demo's base models, of the settings that the head of this file names."""
    bases = []
    for world in args.base_seeds:
        folder = Path(args.out) / f"world-{world}"

        def base(name, model, data, *demo, **more):
            """Add the base of a setting in this world, made by demo/base.py with these flags."""
            made = ("--out", str(folder / Path(model).parent), "--seed", str(world), *demo)
            bases.append(Base(f"{name}-{world}", str(folder / model), str(folder / data), setting=name, demo=made,
                              **more))

        for i, reasons in enumerate(args.reasons):
            name = "habit" if i == 0 else f"reasons-{reasons:g}"
            flags = ("--name", name, "--leaky", "--reasons", "0.15", "0.15", str(reasons))
            base(name, name, "data", *flags, rows=COMPARED if bases else ())
            if i == 0:
                base("leaky", name, "leaky", *flags, rows=("Curr-RL",))
        for parts in range(PARTS, 0, -1):
            base(f"parts-{parts}", "parts/careful", f"parts/parts-{parts}", "--parts", "--steps", str(args.parts_steps),
                 rows=COMPARED, seeds=0 if parts == PARTS else 1)
    return bases


IMPROVE = {  # setting: (steps of SFT for each of --reject_steps, flags)
    "improve": (1, ""),
    "improve, 4 x passes": (4, ""),
    "improve, all kept": (1, "--reject_threshold 0"),            # the judge still says which of an example's answers
    "improve, no judge": (1, "--reject_threshold 0 --reject_samples 1"),
}


def improve_jobs(args, base, rows):
    """Phase 2 alone, from where the curriculum ended on `base`, with a better or worse judge or more passes."""
    jobs, stages = [], carriers(rows)["Curr-RL"]
    for seed, (setting, (times, flags)) in itertools.product(args.seeds, IMPROVE.items()):
        ended = Path(args.out) / base.name / f"{slug(stages)}-seed{seed}" / "stages" / label(rows["Curr-RL"])
        after = Base(f"{slug(setting)}-{base.name}", str(ended), base.data, flags, setting)
        jobs.append(Job(after, f"reject:{times * args.reject_steps}", seed,
                        Path(args.out) / after.name / f"seed{seed}"))
    return jobs


def slug(text):
    """A text as a file's name."""
    return text.replace(":", "").replace(",", "").replace(" ", "-")
