"""What is probably not meant, in data or settings: told, a sentence each, where nothing can be refused."""

import os
import re

from answers import parse_letters
from distributed import say
from tasks import TASKS, truth_of
from tools.numerals import elements, parse_number
from tools.shapes import BOX

WINDOW = 50     # steps that --advance_at looks at


def box_convention(boxes) -> str:
    """How a file's boxes seem to be written if not as two corners in pixels; "" without a sign of it.

    boxes: [((four numbers), (width, height) of its image), ..], all of one file. One strange box in ten is a sign.
    """
    beyond = sum(box[2] > size[0] + 1 or box[3] > size[1] + 1 for box, size in boxes)
    turned = sum(box[2] <= box[0] or box[3] <= box[1] for box, _ in boxes)
    sized = all(0 <= box[0] and 0 <= box[1] and box[0] + box[2] <= size[0] + 1 and box[1] + box[3] <= size[1] + 1
                for box, size in boxes)
    found = f"Of {len(boxes)} boxes"
    if turned and turned >= 0.1 * len(boxes) and sized:
        return (f"{found} {turned} are none as two corners, and all fit as corner and size: they seem to be [x, y, "
                "width, height]. `python -m tools.convert rows FILE --boxes xywh` writes them as corners.")
    if beyond and beyond >= 0.1 * len(boxes) and all(0 <= min(box) and max(box) <= 1000 for box, _ in boxes):
        return (f"{found} {beyond} leave their image, and all lie within 0 to 1000: they seem to be thousandths of the "
                "image. `python -m tools.convert rows FILE --boxes thousandths` writes them in pixels.")
    return ""


def boxes_of(examples, sizes) -> list:
    """[((x1, y1, x2, y2), (width, height) of the image), ..] of the true boxes of examples in original pixels."""
    return [(tuple(map(float, numbers)), sizes[example.images[0]]) for example in examples
            if TASKS[example.task].boxes and example.images and not isinstance(sizes[example.images[0]], str)
            for _, *numbers in BOX.findall(truth_of(example))]


def in_a_file(examples, boxes, moved) -> list[str]:
    """Sentences about the examples of one file, its boxes (see boxes_of), and its images that other machines named."""
    wide = [max(box) for box, size in boxes if min(size) > 1300]
    twice = len(examples) - len({same(example) for example in examples})
    loose = [example.where for example in examples if example.images and not TASKS[example.task].boxes
             and any(not mark for mark, *_ in BOX.findall(example.problem))]
    told = [(len(wide) >= 20 and 800 < max(wide) <= 1000,
             f"no box passes 1000, though {len(wide)} are of images above 1,300 pixels; if they are thousandths of the "
             "image, `python -m tools.convert rows FILE --boxes thousandths` writes them in pixels"),
            (twice, f"{twice} of {len(examples)} rows are there more than once"),
            (moved, f"{len(moved)} images are named by paths of another machine, and were found by the ends of these"),
            (loose, f"{len(loose)} questions of tasks without boxes hold lists of four numbers, the first {loose[:1]}; "
             'a box must be marked, {"bbox_2d": [..]}, to be converted to the pixels that the model sees')]
    return [sentence for sign, sentence in told if sign]


def between(train, tests) -> list[str]:
    """Sentences about what training examples and test examples share."""
    seen, shown = {same(example) for example in train}, {family(image) for e in train for image in e.images}
    found = []
    for split in dict.fromkeys(example.split for example in tests):
        rows = [example for example in tests if example.split == split]
        if known := sum(same(example) in seen for example in rows):
            found.append(f"test {split}: {known} of {len(rows)} rows are training rows")
        pictures = {image for example in rows for image in example.images}
        if known := sum(family(image) in shown for image in pictures):
            found.append(f"test {split}: {known} of {len(pictures)} images, or versions of them, are training images")
    return found


def of_a_run(cfg, examples: dict) -> list[str]:
    """Sentences about settings that can hardly be meant, given {stage name: its examples}."""
    found = []
    for stage in cfg.curriculum:
        count, batch = len(examples.get(stage.name, ())), cfg.prompts_per_step if stage.forms else cfg.sft_batch
        answers = len({truth_of(example) for example in examples.get(stage.name, ())})
        if count and (passes := stage.steps * batch / count) > (50 if stage.forms else 10):
            found.append(f"stage {stage.label}: {stage.steps} steps of {batch} are {passes:.3g} passes over {count} "
                         f"examples, which have {answers} different answers")
        if cfg.warmup_steps >= stage.steps:
            found.append(f"stage {stage.label} ends after {stage.steps} steps, within its --warmup_steps "
                         f"{cfg.warmup_steps}: it never takes a step at its learning rate")
        if cfg.advance_at and stage.forms and stage.steps <= WINDOW:
            found.append(f"stage {stage.label}: --advance_at looks at {WINDOW} steps, so it cannot end {stage.steps} "
                         "early")
    return found


class Watch:
    """Says why nothing seems to be learned, each reason once a stage: called with each row of metrics.jsonl."""
    STEPS = 20

    def __init__(self):
        self.stage, self.rows, self.told = None, [], set()

    def __call__(self, cfg, row) -> None:
        if row["stage_index"] != self.stage:
            self.__init__()
            self.stage = row["stage_index"]
        self.rows = (self.rows + [row])[-self.STEPS:]
        if "reward" not in row or len(self.rows) < self.STEPS:
            return
        mean = {name: sum(row[name] for row in self.rows) / self.STEPS
                for name in ("reward", "truncated", "equal_groups", "reward/format")}
        last = f"{row['stage']}, the last {self.STEPS} steps:"
        for name, sign, sentence in (
                ("truncated", mean["truncated"] > 0.5,
                 f"{mean['truncated']:.0%} of the completions were cut before their end; raise --max_completion_length "
                 f"{cfg.max_completion_length}, or start from a model that says less"),
                ("reward", mean["reward"] == 0, "every reward was 0, so there is nothing to learn from; look at samples.jsonl, "
                 "and begin with an easier form or with a model that answers in the format"),
                ("equal", mean["reward"] > 0 and mean["equal_groups"] > 0.9,
                 f"in {mean['equal_groups']:.0%} of the groups all rewards were equal, and these teach nothing; ask harder "
                 "questions if they are all right, else easier ones, or raise --num_generations or --temperature")):
            if sign and name not in self.told:
                say(f"{last} {sentence}")
                self.told.add(name)


def same(example) -> tuple:
    """What makes two rows one: what is asked of which images."""
    return example.form, example.problem, example.history, example.images, truth_of(example)


def family(image) -> str:
    """What all versions of one photo share: Roboflow writes NAME_jpg.rf.HASH.jpg for each. Without `.rf.`, the path."""
    return re.sub(r"\.rf\.[^/]*$", "", os.fspath(image))


def text_only_truths(examples) -> list[str]:
    """True answers of open math rows that only the same text equals, though there is a number or a formula in them.

    "10 people or 12", "x \\\\in A" -> paid as they are written; "20/3", "(1, 2)", "B", "isosceles" are not listed.
    """
    truths = [truth_of(example) for example in examples if (example.task, example.form) == ("math", "open")]
    return [truth for truth in truths if re.search(r"[\\0-9]", truth) and parse_number(truth) is None
            and not parse_letters(truth) and not (elements(truth) and all(map(parse_number, elements(truth)[1])))]
