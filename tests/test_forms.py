"""Derived questions of a whole data set: only the image tells what is right, and the blind learner can tell when not."""

import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from forms import derive, derive_all
from rewards import Example, math_accuracy, related
from support.answers import iou, parse_boxes, parse_labels, parse_letters, truth_of
from support.blind import blind_accuracy, candidates
from support.words import UserError
from tools import blind
from tools.blind import made_examples


def numbers(*truths, problem="How many cups are there?"):
    return [Example(problem=problem, solution=str(truth), task="math", images=(f"{n}.png",), where=f"rows:{n}",
                    size=(280, 196)) for n, truth in enumerate(truths)]


def of_task(rows, task):
    return [row for row in rows if row.task == task]


def options_of(example):
    return dict(re.findall(r"^([A-D])\. (.*)$", example.problem, re.MULTILINE))


@pytest.mark.parametrize("rows", [numbers(*range(1, 41)), of_task(made_examples("board", 200), "detection")[:60]])
def test_four_rows_show_the_same_four_options_and_each_is_right_once(rows):
    right_in = defaultdict(list)
    for example in derive_all(rows, "choice"):
        shown = options_of(example)
        boxes = [parse_boxes(text) for text in shown.values()]
        key = frozenset(shown.values()) if not any(boxes) else example.size
        right_in[key].append(shown[truth_of(example)])
        assert len(shown) == 4
    if rows[0].task == "math":
        assert all(sorted(right) == sorted(key) for key, right in right_in.items())


def test_a_candidate_is_as_often_right_as_wrong_and_yes_is_a_coin():
    rows = numbers(*random.Random(0).choices(range(12), k=4000))
    derived = derive_all(rows, "binary")
    shown = defaultdict(Counter)
    for example in derived:
        (text, right), = candidates(example)
        shown[text][right] += 1
    assert all(abs(count[True] / count.total() - 0.5) < 0.09 for count in shown.values())  # 4.5 sigma of about 330 tosses
    assert abs(sum(truth_of(e) == "yes" for e in derived) / len(derived) - 0.5) < 0.04


@pytest.mark.parametrize("kind", [pytest.param("photos", marks=pytest.mark.slow),
                                  pytest.param("board", marks=pytest.mark.slow), "angles"])
def test_a_blind_learner_is_within_eight_points_of_chance(kind):
    """Seeds of the tests alone; row by row, the same learner finds what it may not find here."""
    rows, seen = made_examples(kind, 700, seed="tests"), 0
    for form in ("binary", "choice"):
        derived = derive_all(rows, form)
        for task in ("detection", "classify", "math"):
            if found := blind_accuracy(of_task(derived, task)):
                share, chance, n = found
                assert share < chance + 0.08 + 1.5 / n**0.5, (form, task, found)        # and its own error, 3 sigma
                seen += 1
        worst = "math" if kind == "angles" else "detection"
        alone = [derive(row, form) for row in of_task(rows, worst)]
        assert blind_accuracy(alone)[0] > blind_accuracy(alone)[1] + 0.15
    assert seen == (2 if kind == "angles" else 6)


def test_what_cannot_be_saved_is_said(capsys):
    rows = of_task(made_examples("portraits", 100), "detection")
    assert len(derive_all(rows, "choice")) == 100
    assert "to 100 of 100 rows no other row lends a wrong answer" in capsys.readouterr().err


def test_no_answer_is_most_of_them_and_the_others_stay(capsys):
    rows = numbers(*[1] * 80, *[2] * 7, *[3] * 7, *[4] * 6)
    for form, least, most in (("binary", 36, 40), ("choice", 20, 24)):
        derived = derive_all(rows, form)
        assert least <= len(derived) <= most and "are left out" in capsys.readouterr().err
        own = Counter(truth_of(rows[int(e.where.partition(":")[2])]) for e in derived)
        assert max(own.values()) <= len(derived) / (2 if form == "binary" else 4) + 3
    assert len(derive_all(numbers(*[1] * 15, 2), "binary")) == 16, "of a few rows none is left out"


