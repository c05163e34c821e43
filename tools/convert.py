"""Annotations that people have -> rows to train on: open questions (docs/data.md has the commands).

    python -m tools.convert rows FILE --boxes thousandths --image_root DIR/images --out DIR/train/open.jsonl

Every reader gives what an image could be asked for; the rest is one path. Boxes stay in original pixels. An
entry that cannot be right is a fault: all are told with file and index, and with --skip_bad_rows each spoils
its image, as what is left of the annotations would not be the whole truth. What would make a poor question (a
crowd, a tiny box) is left out and counted. No row is written before all is known.
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
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import yaml

from data import answer_of, check_text, checked, read_example, said_of
from rewards import TASKS, Example
from support.answers import BOX, parse_labels
from support.boxes import CONVENTIONS, boxes_in, corners, doubt, fitting, is_sound, likely
from support.files import write_aside
from support.images import ENDINGS, inspect_image, opened, resolve_image
from support.rows import declared_tasks, first, parsed, read_rows
from support.shapes import one_row
from support.warnings import family
from support.words import UserError, command, say

MOST_ASKED, MOST_COUNTED = 4, 10  # boxes in one answer, objects in one count
SOME = 2000  # expressions whose boxes show their convention
TINY = 0.005  # of the image; smaller boxes are not asked for
NAME_KEYS = ("file_name", "image", "img_name", "image_path", "img_path", "filename")  # the first there is
BOX_KEYS = ("bbox", "box", "boxes", "bboxes", "solution")
EXPRESSION_KEYS = ("sent", "raw", "sentences", "sentence", "expression", "normal_caption", "caption")
PICKLE = """is a pickle, which may run any code when it is read, so it is not. If you trust it:
python -c 'import json, pickle; d = json.load(open("instances.json"))
d["refs"] = pickle.load(open("refs(unc).p", "rb")); json.dump(d, open("refcoco.json", "w"))'"""

# A question that may become a row. size: (width, height) in pixels, or None if not said; answer: text, or
# boxes as the file has them; sort: sorts are taken in turn.
Candidate = namedtuple("Candidate", "where image size task problem answer sort")
upright_size = functools.cache(inspect_image)  # which decodes the image


@contextmanager
def noted(faults, where):
    """A UserError or ValueError within is a fault, listed with its place."""
    try:
        yield
    except (UserError, ValueError) as error:
        faults.append(f"{where}: {error}")


def settled(args, boxes, usual=None):
    """The convention of a file's boxes, [(box, size), ..]: --boxes, its kind's `usual` one, or the one that fits.

    UserError where they do not fit, or fit two: which are the owner's boxes is asked, with --boxes.
    """
    boxes = [(tuple(box), size) for box, size in boxes if is_sound(box)]
    fit = fitting(likely(boxes)) if boxes else ["xyxy"]
    written, command = args.boxes or usual or fit[0], f"python -m tools.convert {args.kind} {args.file}"
    refused, told = doubt(boxes, written, bool(args.boxes), command)
    if refused:
        raise UserError(f"{args.file}: {refused}")
    if told:
        say(f"{args.file}: {told}")
    if not (args.boxes or usual) and len(fit) > 1:
        raise UserError(f"{args.file} does not say how its boxes are written; say it with --boxes "
                        f"{' or '.join(fit[:4])}, as which its {len(boxes)} boxes fit best.")
    if not (args.boxes or usual):
        say(f"{args.file}: its boxes are read as {written}, in which {len(boxes)} fit best")
    return written


def clean_text(text):
    """A text on one line; UserError if it is none, or spells what the chat format or answers reserve."""
    if not isinstance(text, str) or not (text := " ".join(text.split())):
        raise UserError(f"{str(text)[:80]!r} is no text to ask for.")
    check_text(text)
    if found := re.search("</?(image|answer|think)>", text):
        raise UserError(f"the text holds {found[0]!r}, which questions and answers reserve; remove it.")
    return text


# ---- COCO's JSON ----

def read_json(path):
    """The value of a JSON file, or the list of a JSONL file's; UserError for a pickle."""
    content = Path(path).read_bytes()
    if content[:1] == b"\x80" or Path(path).suffix in (".p", ".pkl", ".pickle"):
        raise UserError(f"{path} {PICKLE}")
    try:
        text = content.decode("utf-8-sig")
        jsonl = Path(path).suffix == ".jsonl"
        return [parsed(line) for line in text.split("\n") if line.strip()] if jsonl else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON in UTF-8: {error}.") from error


