"""Annotations that people have -> rows that this project trains on (docs/data.md): open questions, one JSON a line.

    python -m tools.convert coco instances.json --image_root DIR/images --out DIR/train/open.jsonl --test_share 0.1
    python -m tools.convert yolo labels/train --names data.yaml --image_root images/train --out DIR/train/open.jsonl
    python -m tools.convert voc VOC2007/Annotations --image_root VOC2007/JPEGImages --out DIR/test/voc.jsonl
    python -m tools.convert refcoco FILE --boxes xyxy --image_root DIR/images --out DIR/train/open.jsonl
    python -m tools.convert rows FILE --boxes thousandths --image_root DIR/images --out DIR/train/open.jsonl
    python -m tools.convert parquet FILE.parquet --image_root DIR/images --out DIR/train/open.jsonl

coco, yolo, voc: "Where is the dog?" with all its boxes (detection), "What objects are in the image?" (classify), "How
many ..?" (math). Every object of the categories must be annotated, or marked as a crowd or difficult.
refcoco: expressions with their boxes -> "Where is the left dog?". A COCO-like JSON whose refs, annotations or images
carry the expressions (MDETR's files do), or a JSON list or JSONL of them.
rows: questions as training reads them, but with boxes in another convention. parquet: rows and pictures of the hub.

Every reader gives what an image could be asked for; the rest is one path. Boxes stay in pixels of the original image.
An entry that cannot be right is a fault; all are listed with file and index, and with --skip_bad_rows each spoils its
image, because what is left of its annotations would not be the whole truth. What would make a poor question (a crowd, a
tiny box) is left out and counted. Nothing is written before all is known.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import yaml

from data import answer_of, check_text, checked
from forms import derive
from rewards import TASKS, Example
from support.answers import BOX, parse_boxes, parse_labels
from support.images import ENDINGS, inspect_image, opened, resolve_image
from support.rows import bare, declared_tasks, first, one_row, read_rows, row_task
from support.warnings import family
from support.words import UserError, command

CONVENTIONS = ("xyxy", "xywh", "fractions", "thousandths")  # two corners, corner and size, shares of the image
NAME_KEYS = ("file_name", "image", "img_name", "image_path", "img_path", "filename")  # of an image, the first there is
BOX_KEYS = ("bbox", "box", "boxes", "bboxes", "solution")
EXPRESSION_KEYS = ("sent", "raw", "sentences", "sentence", "expressions", "expression", "normal_caption", "captions",
                   "caption", "refs")
PICKLE = """is a pickle, which may run any code when it is read, so it is not. If you trust it, make JSON of it once:
python -c 'import json, pickle; d = json.load(open("instances.json"))
d["refs"] = pickle.load(open("refs(unc).p", "rb")); json.dump(d, open("refcoco.json", "w"))'"""


@dataclass(frozen=True)
class Candidate:
    """A question that may become a row; its image has not been looked at yet."""
    where: str      # "annotations[3]"
    image: str      # as the file names it
    size: tuple     # (width, height) in pixels, or None where the file does not say it
    task: str
    problem: str
    answer: object  # text, or boxes in the file's convention
    sort: object    # sorts of rows are taken in turn


# ---- What all readers share ----

def corners(box, size, written):
    """[x1, y1, x2, y2] of a box within an image of `size` (width, height), to 0.01 pixels; UserError if it is none.

    corners([10, 5, 20.5, 8], (40, 30), "xywh") -> [10, 5, 30.5, 13]; of [500, 0, 1000, 100] in "thousandths":
    [20, 0, 40, 3]. One pixel outside the image is rounding, and is clipped.
    """
    if not (isinstance(box, list) and len(box) == 4
            and all(type(n) in (int, float) and math.isfinite(n) and abs(n) < 1e6 for n in box)):
        raise UserError(f"its box {str(box)[:80]} is not four finite numbers.")
    scale = {"fractions": 1, "thousandths": 1000}.get(written)
    x1, y1, x2, y2 = [n * side / scale for n, side in zip(box, (*size, *size))] if scale else box
    x2, y2 = (x1 + x2, y1 + y2) if written == "xywh" else (x2, y2)
    if x1 >= x2 or y1 >= y2 or min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise UserError(f"its box {box}, read as {written}, is empty or leaves the image of {size[0]} x {size[1]}"
                        "; rows and refcoco take --boxes.")
    inside = [round(min(max(n, 0), side), 2) for n, side in zip((x1, y1, x2, y2), (*size, *size))]
    return [int(n) if n == int(n) else n for n in inside]


