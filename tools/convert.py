"""Annotations that people have -> rows that this project trains on (README, "Data"): open questions, one JSON a line.

    python -m tools.convert coco instances.json --image_root DIR/images --out DIR/train/open.jsonl --test_share 0.1
    python -m tools.convert refcoco finetune_refcoco_train.json --image_root DIR/images --out DIR/train/open.jsonl

coco: images, annotations, categories -> "Where is the dog?" with all its boxes (detection), "What objects are in the
image?" (classify), "How many ..?" (math). Every object of the categories must be annotated, or marked as a crowd.
refcoco: expressions with one box each -> "Where is the left dog?". A COCO-like JSON whose refs, annotations or images
carry the expressions (MDETR's files do), or a flat JSON list or JSONL.

Boxes stay in pixels of the original image, as data.load_examples reads them. An entry that cannot be right is a fault;
all are told with file and index, and with --skip_bad_rows each spoils its image, because what is left of the image's
annotations would not be the whole truth. What would make a poor question (a crowd, a tiny box) is left out and counted.
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from answers import parse_labels
from data import (Example, answer_of, check_text, check_truth, derive, inspect_image, model_size, resize_boxes_in,
                  resolve_image)
from distributed import UserError

IMAGES = ("file_name", "image", "img_name", "image_path")       # keys of an image's name, the first that is there
TEXTS = ("sent", "raw", "sentences", "sentence", "expressions", "expression", "normal_caption", "captions", "caption",
         "refs")                                                # keys of expressions, likewise
PICKLE = """is a pickle, which may run any code when it is read, so it is not. If you trust it, make JSON of it once:
python -c 'import json, pickle; d = json.load(open("instances.json"))
d["refs"] = pickle.load(open("refs(unc).p", "rb")); json.dump(d, open("refcoco.json", "w"))'"""


@dataclass(frozen=True)
class Candidate:
    """A question that may become a row; its image has not been looked at yet."""
    where: str                                          # "annotations[3]"
    image: str                                          # as the file names it
    size: tuple | None                                  # (width, height) in pixels, where the file says it
    task: str
    problem: str
    answer: object                                      # text, or boxes in original pixels
    kind: object                                        # kinds of rows are taken in turn


# ---- Reading ----