def has_lists(value, *names):
    return isinstance(value, dict) and all(isinstance(value.get(name), list) for name in names)


def value_of(entry, key, table=None):
    """entry[key], a number or text that `table` has, if one is given; else UserError."""
    if not isinstance(entry, dict):
        raise UserError("it is not a JSON object {..}.")
    if type(value := entry.get(key)) not in (int, str) or table is not None and value not in table:
        raise UserError(f"its {key} is {str(value)[:80]}, which is no id, or that of nothing usable; it "
                        f"has {', '.join(entry)[:200]}.")
    return value


def by_id(value, name, faults):
    """{id: (where, entry)} of one of the file's lists. Of entries that share an id none is usable."""
    found, ids = {}, Counter(str(entry.get("id")) for entry in value[name] if isinstance(entry, dict))
    for n, entry in enumerate(value[name]):
        with noted(faults, f"{name}[{n}]"):
            if ids[str(key := value_of(entry, "id"))] > 1:
                raise UserError(f"its id {key} is that of others, too.")
            found[key] = f"{name}[{n}]", entry
    return found


def image_of(entry):
    """(name, (width, height) or None) in an entry that describes an image."""
    name = next((entry[key] for key in NAME_KEYS if entry.get(key)), None)
    size = entry.get("width"), entry.get("height")
    return name, size if set(map(type, size)) == {int} else None


def coco(args, faults, left_out):
    """Candidates of the objects in each image whose annotations are all usable, of an instances file."""
    value = read_json(args.file)
    if not has_lists(value, "images", "annotations", "categories"):
        raise UserError(f"{args.file} is no instances file of images, annotations and categories.")
    if any("neg_category_ids" in image for image in value["images"] if isinstance(image, dict)):
        raise UserError(f"{args.file} is an LVIS file: it leaves objects out; nothing can be counted.")
    images, categories = by_id(value, "images", faults), by_id(value, "categories", faults)
    things, entries = defaultdict(list), value["annotations"]
    stated = Counter(str(entry.get("image_id")) for entry in entries if isinstance(entry, dict))
    for where, entry in by_id(value, "annotations", faults).values():
        with noted(faults, where):
            key = value_of(entry, "image_id", images)
            name = clean_text(categories[value_of(entry, "category_id", categories)][1].get("name"))
            if not (size := image_of(images[key][1])[1]):
                raise UserError(f"its image, {images[key][0]}, has no width and height in whole pixels.")
            things[key].append((where, name, entry.get("bbox"), bool(entry.get("iscrowd"))))
    whole = [key for key in things if len(things[key]) == stated[str(key)]]
    photos = [(images[key][0], *image_of(images[key][1]), things[key], False) for key in whole]
    return questions(in_pixels(photos, args, faults, "xywh"), left_out)


# ---- A file an image: YOLO, Pascal VOC ----

