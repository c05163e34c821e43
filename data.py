"""Data of Curr-ReFT: annotation files -> checked examples -> three forms of question -> token ids and image patches.

One annotation gives three questions of rising difficulty (paper, section 3.1); `derive` writes the first two:

    binary   Where is the cup? Is [28, 14, 84, 70] the right box?   <answer>yes</answer>
    choice   Where is the cup? Which of these is right? A. [0, ..   <answer>C</answer>
    open     Where is the cup?                                      <answer>{"bbox_2d": [28, 14, 84, 70]}</answer>

Two pixel spaces: annotations are in pixels of the original image; Qwen2.5-VL speaks pixels of the image as its
processor resized it, sides multiples of 28. `resize_box` converts, once, at load: then all boxes are in model pixels.
Departure from the released code: a row that cannot be used is an error with file and line, not silently another row.

Shapes: P prompt tokens; a patch is 14 x 14 pixels x 3 channels x 2 frames = 1176 numbers; 4 patches, 1 image token.
"""
import hashlib
import json
import os
import random
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from answers import offered_letters
from distributed import RunError, UserError, say  # noqa: F401 (RunError: for who imports it from here)
from tasks import TASKS, kind
from tools.limits import limits

FORMS = ("binary", "choice", "open")
TEXTS = ["*.json", "*.jinja", "*.txt"]                  # what a checkpoint has beside its weights
MIN_PIXELS, MAX_PIXELS = 56 * 56, 401_408               # of a resized image: 4 to 512 image tokens
MAX_SIDE, MAX_ASPECT = 16_384, 200                      # of an original image; the resizer raises beyond the latter
BOX = re.compile(r"\[\s*{n}\s*,\s*{n}\s*,\s*{n}\s*,\s*{n}\s*\]".format(n=r"(-?\d{1,6}(?:\.\d+)?(?:[eE][+-]?\d)?)"))
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
    def from_pretrained(cls, path, max_pixels: int = MAX_PIXELS) -> "Processor":
        """Read a directory or hub name. UserError if it is no Qwen2.5-VL checkpoint or lacks a part."""
        if max_pixels < MIN_PIXELS:
            raise UserError(f"max_pixels is {max_pixels}, but an image takes at least {MIN_PIXELS}.")
        try:
            model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
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
        if model_type != "qwen2_5_vl" or missing:
            raise UserError(f"{path} is no Qwen2.5-VL checkpoint: its model type is {model_type}, and its tokenizer "
                            f"lacks {', '.join(missing) or 'nothing'}.")
        if hidden := [tag for tag in TAGS if tag not in tokenizer.decode(tokenizer(tag)["input_ids"], True)]:
            raise UserError(f"{path}: {' and '.join(hidden)} are special tokens of its tokenizer, which are left out of "
                            "the text that rewards read. Make them ordinary ones (special: false in tokenizer.json and "
                            "tokenizer_config.json)")
        # Only now: a checkpoint's own min_pixels and max_pixels would win over a size given to the loader.
        image_processor.size = {"shortest_edge": MIN_PIXELS, "longest_edge": max_pixels}
        return cls(tokenizer, image_processor, files)

    def save_pretrained(self, path) -> None:
        """Write what stands beside the weights: the checkpoint's own files, and preprocessor_config.json anew.

        Training changes weights alone, so whatever opens the checkpoint opens the result: older transformers, vLLM, ..
        Only the pixel limits are this run's, so that images are later shown as they were in training.
        """
        for name, content in self.files.items():
            (Path(path) / name).write_bytes(content)
        self.image_processor.save_pretrained(path)

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
        vision = self.image_processor([load_image(path) for path in example.images], return_tensors="pt")
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

    def prompt_length(self, example: Example) -> int:
        """Tokens of the prompt, image tokens included, read off the images' headers alone, once."""
        if example not in self.lengths:
            length = len(self._unexpanded(example))
            for path in example.images:
                with Image.open(path) as image:
                    width, height = model_size(image.size, self.image_processor.size["longest_edge"])
                length += width * height // 784 - 1
            self.lengths[example] = length
        return self.lengths[example]

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
    except UserError:
        return False


