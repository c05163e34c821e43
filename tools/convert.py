"""Annotations that people have -> rows that this project trains on (docs/data.md): open questions, one JSON a line.

    python -m tools.convert coco instances.json --image_root DIR/images --out DIR/train/open.jsonl --test_share 0.1
    python -m tools.convert yolo labels/train --names data.yaml --image_root images/train --out DIR/train/open.jsonl
    python -m tools.convert voc VOC2007/Annotations --image_root VOC2007/JPEGImages --out DIR/test/voc.jsonl
    python -m tools.convert refcoco finetune_refcoco_train.json --image_root DIR/images --out DIR/train/open.jsonl
    python -m tools.convert rows FILE --boxes thousandths --image_root DIR/images --out DIR/train/open.jsonl

coco, yolo, voc: "Where is the dog?" with all its boxes (detection), "What objects are in the image?" (classify), "How
many ..?" (math). Every object of the categories must be annotated, or marked as a crowd or difficult.
refcoco: expressions with their boxes -> "Where is the left dog?". A COCO-like JSON whose refs, annotations or images
carry the expressions (MDETR's files do), or a flat JSON list or JSONL.
rows: questions as training reads them, but with boxes in another convention, which are written in pixels.

Boxes stay in pixels of the original image, as data.load_examples reads them. An entry that cannot be right is a fault;
all are told with file and index, and with --skip_bad_rows each spoils its image, because what is left of the image's
annotations would not be the whole truth. What would make a poor question (a crowd, a tiny box) is left out and counted.
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from pathlib import Path

from data import answer_of, checked
from forms import derive
from rewards import TASKS, Example, task_of
from support.answers import BOX, parse_labels
from support.images import inspect_image, resolve_image
from support.rows import bare, declared_tasks, one_row, read_rows
from support.warnings import family
from support.words import UserError, terminal
from tools.annotations import CONVENTIONS, coco, corners, read_json, refcoco, voc, yolo

# ---- Choosing and writing ----

def choose(candidates, args, faults, left_out):
    """{split: rows}: of each task up to --per_task usable candidates, kinds in turn, a photo's versions together."""
    chosen, bad, count, inspect = {"train": [], "test": []}, [], Counter(), functools.lru_cache(None)(inspect_image)
    room = {"train": args.per_task * (1 - args.test_share), "test": args.per_task * args.test_share}
    pool = {label for c in candidates if c.task == "classify" for label in parse_labels(c.answer)}
    for c in in_turn(candidates, args.seed):
        test = random.Random(f"{args.seed}/{family(Path(str(c.image)).name)}").random() < args.test_share
        split = "test" if test else "train"
        if args.per_task and count[split, c.task] >= round(room[split]):
            continue
        try:
            row, example = usable(c, args, inspect)
        except UserError as error:
            bad.append(f"{c.where}: {error}")
            continue
        try:
            for form in ("binary", "choice"):
                derive(example, form, pool=pool if c.task == "classify" else None)
        except UserError:
            left_out[f"{c.task} without a possible wrong answer" + " (it needs a label that is absent)" * (
                c.task == "classify")] += 1
            continue
        chosen[split].append(row)
        count[split, c.task] += 1
    faults += sorted(bad, key=in_order)
    return {split: with_absent_labels(rows, left_out) for split, rows in chosen.items()}


def in_turn(candidates, seed):
    """Shuffled, then one of each (task, kind) in turn, so that no frequent class or count fills the file."""
    turns = defaultdict(itertools.count)
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    return sorted(shuffled, key=lambda candidate: next(turns[candidate.task, candidate.kind]))


def usable(candidate, args, inspect):
    """(row, the Example that it will be read as); UserError if image, boxes or text cannot be used."""
    path = resolve_image(candidate.image, args.image_root)
    size, answer = inspect(path), candidate.answer
    if candidate.size not in (None, size):
        raise UserError(f"its image {candidate.image} is upright {size[0]} x {size[1]} pixels, but annotated as "
                        f"{candidate.size[0]} x {candidate.size[1]}.")
    if candidate.task == "detection":
        boxes = [{"bbox_2d": corners(box, size, args.boxes)} for box in answer]
        answer = json.dumps(boxes) if boxes else "no objects"
    row = {"image": named(path, args), "task": candidate.task, "problem": candidate.problem,
           "solution": f"<answer>{answer}</answer>"}
    example = Example(problem=row["problem"], solution=row["solution"], task=row["task"], images=(path,))
    return row, checked(example, {path: size})