def plain(text):
    """A text on one line; UserError if it is none, or spells what the chat format or answers reserve."""
    if not isinstance(text, str) or not (text := " ".join(text.split())):
        raise UserError(f"{str(text)[:80]!r} is no text to ask for.")
    check_text(text)
    if found := re.search("</?(image|answer|think)>", text):
        raise UserError(f"the text holds {found[0]!r}, which questions and answers reserve; remove it.")
    return text


def read_json(path):
    """The value of a JSON file, or the list of a JSONL file's (None for a broken line); UserError for a pickle."""
    def line_value(line):
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None
    content = Path(path).read_bytes()
    if content[:1] == b"\x80" or Path(path).suffix in (".p", ".pkl", ".pickle"):
        raise UserError(f"{path} {PICKLE}")
    try:
        text = content.decode("utf-8-sig")
        jsonl = Path(path).suffix == ".jsonl"
        return [line_value(line) for line in text.split("\n") if line.strip()] if jsonl else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON in UTF-8: {error}.") from error


def value_of(entry, key, table=None):
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
            if (key := value_of(entry, "id")) in found:
                twice.add(key)
                raise UserError(f"its id {key} is that of {found[key][0]} too.")
            found[key] = f"{name}[{n}]", entry
        except UserError as error:
            faults.append(f"{name}[{n}]: {error}")
    return {key: pair for key, pair in found.items() if key not in twice}


def has_lists(value, *names):
    return isinstance(value, dict) and all(isinstance(value.get(name), list) for name in names)


def image_of(entry):
    """(name, (width, height) or None) in an entry that describes an image."""
    name = next((entry[key] for key in NAME_KEYS if entry.get(key)), None)
    size = entry.get("width"), entry.get("height")
    return name, size if set(map(type, size)) == {int} else None


# ---- Objects of photos: COCO, YOLO, Pascal VOC ----

def coco(args, faults):
    """(where, image name, size, [(label, box, whether a crowd), ..]) of each whole image of an instances file."""
    value = read_json(args.file)
    if not has_lists(value, "images", "annotations", "categories"):
        raise UserError(f"{args.file} is no instances file: it needs the lists images, annotations and categories.")
    if any("neg_category_ids" in image for image in value["images"] if isinstance(image, dict)):
        raise UserError(f"{args.file} is an LVIS file, in which not all objects are annotated; nothing can be counted.")
    images, categories = by_id(value, "images", faults), by_id(value, "categories", faults)
    things, bad, seen = defaultdict(list), set(), {}
    for n, entry in enumerate(value["annotations"]):
        try:
            key = value_of(entry, "image_id", images)
            if seen.setdefault(number := str(entry.get("id", f"[{n}]")), n) != n:
                raise UserError(f"its id {number} is that of annotations[{seen[number]}] too.")
            name = plain(categories[value_of(entry, "category_id", categories)][1].get("name"))
            if not (size := image_of(images[key][1])[1]):
                raise UserError(f"its image, {images[key][0]}, has no width and height in whole pixels.")
            things[key].append((name, corners(entry.get("bbox"), size, "xywh"), bool(entry.get("iscrowd"))))
        except UserError as error:
            faults.append(f"annotations[{n}]: {error}")
            bad.add(str(entry.get("image_id") if isinstance(entry, dict) else None))
    for key in things:
        if str(key) not in bad:
            yield images[key][0], *image_of(images[key][1]), things[key]


def yolo(args, faults):
    """The same of a folder of label files "class x y width height", center and size as shares of the image.

    A line of more numbers is a polygon, whose box is taken. Names of the classes stand in --names: a text of one name a
    line, or the data set's data.yaml. The image of labels/a/1.txt is --image_root/a/1.jpg (or .png, ..).
    """
    names, folder = class_names(args.names), Path(args.file)

    def thing(line, size):
        category, *numbers = line.split()
        if not category.isdecimal() or int(category) >= len(names):
            raise UserError(f"its class {category[:40]} has no name in {args.names}.")
        numbers = [float(number) for number in numbers]
        if len(numbers) == 4:
            x, y, w, h = numbers
            numbers = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        elif len(numbers) < 6 or len(numbers) % 2:
            raise UserError("it is neither class, x, y, width, height nor class and corners of a polygon.")
        xs, ys = numbers[::2], numbers[1::2]
        return plain(names[int(category)]), corners([min(xs), min(ys), max(xs), max(ys)], size, "fractions"), False

    for file in listed(folder, "**/*.txt", args):
        name = file.relative_to(folder).with_suffix("").as_posix()
        lines = [(f"{file}:{n}", line) for n, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1)]
        yield from whole_image(str(file), [name], [(where, line) for where, line in lines if line.strip()], thing,
                               args, faults)


