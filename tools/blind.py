"""Can yes/no and option questions be answered without looking? A small learner that sees no image tries.

    python -m tools.blind --data DIR                    # the questions that a run on DIR will train on
    python -m tools.blind --made                        # on made annotations, derived row by row and all at once

It is told of each candidate what can be known blind: place, size and shape of a box and its rank among the options;
value, roundness and rank of a number; letter, length, capital; and how often the text was right and wrong elsewhere. It
is fitted on half of the images (versions of one photo stay together) and tested on the other half. What it gets right
above chance, a policy can learn without looking, and that would not help it with open questions.
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
from distributed import UserError
from tasks import TASKS, truth_of
from tools.numerals import parse_number
from tools.terminal import terminal

WARN = 0.10      # above chance
MOST = 4000      # questions of a kind that are looked at
ASKED = re.compile(r"Is there an? (.+)\?$|Is the answer (.+)\?$|Is (.+) the right box\?$")
OPTION = re.compile(r"^([A-D])\. (.*)$", re.MULTILINE)


# ---- What is shown, and what can be known of it ----

def candidates(example):
    """[(text, whether it is right), ..] of a yes/no or option question; [] where none can be found in it."""
    if example.form == "binary":
        found = ASKED.search(example.problem.strip())
        return [(next(filter(None, found.groups())), parse_verdict(truth_of(example)))] if found else []
    options, right = OPTION.findall(example.problem), parse_letters(truth_of(example)) or set()
    return [(text, letter in right) for letter, text in options] if len(options) > 1 else []


def known(text, size):
    """Numbers that describe a candidate on its own: [value, ..], of fixed length."""
    boxes, number = parse_boxes(text) or [], parse_number(text)
    found = [len(text), text[:1].isupper(), text.count("."), text.startswith("0")]
    if len(boxes) == 1 and size:
        x1, y1, x2, y2 = (v / size[n % 2] for n, v in enumerate(boxes[0]))
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        found += [x, y, w, h, w * h, math.log(max(w * h, 1e-6)), math.log(max(w, 1e-3) / max(h, 1e-3)), x * x, y * y,
                  math.hypot(x - 0.5, y - 0.5), x1 < 0.01, y1 < 0.01, x2 > 0.99, y2 > 0.99]
    else:
        found += [0.0] * 14
    value = float(number.value) if number else 0.0
    found += [math.copysign(math.log1p(abs(value)), value), value == 0, value % 5 == 0, value % 10 == 0, value % 1 == 0]
    return found


def ranks(rows):
    """For each candidate of a question, where it stands among the others in every number: [(rank, least, most, ..)]."""
    table = np.array(rows)
    order = table.argsort(0, kind="stable").argsort(0) / max(1, len(rows) - 1)
    return np.concatenate([order, order == 0, order == 1, abs(order - 0.5) < 0.34], 1)


def described(examples):
    """(features (n, F) of all candidates, right (n,), question number (n,), texts) of questions of one task and form."""
    rows, right, owner, texts = [], [], [], []
    for number, example in enumerate(examples):
        shown = candidates(example)
        own = [known(text, example.size) for text, _ in shown]
        placed = ranks(own) if len(shown) > 1 else np.zeros((len(shown), 4 * len(own[0]) if own else 0))
        for place, (text, is_right) in enumerate(shown):
            rows.append([*own[place], *placed[place], *(place == n for n in range(4))])
            right.append(bool(is_right))
            owner.append(number)
            texts.append(text.lower())
    return np.array(rows, float), np.array(right), np.array(owner), texts


def often(texts, right, train):
    """How often each candidate's text was right among the candidates `train`, where it was shown there ten times."""
    told = Counter((text, bool(r)) for text, r, use in zip(texts, right, train) if use)
    rows = []
    for yes, no in ((told[text, True], told[text, False]) for text in texts):
        rows.append([math.log1p(yes), math.log1p(no), (yes + 1) / (yes + no + 2)] if yes + no >= 10 else [0, 0, 0])
    return np.array(rows, float)


# ---- The learner ----

def fit(x, right, owner, steps=300, rate=0.5, decay=1e-3):
    """Weights of a logistic regression; where questions have one right option each, of a choice among their options."""
    weights, groups = np.zeros(x.shape[1]), np.unique(owner, return_inverse=True)[1]
    for _ in range(steps):
        p = chances(x @ weights, groups)
        weights -= rate * (x.T @ (p - right) / len(right) + decay * weights)
    return weights


def chances(scores, groups):
    """Probability of each candidate: softmax within its question, or sigmoid where it is alone."""
    if len(groups) == groups.max() + 1:
        return 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
    e = np.exp(scores - scores.max())
    return e / np.bincount(groups, e)[groups]