def named(path, args):
    """An image's path as rows name it: from --image_root on."""
    return Path(path).relative_to(os.path.abspath(args.image_root)).as_posix()


def with_absent_labels(rows, left_out):
    """The rows but for images that show every label of the file: no absent one could be offered for them."""
    shown = [set(parse_labels(answer_of(row["solution"]).lower())) if row["task"] == "classify" else {""}
             for row in rows]
    pool = set().union(*shown) - {""}
    if pool not in shown:
        return rows
    left_out["every label is there"] += shown.count(pool)
    return with_absent_labels([row for row, labels in zip(rows, shown) if labels != pool], left_out)


def outputs(args):
    """{"train": --out, and with --test_share "test": its twin under test/}; UserError if one exists already."""
    paths, parts = {"train": Path(args.out)}, list(Path(args.out).parts)
    if args.test_share:
        if "train" not in parts[:-1]:
            raise UserError(f"--out {args.out}: with --test_share it must lie in a folder train, for a twin in test.")
        parts[len(parts) - 1 - parts[::-1].index("train")] = "test"
        paths["test"] = Path(*parts)
    if found := [str(path) for path in paths.values() if path.exists() and not args.force]:
        raise UserError(f"{' and '.join(found)} exists already; name another --out, or replace it with --force.")
    return paths


def convert(args):
    """The whole conversion; prints what was written, what was left out and how to look at it."""
    faults, left_out, paths = [], Counter(), outputs(args)
    chosen = args.read(args, faults, left_out)
    faults = list(dict.fromkeys(faults))                # an image's fault is met once for each of its questions
    told = [*faults[:20], *([f".. and {len(faults) - 20} more."] if len(faults) > 20 else [])]
    if faults and not args.skip_bad_rows:
        raise UserError("\n".join([f"{args.file}: {len(faults)} entries cannot be used.", *told,
                                   "Correct them, or drop what they spoil with --skip_bad_rows."]))
    print("".join(f"left out: {n} x {reason}\n" for reason, n in left_out.most_common() if n), end="")
    if empty := [split for split in paths if not chosen[split]]:
        raise UserError("\n".join([f"{args.file} gives no {empty[0]} rows. --min_share, --max_boxes, --max_count, "
                                   "--split, --list and --test_share say what is taken.", *told]))
    if faults:
        print(f"dropped {len(faults)} bad entries and what they spoil, the first {faults[0]}", file=sys.stderr)
    write({paths[split]: chosen[split] for split in paths})
    print(f"to look at it: python -m tools.pictures examples {shlex.quote(args.out)} "
          f"--image_root {shlex.quote(args.image_root)}")


def in_order(fault):
    """Sorts "a[10]: .." behind "a[9]: ..": faults are met in the shuffled order of questions."""
    return [(len(word), word) if word.isdigit() else (0, word) for word in re.split("([0-9]+)", fault)]


def write(files):
    """Write rows as JSON lines and say how many of each task; all files are written before any appears."""
    asides = {path.with_name(f".writing-{path.name}"): path for path in files}
    for aside, path in asides.items():
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in files[path]), "utf-8")
    for aside, path in asides.items():
        aside.rename(path)
        tasks = Counter(row["task"] for row in files[path])
        print(f"{path}: " + ", ".join(f"{n} {task}" for task, n in sorted(tasks.items())))


# ---- Rows in another convention ----

def rows(args, faults, left_out):
    """{split: rows} of a file of questions, their boxes in pixels; all versions of a photo in one split."""
    chosen, tasks = {"train": [], "test": []}, declared_tasks(args.task)
    for where, value in read_rows(args.file):
        try:
            row = in_pixels(value, Path(where.rpartition(":")[0]), tasks, args)
        except UserError as error:
            faults.append(f"{where}: {error}")
            continue
        photo = family(Path(row["images"][0]).name) if row["images"] else row["problem"]
        test = random.Random(f"{args.seed}/{photo}").random() < args.test_share
        chosen["test" if test else "train"].append(row)
    return chosen


