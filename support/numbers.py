r"""Mathematical answers as people write them: numbers, units, roots, tuples. Nobody needs to read it for the method.

`same_math(answer, truth)` is what pays. A number is read in three steps: SPELLING turns LaTeX and typography into plain
text, TOKEN cuts it, `Grammar` computes sums, products, fractions, roots and powers of bounded size; a unit may follow.
Nothing is evaluated, nothing is looked for inside prose, and what is left to calculate (7 + 5) is no answer.

    1,234.5    50%    x = 3\frac{1}{2}    \frac{3\sqrt{3}}{2} \text{ cm}^2    2√{2}-2    2.5 \times 10^{3}    (√{3}+1)小时
"""
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from support.answers import END, MAX_ANSWER, parse_letters, undress

MAX_NUMBER = 120                        # characters; a longer number is none
MAX_TOKENS, MAX_DEPTH, MAX_POWER = 60, 8, 60    # of a number
MAX_VALUE = 1e300                       # a larger one is none: floats and fractions must not overflow on each other
MAX_PARTS = 12                          # of a tuple, set or list; more are compared as text

SPELLING = [(re.compile(pattern), plain) for pattern, plain in (    # LaTeX and typography -> plain text, in this order
    (r"\\\\(?=[A-Za-z])", r"\\"), (r"(?<=[0-9])(?:\\[,!]|\{,\})+(?=[0-9]{3})", ","), (r",\\! ?(?=[0-9]{3})", ","),
    (r"^(?:\\?\$ ?([0-9.,]+)|([0-9.,]+) ?\\?\$)$", r"\1\2 dollars"),          # one "$" is money, two are math
    (r"\\(?:left|right|displaystyle|q?quad)(?![A-Za-z])|\\[,;:! ]|\\?\$|(?<=[0-9A-Za-z}])~(?=[0-9A-Za-z\\])", " "),
    (r"\\([{}%#&])", r"\1"), (r"(?<![\w/.,])([0-9]+(?:\.[0-9]+)?)[eE]\+?(-?[0-9]{1,2})(?![\w.])", r"\1*10^{\2}"),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf|textnormal|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\?sqrt(?![A-Za-z])", "√"), (r"(?<![A-Za-z])(?:\\?pi|(?<!\\)Pi)(?![A-Za-z])", "π"),
    (r"\\(?:cdot|times)(?![A-Za-z])|[·×⋅∙]", "*"), (r"(?:\* ?)?(?:\^ ?\{? ?\\circ ?\}?|\\degree|[∘º˚°])", "°"),
    ("[−–—]", "-"), ("²", "^2"), ("³", "^3"), ("，", ","), ("：", ":"), ("（", "("), ("）", ")"), ("½", r"\\frac12"),
    ("¼", r"\\frac14"), ("¾", r"\\frac34"), ("⅓", r"\\frac13"), ("⅔", r"\\frac23"), (r"\s+", " "))]
UNITS = {name: row.split()[0] for row in (
    "mm millimeter millimeters 毫米", "cm centimeter centimeters 厘米", "dm decimeter decimeters 分米", "m meter meters "
    "metre metres 米", "km kilometer kilometers 千米 公里", "in inch inches", "ft foot feet", "yd yard yards",
    "mi mile miles", "nmi 海里", "g gram grams 克", "kg kilogram kilograms 千克 公斤", "t ton tons 吨", "ml", "l L liter "
    "liters 升", "lb pound pounds", "s sec second seconds 秒", "min minute minutes 分 分钟", "h hr hour hours 时 小时",
    "day days 天", "$ dollar dollars", "yuan 元", "€ euro euros", "% percent percentage pct", "° deg degree degrees 度",
    "rad radian radians", "m/s", "km/h", "unit units 个") for name in row.split()}
LENGTHS, MONEY = {"mm", "cm", "dm", "m", "km", "in", "ft", "yd", "mi"}, {"$", "€", "yuan"}
UNIT = re.compile(r"(square |sq |cubic |平方|立方)?([A-Za-z]+(?:/[A-Za-z]+)?|[\u4e00-\u9fff]+|[°%€$])"
                  r"(?: ?\^? ?\{? ?([23]) ?\}?\^?)?")