def voc(args, faults):
    """The same of a folder of XML files. Their pixels count from 1, both ends included; difficult: as a crowd."""
    def thing(node, size):
        keys = ("xmin", "ymin", "xmax", "ymax")
        x1, y1, x2, y2 = (float(node.findtext(f"bndbox/{key}") or "nan") for key in keys)
        return (plain(node.findtext("name")), corners([x1 - 1, y1 - 1, x2, y2], size, "xyxy"),
                node.findtext("difficult") == "1")

    for file in listed(Path(args.file), "**/*.xml", args):
        text = file.read_text("utf-8-sig", errors="replace")
        try:
            if "<!ENTITY" in text or len(text) > 10_000_000:  # which may unfold to any size
                raise UserError("it defines entities, or is larger than an annotation is.")
            tree = ElementTree.fromstring(text.encode())
        except (ElementTree.ParseError, UserError) as error:
            faults.append(f"{file}: it cannot be read as XML ({error}).")
            continue
        nodes = [(f"{file}, object {n}", node) for n, node in enumerate(tree.iter("object"), 1)]
        yield from whole_image(str(file), [(tree.findtext("filename") or file.stem).strip(), file.stem], nodes, thing,
                               args, faults)


def whole_image(where, names, parts, thing, args, faults):
    """One image's things, unless it or one of `parts`, [(where, part)], is a fault: then nothing of it is whole."""
    before = len(faults)
    try:
        path = find_image(names, args.image_root)
        with opened(path) as image:
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # boxes are meant upright, as coco's sizes are
            size = image.size[::-1] if turned else image.size
    except UserError as error:
        faults.append(f"{where}: {error}")
        return
    things = []
    for place, part in parts:
        try:
            things.append(thing(part, size))
        except (UserError, ValueError) as error:
            faults.append(f"{place}: {error}")
    if things and len(faults) == before:
        yield where, path, size, things


def find_image(names, root):
    """The path of an image under one of its names, with or without an ending."""
    for name in (name + ending for name in names for ending in ("", *ENDINGS, *map(str.upper, ENDINGS))):
        try:
            return resolve_image(name, root)
        except UserError:
            continue
    raise UserError(f"no image {names[0]} (or .jpg, .png, ..) under {root}.")


def class_names(path):
    """The names of YOLO's classes, in order."""
    text = Path(path).read_text("utf-8-sig")
    if Path(path).suffix not in (".yaml", ".yml"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = yaml.safe_load(text)["names"]
        return [str(names[n]) for n in range(len(names))]
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} has no names: [a, b, ..] of the classes 0, 1, ...") from error


