"""Text -> value: what an answer says. One set of readers, for the truths of the data and the answers of the model alike.

Each reader returns None for what is none, and an answer counts as a whole, never by a substring: hedging ("yes or no"),
naming everything and gluing numbers together read as nothing. Text is hostile: whatever the string, nothing here
raises, is slow or evaluates it.
"""
import json
import math
import re
from fractions import Fraction
from typing import NamedTuple

MAX_ANSWER, MAX_NUMBER = 4000, 120      # characters; a longer answer, a longer number, is none
MAX_BOXES, MAX_PIXEL = 64, 1e6          # more boxes or a larger coordinate (infinity, too) are no answer
MATCHINGS = 128                         # kept by matched_iou: exact while one side has 7 boxes or fewer (2**7 sets)
END = ".,;:!? \t\r\n"
EDGES = END + "()[]{}<>\"'`*“”‘’"


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


def words(text):
    """Lower-case words without the punctuation around them: "The dog, -5." -> ["the", "dog", "-5"]."""
    return [word for piece in text.lower().split() if (word := piece.strip(EDGES))]


def parse_verdict(text):
    """True for yes/true/correct, False for no/false/incorrect, else None: " Yes. " -> True, "yes, but" -> None."""
    word = text.lower().strip().rstrip(END)
    return {"yes": True, "true": True, "correct": True, "no": False, "false": False, "incorrect": False}.get(word)


def parse_letters(text):
    """Set of option letters, or None unless the text is single letters throughout: "(a) and C." -> {"A", "C"}."""
    pieces = [piece for piece in re.split(r"[\s,;:/&.()\[\]]+", text) if piece and piece.lower() != "and"]
    single = all(len(piece) == 1 and piece.isascii() and piece.isalpha() for piece in pieces)
    return {piece.upper() for piece in pieces} if pieces and single else None


def parse_labels(text):
    """Labels between commas as they are written, each once: '["Traffic  light", "dog"].' -> ["Traffic light", "dog"]."""
    labels = (" ".join(part.strip(EDGES).split()) for part in text.split(","))
    return list({label.lower(): label for label in labels if label}.values())


