"""Data of Curr-ReFT: files of rows -> checked examples -> token ids and image patches.

Two pixel spaces: annotations are in pixels of the original image; Qwen2.5-VL speaks pixels of the image as
its processor resized it, sides multiples of 28. A task's `resize` converts, once, at load: then all
coordinates are in model pixels. Rows are read in support/rows.py, images are tried in support/images.py;
forms that have no file of their own are derived in forms.py. Departure from the released code: an unusable
row is an error with file and line, not another row.

Shapes: P prompt tokens; a patch is 14 x 14 pixels x 3 channels x 2 frames = 1176 numbers, a quarter image token.
"""

import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from forms import derive_all
from rewards import FORMS, TASKS, Example, resize_boxes, task_of
from support import warnings
from support.answers import BOX, MAX_ANSWER, extract_answer, truth_of
from support.base import MIN_PIXELS, SPECIAL, read_processors, render, save_processors
from support.boxes import boxes_in, doubt
from support.images import find_images, image_sizes, load_image, opened
from support.ranks import gather, world
from support.rows import (
    attempt, check_names, declared_tasks, find_files, form_of, read_rows, row_task, usable_rows)
from support.shapes import bare
from support.words import RunError, UserError, say

MAX_PIXELS = 401_408  # of a resized image: 512 image tokens
MAX_TEXT = 200_000  # characters of a question or truth
RESERVED = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")  # <|im_end|>, <|image_pad|>; half a character
PROSE = ("open", "general")  # form and task whose truth is a reference, maybe prose or a draft
VERDICTS = {"y": "yes", "t": "yes", "1": "yes", "n": "no", "f": "no", "0": "no"}  # as data may have them
NUMBER = re.compile(r"\b[1-9]")  # that a change of size changes: no 0, and no "_2d"


# ---- Prompts: what the model is shown ----

def instruction(example: Example) -> str:
    """The format instruction after the problem: think, answer, and the rule of its record."""
    return ("First think inside <think> </think>, then give the final answer inside <answer> "
            f"</answer>. {task_of(example).rule(example)}").strip()


