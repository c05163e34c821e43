"""Rewards by table. The name of a test or the comment of a row says which defect it keeps out."""
import inspect
import math
import random
import string
import time
from types import SimpleNamespace

import pytest

import rewards
import rewards as tasks
from rewards import accuracy_reward, format_reward, is_correct
from sample import quality_score
from support import answers
from support import numbers as numerals
from support.answers import (
    extract_answer, iou, matched_iou, parse_boxes, parse_labels, parse_letters, parse_verdict)
from support.numbers import parse_number


def example(form, task, solution):
    return SimpleNamespace(form=form, task=task, solution=solution)


def completion(answer, thinking="I look at the picture and think."):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def accuracy(form, task, truth, answer, **settings):
    return accuracy_reward(completion(answer), example(form, task, f"<answer>{truth}</answer>"), **settings)


BOX = '{"bbox_2d": [10, 10, 50, 50]}'
KINDS = [("binary", "math", "yes"), ("choice", "classify", "A, C"), ("open", "classify", "dog, cat"),
         ("open", "detection", BOX), ("open", "math", "12"), ("open", "math", "B"), ("open", "math", r"\frac{1}{3}"), ("open", "math", r"2\sqrt{3}"),
         ("open", "general", "The dog is brown.")]


# ---- The answer ----

