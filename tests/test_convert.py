"""Tests of convert.py. Each name says the defect that it keeps out."""

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
from support.answers import parse_boxes, parse_labels, truth_of
from support.tiny import tiny_image, write_jsonl


def run(*arguments):
    assert convert.main([str(argument) for argument in arguments]) == 0


def failed(capsys, *arguments):
    return refused(capsys, arguments, program=convert.main)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


@pytest.fixture
def instances(tmp_path):
    """(folder of images, COCO dict): 24 images of 200 x 150 with up to three of five categories, boxes of floats."""
    rng, images, annotations = random.Random(0), [], []
    names = ["dog", "traffic light", "cup", "person", "boat"]
    for n in range(24):
        tiny_image(tmp_path / "images" / f"{n:03}.png", (200, 150), box=(10, 10, 60, 60))
        images.append({"id": n, "file_name": f"{n:03}.png", "width": 200, "height": 150})
        for category in rng.sample(range(5), 1 + n % 3) if n else [0]:
            x, y = rng.uniform(0, 120), rng.uniform(0, 80)
            annotations.append(annotation(len(annotations), n, category, [x, y, rng.uniform(30, 70), 40.25]))
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    return tmp_path / "images", {"images": images, "annotations": annotations, "categories": categories}


def save(folder, value):
    path = folder / "instances.json"
    path.write_text(json.dumps(value))
    return path


def boxes_of(solution):
    return [list(box) for box in parse_boxes(answer_of(solution))]


def labels_in(solution):
    return parse_labels(answer_of(solution))


def derived_all(path, root):
    """Examples of a file as training reads them, after all three forms were derived as training derives them."""
    examples = load_examples(path, image_root=root)
    for form in ("binary", "choice"):
        assert {example.form for example in derive_all(examples, form)} == {form}
    return examples


# ---- COCO ----

def test_coco_rows_load_and_have_all_three_forms(tmp_path, instances, capsys):
    root, value = instances
    file, out = save(tmp_path, value), tmp_path / "train" / "open.jsonl"
    run("coco", file, "--image_root", root, "--out", out)
    examples = derived_all(out, root)
    assert set(Counter(e.task for e in examples)) == {"detection", "classify", "math"}
    said = capsys.readouterr().out
    assert f"python -m tools.pictures examples {out} --image_root {root}" in said and "24 classify" in said
    truth = {(f"{a['image_id']:03}.png", value["categories"][a["category_id"]]["name"]): a["bbox"]
             for a in value["annotations"]}
    for row in rows_of(out):
        if row["task"] == "detection":
            x, y, w, h = truth[row["image"], row["problem"].removeprefix("Where is the ").rstrip("?")]
            (box,) = boxes_of(row["solution"])
            assert box == pytest.approx([x, y, x + w, y + h], abs=0.01), "original pixels, two corners"
        if row["task"] == "classify":
            shown = {name for image, name in truth if image == row["image"]}
            assert set(labels_in(row["solution"])) == shown


def test_all_boxes_of_a_kind_are_asked_for_and_counted_but_a_crowd_is_not(tmp_path, instances):
    root, value = instances
    value["annotations"] = [annotation(0, 0, 0, [0, 0, 40, 40]), annotation(1, 0, 0, [50, 0, 40, 40]),
                            annotation(2, 0, 3, [0, 60, 40, 40]), annotation(3, 0, 3, [0, 50, 150, 90], iscrowd=1),
                            annotation(4, 0, 2, [100, 100, 3, 3]), annotation(5, 1, 4, [9, 9, 50, 50])]
    run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl")
    rows = {(row["image"], row["problem"]): row["solution"] for row in rows_of(tmp_path / "open.jsonl")}
    assert boxes_of(rows.pop(("000.png", "Where is every dog?"))) == [[0, 0, 40, 40], [50, 0, 90, 40]]
    assert rows.pop(("000.png", 'How many objects of the kind "dog" are in the image?')) == "<answer>2</answer>"
    assert {problem for image, problem in rows if image == "000.png"} == set(), "person is a crowd, the cup tiny"


