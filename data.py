"""Data of Curr-ReFT: files of rows -> checked examples -> token ids and image patches; all that a run will need.

Two pixel spaces: annotations are in pixels of the original image; Qwen2.5-VL speaks pixels of the image as its
processor resized it, sides multiples of 28. A task's `resize` converts, once, at load: then all boxes are in model pixels.
Files and rows are read in support/rows.py, image files are found and tried in support/images.py; forms that have no file
of their own are derived in forms.py.
Departure from the released code: a row that cannot be used is an error with file and line, not silently another row.

Shapes: P prompt tokens; a patch is 14 x 14 pixels x 3 channels x 2 frames = 1176 numbers; 4 patches, 1 image token.
"""

import json
import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil, smart_resize)

from forms import derive_all
from rewards import FORMS, TASKS, Example, resize_boxes, task_of
from support import warnings
from support.answers import BOX, MAX_ANSWER, extract_answer, truth_of
from support.base import checkpoint_files, places_images, render
from support.images import image_roots, image_sizes, load_image, opened, rerooted, resolve_image
from support.ranks import gather, world
from support.rows import (
    bare, check_names, declared_tasks, find_files, form_of, one_row, read_rows, row_task,
    tell_faults)
from support.words import RunError, UserError, say

MIN_PIXELS, MAX_PIXELS = 56 * 56, 401_408               # of a resized image: 4 to 512 image tokens
MAX_TEXT = 200_000                                      # characters of a question or truth
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESERVED = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")     # <|im_end|>, <|image_pad|>, ..; half a character


# ---- Prompts: what the model is shown ----

def instruction(example: Example) -> str:
    """The format instruction after the problem: think, answer, and the rule of the example's form."""
    rule = task_of(example).rule(example)
    think = "First think inside <think> </think>, then give the final answer inside <answer> </answer>."
    return f"{think} {rule}" if rule else think


