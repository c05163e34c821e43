"""Rewards and the quality score by table. Names of tests and comments say what is kept out."""
import inspect
import math
import random
import re
import string
import time
from dataclasses import replace

import pytest

import rewards
from rewards import Example, accuracy_reward, format_reward, is_correct
from sample import KEEP_ABOVE, quality_score
from support import answers, numbers, reasons
from support.answers import extract_answer


def example(form, task, solution, problem="How many cubes are in the picture?"):
    return Example(form=form, task=task, solution=solution, problem=problem)


def completion(answer, thinking="I look at the picture and think."):
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def accuracy(form, task, truth, answer, **settings):
    return accuracy_reward(completion(answer), example(form, task, truth), **settings)


BOX = '{"bbox_2d": [10, 10, 50, 50]}'


@pytest.mark.parametrize("text, answer", [
    ("<think>1 + 1</think><answer> 2\n</answer>", "2"), ("<answer></answer>", ""), ("2", None),
    ("", None), ("<answer>2", None), ("2</answer>", None), ("</answer>2<answer>", None),
    ("<answer>2</answer><answer>3</answer>", None),         # two answers, one of them surely right
    ("<answer><answer>2</answer></answer>", None), ("<answer>2</answer></answer>", None),
    ("<think><answer>2</answer></think><answer>3</answer>", None),
    ("<think>so <answer>2</answer> it is</think>", None),   # a draft is no answer
    ("<think>so <answer>2</answer>", "2"),                  # unclosed: costs the format reward only
    ("<answer>" + "2" * 5000 + "</answer>", None)])
def test_one_answer_or_none(text, answer):
    assert extract_answer(text) == answer


def test_truth_is_the_answer_part_or_the_whole_solution():
    for solution in ("<answer> 12 </answer>", "<think>7</think>\n<answer>12</answer>", " 12\n"):
        assert accuracy("open", "math", solution, "12") > accuracy("open", "math", solution, "7")


# ---- Accuracy ----

PAID = """
binary math yes <- Yes.  | TRUE | correct! | 是 || no | yes or no | No, that is not correct | yes, no
binary detection no <- FALSE | incorrect || yes | yes or no | No, that is not correct
binary math maybe <- || maybe | perhaps
choice math A <- (A) | a. || B | a dog | () | A or B | A, B
choice math B <- Option B | 选项B | B. dog | (B) dog || B. dog, C. cat | B. or C | Not B | b dog
choice math A,C <- C, A | A and C | (a) (c) | AC | ＡＣ | A、C || A, B | A, B, C | CA | A or C | ABCD
choice math F <- F || B
choice math I <- I || ı
open classify dog,cat <- ["Cat", "DOG"]. | cat; dog || [dog cat] | dog and cat
open classify traffic light <- Traffic  Light. || light | the traffic light | []
open classify 猫、狗 <- 狗，猫。 || 猫狗
open math 12 <- \\boxed{12} || 112
open general The dog is brown. <- the dog is  brown || a bus | !!
open general -5 <- -5 || 5
"""


def test_accuracy():
    for row in PAID.strip().splitlines():
        (form, task, truth), said = row.split(" <- ")[0].split(" ", 2), row.split(" <- ")[1]
        for part, expected in zip(said.split("||"), (1, 0)):
            for answer in filter(None, part.strip().split(" | ")):
                assert accuracy(form, task, truth, answer) == expected, (row, answer)
    assert accuracy("binary", "math", "yes", "yes" + " " * 200 + "no") == 0, "a text was cut"


@pytest.mark.parametrize("form, task, truth, answer, expected", [
    ("choice", "math", "A, C", "A", 0.2), ("choice", "math", "A, B, C", "A, C", 0.2),  # released: 0
    ("open", "classify", "dog, cat", "dog", 0.5), ("open", "classify", "dog, cat", "dog, bus",
    1 / 3),
    ("open", "classify", "dog, cat", "dog, dog", 0.5), ("open", "general", "A red bus",
    "a blue bus", 2 / 3),
    ("open", "general", "the dog bites the man", "the man bites the dog", 0.99)])
def test_accuracy_between_right_and_wrong(form, task, truth, answer, expected):
    assert accuracy(form, task, truth, answer) == pytest.approx(expected)
    assert not is_correct(completion(answer), example(form, task, truth))
    if form == "choice":
        assert accuracy(form, task, truth, answer, partial_credit=0.5) == 0.5