WARTS = {
    "missing image": (lambda v, root: (root / "000.png").unlink(), "images[0]: no image 000.png"),
    "other size": (lambda v, root: v["images"][0].update(width=100, height=150), "leaves the image of 100 x 150"),
    "size of no image": (lambda v, root: v["images"][0].update(width=400, height=300), "is upright 200 x 150"),
    "rotated": (lambda v, root: rotate(root / "000.jpg", v["images"][0]), "is upright 150 x 200"),
    "no size": (lambda v, root: v["images"][0].pop("width"), "no width and height"),
    "a pixel high": (lambda v, root: Image.new("RGB", (200, 1)).save(root / "000.png"), "is 200 x 1"),
    "no picture": (lambda v, root: (root / "000.png").write_bytes(b"no"), "cannot be decoded"),
    "outside": (lambda v, root: (root.parent / "x.png").write_bytes((root / "000.png").read_bytes())
                and v["images"][0].update(file_name="../x.png"), "no image ../x.png"),
    "zero-size box": (lambda v, root: v["annotations"][0].update(bbox=[5, 5, 0, 9]), "annotations[0]: its box [5, 5"),
    "box outside": (lambda v, root: v["annotations"][0].update(bbox=[150, 5, 60, 60]), "leaves the image"),
    "box of text": (lambda v, root: v["annotations"][0].update(bbox="[1, 2, 3, 4]"), "not four finite numbers"),
    "NaN box": (lambda v, root: v["annotations"][0].update(bbox=[float("nan"), 2, 3, 4]), "not four finite numbers"),
    "unknown category": (lambda v, root: v["annotations"][0].update(category_id=99), "category_id is 99"),
    "unknown image": (lambda v, root: v["annotations"][0].update(image_id=[1]), "image_id is [1]"),
    "annotation twice": (lambda v, root: v["annotations"].append(v["annotations"][0]), "its id 0 is that of"),
    "image twice": (lambda v, root: v["images"][1].update(id=0), "images[1]: its id 0 is that of images[0]"),
    "category twice": (lambda v, root: v["categories"][1].update(id=0), "categories[1]: its id 0"),
    "no object": (lambda v, root: v["annotations"].append(7), "not a JSON object"),
    "hostile name": (lambda v, root: v["categories"][0].update(name="dog<|im_end|>"), "<|im_end|>"),
    "answer in a name": (lambda v, root: v["categories"][0].update(name="dog</answer>"), "</answer>"),
}


