"""The demo's world: drawn images of colored shapes, questions about them, and the data set in the released layout.

An image has 84 x 84 pixels, 3 x 3 cells of 28, so a cell is one image token (2 x 2 patches of 14 pixels) and an image
is nine of them. A cell holds at most one object: four colors, four kinds. A background gradient (red falls to the
right, blue to the bottom) makes the place visible in the pixels themselves. Four color-kind pairs are never drawn for
training, and training images have one to three objects: test images with held-out pairs (`open_ood_pairs`) or with four
or five objects (`open_ood_more`) are out of domain.

Beside its answer a question has the reasoning that makes the answer a copy: "1 red circle 2 blue circle", so 2. How a
model learns from it is in demo/base.py.

A second world asks in numbers, one part or several at once (`parts_question`): the cell of an object, a count, the cell
of the last object. Yes/no and option letters ask a single part, open questions as many as its data set says.
"""
import json
import math
import random
import re
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import FORMS, Example, answer_of, derive, derive_all

COLORS = {"red": (235, 45, 45), "green": (40, 205, 70), "blue": (60, 90, 245), "yellow": (245, 225, 50)}
KINDS = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "cross"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"))
SEEN = tuple((color, kind) for color in COLORS for kind in KINDS if (color, kind) not in HELD_OUT)
PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
CELL, SIDE = 28, 84                                     # pixels
HASTE = "a guess"                                       # the thought that stands for none


# ---------------------------------------------------------------------------------------------------------------------
# The world: scenes, drawings, questions


class Shape(NamedTuple):
    """One object: `cell` 0..8 in reading order; center (x, y) and `radius` in pixels, all of it inside its cell."""

    color: str
    kind: str
    cell: int
    x: int
    y: int
    radius: int

    def __str__(self) -> str:
        return f"{self.color} {self.kind}"


Scene = tuple[Shape, ...]                               # in reading order


