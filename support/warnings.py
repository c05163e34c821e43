"""What is probably not meant, in data or settings: a sentence each, where nothing can be refused.

Knows no task: whether answers are places in an image is handed in.
"""

import math
import os
import re
from collections import Counter
from statistics import median_low

from support.answers import BOX, parse_letters, truth_of
from support.boxes import boxes_in
from support.numbers import elements, parse_number
from support.words import say

NUMBER_LIST = re.compile(r"\[\s*-?[0-9.]+(?:\s*,\s*-?[0-9.]+)+\s*\]")
OWN_RULES = re.compile(r"(?i)\\boxed\b|</?(?:answer|think\w*|reason\w*|summary|caption|conclusion)>|"
                       r"\b0 (?:to|and|-) 1(?:000)?\b|\bnormali[sz]ed\b|\bin JSON\b|\bsingle (?:word|number)\b")
PATCH = 14  # pixels of a patch: what is smaller is hardly seen


def in_a_file(examples, elsewhere, placed) -> list[str]:
    """Sentences about the examples of one file.

    elsewhere: images that were found under another name; placed: tasks whose answers are places in an image,
    which are converted to the pixels that the model sees.
    """
    twice = len(examples) - len({same(example) for example in examples})
    others = [e for e in examples if e.images and e.task not in placed]
    asked = [e.where for e in others if any(not mark for mark, *_ in BOX.findall(e.problem))]
    answered = [e.where for e in others if e.form == "open" and NUMBER_LIST.search(truth_of(e))]
    boxes = [box for e in examples if e.task in placed for box in boxes_in(truth_of(e))]
    small = [box for box in boxes if min(box[2] - box[0], box[3] - box[1]) < PATCH]
    rules = [(e.where, found[0]) for e in examples if (found := OWN_RULES.search(e.problem))]
    lists = [e.where for e in examples if e.task == "classify" and truth_of(e).startswith('["')]
    (shown, most), = Counter(image for e in examples for image in e.images).most_common(1) or [("", 0)]
    sentences = [
        (most > max(50, len(examples) / 2), f"{most} of {len(examples)} rows show one picture, {shown}"),
        (twice, f"{twice} of {len(examples)} rows are there more than once"),
        (elsewhere, f"{len(elsewhere)} images are found by the ends of paths of another machine, or by other "
                    "letters of their names"),
        (small, f"{len(small)} of {len(boxes)} boxes are less than {PATCH} pixels (a patch) wide or high as the "
                "model sees them; raise --max_pixels, or crop the pictures"),
        (rules, f"{len(rules)} questions have rules of their own on how to answer beside those that are added, "
                f"the first {rules[:1]}; take them out if they say something else"),
        (lists, f"{len(lists)} truths are lists of labels: an answer must name all of them; of ways to say one, "
                "keep one"),
        (asked, f"{len(asked)} questions of tasks without boxes hold lists of four numbers, the first "
                f'{asked[:1]}; only a marked box, {{"bbox_2d": [..]}}, is set in model pixels'),
        (answered, f"{len(answered)} answers of tasks without `resize` hold lists of numbers, the first "
                   f"{answered[:1]}; if they are places in the image, give the task's record one, or they "
                   "stay in pixels that the model does not see")]
    return [sentence for sign, sentence in sentences if sign]


def between(train, tests, questions=()) -> list[str]:
    """Sentences about what training examples and test examples share, and how many have no picture."""
    seen, shown = {same(e) for e in train}, {family(image) for e in train for image in e.images}
    bare = [f"{sum(not e.images for e in rows)} of {len(rows)} {name}" for name, rows in (
        ("training rows", train), ("test rows", tests), ("questions of the reject stage", questions))
        if not all(e.images for e in rows)]
    found = [f"no picture have {', '.join(bare)}"] if bare else []
    for split in dict.fromkeys(example.split for example in tests):
        rows = [example for example in tests if example.split == split]
        images = {image for example in rows for image in example.images}
        doubled, known = sum(same(e) in seen for e in rows), sum(family(image) in shown for image in images)
        if doubled:
            found.append(f"test {split}: {doubled} of {len(rows)} rows are training rows")
        if known:
            found.append(f"test {split}: {known} of {len(images)} images, or versions of them, are training "
                         "images")
    return found


def of_a_run(cfg, examples: dict) -> list[str]:
    """Sentences about settings that can hardly be meant, given {stage name: its examples}."""
    found = []
    for stage in cfg.curriculum:
        rows = examples.get(stage.name, ())
        batch, most = (cfg.prompts_per_step, 50) if stage.forms else (cfg.sft_batch, 10)
        if rows and (passes := stage.steps * batch / len(rows)) > most:
            answers = len({truth_of(example) for example in rows})
            found.append(f"stage {stage.label}: {stage.steps} steps of {batch} are {passes:.3g} "
                         f"passes over {len(rows)} examples with {answers} different answers")
    return found


