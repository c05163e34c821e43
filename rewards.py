"""Rewards of Curr-ReFT (arXiv 2503.07065): model text in, a finite float out. A task is one record here.

    reward = accuracy_reward, in [0, 1], + format_reward, 0 or 1

A completion should read `<think>reasoning</think><answer>answer</answer>`. A question has a task (detection, classify,
math, general) and a form: yes or no (binary), option letters (choice), or a free answer (open). `task_of(example)` is
the record by which an answer is asked for, checked and paid: of the two closed forms their own, for what they ask and
pay does not depend on the task; of an open question its task's. A new task is one more record.

How answers are read is in support/answers.py and support/numbers.py. No text raises, is slow or is evaluated.
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
    """One question with its ground truth. Every box in `problem` and `solution` is in model pixels."""
    problem: str                                        # the question, without the format instruction
    solution: str                                       # truth: "..<answer>yes</answer>", or the bare answer
    task: str = "math"                                  # one of TASKS
    form: str = "open"                                  # one of FORMS
    images: tuple[str, ...] = ()                        # image files, in order
    size: tuple[int, int] | None = None                 # (width, height) of images[0] in model pixels
    where: str = ""                                     # "file:line"
    split: str = ""                                     # stem of its file: the name of a test split
    history: tuple[tuple[str, str], ...] = ()           # (role, text) of the turns before `problem`, chat rows only


# ---- What all tasks have in common ----

def accuracy_reward(completion, example, *, partial_credit=0.2, soft_iou=False):
    """Accuracy in [0, 1] by the example's record (KeyError without one). No answer -> 0."""
    answer = extract_answer(completion)
    settings = {"partial_credit": partial_credit, "soft_iou": soft_iou}
    return task_of(example).accuracy(answer, truth_of(example), **settings) if answer else 0.0


def format_reward(completion, example):
    """1.0 for one <think>..</think> with a letter or digit, then one non-empty <answer>..</answer>, and nothing else.

    Of some tasks (open detection) the answer must also be one that can be read.
    """
    text = completion.strip()
    thinking, _, rest = text.partition("</think>")
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    ordered = text.startswith("<think>") and rest.lstrip().startswith("<answer>") and text.endswith("</answer>")
    answer = extract_answer(text)
    thought = any(c.isalnum() for c in thinking.removeprefix("<think>"))  # one full stop is no thinking
    if not (once and ordered and thought and answer):
        return 0.0
    readable = task_of(example).readable
    return float(readable is None or readable(answer))


def safe_reward(reward, completion, example, **settings):
    """reward(completion, example) as a finite float; where a fork's gives none, RunError names question and answer."""
    try:
        value = float(reward(completion, example, **settings))
        problem = f"gives {value}" if not math.isfinite(value) else None
    except (Exception, SystemExit) as error:
        problem = f"raises {type(error).__name__}: {error}"
    if problem:
        raise RunError(f"{reward.__name__} {problem} for the question {one_line(example.problem)!r} ({example.where}) "
                       f"and the completion {one_line(completion)!r}. Mend it and continue with --resume")
    return value


def is_correct(completion, example):
    """Exactly right: IoU > 0.5, equal sets, equal answers. No accuracy function gives 1.0 for anything less."""
    return accuracy_reward(completion, example, partial_credit=0.0) == 1.0


# ---- Accuracy: (answer, truth) -> [0, 1], a function for each form and task ----

def binary_accuracy(answer, truth, **_):
    """1 if the whole answer is yes/true/correct or no/false/incorrect and agrees with the truth: "Yes." for "true"."""
    said = parse_verdict(answer)
    return float(said is not None and said == parse_verdict(truth))


def choice_accuracy(answer, truth, *, partial_credit=0.2, **_):
    """Sets of letters. Truth "A, C": "C and A" -> 1; "A", a part of it, -> partial_credit; "A, B", "A, B, C" -> 0."""
    chosen, right = parse_letters(answer), parse_letters(truth)
    if not chosen or not right:
        return 0.0
    return 1.0 if chosen == right else partial_credit if chosen < right else 0.0


def classify_accuracy(answer, truth, **_):
    """Jaccard overlap |answer & truth| / |answer | truth| of label sets: "dog, bus" for "dog, cat" -> 1/3."""
    named, right = ({label.lower() for label in parse_labels(text)} for text in (answer, truth))
    return len(named & right) / len(named | right) if named else 0.0


