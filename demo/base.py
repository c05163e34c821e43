"""The demo's base model: a tiny Qwen2.5-VL that half knows the world of demo/world.py, built here because no GPU and no
download is assumed.

    python -m demo.base --out runs/demo           # about 5 minutes on two cores

It writes
    runs/demo/data/           the data set, in the layout and JSONL of the released one (read by data.load_examples)
    runs/demo/careful/        a Hugging Face directory: Qwen2_5_VLForConditionalGeneration, 1.7 million parameters
    runs/demo/base/           the same model after it was taught a bad habit: the one to train
    runs/demo/examples.png    some training images with their questions
    with --leaky also runs/demo/leaky/, the same data with training questions that tell without a look; with --parts
    runs/demo/parts-1/ .. parts-3/ and runs/demo/careful/ only: a world of its own, whose base has no habit
and only train.sh and the ablation know that this folder exists. Everything follows from --seed.

The careful model. (1) A vision warm-up: the output head, laid on the image tokens, must name the objects. (2)
Supervised pre-training on careful answers, whose reasoning makes the answer a copy.

The base model is the careful one with a bad habit, which imitates an instruct model that can, but does not bother: it
reasons with the probabilities --reasons (binary, choice, open), and otherwise answers at once: a guess where there is
something to choose from, something vague and never right where there is not ("some"). By default it reasons before
15 % of its yes/no and option letters and one of 1,000 open answers. So what RL finds here, the model knew before the
habit: it is recovered, not discovered; and how rarely an open answer scores is a number that we choose.
"""
import argparse
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import FORMS, Example, instruction, prompt_messages
from demo.world import (COLORS, HASTE, KINDS, PARTS, PLACES, RL_QUESTIONS, SIDE, Question, Scene, ask, careful_response,
                        draw, example_of, general_question, hasty_response, parts_question, parts_scene, picture_sheet,
                        random_scene, write_data, write_parts)
from distributed import UserError
from tasks import TASKS
from tools.terminal import terminal

REASONS = (0.15, 0.15, 0.001)                           # how often the base reasons: binary, choice, open


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
# Qwen's split pattern, except that \p{N}+ keeps a whole number in one piece: 28 is one token.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")


def rules() -> list[str]:
    """The format instructions of data.py."""
    return sorted({instruction(Example(problem="", solution="", task=t, form=form)) for t in TASKS for form in FORMS})


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `texts`. The reasoning tags are ordinary added tokens, so that decoding keeps them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, min_frequency=2, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=list(SPECIAL), model_max_length=4096)
    # A whole format instruction is one token as well: prompts, and with them every step, become half as long.
    fast.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*TAGS, *rules())])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Model:
    """A random Qwen2.5-VL of 1.7 million parameters. Initial weights of 0.06, not 0.02: it learns far faster."""
    end, stop, image, video, left, right = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    text = dict(vocab_size=64 * math.ceil(len(tokenizer) / 64),    # padded, as Qwen's is
                hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.06, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
                bos_token_id=end, eos_token_id=stop, pad_token_id=end)
    vision = dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128, window_size=112,
                  fullatt_block_indexes=[0, 1], initializer_range=0.06)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, initializer_range=0.06,
                              image_token_id=image, video_token_id=video, vision_start_token_id=left,
                              vision_end_token_id=right)
    torch.manual_seed(seed)
    model = Model(config)
    model.generation_config = GenerationConfig(bos_token_id=end, pad_token_id=end, eos_token_id=[stop, end],
                                               do_sample=True)
    return model


def save(folder: Path, model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """An ordinary Hugging Face directory."""
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def patches(scenes: list[Scene]) -> torch.Tensor:
    """(36 * scenes, 1176) pixel values of drawn scenes: the image processor's, many times as fast (a test compares)."""
    mean, std = Qwen2VLImageProcessorPil.image_mean, Qwen2VLImageProcessorPil.image_std
    pixels = torch.tensor(np.stack([np.asarray(draw(scene)) for scene in scenes])) / 255
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)                         # (N, 84, 84, 3)
    pixels = pixels.view(-1, 3, 2, 14, 3, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)    # (N, 3, 3, 2, 2, 3, 14, 14)
    return pixels.reshape(-1, 3, 1, 14, 14).expand(-1, 3, 2, 14, 14).reshape(-1, 1176)   # two equal frames


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training