def check_text(text: str) -> None:
    """UserError if a text spells a special token, which would forge turns or images, or is not Unicode."""
    if found := RESERVED.search(text):
        raise UserError(f"the text holds {found[0]!r}, which the chat format cannot carry; remove it.")


def taught(example: Example) -> str:
    """What a supervised stage teaches to answer: the solution, a bare truth within answer tags, read by the scorer."""
    if "<answer>" not in example.solution:
        return f"<answer>{kind(example).spell(example)}</answer>"
    before, _, rest = example.solution.partition("<answer>")
    answer, _, after = rest.partition("</answer>")
    spelled = kind(example).spell(example)
    return f"{before}<answer>{answer if answer.strip() == spelled else spelled}</answer>{after}"


# ---- Images and boxes ----

def load_image(path) -> Image.Image:
    """The image as RGB, upright by its EXIF tag, transparency laid on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def inspect_image(path) -> tuple[int, int]:
    """(width, height) of an image as `load_image` gives it; UserError if the model could not be shown it."""
    try:
        with Image.open(path) as image:                 # reads no pixel yet
            (width, height), frames = image.size, getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":    # MPO: a camera's photo and its thumbnail
                raise UserError(f"image {path} has {frames} frames; save the one that is meant.")
            if image.mode[0] in "IF":
                raise UserError(f"image {path} has more than 8 bits a channel; save it with 8.")
            if min(width, height) < 2 or max(width, height) >= MAX_ASPECT * min(width, height):
                raise UserError(f"image {path} is {width} x {height}, too small or too thin; crop it or drop the row.")
            if max(width, height) > MAX_SIDE or width * height > Image.MAX_IMAGE_PIXELS:
                raise UserError(f"image {path} is {width} x {height}, too large; scale it and its boxes down.")
        return load_image(path).size
    except (OSError, ValueError, TypeError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be decoded ({error}); replace it or drop the row.") from error


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


def resize_boxes_in(text: str, original: tuple[int, int], resized: tuple[int, int]) -> str:
    """`text` with `resize_box` applied to every four-number list in it."""
    return BOX.sub(lambda match: str(resize_box([float(n) for n in match.groups()], original, resized)), text)


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


# ---- Reading files ----

def load_examples(path, *, image_root=None, form=None, task=None, max_pixels=MAX_PIXELS, skip_bad_rows=False,
                  allow_outside=False) -> list[Example]:
    """Examples of a released or chat file, JSONL or one JSON list, or of all files in a folder but `*_test` ones.

    `form`: by default what the row or else the file name says. `task`: of rows that name none. `image_root`: where
    image paths start, by default the folder that `path` is in. UserError lists every bad row, "file:line: its fault";
    `skip_bad_rows` drops them and says on stderr how many.
    """
    root, inspect = Path(image_root or Path(path).parent), lru_cache(None)(inspect_image)
    examples, faults = [], []
    with ThreadPoolExecutor(8) as pool:                 # decoding an image releases the interpreter lock
        rows = [(where, pool.submit(_example, line, where, root, form, task, max_pixels, allow_outside, inspect))
                for where, line in _lines(path)]
    for where, row in rows:
        try:
            examples.append(row.result())
        except UserError as error:
            faults.append(f"{where}: {error}")
    if not rows:
        raise UserError(f"{path} holds no rows.")
    if faults and not (skip_bad_rows and examples):
        more = [f".. and {len(faults) - 20} more."] if len(faults) > 20 else []
        raise UserError("\n".join([f"{path}: {len(faults)} of {len(rows)} rows cannot be used.", *faults[:20], *more,
                                   "Correct these rows, or drop them with --skip_bad_rows."]))
    if faults:
        say(f"{path}: dropped {len(faults)} of {len(rows)} rows, the first {faults[0]}")
    return examples


def _json_files(folder, name: str = "**/*") -> list[Path]:
    """The .jsonl and .json files of a folder whose names without ending match, sorted."""
    return sorted(file for ending in (".jsonl", ".json") for file in Path(folder).glob(name + ending))


def _lines(path) -> list[tuple[str, object]]:
    """("file:line", text) for JSONL, ("file:number", object) for a JSON list; for a folder, all files but `*_test`."""
    path, found = Path(path), []
    for file in [file for file in _json_files(path) if not file.stem.endswith("_test")] if path.is_dir() else [path]:
        try:
            text = file.read_text("utf-8-sig")
            listed = file.suffix == ".json" and text.lstrip().startswith("[")
            lines = json.loads(text) if listed else text.split("\n")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read as JSON in UTF-8: {error}.") from error
        found += [(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if listed or line.strip()]
    return found


def _example(line, where: str, root: Path, form, task, max_pixels: int, allow_outside: bool, inspect) -> Example:
    """The checked example of one line (or object of a JSON list), its boxes converted; UserError says its fault."""
    try:
        row = json.loads(line) if isinstance(line, str) else line
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON ({error}).") from None
    if not isinstance(row, dict):
        raise UserError("the row is not a JSON object {..}.")
    split = Path(where.rpartition(":")[0]).stem
    if "messages" in row:
        *history, (_, problem), (_, solution) = _turns(row["messages"])
        form, task = "open", "general"
    else:
        history, problem, solution = [], _text(row, "problem"), _text(row, "solution")
        form, task = form or row.get("form") or form_of(split), row.get("task") or task
    if task not in TASKS:
        raise UserError(f'its "task" is {task!r}, not one of {", ".join(TASKS)}; --task names it for rows without.')
    if form not in FORMS:
        raise UserError(f'its "form" is {form!r}, not one of {", ".join(FORMS)}.')
    texts = [problem, *(text for _, text in history)]
    check_text("".join([*texts, solution]))
    names = row.get("images") or row.get("image") or []
    images = [resolve_image(name, root, allow_outside) for name in (names if isinstance(names, list) else [names])]
    if (found := sum(text.count("<image>") for text in texts)) not in (0, len(images)):
        raise UserError(f"the text says <image> {found} times, but the row has {len(images)} images.")
    if not history:                                     # images come first without being told
        problem = re.sub(r"^(\s*<image>\s*){%d}" % len(images), "", problem)
    original = [inspect(image) for image in images][0] if images else None
    example = Example(problem=problem, solution=solution, task=task, form=form, images=tuple(images), where=where,
                      size=original and model_size(original, max_pixels), split=split, history=tuple(history))
    check_truth(example, original)
    if not TASKS[task].boxes:
        return example
    problem, solution = (resize_boxes_in(text, original, example.size) for text in (problem, solution))
    return replace(example, problem=problem, solution=solution)


def _text(row: dict, name: str) -> str:
    """A text field; a number or a list, which released solutions may be, as its JSON."""
    value = row.get(name)
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not text.strip():
        raise UserError(f'the row has no "{name}", or an empty one.')
    return text.strip()


def _turns(messages) -> list[tuple[str, str]]:
    """(role, text) of each turn of a chat row, the reference answer last."""
    try:
        turns = [(turn["role"], turn["content"].strip()) for turn in messages]
    except (TypeError, KeyError, AttributeError):
        raise UserError('"messages" must be a list of {"role": .., "content": text}.') from None
    spoken = [role for number, (role, _) in enumerate(turns) if number or role != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2) or not all(text for _, text in turns):
        raise UserError("messages must alternate user and assistant, none empty, and end with the reference answer.")
    return turns


def resolve_image(name, root: Path, allow_outside: bool = False) -> str:
    """The image's path under `root`. UserError if there is none, or if it is elsewhere and not `allow_outside`.

    A path of another machine loses parts from the left until it exists: /elsewhere/coco/1.jpg -> root/coco/1.jpg
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{name!r} is not the path of an image.")
    root = Path(os.path.abspath(root))
    path = Path(os.path.normpath(root / name))          # an absolute name replaces the root
    if os.path.isfile(path) and (allow_outside or path.is_relative_to(root)):
        return str(path)
    parts = Path(os.path.normpath(name)).parts
    for start in range(1, len(parts)) if ".." not in parts else ():
        if os.path.isfile(tail := root.joinpath(*parts[start:])):
            return str(tail)
    raise UserError(f"no image {name} under {root}; name its folder with --image_root" +
                    (", or allow paths that leave it with --allow_outside." if os.path.isfile(path) else "."))


