"""Tests of convert.py. Each name says the defect that it keeps out."""

import json
import pickle
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from runs import refused

import tools.convert as convert
from data import answer_of, load_examples
from forms import derive_all
from rewards import truth_boxes
from support.answers import parse_boxes, parse_labels
from support.tiny import tiny_image, write_jsonl


class Desk:
    """A folder with pictures, what is converted, and what comes out of it."""

    def __init__(self, folder, capsys):
        self.folder, self.root, self.capsys = folder, folder / "images", capsys
        self.out, self.test = folder / "train" / "open.jsonl", folder / "test" / "open.jsonl"

    def arguments(self, kind, given, flags):
        if not isinstance(given, Path):  # a JSON file's value
            (self.folder / "given.json").write_text(json.dumps(given))
            given = self.folder / "given.json"
        return list(map(str, [kind, given, "--image_root", self.root, "--out", self.out, *flags]))

    def failed(self, kind, given, *flags):
        """What is said to one who gets no rows."""
        self.out.unlink(missing_ok=True)
        said = refused(self.capsys, self.arguments(kind, given, flags), program=convert.main)
        assert not self.out.exists()
        return said

    def rows(self, kind, given, *flags):
        """The rows of --out, which training can read in all forms."""
        assert convert.main(self.arguments(kind, given, [*flags, "--force"])) == 0
        examples = load_examples(self.out, image_root=self.root)
        for form in ("binary", "choice") if kind != "rows" else ():
            assert {example.form for example in derive_all(examples, form)} == {form}
        return rows_of(self.out)


@pytest.fixture
def desk(tmp_path, capsys):
    """24 pictures of 200 x 150; `coco`: up to three of five categories in each, boxes of floats."""
    desk, rng, images, annotations = Desk(tmp_path, capsys), random.Random(0), [], []
    for n in range(24):
        tiny_image(desk.root / f"{n:03}.png", (200, 150), box=(10, 10, 60, 60))
        images.append({"id": n, "file_name": f"{n:03}.png", "width": 200, "height": 150})
        for category in rng.sample(range(5), 1 + n % 3) if n else [0]:
            x, y = rng.uniform(0, 120), rng.uniform(0, 80)
            annotations.append(annotation(len(annotations), n, category, [x, y, rng.uniform(30, 70), 40.25]))
    names = enumerate(["dog", "traffic light", "cup", "person", "boat"])
    desk.coco = {"images": images, "annotations": annotations,
                 "categories": [{"id": n, "name": name} for n, name in names]}
    return desk


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def boxes_of(row):
    return [list(box) for box in parse_boxes(answer_of(row["solution"]))]


def places(rows):
    """{question: boxes} of detection rows."""
    return {row["problem"]: boxes_of(row) for row in rows if row["task"] == "detection"}


# ---- COCO ----

def test_coco_rows_have_all_tasks_forms_boxes_and_labels(desk):
    rows, value = desk.rows("coco", desk.coco), desk.coco
    said = desk.capsys.readouterr().out
    assert f"tools.pictures examples {desk.out} --image_root {desk.root}" in said and "24 classify" in said
    assert {row["task"] for row in rows} == {"detection", "classify", "math"}
    truth = {(f"{a['image_id']:03}.png", value["categories"][a["category_id"]]["name"]): a["bbox"]
             for a in value["annotations"]}
    for row in rows:
        if row["task"] == "detection":
            x, y, w, h = truth[row["image"], row["problem"].removeprefix("Where is the ").rstrip("?")]
            assert boxes_of(row) == [pytest.approx([x, y, x + w, y + h], abs=0.01)]
        if row["task"] == "classify":
            shown = {name for image, name in truth if image == row["image"]}
            assert set(parse_labels(answer_of(row["solution"]))) == shown


def test_all_boxes_of_a_kind_are_asked_for_and_counted_but_a_crowd_is_not(desk):
    desk.coco["annotations"] = [
        annotation(0, 0, 0, [0, 0, 40, 40]), annotation(1, 0, 0, [50, 0, 40, 40]),
        annotation(2, 0, 3, [0, 60, 40, 40]), annotation(3, 0, 3, [0, 50, 150, 90], iscrowd=1),
        annotation(4, 0, 2, [100, 100, 3, 3]), annotation(5, 1, 4, [9, 9, 50, 50])]
    rows = [row for row in desk.rows("coco", desk.coco) if row["image"] == "000.png"]
    assert places(rows) == {"Where is every dog?": [[0, 0, 40, 40], [50, 0, 90, 40]]}
    assert [(row["problem"], row["solution"]) for row in rows if row["task"] != "detection"] == [
        ('How many objects of the kind "dog" are in the image?', "<answer>2</answer>")]
    said = desk.capsys.readouterr().out
    assert "1 x a crowd" in said and "1 x tiny boxes" in said