@pytest.mark.parametrize("truth, answer, hard, soft", [
    (BOX, BOX, 1, 1), (BOX, "[10, 10, 50, 40]", 1, 0.75), (BOX, "[60, 60, 90, 90]", 0, 0),
    (BOX, "[10, 10, 50, 30]", 0, 0.5),                                  # IoU 0.5 is not above 0.5
    (BOX, "[[10, 10, 50, 50], [60, 60, 90, 90]]", 0, 0.5),              # an extra box costs
    (BOX, "[[10, 10, 50, 50], [10, 10, 50, 50]]", 0, 0.5),              # so does the same box twice
    ("[[0, 0, 9, 9], [20, 0, 29, 9]]", "[[20, 0, 29, 9], [0, 0, 9, 9]]", 1, 1), ("[]", "none", 1,
    1),
    ("[[0, 0, 9, 9], [20, 0, 29, 9]]", "[0, 0, 9, 9]", 0, 0.5), ("no objects", "No objects.", 1, 1),
    ("no objects", BOX, 0, 0), (BOX, "no objects", 0, 0), ("[]", "dog", 0, 0), ("dog", "dog", 0,
    0)])
def test_detection(truth, answer, hard, soft):
    assert accuracy("open", "detection", truth, answer) == hard
    assert accuracy("open", "detection", truth, answer, soft_iou=True) == pytest.approx(soft)


def test_the_letter_of_a_listed_option_is_right_where_the_truth_is_its_text():
    item = example("open", "math", "cotton", "Which is it?\nA. wool\nB. cotton\nC. silk")
    paid = {text: accuracy_reward(completion(text), item) for text in ("B", "cotton", "A", "B, C")}
    assert paid == {"B": 1, "cotton": 1, "A": 0, "B, C": 0}


def test_format():
    item = example("open", "math", "b")
    for text in (completion("b"), " \n<think>a\nb</think>\n <answer>b</answer>\n"):
        assert format_reward(text, item) == 1
    for text in ("<think></think><answer></answer>",
                 "<think> </think><answer>b</answer>",  # released: 1
                 completion("b") + "<answer>c</answer>", completion(" "), completion("b", "."),
                 "<answer>b</answer><think>a</think>", "<think>a</think> so <answer>b</answer>",
                 completion("b") + " done", "well " + completion("b"), "<answer>b</answer>", "",
                 "<think>a" + completion("b"), "<think>a</think>" + completion("b"),
                 "</think><think>",
                 "<think>a <answer>b</answer></think>", "<think>a<answer>b</think></answer>",
                 completion("<answer>b</answer>"), "<think>a</think>b",
                 "<think>a</think><answer>b"):
        assert format_reward(text, item) == 0, text
    for form, task, answer, expected in (
            ("binary", "detection", "yes", 1), ("choice", "detection", "B",
            1),     # released: a box only
            ("open", "detection", BOX, 1), ("open", "detection", "left", 0), ("open", "classify",
            "dog", 1)):
        assert format_reward(completion(answer), example(form, task, "yes")) == expected


# ---- Quality: derivations are kept; copies, assertions, repetitions, contradictions are not ----

SUBJECTS = (            # four numbers -> question, answer, steps in words and in signs
    lambda a, b, c, d: (
        f"Mia buys {a} pens at ${b} and {c} mugs at ${d}. How much is left of $999?",
        999 - a * b - c * d,
        [(f"The pens cost {a} times {b}, which is {a * b}.", rf"{a} \times {b} = {a * b}"),
         (f"The mugs cost {c} times {d}, which is {c * d}.", rf"{c} \times {d} = {c * d}"),
         (f"Together that is {a * b + c * d} dollars.", f"{a * b} + {c * d} = {a * b + c * d}"),
         (f"She keeps {999 - a * b - c * d}.", f"999 - {a * b + c * d} = {999 - a * b - c * d}")]),
    lambda a, b, c, d: (
        f"In triangle ABC, angle A is {20 + a}° and angle B is {20 + b}°. Find angle C.",
        140 - a - b,
        [("All angles sum to 180 degrees.", r"\angle A + \angle B + \angle C = 180^\circ"),
         (f"A and B together are {40 + a + b}.",
         rf"{20 + a}^\circ + {20 + b}^\circ = {40 + a + b}^\circ"),
         (f"So C has {140 - a - b} degrees left.", rf"\angle C = {140 - a - b}^\circ")]),
    lambda a, b, c, d: (
        f"How many more {'apples figs plums'.split()[a % 3]} than kiwis does the chart show?",
        30 + a - b,
        [(f"The bar of {'apples figs plums'.split()[a % 3]} reaches {50 + a}.", f"high: {50 + a}"),
         (f"That of kiwis ends at {20 + b}.", f"kiwis: {20 + b}"),
         (f"They differ by {30 + a - b}.", f"{50 + a} - {20 + b} = {30 + a - b}")]),
    lambda a, b, c, d: (
        f"Tom is {a} and Lena {b} times as old. How old will Lena be in {c} years?", a * b + c,
        [(f"Lena is {b} times as old as Tom, that is {a * b}.", f"{b} × {a} = {a * b}"),
         (f"In {c} years she will be {a * b + c}.", f"{a * b} + {c} = {a * b + c}")]),
    lambda a, b, c, d: (
        f"小明买了{a}支铅笔，每支{b}元，又买了{c}个本子，每个{d}元，一共花了多少元？", a * b + c * d,
        [(f"铅笔要{a}乘{b}等于{a * b}元。", f"{a} × {b} = {a * b}"),
         (f"本子要{c}乘{d}等于{c * d}元。", f"{c} × {d} = {c * d}"),
         (f"合起来是{a * b + c * d}元。", f"{a * b} + {c * d} = {a * b + c * d}")]))