# ---- Three forms of one annotation ----

def derive(example: Example, form: str, pool=None, seed: int = 0) -> Example:
    """The binary or choice form of an open example (paper, section 3.1), the same for the same (seed, example, form).

    Yes and no are equally likely, letters uniform. `pool`: texts from which wrong answers are drawn, as far as the task
    finds them wrong (labels by default: those of Pascal VOC); where it lends too few, the task invents more. UserError
    where no wrong answer can be made: a math truth in words, or a pool without absent labels.
    """
    if form == example.form:
        return example
    task = TASKS[example.task]
    if example.form != "open" or form not in FORMS or task.right is None:
        raise UserError(f"{example.where}: no {form} question can be made of {example.form} {example.task}.")
    key = [seed, form, example.problem, example.solution, *(Path(image).name for image in example.images)]
    rng = random.Random(hashlib.sha256(json.dumps(key).encode()).digest())
    right, wrong = task.right(example), wrong_answers(example, task.pool if pool is None else pool, rng)
    if not wrong:
        raise UserError(f"{example.where}: no wrong answer is at hand beside {right}; drop the row, or give {form} a "
                        "file of its own.")
    problem, answer = (_binary if form == "binary" else _choice)(example, right, wrong, rng)
    return replace(example, problem=problem, solution=f"<answer>{answer}</answer>", form=form)