class Lesson(NamedTuple):
    """A question to learn from; `images` are numbers of scenes."""

    images: tuple[int, ...]
    question: Question
    example: Example


class Item(NamedTuple):
    """A tokenized lesson; with `odds`, the log-odds of reasoning are taught in place of the thought's first token."""

    images: tuple[int, ...]
    prompt: list[int]
    response: list[int]
    odds: float | None = None


def parts_lesson(scenes: list[Scene], index: int, rng: random.Random) -> Lesson:
    """A random question of the second world on scene `index`; one of ten is open, and has one to three parts."""
    form = rng.choices(FORMS, (0.45, 0.45, 0.10))[0]
    question = parts_question(scenes[index], rng, rng.randint(1, PARTS) if form == "open" else 1)
    return Lesson((index,), question, example_of(question, f"{index}.png", form))


def lesson(scenes: list[Scene], index: int, rng: random.Random) -> Lesson:
    """A random question on scene `index`, general once in seven times; open ones, the least practiced, seldom."""
    task = rng.choice((*RL_QUESTIONS, *RL_QUESTIONS, "general"))
    if task != "general":
        question = ask(scenes[index], task, rng)
        form = rng.choices(FORMS, (0.40, 0.50, 0.10))[0]
        return Lesson((index,), question, example_of(question, f"{index}.png", form))
    other = rng.randrange(len(scenes))
    needs, question = general_question(scenes[index], scenes[other], rng)
    images = (index, other)[:needs]
    files = tuple(f"{n}.png" for n in images)
    example = Example(problem=question.problem, solution=question.answer, task=task, images=files)
    return Lesson(images, question, example)


def corpus_tokenizer(lessons: list[Lesson]) -> PreTrainedTokenizerFast:
    """The tokenizer of prompts and careful answers, words for objects, and the numbers of pixels."""
    turns = (turn for row in lessons for turn in prompt_messages(row.example))
    prompts = (part.get("text", "") for turn in turns for part in turn["content"])
    answers = (careful_response(row.question, row.example) for row in lessons)
    words = ["user\n", "assistant\n", *(f" {word}" for word in (*COLORS, *KINDS, *PLACES)), *map(str, range(SIDE + 1)),
             HASTE, "some"]
    return train_tokenizer([*prompts, *answers, *words, *words])


def prompt_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """What data.Processor feeds the model for `example` (a test compares), with nine image tokens an image."""
    text = tokenizer.apply_chat_template(prompt_messages(example), tokenize=False, add_generation_prompt=True)
    return text.replace("<|image_pad|>", "<|image_pad|>" * 9)


