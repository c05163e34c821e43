"""A new task is one record: the README's example, "point", whose answer is a point inside a box of the truth.

What stands between the lines is the whole diff, and it would stand in tasks.py. Nothing else knows that it exists; the
tests show that boxes are resized, truths checked, questions derived, answers paid, and that it trains.
"""

import json
import re

import pytest

import currreft
from data import instruction, load_examples
from forms import derive
from rewards import TASKS, Task, accuracy_reward, format_reward
from support.answers import parse_boxes, truth_of
from support.tiny import tiny_checkpoint, tiny_image, write_jsonl
from support.words import UserError

# ---------------------------------------------------------------------------------------------------------------------


def parse_point(text):
    """(x, y) of {"point_2d": [x, y]}; None for anything else."""
    found = re.fullmatch(r'\{"point_2d": \[([0-9]{1,5}), ([0-9]{1,5})\]\}', text.strip())
    return found and (int(found[1]), int(found[2]))


def spell_point(x, y):
    return json.dumps({"point_2d": [round(x), round(y)]})


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
    accuracy=point_accuracy, fault=detection_fault, boxes=True, needs_image=True,
    rule=lambda _: 'Answer with one point in pixels, {"point_2d": [x, y]}.',
    readable=lambda answer: parse_point(answer) is not None,
    spell=center, right=lambda example: [center(example)],
    wrong=lambda text, example: parse_point(text) is not None and not point_accuracy(text, truth_of(example)),
    invent=lambda example, rng: [spell_point(rng.randrange(example.size[0]), rng.randrange(example.size[1]))
                                 for _ in range(100)])


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "point", POINT)
    for n in range(4):
        tiny_image(tmp_path / f"{n}.png", (200, 100))
    return [{"problem": f"Point at thing {n}.", "solution": '{"bbox_2d": [20, 10, 100, 50]}', "task": "point",
             "image": f"{n}.png"} for n in range(4)]


def test_its_rows_are_read_checked_and_resized(rows, tmp_path):
    example = load_examples(write_jsonl(tmp_path / "open.jsonl", rows))[0]
    assert example.size == (196, 112) and parse_boxes(truth_of(example)) == [(20, 11, 98, 56)]
    assert instruction(example).endswith('{"point_2d": [x, y]}.')
    for change, words in (({"solution": "the middle"}, "neither"), ({"image": None}, "needs an image"),
                          ({"solution": '{"bbox_2d": [20, 10, 900, 50]}'}, "leaves the image")):
        with pytest.raises(UserError, match=words):
            load_examples(write_jsonl(tmp_path / "bad.jsonl", [{k: v for k, v in (rows[0] | change).items()
                                                               if v is not None}]))


def test_its_answers_are_paid(rows, tmp_path):
    example = load_examples(write_jsonl(tmp_path / "open.jsonl", rows))[0]
    for answer, accuracy, formatted in (('{"point_2d": [50, 30]}', 1, 1), ('{"point_2d": [150, 30]}', 0, 1),
                                        ("[20, 11, 98, 56]", 0, 0), ("there", 0, 0), ("no objects", 0, 0)):
        text = f"<think>I look.</think><answer>{answer}</answer>"
        assert (accuracy_reward(text, example), format_reward(text, example)) == (accuracy, formatted), answer


def test_its_binary_and_choice_forms_hold_points_alone(rows, tmp_path):
    example = load_examples(write_jsonl(tmp_path / "open.jsonl", rows))[0]
    said = set()
    for seed in range(40):
        binary, choice = derive(example, "binary", seed=seed), derive(example, "choice", seed=seed)
        point = re.search(r'Is the answer (\{.*\})\?$', binary.problem)[1]
        said.add(truth_of(binary))
        assert (truth_of(binary) == "yes") == bool(point_accuracy(point, truth_of(example)))
        options = dict(line.split(". ", 1) for line in choice.problem.splitlines()[-4:])
        inside = [letter for letter, text in options.items() if point_accuracy(text, truth_of(example))]
        assert list(options) == list("ABCD") and inside == [truth_of(choice)] and all(map(parse_point, options.values()))
    assert said == {"yes", "no"}


def test_it_trains_through_the_curriculum(rows, tmp_path):
    """Binary and choice are derived; an sft stage teaches a point, which is what the scorer reads, not the box."""
    write_jsonl(tmp_path / "train" / "open.jsonl", rows)
    model = tiny_checkpoint(tmp_path / "model")
    currreft.main(["--model", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--stages", "binary:1",
                   "choice:1", "open:1", "sft:1", "--prompts_per_step", "2", "--num_generations", "2", "--sft_batch",
                   "2", "--max_completion_length", "4", "--threads", "1"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["binary", "choice", "open", "sft"]
    assert all("reward/accuracy/point" in line for line in lines[:3])


def test_an_unknown_task_falls_through_to_no_other(rows, tmp_path):
    with pytest.raises(UserError, match="'pointing', not one of detection, classify, math, general, point"):
        load_examples(write_jsonl(tmp_path / "open.jsonl", [rows[0] | {"task": "pointing"}]))
    example = load_examples(write_jsonl(tmp_path / "open.jsonl", rows))[0]
    unknown = type("Other", (), {"form": "open", "task": "pointing", "solution": "1"})
    with pytest.raises(KeyError):
        accuracy_reward("<think>a</think><answer>1</answer>", unknown)
    assert example.task == "point"