STYLES = {
    "prose": lambda steps: " ".join(words for words, _ in steps),
    "lines": lambda steps: "\n".join(words for words, _ in steps),
    "bullets": lambda steps: "\n".join(f"- {words}" for words, _ in steps),
    "numbered": lambda steps: "\n".join(f"{n}. {step[0]}" for n, step in enumerate(steps, 1)),
    "LaTeX": lambda steps: "\n".join(rf"\[ {formula} \]" for _, formula in steps),
    "signs": lambda steps: "; ".join(f"${formula}$" for _, formula in steps)}
CLOSINGS = ("", " So the answer is {}.", " Therefore, it must be {}.", " 答案是{}。",
r" So \boxed{{{}}}.", " Thus the answer: **{}**", " 综上所述，答案为{}。")
ASSERTIONS = (
    "Let me think about this question carefully. The answer is {}.", "I see that the answer is {}.",
    "I looked at the picture and I am sure that the correct answer is {}.", "It is clearly {}.",
    "We need to find the answer step by step. After careful analysis, the result is {}.",
    "By inspection, {}.", "Step 1: understand it. Step 2: the answer is {}.", "让我仔细想一想这个问题，答案是{}。")
OTHERWISE = {           # question, answer, steps -> what is no derivation
    "copy": lambda rng, q, a, steps: q + rng.choice(CLOSINGS).format(a),
    "copied statement": lambda rng, q, a, steps: re.split("[.，]", q)[0] + "." + CLOSINGS[1].format(
    a), "assertion": lambda rng, q, a, steps: rng.choice(ASSERTIONS).format(a),
    "said twice": lambda rng, q, a, steps: 2 * (STYLES["prose"](steps) + " "),
    "each step twice": lambda rng, q, a, steps: " ".join(2 * f"{words} " for words, _ in steps),
    "a step again": lambda rng, q, a, steps: 4 * (steps[0][0] + " ") + f"It is {a}.",
    "another ending": lambda rng, q, a, steps: STYLES["prose"](steps) + CLOSINGS[1].format(a + 1),
    "another result": lambda rng, q, a, steps: STYLES["LaTeX"](steps) + CLOSINGS[4].format(a - 2),
    "an earlier result": lambda rng, q, a, steps: STYLES["prose"](steps[:-1])}


def derived(count=12, seed=0):
    """(question, answer, steps, example) of every subject, `count` times."""
    rng = random.Random(seed)
    for subject in SUBJECTS * count:
        problem, answer, steps = subject(*rng.sample(range(2, 13), 4))
        yield problem, answer, steps, example("open", "math", str(answer), problem)


def kept(thinking, answer, item):
    return quality_score(completion(answer, thinking), item) > KEEP_ABOVE


def share(found):
    return sum(found := list(found)) / len(found)


@pytest.mark.parametrize("style", STYLES)
def test_right_derivations_of_any_style_are_kept(style):
    """Intermediate results counted as conclusions once: two thirds of people's were dropped."""
    for closing in CLOSINGS:
        assert share(kept(STYLES[style](steps) + closing.format(answer), answer, item)
                     for _, answer, steps, item in derived()) >= 0.95


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_no_derivation_is_not_kept(name):
    rng = random.Random(1)
    assert share(kept(OTHERWISE[name](rng, problem, answer, steps), answer, item)
                 for problem, answer, steps, item in derived()) <= 0.03


