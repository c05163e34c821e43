"""Derived questions: true and fair, such that only the image tells what is right."""

import hashlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

import forms
from forms import derive, derive_all, wrong_answers
from rewards import FORMS, TASKS, Example, math_accuracy, related
from support.answers import iou, parse_boxes, parse_labels, parse_letters, truth_of
from support.blind import blind_accuracy, blind_report, candidates
from support.tiny import write_jsonl
from support.words import UserError
from tools import blind
from tools.blind import made_examples

OPEN = {
    "detection": Example(problem="Where is the cup?", solution='[{"bbox_2d": [28, 14, 84, 70]}]',
                         task="detection", images=("x/a.png",), size=(280, 196)),
    "classify": Example(problem="List.", solution="<answer>cat, dog</answer>", task="classify"),
    "math": Example(problem="How many?", solution="<think>..</think><answer>3</answer>"),
}
RIGHT = {"detection": {"[28, 14, 84, 70]"}, "classify": {"cat", "dog"}, "math": {"3"}}


def numbers(*truths, problem="How many cups are there?"):
    return [Example(problem=problem, solution=str(truth), images=(f"{n}.png",), where=f"rows:{n}",
                    size=(280, 196)) for n, truth in enumerate(truths)]


def truth_in(rows, derived):
    """The true answer of the open row that a question was made of."""
    return truth_of(rows[int(derived.where.partition(":")[2])])


def of_task(rows, task):
    return [row for row in rows if row.task == task]


def options_of(example):
    return dict(re.findall(r"^([A-D])\. (.*)$", example.problem, re.MULTILINE))


# ---- The same for the same seed ----

def test_the_worked_example_is_what_happens():
    rows = numbers(3, 4, 5, 8)
    for row, choice, binary in zip(rows, derive_all(rows, "choice"), derive_all(rows, "binary")):
        options = "  ".join(f"{letter}. {text}" for letter, text in options_of(choice).items())
        said = (rf"    {truth_of(row)}   {options} -> {truth_of(choice)} +"
                rf"{binary.problem.splitlines()[-1]} -> {truth_of(binary)}\n")
        assert re.search(said.replace("?", r"\?").replace(". ", r"\. "), forms.__doc__), said


def test_questions_are_those_of_earlier_versions():
    """A run that is resumed, and a number in the docs, rest on the same questions."""
    rng = random.Random(7)
    rows = numbers(*rng.choices(range(30), k=80))
    rows += [replace(OPEN["classify"], problem="List them.", where=f"labels:{n}", images=(f"{n}",),
                     solution=", ".join(rng.sample(["cat", "dog", "bus", "car"], 2))) for n in range(60)]
    rows += [replace(OPEN["detection"], solution=f"[[{n}, 2, {n + 40}, 60]]", where=f"boxes:{n}",
                     size=(280, 196 + 28 * (n % 3))) for n in range(60)]
    for way, digest in ((lambda form, seed: (derive(row, form, seed=seed) for row in rows), "7a62c6ad44a7337d"),
                        (lambda form, seed: derive_all(rows, form, seed), "813abc86f5f4ad2e")):
        made = [(e.where, e.problem, e.solution) for form in FORMS[:2] for seed in (0, 5) for e in way(form, seed)]
        assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == digest


def test_the_same_rows_give_the_same_questions_in_any_order_and_place():
    rows = made_examples("photos", 40)
    for form in ("binary", "choice"):
        first = derive_all(rows, form, seed=3)
        mixed = [replace(e, images=(f"/elsewhere/{e.images[0]}",)) for e in rows]
        random.Random(0).shuffle(mixed)
        mixed = derive_all(mixed, form, seed=3)
        assert {(e.where, e.problem, e.solution) for e in mixed} == {
            (e.where, e.problem, e.solution) for e in first} and len(mixed) == len(first)
        assert first != derive_all(rows, form, seed=4)
        places = [rows.index(next(r for r in rows if r.where == e.where and r.task == e.task)) for e in first]
        assert places == sorted(places)


