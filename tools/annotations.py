"""Annotations that people have -> Candidates for rows: COCO, YOLO and Pascal VOC files, and referring expressions.

Each reader yields what an image could be asked for, tells entries that cannot be right as faults (with file and index),
and counts what would make a poor question as left out. Choosing and writing is done in tools/convert.py.
"""

import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import yaml

from data import check_text
from support.answers import BOX, parse_boxes, parse_labels
from support.images import ENDINGS, opened, resolve_image
from support.words import UserError

CONVENTIONS = ("xyxy", "xywh", "fractions", "thousandths")      # two corners, corner and size, shares of the image
IMAGES = ("file_name", "image", "img_name", "image_path", "img_path", "filename")  # keys of an image's name, the first
BOXES = ("bbox", "box", "boxes", "bboxes", "solution")          # keys of boxes, likewise
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


def place(entry, default):
    """Where an entry stands: its file and line, if a reader here made it of these."""
    return entry.get("where", default) if isinstance(entry, dict) else default


def by_id(value, name, faults):
    """{id: (where, entry)} of one of the file's lists. Of entries that share an id none is usable."""
    found, twice = {}, set()
    for n, entry in enumerate(value[name]):
        try:
            if (key := known(entry, "id")) in found:
                twice.add(key)
                raise UserError(f"its id {key} is that of {found[key][0]} too.")
            found[key] = place(entry, f"{name}[{n}]"), entry
        except UserError as error:
            faults.append(f"{place(entry, f'{name}[{n}]')}: {error}")
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

    corners([10, 5, 20.5, 8], (40, 30)) -> [10, 5, 30.5, 13]; corners([500, 0, 1000, 100], (40, 30), "thousandths") ->
    [20, 0, 40, 3]. One pixel outside the image is rounding, and is clipped.
    """
    if not (isinstance(box, list) and len(box) == 4
            and all(type(n) in (int, float) and math.isfinite(n) and abs(n) < 1e6 for n in box)):
        raise UserError(f"its box {str(box)[:80]} is not four finite numbers.")
    scale = {"fractions": 1, "thousandths": 1000}.get(written)
    x1, y1, x2, y2 = [n * side / scale for n, side in zip(box, (*size, *size))] if scale else box
    x2, y2 = (x1 + x2, y1 + y2) if written == "xywh" else (x2, y2)
    if x1 >= x2 or y1 >= y2 or min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise UserError(f"its box {box}, read as {written}, is empty or leaves the image of {size[0]} x {size[1]}.")
    inside = [round(min(max(n, 0), side), 2) for n, side in zip((x1, y1, x2, y2), (*size, *size))]
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
            faults.append(f"{place(entry, f'annotations[{n}]')}: {error}")
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


# ---- YOLO and Pascal VOC, as COCO instances ----

def yolo(args, faults):
    """A folder of YOLO's label files as a COCO object: lines "class x y width height", center and size as shares.

    A line of more numbers is a polygon, whose box is taken. Names of the classes stand in --names: a text of one name a
    line, or the data set's data.yaml. The image of labels/a/1.txt is --image_root/a/1.jpg (or .png, ..).
    """
    names, value, folder = class_names(args), {"images": [], "annotations": [], "categories": []}, Path(args.file)
    value["categories"] = [{"id": number, "name": name} for number, name in enumerate(names)]
    for file in listed(folder, "**/*.txt", args):
        try:
            entry, size = image_entry(file.relative_to(folder).with_suffix("").as_posix(), args)
        except UserError as error:
            faults.append(f"{file}: {error}")
            continue
        value["images"].append(entry | {"where": str(file)})
        for number, line in enumerate(file.read_text("utf-8-sig").splitlines(), 1):
            if line.strip():
                category, box = yolo_box(line.split(), size)
                value["annotations"].append({"where": f"{file}:{number}", "image_id": entry["id"],
                                             "category_id": category, "bbox": box})
    return value


def yolo_box(words, size):
    """(class, [x, y, width, height] in pixels) of the words of a line; the words themselves where they are none."""
    try:
        category, *numbers = int(words[0]), *map(float, words[1:])
    except ValueError:
        return words[0], words
    if len(numbers) == 4:
        x, y, w, h = numbers
        return category, [(x - w / 2) * size[0], (y - h / 2) * size[1], w * size[0], h * size[1]]
    if len(numbers) < 6 or len(numbers) % 2:
        return category, words
    xs, ys = [x * size[0] for x in numbers[::2]], [y * size[1] for y in numbers[1::2]]
    return category, [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def class_names(args):
    """The names of YOLO's classes, in order, of --names."""
    path = Path(args.names)
    if path.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    try:
        names = yaml.safe_load(path.read_text("utf-8-sig"))["names"]
        return [str(names[n]) for n in range(len(names))]
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} has no names: [a, b, ..] of the classes 0, 1, ...") from error


def voc(args, faults):
    """A folder of Pascal VOC's XML files as a COCO object. Its pixels count from 1, both ends included.

    An object marked as difficult is neither asked for nor counted, and so is its kind in that image.
    """
    value, names, folder = {"images": [], "annotations": [], "categories": []}, {}, Path(args.file)
    for file in listed(folder, "**/*.xml", args):
        try:
            tree = read_xml(file)
            entry, _ = image_entry((tree.findtext("filename") or file.stem).strip(), args, file.stem)
        except UserError as error:
            faults.append(f"{file}: {error}")
            continue
        value["images"].append(entry | {"where": str(file)})
        for number, thing in enumerate(tree.iter("object"), 1):
            name = (thing.findtext("name") or "").strip()
            try:
                x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
                box = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
            except (TypeError, ValueError):
                box = None
            value["annotations"].append({
                "where": f"{file}, object {number}", "image_id": entry["id"], "bbox": box,
                "category_id": names.setdefault(name, len(names)), "iscrowd": thing.findtext("difficult") == "1"})
    value["categories"] = [{"id": number, "name": name} for name, number in names.items()]
    return value