LITERAL = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")   # not \d: any script's
TOKEN = re.compile(rf" ?({LITERAL.pattern}|\\frac|[-+*/^(){{}}√π])")
SCALE = re.compile(r"(?:hundred|thousand|[mb]illion|trillion|dozen|half|halves|third|quarter|"
                   r"(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)th)s?|squared|cubed|"
                   r"factorial|times|negative|[十百千万亿半倍].*")       # changes the number before it: no unit
NOT = r"(?! ?(?:no|not|never) ?=)"      # "not = 3" names nothing
NAMED = re.compile(NOT + r" ?m?(?:\\?angle|∠)? ?\\?[A-Za-zα-ω]{1,5}(?:_\{?[0-9A-Za-z]\}?)? ?= ?")  # x =, m∠ABC =


OPTIONS = re.compile(r"(?:[A-J]|\([A-J]\))(?:(?:,? and |[, ] ?)(?:[A-J]|\([A-J]\)))+")


class Number(NamedTuple):
    """A number as it was written: 12.50% -> Number(Fraction(1, 8), 4, "%")."""
    value: Fraction | float     # exact, a Fraction, unless a root or pi is in it
    decimals: int | None        # after the point; 0 for an integer; None for a symbolic one (fraction, root, pi, power)
    unit: str                   # "" for none; "cm^2"


@lru_cache(64)
def plain(text):
    r"""LaTeX and typography as plain text, undressed: r"$\boxed{X = 5 \text{ cm}^{2}}$." -> "X = 5 cm ^{2}"."""
    text = undress(text)
    for pattern, spelled in SPELLING:
        text = pattern.sub(spelled, text)
    return undress(text)


@lru_cache(1024)
def parse_number(text):
    """The Number that the whole text is, or None: "5 or 6", "3 + 4", "12 3" -> None.

    A sum or a product counts if a root, pi or a power of ten is in it: 2√2 - 2, 2.5 * 10^3. What is left to calculate
    is no answer, and what may be read in two ways, 1/2√3, is none either.
    """
    if len(text) > 2 * MAX_NUMBER:
        return None
    text = plain(text)
    text = NAMED.sub("", text, 1) if NAMED.match(text) else text
    text = text[1:-1].strip() if text[:1] + text[-1:] == "[]" else text
    if text[:1] == "(" and text[-1:] == ")" and "," in text:
        return None                                     # (1,234) is a pair
    if text[:1] in ("€", "$"):
        text = f"{text[1:]} {text[0]}"
    tokens, end = [], 0
    while (match := TOKEN.match(text, end)) and len(tokens) <= MAX_TOKENS:
        tokens.append(match[1])
        end = match.end()
    unit = read_unit(text[end:].strip())
    if not tokens or unit is None or len(text) > MAX_NUMBER or len(tokens) > MAX_TOKENS:
        return None
    try:
        value, _ = Grammar(tokens).whole()
    except (ValueError, OverflowError, ZeroDivisionError):
        return None
    if not abs(value) < MAX_VALUE:                      # nan, too
        return None
    digits = "".join(tokens).lstrip("+-").replace(",", "")
    decimals = len(digits.partition(".")[2]) if LITERAL.fullmatch(digits) else None
    if unit == "%":
        value, decimals = value / 100, None if decimals is None else decimals + 2
    return Number(value, decimals, unit)


def read_unit(text):
    """ "cm2", "sq cm", "平方厘米" -> "cm^2"; "" and "units" -> ""; a word or sign of no known unit is one of its own."""
    if not text:
        return ""
    match = UNIT.fullmatch(text)
    if not match:
        return None
    square, name, power = match.groups()
    power = power or {"s": "2", "平": "2", "c": "3", "立": "3"}.get((square or "")[:1], "")
    known = UNITS.get(name) or (UNITS.get(name.lower()) if len(name) > 1 else None)
    if known is None and (len(name) < 4 and name.isascii() or name.lower() in ("sqrt", "frac")
                          or SCALE.fullmatch(name.lower())):
        return None                                     # x, sin, million: no unit
    unit = name.lower() if known is None else known
    return "" if unit == "unit" and not power else unit + (f"^{power}" if power else "")


