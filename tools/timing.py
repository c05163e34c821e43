"""What every measure of the benchmark stands on: random models of named sizes, prompts for them, and fair timing."""

import statistics
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers

from data import Prompt

SIZES = {  # text hidden, intermediate, layers, heads, kv heads, vocabulary; vision hidden, intermediate, depth, heads
    "demo": (128, 384, 4, 4, 2, 1024, 128, 256, 2, 4),
    "tiny": (192, 512, 4, 4, 2, 512, 64, 128, 2, 4),
    "small": (512, 1408, 8, 8, 2, 8192, 128, 256, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151_936, 1280, 3420, 32, 16),  # config.json of Qwen/Qwen2.5-VL-3B-Instruct
}


def build(size, device, dtype):
    """A random Qwen2.5-VL of a named size, in eval mode, with transformers' own attention; and a stand-in processor."""
    hidden, inner, layers, heads, kv, vocabulary, v_hidden, v_inner, depth, v_heads = SIZES[size]
    half = hidden // heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 at 3B
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
            "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": None, "eos_token_id": None},
        vision_config={
            "hidden_size": v_hidden, "intermediate_size": v_inner, "depth": depth, "num_heads": v_heads,
            "out_hidden_size": hidden, "window_size": 112,
            "fullatt_block_indexes": list(range(depth))[7::8] or [depth - 1]},
        image_token_id=vocabulary - 4, video_token_id=vocabulary - 3, vision_start_token_id=vocabulary - 6,
        vision_end_token_id=vocabulary - 5, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    processor = SimpleNamespace(end_ids=(-1,), image_token_id=vocabulary - 4, decode=lambda ids: "",
                                forbidden_ids=lambda v: range(v - 6, v))
    return model.to(device).eval(), processor


def make_prompt(model, processor, length, seed=0, image=None):
    """A prompt of `length` tokens; `image` of them a square picture: two thirds unless given, as in our data sets."""
    g = torch.Generator().manual_seed(seed)
    side = int((length * 2 / 3 if image is None else image) ** 0.5)
    ids = torch.randint(0, model.config.text_config.vocab_size - 10, (length,), generator=g)
    if not side:
        return Prompt(ids, None, None)
    ids[10:10 + side * side] = processor.image_token_id
    return Prompt(ids, torch.randn(4 * side * side, 1176, generator=g), torch.tensor([[1, 2 * side, 2 * side]]))


def plain(model):
    """The same model with transformers' own attention: what the anchors use."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        module.__dict__.pop("forward", None)  # the engine's norms
    return model


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Cost(NamedTuple):
    """Seconds on the wall, and of all threads of the process that worked."""

    wall: float
    cpu: float


def timed(function, device):
    """Cost of a call; a function that had its work done elsewhere returns a Cost, which is taken."""
    sync(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    sync(device)
    return result if isinstance(result, Cost) else Cost(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(functions, device, repeats, warmup=1):
    """{name: median Cost} of several functions, run in turn."""
    costs = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            cost = timed(function, device)
            if i >= warmup:
                costs[name].append(cost)
    return {name: Cost(*map(statistics.median, zip(*each))) for name, each in costs.items()}


def compared(costs, device):
    """The figures of several Costs by name, and how often the first goes into each other."""
    seconds = {name: cost.wall if device == "cuda" else cost.cpu for name, cost in costs.items()}
    first, *others = costs
    return {**{f"{name} {unit}": value for name, cost in costs.items() for unit, value in
               (("s", cost.wall), ("CPU s", cost.cpu))},
            **{f"{name} / {first}": seconds[name] / seconds[first] for name in others}}


def hf_inputs(processor, prompts, device):
    ids = torch.stack([p.input_ids for p in prompts]).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == processor.image_token_id).int(),
            "pixel_values": torch.cat([p.pixel_values for p in prompts]).to(device),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]).to(device)}
