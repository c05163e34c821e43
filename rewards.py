"""Rewards of Curr-ReFT (arXiv 2503.07065): model text in, a finite float out. A task is one record.

    reward = accuracy_reward, in [0, 1], + format_reward, 0 or 1

A completion should read `<think>reasoning</think><answer>answer</answer>`. A question has a task
(detection, classify, math, general) and a form: yes or no (binary), option letters (choice), or a
free answer (open). `task_of(example)` is the record by which an answer is asked for, checked and
paid: of the two closed forms their own, whatever the task; of an open question its task's.

How answers are read is in support/answers.py and support/numbers.py. No text raises or is slow.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from support.answers import (
    BOX, extract_answer, iou, matched_iou, offered_letters, parse_boxes, parse_labels,
    parse_letters, parse_verdict, truth_of, words)
from support.numbers import same_math
from support.words import RunError, one_line

FORMS = ("binary", "choice", "open")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its ground truth. Boxes in `problem` and `solution` are in model pixels."""
    problem: str                                # the question, without the format instruction
    solution: str                               # truth: "..<answer>yes</answer>", or bare: "yes"
    task: str = "math"                          # one of TASKS
    form: str = "open"                          # one of FORMS
    images: tuple[str, ...] = ()                # image files, in order
    size: tuple[int, int] | None = None         # (width, height) of images[0] in model pixels
    where: str = ""                             # "file:line"
    split: str = ""                             # stem of its file: the name of a test split
    history: tuple[tuple[str, str], ...] = ()   # (role, text) of the turns before `problem`


# ---- What all tasks have in common ----

def accuracy_reward(completion, example, *, partial_credit=0.2, soft_iou=False):
    """Accuracy in [0, 1] by the example's record (KeyError without one). No answer -> 0."""
    answer = extract_answer(completion)
    settings = {"partial_credit": partial_credit, "soft_iou": soft_iou, "example": example}
    return task_of(example).accuracy(answer, truth_of(example), **settings) if answer else 0.0


def format_reward(completion, example):
    """1.0 for one <think>..</think> with a letter or digit, then one <answer>..</answer>, no more.

    It is not empty, and of some tasks (open detection) it can be read.
    """
    text = completion.strip()
    thinking, _, rest = text.partition("</think>")
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    ordered = text.startswith("<think>") and rest.lstrip().startswith("<answer>")
    answer, readable = extract_answer(text), task_of(example).readable
    thought = any(c.isalnum() for c in thinking.removeprefix("<think>"))    # "." is no thinking
    if not (once and ordered and thought and answer and text.endswith("</answer>")):
        return 0.0
    return float(readable is None or readable(answer))


def safe_reward(reward, completion, example, **settings):
    """reward(completion, example) as a finite float; RunError where a fork's gives none."""
    try:
        value = float(reward(completion, example, **settings))
        problem = f"gives {value}" if not math.isfinite(value) else None
    except (Exception, SystemExit) as error:
        problem = f"raises {type(error).__name__}: {error}"
    if problem:
        raise RunError(f"{reward.__name__} {problem} for the question {one_line(example.problem)!r}"
                       f" ({example.where}) and the completion {one_line(completion)!r}. "
                       "Mend it and continue with --resume")
    return value


def is_correct(completion, example):
    """Exactly right: IoU > 0.5, equal sets, equal answers. Nothing less has an accuracy of 1.0."""
    return accuracy_reward(completion, example, partial_credit=0.0) == 1.0


# ---- Accuracy: (answer, truth) -> [0, 1], a function for each form and task ----

def binary_accuracy(answer, truth, **_):
    """1 if the whole answer is yes/true/correct or no/false/incorrect, as the truth is; else 0."""
    said = parse_verdict(answer)
    return float(said is not None and said == parse_verdict(truth))


def choice_accuracy(answer, truth, *, partial_credit=0.2, **_):
    """Sets of letters. Truth "A, C": "C, A" -> 1; "A", a part, -> partial_credit; "A, B" -> 0."""
    chosen, right = parse_letters(answer), parse_letters(truth)
    if not chosen or not right:
        return 0.0
    return 1.0 if chosen == right else partial_credit if chosen < right else 0.0


def classify_accuracy(answer, truth, **_):
    """Jaccard overlap |both| / |either| of sets of labels: "dog, bus" for "dog, cat" -> 1/3."""
    named, right = ({label.lower() for label in parse_labels(text)} for text in (answer, truth))
    return len(named & right) / len(named | right) if named else 0.0