class Watch:
    """Says why nothing is learned, or that it is lost, each reason once a stage: called with each log row."""
    STEPS = 20

    def __init__(self):
        self.stage, self.rows, self.said = None, [], set()  # the first rows of a stage, and the last
        self.rounding = 1e-3  # nats between sampled and scored log-probabilities, in float32

    def __call__(self, row, aloud=True) -> None:
        if row["stage_index"] != self.stage:
            self.stage, self.rows, self.said = row["stage_index"], [], set()
        self.rows.append(row)
        del self.rows[self.STEPS:-self.STEPS]
        for reason, sentence in self.signs(row) if "reward" in row else ():
            if reason not in self.said:
                self.said.add(reason)
                if aloud:
                    say(sentence)

    def recall(self, rows) -> None:
        """Rows that a resumed run has logged: how its stage began, and what has been said."""
        for row in rows:
            self({name: math.nan if value is None else value for name, value in row.items()}, aloud=False)

    def end(self) -> None:
        """The stage is over: say so if it ends below its start."""
        if fall := self.fall(min(self.STEPS, max(1, len(self.rows) // 2)), 3.0):
            say(f"{self.rows[-1]['stage']} ends below its start, and what follows begins there: {fall}")

    def column(self, name) -> list[float]:
        """A number of each of these rows that has it."""
        return [row[name] for row in self.rows if name in row]

    def fall(self, last, errors, share=1.0) -> str:
        """How accuracy fell from the first steps to below `share` of it in so many last ones, or "".

        By more than chance: standard errors of steps that differ as these do, or of four questions a step.
        """
        accuracy, kl = self.column("reward/accuracy"), self.column("kl") or [0.0]
        noise = sum((a - b) ** 2 for a, b in zip(accuracy, accuracy[1:])) / 2 / max(1, len(accuracy))
        for first in range(1, min(self.STEPS, len(accuracy) - last) + 1):
            began, now = sum(accuracy[:first]) / first, sum(accuracy[-last:]) / last
            variance = sum(max(p * (1 - p) / 4, noise) / n for p, n in (
                ((began * first + 0.5) / (first + 1), first), ((now * last + 0.5) / (last + 1), last)))
            if now < share * began and began - now > errors * variance**0.5:
                return (f"accuracy was {began:.2f} in the first {first} of its steps and is {now:.2f} in the "
                        f"last {last}; KL is {kl[-1]:.2g}, {kl[0]:.2g} at first. Lower --lr, or raise --beta")
        return ""

    def signs(self, row):
        """(reason, sentence) of each sign in the rows up to this one."""
        def middle(name):
            return median_low(self.column(name)[-self.STEPS:] or [0.0])
        last, long = f"{row['stage']}, the last {self.STEPS} steps:", len(self.rows) >= self.STEPS
        gap, began, kl_began = row["logp_gap"], self.rows[0]["logp_gap"], self.rows[0].get("kl", 0.0)
        if gap > self.rounding or long and (gap := middle("logp_gap")) > max(self.rounding / 5, 3 * began):
            yield "gap", (f"{row['stage']}, step {row['stage_step']}: sampled and scored log-probabilities "
                          f"are {gap:.2g} apart, {began:.2g} at first, far above rounding: the generator "
                          "samples another distribution than the one that is trained (a repetition penalty, "
                          "top_p, another temperature, old weights)")
        if not long:
            return
        reward, truncated, equal = (sum(self.column(name)[-self.STEPS:]) / self.STEPS
                                    for name in ("reward", "truncated", "equal_groups"))
        if (kl := middle("kl")) > 1 + 10 * kl_began:
            yield "kl", (f"{last} KL is {kl:.2g} nats a token, {kl_began:.2g} at first: the policy runs away "
                         "from its reference. Lower --lr, or raise --beta")
        if truncated > 0.5:
            yield "truncated", (f"{last} {truncated:.0%} of the completions were cut before their end; raise "
                                "--max_completion_length, or train a terser model")
        if fall := self.fall(self.STEPS, 3.5, 0.5):
            yield "fall", f"{row['stage']}: what was known is being lost: {fall}"
        elif not any(self.column("reward/accuracy")[-self.STEPS:] or [reward]):
            what = "no answer was right" if reward else "every reward was 0"
            yield "reward", (f"{last} {what}, which teaches nothing; look at samples.jsonl, and begin with an "
                             "easier form or with a model that answers in the format")
        elif equal > 0.9:
            yield "equal", (f"{last} in {equal:.0%} of the groups all rewards were equal, which teaches "
                            "nothing; ask harder questions if they are all right, else easier ones, or raise "
                            "--num_generations or --temperature")


def same(example) -> tuple:
    """What makes two rows one: what is asked of which images."""
    return example.form, example.problem, example.history, example.images, truth_of(example)


def family(image) -> str:
    """What all versions of a photo share: Roboflow writes NAME_jpg.rf.HASH.jpg. Else the path."""
    return re.sub(r"\.rf\.[^/]*$", "", os.fspath(image))


def text_only_truths(truths) -> list[str]:
    """Of math truths those that only the same text equals, though they hold a number or a formula: "10 or 12",
    "x \\\\in A", but not "20/3", "(1, 2)", "B", "isosceles"; and pairs that are read as one number: "90,180".
    """
    def read(truth):
        parts = elements(truth)
        numbers = parts and all(map(parse_number, parts[1]))
        return numbers or parse_number(truth) is not None or parse_letters(truth)
    return [truth for truth in truths if len(truth) > 600 or re.fullmatch(r"\d{2,3},\d{3}", truth)
            or re.search(r"[\\0-9]", truth) and not read(truth)]