def detection_accuracy(answer, truth, *, soft_iou=False, **_):
    """R = (sum of IoUs, matched one to one) / max(#predicted, #true); 1 if R > 0.5, else 0; R itself with soft_iou.

    With no true box the answer must say that there is none. Labels beside the boxes are not scored.
    """
    predicted, right = parse_boxes(answer), parse_boxes(truth)
    if not predicted or not right:
        return float(predicted == right == [])
    overlap = matched_iou(predicted, right) / max(len(predicted), len(right))
    return overlap if soft_iou else float(overlap > 0.5)


def math_accuracy(answer, truth, **_):
    """1 for the same letter, number, tuple or normalized text, as support/numbers.py tells them; else 0."""
    return float(same_math(answer, truth))


def general_accuracy(answer, truth, **_):
    """Free text: 1 if equal by the rules of math, else F1 = 2 |both| / (|answer| + |truth|) of the words, below 1."""
    if math_accuracy(answer, truth):
        return 1.0
    said, right = Counter(words(answer)), Counter(words(truth))
    return min(0.99, 2 * (said & right).total() / max(1, said.total() + right.total()))


# ---- Boxes in pixels ----

def resize_box(box, original: tuple[int, int], resized: tuple[int, int]) -> list[int]:
    """A box (x1, y1, x2, y2) of the `original` (width, height) in whole pixels of the `resized` image, never empty.

    [10, 20, 30, 40] of 100 x 100, resized to 112 x 84 -> [11, 17, 34, 34]
    """
    sx, sy = resized[0] / original[0], resized[1] / original[1]
    x1, y1, x2, y2 = round(box[0] * sx), round(box[1] * sy), round(box[2] * sx), round(box[3] * sy)
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def resize_boxes(text, original, resized, marked_only=False):
    """`text` with `resize_box` applied to every four-number list in it, or to those alone that "bbox_2d": marks."""
    def pixels(match):
        mark, *numbers = match.groups()
        if marked_only and not mark:
            return match[0]
        return f"{mark or ''}{resize_box([float(n) for n in numbers], original, resized)}"
    return BOX.sub(pixels, text)


# ---- Derived forms: the right answers of an annotation one by one, and wrong answers beside them ----

INSIDE = re.compile(                        # a number: whole part, decimals
    r"(?<![\^_0-9.])(?<![\^_]\{)(\d{1,3}(?:,\d{3})+(?!\d)|\d{1,15})(?:\.(\d{1,9}))?")
DIGITS = re.compile(r"(?<![\^_])(?<![\^_]\{)\d[\d,]*")      # of an exponent: none, cm^2 is never cm^3
OPTION = re.compile(r"(?:^|[\s(])([A-H])[).:] {0,3}([^\n]{1,80}?)(?=\s*(?:\n|$|[\s(][A-H][).:]))")     # "(C) 145°"
MAX_PROBLEM = 4000
VOC_LABELS = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
              "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor")
SYNONYMS = {word: row.split()[0] for row in (
    "sofa couch settee", "aeroplane airplane plane aircraft", "tv television", "motorbike motorcycle", "bicycle bike",
    "person man woman people boy girl human", "car automobile", "cup mug", "phone cellphone smartphone")
    for word in row.split()}


def right_boxes(example):
    """Each true box as text, or "no objects"."""
    return [json.dumps(box) for box in truth_boxes(example)] or ["no objects"]


def truth_boxes(example):
    """The true boxes as lists of whole numbers where they are whole: [[28, 14, 84, 70]]."""
    return [[int(x) if x == int(x) else x for x in box] for box in parse_boxes(truth_of(example)) or []]


def wrong_box(text, example):
    """Whether a text is one box that overlaps every true one by IoU < 0.3 and lies within the image."""
    boxes, (width, height) = parse_boxes(text), example.size
    if not boxes or len(boxes) > 1:
        return False
    (box,) = boxes
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height
    return inside and all(iou(box, true) < 0.3 for true in truth_boxes(example))


