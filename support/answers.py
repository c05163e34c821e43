"""Text -> value: what an answer says. One set of readers, for truths of the data and model answers.

Each reader returns None for what is none. An answer counts as a whole: hedging ("yes or no"),
naming all and gluing read as nothing. Numbers are read in support/numbers.py. Text is hostile:
nothing here raises, is slow or is evaluated.
"""

import json
import re
from itertools import takewhile

import numpy as np

MAX_ANSWER, MAX_SHORT = 4000, 200       # characters of an answer; of a verdict, or letters
MAX_BOXES, MAX_PIXEL = 64, 1e6          # more, or a larger coordinate, as infinity, are none
END = ".,;: \t\r\n\\"                   # what may close an answer; no "!": 5! is not 5
EDGES = END + "。!?()[]{}<>\"'`*“”‘’"
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans("。、", ".,")
DRESS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"),
         ('"', '"'), ("“", "”"), ("'", "'"),
         *((rf"\{name}{{", "}") for name in "boxed fbox text textbf mathrm mathbf mbox".split())]
BALANCED = re.compile(r"(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*")


def extract_answer(text):
    """Text inside the only <answer>..</answer>, stripped. None for none, several, long, in <think>.

    "<think>1 + 1</think><answer> 2 </answer>" -> "2"; "<answer>2</answer> <answer>" -> None
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    drafted = before.rfind("<think>") > before.rfind("</think>") and "</think>" in after
    return answer.strip() if closed and not drafted and len(answer) <= MAX_ANSWER else None


def undress(text, end=END):
    r"""Without what stands around the whole of an answer: r"**$\boxed{Ｂ}$**。" -> "B"."""
    text = text.translate(WIDE).strip().rstrip(end)
    for left, right in DRESS * 4:
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inner = text[len(left):-len(right)]
            if BALANCED.fullmatch(inner) if right == "}" else not (left in inner or right in inner):
                text = inner.strip().rstrip(end)
    return text


def words(text):
    """Lower-case words, no punctuation around them: "The dog, -5." -> ["the", "dog", "-5"]."""
    return [word for piece in text.lower().split() if (word := piece.strip(EDGES))]


def parse_verdict(text):
    """True for yes/true/correct, False for no/false/incorrect, else None: " **Yes**. " -> True."""
    word = undress(text, END + "!").strip("()").lower() if len(text) <= MAX_SHORT else ""
    said = word in ("yes", "true", "correct", "是")
    return said if said or word in ("no", "false", "incorrect", "否") else None


NAMED = re.compile(r"(?:(?:option|choice|answer):? |选项 ?)?(.*)", re.I | re.S)
TOLD = re.compile(r"(\(?[A-Z][.):]\)?) (?!.*\b[A-Z]\b).+")          # naming no other letter


def parse_letters(text):
    """Set of option letters, or None unless the text is these: "(a) and C.", "AC" -> {"A", "C"}.

    One may come with its text: "Option B", "B. dog" -> {"B"}; "B. dog, C. cat", "B or C" -> None.
    """
    text = NAMED.fullmatch(undress(text, END + "!") if len(text) <= MAX_SHORT else "")[1]
    text = told[1] if (told := TOLD.fullmatch(text)) else text
    pieces = [piece for piece in re.split(r"[\s,;:/&.()\[\]{}]+|和|\band\b", text) if piece]
    if len(pieces) == 1 and re.fullmatch("A?B?C?D?E?F?G?H?", pieces[0]):
        pieces = list(pieces[0])
    single = all(len(piece) == 1 and piece.isascii() and piece.isalpha() for piece in pieces)
    return {piece.upper() for piece in pieces} if pieces and single else None


def offered_letters(problem):
    """Letters of the options that a problem lists: A, B, C and on, as far as each stands alone."""
    alone = set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", problem))
    return set(takewhile(alone.__contains__, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


def parse_labels(text):
    """Labels as written, each once, between commas, semicolons or lines, behind bullets or numbers.

    '["Traffic  light", "dog"].' -> ["Traffic light", "dog"]; "1. dog\\n2. cat" -> ["dog", "cat"]
    """
    parts = (re.sub(r"^\s*(?:[-*•]|[0-9]{1,2}[.)])\s+", "", part)
             for part in re.split(r"[,;\n]", undress(text)))
    first = {}
    for label in (" ".join(part.strip(EDGES).split()) for part in parts):
        first.setdefault(label.lower(), label)
    return [label for label in first.values() if label]


FENCE = re.compile(r"^```(?:json|[a-z]{1,10}\n)?|```$", re.I)
NONE = re.compile(r"(there (is|are) )?(none|null|no (objects?|box|boxes)( found| detected)?)|没有|无")


def parse_boxes(text):
    """List of boxes (x1, y1, x2, y2) in pixels; [] for "no objects"; None for anything else.

    JSON, fenced or not: {"bbox_2d": [1, 2, 3, 4]}, a list of those, [1, 2, 3, 4], a list of such.
    """
    text = FENCE.sub("", text.strip().rstrip(END)).strip()
    if len(text) <= MAX_SHORT and NONE.fullmatch(" ".join(undress(text).lower().split())):
        return []
    try:
        value = json.loads(text, parse_int=float)       # int() raises on thousands of digits
    except (ValueError, RecursionError):
        return None
    several = isinstance(value, list) and not any(isinstance(x, float) for x in value)
    boxes = [item.get("bbox_2d") if isinstance(item, dict) else item
             for item in (value if several else [value])]
    right = len(boxes) <= MAX_BOXES and all(map(is_box, boxes))
    return [tuple(box) for box in boxes] if right else None


def is_box(value):
    """True for a list of four finite floats with x1 < x2 and y1 < y2."""
    return isinstance(value, list) and len(value) == 4 and all(
        isinstance(x, float) and abs(x) <= MAX_PIXEL for x in value) and \
        value[0] < value[2] and value[1] < value[3]


def iou(a, b):
    """Intersection over union of two boxes, in [0, 1]: (0, 0, 2, 1) and (1, 0, 3, 1) -> 1/3."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
    return min(1.0, width * height / union) if union > 0 else 0.0


