"""Annotations that people have -> open questions for this project, one JSON a line (docs/data.md).

    python -m tools.convert coco instances.json --image_root DIR/images --out DIR/train/open.jsonl
    python -m tools.convert yolo labels --names data.yaml --image_root DIR/images --out OUT
    python -m tools.convert voc VOC2007/Annotations --image_root VOC2007/JPEGImages --out OUT
    python -m tools.convert refcoco FILE --boxes xyxy --image_root DIR/images --out OUT
    python -m tools.convert rows FILE --boxes thousandths --image_root DIR/images --out OUT
    python -m tools.convert parquet FILE.parquet --image_root DIR/images --out OUT

coco, yolo, voc: "Where is the dog?", "How many ..?", "What objects are in the image?"; so every
object must be annotated, or be a crowd. refcoco: "Where is the left dog?" rows: their boxes anew.

A format is a reader that yields (where in the file, entry, read): the entry names its image, and
read(entry) is [(label or expression, its boxes as the file writes them, a crowd?), ..]. The rest is
one path: `photos` holds that against the images, `objects` or `expressions` asks, `choose` picks
and splits. What cannot be right spoils its photo; nothing is written before all is known.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import yaml

from data import check_text
from rewards import TASKS
from support.answers import BOX, parse_labels
from support.files import write_aside
from support.images import ENDINGS, image_sizes, inspect_image, opened, resolve_image
from support.rows import attempt, declared_tasks, first, one_row, read_rows, row_task
from support.warnings import family
from support.words import UserError, command, say

CONVENTIONS = ("xyxy", "xywh", "fractions", "thousandths")  # corners, corner and size, shares
ASKED, COUNTED, TINY = 4, 10, 0.005  # boxes and objects in an answer at most; share of the image
NAME_KEYS = ("file_name", "image", "img_name", "image_path", "img_path", "filename")
BOX_KEYS = ("bbox", "box", "boxes", "bboxes", "solution")
TEXT_KEYS = ("sentences", "sentence", "expressions", "expression", "normal_caption", "caption")
MISFIT = "is empty or leaves the image"
MALFORMED = (AttributeError, LookupError, TypeError, ValueError, RecursionError, yaml.YAMLError,
             ElementTree.ParseError)


# ---- Readers ----

def coco(args):
    """Objects of an instances file."""
    value = json.loads(Path(args.file).read_bytes())
    categories = by_id(value, "categories")

    def read(entry):
        label = categories[entry["category_id"]]["name"]
        return [(label, [entry["bbox"]], bool(entry.get("iscrowd")))]

    return ((*found, read) for found in joined(value, "annotations"))


def refcoco(args):
    """Expressions: RefCOCO's own refs beside annotations, MDETR's captions of images, or a list."""
    value = args.file.endswith(".jsonl") or json.loads(Path(args.file).read_bytes())
    if isinstance(value, dict):
        args.boxes = args.boxes or "xywh"
        found = joined(value, "refs" if "refs" in value else "annotations")
    elif args.boxes:
        found = read_rows(args.file)
    else:
        raise UserError(f"{args.file} does not say how its boxes are written; say it with --boxes "
                        f"{'|'.join(CONVENTIONS)} (VLM-R1's lists: xyxy).")
    splits = {str(entry.get("split")) for _, entry in found if isinstance(entry, dict)}
    if len(splits) > 1 and not args.split:
        raise UserError(f"--split must choose one of {', '.join(sorted(splits))}.")

    def read(entry):
        boxes, texts = (next((entry[key] for key in keys if entry.get(key)), [None])
                        for keys in (BOX_KEYS, TEXT_KEYS))
        boxes = boxes if isinstance(boxes[0], list) else [boxes]
        return [(text["sent"] if isinstance(text, dict) else text, boxes, False)
                for text in (texts if isinstance(texts, list) else [texts])]

    for where, entry in found:
        if not isinstance(entry, dict) or args.split in (None, entry.get("split")):
            yield where, entry, read


def yolo(args):
    """Objects of files of lines: class, center and size as shares of the image, or a polygon."""
    names = yaml.safe_load(Path(args.names).read_text("utf-8-sig"))["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names

    def thing(category, *numbers):
        numbers = list(map(float, numbers))
        if len(numbers) == 4:
            x, y, w, h = numbers
            numbers = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        elif len(numbers) < 6 or len(numbers) % 2:
            raise ValueError("neither class, x, y, width, height nor class and polygon")
        xs, ys = numbers[::2], numbers[1::2]
        return str(names[int(category)]), [[min(xs), min(ys), max(xs), max(ys)]], False

    return named_alike(args, ".txt", lambda entry: [
        thing(*line.split()) for line in entry["path"].read_text().splitlines() if line.strip()])


def voc(args):
    """Objects of XML files, whose pixels count from 1, both ends included; difficult: a crowd."""
    def thing(node):
        x1, y1, x2, y2 = (float(node.find("bndbox").findtext(key))
                          for key in ("xmin", "ymin", "xmax", "ymax"))
        return node.findtext("name"), [[x1 - 1, y1 - 1, x2, y2]], node.findtext("difficult") == "1"

    return named_alike(args, ".xml", lambda entry: [
        thing(node) for node in ElementTree.parse(entry["path"]).iter("object")])


def named_alike(args, ending, read):
    """Of --image_root/a/1.jpg the file FILE/a/1.txt (or .xml), by --list those that it names."""
    root, lines = Path(args.image_root), Path(args.list).read_text() if args.list else ""
    wanted = {Path(line.split()[0]).stem for line in lines.splitlines() if line.strip()}
    for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in ENDINGS):
        image = path.relative_to(root)
        file = Path(args.file, image).with_suffix(ending)
        if file.exists() and (not args.list or file.stem in wanted):
            yield file, {"file_name": image.as_posix(), "path": file}, read


def by_id(value, name):
    """{id: entry} of one of the lists of a COCO-like file."""
    found = {entry["id"]: entry for entry in value[name]}
    if len(found) < len(value[name]):
        raise UserError(f"{len(value[name]) - len(found)} of {name} have the id of another.")
    return found


def joined(value, name):
    """[(where, entry, with what its annotation and its image say)] of a COCO-like file."""
    images, things = by_id(value, "images"), by_id(value, "annotations")
    return [(f"{name}[{n}]", entry | things.get(entry.get("ann_id"), {})
             | images.get(entry["image_id"], {})) for n, entry in enumerate(value[name])]


# ---- Things in pixels of their photos ----

def photos(args, faults):
    """[(image, size, [(text, boxes in pixels, a crowd?), ..]), ..] of images without a fault."""
    try:
        parts, told, found = list(args.reader(args)), {}, {}
    except MALFORMED as error:
        raise UserError(f"{args.file} is not as its format has it: {error!r:.99}. A pickle is not "
                        "read, as it may run any code; docs/data.md makes JSON of it.") from error
    names = [next((str(entry[key]) for key in NAME_KEYS if isinstance(entry, dict)
                   and entry.get(key)), f"of {where}") for where, entry, _ in parts]
    paths = {name: attempt(resolve_image, name, args.image_root) for name in {*names}}
    sizes = image_sizes(path for path in paths.values() if isinstance(path, str))
    for name, (where, entry, read) in zip(names, parts):
        path = paths[name]
        things = attempt(in_pixels, entry, read, path, sizes.get(path), args.boxes)
        if isinstance(things, UserError):
            told.setdefault((name, str(things)), where)  # once, if it is the image's own
        else:
            image = os.path.relpath(path, args.image_root)
            found.setdefault(name, (image, sizes[path], []))[2].extend(things)
    faults += [f"{where}: {error}" for (_, error), where in told.items()]
    spoiled = {name for name, _ in told}
    return [photo for name, photo in found.items() if name not in spoiled]


def in_pixels(entry, read, path, size, written):
    """The things of an entry, their boxes in pixels of the image at `path`, else a UserError."""
    try:
        things, noted = read(entry), (entry.get("width"), entry.get("height"))
    except MALFORMED as error:
        raise UserError(f"it is not as its format has it ({error!r:.99}).") from error
    if isinstance(path, UserError) or isinstance(size, str):
        raise UserError(path if size is None else size)
    if None not in noted and noted != size:
        raise UserError(f"its image {path} is upright {size[0]} x {size[1]} pixels, but annotated "
                        f"as {noted[0]} x {noted[1]}.")
    for text, *_ in things:
        if not isinstance(text, str) or re.search(r"^\s*$|</?(image|answer|think)>", text):
            raise UserError(f"{str(text)[:80]!r} is no text to ask for: empty, or with a tag.")
        check_text(text)
    return [(" ".join(text.split()), [corners(box, size, written) for box in boxes], crowd)
            for text, boxes, crowd in things]


def corners(box, size, written):
    """[x1, y1, x2, y2] within an image of `size` (width, height), to 0.01 pixels; else UserError.

    corners([10, 5, 20.5, 8], (40, 30), "xywh") -> [10, 5, 30.5, 13]; of [500, 0, 1000, 100] in
    "thousandths": [20, 0, 40, 3]. One pixel outside the image is rounding, and is clipped.
    """
    if not (isinstance(box, list) and len(box) == 4
            and all(type(n) in (int, float) and abs(n) < 1e6 for n in box)):
        raise UserError(f"its box {str(box)[:80]} is not four finite numbers.")
    sides, scale = (*size, *size), {"fractions": 1, "thousandths": 1000}.get(written)
    x1, y1, x2, y2 = [n * side / scale for n, side in zip(box, sides)] if scale else box
    x2, y2 = (x1 + x2, y1 + y2) if written == "xywh" else (x2, y2)
    if x1 >= x2 or y1 >= y2 or min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise UserError(f"its box {box}, read as {written}, {MISFIT} of {size[0]} x {size[1]}; "
                        "coco, refcoco and rows take --boxes, which says how boxes are written.")
    inside = [round(min(max(n, 0), side), 2) for n, side in zip((x1, y1, x2, y2), sides)]
    return [int(n) if n == int(n) else n for n in inside]


# ---- Photos -> [(row, its images, its sort)]; sorts of a task's rows are taken in turn ----

def objects(args, faults, left_out):
    """Where, how many, which? Images that show every label of the file are not asked which."""
    asked, shown = [], {}
    for image, (width, height), things in photos(args, faults):
        boxes, seen, unsure = defaultdict(list), set(), set()
        for label, found, crowd in things:
            areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in found]
            tiny = not crowd and min(areas) < TINY * width * height
            boxes[label] += found
            seen |= set() if tiny else {label}
            unsure |= {label} if tiny or crowd else set()
        for label in sorted(boxes.keys() - unsure):
            n = len(boxes[label])
            if n <= ASKED:
                where = f"Where is {'the' if n == 1 else 'every'} {label}?"
                asked.append(question(image, "detection", where, boxes[label], label))
            if n <= COUNTED:
                many = f'How many objects of the kind "{label}" are in the image?'
                asked.append(question(image, "math", many, n, n))
        left_out["a crowd or a tiny box"] += len(unsure)
        if boxes and seen == boxes.keys() and all(parse_labels(label) == [label] for label in boxes):
            shown[image] = frozenset(boxes)
    while (every := frozenset().union(*shown.values())) in shown.values():
        left_out["every label is there"] += 1
        shown = {image: labels for image, labels in shown.items() if labels != every}
    return asked + [question(image, "classify", "What objects are in the image?",
                             ", ".join(sorted(labels)), labels) for image, labels in shown.items()]


def expressions(args, faults, left_out):
    """Where is what an expression refers to? One that an image has for different boxes: no."""
    asked = []
    for image, _, things in photos(args, faults):
        meant = defaultdict(dict)
        for text, boxes, _ in things:
            text = text.rstrip(" .?!")
            meant[text.lower()][str(boxes)] = text, boxes
        for found in meant.values():
            left_out["an expression for different boxes"] += len(found) > 1
            asked += [question(image, "detection", f"Where is {text}?", boxes, image)
                      for text, boxes in found.values() if len(found) == 1]
    return asked


def question(image, task, problem, answer, sort):
    """One entry of the list; an answer of boxes as JSON."""
    if task == "detection":
        answer = json.dumps([{"bbox_2d": box} for box in answer])
    solution = f"<answer>{answer}</answer>"
    return {"image": image, "task": task, "problem": problem, "solution": solution}, [image], sort


# ---- Rows -> the same ----

def rows(args, faults, left_out):
    """Rows of a file, each in its own shape, their boxes or pictures as training reads them."""
    look = in_corners if args.boxes else with_names
    found = [(where, attempt(look, row, where, args)) for where, row in args.reader(args.file)]
    faults += [f"{where}: {row}" for where, row in found if isinstance(row, UserError)]
    return [(*row, None) for _, row in found if not isinstance(row, UserError)]


def in_corners(row, where, args):
    """(the row with its task, each list of four numbers in it as a box in pixels; its images)."""
    read = one_row(row)
    task = row_task(read, Path(where.rpartition(":")[0]), declared_tasks(args.task, TASKS))
    if task not in TASKS:
        raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it.')
    paths = [resolve_image(name, args.image_root) for name in read["images"]]
    if TASKS[task].resize:
        if len(paths) != 1:
            raise UserError(f"a row with boxes needs one image, and has {len(paths)}.")
        size = inspect_image(paths[0])
        row = json.loads(BOX.sub(lambda match: (match[1] or "") + str(
            corners([float(n) for n in match.groups()[1:]], size, args.boxes)), json.dumps(row)))
    return row | {"task": task}, read["images"]


def parquet_rows(path):
    """("file:row", row) of a parquet file, by the user's own pyarrow."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError("parquet files need pyarrow, so: pip install pyarrow") from error
    try:
        batches = (batch.to_pylist() for batch in ParquetFile(path).iter_batches(16))
        for n, row in enumerate(itertools.chain.from_iterable(batches), 1):
            yield f"{path}:{n}", row
    except ValueError as error:  # which ArrowInvalid is
        raise UserError(f"{path} cannot be read as parquet ({str(error)[:200]}).") from error