def invent_boxes(example, rng):
    """Boxes inside the image, of about a true box's size, anywhere."""
    (width, height), boxes = example.size, truth_boxes(example)
    for attempt in range(2000):
        x1, y1, x2, y2 = rng.choice(boxes) if boxes else (0, 0, width / 3, height / 3)
        scale = rng.uniform(0.7, 1.3) * 0.99**attempt   # shrinks: by a box as large as the image only small ones fit
        w, h = (min(side, max(1, round(length * scale))) for side, length in ((width, x2 - x1), (height, y2 - y1)))
        x, y = rng.randint(0, width - w), rng.randint(0, height - h)
        yield json.dumps([x, y, x + w, y + h])


def wrong_label(text, example):
    """Whether a text is one label that is not true: no part, plural or plain synonym of a true one, nor the reverse."""
    return len(parse_labels(text)) == 1 and not any(related(text, label) for label in right_labels(example))


def related(a, b):
    """Whether two labels may name one thing: "rice", "fried rice"; "dog", "Dogs"; "sofa", "couch"."""
    a, b = ({SYNONYMS.get(word, word) for word in re.sub(r"(?<=[^s])s\b", "", text.lower()).split()} for text in (a, b))
    return a <= b or b <= a


def right_labels(example):
    """The true labels as they are written."""
    return parse_labels(truth_of(example))


def listed(example):
    """({letters that a question lists}, the right one) if its truth is one of them or its text; else (set(), "")."""
    offered, truth = offered_letters(example.problem), truth_of(example)
    letters = parse_letters(truth) or set()
    if len(letters) == 1 < len(offered) and letters <= offered:
        return offered, letters.pop()
    texts = dict(OPTION.findall(example.problem[:MAX_PROBLEM]))
    right = [letter for letter, text in texts.items() if letter in offered and same_math(text.strip(), truth)]
    return (offered, right[0]) if len(right) == 1 < len(texts) else (set(), "")


def right_answer(example):
    """The one right answer: a letter in capitals where the question lists options."""
    return [listed(example)[1] or truth_of(example)]


def wrong_answer(text, example):
    """Whether a text could be taken for the answer and is wrong: another listed letter, the same with other numbers."""
    truth = truth_of(example)
    options, right = listed(example)
    if options:
        return text in options and text != right
    alike = DIGITS.sub("0", text) == DIGITS.sub("0", truth) or {text, truth} in ({"yes", "no"}, {"Yes", "No"})
    return alike and not math_accuracy(text, truth) and not math_accuracy(truth, text)


def invent_answers(example, rng):
    """The other letters of listed options; "no" for "yes"; else the truth with one of its numbers changed."""
    truth = truth_of(example)
    if options := listed(example)[0]:
        return rng.sample(sorted(options), len(options))
    numbers = list(INSIDE.finditer(truth))
    if not numbers:
        return {"yes": ["no"], "no": ["yes"], "Yes": ["No"], "No": ["Yes"]}.get(truth, [])  # case gives nothing away
    number = rng.choice(numbers)
    least = 0 if truth.isdigit() else 1                                     # a zero might divide, or read "-0"
    return [truth[:number.start()] + text + truth[number.end():] for text in near_numbers(*number.groups(), least, rng)]