@pytest.mark.parametrize("text, answer", [
    ("<think>1 + 1</think><answer> 2\n</answer>", "2"),
    ("<answer></answer>", ""),
    ("2", None), ("", None), ("<answer>2", None), ("2</answer>", None), ("</answer>2<answer>", None),
    ("<answer>2</answer><answer>3</answer>", None),                     # two answers, one of them surely right
    ("<answer><answer>2</answer></answer>", None),
    ("<answer>2</answer></answer>", None),
    ("<think><answer>2</answer></think><answer>3</answer>", None),
    ("<think>so <answer>2</answer> it is</think>", None),               # a draft is no answer
    ("<think>so <answer>2</answer>", "2"),                              # an unclosed block costs the format reward only
    ("<answer>" + "2" * 5000 + "</answer>", None),
])
def test_one_answer_or_none(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("solution", ["<answer> 12 </answer>", "<think>7 + 5</think>\n<answer>12</answer>", " 12\n"])
def test_truth_is_the_answer_part_or_the_whole_solution(solution):
    assert accuracy_reward(completion("12"), example("open", "math", solution)) == 1.0
    assert accuracy_reward(completion("7"), example("open", "math", solution)) == 0.0


# ---- Accuracy ----

@pytest.mark.parametrize("form, task, truth, answer, expected", [
    ("binary", "math", "yes", "Yes. ", 1), ("binary", "detection", "no", "FALSE", 1),
    ("binary", "math", "True", "correct", 1),
    ("binary", "math", "no", "yes", 0),
    ("binary", "math", "yes", "yes or no", 0), ("binary", "math", "no", "yes or no", 0),
    ("binary", "math", "yes", "No, that is not correct", 0), ("binary", "math", "no", "No, that is not correct", 0),
    ("binary", "math", "maybe", "perhaps", 0),                          # two unreadable sides are not equal
    ("binary", "math", "no", "incorrect!", 1), ("binary", "math", "yes", "incorrect", 0),
    ("choice", "math", "A", "(A)", 1), ("choice", "math", "A", "a.", 1), ("choice", "math", "A", "B", 0),
    ("choice", "math", "A", "a dog", 0),                                # the article is not option A
    ("choice", "math", "A, C", "C, A", 1),                              # released code compares strings
    ("choice", "math", "A, C", "A and C", 1), ("choice", "math", "A, C", "(a) (c)", 1),
    ("choice", "math", "A, C", "A", 0.2),                               # released code has no partial credit
    ("choice", "math", "A, C", "A, B", 0), ("choice", "math", "A, C", "A, B, C", 0), ("choice", "math", "A", "A, B", 0),
    ("choice", "math", "A, B, C", "A, C", 0.2), ("choice", "math", "A, C", "AC", 0),
    ("choice", "math", "A", "A or B", 0),
    ("choice", "math", "F", "B", 0), ("choice", "math", "F", "F", 1),   # released code: past E anything is right
    ("choice", "math", "I", "ı", 0), ("choice", "math", "S", "ſ", 0), ("choice", "math", "A", "()", 0),
    ("open", "classify", "dog, cat", '["Cat", "DOG"].', 1),             # released code: a bracket scores 0
    ("open", "classify", "traffic light", "Traffic  Light.", 1), ("open", "classify", "traffic light", "light", 0),
    ("open", "classify", "dog, cat", "dog", 0.5), ("open", "classify", "dog, cat", "dog, bus", 1 / 3),
    ("open", "classify", "dog, cat", "dog, dog, dog", 0.5), ("open", "classify", "dog", "the dog", 0),
    ("open", "classify", "dog", "[]", 0), ("open", "classify", "dog", "hotdog", 0),
    ("open", "general", "The dog is brown.", "the dog is  brown", 1),
    ("open", "general", "A red bus.", "a blue bus", 2 / 3),
    ("open", "general", "the dog bites the man", "the man bites the dog", 0.99),        # equal bags, not equal text
    ("open", "general", "-5", "5", 0), ("open", "general", "a bus", "no idea", 0), ("open", "general", "bus", "!!", 0),
])
def test_accuracy(form, task, truth, answer, expected):
    assert accuracy(form, task, truth, answer) == pytest.approx(expected)


@pytest.mark.parametrize("truth, right, wrong", [
    ("12", ["12", "12.0", " 12. ", "$12$", r"\boxed{12}", r"$\boxed{x = 12}$", "x = 12", "12 cm", "+12", "24/2",
            r"\frac{24}{2}"],
     ["13", "112", "12 13", "1 2", "1, 2", "-12", "11.9999", "12.004", "5 + 7", "12 or 13", "x = 13", "12x", "12^2",
      "not 12", r"\boxed{12} or \boxed{13}", "１２", "١٢", "²", "12 or so", "1e1"]),    # any number scored 1.0
    ("5", ["5", "x_1 = 5"], ["٥", "5²", "15", "5 5", "five", "5, 5", "5/0", "5.5"]),
    ("-3", ["-3", "−3", "- 3", r"-\frac{6}{2}"], ["3", "--3", "-(3)x"]),
    ("1234", ["1,234", "1{,}234", r"1\,234", "1234.0"], ["1, 234", "12,34", "1 234", "1,2,3,4", "1,2345", "1.234"]),
    (r"\frac{1}{3}", ["1/3", r"\dfrac{1}{3}", r"$\frac{2}{6}$", "0.33", ".333"],
     ["0.3", "0.34", "0.334", "3", "1/4", "13", "1/33"]),
    (r"\frac{1}{2}", ["0.5", "1/2", "50%", r"50\%", "0.50"], ["0.51", "2", "0.4", "5%"]),
    ("1.75", [r"1\frac{3}{4}", "1 3/4", "7/4", "1.750"], ["13/4", "1.8", "1.7", "2"]),
    (r"2\sqrt{3}", ["2√3", "2*sqrt(3)", r"2\cdot\sqrt{3}", r"\sqrt{12}", r"\frac{6}{\sqrt{3}}", "3.46", "3.464"],
     ["3.5", "3.4", "3.47", "23", r"2\sqrt{2}", "√3", "2", "3.4642"]),
    (r"\frac{\sqrt{3}}{2}", ["√3/2", r"\frac{3}{2\sqrt{3}}", r"\frac{1}{2}\sqrt{3}", "0.87"],
     [r"\frac{\sqrt{2}}{3}", "0.9", "32"]),
    (r"12\pi", ["12π", "12 pi", r"12 \pi \text{ cm}^2", "37.70", "37.699"],
     ["12", "37.7", "38", "12pie", "π", "37.71"]),
    ("3.14", ["3.14", "3.140"], ["3.1", "3", "3.142", "π", "3.141", "314"]),
    ("50%", ["50%", "50 percent", r"50\%", "0.5", "1/2", "50"], ["0.5%", "5", "500", "5%"]),
    ("0.5", ["50%", "1/2"], ["0.5%", "50"]),
    ("60^\\circ", ["60", "60°", "60 degrees", r"60^{\circ}", r"m\angle ABC = 60^\circ"], ["6", "60 cm", "600", "30°"]),
    ("5 cm", ["5", "5cm", r"5\text{ cm}", "5 centimeters"], ["5 km", "5 m", "6 cm", "5 cm^2", "5 bananas"]),
    ("12 cm^2", ["12 square centimeters", "12 cm²", r"12 \text{ cm}^{2}", "12 sq cm", "12 square units"],
     ["12 cm", "12 cm^3"]),
    ("B", ["B", "(b)", "B."], ["A", "B or C", "A, B", "5", "bus", "β"]),
    ("(3, 4)", ["(3,4)", "( 3, 4 )", r"$\left(3, 4\right)$"], ["(4, 3)", "34", "3", "(3, 4), (4, 3)"]),
    ("x^2 + 1", ["x^2+1"], ["x^2", "1", "x", "X^2 + 1"]),
    ("1000000000000001", ["1,000,000,000,000,001"], ["1000000000000002", "1000000000000001.5"]),
    ("$", [], ["!", "."]),                                              # nothing is not equal to nothing
])
def test_math(truth, right, wrong):
    scores = {answer: accuracy("open", "math", truth, answer) for answer in right + wrong}
    assert scores == {answer: float(answer in right) for answer in scores}


def test_decimals_follow_the_written_truth():
    assert parse_number("12.50%") == (numerals.Fraction(1, 8), 4, "%")
    assert [parse_number(text).decimals for text in ("7", "7.0", "7/2", "√7")] == [0, 1, None, None]


@pytest.mark.parametrize("text, boxes", [
    ('{"bbox_2d": [1, 2, 3, 4]}', [(1, 2, 3, 4)]), ("[1, 2.5, 3, 4]", [(1, 2.5, 3, 4)]),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]\n```', [(1, 2, 3, 4)]),
    ("```[1, 2, 3, 4]```", [(1, 2, 3, 4)]),
    ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [(1, 2, 3, 4), (5, 6, 7, 8)]),
    ("No objects.", []), ("there are no objects", []), ("none", []), ("[]", []),
    ("no objects [1, 2, 3, 4]", None), ("", None), ("dog", None), ("{}", None), ("[1, 2, 3]", None), ("5", None),
    ("null", []),
    ("[1, 2, 3, 4] or [5, 6, 7, 8]", None), ('{"bbox_2d": null}', None), ('["1", "2", "3", "4"]', None), ("[[]]", None),
    ("[true, 2, 3, 4]", None), ("[NaN, 2, 3, 4]", None), ("[1, 2, Infinity, 4]", None), ("[1, 2, 1e999, 4]", None),
    ("[3, 2, 1, 4]", None), ("[1, 2, 1, 4]", None), (f"[1, 2, {'9' * 3900}, 4]", None), ("[[1, 2, 3, 4], 5]", None),
    ("[" + ", ".join(["[1, 2, 3, 4]"] * 65) + "]", None),
])
def test_boxes(text, boxes):
    assert parse_boxes(text) == boxes


@pytest.mark.parametrize("truth, answer, hard, soft", [
    (BOX, BOX, 1, 1), (BOX, "[10, 10, 50, 50]", 1, 1), (BOX, "[10, 10, 50, 40]", 1, 0.75),
    (BOX, "[10, 10, 50, 30]", 0, 0.5),                                  # IoU 0.5 is not above 0.5
    (BOX, "[60, 60, 90, 90]", 0, 0),
    (BOX, "[[10, 10, 50, 50], [60, 60, 90, 90]]", 0, 0.5),              # an extra box costs
    (BOX, "[[10, 10, 50, 50], [10, 10, 50, 50]]", 0, 0.5),              # so does the same box twice
    ("[[0, 0, 10, 10], [20, 0, 30, 10]]", "[[20, 0, 30, 10], [0, 0, 10, 10]]", 1, 1),
    ("[[0, 0, 10, 10], [20, 0, 30, 10]]", "[0, 0, 10, 10]", 0, 0.5),
    ("no objects", "No objects", 1, 1), ("[]", "none", 1, 1), ("no objects", BOX, 0, 0), (BOX, "no objects", 0, 0),
    ("no objects", "dog", 0, 0), (BOX, "dog", 0, 0), ("dog", "dog", 0, 0),      # two unreadable sides are not equal
])
def test_detection(truth, answer, hard, soft):
    assert accuracy("open", "detection", truth, answer) == hard
    assert accuracy("open", "detection", truth, answer, soft_iou=True) == pytest.approx(soft)


def test_matching_is_the_best_one_not_the_greedy_one():
    first, second = (0, 0, 10, 10), (0, 2, 10, 12)
    both, only_first = (0, 0.8, 10, 10.8), (0, -4, 10, 6)               # greedy: 0.85 + 0.25; best: 0.43 + 0.79
    expected = iou(first, only_first) + iou(second, both)
    assert matched_iou([both, only_first], [first, second]) == pytest.approx(expected)
    assert matched_iou([first, second], [only_first, both]) == pytest.approx(expected)
    assert expected > iou(first, both) + iou(second, only_first) + 0.1


def test_letters_and_labels_of_nothing():
    assert parse_letters("()") is None and parse_letters("and") is None and parse_labels("[]") == []


def test_iou():
    assert iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_partial_credit_is_a_setting_and_never_correct():
    assert accuracy("choice", "math", "A, C", "C", partial_credit=0.5) == 0.5
    assert not is_correct(completion("C"), example("choice", "math", "A, C"))
    assert is_correct(completion("C, A"), example("choice", "math", "A, C"))
    assert not is_correct(completion("dog"), example("open", "classify", "dog, cat"))
    assert not is_correct(completion("the man bites the dog"), example("open", "general", "the dog bites the man"))


# ---- Format ----

@pytest.mark.parametrize("text, expected", [
    ("<think>a</think><answer>b</answer>", 1), (" \n<think>a\nb</think>\n <answer>b</answer>\n", 1),
    ("<think></think><answer></answer>", 0), ("<think> </think><answer>b</answer>", 0),     # released code pays
    ("<think>a</think><answer> </answer>", 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0),        # released code pays for two answers
    ("<answer>b</answer><think>a</think>", 0), ("<think>a</think> so <answer>b</answer>", 0),
    ("<think>a</think><answer>b</answer> done", 0), ("well <think>a</think><answer>b</answer>", 0),
    ("<think>a<think>b</think></think><answer>c</answer>", 0),
    ("<think>a</think><think>b</think><answer>c</answer>", 0),
    ("<think>a <answer>b</answer></think>", 0), ("<think>a<answer>b</think></answer>", 0), ("<answer>b</answer>", 0),
    ("<think>a</think><answer><answer>b</answer></answer>", 0), ("<think>a</think>b", 0), ("", 0),
    ("</think><think>", 0),
    ("<think>a</think><answer>b", 0), ("<think></think>a<answer>b</answer>", 0),
])
def test_format(text, expected):
    assert format_reward(text, example("open", "math", "b")) == expected


@pytest.mark.parametrize("form, task, answer, expected", [
    ("binary", "detection", "yes", 1), ("choice", "detection", "B", 1),     # released code asks these for a JSON box
    ("open", "detection", BOX, 1), ("open", "detection", "no objects", 1), ("open", "detection", "on the left", 0),
    ("open", "classify", "dog", 1),
])
def test_only_open_detection_asks_for_a_box(form, task, answer, expected):
    assert format_reward(completion(answer), example(form, task, "yes")) == expected


# ---- Quality ----

TWELVE = example("open", "math", "12")
PROSE = "There are seven red cubes and five blue ones, so there are 12 in all."


@pytest.mark.parametrize("text, kept", [
    (completion("12", PROSE), True), (completion("12", "Seven and five make a dozen."), True),
    (completion("13", PROSE), False),                                   # wrong
    (completion("12", "Seven and five make 13."), False),               # the reasoning says otherwise
    (completion("12", "it is 12 " * 40), False),                        # heavy repetition
    (completion("12", "12"), False), (completion("12", ""), False), ("<answer>12</answer>", False),
    (completion("12", PROSE) + " Done.", False), ("12", False), ("", False),
])
def test_quality_keeps_only_what_is_right_sound_well_formed_and_fluent(text, kept):
    assert (quality_score(text, TWELVE) > 85) == kept
    assert 0 <= quality_score(text, TWELVE) <= 100


def test_quality_of_a_nearly_right_answer_stops_at_85():
    labels = [f"thing {i}" for i in range(20)]
    text = completion(", ".join(labels[1:]), "I see " + ", ".join(labels))
    assert quality_score(text, example("open", "classify", ", ".join(labels))) == 85


def test_quality_parts():
    assert quality_parts(completion("12", PROSE), TWELVE) == dict.fromkeys(rewards.QUALITY, 1.0)
    assert sum(rewards.QUALITY.values()) == 100 and min(rewards.QUALITY.values()) >= 100 - rewards.KEEP_ABOVE
    silent = quality_parts(completion("yes", "A dog stands there."), example("binary", "math", "yes"))
    against = quality_parts(completion("yes", "There is no dog."), example("binary", "math", "yes"))
    assert (silent["consistency"], against["consistency"]) == (0.6, 0.0)
    for answer, thinking in (
            ("5 cm", "it is 5 cm long"), ("5 cm", "it is 5"), ("1 3/4", "it makes 1 3/4"), ("0.5", "so 1/2")):
        assert quality_parts(completion(answer, thinking), example("open", "math", answer))["consistency"] == 1.0
    late = quality_parts(completion("12", "It may be 12. " + "But I count them again. " * 5 + "It is 13."), TWELVE)
    named = quality_parts(completion("red bus", "The bus is red."), example("open", "general", "red bus"))
    unnamed = quality_parts(completion("red bus", "The bus is blue."), example("open", "general", "red bus"))
    assert (late["consistency"], named["consistency"], unnamed["consistency"]) == (0.0, 1.0, 0.6)
    assert fluency("red blue red blue green".split()) == pytest.approx(3 / 5) and fluency(["red", "blue"] * 9) == 0


QUESTION = SimpleNamespace(form="open", task="math", solution="12", problem="How many cubes are in the picture?")
RANDOM = random.Random(0)
NONSENSE = " ".join("".join(RANDOM.choices(string.ascii_lowercase, k=7)) for _ in range(300))


@pytest.mark.parametrize("thinking, kept", [
    (PROSE, True), ("7 red cubes and 5 blue cubes: 7 + 5 = 12", True), ("左边有七个，右边有五个，一共是12个。", True),
    ("Hay siete cubos rojos y cinco azules, en total 12.", True), ("seven red cubes, five blue cubes", True),
    ("so 12", False), ("a 12", False), ("12", False), ("no idea", False), ("ok ok", False), ("I guess", False), (".", False),
    ("\u200b", False), ("well, I think it must be 12", False), ("It is certainly not 12", False),
    ("I see red cubes and blue cubes, but it can never be 12", False), (PROSE + " " + PROSE, False), (" ".join([PROSE] * 3), False),
    (NONSENSE, False), (NONSENSE + " 12", False), ("word " * 5000 + "12", False), ("banana pear apple", False),
    (" ".join(f"thing{i % 700} about matters" for i in range(2000)) + " 12", False),
    ("I count the cubes: 10 11 12 13 14 15", False),
    ("There are 13 red cubes, so the total is 13, it makes 13 cubes. 12", False)])
def test_what_is_kept_is_worth_training_on(thinking, kept):
    assert (quality_score(completion("12", thinking), QUESTION) > rewards.KEEP_ABOVE) == kept
    assert quality_score(completion("13", thinking), QUESTION) <= rewards.KEEP_ABOVE, "a wrong answer never"


def test_of_several_kept_the_one_with_more_reasons_is_best():
    scores = [quality_score(completion("12", thinking), QUESTION) for thinking in (
        "three rows cubes", "red cubes, blue cubes", "4 red cubes 12", "7 red cubes and 5 blue cubes make 12 cubes in the picture")]
    assert scores == sorted(scores) and scores[-1] > scores[0] and scores[-1] > 99


@pytest.mark.parametrize("problem, thinking, answer", [
    ("What is 3 plus 4?", "3 plus 4", "7"), ("What color is the circle?", "red circle north", "red"),
    ("How many objects are there?", "1 red circle 2 blue square", "2"), ("Which object is first?", "red circle north", "red circle"),
    ("How many objects are in the two images?", "2 plus 3", "5")])
def test_terse_but_sound_reasoning_of_a_small_model_is_kept(problem, thinking, answer):
    item = SimpleNamespace(form="open", task="general", solution=answer, problem=problem)
    score = quality_score(completion(answer, thinking), item)
    assert score > rewards.KEEP_ABOVE or thinking == "2 plus 3", "numbers that the question does not have speak against"


# ---- Incentives: an exploit, with its format reward, pays no more than an honest wrong answer of its kind ----

LABELS = "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, person, sheep, sofa, train"
HONEST = {"binary": "no", "choice": "B", "classify": "dog, bus", "detection": "[60, 60, 90, 90]", "math": "13",
          "general": "The cat is brown."}
EXPLOITS = {
    "binary": ["yes or no", "yes, no", "yes no", "yes/no", "not no", "yes yes", "It is yes.", "yes, unless no"],
    "choice": ["A, B, C, D", ", ".join(string.ascii_uppercase), "ABCD", "AC", "A or C", "A C or B D", "all of them"],
    "classify": [LABELS, LABELS.replace(",", ""), "dog or cat", "dog/cat", "[dog cat]", "dog and cat and everything"],
    "detection": ["[0, 0, 100, 100]", "[" + ", ".join(["[10, 10, 50, 50]"] * 2) + "]", f"{BOX} or no objects", "[]",
                  "no objects", str([[x, y, x + 40, y + 40] for x in range(0, 60, 9) for y in range(0, 60, 9)]),
                  f"{BOX} {BOX}"],
    "math": ["11 12 13", "11, 12, 13", "111213", "11 or 12", "12 (or 13)", "7 + 5", "3 * 4", "1 2", "12...20",
             "x = 11, x = 12", r"\boxed{11} \boxed{12}", "between 11 and 13", "12?13", "[12]13", "12/13",
             "eval('6*2')", "6*2", "0012 1", "12=13"],
    "general": ["The dog is brown. The dog is black. The dog is red. The dog is white. The cat is brown.", "brown",
                "dog"],
}
WRAPPED = ["{right}", "<answer>{right}", "<think>{right}</think>", "<think>so {right}</think><answer></answer>",
           "<think></think><answer></answer>", "<think>a</think><answer>{right}</answer><answer>{wrong}</answer>",
           "<think><answer>{right}</answer></think><answer>{wrong}</answer>",
           "<think>so <answer>{right}</answer></think>", "<think>{right}</think><answer>{wrong}</answer>",
           "<think>a</think><answer><answer>{right}</answer></answer>",
           "<think>a</think><answer>{right}</answer><answer>",
           "<think>a</think><answer>answer: {right} {wrong}</answer>",
           "Think in <think> </think>, then answer in <answer> </answer>."]
TRUTHS = {("binary", "math"): "yes", ("choice", "math"): "A, C", ("open", "classify"): "dog, cat",
          ("open", "detection"): BOX, ("open", "math"): "12", ("open", "general"): "The dog is brown."}


@pytest.mark.parametrize("form, task", TRUTHS)
def test_exploits_pay_no_more_than_an_honest_wrong_answer(form, task):
    kind, truth = form if form != "open" else task, TRUTHS[form, task]
    item = example(form, task, truth)
    honest = accuracy_reward(completion(HONEST[kind]), item)
    assert honest < accuracy_reward(completion(truth), item) == 1.0
    for answer in EXPLOITS[kind]:
        assert accuracy_reward(completion(answer), item) <= honest, answer
    for wrapped in WRAPPED:
        text = wrapped.format(right=truth, wrong=HONEST[kind])
        assert accuracy_reward(text, item) + format_reward(text, item) <= honest + 1.0, text
        assert accuracy_reward(text, item) <= honest, text


# ---- Hostile text ----

MEGABYTE = 1_000_000
BOMBS = [
    "[" * 100_000, "[" * 1900 + "]" * 1900, '{"bbox_2d":' * 300, "{" * 3000, "(" * 3000, "[1e999999999, 0, 1, 1]",
    f"[{'9' * 3000}, 0, 1, 1]", str([[i, i, i + 500, i + 500] for i in range(64)]).replace(" ", ""),        # JSON
    "\\frac{" * 600, "\\frac{1}{" * 10, "\\sqrt{" * 500, "\\boxed{" * 500, "\\text{" * 600, "$" * 3999, "\\" * 3999,
    "^{" * 1900, "√" * 3000, "square " * 500,                                                               # LaTeX
    "1e999999999", "*".join(["10^60"] * 6), "9**9**9", "9" * 119, "9" * 3999, "9" * 5000, "9" * 110 + "π", "1/" + "0" * 100, "1/√0", "0/0",
    "1" + ",000" * 29, "." + "0" * 100 + "1", "1/." + "0" * 99 + "1", "NaN", "Infinity", "-inf", "-" * 3999,
    "1 " * 1900, " " * 3998 + "1", "1," * 1999, ", " * 1900, "no " * 1300,                                  # numbers
    "\x00", "\ud800", "\u202e12", "\ufeff12", "٣٤", "²", "½", "Ⅻ", "{0}", "%s", "__import__('os')",       # characters
    "a" * MEGABYTE, " " * MEGABYTE, "<" * MEGABYTE, "a b " * (MEGABYTE // 4), "<think>" * 140_000, "<answer>" * 120_000,
    "</answer>" * 110_000]


def check(text, item):
    """CPU seconds (a busy machine does not stretch them) that the rewards of a text took; checks type and range."""
    start = time.process_time()
    values = [accuracy_reward(text, item, soft_iou=True), format_reward(text, item), quality_score(text, item) / 100]
    seconds = time.process_time() - start
    assert all(isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1 for value in values), values
    return seconds


@pytest.mark.parametrize("form, task, truth", KINDS)
def test_no_text_raises_or_is_slow(form, task, truth):
    item = example(form, task, truth)
    for bomb in BOMBS:
        for text in (bomb, completion(bomb), completion(truth, bomb)):
            assert check(text, item) < 1.0, (text[:60], len(text))


def test_no_reader_raises_on_a_bomb_given_directly():
    for bomb in BOMBS:
        for reader in (extract_answer, parse_verdict, parse_letters, parse_labels, parse_boxes, parse_number):
            reader(bomb)


def test_bombs_as_solutions_do_not_raise():
    for form, task, _ in KINDS:
        for bomb in BOMBS:
            if len(bomb) < MEGABYTE // 10:
                check(completion("12"), example(form, task, bomb))


def test_random_text():
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "yes", "no", "A", ",", "and", "[", "]", "{", "}", "dog",
              '"bbox_2d":', "1", "12", ".", "/", "-", "%", "π", "√", "\\frac", "\\sqrt", "^", "\\boxed", "$", "=", "x",
              "cm", "e9", "NaN", " ", "\n", "\x00", "\ud800", "\u202e", "٣", "²", "\\", "(", ")", "```", "json"]
    items = [example(*kind) for kind in KINDS]
    for _ in range(600):
        text = "".join(rng.choices(pieces, k=rng.randrange(25)))
        for item in items:
            check(text, item)
            check(completion(text), item)


def test_model_text_reaches_no_evaluator():
    source = "".join(map(inspect.getsource, (answers, numerals, tasks, rewards)))
    assert not [name for name in ("eval(", "exec(", "literal_eval", "sympy", "import torch") if name in source]
