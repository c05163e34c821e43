"""Data of Curr-ReFT: annotation files -> checked examples -> three forms of question -> token ids and image patches.

One annotation gives three questions of rising difficulty (paper, section 3.1); `derive` writes the first two:

    binary   Where is the cup? Is [28, 14, 84, 70] the right box?   <answer>yes</answer>
    choice   Where is the cup? Which of these is right? A. [0, ..   <answer>C</answer>
    open     Where is the cup?                                      <answer>{"bbox_2d": [28, 14, 84, 70]}</answer>

Two pixel spaces: annotations are in pixels of the original image; Qwen2.5-VL speaks pixels of the image as its
processor resized it, sides multiples of 28. `resize_box` converts, once, at load: then all boxes are in model pixels.
Rows of any known shape become one row in tools/shapes.py, image files are found and tried in tools/images.py.
Departure from the released code: a row that cannot be used is an error with file and line, not silently another row.

Shapes: P prompt tokens; a patch is 14 x 14 pixels x 3 channels x 2 frames = 1176 numbers; 4 patches, 1 image token.
"""
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from answers import MAX_ANSWER, extract_answer, offered_letters
from distributed import RunError, UserError, gather, say, world
from tasks import TASKS, kind, truth_of
from tools import doubts
from tools.images import image_roots, image_sizes, load_image, opened, rerooted, resolve_image
from tools.limits import limits
from tools.layout import check_names, declared_tasks, find_files, form_of, read_rows, task_of, tell_faults
from tools.shapes import BOX, bare, one_row

FORMS = ("binary", "choice", "open")
TEXTS = ["*.json", "*.jinja", "*.txt"]                  # what a checkpoint has beside its weights
MIN_PIXELS, MAX_PIXELS = 56 * 56, 401_408               # of a resized image: 4 to 512 image tokens
MAX_TEXT = 200_000                                      # characters of a question or truth
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RESERVED = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")     # <|im_end|>, <|image_pad|>, ..; half a character


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with its ground truth. Every box in `problem` and `solution` is in model pixels."""
    problem: str                                        # the question, without the format instruction
    solution: str                                       # truth: "..<answer>yes</answer>", or the bare answer
    task: str = "math"                                  # one of TASKS
    form: str = "open"                                  # one of FORMS
    images: tuple[str, ...] = ()                        # image files, in order
    size: tuple[int, int] | None = None                 # (width, height) of images[0] in model pixels
    where: str = ""                                     # "file:line"
    split: str = ""                                     # stem of its file: the name of a test split
    history: tuple[tuple[str, str], ...] = ()           # (role, text) of the turns before `problem`, chat rows only


# ---- Prompts: what the model is shown ----

def instruction(example: Example) -> str:
    """The format instruction after the problem: think, answer, and the rule of the example's form."""
    rule = kind(example).rule(example)
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
        missing += [] if _places_images(tokenizer) else ["a chat template with places for images"]
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


def checkpoint_folder(path) -> Path:
    """The directory of a checkpoint; of a hub name that of its newest revision, where small files are fetched to."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), allow_patterns=TEXTS))


def checkpoint_files(path) -> dict[str, bytes]:
    """Configs, tokenizer and templates of a checkpoint directory or hub name: {file name: content}."""
    folder = checkpoint_folder(path)
    return {file.name: file.read_bytes() for kind in TEXTS for file in folder.glob(kind)
            if file.name != "state.json" and not file.name.endswith(".index.json")}     # an index names other weights


def render(tokenizer, messages: list[dict], ask: bool = True) -> str:
    """Chat messages as the template writes them; `ask`: with the beginning of the answer. UserError if it cannot."""
    try:
        with limits("the chat template of the base model"):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except UserError:
        raise
    except Exception as error:                          # not narrower: a template may raise anything
        raise UserError(f"the chat template of the base model fails: {str(error).split(chr(10))[0]}") from error
    if len(text) > 10_000_000:
        raise UserError(f"the chat template of the base model makes {len(text):,} characters of a chat.")
    return text


def _places_images(tokenizer) -> bool:
    """Whether the chat template has a place for an image; that of Qwen's text models fails on a list of parts."""
    try:
        return "<|image_pad|>" in render(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])
    except UserError as error:
        if isinstance(error.__cause__, TimeoutError | MemoryError):
            raise
        return False


def check_text(text: str) -> None:
    """UserError if a text spells a special token, which would forge turns or images, is not Unicode, or has no end."""
    if found := RESERVED.search(text):
        raise UserError(f"the text holds {found[0]!r}, which the chat format cannot carry; remove it.")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text):,} characters, more than {MAX_TEXT:,}; shorten it.")


def taught(example: Example) -> str:
    """What a supervised stage teaches to answer: the solution, a bare truth within answer tags, read by the scorer."""
    if "<answer>" not in example.solution:
        return f"<answer>{kind(example).spell(example)}</answer>"
    before, _, rest = example.solution.partition("<answer>")
    answer, _, after = rest.partition("</answer>")
    spelled = kind(example).spell(example)
    return f"{before}<answer>{answer if answer.strip() == spelled else spelled}</answer>{after}"


# ---- Boxes, and truths that can be paid ----