def near_numbers(whole, decimals, least, rng):
    """Three numbers near "whole.decimals", written as it is: "0.7" -> "0.9", "0.6", "0.5".

    Drawn from a window around the truth, placed at random: or else the middle one of four would be the likely one.
    """
    places, texts = len(decimals or ""), []
    value = int(whole.replace(",", "") + (decimals or ""))                  # in units of the last decimal
    spread = min(1000, max(4, value // 5))
    start = max(least, value - rng.randint(0, spread))
    for n in rng.sample(range(start, start + spread), 3):
        high, low = divmod(n + (n >= value), 10**places)                    # never the truth itself
        texts.append((f"{high:,}" if "," in whole else str(high)) + (f".{low:0{places}}" if places else ""))
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
    """A truth that is no boxes, or boxes that leave the image, (width, height) in pixels, by more than rounding."""
    boxes = parse_boxes(truth := truth_of(example))
    if boxes is None:
        return (f'the truth {truth[:80]!r} is neither JSON boxes nor "no objects": up to 64 times '
                '{"bbox_2d": [x1, y1, x2, y2]} in pixels, finite, x1 < x2 and y1 < y2.')
    for box in boxes:
        if min(box) < -1 or box[2] > image_size[0] + 1 or box[3] > image_size[1] + 1:
            return f"the box {list(box)} leaves the image of {image_size[0]} x {image_size[1]} pixels."


def math_truth_error(example, image_size):
    """A truth that no short answer equals: a box beside an image, a list of texts, or prose."""
    truth = truth_of(example)
    if image_size and parse_boxes(truth):
        return f"the truth {truth[:80]!r} of a math row is a box; --task can name the task of each file."
    if re.match(r'\[\s*["{]', truth):
        return f"the truth {truth[:80]!r} of a math row is a list; keep the one that is right."
    if "####" in truth or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", truth)) > 12:
        return f"the truth {truth[:80]!r} of a math row is prose, which no answer equals; give the bare answer."


# ---- The records ----

@dataclass(frozen=True, kw_only=True)
class Task:
    """All that depends on a task (or on a closed form). Only `accuracy` must be given; the rest says what is without it."""
    accuracy: Callable                      # (answer, truth, **settings) -> [0, 1]; 1: exactly right
    rule: Callable = lambda example: ""     # example -> the last words of its prompt: how to answer. Without: none
    readable: Callable | None = None        # answer -> whether it earns the format reward. Without: all but an empty one
    truth_error: Callable = lambda example, image_size: None  # -> what is wrong with its truth. Without: nothing is
    spell: Callable = truth_of              # example -> an answer that is exactly right: what SFT teaches
    resize: Callable | None = None          # (text, (width, height), (width, height)) -> the text with its coordinates in
                                            # pixels of another size: answers are places in an image, which every row must
                                            # have. Without: answers mean the same whatever is shown
    # the derived forms; a task without `right` has none
    right: Callable | None = None           # example -> the right answers, each of which an option may show
    wrong: Callable | None = None           # (text, example) -> could be taken for one, and is none
    invent: Callable = lambda example, rng: ()  # (example, rng) -> texts to try where other rows lend too few
    pool: tuple = ()                        # texts to draw from where other rows lend none
    ask: Callable = lambda example, text: f"{example.problem}\nIs the answer {text}?"
    choose: Callable = lambda example: f"{example.problem}\nWhich of these is right?"
    most: int = 1                           # right options of a choice question at most

    def __post_init__(self):
        if self.resize and not self.readable:
            raise ValueError("a task whose answers hold coordinates (resize) must say which answers are some (readable)")
        if bool(self.right) != bool(self.wrong):
            raise ValueError("a task has derived forms (right) if it knows wrong answers (wrong), and only then")


CLOSED = {
    "binary": Task(accuracy=binary_accuracy, truth_error=binary_truth_error, rule=lambda _: "Answer exactly yes or no."),
    "choice": Task(accuracy=choice_accuracy, truth_error=choice_truth_error,
                   rule=lambda _: "Answer with only the letter, or all right letters if several options are right."),
}
TASKS = {
    "detection": Task(
        accuracy=detection_accuracy, truth_error=detection_truth_error, resize=resize_boxes,
        rule=lambda _: 'Answer with JSON boxes in pixels, [{"bbox_2d": [x1, y1, x2, y2]}], or "no objects".',
        readable=lambda answer: parse_boxes(answer) is not None,
        right=right_boxes, wrong=wrong_box, invent=invent_boxes,
        ask=lambda example, text: f"{example.problem}\nIs {text} the right box?" if text.startswith("[") else
        f"{example.problem}\nIs the answer {text}?"),
    "classify": Task(
        accuracy=classify_accuracy, truth_error=classify_truth_error, rule=lambda _: "Answer with the labels, separated by commas.",
        right=right_labels, wrong=wrong_label, pool=VOC_LABELS, most=3,
        ask=lambda example, text: f"Is there {'an' if text[0] in 'aeiouAEIOU' else 'a'} {text}?",
        choose=lambda example: "Which of these are there?"),
    "math": Task(
        accuracy=math_accuracy, truth_error=math_truth_error,
        rule=lambda example: "Answer with only the letter." if parse_letters(truth_of(example)) and listed(example)[0]
        else "",
        right=right_answer, wrong=wrong_answer, invent=invent_answers),
    "general": Task(accuracy=general_accuracy),         # questions of the reject stage; no RL stage has them
}


def task_of(example):
    """The record that an example's answer is asked for and paid by: its form's, or of an open question its task's."""
    return CLOSED[example.form] if example.form in CLOSED else TASKS[example.task]
