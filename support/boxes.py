"""Which boxes are these? One convention a file, found by trying all of its boxes in each.

A convention is a layout and a unit, "xywh-percent"; pixels and corners go without saying: "xyxy", "thousandths".
Of two that a file's boxes fit, the narrower is the likelier: numbers up to 1000 in images of 1920 x 1080 would
all lie in one half, were they pixels. The likelihood of each convention is that of boxes anywhere in its range,
of which one in a hundred is a mistake.
"""

import itertools
import math

import numpy as np

from support.answers import BOX
from support.words import UserError

LAYOUTS = {  # four numbers -> two corners
    "xyxy": lambda a, b, c, d: (a, b, c, d),
    "yxyx": lambda a, b, c, d: (b, a, d, c),
    "xywh": lambda x, y, w, h: (x, y, x + w, y + h),  # corner and size
    "cxcywh": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2)}  # center and size
SHARES = {"pixels": None, "fractions": 1, "percent": 100, "thousandths": 1000}  # of the whole side
CONVENTIONS = ["-".join([layout] * (layout != "xyxy" or unit == "pixels") + [unit] * (unit != "pixels"))
               for layout, unit in itertools.product(LAYOUTS, SHARES)]
MISTAKE, CLEAR = math.log(100), math.log(1000)  # nats: one box in a hundred is one; a thousand times likelier
ENOUGH = 10  # different boxes that show a convention, if they fit two


def corners_of(numbers, size, written):
    """(x1, y1, x2, y2) in pixels of numbers (4) or columns of them (4, n); size: (width, height) alike."""
    first, _, last = written.partition("-")
    found, whole = LAYOUTS.get(first, LAYOUTS["xyxy"])(*numbers), SHARES.get(last or first)
    return [n * side / whole for n, side in zip(found, (*size, *size))] if whole else list(found)


def is_sound(box) -> bool:
    """Whether a value is a list of four finite numbers."""
    return isinstance(box, list) and len(box) == 4 and all(
        type(n) in (int, float) and math.isfinite(n) and abs(n) < 1e6 for n in box)


def corners(box, size, written="xyxy"):
    """[x1, y1, x2, y2] of a box within an image of `size` (width, height), to 0.01 pixels; else UserError.

    corners([10, 5, 20.5, 8], (40, 30), "xywh") -> [10, 5, 30.5, 13]; one pixel outside is clipped.
    """
    if not is_sound(box):
        raise UserError(f"its box {str(box)[:80]} is not four finite numbers.")
    x1, y1, x2, y2 = corners_of(box, size, written)
    if x1 >= x2 or y1 >= y2 or min(x1, y1) < -1 or x2 > size[0] + 1 or y2 > size[1] + 1:
        raise UserError(f"its box {box}, read as {written}, is empty or leaves the image of "
                        f"{size[0]} x {size[1]}.")
    inside = [round(min(max(n, 0), side), 2) for n, side in zip((x1, y1, x2, y2), (*size, *size))]
    return [int(n) if n == int(n) else n for n in inside]


def boxes_in(text):
    """The four-number lists in a text: "[1, 2, 30, 4.5]" -> [(1.0, 2.0, 30.0, 4.5)]."""
    return [tuple(map(float, numbers)) for _, *numbers in BOX.findall(text)]


def likely(boxes) -> dict:
    """{convention: (nats of likelihood, boxes that do not fit)}, the likeliest first.

    boxes: [((four numbers), (width, height) of its image), ..].
    """
    numbers, size = (np.array(part, float).T for part in zip(*boxes))
    found = {}
    for written in CONVENTIONS:
        x1, y1, x2, y2 = corners_of(numbers, size, written)
        strange = ((x1 >= x2) | (y1 >= y2) | (np.minimum(x1, y1) < -1) | (x2 > size[0] + 1) | (y2 > size[1] + 1))
        whole = SHARES.get(written.rpartition("-")[2])
        image = np.log(size).sum(0)
        room = np.full_like(image, 2 * math.log(whole)) if whole else image
        room = np.where(strange, np.maximum(image, 2 * math.log(1000)) + MISTAKE, room)
        found[written] = -float(room.sum()), int(strange.sum())
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def fitting(found) -> list[str]:
    """Of what `likely` found those that no other is clearly likelier than."""
    best = max(nats for nats, _ in found.values())
    return [written for written, (nats, _) in found.items() if nats >= best - CLEAR]


def doubt(boxes, written="xyxy", stated=False, command="") -> tuple[str, str]:
    """(why the boxes of a file are not what is `written`, or what they might be, too), "" for none of it.

    stated: somebody said so; then a likelier convention is a reason only if several do not fit. Equal boxes count
    once. command: that which takes --boxes.
    """
    boxes = [*dict.fromkeys(boxes)]
    found = likely(boxes) if boxes else {written: (0, 0)}
    strange, fit = found[written][1], fitting(found)
    others = [name for name in fit if name != written]
    def advice(names):
        return "".join(f"\n    {command} --boxes {name} .." for name in names)
    if written not in fit and strange > stated:
        most = len(boxes) - min(found[name][1] for name in fit)
        return (f"Of {len(boxes)} different boxes {strange} do not fit as {written}, and {most} fit as "
                f"{' or '.join(others)}; a file has one convention, and this one is read by{advice(others)}"), ""
    if written not in fit and len(boxes) >= ENOUGH and not stated:  # nothing contradicts: it may be so all the same
        return (f"{len(boxes)} different boxes fit as {written}, and all in much less room as {' or '.join(others)}; "
                f"say which they are:{advice([*others, written])}"), ""
    if strange > max(1, 0.1 * len(boxes)):
        return (f"Of {len(boxes)} different boxes {strange} do not fit as {written}, nor do they in another "
                "way that is known; look at what they are"), ""
    if not stated and others and (len(boxes) >= ENOUGH or written not in fit):
        return "", (f"{len(boxes)} boxes are read as {written}, and fit as {' or '.join(others)}, too; if they are "
                    f"such:{advice(others)}")
    return "", ""