def rotate(path, entry):
    """A photo that is stored lying and shown upright: annotated lying, its boxes would be elsewhere."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (200, 150), "white").save(path, exif=exif)
    entry["file_name"] = path.name


@pytest.mark.parametrize("wart", WARTS)
def test_a_bad_entry_is_told_with_its_index_or_spoils_its_image(tmp_path, instances, capsys, wart):
    root, value = instances
    spoil, words = WARTS[wart]
    spoil(value, root)
    file, out = save(tmp_path, value), tmp_path / "open.jsonl"
    said = failed(capsys, "coco", file, "--image_root", root, "--out", out)
    assert words in said and str(file) in said and "--skip_bad_rows" in said and not out.exists()
    assert len(set(said.splitlines())) == len(said.splitlines()), "an image's fault is told once"
    run("coco", file, "--image_root", root, "--out", out, "--skip_bad_rows")
    assert "dropped" in capsys.readouterr().err
    derived_all(out, root)
    if wart not in ("no object", "unknown image"):
        assert not [row for row in rows_of(out) if "000" in row["image"]], "what is left of the image is not all of it"
    assert [row for row in rows_of(out) if row["image"] == "005.png"] or "category" in wart or "name" in wart


def test_a_pixel_of_rounding_is_clipped_not_refused(tmp_path, instances):
    root, value = instances
    value["annotations"] = [annotation(n, n, n % 5, [-0.5, 60, 80.123456, 90.7]) for n in range(10)]
    run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl")
    boxes = [boxes_of(r["solution"]) for r in rows_of(tmp_path / "open.jsonl") if r["task"] == "detection"]
    assert boxes == [[[0, 60, 79.62, 150]]] * 10


def test_an_image_that_shows_every_label_is_not_asked_for_its_labels(tmp_path, instances, capsys):
    root, value = instances
    value["annotations"] = [annotation(0, 0, 0, [0, 0, 200, 150])] + [
        annotation(n + 1, 1, n, [10 * n, 10 * n, 50, 50]) for n in range(5)] + [annotation(9, 2, 1, [9, 9, 50, 50])]
    run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl")
    rows = rows_of(tmp_path / "open.jsonl")
    assert not [row for row in rows if row["image"] == "001.png" and row["task"] == "classify"]
    assert "1 x classify without a possible wrong answer" in capsys.readouterr().out
    derived_all(tmp_path / "open.jsonl", root)           # a box as large as the image among them
    value["annotations"] = [annotation(n, n, 0, [9, 9, 50, 50]) for n in range(9)]      # one label alone
    run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl", "--force")
    assert {row["task"] for row in rows_of(tmp_path / "open.jsonl")} == {"detection", "math"}
    derived_all(tmp_path / "open.jsonl", root)


def test_labels_that_an_answer_could_not_name_are_not_asked_for(tmp_path, instances):
    root, value = instances
    value["categories"][0]["name"] = "bat (animal), dark"
    run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl")
    asked = [row["solution"] for row in rows_of(tmp_path / "open.jsonl") if row["task"] == "classify"]
    assert asked and not [solution for solution in asked if "bat" in solution]
    derived_all(tmp_path / "open.jsonl", root)


@pytest.mark.parametrize("value, words", [
    ([], "no instances file"), ({"images": []}, "no instances file"),
    ({"images": [], "annotations": [], "categories": []}, "no train rows"),
    ({"images": [{"neg_category_ids": []}], "annotations": [], "categories": []}, "LVIS")])
def test_a_file_without_annotations_is_a_sentence(tmp_path, capsys, value, words):
    said = failed(capsys, "coco", save(tmp_path, value), "--image_root", tmp_path, "--out", tmp_path / "open.jsonl")
    assert words in said and not (tmp_path / "open.jsonl").exists()


# ---- Choosing and writing ----

def test_no_image_is_in_train_and_test(tmp_path, instances):
    root, value = instances
    out = tmp_path / "train" / "open.jsonl"
    run("coco", save(tmp_path, value), "--image_root", root, "--out", out, "--test_share", "0.4")
    train, test = ({row["image"] for row in rows_of(path)} for path in (out, tmp_path / "test" / "open.jsonl"))
    assert train and test and not train & test
    write_jsonl(tmp_path / "refs.jsonl", [{"image": f"{n:03}.png", "bbox": [9, 9, 40, 40], "caption": f"red box {n}"}
                                          for n in range(24)])
    run("refcoco", "--boxes", "xywh", tmp_path / "refs.jsonl", "--image_root", root, "--out", tmp_path / "train" / "refs.jsonl",
        "--test_share", "0.4")
    assert not train & {row["image"] for row in rows_of(tmp_path / "test" / "refs.jsonl")}, "whatever file names it"


def test_a_seed_gives_the_same_rows_and_frequent_classes_do_not_fill_the_file(tmp_path, instances):
    root, value = instances
    value["annotations"] = [annotation(n, n, 0 if n < 20 else n % 4 + 1, [9, 9, 50, 50]) for n in range(24)]
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / name, "--seed", seed,
            "--per_task", 5)
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]
    rows = rows_of(tmp_path / "a")
    assert Counter(row["task"] for row in rows) == {"detection": 5, "math": 5, "classify": 5}
    assert Counter(row["problem"] for row in rows if row["task"] == "detection")["Where is the dog?"] == 1


def test_a_file_that_exists_is_kept_unless_forced_and_whole(tmp_path, instances, capsys, monkeypatch):
    root, value = instances
    file, out = save(tmp_path, value), tmp_path / "open.jsonl"
    out.write_text("mine")
    assert "--force" in failed(capsys, "coco", file, "--image_root", root, "--out", out) and out.read_text() == "mine"


    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(convert.Path, "rename", full)
    assert "No space left" in failed(capsys, "coco", file, "--image_root", root, "--out", out, "--force")
    assert out.read_text() == "mine"
    monkeypatch.undo()
    run("coco", file, "--image_root", root, "--out", out, "--force")
    assert rows_of(out)
    assert "folder train" in failed(capsys, "coco", file, "--image_root", root, "--out", tmp_path / "b.jsonl",
                                    "--test_share", "0.5")


# ---- Referring expressions ----

def images_of(root, *captions):
    return [{"id": n, "file_name": f"{n:03}.png", "width": 200, "height": 150, **({"caption": text} if text else {})}
            for n, text in enumerate(captions)]


SHAPES = {
    "mdetr": lambda root: {"images": images_of(root, "the left dog", "a cup."), "annotations": [
        annotation(5, 0, 1, [10, 20, 30, 40]), annotation(6, 1, 1, [10, 20, 30, 40])]},
    "annotations": lambda root: {"images": images_of(root, "", ""), "annotations": [
        annotation(n, n, 1, [10, 20, 30, 40], sentences=[{"raw": text, "sent": text}])
        for n, text in enumerate(["the left dog", "a cup"])]},
    "refs": lambda root: {"images": images_of(root, "", ""), "annotations": [
        annotation(n + 7, n, 1, [10, 20, 30, 40]) for n in range(2)], "refs": [
        {"ref_id": n, "ann_id": n + 7, "image_id": n, "split": "train", "file_name": f"{n:03}_7.png",
         "sentences": [{"sent": text, "raw": text.upper(), "tokens": text.split()}]}
        for n, text in enumerate(["the left dog", "a cup"])]},
    "list": lambda root: [{"img_name": "000.png", "bbox": [10, 20, 30, 40], "sentence": "the left dog"},
                          {"file_name": "001.png", "bbox": [10, 20, 30, 40], "sentences": ["a cup", "a cup"]}],
    "deep list": lambda root: [{"image": f"/elsewhere/{n:03}.png", "bbox": [10.0, 20, 30, 40], "normal_caption": text}
                               for n, text in enumerate(["the left dog", "a cup"])],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_expressions_is_read(tmp_path, instances, shape):
    root, _ = instances
    run("refcoco", "--boxes", "xywh", save(tmp_path, SHAPES[shape](root)), "--image_root", root, "--out", tmp_path / "open.jsonl")
    rows = sorted(rows_of(tmp_path / "open.jsonl"), key=lambda row: row["image"])
    assert [(row["image"], row["problem"]) for row in rows] == [
        ("000.png", "Where is the left dog?"), ("001.png", "Where is a cup?")]
    assert all(boxes_of(row["solution"]) == [[10, 20, 40, 60]] for row in rows)
    assert len(derived_all(tmp_path / "open.jsonl", root)) == 2


def test_corners_are_read_as_corners_only_when_told(tmp_path, instances, capsys):
    root, _ = instances
    file = write_jsonl(tmp_path / "a.jsonl", [{"image": "000.png", "bbox": [120, 90, 180, 140], "caption": "it"}])
    said = failed(capsys, "refcoco", file, "--image_root", root, "--out", tmp_path / "open.jsonl")
    assert "does not say how its boxes are written; say it with --boxes" in said
    said = failed(capsys, "refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl", "--boxes", "xywh")
    assert "[0]: its box [120, 90, 180, 140], read as xywh" in said
    run("refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl", "--boxes", "xyxy")
    assert boxes_of(rows_of(tmp_path / "open.jsonl")[0]["solution"]) == [[120, 90, 180, 140]]


def test_an_expression_for_two_boxes_and_test_expressions_stay_out(tmp_path, instances, capsys):
    root, _ = instances
    entries = [{"image": "000.png", "bbox": [1, 1, 40, 40], "caption": "man", "split": "train"},
               {"image": "000.png", "bbox": [60, 60, 40, 40], "caption": "Man.", "split": "train"},
               {"image": "001.png", "bbox": [1, 1, 40, 40], "caption": "man", "split": "train"},
               {"image": "002.png", "bbox": [1, 1, 40, 40], "caption": "cat", "split": "testA"}]
    file = write_jsonl(tmp_path / "a.jsonl", entries)
    assert "testA, train" in failed(capsys, "refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl")
    run("refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl", "--split", "train")
    assert [row["image"] for row in rows_of(tmp_path / "open.jsonl")] == ["001.png"]


def test_bad_expressions_are_told_at_once_with_their_index(tmp_path, instances, capsys):
    root, _ = instances
    good = {"image": "000.png", "bbox": [1, 1, 40, 40], "caption": "man"}
    bad = [{**good, "caption": "<|image_pad|>"}, {**good, "caption": None}, {**good, "caption": ["a", 3]},
           {**good, "bbox": [1, 2, 3], "caption": "cat"}, {**good, "image": "none.png"},
           {**good, "image": {"bytes": ""}}, 5, "{broken", {**good, "caption": "<image>"},
           {"image": "001.png", "caption": "cup"}]
    file = write_jsonl(tmp_path / "a.jsonl", [good, *bad])
    said = failed(capsys, "refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl")
    assert f"{len(bad)} entries" in said and all(f"[{n}]: " in said for n in range(1, len(bad) + 1))
    run("refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl", "--skip_bad_rows")
    assert len(rows_of(tmp_path / "open.jsonl")) == 1


def test_a_pickle_is_refused_unread(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "loaded"), "w")
    for name in ("refs(unc).p", "refs.json"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        said = failed(capsys, "refcoco", "--boxes", "xywh", tmp_path / name, "--image_root", tmp_path, "--out", tmp_path / "open.jsonl")
        assert "pickle" in said and "instances.json" in said and not (tmp_path / "loaded").exists()


NAMES = {"xyxy": lambda x1, y1, x2, y2: [x1, y1, x2, y2], "xywh": lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1],
         "fractions": lambda x1, y1, x2, y2: [x1 / 200, y1 / 150, x2 / 200, y2 / 150],
         "thousandths": lambda x1, y1, x2, y2: [x1 * 5, y1 * 1000 / 150, x2 * 5, y2 * 1000 / 150]}


@pytest.mark.parametrize("written", NAMES)
def test_boxes_of_every_convention_become_pixels(tmp_path, instances, written):
    root, _ = instances
    truth = [[20, 15, 60, 45], [100, 30, 180, 140], [60, 60, 140, 120]]
    file = write_jsonl(tmp_path / "a.jsonl", [
        {"image": f"{n:03}.png", "bbox": NAMES[written](*box), "caption": f"cup {n}"} for n, box in enumerate(truth)])
    arguments = ["refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl"]
    run(*arguments, "--boxes", written)
    boxes = sorted(boxes_of(row["solution"]) for row in rows_of(tmp_path / "open.jsonl"))
    assert boxes == sorted([box] for box in truth)


@pytest.mark.parametrize("entry, boxes", [
    ({"bbox": [[5, 5, 40, 40], [60, 60, 40, 40]]}, [[5, 5, 45, 45], [60, 60, 100, 100]]), ({"bbox": []}, []),
    ({"empty_case": True}, []), ({"box": "[5, 5, 40, 40]"}, [[5, 5, 45, 45]]), ({"bbox": "no objects"}, [])])
def test_several_boxes_none_and_text_are_read(tmp_path, instances, entry, boxes):
    root, _ = instances
    file = write_jsonl(tmp_path / "a.jsonl", [{"img_path": "000.png", "caption": "cup"} | entry])
    run("refcoco", "--boxes", "xywh", file, "--image_root", root, "--out", tmp_path / "open.jsonl")
    (row,) = rows_of(tmp_path / "open.jsonl")
    assert boxes_of(row["solution"]) == boxes and len(derived_all(tmp_path / "open.jsonl", root)) == 1


# ---- YOLO, Pascal VOC ----

def test_yolo_labels_are_read_with_centers_sizes_and_polygons(tmp_path, instances, capsys):
    root, _ = instances
    labels, yaml, out = tmp_path / "labels", tmp_path / "data.yaml", tmp_path / "open.jsonl"
    labels.mkdir()
    polygon = "1 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5"
    for number, text in enumerate((f"0 0.5 0.5 0.2 0.4\n{polygon}\n", "2 0.25 0.5 0.5 0.5\r\n", "")):
        (labels / f"{number:03}.txt").write_text(text)
    yaml.write_text("path: ..\nnames: [dog, cup, boat]\n")
    (tmp_path / "classes.txt").write_text("dog\ncup\nboat\n")
    for names in ("data.yaml", "classes.txt"):
        run("yolo", labels, "--names", tmp_path / names, "--image_root", root, "--out", out, "--force")
        boxes = {row["problem"]: boxes_of(row["solution"]) for row in rows_of(out) if row["task"] == "detection"}
        assert boxes == {"Where is the dog?": [[80, 45, 120, 105]], "Where is the cup?": [[20, 15, 60, 75]],
                         "Where is the boat?": [[0, 37.5, 100, 112.5]]}
    assert Counter(e.task for e in derived_all(out, root)) == {"detection": 3, "math": 3, "classify": 2}
    (labels / "003.txt").write_text("0 0.5 0.5\n7 0.5 0.5 0.2 0.4\nx y\n0 0.9 0.5 0.4 0.4\n")
    (labels / "none.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    said = failed(capsys, "yolo", labels, "--names", yaml, "--image_root", root, "--out", tmp_path / "b.jsonl")
    for words in ("none.txt: no image none", "003.txt:1: it is neither", "003.txt:2: its class 7",
                  "003.txt:3: its class x", "003.txt:4: its box"):
        assert words in said
    yaml.write_text("nc: 3\n")
    said = failed(capsys, "yolo", labels, "--names", yaml, "--image_root", root, "--out", tmp_path / "b.jsonl")
    assert "has no names" in said


def voc_xml(name, *things):
    objects = "".join(f"<object><name>{kind}</name><difficult>{int(hard)}</difficult><bndbox>" + "".join(
        f"<{key}>{n}</{key}>" for key, n in zip(("xmin", "ymin", "xmax", "ymax"), box)) + "</bndbox></object>"
        for kind, hard, box in things)
    return f"<annotation><filename>{name}</filename>{objects}</annotation>"


def test_voc_counts_pixels_from_one_and_leaves_difficult_objects_out(tmp_path, instances, capsys):
    root, _ = instances
    folder = tmp_path / "Annotations"
    folder.mkdir()
    things = ("dog", False, (1, 1, 200, 150)), ("cup", True, (10, 10, 60, 60))
    (folder / "000.xml").write_text(voc_xml("000.png", *things))
    (folder / "001.xml").write_text(voc_xml("001.jpg", ("boat", False, ("11", "21.5", 60, 80))))    # it is 001.png
    (folder / "002.xml").write_text(voc_xml("002.png", ("boat", False, (10, 10, 60, 60))))
    (tmp_path / "val.txt").write_text("000  1\n001 -1\n")
    run("voc", folder, "--image_root", root, "--out", tmp_path / "open.jsonl", "--list", tmp_path / "val.txt")
    rows = rows_of(tmp_path / "open.jsonl")
    assert {row["problem"]: boxes_of(row["solution"]) for row in rows if row["task"] == "detection"} == {
        "Where is the dog?": [[0, 0, 200, 150]], "Where is the boat?": [[10, 20.5, 60, 80]]}
    assert {truth_of(types.SimpleNamespace(**row)) for row in rows if row["task"] == "classify"} == {"cup, dog", "boat"}
    entity = '<!DOCTYPE a [<!ENTITY a "aaaa">]>' + voc_xml("003.png", ("&a;", False, (1, 1, 9, 9)))
    (folder / "003.xml").write_text(entity)
    (folder / "004.xml").write_text("<annotation>")
    (folder / "005.xml").write_text(voc_xml("005.png", ("dog", False, (1, 1, 900, 9)), ("dog", False, (1,))))
    said = failed(capsys, "voc", folder, "--image_root", root, "--out", tmp_path / "b.jsonl")
    for words in ("003.xml: it cannot be read as XML (it defines entities", "004.xml: it cannot be read as XML", "005.xml, object 1: its box",
                  "005.xml, object 2: its box"):
        assert words in said
    assert "no folder" in failed(capsys, "voc", tmp_path / "none", "--image_root", root, "--out", tmp_path / "b.jsonl")


# ---- Splits, rows, parquet ----

def test_versions_of_one_photo_stay_on_one_side_of_the_split(tmp_path, instances):
    """Roboflow writes NAME_jpg.rf.HASH.jpg for each version of a photo: 266 of 275 test images had one in training."""
    root, value = instances
    for n, image in enumerate(value["images"]):
        name = f"photo{n // 3}_png.rf.{n:032x}.png"
        (root / image["file_name"]).rename(root / name)
        image["file_name"] = name
    file, out = save(tmp_path, value), tmp_path / "train" / "open.jsonl"
    run("coco", file, "--image_root", root, "--out", out, "--test_share", "0.4")
    sides = [{row["image"].partition(".rf.")[0] for row in rows_of(tmp_path / side / "open.jsonl")}
             for side in ("train", "test")]
    assert all(sides) and not sides[0] & sides[1]


def test_faults_are_told_in_the_order_of_the_file(tmp_path, instances, capsys):
    root, value = instances
    for image in value["images"][3:12]:
        (root / image["file_name"]).unlink()
    said = failed(capsys, "coco", save(tmp_path, value), "--image_root", root, "--out", tmp_path / "open.jsonl")
    numbers = [int(line.split("[")[1].split("]")[0]) for line in said.splitlines() if line.startswith("images[")]
    assert numbers == sorted(numbers) and len(numbers) == 9


@pytest.mark.parametrize("written", ["xywh", "fractions", "thousandths"])
def test_rows_in_another_convention_are_written_in_pixels(tmp_path, instances, written):
    root, _ = instances
    box = NAMES[written](20, 15, 60, 45)
    rows = [{"image": "000.png", "problem": f"Is {box} the cup?", "solution": "yes", "form": "binary"},
            {"image": "001.png", "problem": "Where is it?", "solution": [{"bbox_2d": box, "label": "cup"}]},
            {"conversations": [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": str(box)}],
             "image": "002.png"}, {"problem": "Sum of [1, 2, 3, 4]?", "solution": "10", "task": "math"}]
    run("rows", write_jsonl(tmp_path / "a.jsonl", rows), "--image_root", root, "--out", tmp_path / "open.jsonl",
        "--boxes", written, "--task", "detection")
    asked, labelled, chat, other = load_examples(tmp_path / "open.jsonl", image_root=root)
    assert asked.problem == "Is [20, 14, 59, 42] the cup?" and asked.form == "binary"       # shown as 196 x 140
    assert "cup" in labelled.solution and truth_boxes(labelled) == truth_boxes(chat) == [[20, 14, 59, 42]]
    assert other.problem == rows[3]["problem"]


def test_parquet_needs_the_users_pyarrow_and_makes_files_of_pictures(tmp_path, instances, capsys, monkeypatch):
    root, _ = instances
    arguments = ["parquet", "x.parquet", "--out", tmp_path / "train" / "open.jsonl", "--image_root", tmp_path]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in failed(capsys, *arguments)
    content = (root / "000.png").read_bytes()
    table = [{"image": {"bytes": content, "path": None}, "problem": "米?", "solution": "1"},
             {"images": [content, {"bytes": content, "path": "a"}], "problem": "?", "solution": "1"}]
    batch = type("Batch", (), {"to_pylist": lambda self: table})
    file = type("ParquetFile", (), {"__init__": lambda self, path: None, "iter_batches": lambda self, size: [batch()]})
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(ArrowException=ValueError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=file))
    run(*arguments)
    one, two = load_examples(tmp_path / "train" / "open.jsonl", image_root=tmp_path, task="math")
    assert one.problem == "米?" and two.images == one.images * 2, "one picture, one file"
    assert Path(one.images[0]).read_bytes() == content
    table.append({"image": {"bytes": b"none", "path": None}})
    assert "x.parquet:3: image in it cannot be decoded" in failed(capsys, *arguments, "--force")