def prompt_messages(example: Example) -> list[dict]:
    """Chat messages for the template: one user turn of images, problem, newline, instruction.

    Chat rows have their earlier turns before it.
    """
    turns = [*example.history, ("user", f"{example.problem}\n{instruction(example)}")]
    turns = with_places(turns, len(example.images))
    pieces = [(role, filter(None, re.split("(<image>)", text))) for role, text in turns]
    return [{"role": role, "content": [
        {"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
        for piece in content]} for role, content in pieces]


def with_places(turns: list[tuple], images: int) -> list[tuple]:
    """(role, text) turns in which each image has its `<image>`: first in the first question, unless told."""
    if any("<image>" in text for _, text in turns):
        return turns
    first = [role for role, _ in turns].index("user")
    return [*turns[:first], ("user", "<image>" * images + turns[first][1]), *turns[first + 1:]]


@dataclass
class Prompt:
    """What the model is given before it speaks. Patches have no batch axis: image after image."""
    input_ids: torch.Tensor  # (P,) int64, image tokens expanded
    pixel_values: torch.Tensor | None  # (patches, 1176) float32
    image_grid_thw: torch.Tensor | None  # (images, 3) int64: frames, rows, columns of patches
    example: Example | None = None  # what it was made of, for generators that want text and files
    position_ids: torch.Tensor | None = None  # (3, P) rotary positions, once they are known
    features: torch.Tensor | None = None  # (image tokens, H), not pixels: frozen vision tower


class Processor:
    """Tokenizer and image processor of a checkpoint (AutoProcessor would need torchvision)."""

    def __init__(self, tokenizer, image_processor, files):
        self.tokenizer, self.image_processor, self.files = tokenizer, image_processor, files
        ids = tokenizer.convert_tokens_to_ids(SPECIAL)
        self.end_ids = tuple(ids[:2])  # a completion ends at the first of either
        self.pad_id = ids[1]  # also an end token, so masks go by position, never by pad_id
        self.image_token_id, self.vision_ids = ids[2], ids[2:]
        self.max_pixels = image_processor.size["longest_edge"]  # of an image
        self.lengths = {}  # example -> tokens of its prompt, as far as known

    @classmethod
    def from_pretrained(cls, path, max_pixels: int | None = MAX_PIXELS) -> "Processor":
        """Read a directory or hub name; max_pixels None: what the checkpoint itself says."""
        return cls(*read_processors(path, max_pixels))

    def save_pretrained(self, path) -> None:
        """Write what stands beside the weights: the checkpoint's own files, with these limits."""
        save_processors(path, self.image_processor, self.files)

    def forbidden_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids that no completion may hold: special tokens but the end ones, ids without a token.

        Vision tokens stop the next forward pass; others are not seen in the text that is judged.
        """
        special = {*self.vision_ids, *self.tokenizer.all_special_ids} - set(self.end_ids)
        return (*sorted(special), *range(len(self.tokenizer), vocab_size))

    def __call__(self, example: Example) -> Prompt:
        """Tokens and patches. An image of 84 x 56 model pixels: 24 patches, 6 image tokens."""
        ids = self._unexpanded(example)
        if not example.images:
            return Prompt(torch.tensor(ids), None, None, example)
        shown = [self._shown(path, example) for path in example.images]
        if example.size not in (None, shown[0].size):
            raise UserError(f"{example.where}: its boxes were read for another max_pixels.")
        vision = self.image_processor(shown, return_tensors="pt")
        grid = vision["image_grid_thw"]  # an image of 84 x 56: [1, 4, 6]
        copies = iter((grid.prod(-1) // 4).tolist())
        ids = [i for token in ids for i in [token] * (next(copies) if token == self.image_token_id else 1)]
        return Prompt(torch.tensor(ids), vision["pixel_values"].float(), grid, example)

    def _unexpanded(self, example: Example) -> list[int]:
        """Prompt tokens with one token for each image."""
        messages = prompt_messages(example)
        check_text("".join(part.get("text", "") for turn in messages for part in turn["content"]))
        text = render(self.tokenizer, messages)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (places := ids.count(self.image_token_id)) != len(example.images):
            raise UserError(f"{example.where}: the prompt has {places} places for "
                            f"{len(example.images)} images.")
        return ids

    def _shown(self, path, example: Example) -> Image.Image:
        """An image at the size that is shown; RunError if it has gone bad since the start."""
        try:
            image = load_image(path)
        except UserError as error:
            raise RunError(f"{example.where}: {error}".removeprefix(": ")) from error
        size = model_size(image.size, self.max_pixels)
        return image.resize(size, Image.Resampling.BICUBIC)  # as transformers does, in less memory

    def prompt_lengths(self, examples) -> list[int]:
        """Tokens of each prompt, image tokens included; no image is decoded, none counted twice."""
        new = [example for example in dict.fromkeys(examples) if example not in self.lengths]
        for example in tqdm(new, "prompts", leave=False, delay=2, disable=bool(world()[0]) or None):
            self.lengths[example] = len(self._unexpanded(example)) + self._image_tokens(example)
        return [self.lengths[example] for example in examples]

    def _image_tokens(self, example: Example) -> int:
        """Tokens of its images beside the one of each place, by sizes or the files' headers."""
        sizes = [example.size] if example.size else []
        for path in example.images[len(sizes):]:
            with opened(path) as image:
                sizes.append(model_size(image.size, self.max_pixels))
        return sum(width * height // 784 - 1 for width, height in sizes)

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response, <|im_end|> last. Special tokens spelled in `text` stay ordinary."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.end_ids[0]]

    def decode(self, ids) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_text(text: str) -> None:
    """UserError if a text spells a special token, a forged turn or image, or has no end."""
    if found := RESERVED.search(text):
        raise UserError(f"the text holds {found[0]!r}, which the format cannot carry; remove it.")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text):,} characters, not {MAX_TEXT:,} at most.")


def taught(example: Example) -> str:
    """What a supervised stage teaches: the solution, its answer as the scorer reads it, in tags."""
    before, tag, rest = example.solution.partition("<answer>")
    after = rest.partition("</answer>")[2]
    spelled = f"<answer>{task_of(example).spell(example)}</answer>"
    return f"{before}{spelled}{after}" if tag else spelled


