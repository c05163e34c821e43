r"""Mathematical answers as people write them: numbers, units, roots, tuples.

`same_math(answer, truth)` is what pays. `plain` turns LaTeX and typography into plain text; a
number is a sum of products of bounded size, parsed by Python's `ast` and computed here, and a unit.
Nothing is evaluated or looked for inside prose, and what is left to calculate is no answer.

    1,234.5  50%  x = 3\frac{1}{2}  \frac{3\sqrt{3}}{2} \text{ cm}^2  2.5 \times 10^3  5 + 7 = 12
"""
import ast
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from support.answers import END, parse_letters, undress

MAX_TRUTH, MAX_NUMBER = 600, 120         # characters: longer texts are equal as they are
MAX_PARTS, MAX_POWER, MAX_VALUE = 12, 60, 1e300     # floats and fractions overflow on each other
ROUGHLY = Fraction(1, 40)               # of the truth: rounding changes it by no more

CHARACTERS = str.maketrans({
    **dict.fromkeys("−–—", "-"), **dict.fromkeys("⁄∕", "/"), **dict.fromkeys("·×⋅∙", "*"),
    **dict.fromkeys("∘º˚", "°"), "∶": ":", "℃": "°C", "µ": "μ",
    **{c: f"^{power}" for power, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **dict(zip("½⅓¼¾⅔⅕⅛", (" 1/2", " 1/3", " 1/4", " 3/4", " 2/3", " 1/5", " 1/8")))})
SIGNS = {name[:-1]: name[-1] for name in (              # LaTeX's name, then the sign
    "le≤ leq≤ leqslant≤ ge≥ geq≥ geqslant≥ ne≠ neq≠ approx≈ in∈ infty∞ emptyset∅ varnothing∅ cdot* "
    "times* div/ sqrt√ angle∠ triangle△ cup∪ cap∩ degree° vert| lvert| rvert| pm± piπ alphaα betaβ "
    "gammaγ deltaδ thetaθ lambdaλ muμ rhoρ sigmaσ phiφ omegaω OmegaΩ parallel∥ perp⊥").split()}


def mixed(match):
    """A whole number and a proper fraction as one: "1 3/4" -> "7/4"; "1 4/3" stays."""
    whole, top, bottom = (int(number) for number in match.groups() if number)
    return f"{whole * bottom + top}/{bottom}" if 0 < top < bottom else match[0]


SPELLING = [(re.compile(pattern), spelled) for pattern, spelled in (    # in this order
    (r"\\\\(?=[A-Za-z]{2})", r"\\"),                                    # escaped twice
    (r"(?<=[0-9])(?:\\[,!]|\{,\})+(?=[0-9]{3})", ","), (r",\\! ?(?=[0-9])", ""),
    (r"^(?:\\?\$ ?([0-9.,]+)|([0-9.,]+) ?\\?\$)$", r"\1\2 dollars"),    # one "$" is money, two math
    (r"\\begin ?\{[bp]?matrix\}", "[["), (r"\\end ?\{[bp]?matrix\}", "]]"), (r"\\{2,4}", "],["),
    (r"\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|\\[,;:! ]|\\?\$|(?<=[\w{}])~", " "),
    (r"(?<!\\)&", ","), (r"\\([{}%#&])", r"\1"),
    (r"(?<![\w/.,])([0-9]+(?:\.[0-9]+)?)[eE]\+?(-?[0-9]{1,2})(?![\w.])", r"\1*10^{\2}"),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf|textnormal|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (rf"\\({'|'.join(SIGNS)})(?![A-Za-z])", lambda match: SIGNS[match[1]]),
    (r"(?<![A-Za-z])sqrt(?![A-Za-z])", "√"), (r"(?<![A-Za-z\\])[pP]i(?![A-Za-z])", "π"),
    ("<=", "≤"), (">=", "≥"), (r"(?:\* ?)?(?:\^ ?\{? ?\\circ ?\}?|°)", "°"),
    (r",? and |和", ", "), (r"(?<=[a-z]) per (?=[a-z])", "/"), (r"\s+", " "), (r" ?([{}]) ?(?![A-Za-z])",
    r"\1"), (r"\\[dtc]?frac ?([0-9])", r"\\frac{\1}"), (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"(?<![\w.,/^{}*)√])([0-9]{1,9})(?: ([0-9]{1,9})/([0-9]{1,9})| ?\\frac\{([0-9]{1,9})\}"
     r"\{([0-9]{1,9})\})(?![0-9.,√π(]| ?/)", mixed))]


@lru_cache(64)
def plain(text):
    r"""Plain text of LaTeX, undressed: r"$\boxed{X = 5 \text{ cm}^{2}}$." -> "X = 5 cm ^{2}"."""
    text = undress(text).translate(CHARACTERS)
    for pattern, spelled in SPELLING:
        text = pattern.sub(spelled, text)
    return undress(text)


# ---- Numbers and units ----

UNITS = {name: row.split()[0] for row in (
    "mm millimeter 毫米", "cm centimeter 厘米", "dm decimeter 分米", "m meter metre 米",
    "km kilometer 千米 公里", "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram 克",
    "nmi nautical_mile 海里", "kg kilogram 千克 公斤", "t ton 吨", "mL ml milliliter 毫升",
    "L l liter litre 升", "lb pound", "s sec second 秒", "min minute 分 分钟", "h hr hour 时 小时",
    "day 天", "$ dollar", "yuan 元", "€ euro", "% percent percentage pct", "° deg degree 度", "°C", "°F",
    "rad radian", "mol mole 摩尔", "m/s 米/秒 meters/second", "unit 个", "J joule 焦", "N newton 牛", "V volt 伏",
    "km/h 公里每小时 公里每小時 千米/时 kilometers/hour km/hour", "W watt 瓦", "Ω ohm 欧", "Pa pascal 帕", "Hz hertz 赫")
    for name in row.split()}
PREFIXED = re.compile(r"[kMmμ](?:J|N|V|W|A|Ω|Pa|Hz|eV|mol|cal)")
UNIT = re.compile(r"(square |sq |cubic |平方|立方)?((?:nautical )?[A-Za-zΩμ]+(?:/[A-Za-z]+)?|° ?[CF]|"
                  r"[\u4e00-\u9fff]+(?:/[\u4e00-\u9fff])?|[°%€$])(?: ?\^? ?[{(]?([23])[)}]?\^?)?")
LITERAL = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
NUMERIC = re.compile(r"[0-9.,√π()*/+^{} -]*")           # not \d: any script's digits
FRACTION = re.compile(r"\\frac ?\{([^{}]*)\} ?(?:\{([^{}]*)\}|([0-9]))")     # \frac12, too
UNCLEAR = re.compile(r"/ ?√?[0-9.,π]+ ?[√π(]")          # 1/2√3 may mean two things
SCALE = re.compile(r"(?:hundred|thousand|[mb]illion|trillion|dozen|half|halves|third|quarter|"
                   r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)th)s?|squared|cubed|sqrt|"
                   r"factorial|times|negative|[十百千万亿半倍].*")       # changes the number: no unit