def prompt_messages(example: Example) -> list[dict]:
    """Chat messages for the checkpoint's template: one user turn of images, problem, newline, instruction.

    Chat rows have their earlier turns before it. Where a text says `<image>`, the images stand there, not first.
    """
    turns = [*example.history, ("user", f"{example.problem}\n{instruction(example)}")]
    if not any("<image>" in text for _, text in turns):
        first = [role for role, _ in turns].index("user")
        turns[first] = ("user", "<image>" * len(example.images) + turns[first][1])
    return [{"role": role, "content": [{"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
                                       for piece in re.split("(<image>)", text) if piece]} for role, text in turns]


@dataclass
class Prompt:
    """What the model is given before it speaks. Patches have no batch axis: all images', one after the other."""
    input_ids: torch.Tensor                             # (P,) int64, image tokens expanded
    pixel_values: torch.Tensor | None                   # (patches, 1176) float32
    image_grid_thw: torch.Tensor | None                 # (images, 3) int64: frames, rows, columns of patches
    example: Example | None = None                      # what it was made of, for generators that want text and files
    position_ids: torch.Tensor | None = None            # (3, P) rotary positions, once they are known (engine.py)
    features: torch.Tensor | None = None                # (image tokens, H) in place of pixels: frozen vision tower


class Processor:
    """Tokenizer and image processor of a Qwen2.5-VL checkpoint (transformers' AutoProcessor needs torchvision)."""
    SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")

    def __init__(self, tokenizer, image_processor, files):
        self.tokenizer, self.image_processor, self.files = tokenizer, image_processor, files
        ids = tokenizer.convert_tokens_to_ids(list(self.SPECIAL))
        self.end_ids = tuple(ids[:2])                   # a completion ends at the first of either
        self.pad_id = ids[1]                            # also an end token, so masks go by position, never by pad_id
        self.image_token_id, self.vision_ids = ids[2], ids[2:]
        self.lengths = {}                               # example -> tokens of its prompt, as far as known

    @classmethod
    def from_pretrained(cls, path, max_pixels: int | None = MAX_PIXELS) -> "Processor":
        """Read a directory or hub name. UserError if it is no Qwen2.5-VL checkpoint or lacks a part.

        max_pixels: of an image at most, MIN_PIXELS at least; None: what the checkpoint itself says.
        """
        if max_pixels is not None and max_pixels < MIN_PIXELS:
            raise UserError(f"max_pixels is {max_pixels}, but an image takes at least {MIN_PIXELS}.")
        try:
            if (model_type := AutoConfig.from_pretrained(path, trust_remote_code=False).model_type) != "qwen2_5_vl":
                raise ValueError(f"its model type is {model_type}")
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
            files = checkpoint_files(path)
            if "chat_template.json" in files:           # the template of Qwen2.5-VL's tokenizer knows tools, no images
                tokenizer.chat_template = json.loads(files["chat_template.json"])["chat_template"]
        except Exception as error:                      # not narrower: a broken tokenizer.json raises Exception itself
            raise UserError(f"{path} is no complete Qwen2.5-VL checkpoint: {str(error).split(chr(10))[0]}") from error
        vocabulary = tokenizer.get_vocab()              # once: it is made anew, 151,665 entries of it
        missing = [token for token in cls.SPECIAL if token not in vocabulary]
        missing += [] if places_images(tokenizer) else ["a chat template with places for images"]
        if missing:
            raise UserError(f"{path} is no Qwen2.5-VL checkpoint: its tokenizer lacks {', '.join(missing)}.")
        if hidden := [tag for tag in TAGS if tag not in tokenizer.decode(tokenizer(tag)["input_ids"], True)]:
            raise UserError(f"{path}: {' and '.join(hidden)} are special tokens of its tokenizer, which are left out "
                            "of the text that rewards read. Make them ordinary ones (special: false in tokenizer.json "
                            "and tokenizer_config.json)")
        # Only now: a checkpoint's own min_pixels and max_pixels would win over a size given to the loader.
        most = max_pixels or image_processor.size["longest_edge"]
        image_processor.size = {"shortest_edge": MIN_PIXELS, "longest_edge": most}
        return cls(tokenizer, image_processor, files)

    @property
    def max_pixels(self) -> int:
        """Pixels of an image at most."""
        return self.image_processor.size["longest_edge"]

    def save_pretrained(self, path) -> None:
        """Write what stands beside the weights: the checkpoint's own files, with this run's pixel limits.

        Training changes weights alone, so whatever opens the checkpoint opens the result: older transformers, vLLM, ..
        The limits stand wherever one of them looks, or it would show images, and read boxes, in other pixels: `size` is
        read by transformers 5, the two others by 4.49 to 4.52, and AutoProcessor prefers processor_config.json.
        """
        self.image_processor.save_pretrained(path)
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)
        size = self.image_processor.size
        limits = {"size": dict(size), "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        for name in {"preprocessor_config.json", "processor_config.json"} & set(self.files):
            settings = json.loads(self.files[name])
            (settings.setdefault("image_processor", {}) if name[:4] == "proc" else settings).update(limits)
            (Path(path) / name).write_text(json.dumps(settings, indent=2))

    def forbidden_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids that no completion may hold: special tokens but the end ones, and ids without a token.

        Of vision tokens the next forward pass would raise; others would not be seen in the text that is judged.
        """
        special = {*self.vision_ids, *self.tokenizer.all_special_ids} - set(self.end_ids)
        return (*sorted(special), *range(len(self.tokenizer), vocab_size))

    def __call__(self, example: Example) -> Prompt:
        """Tokens and patches. An image of 84 x 56 model pixels: grid (1, 4, 6), 24 patches, 24 // 4 image tokens."""
        ids = self._unexpanded(example)
        if not example.images:
            return Prompt(torch.tensor(ids), None, None, example)
        vision = self.image_processor([self._shown(path, example) for path in example.images], return_tensors="pt")
        _, rows, columns = vision["image_grid_thw"][0].tolist()
        if example.size not in (None, (14 * columns, 14 * rows)):
            raise UserError(f"{example.where}: boxes were read for another max_pixels than this processor's.")
        copies = iter((vision["image_grid_thw"].prod(-1) // 4).tolist())
        ids = [i for token in ids for i in [token] * (next(copies) if token == self.image_token_id else 1)]
        return Prompt(torch.tensor(ids), vision["pixel_values"].float(), vision["image_grid_thw"], example)

    def _unexpanded(self, example: Example) -> list[int]:
        """Prompt tokens with one token for each image."""
        messages = prompt_messages(example)
        check_text("".join(part.get("text", "") for turn in messages for part in turn["content"]))
        text = render(self.tokenizer, messages)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (places := ids.count(self.image_token_id)) != len(example.images):
            raise UserError(f"{example.where}: the prompt has {places} places for {len(example.images)} images.")
        return ids

    def _shown(self, path, example: Example) -> Image.Image:
        """An image at the size that the model is shown; RunError if it has gone bad since the start looked at it."""
        try:
            image = load_image(path)
        except UserError as error:
            raise RunError(f"{example.where}: {error}".removeprefix(": ")) from error
        size = model_size(image.size, self.image_processor.size["longest_edge"])
        return image.resize(size, Image.Resampling.BICUBIC)     # as the image processor does, at its cost of memory

    def prompt_lengths(self, examples) -> list[int]:
        """Tokens of each prompt, image tokens included; no image is decoded, and no example is tokenized twice."""
        new = [example for example in dict.fromkeys(examples) if example not in self.lengths]
        bar = tqdm(new, "prompts", leave=False, delay=2, disable=bool(world()[0]) or None)
        self.lengths.update((example, len(self._unexpanded(example)) + self._image_tokens(example)) for example in bar)
        return [self.lengths[example] for example in examples]

    def prompt_length(self, example: Example) -> int:
        """`prompt_lengths` of one example."""
        return self.prompt_lengths([example])[0]

    def _image_tokens(self, example: Example) -> int:
        """Tokens of the example's images beside the one of each place, by known sizes or else by the files' headers."""
        sizes = [example.size] if example.size else []
        for path in example.images[len(sizes):]:
            with opened(path) as image:
                sizes.append(model_size(image.size, self.image_processor.size["longest_edge"]))
        return sum(width * height // 784 - 1 for width, height in sizes)

    def response_ids(self, text: str) -> list[int]:
        """Tokens of a response, <|im_end|> last. Special tokens spelled out in `text` stay ordinary text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.end_ids[0]]

    def decode(self, ids) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_text(text: str) -> None:
    """UserError if a text spells a special token, which would forge turns or images, is not Unicode, or has no end."""
    if found := RESERVED.search(text):
        raise UserError(f"the text holds {found[0]!r}, which the chat format cannot carry; remove it.")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text):,} characters, more than {MAX_TEXT:,}; shorten it.")


def taught(example: Example) -> str:
    """What a supervised stage teaches to answer: the solution, a bare truth within answer tags, read by the scorer."""
    if "<answer>" not in example.solution:
        return f"<answer>{task_of(example).spell(example)}</answer>"
    before, _, rest = example.solution.partition("<answer>")
    answer, _, after = rest.partition("</answer>")
    spelled = task_of(example).spell(example)
    return f"{before}<answer>{answer if answer.strip() == spelled else spelled}</answer>{after}"


# ---- Boxes, and truths that can be paid ----

def model_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) that an image of `size` is resized to, multiples of 28: (640, 480) -> (644, 476)."""
    height, width = smart_resize(size[1], size[0], factor=28, min_pixels=MIN_PIXELS, max_pixels=max_pixels)
    return width, height


def answer_of(solution: str) -> str:
    """The answer in a ground truth: inside its only <answer> block, or all of a bare solution; UserError if none."""
    found = re.findall("<answer>(.*?)</answer>", solution, re.DOTALL)
    if len(found) > 1 or not found and re.search("<answer>|<think", solution):
        raise UserError("the solution needs exactly one closed <answer>..</answer>.")
    if not (answer := (found or [solution])[0].strip()):
        raise UserError("the answer in the solution is empty.")
    return answer


def check_truth(example: Example, image_size: tuple[int, int] | None) -> None:
    """UserError unless a reward can read the truth; image_size: (width, height) in pixels of the original image."""
    if TASKS[example.task].resize and image_size is None:
        raise UserError(f"a {example.task} row needs an image.")
    if (example.form, example.task) != ("open", "general"):     # whose reference may be prose, or a draft
        answer_of(example.solution)
    if sentence := task_of(example).truth_error(example, image_size):
        raise UserError(sentence)


def check_payable(example: Example) -> None:
    """UserError if the truth, given as the answer, would not score 1: then no answer could."""
    answer = extract_answer(f"<answer>{task_of(example).spell(example)}</answer>")
    if (example.form, example.task) != ("open", "general") and (
            answer is None or task_of(example).accuracy(answer, truth_of(example)) < 1):
        raise UserError(f"its truth {truth_of(example)[:80]!r} does not score 1 when it is given as the answer, which "
                        f"has at most {MAX_ANSWER:,} characters and no tags; shorten or correct it.")


def in_model_pixels(example: Example, original: tuple[int, int], size: tuple[int, int]) -> Example:
    """The example with the coordinates of its texts in pixels of the image at `size`.

    By its task's `resize`; of tasks without one only boxes that "bbox_2d": marks are coordinates.
    """
    resize = TASKS[example.task].resize or partial(resize_boxes, marked_only=True)
    texts = [example.problem, example.solution, *(text for _, text in example.history)]
    problem, solution, *history = moved = [resize(text, original, size) for text in texts]
    found = [box for text in texts for box in BOX.findall(text)]
    if len(example.images) > 1 and (moved != texts or TASKS[example.task].resize):
        raise UserError(f"the row has boxes and {len(example.images)} images, and boxes can be told of one only.")
    if moved != texts and found and any(max(map(float, box[1:])) <= 1 for box in found):
        raise UserError(f"its boxes, such as [{', '.join(found[0][1:])}], are shares of the image; `python -m "
                        "tools.convert rows FILE --boxes fractions` writes them in pixels.")
    history = tuple((role, text) for (role, _), text in zip(example.history, history))
    return replace(example, problem=problem, solution=solution, history=history, size=size)


# ---- Reading files ----

def load_examples(path, *, image_root=None, form=None, task=None, max_pixels=MAX_PIXELS, skip_bad_rows=False,
                  allow_outside=False, chat_task=None) -> list[Example]:
    """Examples of a file of rows of any known shape, or of all files in a folder but `*_test` ones.

    `form`, `task`: of rows that name none; the form is by default what the file's name says. `task` may name tasks by
    file, "math RefGTA=detection"; `chat_task`: that of chats where it is another. `image_root`: where image paths
    start, by default the folder that `path` is in. UserError lists every bad row, "file:line: its fault";
    `skip_bad_rows` drops them and says how many, unless the file as a whole seems to mean something else.
    """
    root, rows, faults, moved = Path(image_root or Path(path).parent), read_rows(path), {}, []
    read = partial(read_example, root=root, form=form, tasks=declared_tasks(task, TASKS), chat_task=chat_task,
                   allow_outside=allow_outside, moved=moved)

    def each(function, items):
        """{where: function(item, where)} of the items that it accepts; what is wrong with the others joins `faults`."""
        done = {}
        for where, item in items:
            try:
                done[where] = function(item, where)
            except UserError as error:
                faults[where] = str(error)
        return done

    drafts = each(read, rows)
    sizes = image_sizes([image for example in drafts.values() for image in example.images], root)
    examples = each(lambda example, _: checked(example, sizes, max_pixels), drafts.items())
    boxes = [(tuple(map(float, numbers)), sizes[example.images[0]]) for example in drafts.values()
             if TASKS[example.task].resize and example.images and not isinstance(sizes[example.images[0]], str)
             for _, *numbers in BOX.findall(truth_of(example))]
    tell_faults(path, [f"{where}: {faults[where]}" for where, _ in rows if where in faults], len(rows),
                warnings.box_convention(boxes), skip_bad_rows and bool(examples))
    for sentence in warnings.in_a_file(list(examples.values()), boxes, moved, {n for n, task in TASKS.items() if task.resize}):
        say(f"{path}: {sentence}")
    return list(examples.values())


def read_example(row, where, *, root, form, tasks, chat_task, allow_outside, moved: list) -> Example:
    """A row as an Example that is not checked yet: boxes in original pixels, images found but not opened."""
    row, file = one_row(row), Path(where.rpartition(":")[0])
    task = row_task(row, file, tasks, chat_task)
    if task not in TASKS:
        raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it for rows without.')
    form = row["form"] or ("open" if task == "general" and row["chat"] else form or form_of(file.stem))
    if form not in FORMS:
        raise UserError(f'its "form" is {form!r}, not one of {", ".join(FORMS)}.')
    problem, history = row["problem"], row["history"]
    solution = row["solution"] if task == "general" else bare(row["solution"])
    check_text("".join([problem, solution, *(text for _, text in history)]))
    images = [resolve_image(name, image_roots(root, file), allow_outside) for name in row["images"]]
    moved += [image for image, name in zip(images, row["images"]) if rerooted(name, image)]
    found = sum(text.count("<image>") for text in (problem, *(text for _, text in history)))
    if found not in (0, len(images)):
        raise UserError(f"the text says <image> {found} times, but the row has {len(images)} images.")
    if not history:                                     # images come first without being told
        problem = re.sub(r"^(\s*<image>\s*){%d}" % len(images), "", problem)
    return Example(problem=problem, solution=solution, task=task, form=form, images=tuple(images), where=where,
                   split=file.stem, history=tuple(history))


def checked(example: Example, sizes: dict, max_pixels: int = MAX_PIXELS) -> Example:
    """An example with its boxes in model pixels, if its images, boxes and truth can be used; else UserError.

    sizes: {image: (width, height) in original pixels, or a sentence that says why the model cannot be shown it}.
    """
    if sentence := next((sizes[image] for image in example.images if isinstance(sizes[image], str)), None):
        raise UserError(sentence)
    original = sizes[example.images[0]] if example.images else None
    check_truth(example, original)
    example = in_model_pixels(example, original, model_size(original, max_pixels)) if original else example
    check_payable(example)
    return example


# ---- Order ----

def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which of `n` examples are the global batch at `step` (from 0) of an endless stream of shuffled epochs.

    A function of its arguments alone, so a resumed run needs no state. A batch may straddle two epochs.
    """
    return [_epoch(n, position // n, seed)[position % n] for position in range(step * batch, (step + 1) * batch)]


@lru_cache(maxsize=4)
def _epoch(n: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of range(n)."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(n), n))


# ---- All that a run will need ----

def load_data(cfg):
    """Read and check every file the run will need, before any model is loaded.

    Returns (stage name -> examples, test examples, questions). A form without a file is derived from the open one.
    """
    files, options = find_files(cfg.data), {
        "image_root": cfg.image_root or cfg.data, "task": cfg.task, "max_pixels": cfg.max_pixels,
        "skip_bad_rows": cfg.skip_bad_rows, "allow_outside": cfg.allow_outside}
    path = cfg.questions or files["questions"]
    check_names(declared_tasks(cfg.task, TASKS), [*files["train"].values(), *(file for _, file in files["test"].values()), path])
    forms = {stage.name: stage.forms or (("open",) if stage.name == "sft" else ()) for stage in cfg.curriculum}
    train = training_forms(files["train"], {form for each in forms.values() for form in each}, cfg.seed, **options)
    examples = {name: [e for form in each for e in train[form]] for name, each in forms.items() if each}
    questions = []
    if "reject" in forms:
        if not path:
            raise UserError(f"--data {cfg.data}: no question file for the reject stage; name one with --questions")
        questions = load_examples(path, chat_task="general", **options)
    tests = []  # every split's rows, labeled with its name
    for split, (form, file) in files["test"].items():
        rows = [replace(e, split=split) for e in load_examples(file, form=form, **options)]
        tests += rows[:cfg.eval_limit or None]
    for sentence in warnings.between([e for rows in train.values() for e in rows], tests):
        say(f"{cfg.data}: {sentence}")
    return examples, tests, questions


def training_forms(files: dict, forms, seed: int = 0, **options) -> dict[str, list[Example]]:
    """{form: training examples} for `forms`: read from the form's own file, or else derived from the open one."""
    forms = [form for form in FORMS if form in forms]
    from_open = "open" in forms or not all(files.get(form) for form in forms)
    found = {form: load_examples(file, form=form, **options) for form, file in files.items()
             if file and (form in forms or form == "open" and from_open)}
    for form in forms:
        if form not in found and "open" not in found:
            raise UserError(f"--stages needs a training file of {form} questions, which the data has not" + (
                            "." if form == "open" else ", nor an open one to derive them from."))
        found[form] = found.get(form) or derive_all(found["open"], form, seed, options.get("skip_bad_rows", False))
    return found


def refuse_long_prompts(cfg, processor, examples):
    """The examples whose prompts fit; UserError if any does not, unless --skip_bad_rows drops and counts them."""
    rank, ranks = world()
    for start, part in enumerate(gather(processor.prompt_lengths(examples[rank::ranks]))):     # ranks share the work
        processor.lengths.update(zip(examples[start::ranks], part))
    lengths = processor.prompt_lengths(examples)
    long = [f"{e.where} ({n} tokens)" for e, n in zip(examples, lengths) if n > cfg.max_prompt_length]
    if long and not (cfg.skip_bad_rows and len(long) < len(examples)):
        named = ", ".join(long[:5])
        raise UserError(f"{len(long)} prompts are longer than --max_prompt_length {cfg.max_prompt_length}: {named}. "
                        "Raise it, lower --max_pixels, or drop them with --skip_bad_rows")
    if long:
        say(f"dropped {len(long)} of {len(examples)} prompts longer than {cfg.max_prompt_length} tokens")
    return [e for e, n in zip(examples, lengths) if n <= cfg.max_prompt_length]