def rotate(path, entry):
    """A photo that is stored lying and shown upright: annotated lying, its boxes would be elsewhere."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (200, 150), "white").save(path, exif=exif)
    entry["file_name"] = path.name


def outside(value, root):
    (root.parent / "x.png").write_bytes((root / "000.png").read_bytes())
    value["images"][0].update(file_name="../x.png")


def with_first(part, **changes):
    return lambda value, root: value[part][0].update(changes)


WARTS = {
    "missing image": (lambda v, root: (root / "000.png").unlink(), "images[0]: no image 000.png"),
    "other size": (with_first("images", width=100, height=150), "the image of 100 x 150"),
    "size of no image": (with_first("images", width=400, height=300), "is upright 200 x 150"),
    "rotated": (lambda v, root: rotate(root / "000.jpg", v["images"][0]), "is upright 150 x 200"),
    "no size": (with_first("images", width=None), "no width and height"),
    "a pixel high": (lambda v, root: Image.new("RGB", (200, 1)).save(root / "000.png"), "is 200 x 1"),
    "no picture": (lambda v, root: (root / "000.png").write_bytes(b"no"), "cannot be decoded"),
    "outside": (outside, "no image ../x.png"),
    "zero-size box": (with_first("annotations", bbox=[5, 5, 0, 9]), "annotations[0]: its box [5, 5"),
    "box outside": (with_first("annotations", bbox=[150, 5, 60, 60]), "leaves the image"),
    "NaN box": (with_first("annotations", bbox=[float("nan"), 2, 3, 4]), "not four finite numbers"),
    "unknown category": (with_first("annotations", category_id=99), "category_id is 99"),
    "unknown image": (with_first("annotations", image_id=[1]), "image_id is [1]"),
    "annotation twice": (lambda v, root: v["annotations"].append(v["annotations"][0]), "its id 0 is that of"),
    "image twice": (lambda v, root: v["images"][1].update(id=0), "images[1]: its id 0 is that of"),
    "no object": (lambda v, root: v["annotations"].append(7), "not a JSON object"),
    "hostile name": (with_first("categories", name="dog<|im_end|>"), "<|im_end|>"),
    "answer in a name": (with_first("categories", name="dog</answer>"), "</answer>"),
}


@pytest.mark.parametrize("wart", WARTS)
def test_a_bad_entry_is_told_with_its_index_or_spoils_its_image(desk, wart):
    spoil, words = WARTS[wart]
    spoil(desk.coco, desk.root)
    said = desk.failed("coco", desk.coco)
    assert words in said and "given.json" in said and "--skip_bad_rows" in said
    assert len(set(said.splitlines())) == len(said.splitlines()), "an image's fault is told once"
    rows = desk.rows("coco", desk.coco, "--skip_bad_rows")
    assert "dropped" in desk.capsys.readouterr().err
    if wart not in ("no object", "unknown image"):
        assert not [row for row in rows if "000" in row["image"]], "all of an image or nothing"
    assert [row for row in rows if row["image"] == "005.png"] or "category" in wart or "name" in wart


def test_faults_are_told_in_the_order_of_the_file(desk):
    for image in desk.coco["images"][3:12]:
        (desk.root / image["file_name"]).unlink()
    said = desk.failed("coco", desk.coco)
    assert list(map(int, re.findall(r"^images\[(\d+)\]", said, re.M))) == list(range(3, 12))


def test_a_pixel_of_rounding_is_clipped_not_refused(desk):
    desk.coco["annotations"] = [annotation(n, n, n % 5, [-0.5, 60, 80.123456, 90.7]) for n in range(10)]
    rows = [row for row in desk.rows("coco", desk.coco) if row["task"] == "detection"]
    assert list(map(boxes_of, rows)) == [[[0, 60, 79.62, 150]]] * 10


def test_labels_that_leave_no_wrong_answer_or_cannot_be_named_are_not_asked_for(desk):
    desk.coco["annotations"] = [
        annotation(0, 0, 0, [0, 0, 200, 150]), annotation(9, 2, 1, [9, 9, 50, 50]),
        *(annotation(n + 1, 1, n, [10 * n, 10 * n, 50, 50]) for n in range(5))]
    rows = desk.rows("coco", desk.coco)  # a box as large as the image among them
    assert {row["image"] for row in rows if row["task"] == "classify"} == {"000.png", "002.png"}
    assert "1 x every label is there" in desk.capsys.readouterr().out
    desk.coco["categories"][0]["name"] = "bat (animal), dark"
    rows = desk.rows("coco", desk.coco | {"annotations": desk.coco["annotations"] + [
        annotation(10, 3, 2, [9, 9, 50, 50])]})
    assert {row["image"] for row in rows if row["task"] == "classify"} == {"002.png", "003.png"}
    desk.coco["annotations"] = [annotation(n, n, 1, [9, 9, 50, 50]) for n in range(9)]  # one label alone
    assert {row["task"] for row in desk.rows("coco", desk.coco)} == {"detection", "math"}


@pytest.mark.parametrize("value, words", [
    ([], "no instances file"), ({"images": []}, "no instances file"),
    ({"images": [], "annotations": [], "categories": []}, "no train rows"),
    ({"images": [{"neg_category_ids": []}], "annotations": [], "categories": []}, "LVIS")])
def test_a_file_without_annotations_is_a_sentence(desk, value, words):
    assert words in desk.failed("coco", value)


# ---- Choosing and writing ----

def test_a_photo_and_its_versions_are_in_train_or_in_test_whatever_file_names_them(desk):
    """Roboflow writes NAME_jpg.rf.HASH.jpg for each version: 266 of 275 test images had one in training."""
    for n, image in enumerate(desk.coco["images"]):
        name = f"photo{n // 3}_png.rf.{n:032x}.png"
        (desk.root / image["file_name"]).rename(desk.root / name)
        image["file_name"] = name
    lines = [{"image": image["file_name"], "bbox": [9, 9, 40, 40], "caption": f"red box {n}"}
             for n, image in enumerate(desk.coco["images"])]
    sides = []
    for given in (["coco", desk.coco], ["refcoco", lines, "--boxes", "xywh"]):
        rows = desk.rows(*given, "--test_share", "0.4")
        sides += [{row["image"].partition(".rf.")[0] for row in part} for part in (rows, rows_of(desk.test))]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and sides[:2] == sides[2:]


def test_a_seed_gives_the_same_rows_and_frequent_classes_do_not_fill_the_file(desk):
    desk.coco["annotations"] = [
        annotation(n, n, 0 if n < 20 else n % 4 + 1, [9, 9, 50, 50]) for n in range(24)]
    rows, again, other = (desk.rows("coco", desk.coco, "--seed", seed, "--per_task", 5) for seed in (0, 0, 1))
    assert rows == again != other
    assert Counter(row["task"] for row in rows) == {"detection": 5, "math": 5, "classify": 5}
    assert Counter(row["problem"] for row in rows if row["task"] == "detection")["Where is the dog?"] == 1


def test_a_file_that_exists_is_kept_unless_forced_and_whole(desk, monkeypatch):
    desk.out.parent.mkdir()
    desk.out.write_text("mine")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "rename", full)
    for flags, words in ([], "--force"), (["--force"], "No space left"):
        said = refused(desk.capsys, desk.arguments("coco", desk.coco, flags), program=convert.main)
        assert words in said and desk.out.read_text() == "mine"
    monkeypatch.undo()
    assert desk.rows("coco", desk.coco)
    assert "folder train" in desk.failed("coco", desk.coco, "--out", desk.folder / "b", "--test_share", "0.5")


# ---- Referring expressions ----

TEXTS = ["the left dog", "a cup"]
IMAGES = [{"id": n, "file_name": f"{n:03}.png", "width": 200, "height": 150} for n in range(2)]
BOX = [10, 20, 30, 40]
SHAPES = {
    "mdetr": {"images": [{**image, "caption": text + "."} for image, text in zip(IMAGES, TEXTS)],
              "annotations": [annotation(n, n, 1, BOX) for n in range(2)]},
    "annotations": {"images": IMAGES, "annotations": [
        annotation(n, n, 1, BOX, sentences=[{"raw": text, "sent": text}]) for n, text in enumerate(TEXTS)]},
    "refs": {"images": IMAGES, "annotations": [annotation(n + 7, n, 1, BOX) for n in range(2)], "refs": [
        {"ref_id": n, "ann_id": n + 7, "image_id": n, "split": "train", "file_name": f"{n:03}_7.png",
         "sentences": [{"sent": text, "raw": text.upper(), "tokens": text.split()}]}
        for n, text in enumerate(TEXTS)]},
    "list": [{"img_name": "000.png", "bbox": BOX, "sentence": TEXTS[0]},
             {"file_name": "001.png", "bbox": BOX, "sentences": [TEXTS[1]] * 2}],
    "deep list": [{"image": f"/elsewhere/{n:03}.png", "bbox": BOX, "normal_caption": text}
                  for n, text in enumerate(TEXTS)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_expressions_is_read(desk, shape):
    rows = desk.rows("refcoco", SHAPES[shape], *(["--boxes", "xywh"] if "list" in shape else []))
    assert sorted((row["image"], row["problem"], boxes_of(row)) for row in rows) == [
        (f"{n:03}.png", f"Where is {text}?", [[10, 20, 40, 60]]) for n, text in enumerate(TEXTS)]


def test_an_expression_for_two_boxes_and_test_expressions_stay_out(desk):
    entries = [{"image": f"{n:03}.png", "bbox": box, "caption": text, "split": split}
               for n, box, text, split in [
        (0, [1, 1, 40, 40], "man", "train"), (0, [60, 60, 40, 40], "Man.", "train"),
        (1, [1, 1, 40, 40], "man", "train"), (2, [1, 1, 40, 40], "cat", "testA")]]
    assert "testA, train" in desk.failed("refcoco", entries, "--boxes", "xywh")
    rows = desk.rows("refcoco", entries, "--boxes", "xywh", "--split", "train")
    assert [row["image"] for row in rows] == ["001.png"]
    assert "2 x an expression for different boxes" in desk.capsys.readouterr().out


def test_bad_expressions_are_told_at_once_with_their_index(desk):
    good = {"image": "000.png", "bbox": [1, 1, 40, 40], "caption": "man"}
    bad = [{**good, "caption": "<|image_pad|>"}, {**good, "caption": None}, {**good, "caption": ["a", 3]},
           {**good, "bbox": [1, 2, 3], "caption": "cat"}, {**good, "image": "none.png"},
           {**good, "image": {"bytes": ""}}, 5, "{broken", {**good, "caption": "<image>"},
           {"image": "001.png", "caption": "cup"}, {**good, "bbox": "1, 2", "caption": "hat"}]
    file = write_jsonl(desk.folder / "a.jsonl", [good, *bad])
    said = desk.failed("refcoco", file, "--boxes", "xywh")
    assert f"{len(bad)} entries" in said and all(f"[{n}]: " in said for n in range(1, len(bad) + 1))
    assert len(desk.rows("refcoco", file, "--boxes", "xywh", "--skip_bad_rows")) == 1


def test_a_pickle_is_refused_unread(desk):
    class Bomb:
        def __reduce__(self):
            return open, (str(desk.folder / "loaded"), "w")
    for name in ("refs(unc).p", "refs.json"):
        (desk.folder / name).write_bytes(pickle.dumps(Bomb()))
        said = desk.failed("refcoco", desk.folder / name, "--boxes", "xywh")
        assert "pickle" in said and "instances.json" in said and not (desk.folder / "loaded").exists()


# ---- Conventions, rows ----

WRITTEN = {
    "xyxy": lambda x1, y1, x2, y2: [x1, y1, x2, y2],
    "xywh": lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1],
    "fractions": lambda x1, y1, x2, y2: [x1 / 200, y1 / 150, x2 / 200, y2 / 150],
    "thousandths": lambda x1, y1, x2, y2: [x1 * 5, y1 * 1000 / 150, x2 * 5, y2 * 1000 / 150]}


@pytest.mark.parametrize("written", WRITTEN)
def test_boxes_of_every_convention_become_pixels(desk, written):
    flags, change = ("--boxes", written), WRITTEN[written]
    one, two = [20, 15, 60, 45], [100, 30, 180, 140]
    entries = [{"bbox": change(*one), "caption": "a"}, {"bbox": [change(*one), change(*two)], "caption": "b"},
               {"solution": change(*two), "caption": "c"}, {"bbox": [], "caption": "d"},
               {"empty_case": True, "caption": "e"}]
    rows = desk.rows("refcoco", [{"img_path": "000.png"} | entry for entry in entries], *flags)
    assert places(rows) == {f"Where is {text}?": boxes for text, boxes in zip("abcde", (
        [one], [one, two], [two], [], []))}
    box = change(*one)
    rows = [{"image": "000.png", "problem": f"Is {box} the cup?", "solution": "yes", "form": "binary"},
            {"image": "001.png", "problem": "Where is it?", "solution": [{"bbox_2d": box, "label": "cup"}]},
            {"conversations": [{"from": "human", "value": "<image>Where is it?"},
                               {"from": "gpt", "value": str(box)}], "image": "002.png"},
            {"image": "003.png", "messages": [{"role": role, "content": text} for role, text in (
                ("user", "Hi <image>"), ("assistant", "Hi"), ("user", "Where?"), ("assistant", str(box)))]},
            {"problem": "Sum of [1, 2, 3, 4]?", "solution": "10", "task": "math"}]
    desk.rows("rows", rows, "--task", "detection", *flags)
    asked, labelled, chat, long, other = load_examples(desk.out, image_root=desk.root)
    assert asked.problem == "Is [20, 14, 59, 42] the cup?" and asked.form == "binary"  # shown as 196 x 140
    assert "cup" in labelled.solution and len(long.history) == 2
    assert truth_boxes(labelled) == truth_boxes(chat) == truth_boxes(long) == [[20, 14, 59, 42]]
    assert other.problem == rows[-1]["problem"]


def test_corners_are_read_as_corners_only_when_told(desk):
    entries = [{"image": "000.png", "bbox": [120, 90, 180, 140], "caption": "it"}]
    assert "does not say how its boxes are written; say it with --boxes" in desk.failed("refcoco", entries)
    said = desk.failed("refcoco", entries, "--boxes", "xywh")
    assert "[0]: its box [120, 90, 180, 140], read as xywh" in said


def test_the_convention_of_a_files_boxes_is_found_and_never_skipped(desk):
    """Two corners in a COCO file, pixels in YOLO's: what happens to fit as usual is another box."""
    right = {a["id"]: [x, y, x + w, y + h] for a in desk.coco["annotations"] for x, y, w, h in [a["bbox"]]}
    kept = places(desk.rows("coco", desk.coco))
    for annotation in desk.coco["annotations"]:
        annotation["bbox"] = right[annotation["id"]]
    for flags in ((), ("--skip_bad_rows",), ("--boxes", "cxcywh")):
        assert "--boxes xyxy .." in desk.failed("coco", desk.coco, *flags)
    assert places(desk.rows("coco", desk.coco, "--boxes", "xyxy")) == kept
    entries = [{"image": "000.png", "bbox": box, "caption": f"thing {n}"} for n, box in right.items()]
    rows = desk.rows("refcoco", entries, "--per_task", "0")  # a list that does not say
    assert "are read as xyxy" in desk.capsys.readouterr().err
    assert sorted(map(boxes_of, rows)) == [[pytest.approx(box, abs=0.01)] for box in sorted(right.values())]
    names = desk.folder / "data.yaml"
    names.write_text("names: [a]")
    labels = write_all(desk.folder / "labels", {
        f"{n:03}.txt": f"0 {' '.join(map(str, right[n]))}\n" for n in range(20)})
    assert "--boxes xyxy .." in desk.failed("yolo", labels, "--names", names, "--skip_bad_rows")