# ---- Coordinates, and truths that can be paid ----

def model_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) that an image is resized to, multiples of 28: (640, 480) -> (644, 476)."""
    height, width = smart_resize(size[1], size[0], factor=28, min_pixels=MIN_PIXELS, max_pixels=max_pixels)
    return width, height


def answer_of(solution: str) -> str:
    """The answer in a ground truth: inside its only <answer> block, or all of a bare solution."""
    found = re.findall("<answer>(.*?)</answer>", solution, re.DOTALL)
    if len(found) > 1 or not found and re.search("<answer>|<think", solution):
        raise UserError("the solution needs exactly one closed <answer>..</answer>.")
    if not (answer := (found or [solution])[0].strip()):
        raise UserError("the answer in the solution is empty.")
    return answer


def check_truth(example: Example, image_size: tuple[int, int] | None) -> None:
    """UserError unless a reward can read the truth; image_size: (width, height) of the original."""
    record = TASKS[example.task]
    if record.resize and image_size is None:
        raise UserError(f"a {example.task} row needs an image.")
    if (example.form, example.task) != PROSE:
        answer_of(example.solution)
    if sentence := task_of(example).truth_error(example, image_size):
        raise UserError(sentence)
    if not record.resize or example.form != "open":
        return
    right = record.right(example) if record.right else []
    for text in [truth_of(example), record.spell(example), *right]:
        if NUMBER.search(text) and not has_places(text, record.resize):
            raise UserError(f"the `resize` of task {example.task} finds no coordinates in "
                            f"{text[:80]!r}: they would stay in pixels of another size.")


def has_places(text: str, resize) -> bool:
    """Whether a task's `resize` finds coordinates in a text: it changes them with the size."""
    return resize(text, (1, 1), (2, 2)) != text


def check_payable(example: Example) -> None:
    """UserError if the truth, given as the answer, would not score 1: then no answer could."""
    record, truth = task_of(example), truth_of(example)
    answer = extract_answer(f"<answer>{record.spell(example)}</answer>")
    paid = answer is not None and record.accuracy(answer, truth) == 1
    if not paid and (example.form, example.task) != PROSE:
        raise UserError(f"its truth {truth[:80]!r} does not score 1 when it is given as the answer "
                        f"(of at most {MAX_ANSWER:,} characters, without tags); correct it.")


def in_model_pixels(example: Example, image_size, size: tuple[int, int]) -> Example:
    """The example with the coordinates of its texts in pixels of the image at `size`.

    By its task's `resize`; of tasks without one only boxes that "bbox_2d": marks are coordinates.
    """
    resize = TASKS[example.task].resize or partial(resize_boxes, marked_only=True)
    texts = [example.problem, example.solution, *(text for _, text in example.history)]
    if TASKS[example.task].resize or any(has_places(text, resize) for text in texts):
        if len(example.images) > 1:
            raise UserError(f"the row has coordinates and {len(example.images)} images; of which?")
        for _, *numbers in BOX.findall("\n".join(texts)):
            if max(map(float, numbers)) <= 1:
                raise UserError(f"its box [{', '.join(numbers)}] is in shares of the image; `python"
                                " -m tools.convert rows FILE --boxes fractions` writes pixels.")
    problem, solution, *history = (resize(text, image_size, size) for text in texts)
    history = tuple((role, text) for (role, _), text in zip(example.history, history))
    return replace(example, problem=problem, solution=solution, history=history, size=size)


# ---- Reading files ----