def model_size(size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) that an image of `size` is resized to, multiples of 28: (640, 480) -> (644, 476)."""
    height, width = smart_resize(size[1], size[0], factor=28, min_pixels=MIN_PIXELS, max_pixels=max_pixels)
    return width, height


def resize_box(box, original: tuple[int, int], resized: tuple[int, int]) -> list[int]:
    """A box (x1, y1, x2, y2) of the `original` (width, height) in whole pixels of the `resized` image, never empty.

    [10, 20, 30, 40] of 100 x 100, resized to 112 x 84 -> [11, 17, 34, 34]
    """
    sx, sy = resized[0] / original[0], resized[1] / original[1]
    x1, y1, x2, y2 = round(box[0] * sx), round(box[1] * sy), round(box[2] * sx), round(box[3] * sy)
    return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]


def resize_boxes_in(text: str, original: tuple[int, int], resized: tuple[int, int], unmarked: bool = True) -> str:
    """`text` with `resize_box` applied to every four-number list in it, or only to those that "bbox_2d": marks."""
    def pixels(match):
        mark, *numbers = match.groups()
        box = resize_box([float(n) for n in numbers], original, resized)
        return f"{mark or ''}{box}" if mark or unmarked else match[0]
    return BOX.sub(pixels, text)


def answer_of(solution: str) -> str:
    """The answer in a ground truth: inside its only <answer> block, or all of a bare solution; UserError if none."""
    found = re.findall("<answer>(.*?)</answer>", solution, re.DOTALL)
    if len(found) > 1 or not found and re.search("<answer>|<think", solution):
        raise UserError("the solution needs exactly one closed <answer>..</answer>.")
    if not (answer := (found or [solution])[0].strip()):
        raise UserError("the answer in the solution is empty.")
    return answer


def check_truth(example: Example, original: tuple[int, int] | None) -> None:
    """UserError unless a reward can read the truth; `original`: (width, height) of the image that boxes refer to."""
    if TASKS[example.task].needs_image and original is None:
        raise UserError(f"a {example.task} row needs an image.")
    if (example.form, example.task) != ("open", "general"):     # whose reference may be prose, or a draft
        answer_of(example.solution)
    if fault := kind(example).fault(example, original):
        raise UserError(fault)


def check_payable(example: Example) -> None:
    """UserError if the truth, given as the answer, would not score 1: then no answer could."""
    answer = extract_answer(f"<answer>{kind(example).spell(example)}</answer>")
    if (example.form, example.task) != ("open", "general") and (
            answer is None or kind(example).accuracy(answer, truth_of(example)) < 1):
        raise UserError(f"its truth {truth_of(example)[:80]!r} does not score 1 when it is given as the answer, which "
                        f"has at most {MAX_ANSWER:,} characters and no tags; shorten or correct it.")


def in_model_pixels(example: Example, original: tuple[int, int], size: tuple[int, int]) -> Example:
    """The example with the boxes of its texts in pixels of the image at `size`; of tasks without boxes, the marked."""
    unmarked = TASKS[example.task].boxes
    texts = [example.problem, example.solution, *(text for _, text in example.history)]
    found = [box for text in texts for box in BOX.findall(text) if box[0] or unmarked]
    if len(example.images) > 1 and (found or unmarked):
        raise UserError(f"the row has boxes and {len(example.images)} images, and boxes can be told of one only.")
    if any(max(map(float, box[1:])) <= 1 for box in found):
        raise UserError(f"its boxes, such as [{', '.join(found[0][1:])}], are shares of the image; `python -m "
                        "tools.convert rows FILE --boxes fractions` writes them in pixels.")
    problem, solution, *history = (resize_boxes_in(text, original, size, unmarked) for text in texts)
    history = tuple((role, text) for (role, _), text in zip(example.history, history))
    return replace(example, problem=problem, solution=solution, history=history, size=size)


# ---- Reading files (shapes of rows: tools/shapes.py; image files: tools/images.py) ----

def load_examples(path, *, image_root=None, form=None, task=None, max_pixels=MAX_PIXELS, skip_bad_rows=False,
                  allow_outside=False, chat_task=None) -> list[Example]:
    """Examples of a file of rows of any known shape, or of all files in a folder but `*_test` ones.

    `form`, `task`: of rows that name none; the form is by default what the file's name says. `task` may name tasks by
    file, "math RefGTA=detection"; `chat_task`: that of chats where it is another. `image_root`: where image paths
    start, by default the folder that `path` is in. UserError lists every bad row, "file:line: its fault";
    `skip_bad_rows` drops them and says how many, unless the file as a whole seems to mean something else.
    """
    root, rows, faults, moved = Path(image_root or Path(path).parent), read_rows(path), {}, []
    read = partial(read_example, root=root, form=form, tasks=declared_tasks(task), chat_task=chat_task,
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
    boxes = doubts.boxes_of(drafts.values(), sizes)
    tell_faults(path, [f"{where}: {faults[where]}" for where, _ in rows if where in faults], len(rows),
                doubts.box_convention(boxes), skip_bad_rows and bool(examples))
    for sentence in doubts.in_a_file(list(examples.values()), boxes, moved):
        say(f"{path}: {sentence}")
    return list(examples.values())


def read_example(row, where, *, root, form, tasks, chat_task, allow_outside, moved: list) -> Example:
    """A row as an Example that is not checked yet: boxes in original pixels, images found but not opened."""
    row, file = one_row(row), Path(where.rpartition(":")[0])
    task = task_of(row, file, tasks, chat_task)
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
    if fault := next((sizes[image] for image in example.images if isinstance(sizes[image], str)), None):
        raise UserError(fault)
    original = sizes[example.images[0]] if example.images else None
    check_truth(example, original)
    example = in_model_pixels(example, original, model_size(original, max_pixels)) if original else example
    check_payable(example)
    return example


# ---- Three forms of one annotation ----

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
        same = not TASKS[self.example.task].boxes or None in (own, its) or own == its
        return [text if same else resize_boxes_in(text, own, its) for text in self.right[:lent]]

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
    check_names(cfg.task, [*files["train"].values(), *(file for _, file in files["test"].values()), path])
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
    for sentence in doubts.between([e for rows in train.values() for e in rows], tests):
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
