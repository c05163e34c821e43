"""Offline stand-ins for the tests: a random Qwen2.5-VL checkpoint of 0.2 M parameters, and a small task
directory.
"""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil)

SPECIAL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]      # in Qwen's order

CORPUS = ["First think inside <think> </think>, then give the final answer inside <answer> </answer>.",
          'Answer with JSON boxes in pixels, [{"bbox_2d": [x1, y1, x2, y2]}], or "no objects".',
          "Answer exactly yes or no. Where is the red circle?", "Is there a circle?",
          "Which shapes are there? How many? You are a helpful assistant."]

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
         r"\s+(?!\S)|\s+")

TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_bpe(texts, vocab_size, split=SPLIT, **training) -> Tokenizer:
    """A byte-level BPE tokenizer in Qwen's way, trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **training))
    return bpe


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, Qwen's split and special tokens, these at the end; `<think>` is several ordinary tokens."""
    bpe = byte_bpe(CORPUS, 340)
    bpe.add_special_tokens(SPECIAL_TOKENS)
    bpe.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=SPECIAL_TOKENS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_checkpoint(path, seed: int = 0) -> Path:
    """Write a random Qwen2.5-VL checkpoint (model, tokenizer, image processor, generation config); return
    `path`.
    """
    path, tokenizer = Path(path), tiny_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")}
    text = dict(vocab_size=-(-len(tokenizer) // 64) * 64 + 64,     # more rows than tokens, as in the released models
                hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
                bos_token_id=ids["endoftext"], eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, window_size=112,
                  fullatt_block_indexes=[1])
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"])
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    # What a real checkpoint carries: settings that `generate` merges silently, and that no rollout may be
    # bent by.
    model.generation_config = GenerationConfig(
        do_sample=True, repetition_penalty=1.05, top_k=50, temperature=0.1,
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil().save_pretrained(path)
    return path


def tiny_image(path, size=(84, 56), color="red", box=None) -> Path:
    """Write a white picture of `size` with one filled box, and return its path."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle(box or (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=color)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return Path(path)


def write_jsonl(path, rows) -> Path:
    """Write rows as JSON lines (a string is written as it is), and return the path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return Path(path)


def tiny_data(path) -> Path:
    """A task directory in the released layout: four images of mixed sizes, stage files, two test files,
    questions.
    """
    path = Path(path)
    sizes = {"a": (84, 56), "b": (56, 84), "c": (112, 112), "d": (200, 100)}
    for (name, size), color in zip(sizes.items(), ("red", "green", "blue", "yellow")):
        tiny_image(path / "images" / f"{name}.png", size, color)
    box = {name: [w // 4, h // 4, w // 2, h // 2] for name, (w, h) in sizes.items()}

    def row(name, task, problem, answer):
        solution = f"<answer>{answer}</answer>"
        return {"image": f"images/{name}.png", "task": task, "problem": problem, "solution": solution}

    opened, binary, choice = [], [], []
    for name, color in zip(sizes, ("red", "green", "blue", "yellow")):
        opened += [row(name, "detection", f"Where is the {color} box?", json.dumps([{"bbox_2d": box[name]}])),
                   row(name, "classify", "Which shapes are there?", "box, rectangle"),
                   row(name, "math", "How many boxes are there?", "1")]
        binary += [row(name, "detection", f"Is {box[name]} the {color} box?", "yes"),
                   row(name, "classify", "Is there a circle?", "no"),
                   row(name, "math", "Is the number of boxes 3?", "no")]
        boxes = f"A. [0, 0, 9, 9]\nB. {box[name]}\nC. [5, 5, 20, 20]"
        choice += [row(name, "detection", f"Which is the {color} box?\n{boxes}", "B"),
                   row(name, "classify", "Which of these are there?\nA. box\nB. circle\nC. rectangle\nD. star", "A, C"),
                   row(name, "math", "How many boxes are there?\nA. 3\nB. 4\nC. 1\nD. 2", "C")]
    for form, rows in (("judge", binary), ("choice", choice), ("open", opened)):
        write_jsonl(path / "grpo_data" / "train" / f"{form}.jsonl", rows)
    write_jsonl(path / "grpo_data" / "test" / "open_id.jsonl", opened[:6])
    write_jsonl(path / "grpo_data" / "test" / "binary_ood.jsonl", binary[:6])

    def chat(question, answer, *images):
        turns = [{"role": "user", "content": question},
                 {"role": "assistant", "content": f"<think>Look.</think><answer>{answer}</answer>"}]
        return {"messages": turns, "images": [f"images/{image}.png" for image in images]}

    write_jsonl(path / "SFT_data" / "reject" / "questions.jsonl",
                [chat("What is 2 + 2?", "4"), chat("What is the color of the sky?", "blue"),
                 chat("<image>What color is the box?", "red", "a"),
                 chat("<image>\n<image>\nWhich box is wider, the first or the second?", "the first", "d", "b"),
                 chat("<image>What color is the box?", "green", "b")])
    return path