def listed(folder, pattern, args):
    """The annotation files below a folder; with --list only those whose names stand in that file, one a line."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of annotation files.")
    files = [file for file in sorted(folder.glob(pattern)) if file.name not in ("classes.txt", Path(args.names).name)]
    lines = Path(args.list).read_text("utf-8-sig").splitlines() if args.list else []
    wanted = {Path(line.split()[0]).stem for line in lines if line.split()}
    return [file for file in files if not args.list or file.stem in wanted]


def questions(photos, args, left_out):
    """Candidates of photos, as `coco` gives them."""
    for where, image, size, things in photos:
        boxes, tiny, crowds = defaultdict(list), Counter(), {name for name, _, crowd in things if crowd}
        for name, box, crowd in things:
            boxes[name] += [] if crowd else [box]
            area = (box[2] - box[0]) * (box[3] - box[1])
            tiny[name] += not crowd and area < args.min_share * size[0] * size[1]
        for name in sorted(boxes):
            n, ask = len(boxes[name]), functools.partial(Candidate, where, image, size)
            if name in crowds or tiny[name]:
                left_out["a crowd" if name in crowds else "tiny boxes"] += 1
                continue
            if n <= args.max_boxes:
                yield ask("detection", f"Where is {'the' if n == 1 else 'every'} {name}?", boxes[name], name)
            if n <= args.max_count:
                yield ask("math", f'How many objects of the kind "{name}" are in the image?', str(n), n)
            left_out["more than --max_boxes or --max_count"] += n > min(args.max_boxes, args.max_count)
        if any(parse_labels(name) != [name] or tiny[name] == len(boxes[name]) > 0 for name in boxes):
            left_out["labels of tiny boxes alone, or with commas or brackets"] += 1
        else:
            labels = ", ".join(sorted(boxes))
            yield Candidate(where, image, size, "classify", "What objects are in the image?", labels, "")


# ---- Referring expressions ----

def refcoco(args, faults, left_out):
    """Candidates of referring expressions. One that an image has for different boxes is left out."""
    found, meant, splits = [], defaultdict(set), set()
    for where, entry, image in referred(args, faults):
        splits.add(str(entry.get("split")))
        if args.split and entry.get("split") != args.split:
            continue
        try:
            (name, size), boxes = image_of(image), boxes_in(entry)
            texts = [plain(text).rstrip(" .?!") for text in texts_in(entry) or texts_in(image) or [""]]
            for text in dict.fromkeys(texts):
                found.append(Candidate(where, name, size, "detection", f"Where is {text}?", boxes, str(name)))
                meant[str(name), found[-1].problem.lower()].add(str(boxes))
        except UserError as error:
            faults.append(f"{where}: {error}")
    if len(splits) > 1 and not args.split:
        raise UserError(f"{args.file} holds the splits {', '.join(sorted(splits))}; choose one with --split.")
    for candidate in found:
        if len(meant[candidate.sort, candidate.problem.lower()]) == 1:
            yield candidate
        else:
            left_out["an expression for different boxes"] += 1


def referred(args, faults):
    """(where, entry that has the box, entry that names the image) of everything that is referred to."""
    value = read_json(args.file)
    if isinstance(value, list):
        if not args.boxes:
            raise UserError(f"{args.file} does not say how its boxes are written; say it with --boxes "
                            f"{' or '.join(CONVENTIONS)} (VLM-R1's lists: xyxy, others mostly: xywh).")
        rows, name = [(entry, None) for entry in value], ""
    elif has_lists(value, "images", "annotations"):
        args.boxes = args.boxes or "xywh"
        name = "refs" if has_lists(value, "refs") else "annotations"
        images, boxes = by_id(value, "images", faults), by_id(value, "annotations", faults) if name == "refs" else None
        shared = Counter(str(entry.get("image_id")) for entry in value[name] if isinstance(entry, dict))
        rows = [(entry, images) for entry in value[name]]
    else:
        raise UserError(f"{args.file} is neither a list of expressions nor an object with images and annotations.")
    for n, (entry, images) in enumerate(rows):
        try:
            if images is None:
                image = entry if isinstance(entry, dict) else value_of(entry, "image")
            else:
                where, image = images[key := value_of(entry, "image_id", images)]
                entry = {**boxes[value_of(entry, "ann_id", boxes)][1], **entry} if name == "refs" else entry
                if shared[str(key)] > 1 and not texts_in(entry):
                    raise UserError(f"its image, {where}, has one caption for {shared[str(key)]} boxes.")
            yield f"{name}[{n}]", entry, image
        except UserError as error:
            faults.append(f"{name}[{n}]: {error}")


def boxes_in(entry):
    """The boxes of an entry, as lists of what they hold: one, several, or none where it says that there is none."""
    value = next((entry[key] for key in BOX_KEYS if entry.get(key) is not None), None)
    if isinstance(value, str):
        found = [[float(n) for n in numbers] for _, *numbers in BOX.findall(value)]
        if not found and parse_boxes(value) != []:
            raise UserError(f"its box {value[:80]!r} is not four finite numbers.")
        return found
    if value is None and not entry.get("empty_case"):
        raise UserError(f"it has no box, under any of {', '.join(BOX_KEYS)}, and is not marked as an empty_case.")
    return value or [] if isinstance(value, list | None) and (not value or isinstance(value[0], list)) else [value]


def texts_in(value):
    """All expressions in a text, in a list, or in an object under the first of EXPRESSION_KEYS that it has."""
    if isinstance(value, dict):
        return next((texts_in(value[key]) for key in EXPRESSION_KEYS if value.get(key)), [])
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else [value]


# ---- Candidates to rows ----

def choose(candidates, args, faults, left_out):
    """{split: rows}: of each task up to --per_task usable candidates, sorts in turn, a photo's versions together."""
    chosen, bad, count, inspect = {"train": [], "test": []}, [], Counter(), functools.lru_cache(None)(inspect_image)
    room = {"train": args.per_task * (1 - args.test_share), "test": args.per_task * args.test_share}
    pool = {label for c in candidates if c.task == "classify" for label in parse_labels(c.answer)}
    for c in in_turn(candidates, args.seed):
        split = split_of(str(c.image), args)
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
            left_out[f"{c.task} without a possible wrong answer"] += 1
            continue
        chosen[split].append(row)
        count[split, c.task] += 1
    faults += sorted(bad, key=lambda fault: [  # met in the shuffled order of questions: "a[9]" before "a[10]"
        (len(word), word) if word.isdigit() else (0, word) for word in re.split("([0-9]+)", fault)])
    return {split: with_absent_labels(rows, left_out) for split, rows in chosen.items()}


