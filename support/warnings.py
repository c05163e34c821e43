"""What is probably not meant, in data or settings: a sentence each, where nothing can be refused."""

import os
import re

from support.answers import BOX, parse_letters, truth_of
from support.numbers import elements, parse_number
from support.words import say


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


def in_a_file(examples, boxes, moved, placed) -> list[str]:
    """Sentences about the examples of one file, its boxes ([(box, image size), ..]), and images that other machines named.

    placed: names of the tasks whose answers are places in an image.
    """
    wide = [max(box) for box, size in boxes if min(size) > 1300]
    twice = len(examples) - len({same(example) for example in examples})
    loose = [example.where for example in examples if example.images and example.task not in placed
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
    return found


class Watch:
    """Says why nothing seems to be learned, each reason once a stage: called with each row of metrics.jsonl."""
    STEPS = 20

    def __init__(self):
        self.stage, self.rows, self.told = None, [], set()
        self.rounding = 1e-3  # nats that sampled and scored log-probabilities may be apart on average, in float32

    def __call__(self, row) -> None:
        if row["stage_index"] != self.stage:
            self.stage, self.rows, self.told = row["stage_index"], [], set()
        self.rows = (self.rows + [row])[-self.STEPS:]
        if "reward" not in row:
            return
        if row["logp_gap"] > self.rounding:
            self._tell("gap", f"{row['stage']}, step {row['stage_step']}: sampled and scored log-probabilities are "
                       f"{row['logp_gap']:.2g} apart, far above rounding: the generator samples another distribution "
                       "than the one that is trained (a repetition penalty, top_p, another temperature, old weights)")
        if len(self.rows) < self.STEPS:
            return
        mean = {name: sum(row[name] for row in self.rows) / self.STEPS
                for name in ("reward", "truncated", "equal_groups")}
        last = f"{row['stage']}, the last {self.STEPS} steps:"
        if mean["truncated"] > 0.5:
            self._tell("truncated", f"{last} {mean['truncated']:.0%} of the completions were cut before their end; raise "
                       "--max_completion_length, or start from a model that says less")
        if mean["reward"] == 0:
            self._tell("reward", f"{last} every reward was 0, so there is nothing to learn from; look at samples.jsonl, "
                       "and begin with an easier form or with a model that answers in the format")
        elif mean["equal_groups"] > 0.9:
            self._tell("equal", f"{last} in {mean['equal_groups']:.0%} of the groups all rewards were equal, and these "
                       "teach nothing; ask harder questions if they are all right, else easier ones, or raise "
                       "--num_generations or --temperature")

    def _tell(self, reason, sentence):
        """Say a sentence if its reason was not said in this stage."""
        if reason not in self.told:
            self.told.add(reason)
            say(sentence)


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
