"""Text -> value: what an answer says. One set of readers, for truths of the data and answers of the model alike.

Each reader returns None for what is none, and an answer counts as a whole, never by a part of it: hedging ("yes or
no"), naming everything and gluing things together read as nothing. What may stand around an answer ($..$, **..**,
quotes, a full stop) is taken off first. Numbers are read in support/numbers.py. Text is hostile: whatever the string,
nothing here raises, is slow or is evaluated.
"""

import json
import re

import numpy as np

MAX_ANSWER = 4000                       # characters; a longer answer is none
MAX_BOXES, MAX_PIXEL = 64, 1e6          # more boxes or a larger coordinate (infinity, too) are no answer
END = ".。,;: \t\r\n"                   # what may close an answer; no "!": 5! is not 5
EDGES = END + "!?()[]{}<>\"'`*“”‘’"


def extract_answer(text):
    """Text inside the only <answer>..</answer>, stripped. None for none, several, one over-long or one in <think>.

    "<think>1 + 1</think><answer> 2 </answer>" -> "2"; "<answer>2</answer><answer>3</answer>" -> None
    """
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = text.partition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    drafted = before.rfind("<think>") > before.rfind("</think>") and "</think>" in after
    return answer.strip() if closed and not drafted and len(answer) <= MAX_ANSWER else None


DRESS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("“", "”"),
         ("'", "'"), *((rf"\{name}{{", "}") for name in "boxed fbox text textbf mathrm mathbf mbox".split())]


def undress(text, end=END):
    r"""Without what stands around the whole of an answer: r"**$\boxed{B}$**." -> "B"; r"\boxed{1} \boxed{2}" stays."""
    text = text.strip().rstrip(end)
    for _ in range(8):
        for left, right in DRESS:
            inner = text[len(left):len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left + right) and (
                    closed(inner) if right == "}" else left not in inner and right not in inner):
                text = inner.strip().rstrip(end)
                break
        else:
            break
    return text


def closed(text):
    """Whether every brace in a text is closed in it and none closes before it opens."""
    depth = 0
    for c in text:
        depth += (c == "{") - (c == "}")
        if depth < 0:
            return False
    return depth == 0


def words(text):
    """Lower-case words without the punctuation around them: "The dog, -5." -> ["the", "dog", "-5"]."""
    return [word for piece in text.lower().split() if (word := piece.strip(EDGES))]


def parse_verdict(text):
    """True for yes/true/correct, False for no/false/incorrect, else None: " **Yes**. " -> True, "yes, but" -> None."""
    word = undress(text[:200], END + "!").strip("()").lower()
    return {"yes": True, "true": True, "correct": True, "no": False, "false": False, "incorrect": False}.get(word)


def parse_letters(text):
    """Set of option letters, or None unless the text is single letters throughout: "(a) and C." -> {"A", "C"}."""
    pieces = re.split(r"[\s,;:/&.()\[\]{}]+", undress(text, END + "!"))
    pieces = [piece for piece in pieces if piece.lower() not in ("", "and")]
    single = all(len(piece) == 1 and piece.isascii() and piece.isalpha() for piece in pieces)
    return {piece.upper() for piece in pieces} if pieces and single else None


def offered_letters(problem):
    """Letters of the options that a problem lists: A, B, C and on, as far as each stands alone in it."""
    alone, letters = set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", problem)), set()
    while (letter := chr(ord("A") + len(letters))) in alone:
        letters.add(letter)
    return letters


def parse_labels(text):
    """Labels as they are written, each once, between commas, semicolons or lines, behind bullets or numbers.

    '["Traffic  light", "dog"].' -> ["Traffic light", "dog"]; "1. dog\\n2. cat" -> ["dog", "cat"]
    """
    parts = (re.sub(r"^\s*(?:[-*•]|[0-9]{1,2}[.)])\s+", "", part) for part in re.split(r"[,;\n]", undress(text)))
    labels = [label for part in parts if (label := " ".join(part.strip(EDGES).split()))]
    first = {}
    for label in labels:
        first.setdefault(label.lower(), label)
    return list(first.values())


def parse_boxes(text):
    """List of boxes (x1, y1, x2, y2) in pixels; [] for "no objects"; None for anything else.

    JSON, in a Markdown fence or not: {"bbox_2d": [1, 2, 3, 4]}, a list of those, [1, 2, 3, 4], a list of such.
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = re.sub(r"^[a-zA-Z]{0,10}\s", "", text.strip("`").removeprefix("json").removeprefix("JSON") + " ").strip()
    said = " ".join(undress(text[:60]).lower().split())
    if len(text) < 60 and re.fullmatch(r"(there (is|are) )?(none|null|no (objects?|box|boxes))", said):
        return []
    try:
        value = json.loads(text, parse_int=float)       # int() raises on thousands of digits, float() gives infinity
    except (ValueError, RecursionError):
        return None
    several = isinstance(value, list) and not any(isinstance(x, float) for x in value)
    items = value if several else [value]
    boxes = [item.get("bbox_2d") if isinstance(item, dict) else item for item in items]
    return [tuple(box) for box in boxes] if len(boxes) <= MAX_BOXES and all(map(is_box, boxes)) else None


def is_box(value):
    """True for a list of four finite floats with x1 < x2 and y1 < y2."""
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(x, float) for x in value):
        return False
    return all(abs(x) <= MAX_PIXEL for x in value) and value[0] < value[2] and value[1] < value[3]


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2), in [0, 1]: (0, 0, 2, 1) and (1, 0, 3, 1) -> 1/3."""
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return min(1.0, both / union) if union > 0 else 0.0


def matched_iou(predicted, true):
    """Largest sum of IoUs over the one-to-one matchings of two lists of boxes; greedy matching may miss it."""
    few, many = sorted((predicted, true), key=len)
    overlap = np.array([[iou(a, b) for b in many] for a in few])
    return float(overlap[range(len(few)), assignment(-overlap)].sum()) if few else 0.0


def assignment(cost):
    """A column for each row, all different, of the least sum of costs: cost (n, m), n <= m. (Hungarian method.)

    Rows enter one by one; each finds the cheapest path of exchanges to a free column, by potentials u of rows and v of
    columns that keep every reduced cost at 0 or above. (Jonker and Volgenant 1987; O(n^2 m).)
    """
    n, m = cost.shape
    u, v, row_of = np.zeros(n), np.zeros(m), np.full(m, -1)
    for start in range(n):
        least, before, done = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, column = start, -1
        while row >= 0:                                 # until the cheapest column is free
            reduced = np.where(done, np.inf, cost[row] - u[row] - v)
            before[reduced < least] = column
            least = np.minimum(least, reduced)
            column = int(np.argmin(np.where(done, np.inf, least)))
            step = least[column]
            u[start] += step
            u[row_of[done]] += step
            v[done] -= step
            least[~done] -= step
            done[column], row = True, row_of[column]
        while column >= 0:                              # along the path back, everybody moves on
            previous = before[column]
            row_of[column] = start if previous < 0 else row_of[previous]
            column = previous
    return np.array([int(np.flatnonzero(row_of == row)[0]) for row in range(n)])


def truth_of(example):
    """The true answer: the text in the only <answer>..</answer> of example.solution, or all of one without tags."""
    answer = extract_answer(example.solution)
    return example.solution.strip() if answer is None else answer


BOX = re.compile(r'("bbox_2d"\s*:\s*)?\[\s*{n}\s*,\s*{n}\s*,\s*{n}\s*,\s*{n}\s*\]'.format(    # (mark, four numbers)
    n=r"(-?\d{1,6}(?:\.\d+)?(?:[eE][+-]?\d{1,2})?)"))
