"""Whether a text is a derivation, as far as its form shows: for the quality score of phase 2.

`said` is a list of sentences, each a list of tokens; `answer` and `asked` are lists of tokens.
"""

import re
from itertools import chain

LAYOUT = re.compile(
    r"(?im)\*\*|^ *[-*•#]+ |^ *[0-9]{1,2}[.)] (?=\S)|\bstep [0-9]+|[²³]|(?<=[0-9]),(?=[0-9]{3})")
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\([a-h]\)|[^\W\d_]+|[+*/×÷<>√∠]|-(?= ?[0-9])|"
                   r"\\(?:times|cdot|div)|(?<![0-9^.A-Za-z])(?<!\^\{)[0-9]+(?:\.[0-9]+)?")
FILLERS = {*(
    "a an i we us me my it its is are was am be so of to in on at by as or if t s no ok the that this these "
    "there here now first you they them and but then well okay yes not never let think thought thinking guess "
    "idea maybe perhaps must should would will can could need have has had does did know see look looking find "
    "found get give given gives show shown say says said ask asks asked want very easy sure clear clearly "
    "right correct true answer final result solution solve problem question image picture figure chart "
    "information carefully analyze analysis consider conclude according all which what how many much therefore "
    "thus hence since because equal equals make makes after about frac text boxed option choose number value "
    "for based believe certainly confident obvious with from our comes means got yields").split(),
    *("的是了在这那个所以因为此答案我们来想一下题目问让仔细考虑思得到出应该选就么图中看可知道不非经过求"
      "很简单易计算明显综上述即故由根据条件正确解")}
COUNTS = {*("two three four five six seven eight nine ten eleven twelve dozen twice half double times plus "
            "minus divided").split(), *"二三四五六七八九十两乘加减除"}


def sentences(text):
    """Tokens by sentence, line or displayed formula, those with any."""
    return list(filter(None, map(tokens, re.split(r"[.!?;](?:\s|$)|[。！？；\n]|\\\]", text))))


def tokens(text):
    """Words, numbers and signs in lower case; Chinese by characters: "So 3+4 = 7" -> so 3 + 4 7."""
    text = re.sub(r"(?<![A-Za-z])[A-H](?![A-Za-z]| [a-z])", r"(\g<0>)", LAYOUT.sub("", text))     # options
    return [w.rstrip("0").rstrip(".") if "." in w else w for w in TOKEN.findall(text.lower())]


def value_type(token):
    """What a token may be as an answer: a number, yes or no, an option's letter; "" for none."""
    return token[0] if token[0] == "(" else "0" if token[0].isdigit() else "yes" * (token in ("yes", "no"))


def substance(said, answer, asked):
    """How much is said, and once, below 1; 0 for nothing of its own, or nothing of the question.

    Of its own: another number or a sign, or, where the answer is no number, a word.
    """
    words, types = set(chain.from_iterable(said)), set(map(value_type, answer))
    runs = [tuple(s[i:i + 4]) for s in said for i in range(max(1, len(s) - 3))]
    once, wanted = len({*runs}) / max(1, len(runs)), {word for word in answer if value_type(word)}
    content = set().union(*({*s} - {*answer} if wanted <= {*s} else s for s in said)) - FILLERS
    own, alike = content - {*asked}, {w[:4] for w in content} & {w[:4] for w in asked}  # dog, dogs
    counts = own & COUNTS or any(not word.isalpha() and word[0] != "(" for word in own)
    enough = counts or "0" not in types and own and (alike or not FILLERS & words)      # "red, east"
    fits = alike or "yes" not in types and not any(map(value_type, asked))
    return once * len(content) / (len(content) + 5) if enough and fits and once > 0.6 else 0.0


def leads_to(said, answer, asked):
    """Whether the last sentence with a value of the answer's type has the answer, no new one, and no denial.

    A number, or words, are also in a sentence that says more: "So it is 12" is no step.
    """
    wanted = {word for word in answer if value_type(word)}
    steps = [{*sentence} for sentence in said if {*sentence} - FILLERS - {*answer}]
    if not wanted:
        return any(step & {*answer} for step in steps)
    types = set(map(value_type, wanted))
    *before, last = [sentence for sentence in said if types & set(map(value_type, sentence))] or [answer]
    end = max((i for i, word in enumerate(last) if word in wanted), default=0)
    denied = {"not", "never", "t", "不", "非"} & {*last[max(0, end - 2):end]}
    new = {word for word in last[end + 1:] if value_type(word) in types} - {*asked, *chain(*before), *last[:end]}
    found = "0" not in types or not before or any(wanted <= step for step in steps)
    return wanted <= {*last} and not denied and not new and found