def split_of(photo, args):
    """"train" or "test": all versions of a photo lie in one."""
    number = random.Random(f"{args.seed}/{family(Path(photo).name)}").random()
    return "test" if number < args.test_share else "train"


def in_turn(candidates, seed):
    """Shuffled, then one of each (task, sort) in turn, so that no frequent class or count fills the file."""
    turns = defaultdict(itertools.count)
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    return sorted(shuffled, key=lambda candidate: next(turns[candidate.task, candidate.sort]))


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
    row = {"image": shown_from(path, args), "task": candidate.task, "problem": candidate.problem,
           "solution": f"<answer>{answer}</answer>"}
    example = Example(problem=row["problem"], solution=row["solution"], task=row["task"], images=(path,))
    return row, checked(example, {path: size})


def shown_from(path, args):
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


# ---- Rows to rows ----

def rows_in_pixels(args, faults, left_out):
    """{split: rows} of a file of questions of any shape, with every box of rows that have boxes in original pixels."""
    chosen, tasks = {"train": [], "test": []}, declared_tasks(args.task, TASKS)

    def pixels(value, file):
        row = one_row(value)
        task = row_task(row, file, tasks) or ("general" if row["chat"] else None)
        if task not in TASKS:
            raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it.')
        paths = [resolve_image(name, args.image_root) for name in row["images"]]
        texts = [row["problem"], row["solution"] if task == "general" else bare(row["solution"])]
        if TASKS[task].resize:
            if len(paths) != 1:
                raise UserError(f"a row with boxes needs one image, and has {len(paths)}.")
            size = inspect_image(paths[0])
            texts = [BOX.sub(lambda m: f"{m[1] or ''}{corners([*map(float, m.groups()[1:])], size, args.boxes)}", text)
                     for text in texts]
        found = {"images": [shown_from(path, args) for path in paths], "task": task, "problem": texts[0],
                 "solution": texts[1]}
        if row["history"]:
            turns = [*row["history"], ("user", found.pop("problem"))]
            found["messages"] = [{"role": role, "content": text} for role, text in turns]
        return found | ({"form": row["form"]} if row["form"] else {})

    for where, value in read_rows(args.file):
        try:
            row = pixels(value, Path(where.rpartition(":")[0]))
            chosen[split_of(row["images"][0] if row["images"] else where, args)].append(row)
        except UserError as error:
            faults.append(f"{where}: {error}")
    return chosen