# ---- YOLO, Pascal VOC ----

def write_all(folder, files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_yolo_labels_are_read_with_centers_sizes_and_polygons(desk):
    names = desk.folder / "data.yaml"
    labels = write_all(desk.folder / "labels", {
        "000.txt": "0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5\n",
        "001.txt": "2 0.25 0.5 0.5 0.5\r\n", "002.txt": "", "classes.txt": "dog\ncup\nboat\n"})
    for text in ("[dog, cup, boat]", "{0: dog, 1: cup, 2: boat}"):
        names.write_text(f"path: ..\nnames: {text}\n")
        rows = desk.rows("yolo", labels, "--names", names)
        assert places(rows) == {"Where is the dog?": [[80, 45, 120, 105]],
                                "Where is the cup?": [[20, 15, 60, 75]],
                                "Where is the boat?": [[0, 37.5, 100, 112.5]]}
        assert Counter(row["task"] for row in rows) == {"detection": 3, "math": 3, "classify": 2}
    pose = write_all(desk.folder / "pose", {"000.txt": "0 0.5 0.5 0.2 0.4 " + "0.1 0.1 " * 4 + "\n", "001.txt":
                                            "1 0.25 0.5 0.5 0.5 " + "0.9 0.9 " * 4 + "\n"})
    (desk.folder / "pose.yaml").write_text("names: [dog, cup, boat]\nkpt_shape: [4, 2]\n")
    assert places(desk.rows("yolo", pose, "--names", desk.folder / "pose.yaml"))[
        "Where is the dog?"] == [[80, 45, 120, 105]], "points of a pose are no polygon"
    write_all(labels, {"003.txt": "0 0.5 0.5\n7 0.5 0.5 0.2 0.4\nx y\n0 0.9 0.5 0.4 0.4\n", "none.txt": ""})
    said = desk.failed("yolo", labels, "--names", names)
    for words in ("none.txt: no image none", "003.txt:1: it is neither", "003.txt:2: its class 7",
                  "003.txt:3: its class x", "003.txt:4: its box"):
        assert words in said
    names.write_text("nc: 3\n")
    assert "has no names" in desk.failed("yolo", labels, "--names", names)


def voc_xml(*things):
    text = ""
    for name, hard, box in things:
        corners = "".join(f"<{key}>{n}</{key}>" for key, n in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox>{corners}</bndbox></object>"
    return f"<annotation>{text}</annotation>"


def test_voc_counts_pixels_from_one_and_leaves_difficult_objects_out(desk):
    folder = write_all(desk.folder / "Annotations", {
        "000.xml": voc_xml(("dog", 0, (1, 1, 200, 150)), ("cup", 1, (10, 10, 60, 60))),
        "001.xml": voc_xml(("boat", 0, ("11", "21.5", 60, 80))),
        "002.xml": voc_xml(("boat", 0, (10, 10, 60, 60)))})
    (desk.folder / "val.txt").write_text("000  1\n001 -1\n")
    rows = desk.rows("voc", folder, "--list", desk.folder / "val.txt")
    assert places(rows) == {"Where is the dog?": [[0, 0, 200, 150]],
                            "Where is the boat?": [[10, 20.5, 60, 80]]}
    assert {answer_of(row["solution"]) for row in rows if row["task"] == "classify"} == {"cup, dog", "boat"}
    write_all(folder, {"003.xml": '<!DOCTYPE a [<!ENTITY a "aaaa">]>' + voc_xml(("&a;", 0, (1, 1, 9, 9))),
                       "004.xml": "<annotation>",
                       "005.xml": voc_xml(("dog", 0, (1, 1, 900, 9)), ("dog", 0, (1,)))})
    said = desk.failed("voc", folder)
    for words in ("003.xml: it cannot be read as XML (it defines", "004.xml: it cannot be read as XML",
                  "005.xml, object 1: its box", "005.xml, object 2: its box"):
        assert words in said
    assert "no folder" in desk.failed("voc", desk.folder / "none")


# ---- Parquet ----

def test_parquet_needs_the_users_pyarrow_and_makes_files_of_pictures(desk, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in desk.failed("parquet", Path("x.parquet"))
    content = (desk.root / "000.png").read_bytes()
    table = [{"image": {"bytes": content, "path": None}, "problem": "米?", "solution": "1"},
             {"images": [content, {"bytes": content, "path": "a"}], "problem": "?", "solution": "1"}]
    batch = types.SimpleNamespace(to_pylist=lambda: table)
    file = types.SimpleNamespace(iter_batches=lambda size: [batch])
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=lambda path: file))
    assert convert.main(desk.arguments("parquet", Path("x.parquet"), [])) == 0
    one, two = load_examples(desk.out, image_root=desk.root, task="math")
    assert one.problem == "米?" and two.images == one.images * 2, "one picture, one file"
    assert Path(one.images[0]).read_bytes() == content
    photos = [desk.root / f"{n}.png" for n in range(12)]
    for n, photo in enumerate(photos):
        Image.new("RGB", (56, 56), (n, n, n)).save(photo)
    table[:] = [{"image": {"bytes": photo.read_bytes(), "path": None}, "problem": str(n), "solution": "1"}
                for photo in photos for n in range(4)]
    assert convert.main(desk.arguments("parquet", Path("x.parquet"), ["--test_share", 0.4, "--force"])) == 0
    train, test = ({row["image"] for row in rows_of(path)} for path in (desk.out, desk.test))
    assert train and test and not train & test, "all questions of a photo are in one"
    table.append({"image": {"bytes": b"none", "path": None}})
    assert "x.parquet:49: image in it cannot be decoded" in desk.failed("parquet", Path("x.parquet"))