def load_examples(path, *, image_root=None, form=None, task=None, max_pixels=MAX_PIXELS,
                  skip_bad_rows=False, allow_outside=False, chat_task=None) -> list[Example]:
    """Examples of a file of rows of any known shape, or of all files in a folder but `*_test` ones.

    `form`, `task`: of rows that name none; the form is by default what the file's name says. `task` may name
    tasks by file, "math RefGTA=detection"; `chat_task`: that of chats where it is another. `image_root`:
    where image paths start, by default the folder that `path` is in. UserError lists every bad row with file
    and line; `skip_bad_rows` drops and counts them, unless the file as a whole seems to mean something else.
    """
    root, rows, elsewhere = Path(image_root or Path(path).parent), read_rows(path), []
    read = partial(read_example, root=root, form=form, tasks=declared_tasks(task, TASKS),
                   chat_task=chat_task, allow_outside=allow_outside, elsewhere=elsewhere)
    drafts = [(where, attempt(read, row, where)) for where, row in rows]
    found = [draft for _, draft in drafts if isinstance(draft, Example)]
    if own := {row["task"] for _, row in rows if isinstance(row, dict) and row["task"]} - {*TASKS}:
        say(f"{path}: tasks named {', '.join(sorted(own))} are read as --task says")
    sizes = image_sizes(image for draft in found for image in draft.images)
    results = [(where, attempt(checked, draft, sizes, max_pixels)) for where, draft in drafts]
    stated = {file_of(where) for where, row in rows if isinstance(row, dict) and row["box_format"]}
    conventions = box_conventions(found, sizes, stated)
    usable = usable_rows(path, results, [refused for refused, _ in conventions if refused], skip_bad_rows)
    placed = {name for name, record in TASKS.items() if record.resize}
    for sentence in [told for _, told in conventions if told] + warnings.in_a_file(usable, elsewhere, placed):
        say(f"{path}: {sentence}")
    return usable


def file_of(where: str) -> str:
    """The file of "file:line"."""
    return where.rpartition(":")[0]


def said_of(example: Example) -> str:
    """All texts of an example that boxes may stand in."""
    return "\n".join([*(text for _, text in example.history), example.problem, truth_of(example)])


def box_conventions(drafts, sizes: dict, stated: set) -> list[tuple[str, str]]:
    """(why a file is refused, or what is told of it), "" for none, by the boxes of each file; stated: files
    that say how they write them."""
    boxes = {}
    for draft in drafts:
        size = sizes[draft.images[0]] if draft.images and TASKS[draft.task].resize else None
        if isinstance(size, tuple):
            found = boxes_in(said_of(draft))
            boxes.setdefault(file_of(draft.where), []).extend((box, size) for box in found)
    return [doubt(found, stated=file in stated, command=f"python -m tools.convert rows {file}")
            for file, found in boxes.items()]


def read_example(row, where, *, root, form, tasks, chat_task=None, allow_outside=False, elsewhere) -> Example:
    """A row as an Example that is not checked yet: original pixels, images found but not opened.

    `elsewhere`, a list, gets the names of images that are paths of another machine. UserError for a row that
    is one, or cannot be used.
    """
    if isinstance(row, UserError):
        raise row
    file = Path(file_of(where))
    if row["box_format"] not in (None, "xyxy"):
        raise UserError(f'its "box_format" is {row["box_format"]!r}, not xyxy; `python -m tools.convert rows` '
                        "writes such boxes.")
    task = row_task(row, file, tasks, TASKS, chat_task) or ("general" if row["chat"] else None)
    if task not in TASKS:
        raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it.')
    free = task == "general" and row["chat"]
    if (form := row["form"] or ("open" if free else form or form_of(file.stem))) not in FORMS:
        raise UserError(f'its "form" is {form!r}, not one of {", ".join(FORMS)}.')
    problem, history = row["problem"], row["history"]
    solution = row["solution"] if task == "general" else bare(row["solution"])
    if form == "binary":
        solution = VERDICTS.get(solution.lower(), solution)
    texts = [problem, *(text for _, text in history)]
    check_text("".join([solution, *texts]))
    images, n = find_images(row["images"], root, file, allow_outside, elsewhere), len(row["images"])
    if (places := "".join(texts).count("<image>")) not in (0, n):
        raise UserError(f"the text says <image> {places} times, but the row has {n} images.")
    if not history:  # images come first without a place
        problem = re.sub(r"^(\s*<image>\s*){%d}" % n, "", problem)
    return Example(problem=problem, solution=solution, task=task, form=form, images=images,
                   where=where, split=file.stem, history=tuple(history))


