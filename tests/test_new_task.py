"""A new task is one record: "point", whose answer is a point inside the true box.

What stands between the lines is the whole diff, and it would stand in rewards.py. Nothing else knows it: rows
are read, checked and resized, questions derived, answers paid, and it trains.
"""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from runs import load_rows

import currreft
from data import instruction
from forms import derive, derive_all
from rewards import TASKS, Task, accuracy_reward, detection_truth_error, format_reward, resize_boxes
from support.answers import parse_boxes, parse_letters, truth_of
from support.tiny import tiny_checkpoint, tiny_image, write_jsonl
from support.words import UserError

# --------------------------------------------------------------------------------------------------

POINT_2D = re.compile(r'\{"point_2d": \[([0-9]{1,5}), ([0-9]{1,5})\]\}')


def parse_point(text):
    """(x, y) of {"point_2d": [x, y]}; None for anything else."""
    found = POINT_2D.fullmatch(text.strip())
    return found and (int(found[1]), int(found[2]))


def spell_point(x, y):
    return json.dumps({"point_2d": [round(x), round(y)]})


def resize_points(text, old, new):
    """A text with its points and boxes in pixels of another size."""
    sx, sy = new[0] / old[0], new[1] / old[1]
    text = resize_boxes(text, old, new)
    return POINT_2D.sub(lambda found: spell_point(int(found[1]) * sx, int(found[2]) * sy), text)


def point_accuracy(answer, truth, **_):
    """1 if the point lies inside a box of the truth."""
    point = parse_point(answer)
    return float(point is not None and any(x1 <= point[0] <= x2 and y1 <= point[1] <= y2
                                           for x1, y1, x2, y2 in parse_boxes(truth) or []))


def center(example):
    """The middle of the first box, as an answer."""
    x1, y1, x2, y2 = parse_boxes(truth_of(example))[0]
    return spell_point((x1 + x2) / 2, (y1 + y2) / 2)


POINT = Task(
    accuracy=point_accuracy, truth_error=detection_truth_error, resize=resize_points,
    rule=lambda _: 'Answer with one point in pixels, {"point_2d": [x, y]}.',
    readable=lambda answer: parse_point(answer) is not None,
    spell=center, right=lambda example: [center(example)],
    wrong=lambda text, example: parse_point(text) and not point_accuracy(text, truth_of(example)),
    invent=lambda example, rng: (spell_point(*map(rng.randrange, example.size)) for _ in range(99)))