def yolo(args, faults, left_out):
    """The same of label files: class, center and size as shares of the image, or class and a polygon."""
    try:
        about = yaml.safe_load(Path(args.names).read_text("utf-8-sig"))
        names = [str(about["names"][n]) for n in range(len(about["names"]))]  # a list, or {0: a, 1: b, ..}
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{args.names} has no names: [a, b, ..] of the classes 0, 1, ...") from error

    def thing(line):
        category, *numbers = line.split()
        if not category.isdecimal() or int(category) >= len(names):
            raise UserError(f"its class {category[:40]} has no name in {args.names}; a line is class, x, y, width "
                            "and height (VisDrone, KITTI, DOTA: convert them to YOLO or COCO first).")
        numbers = [float(number) for number in numbers]
        if "kpt_shape" in about:  # the box, then points of a pose
            numbers = numbers[:4]
        if len(numbers) < 4 or len(numbers) % 2:
            raise UserError("it is neither class, x, y, width, height nor class and corners of a polygon (a last "
                            "number may be a confidence; drop it).")
        if len(numbers) > 4:
            (left, right), (top, bottom) = ((min(part), max(part)) for part in (numbers[::2], numbers[1::2]))
            numbers = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        return clean_text(names[int(category)]), numbers, False

    def lines(text):
        return [(f":{n}", line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    photos = whole_images(args, faults, "**/*.txt", lines, thing)
    return questions(in_pixels(photos, args, faults, "cxcywh-fractions"), left_out)


def voc(args, faults, left_out):
    """The same of XML files. Their pixels count from 1, both ends included; difficult: as a crowd."""
    def thing(node):
        keys = ("xmin", "ymin", "xmax", "ymax")
        x1, y1, x2, y2 = (float(node.findtext(f"bndbox/{key}") or "nan") for key in keys)
        return clean_text(node.findtext("name")), [x1 - 1, y1 - 1, x2, y2], node.findtext("difficult") == "1"

    def objects(text):
        try:
            if "<!ENTITY" in text:  # which may unfold to any size
                raise UserError("it defines entities")
            nodes = ElementTree.fromstring(text.encode()).iter("object")
        except (ElementTree.ParseError, UserError) as error:
            raise UserError(f"it cannot be read as XML ({error}).") from error
        return [(f", object {n}", node) for n, node in enumerate(nodes, 1)]
    photos = whole_images(args, faults, "**/*.xml", objects, thing)
    return questions(in_pixels(photos, args, faults, "xyxy"), left_out)


def whole_images(args, faults, pattern, parts_of, thing_of):
    """Photos, for `in_pixels`, of a folder of files: FOLDER/a/1.txt is of --image_root/a/1.jpg (or .png, ..).

    parts_of: text -> [(place, part)]; thing_of: part -> (label, box, is it a crowd). A fault spoils its image.
    """
    folder, endings = Path(args.file), [*ENDINGS, *map(str.upper, ENDINGS)]
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of annotation files.")
    lines = Path(args.list).read_text("utf-8-sig").splitlines() if args.list else []
    listed = {Path(line.split()[0]).stem for line in lines if line.split()}
    for file in sorted(folder.glob(pattern)):
        if file.name == "classes.txt" or args.list and file.stem not in listed:
            continue
        things, parts, before = [], [], len(faults)
        with noted(faults, file):
            names = [file.relative_to(folder).with_suffix(ending) for ending in endings]
            found = [name for name in names if Path(args.image_root, name).is_file()]
            path = resolve_image(str((found or names)[0]), args.image_root)
            size, parts = upright_size(path), parts_of(file.read_text("utf-8-sig", errors="replace"))
        for place, part in parts:
            with noted(faults, f"{file}{place}"):
                things.append((f"{file}{place}", *thing_of(part)))
        if things:
            yield str(file), path, size, things, len(faults) > before


def in_pixels(photos, args, faults, usual):
    """Photos [(where, image name, size, [(place, label, box, is it a crowd), ..], is it spoiled), ..] as
    `questions` takes them. All boxes are written in one way, the kind's `usual` one unless --boxes says another.
    """
    photos = list(photos)
    written = settled(args, [(box, size) for _, _, size, things, _ in photos for _, _, box, _ in things], usual)
    args.written = "xyxy"
    for where, image, size, things, spoiled in photos:
        before, found = len(faults), []
        for place, name, box, crowd in things:
            with noted(faults, place):
                found.append((name, corners(box, size, written), crowd))
        if not spoiled and len(faults) == before:
            yield where, image, size, found


def questions(photos, left_out):
    """Candidates of photos, [(where, image name, size, [(label, box, is it a crowd), ..]), ..]."""
    for where, image, size, things in photos:
        boxes, tiny, crowds = defaultdict(list), Counter(), {name for name, _, crowd in things if crowd}
        for name, box, crowd in things:
            boxes[name] += [] if crowd else [box]
            tiny[name] += not crowd and (box[2] - box[0]) * (box[3] - box[1]) < TINY * size[0] * size[1]
        ask = functools.partial(Candidate, where, image, size)
        for name in sorted(boxes):
            n = len(boxes[name])
            if name in crowds or tiny[name]:
                left_out["a crowd" if name in crowds else "tiny boxes"] += 1
                continue
            if n <= MOST_ASKED:
                yield ask("detection", f"Where is {'the' if n == 1 else 'every'} {name}?", boxes[name], name)
            if n <= MOST_COUNTED:
                yield ask("math", f'How many objects of the kind "{name}" are in the image?', str(n), n)
            left_out[f"more than {MOST_ASKED} boxes or {MOST_COUNTED} objects"] += n > MOST_ASKED
        if any(parse_labels(name) != [name] or tiny[name] == len(boxes[name]) > 0 for name in boxes):
            left_out["labels of tiny boxes alone, or with commas or brackets"] += 1
        else:
            yield ask("classify", "What objects are in the image?", ", ".join(sorted(boxes)), "")


# ---- Referring expressions ----

def refcoco(args, faults, left_out):
    """Candidates of referring expressions. One that an image has for different boxes is left out."""
    found, meant, splits = [], defaultdict(set), set()
    value = read_json(args.file)
    usual = None if isinstance(value, list) else "xywh"  # COCO's, if it has its structure
    for where, entry, image in referred(value, args, faults):
        splits.add(str(entry.get("split")))
        if args.split and entry.get("split") != args.split:
            continue
        with noted(faults, where):
            (name, size), boxes = image_of(image), entry_boxes(entry)
            texts = [clean_text(text).rstrip(" .?!") for text in texts_in(entry) or texts_in(image) or [""]]
            for problem in (f"Where is {text}?" for text in dict.fromkeys(texts)):
                found.append(Candidate(where, name, size, "detection", problem, boxes, str(name)))
                meant[str(name), problem.lower()].add(str(boxes))
    if len(splits) > 1 and not args.split:
        raise UserError(f"{args.file} holds the splits {', '.join(sorted(splits))}; choose one with --split.")
    clear = [candidate for candidate in found if len(meant[candidate.sort, candidate.problem.lower()]) == 1]
    left_out["an expression for different boxes"] += len(found) - len(clear)
    args.written = settled(args, sized(clear[::len(clear) // SOME + 1], args), usual)
    return clear


def sized(candidates, args):
    """(box, size of its image) of all boxes of candidates whose images can be looked at."""
    for candidate in candidates:
        with noted([], ""):  # what is wrong with it is told where it is used
            size = candidate.size or upright_size(resolve_image(candidate.image, args.image_root))
            yield from ((box, size) for box in candidate.answer)


def referred(value, args, faults):
    """(where, entry that has the box, entry that names the image) of everything that is referred to."""
    name = ""
    if isinstance(value, list):
        value = {name: value}
    elif has_lists(value, "images", "annotations"):
        name = "refs" if has_lists(value, "refs") else "annotations"
        images, boxes = by_id(value, "images", faults), by_id(value, "annotations", faults)
    else:
        raise UserError(f"{args.file} is neither a list of expressions nor has images and annotations.")
    for n, entry in enumerate(value[name]):
        with noted(faults, f"{name}[{n}]"):
            image = images[value_of(entry, "image_id", images)][1] if name else entry
            if not isinstance(entry, dict):
                raise UserError("it is not a JSON object {..}.")
            box = boxes[value_of(entry, "ann_id", boxes)][1] if name == "refs" else {}
            yield f"{name}[{n}]", {**box, **entry}, image


def entry_boxes(entry):
    """The boxes of an entry as it has them: one, several, or none where it says that there is none."""
    value = next((entry[key] for key in BOX_KEYS if entry.get(key) is not None), None)
    if value is None and not entry.get("empty_case"):
        raise UserError(f"it has no box, under any of {', '.join(BOX_KEYS)}, and is no empty_case.")
    if isinstance(value, list) and value and isinstance(value[0], list):
        return value
    return [value] if value else []


def texts_in(value):
    """All expressions in a text, a list, or an object under the first of EXPRESSION_KEYS that it has."""
    if isinstance(value, dict):
        return next((texts_in(value[key]) for key in EXPRESSION_KEYS if value.get(key)), [])
    return [text for item in value for text in texts_in(item)] if isinstance(value, list) else [value]


# ---- Candidates to rows ----

def choose(candidates, args, faults, left_out):
    """{split: rows}: of each task up to --per_task usable candidates, frequent sorts as often as rare."""
    candidates, chosen, bad, count = list(candidates), {"train": [], "test": []}, {}, Counter()
    room = {"train": args.per_task * (1 - args.test_share), "test": args.per_task * args.test_share}
    turns, places = defaultdict(itertools.count), range(len(candidates))
    shuffled = random.Random(args.seed).sample(places, len(places))
    for n in sorted(shuffled, key=lambda n: next(turns[candidates[n].task, candidates[n].sort])):
        split, task = split_of(str(candidates[n].image), args), candidates[n].task
        if args.per_task and count[split, task] >= round(room[split]):
            continue
        try:
            chosen[split].append(usable(candidates[n], args))
            count[split, task] += 1
        except UserError as error:
            bad[n] = f"{candidates[n].where}: {error}"
    faults += [bad[n] for n in sorted(bad)]  # in the order of the file
    return {split: with_absent_labels(rows, left_out) for split, rows in chosen.items()}


def split_of(photo, args):
    """"train" or "test": all versions of a photo lie in one."""
    number = random.Random(f"{args.seed}/{family(Path(photo).name)}").random()
    return "test" if number < args.test_share else "train"


def usable(candidate, args):
    """The row; UserError if image, boxes or text cannot be used."""
    path = resolve_image(candidate.image, args.image_root)
    size, answer = upright_size(path), candidate.answer
    if candidate.size not in (None, size):
        raise UserError(f"its image {candidate.image} is upright {size[0]} x {size[1]} pixels, but annotated "
                        f"as {candidate.size[0]} x {candidate.size[1]}.")
    said = {"image": os.path.relpath(path, args.image_root)}
    if candidate.task == "detection":
        boxes = [{"bbox_2d": corners(box, size, args.written)} for box in answer]
        answer, said = json.dumps(boxes) if boxes else "no objects", said | {"box_format": "xyxy"}
    row = {"task": candidate.task, "problem": candidate.problem, "solution": f"<answer>{answer}</answer>"}
    checked(Example(**row, images=(path,)), {path: size})
    return said | row


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
    """{split: rows} of questions of any shape, with every box of rows that have boxes in original pixels."""
    chosen, tasks, rows, boxes = {"train": [], "test": []}, declared_tasks(args.task, TASKS), [], []
    for where, row in read_rows(args.file):
        with noted(faults, where):
            example = read_example(row, where, root=Path(args.image_root), form=None, tasks=tasks, elsewhere=[])
            size = upright_size(*example.images) if TASKS[example.task].resize else None
            boxes += [(list(box), size) for box in boxes_in(said_of(example)) if size]
            rows.append((example, size))
    args.written = settled(args, boxes)
    for example, size in rows:
        with noted(faults, example.where):
            row = in_original_pixels(example, size, args)
            put(row, row["images"] or [example.where], chosen, args, left_out)
    return chosen


def put(row, photos, chosen, args, left_out):
    """The row into the split of its photos; one whose photos lie in both is left out."""
    split, *other = {split_of(photo, args) for photo in photos}
    if other:
        left_out["its photos lie in train and in test"] += 1
    else:
        chosen[split].append(row)


def in_original_pixels(example, size, args):
    """The row of an example as it is written: its boxes as two corners in pixels, which it says."""
    def rewrite(box):
        mark, *numbers = box.groups("")
        return f"{mark}{corners([*map(float, numbers)], size, args.written)}"
    problem, solution, *history = (BOX.sub(rewrite, text) if size else text for text in (
        example.problem, example.solution, *(text for _, text in example.history)))
    names = [os.path.relpath(path, args.image_root) for path in example.images]
    found = {"images": names, "task": example.task, "form": example.form, "solution": solution}
    found |= {"box_format": "xyxy"} if size else {}
    if example.history:
        turns = [*zip((role for role, _ in example.history), history), ("user", problem)]
        return found | {"messages": [{"role": role, "content": text} for role, text in turns]}
    return found | {"problem": problem}


def parquet(args, faults, left_out):
    """The same of a parquet file; pictures in it become files under --image_root."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError("parquet files need pyarrow, which is not installed: pip install pyarrow") from error
    chosen = {"train": [], "test": []}
    with noted(faults, args.file):  # pyarrow finds in a damaged file ValueErrors
        batches = (row for batch in ParquetFile(args.file).iter_batches(16) for row in batch.to_pylist())
        for n, row in enumerate(batches, 1):
            with noted(faults, f"{args.file}:{n}"):
                row = with_files(row, Path(args.image_root))
                photos = one_row(row)["images"] if args.test_share else []
                put(row, photos or [f"{args.file}:{n}"], chosen, args, left_out)
    return chosen


def with_files(value, folder):
    """A value with every picture in it replaced by the name of its file, which is written, in `folder`."""
    if isinstance(value, list):
        return [with_files(item, folder) for item in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return with_files(value["bytes"], folder) if value["bytes"] else value["path"]
    if isinstance(value, dict):
        return {key: with_files(item, folder) for key, item in value.items()}
    if not isinstance(value, bytes):
        return value
    with opened(BytesIO(value), "in it") as image:
        name = f"{hashlib.sha256(value).hexdigest()[:20]}.{image.format.lower()}"  # the same picture, once
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(value)
    return name


def convert(args):
    """The whole conversion; prints what was written, what was left out and how to look at it."""
    faults, left_out, paths = [], Counter(), outputs(args)
    chosen = args.read(args, faults, left_out)
    if not isinstance(chosen, dict):  # candidates
        chosen = choose(chosen, args, faults, left_out)
    faults = list(dict.fromkeys(faults))  # an image's fault is met once for each of its questions
    if faults and not args.skip_bad_rows:
        raise UserError("\n".join([f"{args.file}: {len(faults)} entries cannot be used.", *first(faults),
                                   "Correct them, or drop what they spoil with --skip_bad_rows."]))
    print("".join(f"left out: {n} x {reason}\n" for reason, n in left_out.most_common() if n), end="")
    if empty := [split for split in paths if not chosen[split]]:
        raise UserError("\n".join([f"{args.file} gives no {empty[0]} rows.", *first(faults)]))
    if faults:
        say(f"dropped {len(faults)} bad entries and what they spoil, the first {faults[0]}")
    for split, path in paths.items():
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in chosen[split]]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, "".join(f"{line}\n" for line in lines))
        tasks = Counter(row.get("task") for row in chosen[split])
        print(f"{path}: " + ", ".join(f"{n} {task or 'rows'}" for task, n in sorted(tasks.items(), key=str)))
    print(f"to look at it: python -m tools.pictures examples {shlex.quote(args.out)} "
          f"--image_root {shlex.quote(args.image_root)}")


def outputs(args):
    """{"train": --out, and with --test_share "test": its twin under test/}; UserError if one exists."""
    paths, parts = {"train": Path(args.out)}, list(Path(args.out).parts)
    if args.test_share:
        if "train" not in parts[:-1]:
            raise UserError(f"--out {args.out}: --test_share needs a folder train in it, for a twin in test.")
        parts[len(parts) - 1 - parts[::-1].index("train")] = "test"
        paths["test"] = Path(*parts)
    if found := [str(path) for path in paths.values() if path.exists() and not args.force]:
        raise UserError(f"{' and '.join(found)} exists; name another --out, or replace it with --force.")
    return paths


BOXES = {"choices": CONVENTIONS, "help": "how boxes are written: corners, sizes, y first, shares of the image"}
FLAGS = [  # name, the kinds of file that have it (all, if none is named), and what argparse makes of it
    ("file", "", {"metavar": "FILE", "help": "JSON, JSONL or parquet; yolo, voc: a folder"}),
    ("--list", "yolo voc", {"default": "", "help": "text that names the annotation files to take: val.txt"}),
    ("--names", "yolo", {"required": True, "help": "the data set's data.yaml, which names the classes"}),
    ("--split", "refcoco", {"default": "", "help": 'only entries whose "split" is this'}),
    ("--boxes", "coco yolo voc refcoco rows", BOXES),
    ("--task", "rows", {"nargs": "+", "help": "of rows that name none: TASK, or NAME=TASK by file"}),
    ("--per_task", "coco yolo voc refcoco", {"type": int, "default": 3000, "help": "rows a task, 0: all"}),
    ("--image_root", "", {"required": True, "help": "folder that the images' names start from"}),
    ("--out", "", {"required": True, "help": "JSONL to write, such as DIR/train/open.jsonl"}),
    ("--test_share", "", {"type": float, "default": 0.0, "help": "share of photos that goes to test/"}),
    ("--seed", "", {"type": int, "default": 0, "help": "of what is chosen and what goes to test/"}),
    ("--skip_bad_rows", "", {"action": "store_true", "help": "drop and count what cannot be used"}),
    ("--force", "", {"action": "store_true", "help": "replace a file that exists"})]


@command
def main(argv=None):
    """A subcommand for each kind of file."""
    kinds = {"coco": (coco, "instances JSON -> detection, classify and math rows"),
             "yolo": (yolo, "a folder of label files -> the same"),
             "voc": (voc, "a folder of Pascal VOC's XML -> the same"),
             "refcoco": (refcoco, "expressions -> detection rows"),
             "rows": (rows_in_pixels, "rows whose boxes are not in pixels"),
             "parquet": (parquet, "rows and pictures of the hub, with your own pyarrow")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    for kind, (read, text) in kinds.items():
        one = commands.add_parser(kind, help=text, allow_abbrev=False)
        one.set_defaults(kind=kind, read=read, boxes=None)
        for flag, only, options in FLAGS:
            if not only or kind in only.split():
                one.add_argument(flag, **options)
    convert(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