def parquet(args, faults, left_out):
    """The same of a parquet file, by the user's own pyarrow; pictures in it become files under --image_root."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError("parquet files need pyarrow, which is not installed here: pip install pyarrow") from error
    chosen = {"train": [], "test": []}
    try:
        batches = (row for batch in ParquetFile(args.file).iter_batches(16) for row in batch.to_pylist())
        for n, row in enumerate(batches, 1):
            try:
                row = json.loads(json.dumps(with_files(row, Path(args.image_root)), default=str))
                chosen[split_of(f"{args.file}:{n}", args)].append(row)
            except UserError as error:
                faults.append(f"{args.file}:{n}: {error}")
    except ArrowException as error:
        raise UserError(f"{args.file} cannot be read as parquet ({str(error).splitlines()[0]}).") from error
    return chosen


def with_files(value, folder):
    """A value with every picture in it replaced by the name of its file in `folder`, which is written if it is new."""
    if isinstance(value, list):
        return [with_files(item, folder) for item in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return with_files(value["bytes"], folder) if value["bytes"] else value["path"]
    if isinstance(value, dict):
        return {key: with_files(item, folder) for key, item in value.items()}
    if not isinstance(value, bytes):
        return value
    with opened(BytesIO(value), "in it") as image:
        path = folder / f"{hashlib.sha256(value).hexdigest()[:20]}.{image.format.lower()}"  # the same picture, once
    if not path.exists():
        write({path: value})
    return path.name


# ---- Writing ----

def convert(args):
    """The whole conversion; prints what was written, what was left out and how to look at it."""
    faults, left_out, paths = [], Counter(), outputs(args)
    chosen = args.read(args, faults, left_out)
    faults = list(dict.fromkeys(faults))  # an image's fault is met once for each of its questions
    if faults and not args.skip_bad_rows:
        raise UserError("\n".join([f"{args.file}: {len(faults)} entries cannot be used.", *first(faults),
                                   "Correct them, or drop what they spoil with --skip_bad_rows."]))
    print("".join(f"left out: {n} x {reason}\n" for reason, n in left_out.most_common() if n), end="")
    if empty := [split for split in paths if not chosen[split]]:
        raise UserError("\n".join([f"{args.file} gives no {empty[0]} rows; flags say what is taken (--help).",
                                   *first(faults)]))
    if faults:
        print(f"dropped {len(faults)} bad entries and what they spoil, the first {faults[0]}", file=sys.stderr)
    write({path: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen[split]).encode()
           for split, path in paths.items()})
    for split, path in paths.items():
        tasks = Counter(row.get("task") for row in chosen[split])
        print(f"{path}: " + ", ".join(f"{n} {task or 'rows'}" for task, n in sorted(tasks.items(), key=str)))
    print(f"to look at it: python -m tools.pictures examples {shlex.quote(args.out)} "
          f"--image_root {shlex.quote(args.image_root)}")


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


def write(files):
    """Write {path: bytes}; all are written aside before any appears."""
    asides = {path.with_name(f".writing-{path.name}"): path for path in files}
    for aside, path in asides.items():
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(files[path])
    for aside, path in asides.items():
        aside.rename(path)


# ---- Command line ----

def share(text):
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to below 1")
    return value


@command
def main(argv=None):
    """A subcommand for each kind of file."""
    def of_photos(reader):
        return lambda args, faults, left_out: choose(
            list(questions(reader(args, faults), args, left_out)), args, faults, left_out)
    kinds = {"coco": (of_photos(coco), "instances JSON -> detection, classify and math rows"),
             "yolo": (of_photos(yolo), "a folder of label files -> the same"),
             "voc": (of_photos(voc), "a folder of Pascal VOC's XML -> the same"),
             "refcoco": (lambda *told: choose(list(refcoco(*told)), *told), "referring expressions -> detection rows"),
             "rows": (rows_in_pixels, "rows whose boxes are not in pixels"),
             "parquet": (parquet, "rows and pictures of the hub, with your own pyarrow")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for name, (read, text) in kinds.items():
        add = commands.add_parser(name, help=text, allow_abbrev=False).add_argument
        if name in ("coco", "yolo", "voc"):
            add("--max_boxes", type=int, default=4, help="boxes in one answer at most [4]")
            add("--max_count", type=int, default=10, help="objects in one count at most [10]")
            add("--min_share", type=share, default=0.005, help="boxes of a smaller share are tiny [0.005]")
        if name in ("yolo", "voc"):
            add("--list", default="", help="text that names the annotation files to take, such as val.txt")
            add("--names", required=name == "yolo", default="", help="data.yaml, or a text of one class a line")
        if name == "refcoco":
            add("--split", default="", help='only entries whose "split" is this')
        if name == "rows":
            add("--task", nargs="+", default=[], help="of rows that name none: TASK, or NAME=TASK by file")
        if name in ("refcoco", "rows"):
            add("--boxes", choices=CONVENTIONS, required=name == "rows", help="two corners, corner and size, or two "
                "corners as shares or thousandths of the image")
        if name not in ("rows", "parquet"):
            add("--per_task", type=int, default=3000, help="rows a task at most; 0: no limit [3000]")
        add("file", metavar="FILE", help="JSON, JSONL or parquet; yolo, voc: a folder")
        add("--image_root", required=True, help="folder that the images' names start from")
        add("--out", required=True, help="JSONL to write, such as DIR/train/open.jsonl")
        add("--test_share", type=share, default=0.0, help="share of the photos that goes to test/ [0]")
        add("--seed", type=int, default=0, help="of what is chosen and what goes to test/")
        add("--skip_bad_rows", action="store_true", help="drop and count what cannot be used")
        add("--force", action="store_true", help="replace a file that exists")
        commands.choices[name].set_defaults(read=read, **({} if name in ("refcoco", "rows") else {"boxes": "xyxy"}))
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
