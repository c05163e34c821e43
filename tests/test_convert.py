"""Tests of tools/convert.py. Each name says the defect that it keeps out."""

import json
import pickle
import random
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

NAMES = ["dog", "traffic light", "cup", "person", "boat"]
WRITTEN = {"xyxy": lambda x1, y1, x2, y2: [x1, y1, x2, y2],
           "xywh": lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1],
           "fractions": lambda x1, y1, x2, y2: [x1 / 200, y1 / 150, x2 / 200, y2 / 150],
           "thousandths": lambda x1, y1, x2, y2: [x1 * 5, y1 / 0.15, x2 * 5, y2 / 0.15]}


class Folder:
    """A folder with 24 images of 200 x 150, and a COCO dict: 1 to 3 of five kinds in each image."""

    def __init__(self, path, capsys):
        self.path, self.root, self.out = path, path / "images", path / "train" / "open.jsonl"
        self.capsys, rng, images, annotations = capsys, random.Random(0), [], []
        for n in range(24):
            tiny_image(self.root / f"{n:03}.png", (200, 150), box=(10, 10, 60, 60))
            images.append({"id": n, "file_name": f"{n:03}.png", "width": 200, "height": 150})
            for kind in rng.sample(range(5), 1 + n % 3) if n else [0]:
                box = [rng.uniform(0, 120), rng.uniform(0, 80), rng.uniform(30, 70), 40.25]
                annotations.append(annotation(len(annotations), n, kind, box))
        self.coco = {"images": images, "annotations": annotations,
                     "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES)]}

    def command(self, name, value, *flags):
        """The command's arguments; `value`: a path, the object of a JSON file, or JSONL's list."""
        if isinstance(value, list):
            value = write_jsonl(self.path / "a.jsonl", value)
        elif isinstance(value, dict):
            (self.path / "a.json").write_text(json.dumps(value))
            value = self.path / "a.json"
        return [str(x) for x in (name, value, "--image_root", self.root, "--out", self.out, *flags)]

    def run(self, *arguments):
        """The rows that a command writes, of which training can derive all forms."""
        assert convert.main(self.command(*arguments, "--force")) == 0
        examples = load_examples(self.out, image_root=self.root, task="math")
        assert all(derive_all(examples, form) for form in ("binary", "choice"))
        return rows_of(self.out)

    def refused(self, *arguments):
        """What a command says that writes nothing."""
        before = {*self.path.rglob("*"), self.path / "a.json", self.path / "a.jsonl"}
        said = refused(self.capsys, self.command(*arguments), program=convert.main)
        assert {*self.path.rglob("*")} <= before
        return said


@pytest.fixture
def folder(tmp_path, capsys):
    return Folder(tmp_path, capsys)


def annotation(number, image, kind, box, crowd=0):
    return {"id": number, "image_id": image, "category_id": kind, "bbox": box, "iscrowd": crowd}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def boxes_of(row):
    return [list(box) for box in parse_boxes(answer_of(row["solution"]))]


def places(rows):
    return {row["problem"]: boxes_of(row) for row in rows if row["task"] == "detection"}


def test_coco_rows_have_the_boxes_and_labels_of_the_file(folder):
    truth = {(f"{a['image_id']:03}.png", NAMES[a["category_id"]]): a["bbox"]
             for a in folder.coco["annotations"]}
    rows = folder.run("coco", folder.coco)
    assert {row["task"] for row in rows} == {"detection", "classify", "math"}
    for row in rows:
        if row["task"] == "detection":
            x, y, w, h = truth[row["image"], row["problem"][len("Where is the "):-1]]
            assert boxes_of(row) == [pytest.approx([x, y, x + w, y + h], abs=0.01)]
        if row["task"] == "classify":
            shown = {name for image, name in truth if image == row["image"]}
            assert {*parse_labels(answer_of(row["solution"]))} == shown


def test_all_boxes_of_a_kind_are_asked_for_and_counted_but_a_crowd_is_not(folder):
    folder.coco["annotations"] = [annotation(n, *rest) for n, rest in enumerate((
        (0, 0, [-0.5, 0, 40.123456, 150.7]), (0, 0, [50, 0, 40, 40]), (0, 3, [0, 60, 40, 40]),
        (0, 3, [0, 50, 150, 90], 1), (0, 2, [100, 100, 3, 3]), (1, 4, [9, 9, 50, 50])))]
    rows = [row for row in folder.run("coco", folder.coco) if row["image"] == "000.png"]
    assert places(rows) == {"Where is every dog?": [[0, 0, 39.62, 150], [50, 0, 90, 40]]}
    (counted,) = (row for row in rows if row["task"] != "detection")    # the cup is tiny
    assert counted["problem"] == 'How many objects of the kind "dog" are in the image?'
    assert counted["solution"] == "<answer>2</answer>"


def rotate(path, image):
    """A photo that is stored lying and shown upright: annotated lying, its boxes are elsewhere."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (200, 150), "white").save(path.with_suffix(".jpg"), exif=exif)
    image["file_name"] = "000.jpg"


WARTS = {  # what is done to (path of the first image, COCO dict, its first of each list) -> words
    "missing image": (lambda p, v, i, a, c: p.unlink(), "annotations[0]: no image 000.png"),
    "other size": (lambda p, v, i, a, c: i.update(width=400), "200 x 150 pixels, but annotated as"),
    "rotated": (lambda p, v, i, a, c: rotate(p, i), "is upright 150 x 200"),
    "no picture": (lambda p, v, i, a, c: p.write_bytes(b"no"), "cannot be decoded"),
    "outside": (lambda p, v, i, a, c: i.update(file_name="../000.png"), "no image ../000.png"),
    "empty box": (lambda p, v, i, a, c: a.update(bbox=[5, 5, 0, 9]), "annotations[0]: its box [5"),
    "NaN": (lambda p, v, i, a, c: a.update(bbox=[float("nan"), 2, 3, 4]), "not four finite"),
    "no category": (lambda p, v, i, a, c: a.update(category_id=99), "annotations[0]: it is not as"),
    "special token": (lambda p, v, i, a, c: c.update(name="dog<|im_end|>"), "<|im_end|>"),
    "tag": (lambda p, v, i, a, c: c.update(name="dog</answer>"), "</answer>")}


@pytest.mark.parametrize("wart", WARTS)
def test_a_bad_entry_is_told_with_its_index_or_spoils_its_image(folder, wart):
    spoil, words = WARTS[wart]
    spoil(folder.root / "000.png", folder.coco, *(
        folder.coco[name][0] for name in ("images", "annotations", "categories")))
    said = folder.refused("coco", folder.coco)
    assert words in said and "a.json: " in said and "--skip_bad_rows" in said
    assert len(set(said.splitlines())) == len(said.splitlines()), "an image's fault is told once"
    rows = folder.run("coco", folder.coco, "--skip_bad_rows")
    assert "dropped" in folder.capsys.readouterr().err
    assert rows and not [row for row in rows if "000" in row["image"]], "it is not whole any more"


def test_a_file_that_is_none_of_coco_is_a_sentence(folder):
    doubled = [{**folder.coco, name: [*entries, entries[0]]}
               for name, entries in folder.coco.items()]
    nothing = {"images": [], "annotations": [], "categories": []}
    assert "gives no train rows" in folder.refused("coco", nothing)
    for value in doubled:
        assert "have the id of another" in folder.refused("coco", value)
    for value in ({"images": []}, {**nothing, "annotations": [5]}, [{"a": 1}, {"a": 2}]):
        assert "is not as its format has it" in folder.refused("coco", value)


def test_a_pickle_is_refused_unread(folder):
    class Bomb:
        def __reduce__(self):
            return open, (str(folder.path / "loaded"), "w")
    for name in ("refs(unc).p", "refs.json"):
        (folder.path / name).write_bytes(pickle.dumps(Bomb()))
        assert "A pickle is not read" in folder.refused("refcoco", folder.path / name)


def test_labels_that_a_look_is_not_needed_for_or_no_answer_could_name_are_not_asked(folder):
    folder.coco["categories"][4]["name"] = "bat (animal), dark"
    folder.coco["annotations"] = [annotation(n, 1, n, [10 * n, 9, 50, 50]) for n in range(4)] + [
        annotation(8, 2, 1, [0, 0, 200, 150]), annotation(9, 3, 4, [9, 9, 50, 50])]
    rows = folder.run("coco", folder.coco)
    assert [row["image"] for row in rows if row["task"] == "classify"] == []    # 1 shows all of 2's
    folder.coco["annotations"] += [annotation(10, 4, 2, [9, 9, 50, 50])]
    rows = folder.run("coco", folder.coco)
    assert {row["image"] for row in rows if row["task"] == "classify"} == {"002.png", "004.png"}


def test_no_photo_and_no_version_of_one_is_in_train_and_test(folder):
    """Roboflow writes NAME_jpg.rf.HASH.jpg: 266 of 275 test images had a twin in training."""
    for n, image in enumerate(folder.coco["images"]):
        image["file_name"] = f"photo{n // 3}_png.rf.{n:032x}.png"
        (folder.root / f"{n:03}.png").rename(folder.root / image["file_name"])
    entries = [{"image": image["file_name"], "bbox": [9, 9, 40, 40], "caption": "it"}
               for image in folder.coco["images"]]
    asked = [{"image": entry["image"], "problem": "?", "solution": "1"} for entry in entries]
    asked.append({"images": [entry["image"] for entry in entries], "problem": "?", "solution": "1"})
    test, sides = folder.path / "test" / "open.jsonl", []
    for name, value, *flags in (["coco", folder.coco], ["refcoco", entries, "--boxes", "xywh"],
                                ["rows", asked, "--task", "math", "--boxes", "xywh"]):
        sides.append([{row["image"].partition(".rf.")[0] for row in rows} for rows in (
            folder.run(name, value, "--test_share", 0.4, *flags), rows_of(test))])
    assert all(side == sides[0] for side in sides), "whatever file names it"
    assert all(sides[0]) and not sides[0][0] & sides[0][1]


def test_a_seed_gives_the_same_rows_and_frequent_classes_do_not_fill_the_file(folder):
    folder.coco["annotations"] = [
        annotation(n, n, 0 if n < 20 else n % 4 + 1, [9, 9, 50, 50]) for n in range(24)]
    one, same, other = (folder.run("coco", folder.coco, "--seed", seed, "--per_task", 5)
                        for seed in (0, 0, 1))
    assert one == same != other
    assert Counter(row["task"] for row in one) == {"detection": 5, "math": 5, "classify": 5}
    assert len(places(one)) == 5, "each kind once"


def test_a_file_that_exists_is_kept_unless_forced_and_whole(folder, monkeypatch):
    folder.run("coco", folder.coco)
    folder.out.write_text("mine")
    assert "--force" in folder.refused("coco", folder.coco)

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert convert.main(folder.command("coco", folder.path / "a.json", "--force")) == 2
    assert folder.out.read_text() == "mine" and folder.run("coco", folder.coco)
    folder.out = folder.path / "b.jsonl"
    assert "folder train" in folder.refused("coco", folder.coco, "--test_share", 0.5)


SAID, BOX = ["the left dog", "a cup."], [10, 20, 30, 40]
IMAGES = [{"id": n, "file_name": f"{n:03}.png"} for n in range(2)]
SHAPES = {
    "mdetr": {"images": [{**image, "caption": text} for image, text in zip(IMAGES, SAID)],
              "annotations": [annotation(n, n, 1, BOX) for n in range(2)]},
    "refs": {"images": IMAGES, "annotations": [annotation(n + 7, n, 1, BOX) for n in range(2)],
             "refs": [{"ann_id": n + 7, "image_id": n, "file_name": f"{n}_7.png", "split": "train",
                       "sentences": [{"sent": text}]} for n, text in enumerate(SAID)]},
    "list": [{"img_name": "000.png", "bbox": BOX, "sentence": SAID[0]},
             {"file_name": "001.png", "bbox": BOX, "sentences": ["a cup", "a cup"]}],
    "elsewhere": [{"image": f"/elsewhere/{n:03}.png", "bbox": [BOX], "normal_caption": text}
                  for n, text in enumerate(SAID)]}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_expressions_is_read(folder, shape):
    told = [] if isinstance(SHAPES[shape], dict) else ["--boxes", "xywh"]
    rows = folder.run("refcoco", SHAPES[shape], *told)
    assert sorted((row["image"], row["problem"], boxes_of(row)) for row in rows) == [
        ("000.png", "Where is the left dog?", [[10, 20, 40, 60]]),
        ("001.png", "Where is a cup?", [[10, 20, 40, 60]])]


def test_an_expression_for_two_boxes_and_test_expressions_stay_out(folder):
    entries = [{"image": image, "bbox": [place, 1, 40, 40], "caption": text, "split": split}
               for image, place, text, split in (
                   ("000.png", 1, "man", "train"), ("000.png", 60, "Man.", "train"),
                   ("001.png", 1, "man", "train"), ("002.png", 1, "cat", "testA"))]
    assert "testA, train" in folder.refused("refcoco", entries, "--boxes", "xywh")
    (row,) = folder.run("refcoco", entries, "--boxes", "xywh", "--split", "train")
    assert row["image"] == "001.png"


def test_bad_expressions_are_told_at_once_with_their_line(folder):
    good = {"image": "000.png", "bbox": [1, 1, 40, 40], "caption": "man"}
    bad = [5, "{broken", *({**good, **more} for more in (
        {"caption": "<|image_pad|>"}, {"caption": None}, {"caption": ["a", 3]}, {"bbox": [1, 2, 3]},
        {"image": "none.png"}, {"image": {"bytes": ""}}, {"caption": "<image>"}, {"bbox": None}))]
    said = folder.refused("refcoco", [good, *bad], "--boxes", "xywh")
    assert f"{len(bad)} entries" in said
    assert all(f"a.jsonl:{n}: " in said for n in range(2, len(bad) + 2))


@pytest.mark.parametrize("written", WRITTEN)
def test_boxes_of_every_convention_become_pixels(folder, written):
    truth = [[20, 15, 60, 45], [100, 30, 180, 140], [60, 60, 140, 120]]
    entries = [{"image": f"{n:03}.png", "bbox": WRITTEN[written](*box), "caption": f"cup {n}"}
               for n, box in enumerate(truth)]
    rows = folder.run("refcoco", entries, "--boxes", written)
    assert sorted(map(boxes_of, rows)) == sorted([box] for box in truth)
    box = WRITTEN[written](20, 15, 60, 45)
    rows = [{"image": "000.png", "problem": f"Is {box} it?", "solution": "yes", "form": "binary"},
            {"image": "001.png", "problem": "?", "solution": [{"bbox_2d": box, "label": "cup"}]},
            {"image": "002.png", "conversations": [{"from": "human", "value": "<image>Where?"},
                                                   {"from": "gpt", "value": str(box)}]},
            {"problem": "Sum of [1, 2, 3, 4]?", "solution": "10", "task": "math"}]
    assert convert.main(folder.command(
        "rows", rows, "--boxes", written, "--task", "detection", "--force")) == 0
    asked, labelled, chat, other = load_examples(folder.out, image_root=folder.root)
    assert asked.problem == "Is [20, 14, 59, 42] it?" and asked.form == "binary"  # at 196 x 140
    assert "cup" in labelled.solution and other.problem == rows[3]["problem"]
    assert truth_boxes(labelled) == truth_boxes(chat) == [[20, 14, 59, 42]]


def test_a_wrong_convention_is_told_even_when_bad_rows_are_skipped(folder):
    entries = [{"image": f"{n:03}.png", "bbox": [9, 9, 50 + 4 * n, 60], "caption": "it"}
               for n in range(24)]
    rows = [{"image": entry["image"], "problem": "Where is it?", "solution": [entry["bbox"]],
             "task": "detection"} for entry in entries]
    assert "say it with --boxes" in folder.refused("refcoco", entries)
    corners = [{**entry, "bbox": [80, 90, 99 + entry["bbox"][2] % 99, 140]} for entry in entries]
    for name, value, said in (("refcoco", corners, "xywh"), ("rows", rows, "fractions")):
        told = folder.refused(name, value, "--boxes", said, "--skip_bad_rows")
        assert f"read as {said}, is empty or leaves the image" in told and "--boxes" in told


def test_yolo_labels_are_read_with_centers_sizes_and_polygons(folder):
    labels, names = folder.path / "labels", folder.path / "data.yaml"
    polygon = "1 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"
    texts = f"0 0.5 0.5 0.2 0.4\n{polygon}\n", "2 0.25 0.5 0.5 0.5\r\n", ""
    labels.mkdir()
    for n, text in enumerate(texts):
        (labels / f"{n:03}.txt").write_text(text)
    for text in ("names: [dog, cup, boat]", "names: {0: dog, 1: cup, 2: boat}"):
        names.write_text(text)
        rows = folder.run("yolo", labels, "--names", names)
        assert places(rows) == {"Where is the dog?": [[80, 45, 120, 105]],
                                "Where is the cup?": [[20, 15, 60, 75]],
                                "Where is the boat?": [[0, 37.5, 100, 112.5]]}
    folder.out.unlink()
    bad = {"3": "0 0.5 0.5", "4": "7 0.5 0.5 0.2 0.4", "5": "0 x 0.5 0.4 0.4",
           "6": "0 0.5 0.5 0.2 0.4 0.9", "7": "0 0.9 0.5 0.4 0.4"}   # a score; outside
    for n, text in bad.items():
        (labels / f"00{n}.txt").write_text(text)
    said = folder.refused("yolo", labels, "--names", names)
    assert all(f"00{n}.txt: " in said for n in bad) and "its box [0.7" in said
    names.write_text("nc: 3\n")
    assert "names" in folder.refused("yolo", labels, "--names", names)


def xml(*things):
    return "<annotation>" + "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>"
        f"{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, hard, (x1, y1, x2, y2) in things) + "</annotation>"


def test_voc_counts_pixels_from_one_and_leaves_difficult_objects_out(folder):
    notes, listed, boat = folder.path / "Annotations", folder.path / "val.txt", (11, 21.5, 60, 80)
    notes.mkdir()
    listed.write_text("000  1\n001 -1\n")
    bomb = '<!DOCTYPE a [<!ENTITY a0 "aaaaaaaaaa">' + "".join(
        f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9)) + "]>"
    for n, text in enumerate((
            xml(("dog", 0, (1, 1, 200, 150)), ("cup", 1, (10, 10, 60, 60))), xml(("boat", 0, boat)),
            xml(("boat", 0, boat)), bomb + xml(("&a9;", 0, boat)), "<annotation>",
            xml(("dog", 0, (1, 1, 900, 9))), xml(("dog", 0, (1, 1, "", 9))))):
        (notes / f"{n:03}.xml").write_text(text)
    rows = folder.run("voc", notes, "--list", listed)
    assert places(rows) == {"Where is the dog?": [[0, 0, 200, 150]],
                            "Where is the boat?": [[10, 20.5, 60, 80]]}
    assert {answer_of(row["solution"]) for row in rows if row["task"] == "classify"} == {
        "cup, dog", "boat"}
    folder.out.unlink()
    said = folder.refused("voc", notes)
    assert all(f"00{n}.xml: " in said for n in (3, 4, 5, 6)) and "002.xml" not in said


def test_parquet_needs_the_users_pyarrow_and_makes_files_of_pictures(folder, monkeypatch):
    source, folder.root = folder.root, folder.path / "new"
    pictures = [path.read_bytes() + bytes(n) for n, path in enumerate(source.iterdir())]
    table = [{"image": {"bytes": picture, "path": None}, "problem": "米?", "solution": f"{n}"}
             for n in range(2) for picture in pictures]
    batch = types.SimpleNamespace(to_pylist=lambda: table)
    module = types.ModuleType("pyarrow.parquet")
    module.ParquetFile = lambda path: types.SimpleNamespace(iter_batches=lambda size: [batch])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in folder.refused("parquet", "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    table.append({"image": {"bytes": b"none", "path": None}})
    assert "x.parquet:49: image in it cannot be decoded" in folder.refused("parquet", "x.parquet")
    table.pop()
    train = [row["image"] for row in folder.run("parquet", "x.parquet", "--test_share", 0.5)]
    test = [row["image"] for row in rows_of(folder.path / "test" / "open.jsonl")]
    assert len(train + test) == 48 and not {*train} & {*test}
    assert {path.read_bytes() for path in folder.root.iterdir()} == {*pictures}
    table[:] = [{"images": [pictures[0], {"bytes": pictures[0], "path": "a"}], "problem": "?",
                 "solution": "1"}]
    assert len(set(folder.run("parquet", "x.parquet")[0]["images"])) == 1, "one picture, one file"