# ---- One row by itself ----

@pytest.mark.parametrize("task", OPEN)
def test_one_rows_questions_are_true_and_their_answers_uniform(task):
    rows = [replace(OPEN[task], problem=f"{OPEN[task].problem} ({n})") for n in range(400)]
    verdicts, letters = Counter(), Counter()
    for row in rows:
        binary, choice = derive(row, "binary"), derive(row, "choice")
        (text, right), = candidates(binary)
        assert right == (text in RIGHT[task])
        verdicts[truth_of(binary)] += 1
        options, said = options_of(choice), parse_letters(truth_of(choice))
        assert list(options) == list("ABCD") and len(set(options.values())) == 4 and said
        assert said == {letter for letter, text in options.items() if text in RIGHT[task]}
        letters.update(said)
    assert set(verdicts) == {"yes", "no"} and 160 < verdicts["yes"] < 240
    assert set(letters) == set("ABCD") and max(letters.values()) < 1.6 * min(letters.values())
    assert len({derive(OPEN[task], "choice", seed=seed).problem for seed in range(9)}) > 4


def test_wrong_boxes_are_wrong_and_inside():
    for boxes in ([[0, 0, 280, 196]], [[28, 14, 84, 70], [9, 9, 10, 10]],
                  [[5, 5, 270, 190], [0, 0, 140, 98]], []):
        example = replace(OPEN["detection"], solution=json.dumps(boxes) if boxes else "no objects")
        wrong = [json.loads(text) for text in wrong_answers(example, (), random.Random(0))]
        assert len(wrong) == 3
        for box in wrong:
            assert 0 <= box[0] < box[2] <= 280 and 0 <= box[1] < box[3] <= 196
            assert all(iou(box, true) < 0.3 for true in boxes)
    choice = derive(example, "choice")
    assert options_of(choice)[truth_of(choice)] == "no objects"


@pytest.mark.parametrize("truth, pattern", [
    ("3", r"\d+"), ("0", r"\d+"), ("-5", r"-[1-9]\d*"), ("0.50", r"0\.\d\d"), ("12 cm", r"\d+ cm"),
    (r"\frac{3}{4}", r"\\frac\{[1-9]\d*\}\{[1-9]\d*\}"), ("1,200", r"(\d,)?\d{3}"), ("9" * 60, r"\d{60,61}")])
def test_wrong_numbers_look_like_the_truth(truth, pattern):
    for seed in range(50):
        wrong = wrong_answers(replace(OPEN["math"], solution=truth), (), random.Random(seed))
        assert len({truth, *wrong}) == 4
        assert all(re.fullmatch(pattern, text) for text in wrong), wrong


def test_a_truth_is_in_no_place_among_wrong_numbers_the_likelier():
    row = replace(OPEN["math"], solution="20")
    wrong = (wrong_answers(row, (), random.Random(seed)) for seed in range(800))
    places = Counter(sum(int(text) < 20 for text in texts) for texts in wrong)
    assert set(places) == {0, 1, 2, 3} and min(places.values()) > 100


# ---- Sets of rows ----

@pytest.mark.parametrize("rows", [
    numbers(*range(1, 41)), of_task(made_examples("board", 200), "detection")[:60]])
def test_four_rows_show_the_same_four_options_and_each_is_right_once(rows):
    right_in = defaultdict(list)
    for example in derive_all(rows, "choice"):
        shown = options_of(example)
        right_in[frozenset(shown.values())].append(shown[truth_of(example)])
        assert len(shown) == 4
    if rows[0].task == "math":
        assert all(sorted(right) == sorted(key) for key, right in right_in.items())