def blind_accuracy(examples, seed=0):
    """(share right, chance, number of test questions) of the blind learner; None for too few questions."""
    examples = [e for e in examples if candidates(e)][:MOST]
    several = any(sum(r for _, r in candidates(e)) > 1 for e in examples)
    if several:  # each option is a yes/no question of its own
        examples = [e for e in examples if len(candidates(e)) == 4]
    if len(examples) < 60:
        return None
    x, right, owner, texts = described(examples)
    test = np.array([half(examples[n], seed) for n in owner])
    x = np.concatenate([x, often(texts, right, ~test)], 1)
    x = (x - x[~test].mean(0)) / (x[~test].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    owner = np.arange(len(owner)) if several else owner
    weights = fit(x[~test], right[~test], owner[~test])
    scores, right, owner = x[test] @ weights, right[test], owner[test]
    if len(set(owner)) == len(owner):
        constant = max(right.mean(), 1 - right.mean())
        return float(((scores > 0) == right).mean()), float(constant), len(right)
    hits = [right[owner == n][scores[owner == n].argmax()] for n in np.unique(owner)]
    return float(np.mean(hits)), 0.25, len(hits)


def half(example, seed):
    """Whether a question is a test question, by its image: versions of one photo (NAME.rf.HASH.jpg) stay together."""
    name = Path(example.images[0]).name if example.images else example.where
    return hashlib.sha256(f"{seed} {re.sub(r'[.]rf[.].*', '', name)}".encode()).digest()[0] % 2 == 0


def blind_report(examples):
    """Sentences on questions: per task and form blind accuracy beside chance, with a warning where it is high."""
    said = []
    for form, task in itertools.product(("binary", "choice"), TASKS):
        if found := blind_accuracy([e for e in examples if (e.form, e.task) == (form, task)]):
            share, chance, n = found
            said.append(f"{form} {task}: without looking {share:.0%} right, by chance {chance:.0%} ({n} questions)" + (
                        ". WARNING: the questions give their answers away; what is learned from them need not be seeing"
                        if share > chance + WARN else ""))
    return said


# ---- Made annotations ----

CLASSES = {"person": (0.45, 0.75, 0.5, 0.55), "car": (0.35, 0.25, 0.5, 0.7), "ball": (0.06, 0.08, 0.5, 0.75),
           "clock": (0.08, 0.1, 0.5, 0.2), "dog": (0.3, 0.3, 0.4, 0.7), "bird": (0.12, 0.1, 0.5, 0.3)}  # w, h, x, y
OFTEN = (10, 5, 2, 1, 3, 2)


def made_examples(kind, count=1500, seed=0):
    """Open examples with annotations as they lie in real data: kind "photos", "board", "angles" or "portraits"."""
    rng, rows = random.Random(f"{kind} {seed}"), []
    for n in range(count):
        size = rng.choice([(644, 476), (476, 644), (560, 560)])
        base = {"images": (f"{n}.jpg",), "size": size, "where": f"{kind}:{n}"}
        if kind == "angles":
            value = rng.choice([rng.randrange(5, 180, 5), rng.randrange(10, 170, 10), rng.randrange(1, 180)])
            problem = f"What is the angle at {chr(65 + n % 7)}?"
            rows.append(Example(problem=problem, solution=f"{value}°", task="math", **base))
            continue
        name = "face" if kind == "portraits" else rng.choices(list(CLASSES), OFTEN)[0]
        w, h, x, y = (0.8, 0.85, 0.5, 0.5) if kind == "portraits" else CLASSES[name]
        if kind == "board":
            w, h, x, y = 0.1, 0.1, (rng.randrange(8) + 0.5) / 8, (rng.choice([0, 1, 1, 6, 6, 7]) + 0.5) / 8
        else:
            spread = 0.02 if kind == "portraits" else 0.15
            w, h = w * rng.uniform(0.7, 1.3), h * rng.uniform(0.7, 1.3)
            x, y = x + rng.gauss(0, spread), y + rng.gauss(0, spread)
        box = [min(max(v, 0.0), 1.0) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)]
        box = [round(v * size[i % 2]) for i, v in enumerate(box)]
        box = [box[0], box[1], max(box[2], box[0] + 2), max(box[3], box[1] + 2)]
        boxes = json.dumps([{"bbox_2d": box}])
        rows.append(Example(problem=f"Where is the {name}?", solution=boxes, task="detection", **base))
        labels = {name} | set(rng.choices(list(CLASSES), OFTEN, k=rng.randrange(3)))
        rows.append(Example(problem="What is there?", solution=", ".join(sorted(labels)), task="classify", **base))
        counted = rng.choices([1, 2, 3, 4, 5, 6], (72, 12, 7, 4, 3, 2))[0]
        rows.append(Example(problem=f"How many times is {name} there?", solution=str(counted), task="math", **base))
    return rows


def made_table():
    """Markdown: blind accuracy on made annotations, derived row by row and all at once."""
    lines = ["| annotations | questions | row by row | all at once | chance |", "|---|---|---|---|---|"]
    for kind in ("photos", "board", "angles", "portraits"):
        rows = made_examples(kind)
        pool = {label for e in rows if e.task == "classify" for label in parse_labels(truth_of(e))}
        for form in ("binary", "choice"):
            alone = [derive(e, form, pool if e.task == "classify" else None) for e in rows]
            together = derive_all(rows, form)
            for task in ("detection", "classify", "math"):
                old, new = (blind_accuracy([e for e in found if e.task == task]) for found in (alone, together))
                if new:
                    lines.append(f"| {kind} | {form} {task} | {old[0]:.0%} | {new[0]:.0%} | {new[1]:.0%} |")
    return "\n".join(lines)


def main(argv=None):
    """The command; returns its exit code, 2 with a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", help="data directory, as currreft.py's")
    parser.add_argument("--image_root", help="directory that image paths are relative to (default: --data)")
    parser.add_argument("--task", nargs="+", default=[], help="task of rows that name none, as currreft.py's")
    parser.add_argument("--seed", type=int, default=0, help="the run's --seed")
    parser.add_argument("--made", action="store_true", help="on made annotations instead: the table of docs/derived.md")
    args = parser.parse_args(argv)
    if bool(args.data) == args.made:
        parser.error("give --data DIR or --made")
    try:
        if args.made:
            print(made_table())
            return 0
        files = find_files(args.data)["train"]
        forms = training_forms(files, [form for form in FORMS if files[form] or files["open"]], args.seed,
                               task=args.task, image_root=args.image_root or args.data, skip_bad_rows=True)
        print("\n".join(blind_report([e for rows in forms.values() for e in rows])) or "too few questions to tell")
    except UserError as error:
        print(f"tools.blind: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