# --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Rows of the task on images of mixed sizes, each with its box in another corner."""
    monkeypatch.setitem(TASKS, "point", POINT)
    sizes = [(200, 100), (112, 84), (300, 560), (640, 480)] * 5
    for n, size in enumerate(sizes):
        tiny_image(tmp_path / f"{n}.png", size)
    corners = [(0.5 * (n // 2 % 2), 0.5 * (n % 2)) for n in range(len(sizes))]
    boxes = [[round(w * x), round(h * y), round(w * (x + 0.4)), round(h * (y + 0.4))]
             for (w, h), (x, y) in zip(sizes, corners)]
    return [{"problem": f"Point at thing {n}.", "task": "point", "image": f"{n}.png",
             "solution": str(box)} for n, box in enumerate(boxes)]


def test_its_rows_are_read_checked_and_resized(rows, tmp_path):
    example = load_rows(tmp_path, rows[0] | {"solution": '{"bbox_2d": [20, 10, 100, 50]}'})[0]
    assert example.size == (196, 112) and parse_boxes(truth_of(example)) == [(20, 11, 98, 56)]
    assert instruction(example).endswith('{"point_2d": [x, y]}.')
    for change, words in (({"solution": "the middle"}, "neither"), ({"image": []}, "needs an"),
                          ({"solution": '{"bbox_2d": [20, 10, 900, 50]}'}, "leaves the image"),
                          ({"task": "pointing"}, "'pointing', not one of .*, general, point;")):
        with pytest.raises(UserError, match=words):
            load_rows(tmp_path, rows[0] | change)


def test_a_fork_is_told_what_it_forgot(rows, tmp_path, monkeypatch, capsys):
    """81 of 320 options lay outside their image when `resize` knew boxes only, or was not there."""
    for name in ("readable", "wrong"):
        with pytest.raises(ValueError, match=rf"\({name}\)"):
            replace(POINT, **{name: None})
    monkeypatch.setitem(TASKS, "point", replace(POINT, resize=resize_boxes))
    with pytest.raises(UserError, match=r"`resize` of task point finds no .* in '\{\"point_2d"):
        load_rows(tmp_path, *rows)
    origin = replace(POINT, spell=lambda _: spell_point(0, 0), right=lambda _: [spell_point(0, 0)])
    monkeypatch.setitem(TASKS, "point", replace(origin, resize=resize_boxes, accuracy=lambda *_: 1.0))
    load_rows(tmp_path, rows[0])  # which no change of size changes
    monkeypatch.setitem(TASKS, "point", replace(POINT, resize=None))
    load_rows(tmp_path, *rows)
    assert "20 answers of tasks without `resize` hold lists of numbers" in capsys.readouterr().err
    load_rows(tmp_path, rows[0] | {"task": "math", "solution": "[1, 2]", "image": []})
    assert capsys.readouterr().err == "", "nor where there is no image"


def test_its_answers_are_paid(rows, tmp_path):
    example = load_rows(tmp_path, rows[0])[0]
    assert truth_of(example) == "[0, 0, 78, 45]"
    for answer, accuracy, formatted in (('{"point_2d": [50, 30]}', 1, 1), ("[0, 0, 78, 45]", 0, 0),
                                        ('{"point_2d": [150, 30]}', 0, 1), ("no objects", 0, 0)):
        text = f"<think>I look.</think><answer>{answer}</answer>"
        assert accuracy_reward(text, example) == accuracy, answer
        assert format_reward(text, example) == formatted, answer
    with pytest.raises(KeyError):
        accuracy_reward(text, replace(example, task="pointing"))


@pytest.mark.parametrize("alone", [True, False])
def test_its_questions_hold_points_within_their_own_image(rows, tmp_path, alone):
    """On images of mixed sizes, whether a row's wrong points are invented or lent by other rows."""
    examples, said = load_rows(tmp_path, *rows), Counter()
    for form in ("binary", "choice"):
        derived = [derive(e, form) for e in examples] if alone else derive_all(examples, form)
        assert len(derived) == len(examples)
        for question, example in zip(derived, examples):
            points = list(map(parse_point, re.findall(r'\{"point_2d.*?\}', question.problem)))
            assert all(x <= example.size[0] and y <= example.size[1] for x, y in points)
            inside = {"ABCD"[n] for n, point in enumerate(points)
                      if point_accuracy(spell_point(*point), truth_of(example))}
            if form == "binary":
                assert len(points) == 1 and truth_of(question) == ("yes" if inside else "no")
            else:
                assert len(set(points)) == 4 and inside == parse_letters(truth_of(question))
            said[truth_of(question)] += 1
    assert set(said) == {"yes", "no", *"ABCD"}


def test_it_trains_through_the_curriculum(rows, tmp_path):
    """Binary and choice are derived; an sft stage teaches a point, as the scorer reads it."""
    write_jsonl(tmp_path / "train" / "open.jsonl", rows[:4])
    flags = {"model": tiny_checkpoint(tmp_path / "model"), "data": tmp_path, "out": tmp_path / "r",
             "prompts_per_step": 2, "num_generations": 2, "sft_batch": 2,
             "max_completion_length": 4}
    currreft.main([*(f"--{name}={value}" for name, value in flags.items()),
                   "--stages", "binary:1", "choice:1", "open:1", "sft:1"])
    lines = list(map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()))
    assert [line["stage"] for line in lines] == ["binary", "choice", "open", "sft"]
    assert all("reward/accuracy/point" in line for line in lines[:3])
