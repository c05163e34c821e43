"""What all measures stand on: random models of named sizes, prompts for them, and fair timing."""

import statistics
import tempfile
import time
from collections import namedtuple

import torch
import transformers

from data import Processor, Prompt
from support.tiny import tiny_checkpoint

Cost = namedtuple("Cost", "wall cpu")  # seconds: passed, and worked by all threads of the process
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size")
VISION = ("hidden_size", "intermediate_size", "depth", "num_heads")
MODEL_SIZES = {
    "demo": ((128, 384, 4, 4, 2, 1024), (128, 256, 2, 4)),
    "tiny": ((192, 512, 4, 4, 2, 512), (64, 128, 2, 4)),
    "small": ((512, 1408, 8, 8, 2, 8192), (128, 256, 4, 4)),
    "3b": ((2048, 11008, 36, 16, 2, 151_936), (1280, 3420, 32, 16))}  # Qwen2.5-VL-3B-Instruct


def build(size, device="cpu", folder=None):
    """(a random Qwen2.5-VL in eval mode, the tests' Processor); written to `folder`, if any."""
    with tempfile.TemporaryDirectory() as tiny:
        processor = Processor.from_pretrained(tiny_checkpoint(tiny))
        config = transformers.AutoConfig.from_pretrained(tiny).to_dict()
    text, vision = (dict(zip(*pair)) for pair in zip((TEXT, VISION), MODEL_SIZES[size]))
    depth, part = vision["depth"], text["hidden_size"] // text["num_attention_heads"] // 16
    config["text_config"] |= {**text, "layer_types": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * part, 3 * part, 3 * part]}}
    config["vision_config"] |= {**vision, "out_hidden_size": text["hidden_size"],
                                "fullatt_block_indexes": [*range(7, depth, 8)] or [depth - 1]}
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            transformers.Qwen2_5_VLConfig(**config),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config = transformers.GenerationConfig()
    for part in (processor, model) if folder else ():  # the processor brings a config of its own
        part.save_pretrained(folder)
    processor.end_ids = (-1,)  # which makes the real ones tokens that no completion may hold
    return model.to(device).eval(), processor


def make_prompt(processor, length, seed=0):
    """A prompt of `length` tokens; about two thirds of them are a square picture."""
    g = torch.Generator().manual_seed(seed)
    ids, side = torch.randint(0, 300, (length,), generator=g), int((length * 2 / 3)**0.5)
    ids[10:10 + side * side] = processor.image_token_id
    pixels = torch.randn(4 * side * side, 1176, generator=g)
    return Prompt(ids, pixels, torch.tensor([[1, 2 * side, 2 * side]]))


def as_transformers(model):
    """The same model as transformers runs it; `attach_attention` makes it ours again."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        module.__dict__.pop("forward", None)  # our norms and patches
    return model


def plain_inputs(processor, prompts, device):
    """Prompts of one length, with pictures, as transformers takes them."""
    ids = torch.stack([p.input_ids for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == processor.image_token_id).int(),
              "pixel_values": torch.cat([p.pixel_values for p in prompts]),
              "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts])}
    return {name: value.to(device) for name, value in inputs.items()}


def timed(function):
    """Cost of a call; a function whose work another process has done returns its Cost itself."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    here = Cost(time.perf_counter() - wall, time.process_time() - cpu)
    return result if isinstance(result, Cost) else here


def bandwidth(device):
    """Bytes a second that a large copy reads and writes."""
    x, y = torch.ones(2, 2**27, device=device)  # 1 GiB
    return 2 * x.nbytes / min(timed(lambda: x.copy_(y)).wall for _ in range(5))


def alternately(functions, repeats):
    """Rounds for `compared`, the first to warm up: each of {name: function} in turn."""
    return [{name: timed(f) for name, f in functions.items()} for _ in range(repeats + 1)]


def compared(rounds, device):
    """Median seconds of each name of [{name: Cost}], the first round left out; and how often the
    first name's go into each other's: CPU seconds, which other work disturbs less; on a GPU, wall.
    """
    unit, (first, *others) = "s" if device == "cuda" else "CPU s", rounds[0]
    figures = {f"{name} {unit}": statistics.median(values) for name in rounds[0] for unit, values
               in zip(("s", "CPU s"), zip(*(costs[name] for costs in rounds[1:])))}
    return figures | {f"{name} / {first}": figures[f"{name} {unit}"] / figures[f"{first} {unit}"]
                      for name in others}