def with_names(row, where, args, write=False):
    """(the row with names in place of pictures, its images); only with `write` they are saved."""
    def name_of(value):
        if not isinstance(value, bytes):
            return str(value)
        with opened(BytesIO(value), "in it") as image:  # the same picture, the same name
            name = f"{hashlib.sha256(value).hexdigest()[:20]}.{image.format.lower()}"
        if write:
            Path(args.image_root, name).write_bytes(value)
        return name
    row = json.loads(json.dumps(row, default=name_of), object_hook=lambda value: (
        value["bytes"] or value["path"] if {*value} == {"bytes", "path"} else value))
    return row, re.findall(rf'"([^"]+(?:{"|".join(ENDINGS)}))"', json.dumps(row), re.IGNORECASE)


# ---- Choosing and writing ----

def choose(questions, args, left_out):
    """{side: rows}: sides by photo; of each task up to --per_task rows, its sorts in turn."""
    def side_of(image):  # of all versions of a photo, whatever file names it
        number = random.Random(f"{args.seed}/{family(Path(image).name)}").random()
        return "test" if number < args.test_share else "train"

    chosen, count, turns = defaultdict(list), Counter(), defaultdict(itertools.count)
    room = {"train": args.per_task * (1 - args.test_share), "test": args.per_task * args.test_share}
    if args.per_task:
        shuffled = random.Random(args.seed).sample(questions, len(questions))
        questions = sorted(shuffled, key=lambda asked: next(turns[asked[0]["task"], asked[2]]))
    for row, images, _ in questions:
        side, *others = set(map(side_of, images or [json.dumps(row)]))
        if others:
            left_out["photos of train and test in one row"] += 1
        elif not args.per_task or count[side, row["task"]] < round(room[side]):
            chosen[side].append(row)
            count[side, row.get("task")] += 1
    return chosen


