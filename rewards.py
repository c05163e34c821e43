"""Rewards of Curr-ReFT (arXiv 2503.07065): model text in, a finite float out.

    reward = accuracy_reward, in [0, 1], + format_reward, 0 or 1

A completion should read `<think>reasoning</think><answer>answer</answer>`. What its answer is worth is said by the
record of its form or task in tasks.py (`detection_accuracy`, ..), how it is read in answers.py, and here what all have
in common: accuracy, format, and the score by which rejection sampling keeps answers.

`example` is anything with .form, .task and .solution (see data.Example). No text raises, is slow or is evaluated.
"""
import operator

from answers import extract_answer, parse_number, parse_verdict, same_number, words
from tasks import kind, truth_of

MAX_THINKING = 20_000                   # characters, at the end of the reasoning, that quality_parts looks at
QUALITY = {"accuracy": 50, "consistency": 20, "format": 15, "fluency": 15}      # points, 100 in all
KEEP_ABOVE = 85                         # paper: what scores more is kept; so no criterion may be missed altogether


def accuracy_reward(completion, example, *, partial_credit=0.2, soft_iou=False):
    """Accuracy in [0, 1] by the record of the example's kind (KeyError without one). No answer -> 0."""
    answer = extract_answer(completion)
    settings = {"partial_credit": partial_credit, "soft_iou": soft_iou}
    return kind(example).accuracy(answer, truth_of(example), **settings) if answer else 0.0


def format_reward(completion, example):
    """1.0 for one non-empty <think>..</think>, then one non-empty <answer>..</answer>, and only white space around.

    Of some kinds (open detection) the answer must also be one that can be read.
    """
    text = completion.strip()
    thinking, _, rest = text.partition("</think>")
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    ordered = text.startswith("<think>") and rest.lstrip().startswith("<answer>") and text.endswith("</answer>")
    answer = extract_answer(text)
    if not (once and ordered and thinking.removeprefix("<think>").strip() and answer):
        return 0.0
    return float(kind(example).readable(answer))


def is_correct(completion, example):
    """Exactly right: IoU > 0.5, equal sets, equal answers. No accuracy function gives 1.0 for anything less."""
    return accuracy_reward(completion, example, partial_credit=0.0) == 1.0


# ---- The quality score ----

def quality_score(completion, example):
    """0..100, by rules where the paper asks a model: parts by weight; at most KEEP_ABOVE for a wrong answer."""
    score = float(sum(QUALITY[name] * part for name, part in quality_parts(completion, example).items()))
    return score if is_correct(completion, example) else min(score, float(KEEP_ABOVE))


def quality_parts(completion, example):
    """The four criteria, each in [0, 1]: {"accuracy": .., "consistency": .., "format": .., "fluency": ..}."""
    thinking = completion.partition("<think>")[2].partition("</think>")[0]
    said = words(thinking[-MAX_THINKING:])
    return {"accuracy": accuracy_reward(completion, example),
            "consistency": consistency(said, extract_answer(completion) or ""),
            "format": format_reward(completion, example), "fluency": fluency(said)}


def consistency(said, answer):
    """1 if the words of the reasoning state the answer, 0 if they end in another number or verdict, else 0.5.

    Answer "7": "so 3 + 4 = 7" -> 1; "so seven" -> 0.5; "so it is 8" -> 0
    """
    if not said or not answer:
        return 0.0
    end, parts = said[-20:], set(words(answer))
    for parse, same in ((parse_verdict, operator.eq), (parse_number, same_number)):
        if (value := parse(answer)) is not None:
            stated = [other for word in end if (other := parse(word)) is not None]
            agrees = parts <= set(end) or any(same(value, other) for other in stated)
            return 1.0 if agrees else 0.0 if stated else 0.5
    return 1.0 if parts <= set(said) else 0.5


def fluency(said):
    """Share of distinct word triples: 1 for plain prose; 0 if it is half or less, or there are fewer than two words."""
    triples = list(zip(said, said[1:], said[2:]))
    share = len(set(triples)) / len(triples) if triples else 1.0
    return share if len(said) > 1 and share > 0.5 else 0.0