NAME = re.compile(r" ?(?!(?:no|not|never) ?=)(?:(?:m ?)?[∠△|]? ?[A-Za-zα-ω]{1,5}(?:_\{?\w{1,4}\}?)?"
                  r"\|?|[A-Za-z]\(\w\)|[A-Z]:[A-Z]|\([a-zA-Z](?:, ?[a-zA-Z])+\)) ?= ?")     # f(x) =
READ_AS = re.compile(r"(?=.*[0-9])(?:\\(?:sin|cos|tan|log|binom|frac|bmod)|[-0-9 .+*/^(){}√π°|!])+")


class Number(NamedTuple):
    """A number as it was written: 12.50% -> Number(Fraction(1, 8), 4, "%")."""
    value: Fraction | float     # exact, a Fraction, unless a root or pi is in it
    decimals: int | None        # after the point; 0 for an integer; None for a symbolic one
    unit: str                   # "" for none; "cm^2"


@lru_cache(1024)
def parse_number(text):
    """The Number that the whole text is, or None: "3 + 4 = 7" -> 7; "3 + 4", "5 or 6" -> None."""
    if len(text) > 2 * MAX_NUMBER:
        return None
    name = NAME.match(text := plain(text))
    left, _, text = text[name.end() if name else 0:].rpartition("=")
    if left:                                            # a calculation = what comes out
        found = parse_number(text) if READ_AS.fullmatch(left) else None
        same = found and getattr(parse_number(left), "value", found.value) == found.value
        return found if same else None
    pair = text[:1] in ("(", "[", "{") and "," in text  # (1,234), [90,180]
    if len(text) > MAX_NUMBER or pair or UNCLEAR.search(text):
        return None
    text = text[1:-1].strip() if text[:1] + text[-1:] == "[]" else text
    text = f"{text[1:]} {text[0]}" if text[:1] in ("€", "$") else text
    for _ in range(5):                                  # from the inside out
        text = re.sub(r"([√^]) ?\{([^{}]*)\}", r"\1(\2)", text)
        text = FRACTION.sub(r"((\1)/(\2\3))", text)
    written = NUMERIC.match(text)[0]
    unit, number = read_unit(text[len(written):].strip()), compute(written.strip())
    if unit is None or number is None:
        return None
    digits = written.strip("+- ").replace(",", "")
    decimals = len(digits.partition(".")[2]) if LITERAL.fullmatch(digits) else None
    if unit == "%":
        number, decimals = number / 100, None if decimals is None else decimals + 2
    return Number(number, decimals, unit)


