"""FORMS DOC"""

import hashlib
import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from rewards import FORMS, TASKS, Example
from support.answers import offered_letters
from support.words import UserError, say

SETS = {"binary": ((2, 1),), "choice": ((2, 2), (4, 1), (3, 1), (2, 1))}    # (rows of a set, answers that each lends)
FEW, TOGETHER, DRAWS = 20, 64, 60   # rows that change nothing much; rows that look for sets together; texts to try


def derive(example: Example, form: str, pool=None, seed: int = 0) -> Example:
    """The binary or choice form of an open example (paper, section 3.1), the same for the same (seed, example, form).

    Yes and no are equally likely, letters uniform. `pool`: texts from which wrong answers are drawn, as far as the task
    finds them wrong (labels by default: those of Pascal VOC); where it lends too few, the task invents more. UserError
    where no wrong answer can be made: a math truth in words, or a pool without absent labels. Of a whole data set,
    `derive_all` makes fairer questions.
    """
    if form == example.form:
        return example
    rng, right = _rng(example, form, seed), right_answers(example, form)
    texts = sorted(set(TASKS[example.task].pool if pool is None else pool))
    texts = rng.sample(texts, len(texts))
    return _question(example, form, rng.sample(right, len(right)), texts, rng)


def derive_all(examples: list[Example], form: str, seed: int = 0, skip_bad_rows: bool = False) -> list[Example]:
    """Every example in another form, such that only the image tells what is right; in their order.

    Rows go into sets, two for yes/no and four for options, whose answers are wrong for one another (boxes as shares of
    their image). All rows of a set show the same answers, and each is right once: whatever is picked without looking is
    right as often as by chance. A row whose partners are all taken, as its answer is too frequent, is left out. One
    that no other row can lend a wrong answer to gets invented ones, as in `derive`. All rows that cannot be derived are
    named in one UserError, or dropped and counted.
    """
    if form == "open":
        return examples
    lenders, made, faults = [], {}, []
    for place, example in enumerate(examples):
        try:
            right = right_answers(example, form)
            lenders.append(Lender(place, example, _rng(example, "right", seed).sample(right, len(right))))
        except UserError as error:
            faults.append(str(error))
    lenders.sort(key=lambda row: _rng(row.example, "order", seed).random())     # that of the rows does not matter
    for task in dict.fromkeys(example.task for example in examples):
        rows = [row for row in lenders if row.example.task == task]
        told = Counter(text for row in rows for text in row.right)
        for row in rows:
            row.right.sort(key=lambda text: told[text] > len(rows) / 2)     # last: it cannot be wrong as often as right
        sets, rest = exchange(rows, form)
        for lent, members in sets + [(0, [row]) for row in _not_surplus(rows, rest, form, seed)]:
            for row in members:
                others = [text for other in members if other is not row for text in other.shown_to(row, lent)]
                drawn = [] if len(others) > 2 or form == "binary" and others else _drawn(row, rows, form, seed)
                try:
                    made[row.place] = _question(row.example, form, row.right, others + drawn,
                                                _rng(row.example, form, seed), lent)
                except UserError as error:
                    faults.append(str(error))
    if faults and not (skip_bad_rows and made):
        more = f"\n.. and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("\n".join(faults[:20]) + more + "\nCorrect them, give the form a file of its own, or drop the "
                        "rows with --skip_bad_rows")
    if faults:
        say(f"{form}: dropped {len(faults)} rows that have no such form; the first: {faults[0]}")
    return [made[place] for place in sorted(made)]


@dataclass(frozen=True, eq=False)
class Lender:
    """A row that lends its right answers to others as their wrong ones."""
    place: int              # in the list of examples
    example: Example
    right: list[str]        # shuffled

    def shown_to(self, other: "Lender", lent: int) -> list[str]:
        """The first `lent` answers as they would stand in another row: boxes as the same shares of its image."""
        own, its = self.example.size, other.example.size
        resize = TASKS[self.example.task].resize
        same = resize is None or None in (own, its) or own == its
        return [text if same else resize(text, own, its) for text in self.right[:lent]]

    def could_take(self, other: "Lender", lent: int = 1) -> bool:
        """Whether the other's answers are wrong for this row."""
        return self.right[0] != other.right[0] and all(
            TASKS[self.example.task].wrong(text, self.example) for text in other.shown_to(self, lent))


def exchange(rows: list[Lender], form: str) -> tuple[list, list]:
    """([(answers that each row lends, its set of rows), ..], rows that are in none), for rows of one task.

    Rows that ask the same come together first: then not even the question tells which answer belongs to it.
    """
    rest, sets, told = rows, [], Counter(row.right[0] for row in rows)
    for size, lent in SETS[form]:
        for alike in (lambda e: (e.problem, e.size), lambda e: e.problem, lambda e: None):
            groups, few = {}, []
            for row in rest:
                able = min(len(row.right), TASKS[row.example.task].most) >= lent and not _has_options(row, form)
                (groups.setdefault(alike(row.example), []) if able else few).append(row)
            rest = few
            for group in groups.values():
                for start in range(0, len(group), TOGETHER):    # frequent answers first: a rare one completes each set
                    part = sorted(group[start:start + TOGETHER], key=lambda row: -told[row.right[0]])
                    full, left = sets_of(part, size, lent)
                    sets += [(lent, members) for members in full]
                    rest += left
        if lent == 1 and len(rest) < 0.8 * len(rows):           # smaller sets only where these are few
            break
    return sets, rest