def detection_accuracy(answer, truth, *, soft_iou=False, **_):
    """R = (sum of IoUs, matched one to one) / max(#predicted, #true); 1 if R > 0.5, else 0.

    R itself with soft_iou. With no true box the answer must say so. Labels are not scored.
    """
    predicted, right = parse_boxes(answer), parse_boxes(truth)
    if not predicted or not right:
        return float(predicted == right == [])
    overlap = matched_iou(predicted, right) / max(len(predicted), len(right))
    return overlap if soft_iou else float(overlap > 0.5)


def math_accuracy(answer, truth, *, example=None, **_):
    """1 for the same letter, number, tuple or text, or for the right one of listed letters."""
    told = example and parse_letters(answer)
    return float(same_math(answer, truth) or bool(told) and told == {listed(example)[1]})


def general_accuracy(answer, truth, **_):
    """Text: 1 if equal by the rules of math, else F1 = 2 |both| / (|answer| + |truth|) of words."""
    if same_math(answer, truth):
        return 1.0
    said, right = Counter(words(answer)), Counter(words(truth))
    return min(0.99, 2 * (said & right).total() / max(1, said.total() + right.total()))


# ---- Boxes in pixels ----

def resize_box(box, original: tuple[int, int], resized: tuple[int, int]) -> list[int]:
    """A box of an image (width, height) in whole pixels of the resized one, never empty.

    [10, 20, 30, 40] of 100 x 100, resized to 112 x 84 -> [11, 17, 34, 34]
    """
    sx, sy = resized[0] / original[0], resized[1] / original[1]
    x1, y1, x2, y2 = (round(x * scale) for x, scale in zip(box, (sx, sy, sx, sy)))
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def resize_boxes(text, original, resized, marked_only=False):
    """`text` with its four-number lists, or only those that "bbox_2d": marks, in other pixels."""
    def pixels(match):
        mark, *numbers = match.groups()
        box = resize_box([float(n) for n in numbers], original, resized)
        return match[0] if marked_only and not mark else f"{mark or ''}{box}"
    return BOX.sub(pixels, text)


# ---- Derived forms: the right answers of an annotation one by one, and wrong ones beside them ----

INSIDE = re.compile(                    # a number: whole part, decimals
    r"(?<![\^_0-9.])(?<![\^_]\{)(\d{1,3}(?:,\d{3})+(?!\d)|\d{1,15})(?:\.(\d{1,9}))?")
DIGITS = re.compile(r"(?<![\^_])(?<![\^_]\{)\d[\d,]*")  # of an exponent: none, cm^2 is never cm^3
OPTION = re.compile(                    # "(C) 145°"
    r"(?:^|[\s(])([A-H])[).:] {0,3}([^\n]{1,80}?)(?=\s*(?:\n|$|[\s(][A-H][).:]))")
MAX_PROBLEM = 4000
OPPOSITES = {"yes": ["no"], "no": ["yes"], "Yes": ["No"], "No": ["Yes"]}     # case tells nothing
VOC_LABELS = tuple("aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,"
                   "horse,motorbike,person,potted plant,sheep,sofa,train,tv monitor".split(","))
SYNONYMS = {word: row.split()[0] for row in (
    "sofa couch settee", "aeroplane airplane plane aircraft", "tv television", "bicycle bike",
    "motorbike motorcycle", "person man woman people boy girl human", "car automobile", "cup mug",
    "phone cellphone smartphone") for word in row.split()}


def right_boxes(example):
    """Each true box as text, or "no objects"."""
    return [json.dumps(box) for box in truth_boxes(example)] or ["no objects"]


def truth_boxes(example):
    """The true boxes as lists of whole numbers where they are whole: [[28, 14, 84, 70]]."""
    boxes = parse_boxes(truth_of(example)) or []
    return [[int(x) if x == int(x) else x for x in box] for box in boxes]


def wrong_box(text, example):
    """Whether a text is one box in the image that overlaps every true one by IoU < 0.3."""
    boxes, (width, height) = parse_boxes(text) or [], example.size
    inside = all(min(box) >= 0 and box[2] <= width and box[3] <= height for box in boxes)
    return inside and len(boxes) == 1 and all(iou(boxes[0], b) < 0.3 for b in truth_boxes(example))


