"""Whether a text is a derivation, as far as its form shows: for the quality score of phase 2.

Texts are lists of sentences, sentences are lists of tokens. Nobody needs to read it for the method.
"""

import re
from itertools import chain

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\([a-h]\)|[^\W\d_]+|[+*/×÷<>√∠]|"
                   r"\\(?:times|cdot|div)|(?<![0-9^.A-Za-z])(?<!\^\{)[0-9]+(?:\.[0-9]+)?")
FILLERS = {*(
    "a an the i we you it its they this that these there here now first be is are was am t s of to in on at by "
    "for from with and or but as so just then well ok okay yes no not never let me my us think thought thinking "
    "believe guess idea maybe perhaps must should would will can could need have has had having do does did "
    "know see look looked looking find found get give given gives show shown say says said ask asks asked want "
    "wants count counted counting very easy sure clear clearly obvious certainly confident right correct true "
    "answer final result solution solve solving problem question image picture figure chart information step "
    "steps carefully careful analyze analyzed analysis consider conclude arrive based according all which what "
    "how many much therefore thus hence since because equal equals make makes after about frac text boxed circ "
    "option choose number value").split(),
    *"的是了在这那个所以因为此答案我们来想一下题目问让仔细考虑思得到出应该选就么图中看可知道不非经过求很简单易计算明显"}


def tokens(text):
    """Lower-case words, numbers and signs; Chinese by characters: "So 3+4 = 7. (B)" -> so 3 + 4 7 (b)."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)
    text = re.sub(r"\b[A-H]\b(?! [a-z])", r"(\g<0>)", text).lower()
    found = TOKEN.findall(text)
    return [word.rstrip("0").rstrip(".") if "." in word else word for word in found]


def sentences(text):
    """Tokens by sentence or line, those with any."""
    return list(filter(None, map(tokens, re.split(r"[.!?;](?:\s|$)|[。！？；\n]", text))))


def kind(token):
    """As what a token may be an answer: a number, a verdict, an option's letter; "" if as none of them."""
    return "number" if token[0].isdigit() else "verdict" if token in ("yes", "no") else "letter" * (token[0] == "(")


def substance(said, answer, asked):
    """How much is said, and once, below 1; 0 for nothing beyond question and answer, or nothing about them."""
    words, answer = list(chain.from_iterable(said)), set(answer)
    runs = list(zip(words, words[1:], words[2:], words[3:]))
    once = len(set(runs)) / len(runs) if runs else 1.0
    content = set(words) - FILLERS - answer
    own, values = content - set(asked), set(map(kind, answer)) - {""}
    counts = any(not word.isalpha() and word[0] != "(" for word in own)         # a number, a sign
    stem = asked[:asked.index("(a)")] if {"(a)", "(b)"} <= set(asked) else asked    # without options
    numbers = {word for word in stem if word[0].isdigit()}
    alike = {word[:4] for word in content} & {word[:4] for word in asked}           # dog, dogs
    fits = counts or alike or len(own) > 3 or not values and answer <= set(words)
    if numbers:
        fits = 2 * len(numbers & set(words)) >= len(numbers)
    enough = counts or len(own) > (2 if "number" in values else 0)
    return once * len(content) / (len(content) + 5) if fits and enough and once >= 0.6 else 0.0


def leads_to(said, answer, asked):
    """Whether the last sentence with a value of the answer's kind has the answer, not denied, and no new one after it.

    A number must also be in a sentence that says more: "So the answer is 12" alone is no step.
    """
    wanted = {word for word in answer if kind(word)}
    kinds = set(map(kind, wanted))
    valued = [sentence for sentence in said if kinds & set(map(kind, sentence))]
    if not valued:
        return True
    last, known = valued[-1], set(chain(asked, *valued[:-1]))
    end = max((i for i, word in enumerate(last) if word in wanted), default=0)
    denied = {"not", "never", "t", "不", "非"} & set(last[max(0, end - 2):end])
    new = {word for word in last[end + 1:] if kind(word) in kinds} - known - set(last[:end])
    steps = [sentence for sentence in valued if wanted <= set(sentence) and set(sentence) - FILLERS - wanted]
    return wanted <= set(last) and not denied and not new and bool(
        steps or len(valued) == 1 or "number" not in kinds)