def read_json(path):
    """The value of a JSON file, or the list of a JSONL file's (None for a broken line); UserError for a pickle."""
    content = Path(path).read_bytes()
    if content[:1] == b"\x80" or Path(path).suffix in (".p", ".pkl", ".pickle"):
        raise UserError(f"{path} {PICKLE}")
    try:
        if Path(path).suffix == ".jsonl":
            return [parsed(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON in UTF-8: {error}.") from error


def parsed(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def known(entry, key, table=None):
    """entry[key], a number or text that `table` has, if one is given; else UserError."""
    if not isinstance(entry, dict):
        raise UserError("it is not a JSON object {..}.")
    if type(value := entry.get(key)) not in (int, str) or table is not None and value not in table:
        raise UserError(f"its {key} is {str(value)[:80]}, which is no {'id' if table is None else 'usable one'}.")
    return value


def by_id(value, name, faults):
    """{id: (where, entry)} of one of the file's lists. Of entries that share an id none is usable."""
    found, twice = {}, set()
    for n, entry in enumerate(value[name]):
        try:
            if (key := known(entry, "id")) in found:
                twice.add(key)
                raise UserError(f"its id {key} is that of {found[key][0]} too.")
            found[key] = f"{name}[{n}]", entry
        except UserError as error:
            faults.append(f"{name}[{n}]: {error}")
    return {key: pair for key, pair in found.items() if key not in twice}


def has_lists(value, *names):
    return isinstance(value, dict) and all(isinstance(value.get(name), list) for name in names)


def image_of(entry):
    """(name, (width, height) or None) in an entry that tells of an image."""
    name, size = next((entry[key] for key in IMAGES if entry.get(key)), None), (entry.get("width"), entry.get("height"))
    return name, size if set(map(type, size)) == {int} else None


def words(text):
    """A text on one line; UserError if it is none, or spells what the chat format or answers reserve."""
    if not isinstance(text, str) or not (text := " ".join(text.split())):
        raise UserError(f"{str(text)[:80]!r} is no text to ask for.")
    check_text(text)
    if found := re.search("</?(image|answer|think)>", text):
        raise UserError(f"the text holds {found[0]!r}, which questions and answers reserve; remove it.")
    return text


def corners(box, size, written="xywh"):
    """[x1, y1, x2, y2] of a box within an image of `size` (width, height), to 0.01 pixels; UserError if it is none.

    corners([10, 5, 20.5, 8], (40, 30)) -> [10, 5, 30.5, 13]. One pixel outside the image is rounding, and is clipped.
    """
    if not (isinstance(box, list) and len(box) == 4
            and all(type(n) in (int, float) and math.isfinite(n) and abs(n) < 1e6 for n in box)):
        raise UserError(f"its box {str(box)[:80]} is not four finite numbers.")
    x1, y1, x2, y2 = (*box[:2], box[0] + box[2], box[1] + box[3]) if written == "xywh" else box
    if x1 >= x2 or y1 >= y2 or min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise UserError(f"its box {box}, read as {written}, is empty or leaves the image of {size[0]} x {size[1]}.")
    inside = [round(min(max(n, 0), side), 2) for n, side in zip((x1, y1, x2, y2), size * 2)]
    return [int(n) if n == int(n) else n for n in inside]


# ---- COCO instances ----

def coco(value, args, faults, left_out):
    """Candidates of a COCO instances file."""
    if not has_lists(value, "images", "annotations", "categories"):
        raise UserError(f"{args.file} is no instances file: it needs the lists images, annotations and categories.")
    if any("neg_category_ids" in image for image in value["images"] if isinstance(image, dict)):
        raise UserError(f"{args.file} is an LVIS file, in which not all objects are annotated; nothing can be counted.")
    images, categories = by_id(value, "images", faults), by_id(value, "categories", faults)
    things, bad, seen = defaultdict(list), set(), {}    # things: image id -> [(name, box, crowd), ..]
    for n, entry in enumerate(value["annotations"]):
        try:
            key = known(entry, "image_id", images)
            if seen.setdefault(number := str(entry.get("id", f"[{n}]")), n) != n:
                raise UserError(f"its id {number} is that of annotations[{seen[number]}] too.")
            name = words(categories[known(entry, "category_id", categories)][1].get("name"))
            if not (size := image_of(images[key][1])[1]):
                raise UserError(f"its image, {images[key][0]}, has no width and height in whole pixels.")
            things[key].append((name, corners(entry.get("bbox"), size), bool(entry.get("iscrowd"))))
        except UserError as error:
            faults.append(f"annotations[{n}]: {error}")
            bad.add(str(entry.get("image_id") if isinstance(entry, dict) else None))
    for key in things:
        if str(key) not in bad:
            yield from questions(images[key][0], *image_of(images[key][1]), things[key], args, left_out)


def questions(where, image, size, things, args, left_out):
    """Candidates of one image; things: [(name, box, crowd), ..]."""
    boxes, tiny, crowds = defaultdict(list), Counter(), {name for name, _, crowd in things if crowd}
    for name, box, crowd in things:
        boxes[name] += [] if crowd else [box]
        tiny[name] += not crowd and (box[2] - box[0]) * (box[3] - box[1]) < args.min_share * size[0] * size[1]
    for name in sorted(boxes):
        n = len(boxes[name])
        if name in crowds or tiny[name]:
            left_out["a crowd" if name in crowds else "tiny boxes"] += 1
            continue
        if n <= args.max_boxes:
            problem = f"Where is {'the' if n == 1 else 'every'} {name}?"
            yield Candidate(where, image, size, "detection", problem, boxes[name], name)
        if n <= args.max_count:
            problem = f'How many objects of the kind "{name}" are in the image?'
            yield Candidate(where, image, size, "math", problem, str(n), n)
        left_out["more than --max_boxes or --max_count"] += n > min(args.max_boxes, args.max_count)
    if any(parse_labels(name) != [name] for name in boxes) or any(tiny[name] == len(boxes[name]) > 0 for name in boxes):
        left_out["labels of tiny boxes alone, or with commas or brackets"] += 1
    else:
        yield Candidate(where, image, size, "classify", "What objects are in the image?", ", ".join(sorted(boxes)), "")


# ---- Referring expressions ----

def refcoco(value, args, faults, left_out):
    """Candidates of referring expressions. One that an image has for two boxes is left out."""
    found, meant, splits = [], defaultdict(set), set()
    for where, entry, image in referred(value, args, faults):
        splits.add(str(entry.get("split")))
        if args.split and entry.get("split") != args.split:
            continue
        try:
            (name, size), box = image_of(image), entry.get("bbox", entry.get("solution"))
            texts = [words(text).rstrip(" .?!") for text in texts_in(entry) or texts_in(image) or [""]]
            for text in dict.fromkeys(texts):
                found.append(Candidate(where, name, size, "detection", f"Where is {text}?", [box], str(name)))
                meant[str(name), found[-1].problem.lower()].add(str(box))
        except UserError as error:
            faults.append(f"{where}: {error}")
    if len(splits) > 1 and not args.split:
        raise UserError(f"{args.file} holds the splits {', '.join(sorted(splits))}; choose one with --split.")
    for candidate in found:
        if len(meant[candidate.kind, candidate.problem.lower()]) == 1:
            yield candidate
        else:
            left_out["an expression for two boxes"] += 1


def referred(value, args, faults):
    """(where, entry that has the box, entry that names the image) of everything that is referred to."""
    if isinstance(value, list):
        rows, name, value = [(entry, None) for entry in value], "", None
    elif has_lists(value, "images", "annotations"):
        name = "refs" if has_lists(value, "refs") else "annotations"
        images, boxes = by_id(value, "images", faults), by_id(value, "annotations", faults) if name == "refs" else None
        shared = Counter(str(entry.get("image_id")) for entry in value[name] if isinstance(entry, dict))
        rows = [(entry, images) for entry in value[name]]
    else:
        raise UserError(f"{args.file} is neither a list of expressions nor an object with images and annotations.")
    for n, (entry, images) in enumerate(rows):
        try:
            if images is None:
                image = entry if isinstance(entry, dict) else known(entry, "image")
            else:
                image = images[key := known(entry, "image_id", images)][1]
                entry = {**boxes[known(entry, "ann_id", boxes)][1], **entry} if name == "refs" else entry
                if shared[str(key)] > 1 and not texts_in(entry):
                    raise UserError(f"its image, {images[key][0]}, has one caption for {shared[str(key)]} boxes.")
            yield f"{name}[{n}]", entry, image
        except UserError as error:
            faults.append(f"{name}[{n}]: {error}")


def texts_in(value):
    """All expressions in a text, in a list, or in an object under the first of TEXTS that it has."""
    if isinstance(value, dict):
        return next((texts_in(value[key]) for key in TEXTS if value.get(key)), [])
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else [value]


# ---- Choosing and writing ----

def choose(candidates, args, faults, left_out):
    """{split: rows}: of each task up to --per_task usable candidates, kinds in turn, every image in one split."""
    chosen, count, inspect = {"train": [], "test": []}, Counter(), lru_cache(None)(inspect_image)
    room = {"train": args.per_task * (1 - args.test_share), "test": args.per_task * args.test_share}
    pool = {label for c in candidates if c.task == "classify" for label in parse_labels(c.answer)}
    for c in in_turn(candidates, args.seed):
        test = random.Random(f"{args.seed}/{Path(str(c.image)).name}").random() < args.test_share
        split = "test" if test else "train"
        if args.per_task and count[split, c.task] >= round(room[split]):
            continue
        try:
            row, example = usable(c, args, inspect)
        except UserError as error:
            faults.append(f"{c.where}: {error}")
            continue
        try:
            for form in ("binary", "choice"):
                derive(example, form, pool=pool if c.task == "classify" else None)
        except UserError:
            left_out["no wrong answer can be made"] += 1
            continue
        chosen[split].append(row)
        count[split, c.task] += 1
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
        answer = json.dumps([{"bbox_2d": corners(box, size, args.boxes)} for box in answer])
    example = Example(problem=candidate.problem, solution=f"<answer>{answer}</answer>", task=candidate.task,
                      images=(path,), size=model_size(size), where=candidate.where)
    check_truth(example, size)
    row = {"image": Path(path).relative_to(os.path.abspath(args.image_root)).as_posix(), "task": candidate.task,
           "problem": candidate.problem, "solution": example.solution}
    return row, replace(example, solution=resize_boxes_in(example.solution, size, example.size))


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
    candidates = list(args.read(read_json(args.file), args, faults, left_out))
    chosen = choose(candidates, args, faults, left_out)
    faults = list(dict.fromkeys(faults))                # an image's fault is met once for each of its questions
    told = [*faults[:20], *([f".. and {len(faults) - 20} more."] if len(faults) > 20 else [])]
    if faults and not args.skip_bad_rows:
        raise UserError("\n".join([f"{args.file}: {len(faults)} entries cannot be used.", *told,
                                   "Correct them, or drop what they spoil with --skip_bad_rows."]))
    print("".join(f"left out: {n} x {reason}\n" for reason, n in left_out.most_common() if n), end="")
    if empty := [split for split in paths if not chosen[split]]:
        raise UserError("\n".join([f"{args.file} gives no {empty[0]} rows.", *told]))
    if faults:
        print(f"dropped {len(faults)} bad entries and what they spoil, the first {faults[0]}", file=sys.stderr)
    asides = {path.with_name(f".writing-{path.name}"): path for path in paths.values()}
    for aside, split in zip(asides, paths):             # both are written before either appears
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(json.dumps(row) + "\n" for row in chosen[split]))
    for aside, path in asides.items():
        aside.rename(path)
        tasks = Counter(row["task"] for row in chosen["train" if path == paths["train"] else "test"])
        print(f"{path}: " + ", ".join(f"{n} {task}" for task, n in sorted(tasks.items())))
    print(f"to look at it: python pictures.py examples {shlex.quote(args.out)} "
          f"--image_root {shlex.quote(args.image_root)}")


def share(text):
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return value


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("coco", help="instances JSON -> detection, classify and math rows", allow_abbrev=False)
    one.add_argument("--max_boxes", type=int, default=4, help="boxes in one answer at most [4]")
    one.add_argument("--max_count", type=int, default=10, help="objects in one count at most [10]")
    one.add_argument("--min_share", type=share, default=0.005, help="share of the image that is no tiny box [0.005]")
    one.set_defaults(read=coco, boxes="xyxy")           # its boxes are checked and corners before an image is opened
    two = commands.add_parser("refcoco", help="referring expressions -> detection rows", allow_abbrev=False)
    two.add_argument("--boxes", choices=("xywh", "xyxy"), default="xywh", help="corner and size, or two corners [xywh]")
    two.add_argument("--split", default="", help='only entries whose "split" is this')
    two.set_defaults(read=refcoco)
    for command in (one, two):
        command.add_argument("file", metavar="FILE", help="JSON (refcoco: or JSONL)")
        command.add_argument("--image_root", required=True, help="folder that the images' names start from")
        command.add_argument("--out", required=True, help="JSONL to write, such as DIR/train/open.jsonl")
        command.add_argument("--per_task", type=int, default=3000, help="rows a task at most; 0: no limit [3000]")
        command.add_argument("--test_share", type=share, default=0.0, help="share of the images that goes to test/ [0]")
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
    main()