def outputs(args):
    """{"train": --out, and with --test_share "test": the file of its name in the folder test}."""
    paths = {"train": (out := Path(args.out))}
    if args.test_share:
        paths["test"] = out.parent.parent / "test" / out.name
        if out.parent.name != "train":
            raise UserError(f"--out {out} must lie in a folder train: --test_share makes its twin.")
    if found := [path for path in paths.values() if path.exists() and not args.force]:
        raise UserError(f"{found[0]} exists already; take another --out, or replace it: --force.")
    return paths


def convert(args):
    """The whole conversion; prints what was written, what was left out and how to look at it."""
    faults, left_out, paths = [], Counter(), outputs(args)
    questions = args.questions(args, faults, left_out)
    misfits = sum(MISFIT in fault for fault in faults)  # so many: boxes are written otherwise
    if faults and (misfits > 0.1 * len(questions) or not args.skip_bad_rows):
        raise UserError("\n".join([
            f"{args.file}: {len(faults)} entries cannot be used.", *first(faults), "Correct them, "
            "say how boxes are written with --boxes, or drop bad rows with --skip_bad_rows."]))
    chosen = choose(questions, args, left_out)
    print("".join(f"left out: {n} x {why}\n" for why, n in left_out.most_common() if n), end="")
    if faults:
        say(f"dropped {len(faults)} bad entries and what they spoil, the first {faults[0]}")
    if empty := [side for side in paths if not chosen[side]]:
        raise UserError(f"{args.file} gives no {empty[0]} rows with images of {args.image_root}.")
    if args.reader is parquet_rows:
        os.makedirs(args.image_root, exist_ok=True)
        for where, row in parquet_rows(args.file):
            attempt(with_names, row, where, args, True)
    for side, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen[side])
        write_aside(path, text)
        print(path, dict(Counter(row.get("task", "rows") for row in chosen[side])))


