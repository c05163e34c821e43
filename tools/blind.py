"""Can yes/no and option questions be answered without looking? (support/blind.py tries.)

    python -m tools.blind --data DIR    # the questions that a run on DIR will train on
    python -m tools.blind --made        # made annotations, derived row by row and all at once
"""

import argparse
import itertools
import json
import random
import sys

from data import training_forms
from forms import derive, derive_all
from rewards import FORMS, Example
from support.answers import parse_labels
from support.blind import blind_accuracy, blind_report
from support.rows import find_files
from support.words import UserError, command

# ---- Made annotations ----

KINDS = ("photos", "board", "angles", "mixed math", "referring", "portraits")
CLASSES = {"person": (0.45, 0.75, 0.5, 0.55), "car": (0.35, 0.25, 0.5, 0.7),  # w, h, x, y
           "ball": (0.06, 0.08, 0.5, 0.75), "clock": (0.08, 0.1, 0.5, 0.2),
           "dog": (0.3, 0.3, 0.4, 0.7), "bird": (0.12, 0.1, 0.5, 0.3)}
OFTEN = (10, 5, 2, 1, 3, 2)
NAMES = "rent food travel books tea steel wood paper coal sport music toys".split()
MIXED = (  # questions, and the least, the greatest and the step of what answers them
    ("In which year did {} peak?", "When was {} first sold?", 1985, 2024, 1),
    ("What percentage of the budget is {}?", "How many percent of {} is sold?", 5, 96, 1),
    ("How many boxes of {} are there?", "What number of {} does the table list?", 1, 13, 1),
    ("What is the angle of {}?", "How many degrees has the part of {}?", 10, 180, 5),
    ("What does {} cost?", "How many dollars are paid for {}?", 100, 900, 10))
SIDES = {"left": 0.2, "middle": 0.5, "right": 0.8}


def made_examples(kind, count=1500, seed=0):
    """Open examples whose annotations lie as in real data; kind: one of KINDS."""
    rng, rows = random.Random(f"{kind} {seed}"), []
    for n in range(count):
        size = rng.choice([(644, 476), (476, 644), (560, 560)])
        asked = made_scene(kind, rng, size)
        if kind == "angles":
            value = rng.choice([rng.randrange(5, 180, 5), rng.randrange(1, 180)])
            asked = [("math", f"What is the angle at {chr(65 + n % 7)}?", f"{value}°")]
        elif kind == "mixed math":
            *texts, least, end, step = rng.choice(MIXED)
            text = f"In table {rng.randrange(99)}: {rng.choice(texts).format(rng.choice(NAMES))}"
            asked = [("math", text, str(rng.randrange(least, end, step)))]
        elif kind == "referring":
            asked = asked[:1]
        rows += [Example(problem=problem, solution=solution, task=task, images=(f"{n}.jpg",),
                         size=size, where=f"{kind}:{n}") for task, problem, solution in asked]
    return rows


def made_scene(kind, rng, size):
    """[(task, problem, solution), ..]: where an object is, what there is, and how many."""
    name, spread, which = rng.choices(list(CLASSES), OFTEN)[0], 0.15, ""
    w, h, x, y = CLASSES[name]
    if kind == "board":
        w, h, x = 0.1, 0.1, (rng.randrange(8) + 0.5) / 8
        y = (rng.choice([0, 1, 1, 6, 6, 7]) + 0.5) / 8
    elif kind == "portraits":
        name, spread, w, h, x, y = "face", 0.02, 0.8, 0.85, 0.5, 0.5
    elif kind == "referring":
        side, spread = rng.choice(list(SIDES)), 0.1
        x, which = SIDES[side], f" on the {side}, by the {rng.choice(NAMES)} of {rng.randrange(99)}"
    if kind != "board":
        w, h = w * rng.uniform(0.7, 1.3), h * rng.uniform(0.7, 1.3)
        x, y = x + rng.gauss(0, spread), y + rng.gauss(0, spread)
    box = [min(max(v, 0.0), 1.0) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
    x1, y1, x2, y2 = (round(v * size[i % 2]) for i, v in enumerate(box))
    boxes = json.dumps([{"bbox_2d": [x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)]}])
    labels = {name} | set(rng.choices(list(CLASSES), OFTEN, k=rng.randrange(3)))
    count = rng.choices([1, 2, 3, 4, 5, 6], (72, 12, 7, 4, 3, 2))[0]
    return [("detection", f"Where is the {name}{which}?", boxes),
            ("classify", "What is there?", ", ".join(sorted(labels))),
            ("math", f"How many times is {name} there?", str(count))]


def made_table():
    """Markdown: blind accuracy on made annotations, derived row by row and all at once."""
    lines = ["| annotations | questions | row by row | all at once | chance | rows kept |",
             f"|{'---|' * 6}"]
    for kind, form in itertools.product(KINDS, FORMS[:2]):
        rows = made_examples(kind)
        pool = {label for e in rows if e.task == "classify" for label in parse_labels(e.solution)}
        alone = [derive(e, form, pool if e.task == "classify" else None) for e in rows]
        together = derive_all(rows, form)
        for task in dict.fromkeys(e.task for e in rows):
            before, after = ([e for e in found if e.task == task] for found in (alone, together))
            share, chance, _ = blind_accuracy(after)
            lines.append(f"| {kind} | {form} {task} | {blind_accuracy(before)[0]:.0%} | {share:.0%} "
                         f"| {chance:.0%} | {len(after) / len(before):.0%} |")
    return "\n".join(lines)


@command
def main(argv=None):
    """Print what can be told without looking, of a run's questions or of made ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", help="data directory, as currreft.py's")
    parser.add_argument("--image_root", help="what image paths are relative to (default: --data)")
    parser.add_argument("--task", nargs="+", default=[], help="task of rows that name none")
    parser.add_argument("--seed", type=int, default=0, help="the run's --seed")
    parser.add_argument("--made", action="store_true", help="the table of docs/derived.md instead")
    args = parser.parse_args(argv)
    if args.made:
        return print(made_table())
    if not args.data:
        raise UserError("give --data DIR or --made")
    files = find_files(args.data)["train"]
    forms = training_forms(files, [form for form in FORMS if files[form] or files["open"]],
                           args.seed, task=args.task, image_root=args.image_root or args.data,
                           skip_bad_rows=True)
    print("\n".join(blind_report([e for rows in forms.values() for e in rows]))
          or "too few questions to tell")


if __name__ == "__main__":
    sys.exit(main())