def offered_letters(problem):
    """Letters of the options that a problem lists: A, B, C and on, as far as each stands alone in it."""
    alone, letters = set(re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", problem)), set()
    while (letter := chr(ord("A") + len(letters))) in alone:
        letters.add(letter)
    return letters


def parse_boxes(text):
    """List of boxes (x1, y1, x2, y2) in pixels; [] for "no objects"; None for anything else.

    JSON, in a Markdown fence or not: {"bbox_2d": [1, 2, 3, 4]}, a list of those, [1, 2, 3, 4], a list of such.
    """
    text = text.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json")
    if re.fullmatch(r"(there (is|are) )?(none|no (objects?|box|boxes))", " ".join(text.lower().rstrip(END).split())):
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
    """Largest sum of IoUs over the one-to-one matchings of two lists of boxes.

    Greedy matching may give one box the only partner of another. So walk over the longer list and keep, for each set of
    boxes taken from the shorter one (a bit mask), the best sum so far.
    """
    few, many = sorted((predicted, true), key=len)
    best = {0: 0.0}
    for box in many:
        overlaps = [(1 << i, overlap) for i, other in enumerate(few) if (overlap := iou(box, other)) > 0]
        grown = dict(best)
        for taken, total in best.items():
            for bit, overlap in overlaps:
                if not taken & bit:
                    grown[taken | bit] = max(grown.get(taken | bit, 0.0), total + overlap)
        best = dict(sorted(grown.items(), key=lambda kept: kept[1])[-MATCHINGS:])
    return max(best.values())


# ---- Numbers, matched by a pattern and never evaluated: 1,234.5; 50%; x = 3\frac{1}{2}; \frac{3\sqrt{3}}{2} cm^2 ----

UNITS = {None: "", "unit": "", "units": ""} | {name: row.split()[0] for row in (
    "mm millimeter millimeters", "cm centimeter centimeters", "m meter meters", "km kilometer kilometers", "m/s",
    "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "g gram grams", "kg kilogram kilograms", "ml",
    "lb pound pounds", "s sec second seconds", "min minute minutes", "h hr hour hours", "dollar dollars", "% percent",
    "km/h", "l liter liters", "° deg degree degrees", "rad radian radians") for name in row.split()}
DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"    # not \d: that takes any script's digits
FACTOR = re.compile(rf"(/?)(√?)({DIGITS}|π)")
NUMBER = re.compile(r"(?:m?(?:\\angle|∠)? ?\\?[a-z]{1,5}(?:_[0-9])?=)?"                                    # x=
                    r"(?P<sign>[-+]?) ?(?:(?P<whole>[0-9]+) (?=[0-9]+/[0-9]))?"                            # -1 (1/2)
                    rf"(?P<factors>(?:{DIGITS}|π|√{DIGITS})(?:/?√{DIGITS}|/?π|/{DIGITS})*)"                # 3√3/2π
                    r" ?(?:(?P<unit>[a-z°%/]+)(?P<power>\^[23])?)?")                                       # cm^2
PLAIN = (               # lower-case LaTeX and typography -> plain text, in this order
    (r"(?<=[0-9])(?:\\,|\{,\})(?=[0-9]{3})", ","), (r"\\?\$|\\[,;:! ]|\\(?:left|right)\b", " "), ("−", "-"),
    (r"\\(?:text|mathrm|mbox) ?\{([^{}]*)\}", r" \1 "), (r"\^?\{?\\circ\}?|\\degree", "°"), (r"\\%", "%"),
    (r"\^\{([23])\}", r"^\1"), ("²", "^2"), ("³", "^3"), (r",(?![0-9]{3}(?![0-9]))", ", "), (r"\s+", " "),
    (r" \^", "^"), (r"\b(?:square|sq) ([a-z]+)", r"\1^2"), (r"\bcubic ([a-z]+)", r"\1^3"), (r" ?([/=()]) ?", r"\1"),
    (r"\\?pi\b", "π"), (r"(?:\\?sqrt|√) ?(?:\{ ?([0-9.,]+) ?\}|\(([0-9.,]+)\)|([0-9.,]+))", r"√\1\2\3"),
    (r" ?(?:\\cdot|\\times|\*)? ?([√π])", r"\1"),
    (r" ?\\[dt]?frac ?\{(-?[0-9.,√π]+)\} ?\{([0-9.,√π]+)\} ?",
     lambda match: f" {match[1]}/" + re.sub(r"(?<=.)([√π])", r"/\1", match[2])))    # \frac{1}{2√3} -> 1/2/√3


class Number(NamedTuple):
    """A number as it was written: 12.50% -> Number(Fraction(1, 8), 4, "%")."""
    value: Fraction | float     # exact, a Fraction, unless a root or pi is in it
    decimals: int | None        # after the point; 0 for an integer; None for a symbolic one (fraction, root, pi)
    unit: str                   # "" for none


def same_number(answer, truth):
    """Equal values without different units; "50%" is 0.5, and a bare 50 answers it, too.

    A decimal answer may also round the truth, if it has as many decimals as the truth, two if the truth is symbolic.
    Truth 1/3: "0.33", "0.333" -> True; "0.3", "0.34" -> False. Truth "3.14": "3.14" -> True; "3.1", "3.142" -> False
    """
    if answer.unit and truth.unit and answer.unit != truth.unit:
        return False
    if truth.unit == "%" and not answer.unit and answer.value == 100 * truth.value:
        return True
    error = abs(answer.value - truth.value)
    if error <= (1e-12 * abs(truth.value) if isinstance(error, float) else 0):      # roots and pi are floats
        return True
    enough = answer.decimals is not None and answer.decimals >= (2 if truth.decimals is None else truth.decimals)
    return enough and error <= Fraction(1, 2 * 10 ** answer.decimals)


def normalize(text):
    r"""Lower case without LaTeX dressing and end punctuation: r"$\boxed{X = 5 \text{ cm}^{2}}$." -> "x=5 cm^2"."""
    text = text.lower()
    for pattern, plain in PLAIN:
        text = re.sub(pattern, plain, text)
    boxed = re.fullmatch(r"\\boxed ?\{(.*)\}", text.strip().rstrip(END))
    return (boxed[1] if boxed else text).strip().rstrip(END)


def parse_number(text):
    """The Number that the whole text is (see the heading above), or None: "5 or 6", "3 + 4", "12 3" -> None."""
    match = NUMBER.fullmatch(normalize(text)) if len(text) <= MAX_NUMBER else None
    if not match or match["unit"] not in UNITS:
        return None
    value, unit, digits = Fraction(1), UNITS[match["unit"]], match["factors"].replace(",", "")
    for slash, root, name in FACTOR.findall(digits):
        factor = math.pi if name == "π" else Fraction(name)
        factor = math.sqrt(factor) if root else factor
        if slash and not factor:
            return None
        value = value / factor if slash else value * factor
    decimals = len(digits.partition(".")[2]) if re.fullmatch(DIGITS, digits) else None
    value = (value + int(match["whole"] or 0)) * (-1 if match["sign"] == "-" else 1)
    if unit == "%":
        value, decimals = value / 100, None if decimals is None else decimals + 2
    return Number(value, decimals, unit and unit + (match["power"] or ""))