FORMATS = {  # name: (what makes questions, reader, how boxes are written)
    "coco": (objects, coco, "xywh"), "yolo": (objects, yolo, "fractions"),
    "voc": (objects, voc, "xyxy"), "refcoco": (expressions, refcoco, None),
    "rows": (rows, read_rows, "xyxy"), "parquet": (rows, parquet_rows, None)}
FLAGS = (  # formats that have it, flag, settings
    ("yolo", "--names", {"required": True, "help": "data.yaml, which names the classes"}),
    ("yolo voc", "--list", {"help": "text that names the files to take, such as val.txt"}),
    ("refcoco", "--split", {"help": 'only entries whose "split" is this'}),
    ("rows", "--task", {"nargs": "+", "help": "of rows that name none: TASK or NAME=TASK"}),
    ("coco refcoco rows", "--boxes", {"choices": CONVENTIONS, "help": "how boxes are written"}),
    ("coco yolo voc refcoco", "--per_task", {"type": int, "help": "rows; 0: no limit [3000]"}),
    ("", "--image_root", {"required": True, "help": "folder that images' names start from"}),
    ("", "--out", {"required": True, "help": "JSONL to write, such as DIR/train/open.jsonl"}),
    ("", "--test_share", {"type": float, "default": 0, "help": "of photos that go to test/ [0]"}),
    ("", "--seed", {"type": int, "default": 0, "help": "of what is chosen and goes to test/ [0]"}),
    ("", "--skip_bad_rows", {"action": "store_true", "help": "drop what cannot be used"}),
    ("", "--force", {"action": "store_true", "help": "replace files that exist"}))


@command
def main(argv=None):
    """A subcommand for each format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    formats = parser.add_subparsers(required=True)
    for name, (questions, reader, boxes) in FORMATS.items():
        sub = formats.add_parser(name, allow_abbrev=False)
        sub.add_argument("file", metavar="FILE", help="JSON, JSONL or parquet; yolo, voc: a folder")
        for names, flag, settings in FLAGS:
            if not names or name in names.split():
                sub.add_argument(flag, **settings)
        sub.set_defaults(questions=questions, reader=reader, boxes=boxes,
                         per_task=3000 if questions is not rows else 0)
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
