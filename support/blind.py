"""A learner that sees no image: can yes/no and option questions be answered without looking?

It is told of each candidate what can be known blind: place, size and shape of a box; value and
roundness of a number; how far each is from what the question's words let one expect; its rank in
these among the options; letter, length, capital; how often the text was right elsewhere. It is
fitted on half of the images and tested on the other half. What it gets right above chance, a policy
can learn without looking: no help with open questions.
"""

import hashlib
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np

from support.answers import parse_boxes, parse_letters, parse_verdict, truth_of
from support.numbers import parse_number
from support.warnings import family

WARN = 0.10  # above chance
GIVEN_AWAY = ". WARNING: the questions give their answers away: learning them need not be seeing"
MOST = 4000  # questions of a task and form that are looked at
LEAST, SURE = 3, 8.0  # questions with a telling word, and without it; chi-squared of what it tells
ASKED = re.compile(r"Is there an? (.+)\?$|Is the answer (.+)\?$|Is (.+) the right box\?$")
WORD = re.compile(r"[^\W\d_\u3040-\u9fff]+|[^\w\s]|[\u3040-\u9fff]")
OPTION_LINE = re.compile(r"^([A-D])\. (.*)$", re.MULTILINE)


def candidates(example):
    """[(text, whether it is right), ..] of a yes/no or option question; [] where none is found."""
    truth = truth_of(example)
    if example.form == "binary":
        found = ASKED.search(example.problem.strip())
        return [(next(filter(None, found.groups())), bool(parse_verdict(truth)))] if found else []
    options, right = OPTION_LINE.findall(example.problem), parse_letters(truth) or set()
    return [(text, letter in right) for letter, text in options] if len(options) > 1 else []


def known(text, size):
    """Numbers that describe a candidate on its own: [value, ..], of fixed length."""
    boxes, number, of_box = parse_boxes(text) or [], parse_number(text), [0.0] * 14
    if len(boxes) == 1 and size:
        x1, y1, x2, y2 = (v / size[n % 2] for n, v in enumerate(boxes[0]))
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, max(x2 - x1, 1e-3), max(y2 - y1, 1e-3)
        of_box = [x, y, x * x, y * y, w, h, w * h, math.log(w * h), math.log(w / h),
                  math.hypot(x - 0.5, y - 0.5), x1 < 0.01, y1 < 0.01, x2 > 0.99, y2 > 0.99]
    value = float(number.value) if number else 0.0
    return [*of_box, math.copysign(math.log1p(abs(value)), value), value == 0, value % 5 == 0,
            value % 10 == 0, value % 1 == 0, len(text), text[:1].isupper(), text.count(".")]


def kinds(questions, answers):
    """Places of questions in parts, in each of which no word tells of the answer: [places, ..].

    answers (n, F): what is known of each. The word that tells most parts the questions that have it
    from the others, and so on in the parts: "percent", "year", "left"; but no name and no number.
    """
    found = [words_in(question) for question in questions]
    place = {word: n for n, word in enumerate(sorted(set().union(*found)))}  # in any order of questions
    found = [np.array(sorted(map(place.get, words)), int) for words in found]
    ranks = np.stack([np.unique(column, return_inverse=True)[1] for column in answers.T], 1)
    parts, done = [np.arange(len(questions))], []
    while parts:
        part = parts.pop()
        have = telling_word([found[n] for n in part], ranks[part])
        if have is None:
            done.append(part)
        else:
            parts += [part[have], part[~have]]
    return done


def telling_word(found, ranks):
    """Which of n questions have the word that tells most of `ranks` (n, F); None if it is chance.

    found: the words of each, as numbers.
    """
    n, owner = len(found), np.repeat(np.arange(len(found)), [len(words) for words in found])
    _, word, count = np.unique(np.concatenate(found), return_inverse=True, return_counts=True)
    apart = n * ranks - ranks.sum(0)  # from the mean, in whole numbers: alike everywhere
    apart = [own for own in apart.T.astype(float) if own.any()]
    able = np.minimum(count, n - count) >= LEAST  # (V,)
    if not apart or not able.any():
        return None
    told = np.max([np.bincount(word, own[owner]) ** 2 / (own @ own) for own in apart], 0)
    told *= able * n**2 / np.maximum(count * (n - count), 1)  # chi-squared, of the feature that fits best
    return np.isin(np.arange(n), owner[word == told.argmax()]) if told.max() > SURE else None


def all_said(example, question):
    """A question with the turns before it."""
    return " ".join([*(text for _, text in example.history), question])


def words_in(text):
    """Its words, a Chinese or Japanese character being one, and its signs; no number."""
    return set(WORD.findall(text.lower()))