class Teacher:
    """Supervised training of the tiny model. The pixels of all scenes are kept in memory."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerFast, scenes: list[Scene]):
        self.model, self.tokenizer, self.scenes = model, tokenizer, scenes
        self.pixels = patches(scenes).view(len(scenes), 36, 1176)
        self.positions = [self._positions(n) for n in range(3)]
        self.haste = tokenizer(f"<think>{HASTE}")["input_ids"][1]           # no careful thought begins with this token

    def _positions(self, images: int, length: int = 512) -> torch.Tensor:
        """(3, length) rotary positions of a row that begins with `images` images; a shorter row is a prefix of it."""
        picture = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"
        ids = self.tokenizer("<|im_start|>user\n" + picture * images)["input_ids"]
        ids = torch.tensor([ids + [0] * (length - len(ids))])
        kinds = (ids == self.model.config.image_token_id).int()
        grid = torch.tensor([[1, 6, 6]] * images) if images else None
        return self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0][:, 0]

    def items(self, lessons: list[Lesson], answer: Callable[[Lesson], str], odds: dict | None = None) -> list[Item]:
        """Tokenized lessons, answered by `answer`; `odds`: log-odds of reasoning by form, for RL questions."""
        prompts = self.tokenizer([prompt_text(self.tokenizer, row.example) for row in lessons])["input_ids"]
        responses = self.tokenizer([answer(row) + "<|im_end|>" for row in lessons])["input_ids"]
        targets = [odds[row.example.form] if odds and row.example.task != "general" else None for row in lessons]
        return [Item(row.images, *item) for row, *item in zip(lessons, prompts, responses, targets)]

    def features(self, images: list[int]) -> torch.Tensor:
        """(images, 9, hidden) image tokens."""
        grid = torch.tensor([[1, 6, 6]] * len(images))
        tokens = self.model.model.visual(self.pixels[images].flatten(0, 1), grid_thw=grid).pooler_output
        return tokens.view(len(images), 9, -1)

    def look(self, images: list[int]) -> tuple[float, float]:
        """One step of vision warm-up: the head must find the bag {color, kind, place} of an object in its image token.

        Gradients of the cross-entropy to a uniform bag. Returns it (at best log 3 = 1.1), and the share of bags found.
        """
        words = ([f"\u0120{word}" for word in (*s[:2], PLACES[s.cell])] for n in images for s in self.scenes[n])
        bags = torch.tensor([self.tokenizer.convert_tokens_to_ids(bag) for bag in words])  # (objects, 3)
        tokens = torch.cat([row[[s.cell for s in self.scenes[n]]] for n, row in zip(images, self.features(images))])
        logits = self.model.lm_head(self.model.model.language_model.norm(tokens))          # (objects, vocabulary)
        loss = -logits.log_softmax(-1).gather(-1, bags).mean()
        loss.backward()
        found = logits.topk(3).indices.sort().values == bags.sort().values
        return loss.item(), found.all(-1).float().mean().item()

    def study(self, items: list[Item], buckets: int = 4) -> tuple[float, float]:
        """One supervised step, in `buckets` parts of similar length; the vision tower runs once an image.

        Gradients of the mean -log p of the response tokens. Returns it, and the share of rows with every token right.
        """
        images = sorted({n for item in items for n in item.images})
        features = self.features(images)
        leaf = features.detach().requires_grad_()
        image_tokens = dict(zip(images, leaf))
        items = sorted(items, key=lambda item: len(item.prompt) + len(item.response))
        tokens, size = sum(len(item.response) for item in items), math.ceil(len(items) / buckets)
        loss, right = 0.0, 0
        for start in range(0, len(items), size):
            part, hits = self.response_loss(items[start:start + size], image_tokens)
            (part / tokens).backward()
            loss, right = loss + part.item() / tokens, right + hits
        if features.requires_grad:
            features.backward(leaf.grad)
        return loss, right / len(items)

    def response_loss(self, items: list[Item], image_tokens: dict[int, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Sum of -log p over the response tokens, and the number of rows with every token right, teacher forced.

        Where an item has `odds`, the token that decides for or against reasoning costs the squared error of their
        log-odds instead: -log p alone could not teach a probability of one in thousands.
        """
        rows = [item.prompt + item.response for item in items]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])                             # (B, T)
        odds = torch.tensor([item.odds for item in items if item.odds is not None])
        decides, said = (torch.tensor([[test(item, n) for n in range(1, length)] for item in items]) for test in (
            lambda item, n: item.odds is not None and n == len(item.prompt) + 1,
            lambda item, n: 0 <= n - len(item.prompt) < len(item.response)))                              # (B, T-1)
        said &= ~decides
        text = self.model.model.language_model
        embeds = text.embed_tokens(ids)
        pictures = [image_tokens[n] for item in items for n in item.images]
        if pictures:
            embeds = embeds.masked_scatter((ids == self.model.config.image_token_id)[..., None], torch.cat(pictures))
        positions = torch.stack([self.positions[len(item.images)][:, :length] for item in items], dim=1)  # (3, B, T)
        # Padding is on the right and attention causal, so no mask is needed.
        hidden = text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]
        logits, targets = self.model.lm_head(hidden[said]), ids[:, 1:][said]
        wrong = torch.zeros_like(said).masked_scatter(said, logits.argmax(-1) != targets)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        loss = loss + self.decision_loss(hidden[decides], ids[:, 1:][decides], odds)
        return loss, len(items) - int(wrong.any(1).sum())

    def decision_loss(self, hidden: torch.Tensor, targets: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
        """Squared error of log P(reasons) / P(does not) behind "<think>", and -log P(thought's first token | reasons).

        hidden (n, hidden), targets (n,), odds (n,). Exact for any probability; what is rare must still make sense.
        """
        logits = self.model.lm_head(hidden)
        reasons = logits.index_fill(1, torch.tensor(self.haste), -torch.inf)
        error = (reasons.logsumexp(-1) - logits[:, self.haste] - odds).square().sum()
        careful = targets != self.haste
        return error + F.cross_entropy(reasons[careful], targets[careful], reduction="sum")


def train(name: str, steps: int, step: Callable[[int], tuple[float, float]], optimizers: list) -> None:
    """`steps` steps, 20 of linear warm-up, then cosine to zero. `step(n)` adds gradients, returns loss and accuracy."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks, smooth = [group["lr"] for group in groups], None
    with tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True) as bar:
        for n in range(steps):
            figures = np.array(step(n))
            for group, peak in zip(groups, peaks):
                group["lr"] = peak * min(1, (n + 1) / 20) * 0.5 * (1 + math.cos(math.pi * n / steps))
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            smooth = figures if smooth is None else 0.9 * smooth + 0.1 * figures
            bar.set_postfix(loss=f"{smooth[0]:.3f}", accuracy=f"{smooth[1]:.0%}", refresh=False)
            bar.update()


def adamw(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), matrices of one shape together.

    torch.optim.Muon computes in bfloat16, which takes a CPU without such units ten times as long as all else here.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix by lr * 0.2 * sqrt(its longer side) * the nearest orthogonal matrix, about."""
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                same = [p for p in group["params"] if p.shape == shape]
                for p in same:
                    self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.stack([p.grad.lerp(self.state[p]["mean"], group["momentum"]) for p in same])
                for p, update in zip(same, orthogonal(ahead)):
                    p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices (n, rows, columns) with all singular values moved to about 1, between 0.7 and 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def muon_and_adamw(model: Model) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on the rest: embedding, norms, biases, patch convolution."""
    matrix = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices = [p for name, p in model.named_parameters() if matrix[name]]
    rest = [p for name, p in model.named_parameters() if not matrix[name]]
    return [Muon(matrices, lr=6e-3), adamw(rest, 4e-3)]


def school(name: str, count: int, parts: bool = False) -> tuple[list[Scene], list[Lesson], random.Random]:
    """`count` scenes of one of the two worlds and four lessons on each, drawn from the name."""
    rng, scene, teach = random.Random(name), *((parts_scene, parts_lesson) if parts else (random_scene, lesson))
    scenes = [scene(rng) for _ in range(count)]
    return scenes, [teach(scenes, n // 4, rng) for n in range(4 * count)], rng


def build_careful(folder: Path, seed: int, steps: int, count: int = 6400, parts: bool = False) -> None:
    """Makes the careful model from `count` scenes; saves it, its tokenizer and image processor."""
    scenes, lessons, rng = school(f"base {seed}", count, parts)
    tokenizer = corpus_tokenizer(lessons)
    model = build_model(tokenizer, seed)
    teacher = Teacher(model, tokenizer, scenes)

    def batch(n: int) -> list[int]:                     # 64 rows: 16 scenes with their four questions
        return [i % (4 * count) for i in range(64 * n, 64 * n + 64)]

    def answer(row: Lesson) -> str:                     # a tenth of guesses, so that a habit needs no new words
        hasty = not parts and row.example.task != "general" and rng.random() < 0.1
        return hasty_response(row.question, row.example, rng) if hasty else careful_response(row.question, row.example)

    train("vision warm-up", 100, lambda n: teacher.look([i % count for i in batch(n)]),
          [adamw(model.parameters(), 4e-3)])
    items = teacher.items(lessons, answer)
    train("pre-training", steps, lambda n: teacher.study([items[i] for i in batch(n)]), muon_and_adamw(model))
    save(folder, model, tokenizer)


def build_base(folder: Path, careful: Path, seed: int, reasons: tuple[float, ...], steps: int = 120) -> None:
    """Teaches the model in `careful` to reason with probability `reasons` (binary, choice, open) and saves it."""
    model, tokenizer = Model.from_pretrained(careful), PreTrainedTokenizerFast.from_pretrained(careful)
    scenes, lessons, rng = school(f"habit {seed}", 8 * steps)
    teacher = Teacher(model, tokenizer, scenes)
    odds = {form: math.log(p / (1 - p)) for form, p in zip(FORMS, reasons)}
    careful_items = teacher.items(lessons, lambda row: careful_response(row.question, row.example), odds)
    hasty_items = teacher.items(lessons, lambda row: hasty_response(row.question, row.example, rng), odds)
    pairs = [[a] if a.odds is None else [a, b] for a, b in zip(careful_items, hasty_items)]
    train("bad habit", steps, lambda n: teacher.study([item for pair in pairs[32 * n:32 * n + 32] for item in pair]),
          [adamw(model.parameters(), 5e-4)])
    save(folder, model, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def make(folder: Path, settings: dict, build: Callable[[Path], None]) -> None:
    """Builds `folder` aside and renames it into place, unless it is there and was built with the same settings."""
    marker = folder / "demo.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        return print(f"{folder} is there already.")
    if folder.exists() and not marker.exists():
        raise UserError(f"{folder} exists but was not made by demo.base: give another --out, or move it away.")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    build(aside)
    (aside / "demo.json").write_text(json.dumps(settings) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def main(argv: list[str] | None = None) -> int:
    """Make the data set, its picture and the base model; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory to write to")
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 1 is faster beside another busy process")
    parser.add_argument("--steps", type=int, default=500, help="steps of pre-training")
    parser.add_argument("--reasons", type=float, nargs=3, default=REASONS, metavar=("BINARY", "CHOICE", "OPEN"),
                        help=f"how often the base model reasons before it answers, by form {REASONS}")
    parser.add_argument("--leaky", action="store_true", help="write the data with leaky training questions as well")
    parser.add_argument("--parts", action="store_true", help="the world of several parts, and its careful model, only")
    parser.add_argument("--name", default="base", help="directory of the base model below --out")
    args = parser.parse_args(argv)
    if min(args.threads, args.steps) < 1:
        parser.error("--threads and --steps must be at least 1")
    if not all(0 < p < 1 for p in args.reasons):
        parser.error("--reasons must lie between 0 and 1")
    torch.set_num_threads(args.threads)
    data, sheet, careful, base = (args.out / name for name in ("data", "examples.png", "careful", args.name))
    settings = {"seed": args.seed, "steps": args.steps}
    try:
        if args.parts:
            for n in range(1, PARTS + 1):
                make(args.out / f"parts-{n}", {"seed": args.seed}, lambda folder: write_parts(folder, args.seed, n))
            make(careful, settings | {"parts": PARTS},
                 lambda folder: build_careful(folder, args.seed, args.steps, parts=True))
            print(f"Data sets and model of the world of parts: {args.out}.")
            return 0
        if args.leaky:
            make(args.out / "leaky", {"seed": args.seed}, lambda folder: write_data(folder, args.seed, leaky=True))
        make(data, {"seed": args.seed}, lambda folder: write_data(folder, args.seed))
        picture_sheet(data, sheet)
        print(f"Data set: {data}. A look at it: {sheet}.")
        make(careful, settings, lambda folder: build_careful(folder, args.seed, args.steps))
        make(base, settings | {"reasons": list(args.reasons)},
             lambda folder: build_base(folder, careful, args.seed, args.reasons))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Base model: {base}.")
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
