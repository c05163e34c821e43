"""TASKS: everything that depends on a task is one record here, and all other code asks the record.

A question has a task (detection, classify, math, general) and a form: yes or no (binary), option letters (choice), or a
free answer (open). The first two forms have records of their own, for what they ask and pay does not depend on the
task. `kind(example)` is the record by which an example's answer is asked for, checked and paid. A new task is one more
record; an unknown one is a KeyError. The functions stand above the records: accuracies, then what the two derived
forms of the curriculum need.

How answers are read is in answers.py. `example` is a data.Example: .form, .task, .solution, and where questions are
derived or checked .problem and .size.
"""
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from answers import (extract_answer, iou, matched_iou, offered_letters, parse_boxes, parse_labels, parse_letters,
                     parse_verdict, words)
from tools.numerals import same_math

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


def truth_of(example):
    """The true answer: the text in the only <answer>..</answer> of example.solution, or all of one without tags."""
    answer = extract_answer(example.solution)
    return example.solution.strip() if answer is None else answer


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
    """1 for the same letter, number, tuple or normalized text, as tools/numerals.py tells them; else 0."""
    return float(same_math(answer, truth))


def general_accuracy(answer, truth, **_):
    """Free text: 1 if equal by the rules of math, else F1 = 2 |both| / (|answer| + |truth|) of the words, below 1."""
    if math_accuracy(answer, truth):
        return 1.0
    said, right = Counter(words(answer)), Counter(words(truth))
    return min(0.99, 2 * (said & right).total() / max(1, said.total() + right.total()))


# ---- Derived forms: the right answers of an annotation one by one, and wrong answers beside them ----

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

def binary_fault(example, original):
    """A truth that is neither yes nor no."""
    if parse_verdict(truth := truth_of(example)) is None:
        return f"the truth {truth[:80]!r} of a binary row is neither yes nor no."


def choice_fault(example, original):
    """A truth that is not among the letters that the question offers."""
    if not (parse_letters(truth := truth_of(example)) or {"?"}) <= offered_letters(example.problem):
        return f"the truth {truth[:80]!r} of a choice row is not letters of options in the problem."


def classify_fault(example, original):
    """A truth without a label."""
    if not parse_labels(truth := truth_of(example)):
        return f"the truth {truth[:80]!r} holds no label."


def detection_fault(example, original):
    """A truth that is no boxes, or boxes that leave the image of `original` (width, height) by more than rounding."""
    boxes = parse_boxes(truth := truth_of(example))
    if boxes is None:
        return (f'the truth {truth[:80]!r} is neither JSON boxes nor "no objects": up to 64 times '
                '{"bbox_2d": [x1, y1, x2, y2]} in pixels, finite, x1 < x2 and y1 < y2.')
    for box in boxes:
        if min(box) < -1 or box[2] > original[0] + 1 or box[3] > original[1] + 1:
            return f"the box {list(box)} leaves the image of {original[0]} x {original[1]} pixels."


def math_fault(example, original):
    """A truth that no short answer equals: a box beside an image, a list of texts, or prose."""
    truth = truth_of(example)
    if original and parse_boxes(truth):
        return f"the truth {truth[:80]!r} of a math row is a box; --task can name the task of each file."
    if re.match(r'\[\s*["{]', truth):
        return f"the truth {truth[:80]!r} of a math row is a list; keep the one that is right."
    if "####" in truth or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", truth)) > 12:
        return f"the truth {truth[:80]!r} of a math row is prose, which no answer equals; give the bare answer."


# ---- The records ----

@dataclass(frozen=True, kw_only=True)
class Task:
    """All that depends on a task (or on a closed form). Only `accuracy` must be given."""
    accuracy: Callable                                  # (answer, truth, **settings) -> [0, 1]; 1: exactly right
    rule: Callable = lambda example: ""                 # example -> the last words of its prompt: how to answer
    readable: Callable = bool                           # answer -> whether it earns the format reward
    fault: Callable = lambda example, original: None    # (example, image size) -> what is wrong with its truth
    spell: Callable = truth_of                          # example -> an answer that is exactly right: what SFT teaches
    boxes: bool = False                                 # texts hold boxes in pixels, which are resized with the image
    needs_image: bool = False
    # the derived forms; a task without `right` has none
    right: Callable | None = None                       # example -> the right answers, each of which an option may show
    wrong: Callable | None = None                       # (text, example) -> could be taken for one, and is none
    invent: Callable = lambda example, rng: ()          # (example, rng) -> texts to try where the pool lends too few
    pool: tuple = ()                                    # texts to draw from where other rows lend none
    ask: Callable = lambda example, text: f"{example.problem}\nIs the answer {text}?"
    choose: Callable = lambda example: f"{example.problem}\nWhich of these is right?"
    most: int = 1                                       # right options of a choice question at most


CLOSED = {
    "binary": Task(accuracy=binary_accuracy, fault=binary_fault, rule=lambda _: "Answer exactly yes or no."),
    "choice": Task(accuracy=choice_accuracy, fault=choice_fault,
                   rule=lambda _: "Answer with only the letter, or all right letters if several options are right."),
}
TASKS = {
    "detection": Task(
        accuracy=detection_accuracy, fault=detection_fault, boxes=True, needs_image=True,
        rule=lambda _: 'Answer with JSON boxes in pixels, [{"bbox_2d": [x1, y1, x2, y2]}], or "no objects".',
        readable=lambda answer: parse_boxes(answer) is not None,
        right=right_boxes, wrong=wrong_box, invent=invent_boxes,
        ask=lambda example, text: f"{example.problem}\nIs {text} the right box?" if text.startswith("[") else
        f"{example.problem}\nIs the answer {text}?"),
    "classify": Task(
        accuracy=classify_accuracy, fault=classify_fault, rule=lambda _: "Answer with the labels, separated by commas.",
        right=right_labels, wrong=wrong_label, pool=VOC_LABELS, most=3,
        ask=lambda example, text: f"Is there {'an' if text[0] in 'aeiouAEIOU' else 'a'} {text}?",
        choose=lambda example: "Which of these are there?"),
    "math": Task(
        accuracy=math_accuracy, fault=math_fault,
        rule=lambda example: "Answer with only the letter." if parse_letters(truth_of(example)) and listed(example)[0]
        else "",
        right=right_answer, wrong=wrong_answer, invent=invent_answers),
    "general": Task(accuracy=general_accuracy),         # questions of the reject stage; no RL stage has them
}


def kind(example):
    """The record that an example's answer is asked for and paid by: its form's, or of an open question its task's."""
    return CLOSED[example.form] if example.form in CLOSED else TASKS[example.task]
