"""One annotation, three forms (paper, section 3.1): an open example as a yes/no or option question.

A wrong answer must be as likely as the right one to who does not look, or the question would teach to guess.
So rows of one kind of question, whose words do not tell their answers apart, lend one another their right
answers as wrong ones, two for yes/no, up to four for options. Of four rows that ask "How many cups are
there?" `derive_all` makes

    3   A. 3  B. 8  C. 4  D. 5 -> A       Is the answer 8? -> no
    4   A. 8  B. 5  C. 3  D. 4 -> D       Is the answer 4? -> yes
    5   A. 4  B. 5  C. 3  D. 8 -> B       Is the answer 4? -> no
    8   A. 5  B. 4  C. 8  D. 3 -> C       Is the answer 8? -> yes

All four show the same options, and each is right once; yes, no and letters take turns.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from rewards import FORMS, TASKS, Example
from support.answers import offered_letters
from support.blind import all_said, kinds, known
from support.rows import attempt, first
from support.words import UserError, say

SETS = {"binary": ((2, 1),), "choice": ((2, 2), (4, 1), (3, 1), (2, 1))}  # (rows, answers of each)
FEW, TOGETHER, DRAWS = 20, 64, 60  # rows that change little; that look for sets together; to try


def derive(example: Example, form: str, pool=None, seed: int = 0) -> Example:
    """The form of one example by itself, the same for the same (seed, example, form).

    `pool`: texts that wrong answers are drawn from (default: its task's), as far as they are wrong; where it
    has too few, the task invents more. UserError where there is none: a truth in words, a pool without absent
    labels. Of a whole data set `derive_all` makes fairer questions.
    """
    if form == example.form:
        return example
    rng, right = _rng(example, form, seed), right_answers(example, form)
    texts = sorted(set(TASKS[example.task].pool if pool is None else pool))
    texts = rng.sample(texts, len(texts))
    return make_question(example, form, rng.sample(right, len(right)), texts, rng)


def derive_all(examples: list[Example], form: str, seed: int = 0, skip_bad_rows: bool = False):
    """The list of all examples in another form, such that only the image tells what is right.

    Rows of one kind of question go into sets whose answers are wrong for one another; yes, no and letters
    take turns. A row whose partners are all taken, as its answer is too frequent, is left out; one that no row
    can lend a wrong answer to gets invented ones, as in `derive`. Rows without such a form are one UserError,
    or are dropped.
    """
    if form == "open":
        return examples
    lenders, made = [], {}  # made: place -> the question, or the UserError that says why none is
    for place, example in enumerate(examples):
        if isinstance(right := attempt(right_answers, example, form), UserError):
            made[place] = right
        else:
            right = _rng(example, "right", seed).sample(right, len(right))
            lenders.append(Lender(place, example, right))
    lenders.sort(key=lambda row: _rng(row.example, "order", seed).random())  # not that of the file
    for task in dict.fromkeys(example.task for example in examples):
        rows, turns = [row for row in lenders if row.example.task == task], Counter()
        count = Counter(text for row in rows for text in row.right)
        for row in rows:  # last comes what cannot be wrong as often as right
            row.right.sort(key=lambda text: count[text] > len(rows) / 2)
        for lent, members, kind in sorted(groups_of(rows, form, seed), key=lambda group: -len(group[1])):
            for row in members:  # of whole sets first, in which each answer has its turn
                texts = [text for other in members if other is not row for text in other.shown_to(row, lent)]
                if not (len(texts) > 2 or form == "binary" and texts):
                    texts += _drawn(row, kind, form, seed)
                rng = _rng(row.example, form, seed)
                made[row.place] = attempt(make_question, row.example, form, row.right, texts, rng, lent, turns)
    errors = [str(error) for error in made.values() if isinstance(error, UserError)]
    if errors and not (skip_bad_rows and len(errors) < len(made)):
        raise UserError("\n".join([*first(errors), "Correct them, give the form a file of its own, "
                                   "or drop the rows with --skip_bad_rows"]))
    if errors:
        say(f"{form}: dropped {len(errors)} rows that have no such form; the first: {errors[0]}")
    return [made[place] for place in sorted(made) if isinstance(made[place], Example)]


@dataclass(frozen=True, eq=False)
class Lender:
    """A row that lends its right answers to others as their wrong ones."""
    place: int  # in the list of examples
    example: Example
    right: list[str]  # shuffled

    def shown_to(self, other: "Lender", lent: int) -> list[str]:
        """The first `lent` answers as they stand in another row: places as shares of its image."""
        own, its, resize = self.example.size, other.example.size, TASKS[self.example.task].resize
        same = resize is None or None in (own, its) or own == its
        return [text if same else resize(text, own, its) for text in self.right[:lent]]

    def could_take(self, other: "Lender", lent: int = 1) -> bool:
        """Whether the other's answers are wrong for this row."""
        wrong = TASKS[self.example.task].wrong
        return self.right[0] != other.right[0] and all(
            wrong(text, self.example) for text in other.shown_to(self, lent))

    def has_options(self, form: str) -> bool:
        """Whether it is a choice question already."""
        return form == "choice" and self.right[0] in offered_letters(self.example.problem)


def groups_of(rows: list[Lender], form: str, seed: int) -> list:
    """[(answers that each row lends, its set or itself alone, rows of its kind), ..], of rows of one task.

    What a kind has left over is tried again with what others have, unless it is just the rest of a division.
    """
    groups, rest = [], rows
    while rest:
        before, rest = rest, []
        questions = [all_said(row.example, TASKS[row.example.task].choose(row.example)) for row in before]
        answers = np.array([known(row.right[0], row.example.size) for row in before], float)
        for kind in ([before[n] for n in part] for part in kinds(questions, answers)):
            sets, left = exchange(kind, form, again=before is not rows)
            groups += [(lent, members, kind) for lent, members in sets]
            if len(left) > 3:
                rest += left
            else:
                groups += [(0, [row], kind) for row in left]
        if len(rest) > 0.9 * len(before):
            break
    return groups + [(0, [row], rows) for row in _not_surplus(rows, rest, form, seed)]


def exchange(rows: list[Lender], form: str, again=False) -> tuple[list, list]:
    """([(answers that each row lends, its set of rows), ..], rows in no set), of rows of one kind.

    Rows that ask the same come together first. again: these rows are left over, too many to be spread on
    smaller sets, where they would be right too often.
    """
    rest, sets, count = rows, [], Counter(row.right[0] for row in rows)
    for size, lent in SETS[form]:
        for alike in (lambda e: (e.problem, e.size), lambda e: e.problem, lambda e: None):
            groups, few = {}, []
            for row in rest:
                able = lent <= min(len(row.right), TASKS[row.example.task].most) and not row.has_options(form)
                (groups.setdefault(alike(row.example), []) if able else few).append(row)
            rest = few
            for group in groups.values():
                for start in range(0, len(group), TOGETHER):  # a rare answer completes each set
                    part = group[start:start + TOGETHER]
                    part.sort(key=lambda row: -count[row.right[0]])
                    full, left = sets_of(part, size, lent)
                    sets += [(lent, members) for members in full]
                    rest += left
        if lent == 1 and (again or size <= len(rest) < 0.8 * len(rows)):  # smaller sets if few
            break
    return sets, rest


def sets_of(rows: list[Lender], size: int, lent: int) -> tuple[list, list]:
    """(sets of `size` rows that fit one another, the others): first rows open sets, others join."""
    count = len(rows) // size
    sets, rest = [[row] for row in rows[:count]], []
    for row in rows[count:]:
        fitting = (members for members in sets if len(members) < size and all(
            row.could_take(other, lent) and other.could_take(row, lent) for other in members))
        next(fitting, rest).append(row)
    unfinished = [row for members in sets if len(members) < size for row in members]
    return [members for members in sets if len(members) == size], rest + unfinished


def _not_surplus(rows: list[Lender], rest: list[Lender], form: str, seed: int) -> list[Lender]:
    """Of rows in no set those to be asked all the same: all, or those alone that no row lends an answer."""
    alone = [row for row in rest if row.has_options(form)
             or not any(map(row.could_take, _sample(row, rows, seed)))]
    surplus, in_sets = len(rest) - len(alone), len(rows) - len(rest)
    name = f"{form} {rows[0].example.task}" if rows else form
    if surplus > max(3, 0.03 * len(rows)) and len(rows) > FEW and in_sets >= 0.1 * (in_sets + surplus):
        say(f"{name}: {surplus} of {len(rows)} rows are left out: answers like theirs are so "
            "frequent among questions like theirs that they could be guessed")
        rest = alone
    if (bare := sum(not row.has_options(form) for row in rest)) > max(FEW, 0.1 * len(rows)):
        say(f"{name}: to {bare} of {len(rows)} rows no other row lends a wrong answer among questions like "
            "theirs; these are others' or invented, which may give the right one away (python -m tools.blind "
            "tells)")
    return rest


def _sample(row: Lender, rows: list[Lender], seed: int) -> list[Lender]:
    """Up to DRAWS rows of its task."""
    return _rng(row.example, "sample", seed).sample(rows, min(DRAWS, len(rows)))


def _drawn(row: Lender, rows: list[Lender], form: str, seed: int) -> list[str]:
    """Right answers of other rows, as they would stand in this one, and the task's own pool."""
    lent = [text for other in _sample(row, rows, seed) for text in other.shown_to(row, 1)]
    pool = TASKS[row.example.task].pool
    return [*dict.fromkeys(lent), *_rng(row.example, form, seed).sample(pool, len(pool))]


def right_answers(example: Example, form: str) -> list[str]:
    """The right answers of an example; UserError if its task has no such form."""
    right = TASKS[example.task].right
    if example.form != "open" or form not in FORMS or right is None:
        raise UserError(f"{example.where}: {example.form} {example.task} has no {form} form.")
    return right(example)


def _rng(example: Example, form: str, seed: int) -> random.Random:
    """Random numbers of one question."""
    images = (Path(image).name for image in example.images)
    key = json.dumps([seed, form, example.problem, example.solution, *images])
    return random.Random(hashlib.sha256(key.encode()).digest())


def make_question(example: Example, form: str, right, texts, rng, lent=0, turns=None) -> Example:
    """The example in another form: wrong answers are the first of `texts` that are, else invented.

    lent: how many right ones an option question shows (0: any). turns: how often each letter, yes and no was
    right so far, to which it is added: one whose turn it is, is right next (default: as drawn).
    """
    task = TASKS[example.task]
    if form == "choice" and right[0] in offered_letters(example.problem):  # options are there
        return replace(example, solution=f"<answer>{right[0]}</answer>", form=form)
    if not (wrong := wrong_answers(example, texts, rng)):
        raise UserError(f"{example.where}: no wrong answer is at hand beside {right}; drop the "
                        f"row, or give {form} a file of its own.")
    turns = Counter() if turns is None else turns
    if form == "binary":
        yes = rng.random() < 0.5 + turns["no"] - turns["yes"]
        text, answer = (right[0], "yes") if yes else (wrong[0], "no")
        problem = task.ask(example, text)
        turns[answer] += 1
    else:
        right = right[:lent or rng.randint(1, task.most)]
        options = right + wrong[:4 - len(right)]
        drawn = dict(zip("ABCD", rng.sample(range(len(options)), len(options))))
        letters = sorted(drawn, key=lambda letter: (turns[letter], drawn[letter]))
        turns.update(letters[:len(right)])
        answer = ", ".join(sorted(letters[:len(right)]))
        problem = "\n".join([task.choose(example), *(
            f"{letter}. {' '.join(text.split())}" for letter, text in sorted(zip(letters, options)))])
    return replace(example, problem=problem, solution=f"<answer>{answer}</answer>", form=form)


def wrong_answers(example: Example, texts, rng, most: int = 3) -> list[str]:
    """Up to `most` texts that the task finds wrong: the first of `texts`, then invented ones."""
    task, found = TASKS[example.task], {}
    for text in chain(texts, task.invent(example, rng)):
        if text.lower() not in found and task.wrong(text, example):
            found[text.lower()] = text
        if len(found) == most:
            break
    return list(found.values())