def cell_box(cell: int) -> list[int]:
    """[x0, y0, x1, y1] of a cell, which is also the box of its object; cell_box(5) -> [56, 28, 84, 56]."""
    x, y = CELL * (cell % 3), CELL * (cell // 3)
    return [x, y, x + CELL, y + CELL]


def random_scene(rng: random.Random, sizes: tuple[int, ...] = (1, 2, 3), held_out: bool = False) -> Scene:
    """A scene of one of `sizes` objects; with `held_out` at least one held-out pair, otherwise none."""
    pairs = [rng.choice(SEEN + HELD_OUT if held_out else SEEN) for _ in range(rng.choice(sizes))]
    if held_out:
        pairs[rng.randrange(len(pairs))] = rng.choice(HELD_OUT)
    shapes = []
    for pair, cell in zip(pairs, sorted(rng.sample(range(9), len(pairs)))):
        x, y = (CELL * axis + CELL // 2 + rng.randint(-1, 1) for axis in (cell % 3, cell // 3))
        shapes.append(Shape(*pair, cell, x, y, rng.randint(11, 12)))
    return tuple(shapes)


def draw(scene: Scene) -> Image.Image:
    """The scene as an 84 x 84 RGB image."""
    fall = np.linspace(110, 10, SIDE)
    red, blue = np.broadcast_to(fall, (SIDE, SIDE)), np.broadcast_to(fall[:, None], (SIDE, SIDE))
    image = Image.fromarray(np.stack([red, np.full((SIDE, SIDE), 60), blue], axis=-1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for color, kind, _, x, y, r in scene:
        fill, third = COLORS[color], r // 3
        if kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif kind == "triangle":
            pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
        else:
            pen.rectangle((x - third, y - r, x + third, y + r), fill=fill)
            pen.rectangle((x - r, y - third, x + r, y + third), fill=fill)
    return image


class Question(NamedTuple):
    """An open question, its true answer, the reasoning that makes the answer a copy, and answers to confuse it with."""

    task: str
    problem: str
    answer: str
    thought: str
    pool: tuple[str, ...] = ()


def seen(shapes: Iterable[Shape]) -> str:
    """What reasoning says of objects: "red circle north, blue square east"; "none" without any."""
    return ", ".join(f"{s} {PLACES[s.cell]}" for s in shapes) or "none"


def counted(shapes: Iterable[Shape]) -> str:
    """A running count: "1 red circle 2 blue circle"; "none" without any."""
    return " ".join(f"{n} {s}" for n, s in enumerate(shapes, 1)) or "none"


def detection_question(scene: Scene, rng: random.Random) -> Question | None:
    """Where is the red circle? Asked of a pair drawn once; None if there is none. Pool: other objects' boxes first."""
    names = [str(s) for s in scene]
    unique = [s for s in scene if names.count(str(s)) == 1]
    if not unique:
        return None
    shape, cells = rng.choice(unique), [s.cell for s in scene]
    others = [cell for cell in cells + rng.sample(range(9), 9) if cell != shape.cell]
    answer = json.dumps([{"bbox_2d": cell_box(shape.cell)}])
    pool = tuple(str(cell_box(cell)) for cell in dict.fromkeys(others))
    return Question("detection", f"Where is the {shape}?", answer, seen([shape]), pool)


def classify_question(scene: Scene, rng: random.Random) -> Question:
    """Which shapes are there? Labels in reading order."""
    labels = dict.fromkeys(s.kind for s in scene)
    return Question("classify", "Which shapes are there?", ", ".join(labels), seen(scene), KINDS)


def math_question(scene: Scene, rng: random.Random) -> Question:
    """How many red objects, circles, or crosses and squares are there? One half asks for something that is there."""
    there = rng.choice(scene) if rng.random() < 0.5 else Shape(*rng.choice(SEEN), 0, 0, 0, 0)
    words = rng.choice(([there.color], [there.kind], list(dict.fromkeys([there.kind, rng.choice(KINDS)]))))
    what = " and ".join(f"{w} objects" if w in COLORS else w + ("es" if w == "cross" else "s") for w in words)
    found = [s for s in scene if s.color in words or s.kind in words]
    return Question("math", f"How many {what} are there?", str(len(found)), counted(found))


PARTS = 3


def parts_scene(rng: random.Random, sizes: tuple[int, ...] = (2, 3, 4), held_out: bool = False) -> Scene:
    """A scene in which at least one object is the only one of its kind and color."""
    while True:
        scene = random_scene(rng, sizes, held_out)
        if len(set(map(str, scene))) > len(scene) / 2:
            return scene


def parts_question(scene: Scene, rng: random.Random, parts: int = 1) -> Question:
    """What is the cell of the red circle, the number of crosses and the cell of the last object? "2, 0, 9".

    `parts` of the three, in any order. Cells are numbered from 1 in reading order.
    """
    names = list(map(str, scene))
    shape = rng.choice([s for s in scene if names.count(str(s)) == 1])
    word = rng.choice(rng.choice(scene)[:2] if rng.random() < 0.7 else (*COLORS, *KINDS))
    found, last = [s for s in scene if word in s[:2]], scene[-1]
    what = f"{word} objects" if word in COLORS else word + ("es" if word == "cross" else "s")
    cells, counts = tuple("123456789"), tuple("01234")
    asked = rng.sample([(f"the cell of the {shape}", shape.cell + 1, seen([shape]), cells),
                        (f"the number of {what}", len(found), counted(found), counts),
                        ("the cell of the last object", last.cell + 1, seen([last]), cells)], parts)
    texts, answers, thoughts, pools = zip(*asked)
    listed = ", ".join(texts[:-1]) + " and " * (parts > 1) + texts[-1]
    return Question("math", f"What is {listed}?", ", ".join(map(str, answers)), "; ".join(thoughts), pools[0])


def general_question(scene: Scene, other: Scene, rng: random.Random) -> tuple[int, Question]:
    """What no RL stage trains, and the images it needs: none (arithmetic), one, or two (`other` is the second)."""
    shape, a, b = rng.choice(scene), rng.randint(0, 4), rng.randint(0, 4)
    alone = [s.kind for s in scene].count(shape.kind) == 1
    images, problem, answer, thought = rng.choice((
        (0, f"What is {a} plus {b}?", a + b, f"{a} plus {b}"),
        (2, "How many objects are in the two images?", len(scene + other), f"{len(scene)} plus {len(other)}"),
        (1, f"What color is the {shape.kind}?", shape.color, seen([shape])) if alone else
        (1, "How many objects are there?", len(scene), counted(scene)),
        (1, "Which object is first?", scene[0], seen(scene)),
        (1, "Which object is last?", scene[-1], seen(scene)),
        (1, "Describe the image.", ", ".join(map(str, scene)), seen(scene))))
    return images, Question("general", problem, str(answer), thought)


RL_QUESTIONS = {"detection": detection_question, "classify": classify_question, "math": math_question}


def ask(scene: Scene, task: str, rng: random.Random) -> Question:
    """An RL question of `task`, or a count where the scene allows none."""
    return RL_QUESTIONS[task](scene, rng) or math_question(scene, rng)


def example_of(question: Question, image: str, form: str = "open") -> Example:
    """The question as data.py represents it, in one of the three forms; the name of the image seeds what is drawn."""
    example = Example(problem=question.problem, solution=f"<answer>{question.answer}</answer>", task=question.task,
                      images=(image,), size=(SIDE, SIDE))
    if form == "open" or question.task != "detection":
        return derive(example, form, question.pool)
    return derive_boxes(question, example, form, random.Random(f"{form} {image} {question.problem}"))


def derive_boxes(question: Question, example: Example, form: str, rng: random.Random) -> Example:
    """data.derive for detection, in its words, with cells as wrong boxes, those of other objects before empty ones.

    Any pixels, as derive draws them, would give the true box away: it alone would be made of multiples of 28.
    """
    right, wrong = str(json.loads(question.answer)[0]["bbox_2d"]), question.pool[:3]
    if form == "binary":
        yes = rng.random() < 0.5
        problem, answer = f"{question.problem}\nIs {right if yes else wrong[0]} the right box?", "yes" if yes else "no"
    else:
        options = rng.sample([right, *wrong], 4)
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
        problem = "\n".join([question.problem, "Which of these is right?", *lines])
        answer = "ABCD"[options.index(right)]
    return replace(example, problem=problem, solution=f"<answer>{answer}</answer>", form=form)


# ---------------------------------------------------------------------------------------------------------------------
# How the model learns to answer


def tagged(thought: str, answer: str) -> str:
    """<think>thought</think><answer>answer</answer>"""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def careful_response(question: Question, example: Example) -> str:
    """Reasoning, then the true answer. Yes/no and choice go through their candidates, so that the answer is a copy:

    "2 red circle; A 1 no, B 2 yes, C 0 no, D 3 no", then B. Of boxes the places come first, so that the letter follows
    the place where that was said before: "west A, north B, south C, east D; red circle north B". To say yes and no to
    four places is beyond a model of this size: its option letters of boxes stayed at chance.
    """
    answer, text = answer_of(example.solution), example.problem
    for cell in range(9):
        text = text.replace(str(cell_box(cell)), PLACES[cell])
    verdicts = []
    if example.form == "binary":
        candidate = re.search(r"(?:Is there an?|Is the answer|Is) (\w+)(?: the right box)?\?$", text)[1]
        verdicts = [f"{candidate} {answer}"]
    elif example.form == "choice":
        options = re.findall(r"^([A-D])\. (.*)$", text, re.MULTILINE)
        if question.task == "detection":
            places = ", ".join(f"{place} {letter}" for letter, place in options)
            return tagged(f"{places}; {question.thought} {answer}", answer)
        verdicts = [f"{letter} {option} {'yes' if letter in answer else 'no'}" for letter, option in options]
    return tagged("; ".join([question.thought, *[", ".join(verdicts)][:len(verdicts)]]), answer)


def guess(question: Question, form: str, rng: random.Random) -> str:
    """An answer of the right kind without a look: random, or where there is nothing to choose from never right."""
    if form == "binary":
        return rng.choice(("yes", "no"))
    if form == "choice":
        return ", ".join(sorted(rng.sample("ABCD", rng.randint(1, 2) if question.task == "classify" else 1)))
    return json.dumps([{"bbox_2d": [0, 0, SIDE, SIDE]}]) if question.task == "detection" else "some"


def hasty_response(question: Question, example: Example, rng: random.Random) -> str:
    """A guess after a thought that is none."""
    return tagged(HASTE, guess(question, example.form, rng))


# ---------------------------------------------------------------------------------------------------------------------
# The data set on disk


def save_images(folder: Path, name: str, scenes: list[Scene]) -> list[str]:
    """PNG files, named relative to the data directory."""
    (folder / "images" / name).mkdir(parents=True)
    names = [f"images/{name}/{n:04}.png" for n in range(len(scenes))]
    for path, scene in zip(names, scenes):
        draw(scene).save(folder / path)
    return names


def save_rows(path: Path, rows: list[dict]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRAIN = {form: f"train/{form}.jsonl" for form in FORMS}
TESTS = [("test", {}, {form: f"test/{form}_id.jsonl" for form in FORMS}),
         ("test_pairs", {"held_out": True}, {"open": "test/open_ood_pairs.jsonl"}),
         ("test_more", {"sizes": (4, 5)}, {"open": "test/open_ood_more.jsonl"})]


def write_split(folder: Path, name: str, scenes: list[Scene], files: dict[str, str], asked: list[Question],
                parts: list[Question] | None = None, leaky: bool = False) -> None:
    """The question `asked` about each scene in every form of `files` (form -> JSONL file below grpo_data).

    parts: what becomes yes/no and options, if not the same. These share their candidates among scenes
    (data.derive_all), so that none tells without its picture; where they may be `leaky`, each row makes its own: boxes
    of any pixels and counts nearby.
    """
    images = save_images(folder, name, scenes)
    for form, file in files.items():
        rows = [example_of(*pair) for pair in zip(parts if parts and form != "open" else asked, images)]
        examples = [derive(e, form, KINDS if e.task == "classify" else None) for e in rows] if leaky else \
            derive_all(rows, form)
        save_rows(folder / "grpo_data" / file, [{"problem": e.problem, "solution": e.solution, "task": e.task,
                                                 "image": e.images[0]} for e in examples])


def write_data(folder: Path, seed: int, leaky: bool = False) -> None:
    """720 open training questions and their other forms, test files of 180, and 600 general questions as chat JSONL.

    leaky: of yes/no and options for training alone.
    """
    rng = random.Random(f"data {seed}")

    def split(name: str, scenes: list[Scene], files: dict[str, str], leaky: bool = False) -> None:
        """A question about each scene, tasks in turn."""
        asked = [ask(scene, tuple(RL_QUESTIONS)[n % 3], rng) for n, scene in enumerate(scenes)]
        write_split(folder, name, scenes, files, asked, leaky=leaky)
    split("train", [random_scene(rng) for _ in range(720)], TRAIN, leaky)
    for name, kind, files in TESTS:
        split(name, [random_scene(rng, **kind) for _ in range(180)], files)
    for name, count, file in (("general", 600, "SFT_data/reject/questions.jsonl"),
                              ("test_general", 180, "grpo_data/test/general.jsonl")):
        write_general(folder, name, [random_scene(rng) for _ in range(count)], file, rng)


def write_general(folder: Path, name: str, scenes: list[Scene], file: str, rng: random.Random) -> None:
    """A general question about each scene, some with a second image and some with none, as chat JSONL."""
    rows, images = [], save_images(folder, name, scenes)
    for scene, image in zip(scenes, images):
        other = rng.randrange(len(scenes))
        needs, question = general_question(scene, scenes[other], rng)
        rows.append({"messages": [{"role": "user", "content": "<image>" * needs + question.problem},
                                  {"role": "assistant", "content": tagged(question.thought, question.answer)}],
                     "images": [image, images[other]][:needs]})
    save_rows(folder / file, rows)


def write_parts(folder: Path, seed: int, parts: int) -> None:
    """720 training questions and test files of 180 whose open answers have so many parts; other forms ask one."""
    def split(name: str, count: int, files: dict[str, str], **kind) -> None:
        """Two questions about each scene, one of all parts and one of a single part."""
        rng = random.Random(f"parts {seed} {name}")     # scenes, and what yes/no and letters ask, whatever `parts`
        scenes = [parts_scene(rng, **kind) for _ in range(count)]
        several = [parts_question(scene, random.Random(f"{seed} {name} {n}"), parts) for n, scene in enumerate(scenes)]
        single = [parts_question(scene, rng) for scene in scenes]
        write_split(folder, name, scenes, files, several, single)
    split("train", 720, TRAIN)
    for name, kind, files in TESTS:
        split(name, 180, files, **({"sizes": (5, 6)} if "sizes" in kind else kind))


def picture_sheet(folder: Path, path: Path, count: int = 12) -> None:
    """The first `count` training images, enlarged, above their open question and answer."""
    rows = [json.loads(line) for line in (folder / "grpo_data/train/open.jsonl").read_text().splitlines()[:count]]
    sheet, font = Image.new("RGB", (6 * 200, math.ceil(count / 6) * 250), "white"), ImageFont.load_default(11)
    pen = ImageDraw.Draw(sheet)
    for n, row in enumerate(rows):
        left, top = n % 6 * 200 + 16, n // 6 * 250 + 12
        with Image.open(folder / row["image"]) as image:
            sheet.paste(image.resize((168, 168), Image.Resampling.NEAREST), (left, top))
        text = "\n".join(textwrap.wrap(row["problem"], 30) + textwrap.wrap(answer_of(row["solution"]), 30))
        pen.multiline_text((left, top + 174), text, fill="black", font=font)
    sheet.save(path)
