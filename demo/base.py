"""The demo's base model: a tiny Qwen2.5-VL that half knows demo/world.py, as no GPU is assumed.

    python -m demo.base --out runs/demo           # about 5 minutes on two cores

writes the data set to runs/demo/data/, some of its questions to runs/demo/examples.png, and two
Qwen2_5_VLForConditionalGeneration of 1.7 million parameters to runs/demo/careful/ and base/; with --parts the
second world's data to parts-1/ .. parts-3/, and careful/. All follows from --seed.

The careful model has (1) a vision warm-up: the output head, laid on the image tokens, must name the objects;
(2) supervised pre-training on careful answers, whose reasoning makes the answer a copy.

The base model is the careful one with a bad habit, which imitates an instruct model that can, but does not
bother: it reasons with the probabilities --reasons (binary, choice, open), and otherwise answers at once: a
guess where there is something to choose from, something vague and never right where there is not ("some"). By
default it reasons before 15 % of its yes/no and option letters and one of 1,000 open answers. So what RL
finds here, the model knew before the habit: it is recovered, not discovered; and how rarely an open answer
scores is a number that we choose.
"""

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import instruction, prompt_messages
from demo.world import (
    COLORS, HASTE, PARTS, PLACES, RL_QUESTIONS, SHAPES, SIDE, ask, careful_response, draw,
    example_of, general_question, hasty_response, parts_question, parts_scene, random_scene,
    write_data, write_parts)
from rewards import FORMS, TASKS, Example
from support.tiny import SPLIT, TEMPLATE, byte_bpe
from support.words import UserError, command

# ---- Tokenizer and model ----

DEMO_SPECIALS = [f"<|{name}|>" for name in (
    "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad").split()]


def corpus_tokenizer(lessons):
    """Byte-level BPE on prompts and careful answers, words for objects, and the numbers of pixels.

    Reasoning tags are ordinary added tokens, so that decoding keeps them. So is a whole format instruction of
    data.py: prompts, and with them every step, become half as long.
    """
    turns = (turn for row in lessons for turn in prompt_messages(row.example))
    prompts = (part.get("text", "") for turn in turns for part in turn["content"])
    answers = (careful_response(row.question, row.example) for row in lessons)
    words = ["user\n", "assistant\n", *(f" {word}" for word in (*COLORS, *SHAPES, *PLACES)),
             *map(str, range(SIDE + 1)), HASTE, "some"]
    rules = {instruction(Example(problem="", solution="", task=task, form=form))
             for task in TASKS for form in FORMS}
    split = SPLIT.replace(r"|\p{N}|", r"|\p{N}+|")  # a whole number is one token
    bpe = byte_bpe([*prompts, *answers, *words, *words], 1024, split, min_frequency=2)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096,
        additional_special_tokens=DEMO_SPECIALS)
    added = "<think>", "</think>", "<answer>", "</answer>", *sorted(rules)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    system = r"{% if loop.first.*?{% endif %}"  # there is none
    tokenizer.chat_template = re.sub(system, "", TEMPLATE, flags=re.DOTALL)
    return tokenizer


def build_model(tokenizer, seed):
    """A random Qwen2.5-VL of 1.7 M parameters, of initial weights with which it learns fast."""
    end, _, stop, left, right, _, image, video = tokenizer.convert_tokens_to_ids(DEMO_SPECIALS)
    text = dict(
        vocab_size=64 * math.ceil(len(tokenizer) / 64),  # padded, as Qwen's is
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.06, max_position_embeddings=4096, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        bos_token_id=end, eos_token_id=stop, pad_token_id=end)
    vision = dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=128,
                  window_size=112, fullatt_block_indexes=[0, 1], initializer_range=0.06)
    torch.manual_seed(seed)
    model = Model(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, initializer_range=0.06,
        image_token_id=image, video_token_id=video, vision_start_token_id=left, vision_end_token_id=right))
    ends = {"bos_token_id": end, "pad_token_id": end, "eos_token_id": [stop, end]}
    model.generation_config = GenerationConfig(**ends, do_sample=True)
    return model