def test_another_questions_steps_are_seldom_kept():
    every = list(derived(seed=2))
    others = random.Random(2).sample(every, len(every))
    for closing in CLOSINGS:
        assert share(kept(STYLES["prose"](steps) + closing.format(answer), answer, item)
                     for (_, answer, own, item), (_, _, steps, _) in zip(every, others)
                     if own != steps) <= 0.25


def test_a_wrong_answer_is_never_kept_and_what_says_more_is_ahead():
    for _, answer, steps, item in derived(3):
        texts = [CLOSINGS[1].format(answer), STYLES["prose"](steps[-2:]), STYLES["prose"](steps)]
        assert quality_score(completion(answer + 1, texts[-1]), item) <= KEEP_ABOVE
        scores = [quality_score(completion(answer, text), item) for text in texts]
        assert scores == sorted(scores) and scores[0] < scores[2] < 100, texts
    labels = [f"thing {i}" for i in range(20)]
    text = completion(", ".join(labels[1:]), "I see " + ", ".join(labels))
    assert quality_score(text, example("open", "classify", ", ".join(labels))) == KEEP_ABOVE


PROSE = "There are seven red cubes and five blue ones, so there are 12 in all."
NOISE = " ".join("".join(random.Random(i).choices(string.ascii_lowercase, k=7)) for i in range(300))
OPTIONS = "Which is a mammal?\nA. shark\nB. dolphin\nC. frog"


@pytest.mark.parametrize("answer, thinking, keep", [
    ("12", PROSE, True), ("12", "左边有七个，右边有五个，一共是12个。", True), ("12", NOISE + " 12", False),
    ("12", "Seven and five make a dozen.", True), ("12", "Seven and five make 13.", False),
    ("12", "7 red and 5 blue: 12 cubes, 7 of them red.", True), ("12", "", False), ("12", ".",
    False),
    ("12", "5 + 7 = 12, so the answer is 13.", False), ("12", "It is certainly not 12", False),
    ("12", "seven and five, but never 12", False), ("12", "it is 12 " * 40, False), ("12", "so 12",
    False),
    ("12", "word " * 5000 + "12", False), ("12", "I count the cubes: 10 11 12 13 14", False),
    ("yes", "The red cube is near the left edge, and the ball is far behind.", True),
    ("yes", "There are no cubes near the left edge.", False),
    ("B", "Sharks are fish, frogs are amphibians. Dolphins nurse their young: option B.", True),
    ("B", "Sharks are fish and frogs are amphibians. So the answer is C.", False),
    ("red bus", "red bus left", True), ("red bus", "Using the formula, we get red bus.", False),
    ("red bus", "Behind the cubes stands a red bus.", True), ("red bus", "It is a red bus.", False)])
def test_quality_of_other_kinds_of_answers(answer, thinking, keep):
    item = example("binary" if answer == "yes" else "open", "general", answer)
    item = replace(item, problem=OPTIONS) if answer == "B" else item
    assert kept(thinking, answer, item) == keep
    assert quality_score(completion(answer, thinking) + " Done.",
    item) <= KEEP_ABOVE, "not in format"


# ---- Incentives: an exploit, with its format reward, pays no more than an honest wrong answer ----

LABELS = "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, sheep"
SWARM = str([[x, y, x + 40, y + 40] for x in range(0, 60, 9) for y in range(0, 60, 9)])
TRUTHS = {              # truth, an honest wrong answer, exploits beside those of the tables
    ("binary", "math"): ("yes", "no", ["yes no", "yes/no", "yes yes", "It is yes."]),
    ("choice", "math"): ("A, C", "B", [", ".join(string.ascii_uppercase), "A C or B D"]),
    ("open", "classify"): ("dog, cat", "dog, bus", [LABELS, "dog or cat", "dog/cat"]),
    ("open", "detection"): (BOX, "[60, 60, 90, 90]", [
        "[0, 0, 100, 100]", f"{BOX} or no objects", f"{BOX} {BOX}", SWARM]),
    ("open", "math"): ("12", "13", ["11, 12, 13", "between 11 and 13", "[12]13", "eval('6*2')"]),
    ("open", "general"): ("The dog is brown.", "The cat is brown.", ["The dog is red.", "brown"])}