def read_unit(text):
    """ "cm2", "sq cm", "平方厘米" -> "cm^2"; "", "units" -> ""; other words as they are; else None."""
    match = UNIT.fullmatch(text)
    if not match:
        return None if text else ""
    square, name, power = match.groups()
    power = power or {"s": "2", "平": "2", "c": "3", "立": "3"}.get((square or "")[:1], "")
    name = name.replace("° ", "°").replace(" ", "_")
    names = (name, *(n.removesuffix("s") for n in (name, name.lower()) if len(n) > 1))
    unit = next((UNITS[n] for n in names if n in UNITS), name if PREFIXED.fullmatch(name) else "")
    if not unit and (len(name) < 4 and name.isascii() or SCALE.fullmatch(name.lower())):
        return None                                     # x, sin, million: no unit
    unit = unit or name.lower()
    return "" if unit == "unit" and not power else unit + (f"^{power}" if power else "")


def compute(written):
    """The value of sums, products, roots and powers: "2√(3)-1" -> 2.46; "3+4", to do, -> None."""
    numbers = {"π": (math.pi, True)}

    def name(match):
        numbers[f"n{len(numbers)}"] = Fraction(match[0].replace(",", "")), False
        return f"n{len(numbers) - 1}"

    written = re.sub(r"(?<=[0-9π)]) ?(?=[√π(])", "@", written)          # a product without a sign
    for sign, spelled in (("√", "~"), ("^", "**"), ("{", "("), ("}", ")")):
        written = written.replace(sign, spelled)
    try:
        value, _ = walk(ast.parse(LITERAL.sub(name, written), mode="eval").body, numbers)
        return value if abs(value) < MAX_VALUE else None                # nan is not, either
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def walk(node, numbers):
    """(value, whether a root, pi or a power of ten is in it: else it can be no part of a sum)."""
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.UnaryOp):
        value, symbolic = walk(node.operand, numbers)
        if isinstance(node.op, ast.Invert):
            return math.sqrt(value), True
        return -value if isinstance(node.op, ast.USub) else value, symbolic
    if not isinstance(node, ast.BinOp):
        raise ValueError
    (left, roots), (right, more) = walk(node.left, numbers), walk(node.right, numbers)
    sign = type(node.op)
    if sign is ast.Pow:
        whole = not roots and not more and (left * right).denominator == 1
        if not whole or abs(right) > MAX_POWER or isinstance(node.right, ast.BinOp):
            raise ValueError
        return left ** right, left == 10
    again = isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.Div)
    if sign is ast.Div and again or sign is not ast.Div and not roots and not more:
        raise ValueError                                # 24/1/2 and 3*4 are left to do
    value = {ast.Add: left + right, ast.Sub: left - right}.get(sign, left * right)
    return left / right if sign is ast.Div else value, roots or more


def same_number(answer, truth):
    """Equal values without different units; "50%" is 0.5, and a bare 50 answers it, too.

    A truth without a unit leaves it open: 30 is answered by "30°", "30 cm^2", not by "30 rad",
    "30 km^3", "30 m/s". A decimal answer may round the truth a little, if it has as many decimals,
    or two if the truth is symbolic: "0.33" is 1/3, "0.3", "0.34" are not.
    """
    if not same_unit(answer.unit, truth.unit):
        return False
    if truth.unit == "%" and not answer.unit and answer.value == 100 * truth.value:
        return True
    error = abs(answer.value - truth.value)
    if error <= (1e-12 * abs(truth.value) if isinstance(error, float) else 0):  # roots are floats
        return True
    least = 2 if truth.decimals is None else truth.decimals
    return answer.decimals is not None and answer.decimals >= least and \
        error <= min(Fraction(1, 2 * 10 ** answer.decimals), ROUGHLY * abs(truth.value))