def read_xml(file):
    """The root of an XML file. One that defines entities, which may unfold to any size, is refused unread."""
    text = file.read_text("utf-8-sig", errors="replace")
    if "<!ENTITY" in text or len(text) > 10_000_000:
        raise UserError("it defines entities, or is larger than an annotation is.")
    try:
        return ElementTree.fromstring(text.encode())
    except ElementTree.ParseError as error:
        raise UserError(f"it cannot be read as XML ({error}).") from error


def listed(folder, pattern, args):
    """The annotation files below a folder; with --list only those whose names stand in that file, one a line."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of annotation files.")
    files = [file for file in sorted(folder.glob(pattern)) if file.name not in ("classes.txt", Path(args.names).name)]
    if args.list:
        lines = Path(args.list).read_text("utf-8-sig").splitlines()
        wanted = {Path(line.split()[0]).stem for line in lines if line.split()}
        files = [file for file in files if file.stem in wanted]
    return files


def image_entry(name, args, stem=""):
    """(COCO's entry of an image, its size) for a name with or without an ending, else for its annotation's stem."""
    names = [name, *(base + ending for base in (name, stem) if base for ending in (*ENDINGS, *map(str.upper, ENDINGS)))]
    for name in names:
        try:
            path = resolve_image(name, args.image_root)
            break
        except UserError:
            continue
    else:
        raise UserError(f"no image {names[0]} (or .jpg, .png, ..) under {args.image_root}.")
    with opened(path) as image:
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)        # boxes are meant upright, as coco's sizes are
        width, height = image.size[::-1] if turned else image.size
    return {"id": path, "file_name": name, "width": width, "height": height}, (width, height)


# ---- Referring expressions ----

def refcoco(value, args, faults, left_out):
    """Candidates of referring expressions. One that an image has for different boxes is left out."""
    found, meant, splits = [], defaultdict(set), set()
    for where, entry, image in referred(value, args, faults):
        splits.add(str(entry.get("split")))
        if args.split and entry.get("split") != args.split:
            continue
        try:
            (name, size), boxes = image_of(image), boxes_in(entry)
            texts = [words(text).rstrip(" .?!") for text in texts_in(entry) or texts_in(image) or [""]]
            for text in dict.fromkeys(texts):
                found.append(Candidate(where, name, size, "detection", f"Where is {text}?", boxes, str(name)))
                meant[str(name), found[-1].problem.lower()].add(str(boxes))
        except UserError as error:
            faults.append(f"{where}: {error}")
    if len(splits) > 1 and not args.split:
        raise UserError(f"{args.file} holds the splits {', '.join(sorted(splits))}; choose one with --split.")
    args.boxes = args.boxes or convention(found, value, args)
    for candidate in found:
        if len(meant[candidate.kind, candidate.problem.lower()]) == 1:
            yield candidate
        else:
            left_out["an expression for different boxes"] += 1


def boxes_in(entry):
    """The boxes of an entry, as lists of what they hold: one, several, or none where it says that there is none."""
    value = next((entry[key] for key in BOXES if entry.get(key) is not None), None)
    if isinstance(value, str):
        found = [[float(n) for n in numbers] for _, *numbers in BOX.findall(value)]
        if not found and parse_boxes(value) != []:
            raise UserError(f"its box {value[:80]!r} is not four finite numbers.")
        return found
    if value is None and not entry.get("empty_case"):
        raise UserError(f"it has no box, under any of {', '.join(BOXES)}, and is not marked as an empty_case.")
    return value or [] if isinstance(value, list | None) and (not value or isinstance(value[0], list)) else [value]


def convention(candidates, value, args):
    """How boxes are written where --boxes does not say it: COCO's way in COCO's structure; in a list the one that fits.

    VLM-R1's lists have two corners under "solution", others corner and size. UserError where another reading fits more
    of the first 1,000 boxes: read wrongly, those that happen to fit would become other boxes without a word.
    """
    if not isinstance(value, list):
        return "xywh"
    usual = "xyxy" if isinstance(value[0], dict) and "solution" in value[0] and "bbox" not in value[0] else "xywh"
    sized = [(c.answer, c.size or header_size(c.image, args)) for c in candidates[:1000]]
    boxes = [(box, size) for answer, size in sized if size for box in answer]
    fits = {written: sum(fit(box, size, written) for box, size in boxes) for written in CONVENTIONS}
    best = max(CONVENTIONS, key=lambda written: (fits[written], written == usual))
    if fits[best] > fits[usual]:
        counts = ", ".join(f"{count} fit as {written}" for written, count in fits.items())
        raise UserError(f"{args.file} does not say how its boxes are written. Of {len(boxes)} boxes {counts}: they "
                        f"seem to be {best}. Say how with --boxes.")
    return usual


def fit(box, size, written):
    """Whether a box can be read so. One within 0..1 is meant as shares: in pixels it would be a speck."""
    shares = isinstance(box, list) and all(isinstance(n, float | int) and n <= 1 for n in box)
    try:
        return bool(corners(box, size, written)) and shares == (written == "fractions")
    except UserError:
        return False


def header_size(name, args):
    """(width, height) of an image, from its header; None where there is no usable one, which is told later."""
    try:
        with opened(resolve_image(name, args.image_root)) as image:
            return image.size
    except UserError:
        return None


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