@pytest.mark.slow
def test_a_candidate_is_as_often_right_as_wrong_and_yes_is_a_coin():
    derived = derive_all(numbers(*random.Random(0).choices(range(12), k=4000)), "binary")
    shown = defaultdict(Counter)
    for example in derived:
        (text, right), = candidates(example)
        shown[text][right] += 1
    for count in shown.values():
        assert abs(count[True] / count.total() - 0.5) < 0.09  # 4.5 sigma
    assert abs(sum(truth_of(e) == "yes" for e in derived) / len(derived) - 0.5) < 0.04


def test_yes_no_and_letters_take_turns_in_each_set_and_in_few_rows():
    """Of 40 pictures one constant answer was right on 69 % of yes/no questions and 52 % of options."""
    asked, shown = defaultdict(list), defaultdict(list)
    for example in derive_all(numbers(*range(40)), "binary"):
        asked[candidates(example)[0][0]].append(truth_of(example))
    for example in derive_all(numbers(*range(40)), "choice"):
        shown[frozenset(options_of(example).values())].append(truth_of(example))
    assert all(sorted(said) == ["no", "yes"] for said in asked.values()) and len(asked) == 20
    assert all(sorted(said) == list("ABCD") for said in shown.values()) and len(shown) == 10
    for seed, form, task in itertools.product(range(5), FORMS[:2], RIGHT):
        derived = of_task(derive_all(made_examples("photos", 40, seed), form, seed), task)
        said = Counter(letter for example in derived for letter in truth_of(example).split(", "))
        assert max(said.values()) - min(said.values()) <= 1 and len(said) == (2 if form == "binary" else 4)


def chinese(count):
    """Counts, years and percentages."""
    rng = random.Random("chinese")
    asked = [("图中有几个{}？", 1, 12), ("{}哪一年最高？", 1985, 2024), ("{}占预算的百分之几？", 13, 96)]
    made = [(problem.format("".join(rng.sample("房租食品销售交通煤炭小麦", 3))), rng.randrange(least, end))
            for problem, least, end in rng.choices(asked, k=count)]
    return [replace(row, problem=problem) for (problem, _), row in zip(made, numbers(*(n for _, n in made)))]


@pytest.mark.parametrize("rows, kept", [
    (made_examples("mixed math", 400, "tests"), 0.95), (chinese(400), 0.95),
    ([replace(e, problem="And here?", history=(("user", e.problem),)) for e in made_examples("mixed math", 400, "x")],
     0.95),
    (made_examples("referring", 700, "tests"), 0.4),
    pytest.param(made_examples("mixed math", 2000, "tests"), 0.98, marks=pytest.mark.slow)])
def test_the_words_of_the_question_do_not_tell(rows, kept, monkeypatch):
    """Nor is the learner deaf: in sets among rows of any kind it finds the year by "In which year"."""
    for form in FORMS[:2]:
        share, chance, n = blind_accuracy(derived := derive_all(rows, form))
        assert share < chance + 0.08 + 1.5 / n**0.5 and len(derived) > kept * len(rows), (form, share, len(derived))
    monkeypatch.setattr(forms, "kinds", lambda questions, answers: [range(len(questions))])
    for form in FORMS[:2]:
        share, chance, n = blind_accuracy(derived := derive_all(rows, form))
        assert share > chance + 0.2 and "WARNING" in blind_report(derived)[0], (form, share)


def test_three_rows_of_a_kind_are_asked_beside_many_of_another():
    rows = numbers(*range(1980, 2020), 3, 5, 8)
    rows = [replace(row, problem=f"In which year was house {n} built?" if n < 40 else f"How many doors has house {n}?")
            for n, row in enumerate(rows)]
    derived = derive_all(rows, "choice")
    assert len(derived) == len(rows)
    for example in derived[-3:]:
        assert max(map(int, options_of(example).values())) < 100


def test_no_answer_is_most_of_them_and_the_others_stay(capsys):
    rows = numbers(*[1] * 80, *[2] * 7, *[3] * 7, *[4] * 6)
    for form, least, most in (("binary", 36, 40), ("choice", 20, 24)):
        derived = derive_all(rows, form)
        assert least <= len(derived) <= most and "are left out" in capsys.readouterr().err
        own = Counter(truth_in(rows, e) for e in derived)
        assert max(own.values()) <= len(derived) / (2 if form == "binary" else 4) + 3
    assert len(derive_all(numbers(*[1] * 15, 2), "binary")) == 16, "of a few rows none is left out"