def same_unit(answer, truth):
    """Whether a unit may answer a truth's; "unit^2" ("square units") stands for any area."""
    (base, _, power), (other, _, raised) = answer.partition("^"), truth.partition("^")
    if truth:
        return not answer or answer == truth or "unit" in (base, other) and power == raised
    known = not base or base in UNITS or bool(PREFIXED.fullmatch(base))
    return known and base != "rad" and "/" not in base and power != "3"


# ---- Mathematical answers: letters, a number, a tuple or list of such, or text ----

OPTIONS = re.compile(r"{one}(?:(?:,? and |[, ] ?){one})*".format(one=r"(?:[A-J]|\([A-J]\))"))


def same_math(answer, truth, depth=2):
    """Whether an answer says what the truth says: letters, a number, elements, else the same text.

    Of option letters, A to J, case is no matter; of symbols it is. (a, b) is not (b, a) nor [a, b).
    """
    if max(len(answer), len(truth)) > MAX_TRUTH:
        return answer.split() == truth.split() != []
    if depth == 2 and OPTIONS.fullmatch(undress(truth, END + "!")):
        return parse_letters(answer) == parse_letters(truth)
    if depth == 2 and "≈" in plain(truth):              # what it is, or about how much
        sides, said = plain(truth).split("≈"), plain(answer).split("≈")[-1]
        return any(same_math(said, side) for side in sides if parse_number(side))
    if number := parse_number(truth):
        said = parse_number(answer)
        return said is not None and same_number(said, number)
    right, said = elements(truth), elements(answer)
    if depth and right and said and len(right[1]) == len(said[1]):
        brackets, named = {right[0], said[0]}, all(map(name_of, right[1] + said[1]))
        if named:                                       # y = 2, x = 1
            right[1].sort(key=name_of)
            said[1].sort(key=name_of)
        elif brackets in ({"{}"}, {"{}", ""}):
            return same_set(said[1], right[1])
        if named or len(brackets) == 1 or brackets == {"[]", ""} and len(right[1]) > 2:
            return all(len({name_of(a), name_of(b)} - {""}) < 2 and same_math(a, b, depth - 1)
                       for a, b in zip(said[1], right[1]))
    return normalize(answer) == normalize(truth) != ""


def name_of(part):
    """ "AB=" of "AB = 3", "" of "3"."""
    name = NAME.match(part)
    return name[0].replace(" ", "").replace("m∠", "∠") if name else ""


def same_set(answers, truths):
    """Elements in any order."""
    left = list(truths)
    for answer in answers:
        match = next((truth for truth in left if same_math(answer, truth, depth=0)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def cut(text, marks):
    """Pieces from each mark outside brackets on: ("1-x(2-y)", "-") -> ["1", "-x(2-y)"]."""
    depth, places = 0, [0]
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        places += [i] if depth == 0 and c in marks else []
    return [text[start:end] for start, end in zip(places, [*places[1:], len(text)])]


def elements(text):
    """("()", ["1", "2"]) of "(1, 2)", also of mixed brackets, and "" for a bare list; or None."""
    if len(text) > MAX_TRUTH:
        return None
    name, brackets = NAME.match(text := plain(text)), ""
    text = text[name.end():] if name and text[name.end():][:1] in tuple("([{") else text
    if text[:1] in tuple("([{") and text[-1:] in tuple(")]}") and len(cut(text, ")]}")) == 2:
        brackets, text = text[0] + text[-1], text[1:-1]
    parts = [part.lstrip(",;").strip() for part in cut(text, ",;")]
    return (brackets, parts) if 1 < len(parts) <= MAX_PARTS and all(parts) else None


def normalize(text):
    """No spaces beside signs, a sum's terms sorted, words in lower case: "$3x + 2$" -> "+2+3x"."""
    text = plain(text)
    if re.fullmatch(r"[A-Za-z' -]*", text) and re.search("[A-Za-z]{3}", text):
        return text.lower()
    text = FRACTION.sub(r"(\1)/(\2\3)", text)
    text = re.sub(r"\{([0-9])\}(?![0-9{])|\{([A-Za-z])\}|(?<![\w)])\(([0-9]+|[A-Za-z])\)(?![\w(])",
                  r"\1\2\3", text)
    text = re.sub(r" ?([^0-9A-Za-z\s]) ?", r"\1", text)
    text = re.sub(r"(?<![0-9])\*|\*(?![0-9])|\\(?=[A-Za-z])", "", text)     # 2*x is 2x, \gcd is gcd
    sides = text.split("=") if text and not re.search("[<>≤≥≈,:;]", text) else []
    terms = [cut(side if side[:1] in ("+", "-") else f"+{side}", "+-") for side in sides]
    return "=".join("".join(sorted(side)) for side in terms) or text