WRAPPED = ["{0}", "<answer>{0}", "<think>{0}</think>", "<think></think><answer></answer>",
           "<think>so {0}</think><answer></answer>", "<think>a</think><answer>{0}</answer><answer>",
           "<think>a</think><answer>{0}</answer><answer>{1}</answer>",
           "<think><answer>{0}</answer></think><answer>{1}</answer>",
           "<think>so <answer>{0}</answer></think>", "<think>{0}</think><answer>{1}</answer>",
           "<think>a</think><answer>answer: {0} {1}</answer>"]


@pytest.mark.parametrize("form, task", TRUTHS)
def test_exploits_pay_no_more_than_an_honest_wrong_answer(form, task):
    truth, honest, exploits = TRUTHS[form, task]
    item = example(form, task, truth)
    least = accuracy_reward(completion(honest), item)
    assert least < accuracy_reward(completion(truth), item) == 1.0
    for answer in exploits:
        assert accuracy_reward(completion(answer), item) <= least, answer
    for text in (wrapped.format(truth, honest) for wrapped in WRAPPED):
        assert accuracy_reward(text, item) + format_reward(text, item) <= least + 1.0, text
        assert accuracy_reward(text, item) <= least, text


# ---- Hostile text ----

MEGABYTE = 1_000_000
PIECES = ["[", '{"bbox_2d":', "{", "(", "\\frac{", "\\frac{1}{", "\\sqrt{", "\\boxed{", "\\text{",
          "$",
          "\\", "^{", "√", "√1", "9", "9**", "10^60*", "1 ", "1,", ", ", "no ", "a", "a ", "12. ",
          "1+",
          "=", "\\\\", "&", "and ", "B ", "。", "猫，", "1 1/2 ", "(1,2),", "{{1,2},{3,4}},", "km/h ",
          "~"]
BOMBS = [(piece * 4000)[:4000] for piece in PIECES] + [
    "[" * 1900 + "]" * 1900, "[1e999999999, 0, 1, 1]", f"[{'9' * 3000}, 0, 1, 1]", "1e999999999",
    "0/0",
    "9" * 110 + "π", "1/" + "0" * 100, "1/√0", "1" + ",000" * 29, "NaN", "-inf",
    "." + "0" * 100 + "1",
    "1/." + "0" * 99 + "1", "\x00", "\ud800", "\u202e12", "٣٤", "²", "Ⅻ", "{0}", "%s",
    "__import__('os')",
    *(piece * (MEGABYTE // len(piece)) for piece in ("a", " ", "<", "a b ", "<think>",
    "</answer>"))]
KINDS = [*((*kind, row[0]) for kind, row in TRUTHS.items()), ("open", "math", "B"),
         ("open", "math", r"2\sqrt{3}"), ("open", "math", "{1, 2}"), ("open", "math",
         "a" * 3999 + "1")]


def check(text, item):
    """CPU seconds (a busy machine stretches none) of a text's rewards; checks type and range."""
    start = time.process_time()
    values = [accuracy_reward(text, item), format_reward(text, item), quality_score(text,
    item) / 100]
    seconds = time.process_time() - start
    assert all(isinstance(v, float) and math.isfinite(v) and 0 <= v <= 1 for v in values), values
    return seconds


@pytest.mark.parametrize("form, task, truth", KINDS)
def test_no_text_raises_or_is_slow(form, task, truth):
    """Twenty times what it takes; a quadratic pattern took more with a truth of 4,000 letters."""
    item = example(form, task, truth)
    for bomb in BOMBS:
        for text in (bomb, completion(bomb), completion(truth, bomb)):
            assert check(text, item) < 0.4, (text[:60], len(text))
        hostile = replace(item, solution=bomb[:4000], problem=bomb[:4000])
        assert check(completion(bomb[:4000]), hostile) < 0.4, bomb[:60]


def test_random_text():
    rng = random.Random(0)
    pieces = PIECES + ["<think>", "</think>", "<answer>", "</answer>", "yes", "A", "]", "}", "dog",
                       "12",
                       ".", "/", "-", "%", "π", "x", "e9", "NaN", "\n", "\x00", "\ud800", ")",
                       "```", "≈", "½"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randrange(25)))
        for kind in KINDS:
            check(rng.choice([text, completion(text)]), example(*kind))


def test_model_text_reaches_no_evaluator_and_rewards_know_no_torch():
    source = "".join(map(inspect.getsource, (answers, numbers, reasons, rewards)))
    assert not re.findall(r"\beval\(|exec\(|literal_eval|sympy|import torch", source)