class Grammar:
    """Values of sums, products, fractions, roots and powers over a list of tokens; ValueError for anything else.

    Each rule returns (value, kind): "literal" as written; "ratio" of two literals; "mixed"; "power" of ten;
    "symbolic" with a root or pi in it. The kind decides what may stand beside it.
    """

    def __init__(self, tokens):
        self.tokens, self.depth = tokens[::-1], 0       # the next token is the last

    def take(self, *wanted):
        """The next token if it is one of `wanted`, else None."""
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else None

    def whole(self):
        """All tokens as one sum."""
        found = self.sum()
        if self.tokens:
            raise ValueError
        return found

    def sum(self):
        """[sign] product {+ or - product}; several only if one of them is symbolic."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError
        sign = -1 if self.take("-", "+") == "-" else 1
        value, kind = self.product()
        value, kinds = sign * value, [kind]
        while sign := self.take("+", "-"):
            term, kind = self.product()
            value, kinds = value + (term if sign == "+" else -term), [*kinds, kind]
        if len(kinds) > 1 and "symbolic" not in kinds:
            raise ValueError
        self.depth -= 1
        return value, kinds[0] if len(kinds) == 1 else "symbolic"

    def product(self):
        """factor {* factor, / factor, or a root, pi or bracket right behind}; no product of two plain numbers."""
        value, kind = self.factor()
        divided = False
        while self.tokens:
            if self.take("*"):
                other, beside = self.factor()
                if "symbolic" not in (kind, beside) and beside != "power":
                    raise ValueError
                value, kind = value * other, "symbolic" if "symbolic" in (kind, beside) else "power"
            elif self.take("/"):
                other, beside = self.factor()
                if beside not in ("literal", "symbolic") or kind not in ("literal", "symbolic"):
                    raise ValueError
                value, divided = value / other, True
                kind = "symbolic" if "symbolic" in (kind, beside) else "ratio"
            elif self.tokens[-1] in ("√", "π", "("):
                other, beside = self.factor()
                if divided or beside != "symbolic":     # 1/2√3 may mean two things; 2(3) is left to calculate
                    raise ValueError
                value, kind = value * other, "symbolic"
            else:
                break
        return value, kind

    def factor(self):
        """A literal, mixed number, power, fraction, root, pi, or a sum in brackets."""
        if self.take("π"):
            return math.pi, "symbolic"
        if self.take("("):
            return self.closed(")")
        if self.take("√"):
            return math.sqrt(self.argument()[0]), "symbolic"
        if self.take("\\frac"):
            return self.fraction()
        value = Fraction(self.literal())
        if self.take("^"):
            return self.power(value)
        if self.take("\\frac"):                                         # 1\frac{3}{4}
            return self.mixed(value, *self.fraction())
        if len(self.tokens) > 2 and self.tokens[-2] == "/" and (self.tokens[-1] + self.tokens[-3]).isdigit():   # 1 3/4
            top, _, bottom = (self.tokens.pop() for _ in range(3))
            return self.mixed(value, Fraction(int(top), int(bottom)), "ratio")
        return value, "literal"

    def mixed(self, whole, part, kind):
        """whole + part, if part is a proper fraction of whole numbers."""
        if kind != "ratio" or whole.denominator > 1 or not 0 < part < 1:
            raise ValueError
        return whole + part, "mixed"

    def literal(self):
        """The next token's digits."""
        if not self.tokens or not LITERAL.fullmatch(self.tokens[-1]):
            raise ValueError
        return self.tokens.pop().replace(",", "")

    def power(self, base):
        """base^n of whole numbers, of bounded size."""
        braced, sign = self.take("{"), -1 if self.take("-") else 1
        exponent = sign * int(self.literal())
        if braced and not self.take("}") or abs(exponent) > MAX_POWER or base.denominator > 1 or base > 1000:
            raise ValueError
        return base ** exponent, "power" if base == 10 else "ratio"

    def fraction(self):
        """What stands behind \\frac: two arguments."""
        (top, above), (bottom, below) = self.argument(digits=1), self.argument(digits=1)
        return top / bottom, "symbolic" if "symbolic" in (above, below) else "ratio"

    def argument(self, digits=MAX_NUMBER):
        r"""{sum}, (sum), pi, or a literal of so many digits at most: \frac12 is 1/2."""
        if opening := self.take("{", "("):
            return self.closed({"{": "}", "(": ")"}[opening])
        if self.take("π"):
            return math.pi, "symbolic"
        text = self.literal()
        self.tokens += [text[digits:]] if text[digits:] else []
        return Fraction(text[:digits]), "literal"

    def closed(self, bracket):
        """A sum and its closing bracket."""
        found = self.sum()
        if not self.take(bracket):
            raise ValueError
        return found


