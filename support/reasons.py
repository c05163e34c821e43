"""Whether a text is a derivation, as far as its form shows: for the quality score of phase 2.

`said` is a list of sentences, each a list of tokens; `answer` and `asked` are lists of tokens.
"""

import re
from itertools import chain

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\([a-h]\)|[^\W\d_]+|[+*/×÷<>√∠]|"
                   r"\\(?:times|cdot|div)|(?<![0-9^.A-Za-z])(?<!\^\{)[0-9]+(?:\.[0-9]+)?")
FILLERS = {*(
    "a an the i we you it its they this that these there here now first be is are was am t s of "
    "to in on at by for from with and or but as so just then well ok okay yes no not never let "
    "me my us think thought thinking guess idea maybe perhaps must should would will can could "
    "need have has had do does did know see look find found get give given gives show shown say "
    "says said ask asked want count counted counting very easy sure clear clearly right correct "
    "true answer final result solution solve solving problem question image picture figure "
    "chart information step steps carefully careful analyze analysis consider conclude "
    "according all which what how many much therefore thus hence since because equal equals "
    "make makes after about frac text boxed circ option choose number value based believe "
    "looking certainly confident obvious having wants asks").split(),
    *"的是了在这那个所以因为此答案我们来想一下题目问让仔细考虑思得到出应该选就么图中看可知道不非经过求很简单易计算明显"}
NUMBER_WORDS = {*"two three four five six seven eight nine ten".split(), *"二三四五六七八九十两"}


def tokens(text):
    """Words, numbers and signs in lower case; Chinese by characters: "So 3+4 = 7" -> so 3 + 4 7."""
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)
    text = re.sub(r"\b[A-H]\b(?! [a-z])", r"(\g<0>)", text).lower()     # option letters
    return [w.rstrip("0").rstrip(".") if "." in w else w for w in TOKEN.findall(text)]


def sentences(text):
    """Tokens by sentence, line or displayed formula, those with any."""
    return list(filter(None, map(tokens, re.split(r"[.!?;](?:\s|$)|[。！？；\n]|\\\]", text))))


def value_type(token):
    """What a token may be as an answer: a number, yes or no, an option's letter; "" for none."""
    return "0" if token[0].isdigit() else "(" if token[0] == "(" else \
        "yes" if token in ("yes", "no") else ""


def substance(said, answer, asked):
    """How much is said, and once, below 1; 0 for nothing of its own or of the question.

    Of its own: a number, a sign, or two words. Of the question, if it has numbers: one, or a word.
    """
    words = list(chain.from_iterable(said))
    runs = list(zip(words, words[1:], words[2:], words[3:]))
    once = len(set(runs)) / len(runs) if runs else 1.0
    content = set(words) - FILLERS - set(answer)
    own, numbers = content - set(asked), {word for word in asked if value_type(word) == "0"} - set(answer)
    alike = {word[:4] for word in content} & {word[:4] for word in asked}               # dog, dogs
    counts = own & NUMBER_WORDS or any(not word.isalpha() and word[0] != "(" for word in own)
    enough = counts or (len(own) > 1 and alike if any(map(value_type, answer)) else own)
    fits = alike or not numbers
    speech = once >= 0.6 and (len(words) < 60 or len(set(words)) < 0.9 * len(words))    # or noise
    return once * len(content) / (len(content) + 5) if fits and enough and speech else 0.0


def leads_to(said, answer, asked):
    """Whether the last sentence with a value of the answer's value_type has the answer, and no new one.

    It is not denied. A number is also in a sentence that says more: "So it is 12" is no step.
    """
    wanted = {word for word in answer if value_type(word)}
    types = set(map(value_type, wanted))
    valued = [sentence for sentence in said if types & set(map(value_type, sentence))]
    if not valued:
        return True
    last, known = valued[-1], set(chain(asked, *valued[:-1]))
    end = max((i for i, word in enumerate(last) if word in wanted), default=0)
    denied = {"not", "never", "t", "不", "非"} & set(last[max(0, end - 2):end])
    new = {word for word in last[end + 1:] if value_type(word) in types} - known - set(last[:end])
    step = any(wanted <= set(words) and set(words) - FILLERS - wanted for words in valued)
    step = step or len(valued) == 1 or "0" not in types
    return wanted <= set(last) and not denied and not new and step