def test_the_same_rows_give_the_same_questions_in_any_order():
    rows = made_examples("photos", 60)
    for form in ("binary", "choice"):
        first = derive_all(rows, form, seed=3)
        mixed = derive_all(random.Random(0).sample(rows, len(rows)), form, seed=3)
        assert sorted(map(repr, first)) == sorted(map(repr, mixed)) and first == derive_all(rows, form, seed=3)
        assert first != derive_all(rows, form, seed=4)
        places = [rows.index(next(r for r in rows if r.where == e.where)) for e in first]
        assert places == sorted(places)


def test_boxes_of_other_rows_are_wrong_here_and_lie_in_the_image():
    for row in derive_all(of_task(made_examples("photos", 300), "detection"), "choice"):
        shown = {letter: parse_boxes(text)[0] for letter, text in options_of(row).items()}
        right = shown.pop(truth_of(row))
        for box in shown.values():
            assert iou(box, right) < 0.3 and 0 <= box[0] < box[2] <= row.size[0] and 0 <= box[1] < box[3] <= row.size[1]


def test_nothing_offered_as_absent_may_name_what_is_there():
    labels = ["sofa", "couch", "Dog", "dogs", "fried rice", "rice", "car", "automobile", "tv", "cup", "mug, Cup"]
    rng = random.Random(0)
    rows = [Example(problem="What is there?", solution=", ".join(rng.sample(labels, rng.randint(1, 3))), task="classify",
                    images=(f"{n}.png",), where=f"rows:{n}") for n in range(200)]
    for row, form in ((row, form) for form in ("binary", "choice") for row in derive_all(rows, form)):
        present = parse_labels(rows[int(row.where.partition(":")[2])].solution)
        for text, right in candidates(row):
            assert right if text in present else not right and not any(related(text, label) for label in present)
        texts = [text.lower() for text, _ in candidates(row)]
        assert len(set(texts)) == len(texts)


def test_questions_with_several_right_letters_are_among_them():
    letters = Counter(len(parse_letters(truth_of(e))) for e in of_task(
        derive_all(of_task(made_examples("photos", 400), "classify"), "choice"), "classify"))
    assert letters[1] > 20 and letters[2] > 20


def test_listed_options_keep_their_letters_and_are_never_listed_twice():
    listed = "How long is AB?\nA. 3 cm\nB. 4 cm\nC. 5 cm\nD. 6 cm"
    rows = [replace(row, problem=listed) for row in numbers("B", "4 cm", "C")]
    for row, right in zip(derive_all(rows, "choice"), "BBC"):
        assert row.problem == listed and truth_of(row) == right
    for row in derive_all(rows, "binary"):
        assert re.fullmatch(re.escape(listed) + r"\nIs the answer [A-D]\?", row.problem)


@pytest.mark.parametrize("truths", [["Yes", "No"] * 20, ["yes", "no", "Yes", "No"] * 10])
def test_a_verdict_keeps_its_case(truths):
    rows = numbers(*truths, problem="Is AB equal to CD?")
    for row in derive_all(rows, "binary"):
        own = truth_of(rows[int(row.where.partition(":")[2])])
        assert candidates(row)[0][0].istitle() == own.istitle()


@pytest.mark.parametrize("truths", [
    [f"{n}°" for n in range(20, 60)], [f"{n / 10} cm" for n in range(7, 60)],
    [f"{n} cm^2" for n in range(10, 50)], [f"{n},000" for n in range(1, 40)], [f"3\\sqrt{{{n}}}" for n in range(2, 40)]])
def test_numbers_are_written_as_other_truths_are(truths):
    for row in derive_all(numbers(*truths), "choice"):
        shown = options_of(row)
        assert set(shown.values()) <= set(truths)
        assert [letter for letter, text in shown.items() if math_accuracy(text, truth_of(numbers(*truths)[
            int(row.where.partition(":")[2])]))] == [truth_of(row)]


