"""The demo's world: pictures of colored shapes, questions, a data set in the released layout.

An image has 84 x 84 pixels, 3 x 3 cells of 28, so a cell is one image token (2 x 2 patches of 14 pixels). A
cell holds at most one object: four colors, four kinds. A background gradient (red falls to the right, blue to
the bottom) makes the place visible in the pixels themselves. Four color-kind pairs are never drawn for
training, and training images have one to three objects: test images with held-out pairs (`open_ood_pairs`) or
with four or five objects (`open_ood_more`) are out of domain.

Beside its answer a question has the reasoning that makes the answer a copy: "1 red circle 2 blue circle", so
2. How a model learns from it is in demo/base.py.

A second world asks in numbers, one part or several at once (`parts_question`): the cell of an object, a
count, the cell of the last object. Yes/no and option letters ask a single part, open questions as many as its
data set says.
"""

import itertools
import json
import random
import re
from collections import namedtuple

import numpy as np
from PIL import Image, ImageDraw

from data import answer_of
from forms import derive, derive_all, make_question
from rewards import FORMS, Example
from support.tiny import write_jsonl

COLORS = {"red": (235, 45, 45), "green": (40, 205, 70), "blue": (60, 90, 245), "yellow": (245, 225, 50)}
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "cross"), ("green", "triangle"), ("blue", "square"), ("yellow", "circle"))
SEEN = tuple((color, kind) for color in COLORS for kind in SHAPES if (color, kind) not in HELD_OUT)
PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
CELL, SIDE = 28, 84  # pixels
HASTE = "a guess"  # the thought that stands for none
PARTS = 3  # of an open answer of the second world, at most


# ---- Scenes and drawings ----

class Shape(namedtuple("Shape", "color kind cell x y radius")):
    """One object: cell 0..8 in reading order; center and radius in pixels, inside the cell."""

    def __str__(self):
        return f"{self.color} {self.kind}"


