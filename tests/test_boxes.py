"""Which boxes are these: every convention is read right, refused with the right advice, or told."""

import json
import random
import shlex

import pytest
from PIL import Image
from runs import load_rows

import tools.convert as convert
from rewards import truth_boxes
from support.answers import iou
from support.boxes import CONVENTIONS, SHARES, corners, doubt
from support.words import UserError

SIZES = ((640, 480), (1024, 1024), (1280, 720), (1920, 1080), (1600, 1200), (3840, 2160))


def photo_boxes(size, count=60, seed=0):
    """Boxes in pixels as photos have them: of any size, in any place."""
    rng, boxes = random.Random(seed), []
    for _ in range(count):
        w, h = (min(0.95, max(0.02, rng.lognormvariate(-1.6, 0.7))) for _ in size)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        boxes.append([x * size[0], y * size[1], (x + w) * size[0], (y + h) * size[1]])
    return boxes


def written_as(box, size, name):
    """The numbers of a box in another convention."""
    layout, _, unit = name.rpartition("-")
    layout, whole = (layout or "xyxy", SHARES[unit]) if unit in SHARES else (unit, None)
    x1, y1, x2, y2 = (n * whole / side if whole else n for n, side in zip(box, (*size, *size)))
    numbers = {"xyxy": (x1, y1, x2, y2), "yxyx": (y1, x1, y2, x2), "xywh": (x1, y1, x2 - x1, y2 - y1),
               "cxcywh": ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)}[layout]
    return [round(n, {1: 4, 100: 2}.get(whole, 0)) for n in numbers]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_convention_is_read_right_refused_with_advice_or_told(size):
    for name in CONVENTIONS:
        for seed in range(5):
            written = [(tuple(written_as(box, size, name)), size) for box in photo_boxes(size, seed=seed)]
            refused, told = doubt(written, command="convert")
            if name == "xyxy":
                assert not refused and (size == (1024, 1024)) == bool(told)  # y first would fit as well
            else:
                assert f"--boxes {name} .." in refused + told, "the advice has it"
                assert refused or size == (1024, 1024)
                assert (refused + told).count("--boxes") <= 3
            assert not doubt(written, name, stated=True)[0], "and with it nothing is refused"


def where(boxes):
    return [{"problem": f"Where {n}?", "solution": json.dumps(box), "task": "detection", "image": "a.png"}
            for n, box in enumerate(boxes)]


@pytest.mark.parametrize("name", ["cxcywh", "yxyx", "percent", "yxyx-thousandths", "fractions"])
def test_what_is_refused_becomes_right_by_the_advice_and_is_never_skipped(tmp_path, name):
    size, root = (1920, 1080), tmp_path / "images"
    root.mkdir()
    Image.new("RGB", size).save(root / "a.png")
    boxes = photo_boxes(size)
    rows = where(written_as(box, size, name) for box in boxes)
    for options in ({}, {"skip_bad_rows": True}):
        with pytest.raises(UserError) as error:
            load_rows(root, *rows, image_root=root, **options)
        assert "--skip_bad_rows" not in str(error.value)
    advice = next(line for line in str(error.value).splitlines() if f"--boxes {name} .." in line)
    out = tmp_path / "train" / "open.jsonl"
    arguments = shlex.split(advice)[3:-1] + ["--image_root", str(root), "--out", str(out)]
    assert convert.main(arguments) == 0
    found = load_rows(root, *map(json.loads, out.read_text().splitlines()), image_root=root)
    for example, box in zip(found, boxes, strict=True):
        seen = [n * side / whole for n, side, whole in zip(box, (*example.size, *example.size), (*size, *size))]
        assert iou(truth_boxes(example)[0], seen) > 0.8 or min(seen[2] - seen[0], seen[3] - seen[1]) < 20


def test_few_or_equal_boxes_are_no_sign_and_one_bad_row_in_forty_is_a_mistake(tmp_path):
    small = [((n, n, n + 30, n + 40), (640, 480)) for n in range(9)]
    assert doubt(small)[0] == "" and "percent" in doubt(small)[1]
    assert doubt(small[:1] * 100)[0] == ""
    photos = [(tuple(box), (640, 480)) for box in photo_boxes((640, 480), 40)]
    assert doubt([*photos, ((600, 20, 700, 90), (640, 480))]) == ("", "")
    assert "nor do they in another way" in doubt([*photos, *(((n, 700, n + 9, 790), (640, 480))
                                                           for n in range(5))])[0]


def test_pixels_in_a_narrow_range_are_asked_for_and_can_be_said():
    centered = [((400 + n, 400, 600 + 2 * n, 700 + n), (1200, 1200)) for n in range(60)]
    refused = doubt(centered, command="convert")[0]
    assert "--boxes thousandths .." in refused and "--boxes xyxy .." in refused
    assert doubt(centered, stated=True) == ("", "")


def test_corners_are_clipped_by_a_pixel_and_no_more():
    assert corners([10, 5, 20.5, 8], (40, 30), "xywh") == [10, 5, 30.5, 13]
    assert corners([-0.6, 5, 40.9, 8], (40, 30)) == [0, 5, 40, 8]
    for box in ([0, 0, 42, 9], [5, 5, 5, 9], [1, 2, 3], [1, 2, 3, float("nan")], None):
        with pytest.raises(UserError):
            corners(box, (40, 30))