def test_boxes_of_other_rows_are_wrong_here_and_lie_in_the_image():
    for row in derive_all(of_task(made_examples("photos", 150), "detection"), "choice"):
        shown = {letter: parse_boxes(text)[0] for letter, text in options_of(row).items()}
        right = shown.pop(truth_of(row))
        for x1, y1, x2, y2 in shown.values():
            assert 0 <= x1 < x2 <= row.size[0] and 0 <= y1 < y2 <= row.size[1]
            assert iou((x1, y1, x2, y2), right) < 0.3


def test_nothing_offered_as_absent_may_name_what_is_there():
    labels = "sofa:couch:Dog:dogs:fried rice:rice:car:automobile:tv:cup:mug, Cup".split(":")
    rng = random.Random(0)
    rows = [replace(row, task="classify", solution=", ".join(rng.sample(labels, rng.randint(1, 3))))
            for row in numbers(*range(200), problem="What is there?")]
    for row in [*derive_all(rows, "binary"), *derive_all(rows, "choice")]:
        present = parse_labels(truth_in(rows, row))
        for text, right in candidates(row):
            assert right == (text in present)
            assert right or not any(related(text, label) for label in present)
        texts = [text.lower() for text, _ in candidates(row)]
        assert len(set(texts)) == len(texts)


def test_questions_with_several_right_letters_are_among_them():
    rows = derive_all(of_task(made_examples("photos", 200), "classify"), "choice")
    letters = Counter(len(parse_letters(truth_of(row))) for row in rows)
    assert letters[1] > 10 and letters[2] > 10


def test_listed_options_keep_their_letters_and_are_never_listed_twice():
    listed = "How long is AB?\nA. 3 cm\nB. 4 cm\nC. 5 cm\nD. 6 cm"
    rows = numbers("B", "4 cm", "C", problem=listed)
    for row, right in zip(derive_all(rows, "choice"), "BBC"):
        assert row.problem == listed and truth_of(row) == right
    for row in derive_all(rows, "binary"):
        assert re.fullmatch(re.escape(listed) + r"\nIs the answer [A-D]\?", row.problem)


def test_a_verdict_keeps_its_case():
    rows = numbers(*["yes", "no", "Yes", "No"] * 10, problem="Is AB equal to CD?")
    for row in derive_all(rows, "binary"):
        assert candidates(row)[0][0].istitle() == truth_in(rows, row).istitle()


@pytest.mark.parametrize("truths", [
    [f"{n}°" for n in range(20, 60)], [f"{n / 10} cm" for n in range(7, 60)],
    [f"{n} cm^2" for n in range(10, 50)], [f"{n},000" for n in range(1, 40)],
    [f"3\\sqrt{{{n}}}" for n in range(2, 40)]])
def test_numbers_are_written_as_other_truths_are(truths):
    rows = numbers(*truths)
    for row in derive_all(rows, "choice"):
        shown, truth = options_of(row), truth_in(rows, row)
        assert set(shown.values()) <= set(truths)
        assert [x for x in shown if math_accuracy(shown[x], truth)] == [truth_of(row)]


@pytest.mark.slow
def test_truths_of_a_shape_of_their_own_get_invented_numbers_and_it_is_said(capsys):
    rows = derive_all(numbers(*range(30), "7.25 m", "x = 3"), "choice")
    for row, shape in zip(rows[-2:], ("0.0 m", "x = 0")):
        assert [re.sub(r"\d+", "0", text) for text in options_of(row).values()] == [shape] * 4
    derive_all(of_task(made_examples("portraits", 100), "detection"), "choice")
    assert "to 100 of 100 rows no other row lends a wrong answer" in capsys.readouterr().err