def test_truths_of_a_shape_of_their_own_get_invented_numbers():
    rows = numbers(*range(30), "7.25 m", "x = 3")
    derived = {row.where: row for row in derive_all(rows, "choice")}
    assert sorted(re.sub(r"\d+", "0", t) for t in options_of(derived["rows:30"]).values()) == ["0.0 m"] * 4
    assert sorted(re.sub(r"\d+", "0", t) for t in options_of(derived["rows:31"]).values()) == ["x = 0"] * 4


def test_rows_that_cannot_be_derived_are_named_together_or_dropped(capsys):
    rows = numbers(*range(30)) + [replace(row, task="general", where=f"chat:{n}") for n, row in enumerate(numbers(1, 2))]
    with pytest.raises(UserError, match="(?s)chat:0: no choice question.*chat:1: no choice question"):
        derive_all(rows, "choice")
    assert len(derive_all(rows, "choice", skip_bad_rows=True)) == 30
    assert "dropped 2 rows" in capsys.readouterr().err
    for form in ("binary", "choice"):
        with pytest.raises(UserError, match="no wrong answer is at hand"):
            derive_all(numbers("isosceles"), form)


# ---- The blind learner itself ----

def questions(form, answer_of, n=400):
    """Questions with a giveaway of one's choice: answer_of(rng) -> (candidate texts, place of the right one or verdict)."""
    rng, rows = random.Random(0), []
    for k in range(n):
        texts, right = answer_of(rng)
        lines = f"Is the answer {texts[0]}?" if form == "binary" else "\n".join(map("{}. {}".format, "ABCD", texts))
        solution = ("no", "yes")[right] if form == "binary" else "ABCD"[right]
        rows.append(Example(problem=f"What?\n{lines}", solution=solution, task="math", form=form, where=f"{k}",
                            images=(f"{k}.png",), size=(100, 100)))
    return rows


def smallest(rng):
    texts = rng.sample(range(1, 100), 4)
    return texts, texts.index(min(texts))


def large_box(rng):
    texts = [json.dumps([x := rng.randrange(50), y := rng.randrange(50), x + 9, y + 9]) for _ in range(4)]
    right = rng.randrange(4)
    texts[right] = json.dumps([5, 5, 90, 95])
    return texts, right


@pytest.mark.parametrize("form, giveaway, least", [
    ("choice", smallest, 0.9), ("choice", large_box, 0.9), ("choice", lambda rng: (rng.sample(range(99), 4), 2), 0.9),
    ("binary", lambda rng: ([n := rng.randrange(10, 99)], n % 5 == 0), 0.9),
    ("binary", lambda rng: ([w := rng.choice("dog cat bus car".split())], w in ("dog", "bus")), 0.9)])
def test_a_giveaway_is_found_and_told(form, giveaway, least):
    rows = questions(form, giveaway)
    assert blind_accuracy(rows)[0] > least
    assert "WARNING" in blind.blind_report(rows)[0]


@pytest.mark.parametrize("form", ["binary", "choice"])
def test_where_there_is_nothing_to_find_nothing_is_told(form):
    rows = questions(form, lambda rng: (rng.sample(range(1, 999), 4), rng.randrange(2 if form == "binary" else 4)))
    share, chance, n = blind_accuracy(rows)
    assert abs(share - chance) < 0.1 and n > 100
    assert len(said := blind.blind_report(rows)) == 1 and "WARNING" not in said[0]


def test_the_command_looks_at_the_questions_of_a_run(tmp_path, capsys):
    (tmp_path / "train").mkdir()
    rows = [{"problem": "How much is it?", "solution": str(1 + n % 9), "task": "math"} for n in range(200)]
    (tmp_path / "train" / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert blind.main(["--data", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"binary math: without looking \d+% right, by chance \d+% \(\d+ questions\)", said)
    assert blind.main(["--data", str(tmp_path / "none")]) == 2 and "no folder" in capsys.readouterr().err