def save_model(folder, model, tokenizer):
    """An ordinary Hugging Face directory."""
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def pixels_of(scenes):
    """(36 * scenes, 1176) pixel values as the image processor's, far faster (a test compares)."""
    mean, std = Qwen2VLImageProcessorPil.image_mean, Qwen2VLImageProcessorPil.image_std
    pixels = torch.tensor(np.stack([np.asarray(draw(scene)) for scene in scenes])) / 255
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)  # (N, 84, 84, 3)
    pixels = pixels.view(-1, 3, 2, 14, 3, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return pixels.reshape(-1, 3, 1, 14, 14).expand(-1, 3, 2, 14, 14).reshape(-1, 1176)  # two equal frames


# A question to learn from; `images` are numbers of scenes.
Lesson = namedtuple("Lesson", "images question example")
# With `odds`, not None, the log-odds of reasoning are taught in place of the thought's first token.
TokenizedLesson = namedtuple("TokenizedLesson", "images prompt response odds")


def parts_lesson(scenes, index, rng):
    """A question of the second world on scene `index`; one of ten is open, of 1 to 3 parts."""
    form = rng.choices(FORMS, (0.45, 0.45, 0.10))[0]
    question = parts_question(scenes[index], rng, rng.randint(1, PARTS) if form == "open" else 1)
    return Lesson((index,), question, example_of(question, f"{index}.png", form))


def shapes_lesson(scenes, index, rng):
    """A question on scene `index`, one of seven general; open ones, least practiced, seldom."""
    task = rng.choice((*RL_QUESTIONS, *RL_QUESTIONS, "general"))
    if task != "general":
        question = ask(scenes[index], task, rng)
        form = rng.choices(FORMS, (0.40, 0.50, 0.10))[0]
        return Lesson((index,), question, example_of(question, f"{index}.png", form))
    other = rng.randrange(len(scenes))
    needs, question = general_question(scenes[index], scenes[other], rng)
    images = (index, other)[:needs]
    return Lesson(images, question, Example(problem=question.problem, solution=question.answer, task=task,
                                            images=tuple(f"{n}.png" for n in images)))


def school(name, count, parts=False):
    """(scenes, four lessons on each, rng): `count` scenes of one of the two worlds, by the name."""
    scene, lesson = (parts_scene, parts_lesson) if parts else (random_scene, shapes_lesson)
    rng = random.Random(name)
    scenes = [scene(rng) for _ in range(count)]
    return scenes, [lesson(scenes, n // 4, rng) for n in range(4 * count)], rng


def prompt_text(tokenizer, example):
    """What data.Processor feeds the model (a test compares), with nine image tokens an image."""
    text = tokenizer.apply_chat_template(prompt_messages(example), tokenize=False, add_generation_prompt=True)
    return text.replace("<|image_pad|>", "<|image_pad|>" * 9)


# ---- Pre-training ----

class Teacher:
    """Supervised training of the tiny model. The pixels of all scenes are kept in memory."""
    def __init__(self, model, tokenizer, scenes):
        self.model, self.tokenizer, self.scenes = model, tokenizer, scenes
        self.pixels = pixels_of(scenes).view(len(scenes), 36, 1176)
        self.haste = tokenizer(f"<think>{HASTE}")["input_ids"][1]  # begins no careful thought

    def tokenized(self, lessons, answer, odds=None):
        """Lessons answered by answer(question, example); odds: {form: log-odds of reasoning}."""
        prompts = [prompt_text(self.tokenizer, row.example) for row in lessons]
        responses = [answer(row.question, row.example) + "<|im_end|>" for row in lessons]
        targets = [odds[row.example.form] if odds and row.example.task != "general" else None
                   for row in lessons]
        ids = (self.tokenizer(texts)["input_ids"] for texts in (prompts, responses))
        return list(map(TokenizedLesson, (row.images for row in lessons), *ids, targets))

    def features(self, images):
        """(images, 9, hidden) image tokens."""
        grid = torch.tensor([[1, 6, 6]] * len(images))
        tokens = self.model.model.visual(self.pixels[images].flatten(0, 1), grid_thw=grid).pooler_output
        return tokens.view(len(images), 9, -1)

    def look(self, images):
        """A step of vision warm-up: the head finds {color, kind, place} of objects in their tokens.

        Gradients of the cross-entropy to that uniform bag. Returns it, at best log 3 = 1.1.
        """
        scenes = [self.scenes[n] for n in images]
        words = ([f"\u0120{word}" for word in (*s[:2], PLACES[s.cell])] for scene in scenes for s in scene)
        bags = torch.tensor([self.tokenizer.convert_tokens_to_ids(bag) for bag in words])
        looks = zip(scenes, self.features(images))
        tokens = torch.cat([nine[[s.cell for s in scene]] for scene, nine in looks])
        logits = self.model.lm_head(self.model.model.language_model.norm(tokens))  # (objects, vocabulary)
        loss = -logits.log_softmax(-1).gather(-1, bags).mean()
        loss.backward()
        return loss.item()

    def study(self, items, buckets=4):
        """Gradients of the mean -log p of response tokens, in `buckets` of similar length; returns it."""
        images = sorted({n for item in items for n in item.images})
        features = self.features(images)  # each image is seen once
        leaf = features.detach().requires_grad_()
        items = sorted(items, key=lambda item: len(item.prompt) + len(item.response))
        tokens, loss = sum(len(item.response) for item in items), 0.0
        size = math.ceil(len(items) / buckets)
        for start in range(0, len(items), size):
            part = self.response_loss(items[start:start + size], dict(zip(images, leaf))) / tokens
            part.backward()
            loss += part.item()
        features.backward(leaf.grad)
        return loss

    def response_loss(self, items, image_tokens):
        """Sum of -log p over the response tokens, teacher forced.

        Where an item has `odds`, the token that decides for or against reasoning costs the squared error of
        their log-odds: -log p alone could not teach a probability of one in thousands.
        """
        ids = pad_sequence([torch.tensor(item.prompt + item.response) for item in items], True)  # (B, T)
        odds = torch.tensor([item.odds for item in items if item.odds is not None])
        decides, said = torch.zeros(2, *ids[:, 1:].shape, dtype=torch.bool)  # of the next token
        for n, item in enumerate(items):
            start = len(item.prompt) - 1
            said[n, start:start + len(item.response)] = True
            decides[n, start + 1] = item.odds is not None
        said &= ~decides
        text = self.model.model.language_model
        embeds, grid, is_image = text.embed_tokens(ids), None, ids == self.model.config.image_token_id
        if pictures := [image_tokens[n] for item in items for n in item.images]:
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat(pictures))
            grid = torch.tensor([[1, 6, 6]] * len(pictures))
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image.int(), image_grid_thw=grid)  # (3, B, T)
        # Padding is on the right and attention causal, so no mask is needed.
        hidden = text(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state[:, :-1]
        targets = ids[:, 1:]
        loss = F.cross_entropy(self.model.lm_head(hidden[said]), targets[said], reduction="sum")
        return loss + self.decision_loss(hidden[decides], targets[decides], odds)

    def decision_loss(self, hidden, targets, odds):
        """Squared error of the log-odds of reasoning, and -log P(thought's first token | reasons).

        hidden (n, hidden) behind "<think>", targets (n,), odds (n,). What is rare must still make sense.
        """
        logits = self.model.lm_head(hidden)
        reasons = logits.index_fill(1, torch.tensor(self.haste), -torch.inf)
        error = (reasons.logsumexp(-1) - logits[:, self.haste] - odds).square().sum()
        careful = targets != self.haste
        return error + F.cross_entropy(reasons[careful], targets[careful], reduction="sum")


def pretrain(name, steps, step, optimizers):
    """`steps` steps, 20 of linear warm-up, then cosine to zero; step(n) adds gradients."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    for n in (bar := tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True, disable=None)):
        bar.set_postfix(loss=f"{step(n):.3f}", refresh=False)
        for group, peak in zip(groups, peaks):
            group["lr"] = peak * min(1, (n + 1) / 20) * 0.5 * (1 + math.cos(math.pi * n / steps))
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), shape by shape.

    torch.optim.Muon computes in bfloat16: on many CPUs that takes ten times as long as all else.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Move a matrix by lr * 0.2 * sqrt(its longer side) * the nearest orthogonal one, about."""
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                same = [p for p in group["params"] if p.shape == shape]
                means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in same]
                ahead = [p.grad.lerp(mean.lerp_(p.grad, 1 - group["momentum"]), group["momentum"])
                         for p, mean in zip(same, means)]
                for p, update in zip(same, orthogonal(torch.stack(ahead))):
                    p.sub_(update, alpha=group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(x):
    """Matrices (n, rows, columns) with all singular values moved to about 1, from 0.7 to 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x


def muon_and_adamw(model):
    """Muon on the layers' matrices, AdamW on the rest: embedding, norms, biases, convolution."""
    parts = {True: [], False: []}
    for name, p in model.named_parameters():
        parts[p.ndim == 2 and "embed" not in name].append(p)
    return [Muon(parts[True], lr=6e-3), AdamW(parts[False], 4e-3, weight_decay=0.0)]


def build_careful(folder, seed, steps, count=6400, parts=False):
    """Makes the careful model from `count` scenes and saves it."""
    scenes, lessons, rng = school(f"base {seed}", count, parts)
    model = build_model(tokenizer := corpus_tokenizer(lessons), seed)
    teacher = Teacher(model, tokenizer, scenes)

    def batch(n, of):  # 64 rows: 16 scenes with their four questions
        return [of[i % len(of)] for i in range(64 * n, 64 * n + 64)]

    def answer(question, example):  # a tenth of guesses, so that a habit needs no new words
        hasty = not parts and example.task != "general" and rng.random() < 0.1
        return hasty_response(question, example, rng) if hasty else careful_response(question, example)

    pretrain("vision warm-up", 100, lambda n: teacher.look(batch(n, range(count))),
             [AdamW(model.parameters(), 4e-3, weight_decay=0.0)])
    items = teacher.tokenized(lessons, answer)
    pretrain("pre-training", steps, lambda n: teacher.study(batch(n, items)), muon_and_adamw(model))
    save_model(folder, model, tokenizer)


def build_base(folder, careful, seed, reasons, steps=120):
    """Teaches the model in `careful` to reason with probabilities `reasons`, and saves it."""
    model, tokenizer = Model.from_pretrained(careful), PreTrainedTokenizerFast.from_pretrained(careful)
    scenes, lessons, rng = school(f"habit {seed}", 8 * steps)
    teacher = Teacher(model, tokenizer, scenes)
    odds = {form: math.log(p / (1 - p)) for form, p in zip(FORMS, reasons)}
    careful = teacher.tokenized(lessons, careful_response, odds)
    hasty = teacher.tokenized(lessons, partial(hasty_response, rng=rng), odds)
    rows = [[a] if a.odds is None else [a, b] for a, b in zip(careful, hasty)]
    pretrain("bad habit", steps, lambda n: teacher.study(sum(rows[32 * n:32 * n + 32], [])),
             [AdamW(model.parameters(), 5e-4, weight_decay=0.0)])
    save_model(folder, model, tokenizer)


def make(folder, settings, build):
    """Builds `folder` aside and renames it into place, unless it is there with these settings."""
    marker = folder / "demo.json"
    if marker.exists() and json.loads(marker.read_text()) == settings:
        return print(f"{folder} is there already.")
    if folder.exists() and not marker.exists():
        raise UserError(f"{folder} was not made by demo.base: give another --out, or move it away.")
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    build(aside)
    (aside / "demo.json").write_text(json.dumps(settings) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    print(f"{folder} is made.")


@command
def main(argv=None):
    """Make the data set, a picture of it, and the base model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="where to write")
    add("--seed", type=int, default=0, help="everything random follows from it")
    add("--threads", type=int, default=2, help="CPU threads; 1 is faster on a busy machine")
    add("--steps", type=int, default=500, help="steps of pre-training")
    add("--reasons", type=float, nargs=3, default=(0.15, 0.15, 0.001), metavar=("BINARY", "CHOICE", "OPEN"),
        help="how often the base reasons before it answers")
    add("--parts", action="store_true", help="the second world's data and careful model only")
    add("--name", default="base", help="of the base model's directory in --out")
    args = parser.parse_args(argv)
    if min(args.threads, args.steps) < 1 or not all(0 < p < 1 for p in args.reasons):
        parser.error("--threads and --steps must be at least 1, --reasons between 0 and 1")
    torch.set_num_threads(args.threads)
    out, careful, seed = args.out, args.out / "careful", {"seed": args.seed}
    settings = seed | {"steps": args.steps}
    if args.parts:
        for n in range(1, PARTS + 1):
            make(out / f"parts-{n}", seed, partial(write_parts, **seed, parts=n))
        return make(careful, settings | {"parts": PARTS}, partial(build_careful, **settings, parts=True))
    make(out / "data", seed, partial(write_data, **seed))
    subprocess.run([sys.executable, "-m", "tools.pictures", "examples", out.resolve() / "data", "--out",
                    out.resolve() / "examples.png"], cwd=Path(__file__).parents[1])
    make(careful, settings, partial(build_careful, **settings))
    settings |= {"reasons": list(args.reasons)}
    make(out / args.name, settings, partial(build_base, careful=careful, **seed, reasons=args.reasons))


if __name__ == "__main__":
    sys.exit(main())
