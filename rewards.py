"""Rewards of Curr-ReFT (arXiv 2503.07065): model text in, a finite float out.

    reward = accuracy_reward, in [0, 1], + format_reward, 0 or 1

A completion should read `<think>reasoning</think><answer>answer</answer>`. What its answer is worth is said by the
record of its form or task in tasks.py (`detection_accuracy`, ..), how it is read in answers.py, and here what all have
in common: accuracy, format, and the score by which rejection sampling keeps answers.

`example` is anything with .form, .task and .solution (see data.Example). No text raises, is slow or is evaluated.
"""
import math
import operator
import re

from answers import extract_answer, parse_verdict
from distributed import RunError, one_line
from tasks import kind, truth_of
from tools.numerals import parse_number, same_number

MAX_THINKING = 20_000                   # characters, at the end of the reasoning, that quality_parts looks at
QUALITY = {"accuracy": 50, "consistency": 20, "format": 15, "fluency": 15}      # points, 100 in all
KEEP_ABOVE = 85                         # paper: what scores more is kept; so no criterion may be missed altogether
MAX_REASONS = 1500                      # tokens; longer reasoning is padding
TOKENS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[0-9]+(?:[.,/:][0-9]+)*%?|"
                    r"[^\W\d_]+(?:['’][^\W\d_]+)?|=")
NEGATIONS = {"not", "never", "no", "isn't", "cannot", "can't", "aren't", "wrong", "不", "非", "没"}
CONCLUDES = {"=", "is", "so", "are", "makes", "make", "equals", "therefore", "thus", "hence", "answer", "total", "是",
             "为", "得"}
FILLERS = CONCLUDES | NEGATIONS | set(
    "a an the i we you it they this that there be was of to in on at by for with and or but as just then ok okay well "
    "yes think guess idea maybe perhaps probably certainly sure surely must know say said right correct true".split())


def accuracy_reward(completion, example, *, partial_credit=0.2, soft_iou=False):
    """Accuracy in [0, 1] by the record of the example's kind (KeyError without one). No answer -> 0."""
    answer = extract_answer(completion)
    settings = {"partial_credit": partial_credit, "soft_iou": soft_iou}
    return kind(example).accuracy(answer, truth_of(example), **settings) if answer else 0.0


def format_reward(completion, example):
    """1.0 for one <think>..</think> with a letter or digit, then one non-empty <answer>..</answer>, and nothing else.

    Of some kinds (open detection) the answer must also be one that can be read.
    """
    text = completion.strip()
    thinking, _, rest = text.partition("</think>")
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    ordered = text.startswith("<think>") and rest.lstrip().startswith("<answer>") and text.endswith("</answer>")
    answer = extract_answer(text)
    thought = any(c.isalnum() for c in thinking.removeprefix("<think>"))  # one full stop is no thinking
    if not (once and ordered and thought and answer):
        return 0.0
    return float(kind(example).readable(answer))


def paid(reward, completion, example, **settings):
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


# ---- The quality score ----

def quality_score(completion, example):
    """0..100, by rules where the paper asks a model: parts by weight; at most KEEP_ABOVE for a wrong answer.

    Above KEEP_ABOVE is a right answer in format whose reasoning has some substance and does not speak against it. Of
    several the one with more to say, said once, scores higher. Rules cannot tell whether a reason is true.
    """
    parts = quality_parts(completion, example)
    score = float(sum(QUALITY[name] * part for name, part in parts.items()))
    right = parts["accuracy"] == 1.0
    return score if right else min(score, float(KEEP_ABOVE))


def quality_parts(completion, example):
    """The four criteria, each in [0, 1]: {"accuracy": .., "consistency": .., "format": .., "fluency": ..}."""
    thinking = completion.partition("<think>")[2].partition("</think>")[0]
    said, answer = tokens(thinking[-MAX_THINKING:]), extract_answer(completion) or ""
    return {"accuracy": accuracy_reward(completion, example, partial_credit=0.0),
            "consistency": consistency(said, answer, tokens(getattr(example, "problem", "")[:MAX_THINKING])),
            "format": format_reward(completion, example), "fluency": fluency(said)}


def tokens(text):
    """Lower-case words, numbers and "="; of scripts without spaces each character: "So 3+4 = 7." -> so 3 4 = 7."""
    return TOKENS.findall(text.lower())


def consistency(said, answer, asked=()):
    """1 if the reasoning ends in the answer, 0 if it denies it or ends in another one. Lists of tokens.

    Else it does not name the answer: 0.6 if it speaks of the question (`asked`), 0.3 if not. Answer "7": "so 3 + 4 = 7"
    -> 1; "three and four" -> 0.6; "so it is 8", "it is not 7", "6 7 8" -> 0. The question's numbers may stand anywhere.
    """
    if not said or not answer:
        return 0.0
    silent = 0.6 if not asked or set(said) & set(asked) - FILLERS else 0.3
    end, parts = said[-60:], tokens(answer)
    read, same = (parse_verdict, operator.eq) if parse_verdict(answer) is not None else (parse_number, same_number)
    value = read(answer)
    if value is None or not parts:
        places = [i for i, word in enumerate(said) if word in parts[-1:]]
        return silent if not set(parts) <= set(said) else 0.0 if places and denied(said, places[-1]) else 1.0
    found = [(i, other) for i in range(len(end)) for text in (" ".join(end[i:i + 2]), end[i])
             if (other := read(text)) is not None and not (text != end[i] and read(end[i]) is None)]
    agree = [i for i, other in found if same(value, other)]
    inside = {i + n for i in agree for n in range(len(parts))}
    against = [i for i, other in found if not same(value, other) and end[i] not in asked and i not in inside]
    concluded = [i for i in against if CONCLUDES & set(end[max(0, i - 2):i])]
    if not agree:
        return 0.0 if against else silent
    return 0.0 if against and against[-1] > agree[-1] or denied(end, agree[-1]) or len(concluded) > len(agree) else 1.0


def denied(said, place):
    """Whether one of the three tokens before a place is a negation: "certainly not 12"."""
    return bool(NEGATIONS & set(said[max(0, place - 3):place]))


def fluency(said):
    """How much is said, and once: content words (5 are enough) times the share of distinct word triples.

    0 where there is next to no content ("so 12"), where a quarter of the triples comes again (a text said twice), where
    a long text repeats no word or hardly another (random words), and where it goes on and on.
    """
    content, triples = set(said) - FILLERS, list(zip(said, said[1:], said[2:]))
    distinct = len(set(triples)) / len(triples) if triples else 1.0
    variety = len(set(said)) / max(1, len(said))
    if len(content) < 3 or distinct < 0.75 or len(said) > MAX_REASONS or len(said) > 60 and not 0.15 < variety < 0.9:
        return 0.0
    return min(1.0, len(content) / 5) * distinct