def wrong_answers(example: Example, pool, rng, most: int = 3) -> list[str]:
    """Up to `most` different texts that the example's task finds wrong: from the pool first, then invented."""
    task, found = TASKS[example.task], []
    texts = sorted(set(pool))
    for text in (*rng.sample(texts, len(texts)), *task.invent(example, rng)):
        if len(found) < most and text not in found and task.wrong(text, example):
            found.append(text)
    return found


def _binary(example: Example, right: list[str], wrong: list[str], rng) -> tuple[str, str]:
    """(question about one candidate, yes or no), by the toss of a coin."""
    yes = rng.random() < 0.5
    return TASKS[example.task].ask(example, rng.choice(right if yes else wrong)), "yes" if yes else "no"


def _choice(example: Example, right: list[str], wrong: list[str], rng) -> tuple[str, str]:
    """(question with four options, letters of the right ones)."""
    if right[0] in offered_letters(example.problem):
        return example.problem, right[0]                # its options are there already
    task = TASKS[example.task]
    right = rng.sample(right, min(len(right), rng.randint(1, task.most)))
    options = right + wrong[:4 - len(right)]
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    letters = ", ".join("ABCD"[n] for n, option in enumerate(options) if option in right)
    return "\n".join([task.choose(example), *lines]), letters


def derive_all(examples: list[Example], form: str, seed: int = 0, skip_bad_rows: bool = False) -> list[Example]:
    """Every example in another form; all that cannot be derived are named in one UserError, or dropped and counted."""
    pools, derived, faults = {}, [], []
    for example in examples:
        if TASKS[example.task].pool:  # a task that draws from a vocabulary draws from that of the rows
            pools.setdefault(example.task, set()).update(TASKS[example.task].right(example))
    for example in examples:
        try:
            derived.append(derive(example, form, pools.get(example.task), seed))
        except UserError as error:
            faults.append(str(error))
    if faults and not (skip_bad_rows and derived):
        more = f"\n.. and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("\n".join(faults[:20]) + more + "\nCorrect them, give the form a file of its own, or drop the "
                        "rows with --skip_bad_rows")
    if faults:
        say(f"{form}: dropped {len(faults)} rows that have no such form; the first: {faults[0]}")
    return derived


# ---- Order and files ----

def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """Which of `n` examples are the global batch at `step` (from 0) of an endless stream of shuffled epochs.

    A function of its arguments alone, so a resumed run needs no state. A batch may straddle two epochs.
    """
    return [_epoch(n, position // n, seed)[position % n] for position in range(step * batch, (step + 1) * batch)]


@lru_cache(maxsize=4)
def _epoch(n: int, epoch: int, seed: int) -> tuple[int, ...]:
    """A permutation of range(n)."""
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(n), n))


def form_of(name: str) -> str:
    """The form that a file name or path speaks of: "judge_val" -> binary; open if of none."""
    words = re.split(r"[^a-z]+", name.lower())
    return "binary" if "binary" in words or "judge" in words else "choice" if "choice" in words else "open"