def sets_of(rows: list[Lender], size: int, lent: int) -> tuple[list[list[Lender]], list[Lender]]:
    """(sets of `size` rows that fit one another, all other rows): the first rows open sets, the others join one."""
    count = len(rows) // size
    sets, rest = [[row] for row in rows[:count]], []
    for row in rows[count:]:
        members = next((members for members in sets if len(members) < size and all(
            row.could_take(other, lent) and other.could_take(row, lent) for other in members)), rest)
        members.append(row)
    return [m for m in sets if len(m) == size], rest + [row for m in sets if len(m) < size for row in m]


def _not_surplus(rows: list[Lender], rest: list[Lender], form: str, seed: int) -> list[Lender]:
    """Of rows in no set those to be asked all the same; says how many are not, and how many may be guessed."""
    alone = [row for row in rest if _has_options(row, form) or not any(map(row.could_take, _sample(row, rows, seed)))]
    surplus, saved = len(rest) - len(alone), len(rows) - len(rest)
    if surplus > max(3, 0.03 * len(rows)) and len(rows) > FEW and saved >= 0.1 * (saved + surplus):
        say(f"{form} {rows[0].example.task}: {surplus} of {len(rows)} rows are left out: answers like theirs are so "
            "frequent that they could be guessed")
        rest = alone
    if (bare := sum(not _has_options(row, form) for row in alone)) > max(FEW, 0.1 * len(rows)):
        say(f"{form} {rows[0].example.task}: to {bare} of {len(rows)} rows no other row lends a wrong answer; theirs "
            "are invented, which may give the right one away (python -m tools.blind tells)")
    return rest


def _has_options(row: Lender, form: str) -> bool:
    """Whether a row is a choice question already."""
    return form == "choice" and row.right[0] in offered_letters(row.example.problem)


def _sample(row: Lender, rows: list[Lender], seed: int) -> list[Lender]:
    """Up to DRAWS rows of its task."""
    return _rng(row.example, "sample", seed).sample(rows, min(DRAWS, len(rows)))


def _drawn(row: Lender, rows: list[Lender], form: str, seed: int) -> list[str]:
    """Right answers of other rows, as they would stand in this one, and the task's own pool; some of them are wrong."""
    lent = dict.fromkeys(text for other in _sample(row, rows, seed) for text in other.shown_to(row, 1))
    return [*lent, *_rng(row.example, form, seed).sample(pool := TASKS[row.example.task].pool, len(pool))]


def right_answers(example: Example, form: str) -> list[str]:
    """The right answers of an example; UserError if its task has no such form."""
    if example.form != "open" or form not in FORMS or TASKS[example.task].right is None:
        raise UserError(f"{example.where}: no {form} question can be made of {example.form} {example.task}.")
    return TASKS[example.task].right(example)


def _rng(example: Example, form: str, seed: int) -> random.Random:
    """Random numbers of one question."""
    key = [seed, form, example.problem, example.solution, *(Path(image).name for image in example.images)]
    return random.Random(hashlib.sha256(json.dumps(key).encode()).digest())


def _question(example: Example, form: str, right, texts, rng, lent=0) -> Example:
    """The example in another form: wrong answers are the first of `texts` that its task finds wrong, else invented.

    Whether a yes/no question shows a right one is the toss of a coin; lent: how many an option question shows (0: any).
    """
    if form == "choice" and right[0] in offered_letters(example.problem):
        return replace(example, solution=f"<answer>{right[0]}</answer>", form=form)     # its options are there already
    if not (wrong := wrong_answers(example, texts, rng)):
        raise UserError(f"{example.where}: no wrong answer is at hand beside {right}; drop the row, or give {form} a "
                        "file of its own.")
    if form == "binary":
        text, answer = (right[0], "yes") if rng.random() < 0.5 else (wrong[0], "no")
        question = TASKS[example.task].ask(example, text)
    else:
        question, answer = _options(example, right[:lent or rng.randint(1, TASKS[example.task].most)], wrong, rng)
    return replace(example, problem=question, solution=f"<answer>{answer}</answer>", form=form)


def wrong_answers(example: Example, texts, rng, most: int = 3) -> list[str]:
    """Up to `most` different texts that the example's task finds wrong: the first of `texts`, then invented ones."""
    task, found = TASKS[example.task], {}
    for text in itertools.chain(texts, task.invent(example, rng)):
        if text.lower() not in found and task.wrong(text, example):
            found[text.lower()] = text
        if len(found) == most:
            break
    return list(found.values())


def _options(example: Example, right: list[str], wrong: list[str], rng) -> tuple[str, str]:
    """(question with four options, letters of the right ones)."""
    options = right + wrong[:4 - len(right)]
    options = rng.sample(options, len(options))
    lines = [f"{letter}. {' '.join(option.split())}" for letter, option in zip("ABCD", options)]
    letters = ", ".join("ABCD"[n] for n, option in enumerate(options) if option in right)
    return "\n".join([TASKS[example.task].choose(example), *lines]), letters