def invent_boxes(example, rng):
    """Boxes inside the image, of about a true box's size, anywhere."""
    (width, height), boxes = example.size, truth_boxes(example)
    for attempt in range(2000):
        x1, y1, x2, y2 = rng.choice(boxes) if boxes else (0, 0, width / 3, height / 3)
        scale = rng.uniform(0.7, 1.3) * 0.99**attempt   # beside a large box only small ones fit
        w, h = (min(side, max(1, round(length * scale)))
                for side, length in ((width, x2 - x1), (height, y2 - y1)))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        yield json.dumps([x, y, x + w, y + h])


def wrong_label(text, example):
    """Whether a text is one label that names nothing true: no part, plural or plain synonym."""
    alike = any(related(text, label) for label in parse_labels(truth_of(example)))
    return len(parse_labels(text)) == 1 and not alike


def related(a, b):
    """Whether labels may name one thing: "rice", "fried rice"; "dog", "Dogs"; "sofa", "couch"."""
    a, b = (re.sub(r"(?<=[^s])s\b", "", text.lower()).split() for text in (a, b))
    a, b = ({SYNONYMS.get(word, word) for word in text} for text in (a, b))
    return a <= b or b <= a


def listed(example):
    """({letters that a question lists}, the right one), by letter or text; (set(), "") without."""
    offered, truth = offered_letters(example.problem), truth_of(example)
    letters = parse_letters(truth) or set()
    if len(letters) == 1 < len(offered) and letters <= offered:
        return offered, letters.pop()
    texts = dict(OPTION.findall(example.problem[:MAX_PROBLEM]))
    right = [a for a, text in texts.items() if a in offered and same_math(text.strip(), truth)]
    return (offered, right[0]) if len(right) == 1 < len(texts) else (set(), "")


def right_answer(example):
    """The one right answer: a letter in capitals where the question lists options."""
    return [listed(example)[1] or truth_of(example)]


def wrong_answer(text, example):
    """Whether a text could be the answer and is not: another letter, or in other numbers."""
    truth = truth_of(example)
    options, right = listed(example)
    if options:
        return text in options and text != right
    alike = DIGITS.sub("0", text) == DIGITS.sub("0", truth) or text in OPPOSITES.get(truth, ())
    return alike and not math_accuracy(text, truth) and not math_accuracy(truth, text)


def invent_answers(example, rng):
    """The other listed letters; "no" for "yes"; else the truth with one of its numbers changed."""
    truth = truth_of(example)
    if options := listed(example)[0]:
        return rng.sample(sorted(options), len(options))
    if not (numbers := list(INSIDE.finditer(truth))):
        return OPPOSITES.get(truth, [])
    number = rng.choice(numbers)
    least = 0 if truth.isdigit() else 1                 # a zero might divide, or read "-0"
    return [truth[:number.start()] + text + truth[number.end():]
            for text in near_numbers(*number.groups(), least, rng)]