def matched_iou(predicted, true):
    """Largest sum of IoUs over one-to-one matchings of two lists of boxes; greedy may miss it."""
    few, many = sorted((predicted, true), key=len)
    overlap = np.array([[iou(a, b) for b in many] for a in few])
    return float(overlap[range(len(few)), assignment(-overlap)].sum()) if few else 0.0


def assignment(cost):
    """A column for each row, all different, of the least sum: cost (n, m), n <= m.

    Rows enter one by one, each on the cheapest path of exchanges to a free column (Bellman, Ford).
    """
    n, m = cost.shape
    owner = np.full(m, -1)                              # row of each column
    for row in range(n):
        least, before = cost[row].copy(), np.full(m, -1)
        taken = np.flatnonzero(owner >= 0)
        change = cost[owner[taken]] - cost[owner[taken], taken][:, None]    # (taken, m)
        for _ in taken:
            through = least[taken, None] + change
            best = through.argmin(0)
            cheaper = through[best, range(m)] < least - 1e-12
            if not cheaper.any():
                break
            least[cheaper], before[cheaper] = through.min(0)[cheaper], taken[best[cheaper]]
        column = int(np.argmin(np.where(owner < 0, least, np.inf)))
        while column >= 0:                              # along the path back, everybody moves on
            owner[column] = owner[before[column]] if before[column] >= 0 else row
            column = before[column]
    return np.array([int(np.flatnonzero(owner == row)[0]) for row in range(n)])


def truth_of(example):
    """The true answer: the text in the only <answer>..</answer> of the solution, or all of it."""
    answer = extract_answer(example.solution)
    return example.solution.strip() if answer is None else answer


BOX = re.compile(r'("bbox_2d"\s*:\s*)?\[\s*{n}\s*,\s*{n}\s*,\s*{n}\s*,\s*{n}\s*\]'.format(
    n=r"(-?\d{1,6}(?:\.\d+)?(?:[eE][+-]?\d{1,2})?)"))   # (mark, four numbers)