def cell_box(cell):
    """[x0, y0, x1, y1] of a cell, also its object's box: cell_box(5) -> [56, 28, 84, 56]."""
    x, y = CELL * (cell % 3), CELL * (cell // 3)
    return [x, y, x + CELL, y + CELL]


def random_scene(rng, sizes=(1, 2, 3), held_out=False):
    """Shapes in reading order, as many as one of `sizes`; at least one held-out pair, or none."""
    pairs = [rng.choice(SEEN + HELD_OUT if held_out else SEEN) for _ in range(rng.choice(sizes))]
    if held_out:
        pairs[rng.randrange(len(pairs))] = rng.choice(HELD_OUT)
    cells = sorted(rng.sample(range(9), len(pairs)))
    middles = ((CELL * i + CELL // 2 for i in (cell % 3, cell // 3)) for cell in cells)
    return tuple(Shape(*pair, cell, x + rng.randint(-1, 1), y + rng.randint(-1, 1), rng.randint(11, 12))
                 for pair, cell, (x, y) in zip(pairs, cells, middles))


def parts_scene(rng, sizes=(2, 3, 4), held_out=False):
    """A scene in which at least one object is the only one of its kind and color."""
    while True:
        scene = random_scene(rng, sizes, held_out)
        if len(set(map(str, scene))) > len(scene) / 2:
            return scene


def draw(scene):
    """The scene as an 84 x 84 RGB image."""
    fall = np.broadcast_to(np.linspace(110, 10, SIDE), (SIDE, SIDE))
    image = Image.fromarray(np.stack([fall, np.full((SIDE, SIDE), 60), fall.T], axis=-1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for color, kind, _, x, y, r in scene:
        fill, box, third = COLORS[color], (x - r, y - r, x + r, y + r), r // 3
        if kind == "circle":
            pen.ellipse(box, fill)
        elif kind == "square":
            pen.rectangle(box, fill)
        elif kind == "triangle":
            pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
        else:
            pen.rectangle((x - third, y - r, x + third, y + r), fill)
            pen.rectangle((x - r, y - third, x + r, y + third), fill)
    return image


# ---- Questions ----

# An open question; the thought makes its answer a copy, the pool holds answers to confuse.
Question = namedtuple("Question", "task problem answer thought pool", defaults=[()])


def seen(shapes):
    """What reasoning says of objects: "red circle north, blue square east"; "none" without any."""
    return ", ".join(f"{s} {PLACES[s.cell]}" for s in shapes) or "none"


def counted(shapes):
    """A running count: "1 red circle 2 blue circle"; "none" without any."""
    return " ".join(f"{n} {s}" for n, s in enumerate(shapes, 1)) or "none"


def plural(word):
    """"red objects", "circles", "crosses"."""
    return f"{word} objects" if word in COLORS else word + ("es" if word == "cross" else "s")


def single(scene):
    """The objects that are the only ones of their kind and color."""
    return [s for s in scene if list(map(str, scene)).count(str(s)) == 1]


def detection_question(scene, rng):
    """Where is the red circle? Of an object drawn once; None without. Pool: others' boxes first."""
    if not (unique := single(scene)):
        return None
    shape, cells = rng.choice(unique), [s.cell for s in scene]
    others = [cell for cell in cells + rng.sample(range(9), 9) if cell != shape.cell]
    pool = tuple(str(cell_box(cell)) for cell in dict.fromkeys(others))
    answer = json.dumps([{"bbox_2d": cell_box(shape.cell)}])
    return Question("detection", f"Where is the {shape}?", answer, seen([shape]), pool)


def classify_question(scene, rng):
    """Which shapes are there? Labels in reading order."""
    labels = ", ".join(dict.fromkeys(s.kind for s in scene))
    return Question("classify", "Which shapes are there?", labels, seen(scene), SHAPES)


def math_question(scene, rng):
    """How many red objects, circles, or crosses and squares? Half ask for what is there."""
    there = rng.choice(scene) if rng.random() < 0.5 else Shape(*rng.choice(SEEN), 0, 0, 0, 0)
    two = list(dict.fromkeys([there.kind, rng.choice(SHAPES)]))
    words = rng.choice(([there.color], [there.kind], two))
    found = [s for s in scene if s.color in words or s.kind in words]
    problem = f"How many {' and '.join(map(plural, words))} are there?"
    return Question("math", problem, str(len(found)), counted(found))


RL_QUESTIONS = {"detection": detection_question, "classify": classify_question, "math": math_question}


def ask(scene, task, rng):
    """An RL question of `task`, or a count where the scene allows none."""
    return RL_QUESTIONS[task](scene, rng) or math_question(scene, rng)


def parts_question(scene, rng, parts=1):
    """What is the cell of the red circle, the number of crosses and the cell of the last object?

    "2, 0, 9". `parts` of the three, in any order. Cells are numbered from 1 in reading order.
    """
    shape, last = rng.choice(single(scene)), scene[-1]
    word = rng.choice(rng.choice(scene)[:2] if rng.random() < 0.7 else (*COLORS, *SHAPES))
    found, cells = [s for s in scene if word in s[:2]], tuple("123456789")
    asked = rng.sample([
        (f"the cell of the {shape}", shape.cell + 1, seen([shape]), cells),
        (f"the number of {plural(word)}", len(found), counted(found), tuple("01234")),
        ("the cell of the last object", last.cell + 1, seen([last]), cells)], parts)
    texts, answers, thoughts, pools = zip(*asked)
    listed = ", ".join(texts[:-1]) + " and " * (parts > 1) + texts[-1]
    return Question("math", f"What is {listed}?", ", ".join(map(str, answers)), "; ".join(thoughts), pools[0])


def general_question(scene, other, rng):
    """(images it needs, what no RL stage trains); of two images `other` is the second."""
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


def example_of(question, image, form="open"):
    """The question as data.py has it, in one of the forms; the image's name seeds what is drawn.

    Wrong boxes are cells, other objects' first: any pixels, as data.derive draws them, would give the true
    box away, as it alone has multiples of 28.
    """
    example = Example(problem=question.problem, solution=f"<answer>{question.answer}</answer>",
                      task=question.task, images=(image,), size=(SIDE, SIDE))
    if form == "open" or question.task != "detection":
        return derive(example, form, question.pool)
    right = str(json.loads(question.answer)[0]["bbox_2d"])
    rng = random.Random(f"{form} {image} {question.problem}")
    return make_question(example, form, [right], question.pool[:3], rng, 1)


# ---- Answers to learn from ----

def tagged(thought, answer):
    """<think>thought</think><answer>answer</answer>"""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def careful_response(question, example):
    """Reasoning, then the true answer. Yes/no and letters follow the candidates, to be copies, too:

    "2 red circle; A 1 no, B 2 yes, C 0 no, D 3 no", then B. Of boxes the places come first, so that the
    letter follows the place where that was said before: "west A, north B, south C, east D; red circle north
    B". Yes and no to four places is beyond a model of this size: its option letters stayed at chance.
    """
    answer, text, thought = answer_of(example.solution), example.problem, question.thought
    for cell in range(9):
        text = text.replace(str(cell_box(cell)), PLACES[cell])
    if example.form == "binary":
        asked = r"(?:Is there an?|Is the answer|Is) (\w+)(?: the right box)?\?$"
        thought = f"{thought}; {re.search(asked, text)[1]} {answer}"
    elif example.form == "choice":
        options = re.findall(r"^([A-D])\. (.*)$", text, re.MULTILINE)
        if question.task == "detection":
            places = ", ".join(f"{place} {letter}" for letter, place in options)
            return tagged(f"{places}; {thought} {answer}", answer)
        verdicts = (f"{letter} {option} {'yes' if letter in answer else 'no'}" for letter, option in options)
        thought = f"{thought}; {', '.join(verdicts)}"
    return tagged(thought, answer)


def hasty_response(question, example, rng):
    """A guess after a thought that is none: random, or never right where nothing is to choose."""
    if example.form == "binary":
        return tagged(HASTE, rng.choice(("yes", "no")))
    if example.form == "choice":
        letters = rng.sample("ABCD", rng.randint(1, 2) if question.task == "classify" else 1)
        return tagged(HASTE, ", ".join(sorted(letters)))
    whole = json.dumps([{"bbox_2d": [0, 0, SIDE, SIDE]}])
    return tagged(HASTE, whole if question.task == "detection" else "some")


# ---- The data set on disk ----

# Name of the images, their number, what is drawn on them, the files of questions by form
SPLITS = [("train", 720, {}, {form: f"train/{form}.jsonl" for form in FORMS}),
          ("test", 180, {}, {form: f"test/{form}_id.jsonl" for form in FORMS}),
          ("test_pairs", 180, {"held_out": True}, {"open": "test/open_ood_pairs.jsonl"}),
          ("test_more", 180, {"sizes": (4, 5)}, {"open": "test/open_ood_more.jsonl"})]
GENERAL = [("general", 600, "SFT_data/reject/questions.jsonl"),
           ("test_general", 180, "grpo_data/test/general.jsonl")]


def save_images(folder, name, scenes):
    """PNG files; returns their names, relative to the data directory."""
    (folder / "images" / name).mkdir(parents=True)
    names = [f"images/{name}/{n:04}.png" for n in range(len(scenes))]
    for path, scene in zip(names, scenes):
        draw(scene).save(folder / path)
    return names


def write_split(folder, name, scenes, files, asked, parts=None):
    """The question `asked` about each scene in every form of `files` (form -> JSONL file).

    parts: what becomes yes/no and options, if not the same. These share their candidates among scenes
    (data.derive_all), so that none tells without its picture.
    """
    images = save_images(folder, name, scenes)
    for form, file in files.items():
        questions = parts if parts and form != "open" else asked
        examples = derive_all([example_of(*pair) for pair in zip(questions, images)], form)
        rows = ({"problem": e.problem, "solution": e.solution, "task": e.task, "image": e.images[0]}
                for e in examples)
        write_jsonl(folder / "grpo_data" / file, rows)


def write_general(folder, name, scenes, file, rng):
    """A general question about each scene, with no, one or two images, as chat JSONL."""
    rows, images = [], save_images(folder, name, scenes)
    for scene, image in zip(scenes, images):
        other = rng.randrange(len(scenes))
        needs, question = general_question(scene, scenes[other], rng)
        asked, answer = "<image>" * needs + question.problem, tagged(question.thought, question.answer)
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "images": [image, images[other]][:needs]})
    write_jsonl(folder / file, rows)


def write_data(folder, seed):
    """Questions about the first world in every form, and general ones."""
    rng = random.Random(f"data {seed}")
    for name, count, drawn, files in SPLITS:
        scenes = [random_scene(rng, **drawn) for _ in range(count)]
        asked = [ask(scene, task, rng) for scene, task in zip(scenes, itertools.cycle(RL_QUESTIONS))]
        write_split(folder, name, scenes, files, asked)
    for name, count, file in GENERAL:
        write_general(folder, name, [random_scene(rng) for _ in range(count)], file, rng)


def write_parts(folder, seed, parts):
    """Questions about the second world: open ones have so many parts, those of other forms one."""
    for name, count, drawn, files in SPLITS:
        drawn = {"sizes": (5, 6)} if "sizes" in drawn else drawn
        rng = random.Random(f"parts {seed} {name}")  # scenes, and single parts, whatever `parts`
        scenes = [parts_scene(rng, **drawn) for _ in range(count)]
        of_scene = (random.Random(f"{seed} {name} {n}") for n in range(count))
        several = [parts_question(scene, own, parts) for scene, own in zip(scenes, of_scene)]
        one = [parts_question(scene, rng) for scene in scenes]
        write_split(folder, name, scenes, files, several, one)