def expected(questions, answers, use, ridge=3.0):
    """What the words of questions tell of answers: (n, F) -> (n, F), by ridge regression.

    Learned where `use` (n,) is true; there each is told as if it had not been among these itself.
    """
    found = [words_in(question) for question in questions]
    counts = Counter(word for words in found for word in words)
    kept = sorted(word for word, count in counts.items() if LEAST <= count)
    words = np.array([[word in own for word in kept] for own in found], float)  # (n, V)
    mean, kernel = answers[use].mean(0), words @ words[use].T
    weights = np.linalg.solve(kernel[use] + ridge * np.eye(use.sum()), kernel.T).T
    told, own = weights @ (answers[use] - mean), np.diag(weights[use])[:, None]
    told[use] = (told[use] - own * (answers[use] - mean)) / (1 - own)
    return mean + told


def described(examples, train):
    """Features (n, F), right (n,) and question (n,) of all candidates; `train` questions tell how
    often a text was right, where it was shown there ten times, and what their words let expect."""
    asked = [candidates(example) for example in examples]
    counts = Counter((text.lower(), right) for found, use in zip(asked, train) if use
                     for text, right in found)
    features = [np.array([known(text, example.size) for text, _ in found], float)
                for example, found in zip(examples, asked)]
    rights = [np.array([right for _, right in found]) for found in asked]
    sure = np.array([right.any() for right in rights])  # a "no" tells no right answer
    answers = np.array([own[right == right.max()].mean(0) for own, right in zip(features, rights)])
    questions = [all_said(example, ASKED.sub("", OPTION_LINE.sub("", example.problem.strip())))
                 for example in examples]
    told = expected(questions, answers, train & (sure | ~sure.any()))
    rows = []
    for found, own, likely in zip(asked, features, told):
        own = np.concatenate([own, abs(own - likely)], 1)
        order = own.argsort(0, kind="stable").argsort(0) / max(1, len(own) - 1)
        among = np.concatenate([order, order == 0, order == 1, abs(order - 0.5) < 0.34], 1)
        seen = np.array([[counts[text.lower(), r] for r in (True, False)] for text, _ in found])
        seen = seen * (seen.sum(1, keepdims=True) >= 10)
        share = (seen[:, :1] + 1) / (seen.sum(1, keepdims=True) + 2)
        rows.append(np.concatenate([own, among * (len(own) > 1), np.eye(len(own), 4),
                                    np.log1p(seen), share], 1))
    owner = np.repeat(np.arange(len(asked)), [len(found) for found in asked])
    return np.concatenate(rows), np.concatenate(rights), owner


def fit(x, right, steps=300, rate=0.5, decay=1e-3):
    """Weights of a logistic regression."""
    weights = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        weights -= rate * (x.T @ (p - right) / len(right) + decay * weights)
    return weights


def blind_accuracy(examples, seed=0):
    """(share right, chance, number of test questions); None for too few questions."""
    examples = [example for example in examples if candidates(example)][:MOST]
    several = any(sum(right for _, right in candidates(example)) > 1 for example in examples)
    if several:
        examples = [example for example in examples if len(candidates(example)) == 4]
    if len(examples) < 60:
        return None
    tested = np.array([is_test(example, seed) for example in examples])
    x, right, owner = described(examples, ~tested)
    test = tested[owner]
    x = (x - x[~test].mean(0)) / (x[~test].std(0) + 1e-6)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    scores, right, owner = x[test] @ fit(x[~test], right[~test]), right[test], owner[test]
    if several or len(set(owner)) == len(owner):  # each candidate is a yes/no question of its own
        constant = max(right.mean(), 1 - right.mean())
        return float(((scores > 0) == right).mean()), float(constant), len(right)
    hits = [right[owner == n][scores[owner == n].argmax()] for n in np.unique(owner)]
    return float(np.mean(hits)), 0.25, len(hits)


def is_test(example, seed):
    """Whether a question is a test question, by its image: versions of one photo stay together."""
    name = Path(family(example.images[0])).name if example.images else example.where
    return hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % 2 == 0


def blind_report(examples):
    """A sentence for each task and form: accuracy beside chance, a warning where it is high."""
    said = []
    for form, task in dict.fromkeys((e.form, e.task) for e in examples):
        if found := blind_accuracy([e for e in examples if (e.form, e.task) == (form, task)]):
            share, chance, n = found
            said.append(f"{form} {task}: without looking {share:.0%} right, by chance {chance:.0%} "
                        f"({n} questions){GIVEN_AWAY * (share > chance + WARN)}")
    return said
