"""Can yes/no and option questions be answered without looking? A small learner tries.

    python -m tools.blind --data DIR    # the questions that a run on DIR will train on
    python -m tools.blind --made        # made annotations, derived row by row and all at once

It is told of each candidate what can be known blind: place, size and shape of a box; value and
roundness of a number; its rank in each among the options; letter, length, capital; how often the
text was right elsewhere. It is fitted on half of the images and tested on the other half. What it
gets right above chance, a policy can learn without looking: no help with open questions.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from answers import parse_boxes, parse_labels, parse_letters, parse_verdict
from data import FORMS, Example, derive, derive_all, find_files, training_forms
from support.words import UserError, command
from tasks import TASKS, truth_of
from tools.doubts import family
from tools.numerals import parse_number

WARN = 0.10  # above chance
GIVEN_AWAY = ". WARNING: the questions give their answers away: learning them need not be seeing"
MOST = 4000  # questions of a task and form that are looked at
ASKED = re.compile(r"Is there an? (.+)\?$|Is the answer (.+)\?$|Is (.+) the right box\?$")
OPTION = re.compile(r"^([A-D])\. (.*)$", re.MULTILINE)


def candidates(example):
    """[(text, whether it is right), ..] of a yes/no or option question; [] where none is found."""
    truth = truth_of(example)
    if example.form == "binary":
        found = ASKED.search(example.problem.strip())
        return [(next(filter(None, found.groups())), bool(parse_verdict(truth)))] if found else []
    options, right = OPTION.findall(example.problem), parse_letters(truth) or set()
    return [(text, letter in right) for letter, text in options] if len(options) > 1 else []


def known(text, size):
    """Numbers that describe a candidate on its own: [value, ..], of fixed length."""
    boxes, number, of_box = parse_boxes(text) or [], parse_number(text), [0.0] * 14
    if len(boxes) == 1 and size:
        x1, y1, x2, y2 = (v / size[n % 2] for n, v in enumerate(boxes[0]))
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 1e-3), max(y2 - y1, 1e-3)
        of_box = [x, y, x * x, y * y, w, h, w * h, math.log(w * h), math.log(w / h),
                  math.hypot(x - 0.5, y - 0.5), x1 < 0.01, y1 < 0.01, x2 > 0.99, y2 > 0.99]
    value = float(number.value) if number else 0.0
    return [*of_box, math.copysign(math.log1p(abs(value)), value), value == 0, value % 5 == 0,
            value % 10 == 0, value % 1 == 0, len(text), text[:1].isupper(), text.count(".")]


def described(examples, train):
    """Features (n, F), right (n,) and question (n,) of all candidates; `train` questions tell how
    often a text was right, where it was shown there ten times."""
    told = Counter((text.lower(), right) for example, use in zip(examples, train) if use
                   for text, right in candidates(example))
    rows, rights, owner = [], [], []
    for number, example in enumerate(examples):
        texts, right = zip(*candidates(example))
        own = np.array([known(text, example.size) for text in texts], float)
        order = own.argsort(0, kind="stable").argsort(0) / max(1, len(own) - 1)
        among = np.concatenate([order, order == 0, order == 1, abs(order - 0.5) < 0.34], 1)
        seen = np.array([[told[text.lower(), r] for r in (True, False)] for text in texts])
        seen = seen * (seen.sum(1, keepdims=True) >= 10)
        share = (seen[:, :1] + 1) / (seen.sum(1, keepdims=True) + 2)
        rows.append(np.concatenate([own, among * (len(own) > 1), np.eye(len(own), 4),
                                    np.log1p(seen), share], 1))
        rights += right
        owner += [number] * len(own)
    return np.concatenate(rows), np.array(rights), np.array(owner)


def fit(x, right, steps=300, rate=0.5, decay=1e-3):
    """Weights of a logistic regression."""
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        weights -= rate * (x.T @ (p - right) / len(right) + decay * weights)
    return weights


def blind_accuracy(examples, seed=0):
    """(share right, chance, number of test questions); None for too few questions."""
    examples = [example for example in examples if candidates(example)][:MOST]
    several = any(sum(right for _, right in candidates(example)) > 1 for example in examples)
    if several:
        examples = [example for example in examples if len(candidates(example)) == 4]
    if len(examples) < 60:
        return None
    tested = np.array([is_test(example, seed) for example in examples])
    x, right, owner = described(examples, ~tested)
    test = tested[owner]
    x = (x - x[~test].mean(0)) / (x[~test].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    scores, right, owner = x[test] @ fit(x[~test], right[~test]), right[test], owner[test]
    if several or len(set(owner)) == len(owner):  # each candidate is a yes/no question of its own
        constant = max(right.mean(), 1 - right.mean())
        return float(((scores > 0) == right).mean()), float(constant), len(right)
    hits = [right[owner == n][scores[owner == n].argmax()] for n in np.unique(owner)]
    return float(np.mean(hits)), 0.25, len(hits)


def is_test(example, seed):
    """Whether a question is a test question, by its image: versions of one photo stay together."""
    name = Path(family(example.images[0])).name if example.images else example.where
    return hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % 2 == 0


def blind_report(examples):
    """A sentence for each task and form: accuracy beside chance, a warning where it is high."""
    said = []
    for form, task in itertools.product(FORMS[:2], TASKS):
        if found := blind_accuracy([e for e in examples if (e.form, e.task) == (form, task)]):
            share, chance, n = found
            said.append(f"{form} {task}: without looking {share:.0%} right, by chance {chance:.0%} "
                        f"({n} questions){GIVEN_AWAY * (share > chance + WARN)}")
    return said


# ---- Made annotations ----

KINDS = ("photos", "board", "angles", "portraits")
CLASSES = {"person": (0.45, 0.75, 0.5, 0.55), "car": (0.35, 0.25, 0.5, 0.7),  # w, h, x, y
           "ball": (0.06, 0.08, 0.5, 0.75), "clock": (0.08, 0.1, 0.5, 0.2),
           "dog": (0.3, 0.3, 0.4, 0.7), "bird": (0.12, 0.1, 0.5, 0.3)}
OFTEN = (10, 5, 2, 1, 3, 2)


def made_examples(kind, count=1500, seed=0):
    """Open examples whose annotations lie as in real data; kind: one of KINDS."""
    rng, rows = random.Random(f"{kind} {seed}"), []
    for n in range(count):
        size = rng.choice([(644, 476), (476, 644), (560, 560)])
        asked = made_scene(kind, rng, size)
        if kind == "angles":
            value = rng.choice([rng.randrange(5, 180, 5), rng.randrange(1, 180)])
            asked = [("math", f"What is the angle at {chr(65 + n % 7)}?", f"{value}°")]
        rows += [Example(problem=problem, solution=solution, task=task, images=(f"{n}.jpg",),
                         size=size, where=f"{kind}:{n}") for task, problem, solution in asked]
    return rows


def made_scene(kind, rng, size):
    """[(task, problem, solution), ..]: where an object is, what there is, and how many."""
    name, spread = rng.choices(list(CLASSES), OFTEN)[0], 0.15
    w, h, x, y = CLASSES[name]
    if kind == "board":
        w, h, x = 0.1, 0.1, (rng.randrange(8) + 0.5) / 8
        y = (rng.choice([0, 1, 1, 6, 6, 7]) + 0.5) / 8
    elif kind == "portraits":
        name, spread, w, h, x, y = "face", 0.02, 0.8, 0.85, 0.5, 0.5
    if kind != "board":
        w, h = w * rng.uniform(0.7, 1.3), h * rng.uniform(0.7, 1.3)
        x, y = x + rng.gauss(0, spread), y + rng.gauss(0, spread)
    box = [min(max(v, 0.0), 1.0) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
    x1, y1, x2, y2 = (round(v * size[i % 2]) for i, v in enumerate(box))
    boxes = json.dumps([{"bbox_2d": [x1, y1, max(x2, x1 + 2), max(y2, y1 + 2)]}])
    labels = {name} | set(rng.choices(list(CLASSES), OFTEN, k=rng.randrange(3)))
    count = rng.choices([1, 2, 3, 4, 5, 6], (72, 12, 7, 4, 3, 2))[0]
    return [("detection", f"Where is the {name}?", boxes),
            ("classify", "What is there?", ", ".join(sorted(labels))),
            ("math", f"How many times is {name} there?", str(count))]


def made_table():
    """Markdown: blind accuracy on made annotations, derived row by row and all at once."""
    lines = ["| annotations | questions | row by row | all at once | chance |", f"|{'---|' * 5}"]
    for kind, form in itertools.product(KINDS, FORMS[:2]):
        rows = made_examples(kind)
        pool = {label for e in rows if e.task == "classify" for label in parse_labels(e.solution)}
        alone = [derive(e, form, pool if e.task == "classify" else None) for e in rows]
        together = derive_all(rows, form)
        for task in dict.fromkeys(e.task for e in rows):
            old, new = (blind_accuracy([e for e in found if e.task == task])
                        for found in (alone, together))
            lines.append(f"| {kind} | {form} {task} | {old[0]:.0%} | {new[0]:.0%} "
                         f"| {new[1]:.0%} |")
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