def same_number(answer, truth):
    """Equal values without different units; "50%" is 0.5, and a bare 50 answers it, too.

    A truth without a unit leaves it open to degrees, money, lengths and areas: 30 is answered by "30°", "30 cm^2", not
    by "30 rad", "30 km^3". A decimal answer may also round the truth, if it has as many decimals as the truth, two if
    the truth is symbolic. Truth 1/3: "0.33", "0.333" -> True; "0.3", "0.34" -> False. Truth "3.14": "3.1" -> False.
    """
    if not same_unit(answer.unit, truth.unit):
        return False
    if truth.unit == "%" and not answer.unit and answer.value == 100 * truth.value:
        return True
    error = abs(answer.value - truth.value)
    if error <= (1e-12 * abs(truth.value) if isinstance(error, float) else 0):      # roots and pi are floats
        return True
    enough = answer.decimals is not None and answer.decimals >= (2 if truth.decimals is None else truth.decimals)
    return enough and error <= Fraction(1, 2 * 10 ** answer.decimals)


def same_unit(answer, truth):
    """Whether a unit may answer a truth's, as same_number says; "unit^2" ("square units") stands for any area."""
    (base, _, power), (other, _, raised) = answer.partition("^"), truth.partition("^")
    if not answer or answer == truth:
        return True
    if not truth:
        return answer in MONEY | {"°", "%"} or base in LENGTHS | {"unit"} and power != "3"
    return "unit" in (base, other) and power == raised


# ---- Mathematical answers: a letter, a number, a tuple or list of such, or text ----

def same_math(answer, truth, depth=2):
    """Whether an answer says what the truth says: letter, number, tuple by elements, else normalized text.

    Of one option letter, A to J, case is no matter; of symbols it is. (a, b) is not (b, a), [a, b) not (a, b].
    """
    if max(len(answer), len(truth)) > MAX_ANSWER:
        return False
    if depth == 2 and re.fullmatch(r"\(?[A-J]\)?", option := undress(truth, END + "!")):
        said = undress(answer, END)
        return re.fullmatch(r"\(?[A-Ja-j]\)?", said) is not None and said.strip("()").upper() == option.strip("()")
    if depth == 2 and OPTIONS.fullmatch(option):        # several letters are a set; (A, B) is a pair
        return OPTIONS.fullmatch(undress(answer, END).upper().replace(" AND ", " and ")) is not None and \
            parse_letters(answer) == parse_letters(truth)
    if number := parse_number(truth):
        said = parse_number(answer)
        return said is not None and same_number(said, number)
    parts, others = elements(truth), elements(answer)
    if depth and parts and others and parts[0] == others[0] and len(parts[1]) == len(others[1]):
        if parts[0] == "{}":
            return same_set(others[1], parts[1])
        return all(same_math(a, b, depth - 1) for a, b in zip(others[1], parts[1]))
    return normalize(answer) == normalize(truth) != ""


def same_set(answers, truths):
    """Elements in any order."""
    left = list(truths)
    for answer in answers:
        match = next((i for i, truth in enumerate(left) if same_math(answer, truth, depth=0)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def elements(text):
    """("()", ["1", "2"]) of "(1, 2)", also of mixed brackets, braces, and "" for a bare list; None for others."""
    text, brackets = plain(text[:MAX_ANSWER]), ""
    parts, depth, start, outer = [], 0, 0, True
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        outer &= depth > 0 or i == len(text) - 1
    if outer and depth == 0 and text[:1] in "([{" and text[-1:] in ")]}" and len(text) > 2:
        brackets, text = text[0] + text[-1], text[1:-1]
    depth = 0
    for i, c in enumerate(text + ","):
        depth += (c in "([{") - (c in ")]}")
        if c in ",;" and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return (brackets, parts) if depth == 0 and 1 < len(parts) <= MAX_PARTS and all(map(str.strip, parts)) else None


def normalize(text):
    r"""Plain text without spaces beside signs; words in lower case, symbols as they are: r"$3x + 2$." -> "3x+2"."""
    text = re.sub(r"(?<=\\frac)\{([0-9])\}|(?<![0-9])\{([0-9])\}(?![0-9{])|\{([A-Za-z])\}", r"\1\2\3",
                  plain(text[:MAX_ANSWER]))
    text = re.sub(r" ?([^0-9A-Za-z\s]) ?", r"\1", text)
    return text.lower() if re.fullmatch(r"[A-Za-z' -]*[A-Za-z]{3}[A-Za-z' -]*", text) else text