def find_files(data_dir) -> dict:
    """What a task directory holds: {"train": {form: path}, "test": {split: (form, path)}, "questions": path}.

    In `data_dir/grpo_data` or `data_dir`: train/{binary|judge,choice,open}, each a .jsonl file or a folder of them, and
    test splits test/**/*.jsonl and train/**/*_test.jsonl; SFT_data/reject or questions.jsonl. None where there is
    none; UserError where there is nothing at all.
    """
    root, train, test = Path(data_dir), dict.fromkeys(FORMS), {}
    for base in (root, root / "grpo_data"):             # the later and the more exact name wins
        for name in ("judge", "binary", "choice", "open"):
            found = [path for path in (base / "train" / name, base / "train" / f"{name}.jsonl") if path.exists()]
            train[form_of(name)] = found[-1] if found else train[form_of(name)]
        for file in _json_files(base / "test") + _json_files(base / "train", "**/*_test"):
            split = file.stem if file.stem not in test else f"{file.parent.name}_{file.stem}"
            test[split] = (form_of(str(file.relative_to(base))), file)
    questions = [path for path in (root / "questions.jsonl", root / "SFT_data" / "reject") if path.exists()]
    if not (any(train.values()) or test or questions):
        raise UserError(f"{root} holds no data: looked in it and in its grpo_data for train/binary.jsonl (or judge, "
                        "choice, open) and test/*.jsonl, and for SFT_data/reject/*.jsonl and questions.jsonl.")
    return {"train": train, "test": test, "questions": questions[-1] if questions else None}


# ---- All that a run will need ----

def load_data(cfg):
    """Read and check every file the run will need, before any model is loaded.

    Returns (stage name -> examples, test examples, questions). A form without a file is derived from the open one.
    """
    files, options = find_files(cfg.data), {
        "image_root": cfg.image_root or cfg.data, "task": cfg.task or None, "max_pixels": cfg.max_pixels,
        "skip_bad_rows": cfg.skip_bad_rows, "allow_outside": cfg.allow_outside}
    forms = {}

    def form_examples(form):  # read or derived once, however many stages ask
        if form not in forms:
            path = files["train"].get(form)
            if path:
                forms[form] = load_examples(path, form=form, **options)
            elif form == "open":
                raise UserError(f"--data {cfg.data}: no open training file, which --stages needs")
            else:
                forms[form] = derive_all(form_examples("open"), form, cfg.seed, cfg.skip_bad_rows)
        return forms[form]

    examples, questions = {}, []
    for stage in cfg.curriculum:
        if stage.forms:
            examples[stage.name] = [e for form in stage.forms for e in form_examples(form)]
        elif stage.name == "sft":
            examples["sft"] = form_examples("open")
        elif not questions:
            path = cfg.questions or files.get("questions")
            if not path:
                raise UserError(f"--data {cfg.data}: no question file for the reject stage; name one with --questions")
            questions = load_examples(path, **options)
    tests = []  # every split's rows, labeled with its name
    for split, (form, path) in files["test"].items():
        rows = load_examples(path, form=form, **options)
        rows = [replace(e, split=split) for e in rows]
        tests += rows[:cfg.eval_limit or None]
    return examples, tests, questions


def refuse_long_prompts(cfg, processor, examples):
    """The examples whose prompts fit; UserError if any does not, unless --skip_bad_rows drops and counts them."""
    lengths = [processor.prompt_length(e) for e in examples]
    long = [f"{e.where} ({n} tokens)" for e, n in zip(examples, lengths) if n > cfg.max_prompt_length]
    if long and not (cfg.skip_bad_rows and len(long) < len(examples)):
        named = ", ".join(long[:5])
        raise UserError(f"{len(long)} prompts are longer than --max_prompt_length {cfg.max_prompt_length}: {named}. "
                        "Raise it, lower --max_pixels, or drop them with --skip_bad_rows")
    if long:
        say(f"dropped {len(long)} of {len(examples)} prompts longer than {cfg.max_prompt_length} tokens")
    return [e for e, n in zip(examples, lengths) if n <= cfg.max_prompt_length]