def near_numbers(whole, decimals, least, rng):
    """Three numbers near "whole.decimals", written as it is: "0.7" -> "0.9", "0.6", "0.5".

    In a window placed at random around it: or else the middle one of four would be likely.
    """
    places, texts = len(decimals or ""), []
    value = int(whole.replace(",", "") + (decimals or ""))      # in units of the last decimal
    spread = min(1000, max(4, value // 5))
    start = max(least, value - rng.randint(0, spread))
    for n in rng.sample(range(start, start + spread), 3):
        high, low = divmod(n + (n >= value), 10**places)        # never the truth itself
        high = f"{high:,}" if "," in whole else str(high)
        texts.append(f"{high}.{low:0{places}}" if places else high)
    return texts


# ---- Checks: what is wrong with a truth, as a sentence, or nothing ----

def binary_truth_error(example, image_size):
    """A truth that is neither yes nor no."""
    if parse_verdict(truth := truth_of(example)) is None:
        return f"the truth {truth[:80]!r} of a binary row is neither yes nor no."


def choice_truth_error(example, image_size):
    """A truth that is not among the letters that the question offers."""
    if not (parse_letters(truth := truth_of(example)) or {"?"}) <= offered_letters(example.problem):
        return f"the truth {truth[:80]!r} of a choice row is not letters of options in the problem."


def classify_truth_error(example, image_size):
    """A truth without a label."""
    if not parse_labels(truth := truth_of(example)):
        return f"the truth {truth[:80]!r} holds no label."


def detection_truth_error(example, image_size):
    """A truth that is no boxes, or boxes that leave the image, (width, height), beyond rounding."""
    boxes = parse_boxes(truth := truth_of(example))
    if boxes is None:
        return (f'the truth {truth[:80]!r} is neither JSON boxes nor "no objects": up to 64 times '
                '{"bbox_2d": [x1, y1, x2, y2]} in pixels, finite, x1 < x2 and y1 < y2.')
    for box in boxes:
        if min(box) < -1 or box[2] > image_size[0] + 1 or box[3] > image_size[1] + 1:
            return f"the box {list(box)} leaves the image of" + " %d x %d pixels." % image_size


def math_truth_error(example, image_size):
    """A truth that no short answer equals: a box beside an image, a list of texts, or prose."""
    truth = truth_of(example)
    if image_size and parse_boxes(truth):
        return f"the truth {truth[:80]!r} of a math row is a box; --task can name each file's task."
    if re.match(r'\[\s*["{]|\{\s*"', truth):
        return f"the truth {truth[:80]!r} of a math row is a list or an object; keep the one that is right."
    if "####" in truth or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", truth)) > 12:
        return f"the truth {truth[:80]!r} of a math row is prose, equal to no answer; give it bare."


# ---- The records ----

@dataclass(frozen=True, kw_only=True)
class Task:
    """All that depends on a task, or a closed form. Only `accuracy` must be given."""
    accuracy: Callable                  # (answer, truth, **settings) -> [0, 1]; 1: exactly right
    rule: Callable = lambda example: ""     # -> the last words of its prompt: how to answer
    readable: Callable | None = None    # answer -> whether it earns the format reward. None: all do
    truth_error: Callable = lambda example, image_size: None    # -> what is wrong with its truth
    spell: Callable = truth_of          # example -> an answer that is exactly right, for SFT
    resize: Callable | None = None      # (text, size, new size) -> text in other pixels: answers
                                        # are places in an image, which every row has. None: not so
    # the derived forms; a task without `right` has none
    right: Callable | None = None       # example -> the right answers, each fit for an option
    wrong: Callable | None = None       # (text, example) -> could be taken for one, and is none
    invent: Callable = lambda example, rng: ()      # -> texts to try where other rows lend too few
    pool: tuple = ()                    # texts to draw from where other rows lend none
    ask: Callable = lambda example, text: f"{example.problem}\nIs the answer {text}?"
    choose: Callable = lambda example: f"{example.problem}\nWhich of these is right?"
    most: int = 1                       # right options of a choice question at most

    def __post_init__(self):
        if self.resize and not self.readable:
            raise ValueError("a task of places in an image (resize) says what is one (readable)")
        if bool(self.right) != bool(self.wrong):
            raise ValueError("a task has derived forms (right) if it knows wrong answers (wrong)")


CLOSED = {
    "binary": Task(accuracy=binary_accuracy, truth_error=binary_truth_error,
                   rule=lambda _: "Answer exactly yes or no."),
    "choice": Task(
        accuracy=choice_accuracy, truth_error=choice_truth_error, rule=lambda _:
        "Answer with only the letter, or all right letters if several options are right."),
}
TASKS = {
    "detection": Task(
        accuracy=detection_accuracy, truth_error=detection_truth_error, resize=resize_boxes,
        rule=lambda _:
        'Answer with JSON boxes in pixels, [{"bbox_2d": [x1, y1, x2, y2]}], or "no objects".',
        readable=lambda answer: parse_boxes(answer) is not None,
        right=right_boxes, wrong=wrong_box, invent=invent_boxes,
        ask=lambda example, text: f"{example.problem}\nIs " + (
            f"{text} the right box?" if text.startswith("[") else f"the answer {text}?")),
    "classify": Task(
        accuracy=classify_accuracy, truth_error=classify_truth_error,
        rule=lambda _: "Answer with the labels, separated by commas.",
        right=lambda example: parse_labels(truth_of(example)), wrong=wrong_label,
        pool=VOC_LABELS, most=3,
        ask=lambda example, text: f"Is there {'an' if text[0] in 'aeiouAEIOU' else 'a'} {text}?",
        choose=lambda example: "Which of these are there?"),
    "math": Task(
        accuracy=math_accuracy, truth_error=math_truth_error,
        rule=lambda example: "Answer with only the letter."
        if len(parse_letters(truth_of(example)) or ()) == 1 and listed(example)[0] else "",
        right=right_answer, wrong=wrong_answer, invent=invent_answers),
    "general": Task(accuracy=general_accuracy),     # of the reject stage; no RL stage has them
}


def task_of(example):
    """The record that asks for an answer and pays it: its form's, or if that is open its task's."""
    return CLOSED[example.form] if example.form in CLOSED else TASKS[example.task]