def in_pixels(value, file, tasks, args):
    """A row of any shape as a row that names its task, with every box of a detection row in original pixels."""
    row = one_row(value)
    task = task_of(row, file, tasks)
    if task not in TASKS:
        raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it for rows without.')
    paths = [resolve_image(name, args.image_root) for name in row["images"]]
    texts = [row["problem"], row["solution"] if task == "general" else bare(row["solution"])]
    if TASKS[task].boxes:
        if len(paths) != 1:
            raise UserError(f"a row with boxes needs one image, and has {len(paths)}.")
        size = inspect_image(paths[0])
        texts = [BOX.sub(lambda m: f"{m[1] or ''}{corners([float(n) for n in m.groups()[1:]], size, args.boxes)}", text)
                 for text in texts]
    found = {"images": [named(path, args) for path in paths], "task": task, "problem": texts[0], "solution": texts[1]}
    if row["history"]:
        turns = [*row["history"], ("user", found.pop("problem"))]
        found["messages"] = [{"role": role, "content": text} for role, text in turns]
    return found | ({"form": row["form"]} if row["form"] else {})


# ---- Command line ----

def share(text):
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return value


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    add = functools.partial(commands.add_parser, allow_abbrev=False)
    one, two, three = (add(name, help=f"{what} -> detection, classify and math rows") for name, what in (
        ("coco", "instances JSON"), ("yolo", "a folder of label files"), ("voc", "a folder of Pascal VOC's XML")))
    four, five = add("refcoco", help="referring expressions -> detection rows"), add("rows", help="boxes to pixels")
    for command, read in ((one, lambda args, *told: coco(read_json(args.file), args, *told)),
                          (two, lambda args, faults, left_out: coco(yolo(args, faults), args, faults, left_out)),
                          (three, lambda args, faults, left_out: coco(voc(args, faults), args, faults, left_out))):
        command.add_argument("--max_boxes", type=int, default=4, help="boxes in one answer at most [4]")
        command.add_argument("--max_count", type=int, default=10, help="objects in one count at most [10]")
        command.add_argument("--min_share", type=share, default=0.005, help="boxes of a smaller share are tiny [0.005]")
        command.set_defaults(candidates=read, boxes="xyxy")     # checked and made corners before an image is opened
    for command in (two, three):
        command.add_argument("--list", default="", help="text that names the annotation files to take, such as val.txt")
    two.add_argument("--names", required=True, help="data.yaml, or a text of one class a line")
    three.set_defaults(names="")
    four.add_argument("--split", default="", help='only entries whose "split" is this')
    four.set_defaults(candidates=lambda args, *told: refcoco(read_json(args.file), args, *told))
    five.add_argument("--task", default="", help="of rows that name none: TASK, or NAME=TASK by file")
    for command in (four, five):
        command.add_argument("--boxes", choices=CONVENTIONS, required=command is five, help="two corners, corner and "
                             "size, or two corners as shares or thousandths of the image")
    for command in (one, two, three, four):
        command.add_argument("--per_task", type=int, default=3000, help="rows a task at most; 0: no limit [3000]")
        command.set_defaults(read=lambda args, *told: choose(list(args.candidates(args, *told)), args, *told))
    five.set_defaults(read=rows)
    for command in (one, two, three, four, five):
        command.add_argument("file", metavar="FILE", help="JSON or JSONL; yolo, voc: a folder")
        command.add_argument("--image_root", required=True, help="folder that the images' names start from")
        command.add_argument("--out", required=True, help="JSONL to write, such as DIR/train/open.jsonl")
        command.add_argument("--test_share", type=share, default=0.0, help="share of the photos that goes to test/ [0]")
        command.add_argument("--seed", type=int, default=0, help="of what is chosen and what goes to test/")
        command.add_argument("--skip_bad_rows", action="store_true", help="drop and count what cannot be used")
        command.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (UserError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    with terminal():
        main()