def checked(example: Example, sizes: dict, max_pixels: int = MAX_PIXELS) -> Example:
    """An example in model pixels, if its images, coordinates and truth can be used; else UserError.

    sizes: {image: (width, height) in original pixels, or a sentence why it cannot be shown}.
    """
    for image in example.images:
        if isinstance(sizes[image], str):
            raise UserError(sizes[image])
    image_size = sizes[example.images[0]] if example.images else None
    check_truth(example, image_size)
    if image_size:
        example = in_model_pixels(example, image_size, model_size(image_size, max_pixels))
    check_payable(example)
    return example


# ---- Order ----

def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which of `n` examples are the global batch at `step` of an endless stream of shuffled epochs.

    A function of its arguments alone, so a resumed run needs no state; a batch may straddle epochs.
    """
    places = range(step * batch, (step + 1) * batch)
    return [_epoch(n, place // n, seed)[place % n] for place in places]


@lru_cache(maxsize=4)
def _epoch(n: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of range(n)."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(n), n))


# ---- All that a run will need ----

def load_data(cfg):
    """({stage name: examples}, test examples, questions) of a run: all that it will need."""
    files, options = find_files(cfg.data), {
        "image_root": cfg.image_root or cfg.data, "task": cfg.task, "max_pixels": cfg.max_pixels,
        "skip_bad_rows": cfg.skip_bad_rows, "allow_outside": cfg.allow_outside}
    path = cfg.questions or files["questions"]
    paths = [*files["train"].values(), *(file for _, file in files["test"].values()), path]
    check_names(declared_tasks(cfg.task, TASKS), paths)
    stages = {stage.name: stage.forms or ("open",) for stage in cfg.curriculum}  # sft: open
    reject = stages.pop("reject", None)
    train = training_forms(files["train"], set().union(*stages.values()), cfg.seed, **options)
    examples = {name: [e for form in forms for e in train[form]] for name, forms in stages.items()}
    if reject and not path:
        raise UserError(f"--data {cfg.data} has no questions for the reject stage; name a file "
                        "with --questions")
    questions = load_examples(path, chat_task="general", **options) if reject else []
    tests = []  # every split's rows, labeled with its name
    for split, (form, file) in files["test"].items():
        rows = [replace(e, split=split) for e in load_examples(file, form=form, **options)]
        tests += rows[:cfg.eval_limit or None]
    for sentence in warnings.between([e for rows in train.values() for e in rows], tests, questions):
        say(f"{cfg.data}: {sentence}")
    return examples, tests, questions


def training_forms(files: dict, forms, seed: int = 0, **options) -> dict[str, list[Example]]:
    """{form: training examples}, from the form's own file or else derived from the open one."""
    forms = [form for form in FORMS if form in forms]
    from_open = "open" in forms or not all(files.get(form) for form in forms)
    found = {form: load_examples(file, form=form, **options) for form, file in files.items()
             if file and (form in forms or form == "open" and from_open)}
    for form in forms:
        if form not in found and "open" not in found:
            raise UserError(f"--stages needs a training file of {form} questions, and the data has "
                            "neither one nor open questions to derive them from.")
        found[form] = found.get(form) or derive_all(
            found["open"], form, seed, options.get("skip_bad_rows", False))
    return found


def refuse_long_prompts(cfg, processor, examples):
    """The examples whose prompts fit; UserError for others, unless --skip_bad_rows drops them."""
    rank, ranks = world()
    parts = gather(processor.prompt_lengths(examples[rank::ranks]))  # ranks share the work
    for start, part in enumerate(parts):
        processor.lengths.update(zip(examples[start::ranks], part))
    lengths, most = processor.prompt_lengths(examples), cfg.max_prompt_length
    long = [f"{e.where} ({n} tokens)" for e, n in zip(examples, lengths) if n > most]
    if long and not (cfg.skip_bad_rows and len(long) < len(examples)):
        raise UserError(f"{len(long)} prompts are longer than --max_prompt_length {most}: "
                        f"{', '.join(long[:5])}. Raise it, lower --max_pixels, or drop them with "
                        "--skip_bad_rows")
    if long:
        say(f"dropped {len(long)} of {len(examples)} prompts longer than {most} tokens")
    return [e for e, n in zip(examples, lengths) if n <= most]