def test_rows_that_cannot_be_derived_are_named_together_or_dropped(capsys):
    rows = numbers(*range(30)) + [replace(row, task="general", where=f"chat:{n}")
                                  for n, row in enumerate(numbers(1, 2))]
    with pytest.raises(UserError, match="(?s)chat:0: .* no choice form.*chat:1: .* no choice form"):
        derive_all(rows, "choice")
    assert len(derive_all(rows, "choice", skip_bad_rows=True)) == 30
    assert "dropped 2 rows" in capsys.readouterr().err
    for form in ("binary", "choice"):
        with pytest.raises(UserError, match="no wrong answer is at hand"):
            derive_all(numbers("isosceles"), form)
        with pytest.raises(UserError, match="no wrong answer is at hand"):
            derive(OPEN["classify"], form, pool=("Cat", "dog"))
        assert TASKS["general"].right is None and derive_all(rows, "open") == rows


# ---- The blind learner ----

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
                assert share < chance + 0.08 + 1.5 / n**0.5, (form, task, found)  # 3 sigma of it
                seen += 1
        worst = "math" if kind == "angles" else "detection"
        alone = [derive(row, form) for row in of_task(rows, worst)]
        assert blind_accuracy(alone)[0] > blind_accuracy(alone)[1] + 0.15
    assert seen == (2 if kind == "angles" else 6)


def questions(form, answer_of, n=400):
    """Questions with a giveaway: answer_of(rng) -> (candidate texts, place of the right one)."""
    rng, rows = random.Random(0), []
    for k in range(n):
        texts, right = answer_of(rng)
        lines = "\n".join(map("{}. {}".format, "ABCD", texts))
        lines = f"Is the answer {texts[0]}?" if form == "binary" else lines
        solution = ("no", "yes")[right] if form == "binary" else "ABCD"[right]
        rows.append(Example(problem=f"What?\n{lines}", solution=solution, form=form, where=f"{k}",
                            images=(f"{k}.png",), size=(100, 100)))
    return rows


def smallest(rng):
    texts = rng.sample(range(1, 100), 4)
    return texts, texts.index(min(texts))


def large_box(rng):
    texts = [json.dumps([x := rng.randrange(50), y := rng.randrange(50), x + 9, y + 9]) for _ in range(4)]
    texts[right := rng.randrange(4)] = json.dumps([5, 5, 90, 95])
    return texts, right


@pytest.mark.parametrize("form, giveaway", [
    ("choice", smallest), ("choice", large_box),
    ("choice", lambda rng: (rng.sample(range(99), 4), 2)),
    ("binary", lambda rng: ([n := rng.randrange(10, 99)], n % 5 == 0)),
    ("binary", lambda rng: ([w := rng.choice("dog cat bus car".split())], w in ("dog", "bus")))])
def test_a_giveaway_is_found_and_said_and_where_there_is_none_nothing_is(form, giveaway):
    rows = questions(form, giveaway)
    assert blind_accuracy(rows)[0] > 0.9 and "WARNING" in blind_report(rows)[0]
    most = 2 if form == "binary" else 4
    rows = questions(form, lambda rng: (rng.sample(range(1, 999), 4), rng.randrange(most)))
    share, chance, n = blind_accuracy(rows)
    assert abs(share - chance) < 0.1 and n > 100
    assert len(said := blind_report(rows)) == 1 and "WARNING" not in said[0]


def test_the_command_looks_at_the_questions_of_a_run(tmp_path, capsys):
    row = {"problem": "How much is it?", "task": "math"}
    write_jsonl(tmp_path / "train" / "open.jsonl", [row | {"solution": n % 9} for n in range(200)])
    assert blind.main(["--data", str(tmp_path)]) == 0
    line = r"binary math: without looking \d+% right, by chance \d+% \(\d+ questions\)"
    assert re.search(line, capsys.readouterr().out)
    assert blind.main(["--data", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
