"""Where a step's time goes, beside the least that it could take on this machine.

A floor is the longer of two times: for the arithmetic that a part cannot do without, at the rate at which this machine
multiplies as many rows with this model's own weights; and for the bytes that it must read, at the rate at which so much
memory is read. What is elementwise (norms, rotations, softmax) has no floor of its own, nor has the vision tower's
attention: an implementation at its floor is not to be had. Prompts of the parts are text only.
"""

import copy
import time
from collections import Counter
from contextlib import ExitStack
from functools import lru_cache
from unittest import mock

import torch

import engine
from engine import generate
from packed import attach_attention, forbidden_bias, pack, token_logps
from tools.timing import interleaved, make_prompt, timed


def matrices(*modules):
    """Numbers in the weight matrices of modules: a token's multiplications with all of them."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() > 1)


def text_operations(model, tokens, pairs, outputs=0):
    """Operations of the text model: `tokens` in its layers, `pairs` of a token and one it sees, `outputs` scored."""
    text = model.model.language_model
    seen = 4 * pairs * model.config.text_config.hidden_size * len(text.layers)
    return 2 * tokens * matrices(*text.layers) + seen + 2 * outputs * model.lm_head.weight.numel()


def vision_operations(model, patches):
    """Operations of the vision tower but for its attention: four patches become one token in its merger."""
    visual = model.model.visual
    return 2 * patches * (matrices(visual.patch_embed, *visual.blocks) + matrices(visual.merger) / 4)


def group_operations(model, P, C, G, patches=0):
    """Operations of one forward pass of a prompt and its G completions, the prompt encoded once."""
    pairs = P * (P + 1) / 2 + G * (C * P + C * (C + 1) / 2)
    return text_operations(model, P + G * C, pairs, G * C) + vision_operations(model, patches)


def least(function, device, repeats=20):
    """Seconds of the fastest of several calls."""
    return min(timed(function, device).wall for _ in range(repeats + 1))


@lru_cache
def multiply_rate(model, rows):
    """Operations a second of `rows` tokens times the matrix of an MLP's gate."""
    weight = model.model.language_model.layers[0].mlp.gate_proj.weight.detach()
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return 2 * rows * weight.numel() / least(lambda: x @ weight.T, weight.device.type)


@lru_cache
def read_rate(model, count):
    """Bytes a second at which `count` bytes of the model's kind of numbers are read."""
    x = torch.ones(int(count) // model.dtype.itemsize, dtype=model.dtype, device=model.device)
    return count / least(x.sum, model.device.type)


def update_floor(model, P, C, G, patches=0):
    """Least seconds of forward and backward of one group: the backward pass multiplies twice for each time forward."""
    return 3 * group_operations(model, P, C, G, patches) / multiply_rate(model, P + G * C)


def rollout_floors(model, B, G, P, C, patches=0):
    """{part: least seconds} of a rollout of B prompts (`patches` each) of P tokens, G completions of C tokens."""
    text, n, size = model.config.text_config, B * G, model.dtype.itemsize
    layers = model.model.language_model.layers
    rate, steps = multiply_rate(model, n), C - 1  # the prefill gives the first token
    attention = [layer.self_attn for layer in layers]
    head = text.hidden_size // text.num_attention_heads
    cached = 2 * len(layers) * text.num_key_value_heads * head * size * (B * P + n * C / 2)  # tails are half full
    arithmetic = 4 * n * (P + C / 2) * text.hidden_size * len(layers) / rate

    def multiply(*modules):
        return steps * 2 * n * matrices(*modules) / rate
    prefill = text_operations(model, B * P, B * P * (P + 1) / 2) + vision_operations(model, B * patches)
    return {
        "prefill": prefill / multiply_rate(model, B * P),
        "norm, q k v, rotation": multiply(*(part for a in attention for part in (a.q_proj, a.k_proj, a.v_proj))),
        "attention": steps * max(arithmetic, cached / read_rate(model, cached)),
        "output projection": multiply(*(a.o_proj for a in attention)),
        "norm, mlp": multiply(*(layer.mlp for layer in layers)),
        "head": multiply(model.lm_head),
        "sample": 0.0}


def step_floor(model, B, G, P, C, patches=0):
    """Least seconds of a whole step: rollout, the reference's forward pass, forward and backward of the update."""
    rollout = sum(rollout_floors(model, B, G, P, C, patches).values())
    return rollout + B * update_floor(model, P, C, G, patches) * 4 / 3


class Clock:
    """CPU seconds that calls of named functions took; a call from within another counted one is that one's."""

    def __init__(self):
        self.seconds, self.inside = Counter(), False

    def counted(self, name, function):
        """The same function, its time booked under a name."""
        def call(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            self.inside, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] += time.process_time() - start
        return call


def places(model):
    """(owner, attribute, part) of every function whose time is a part of a rollout."""
    layers = model.model.language_model.layers
    return [(engine, "packed_hidden", "prefill"), (engine, "qkv", "norm, q k v, rotation"),
            (engine, "attend_one", "attention"), (engine, "attend_shared", "attention"),
            *((layer.self_attn.o_proj, "forward", "output projection") for layer in layers),
            (engine, "feed_forward", "norm, mlp"), (model.lm_head, "forward", "head"),
            (engine.Engine, "_sample", "sample")]


def decode_parts(model, processor, repeats, B, G, P, C):
    """CPU seconds of a rollout by part, on a CPU, each beside its floor."""
    batch = [make_prompt(model, processor, P, seed=i, image=0) for i in range(B)]
    clock = Clock()
    with ExitStack() as stack:
        for owner, attribute, part in places(attach_attention(model)):
            counted = clock.counted(part, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, counted))
        generate(model, processor, batch, G, C, max_rows=B * G)
        clock.seconds.clear()
        whole = [timed(lambda: generate(model, processor, batch, G, C, max_rows=B * G), "cpu").cpu
                 for _ in range(repeats)]
    model.engine = None
    floors, whole = rollout_floors(model, B, G, P, C), sum(whole) / repeats
    spent = {part: clock.seconds[part] / repeats for part in floors}
    spent["rest of a step"] = whole - sum(spent.values())
    return beside({**spent, "rollout": whole}, {**floors, "rollout": sum(floors.values())})


def update_parts(model, processor, repeats, B, G, P, C):
    """CPU seconds of an update by part, on a CPU, each beside its floor; the optimizer is left out."""
    model.engine, reference = None, copy.deepcopy(attach_attention(model)).requires_grad_(False)
    bias = forbidden_bias(model, processor)
    groups = [(make_prompt(model, processor, P, seed=i, image=0), [[i] * C for _ in range(G)]) for i in range(B)]
    packs, sums = [], []

    def pack_all():
        packs[:] = [pack(model, [prompt], [group]) for prompt, group in groups]

    def backward():
        for total in sums:
            total.backward()
        model.zero_grad()

    def forward():
        sums[:] = [token_logps(model, packed, bias).sum() for packed in packs]

    parts = {"pack": pack_all, "reference forward": lambda: [token_logps(reference, packed, bias) for packed in packs],
             "policy forward": forward, "backward": backward}
    spent = {part: cost.cpu for part, cost in interleaved(parts, "cpu", repeats).items()}
    third = B * update_floor(model, P, C, G) / 3
    return beside({**spent, "update": sum(spent.values())},
                  {"reference forward": third, "policy forward": third, "backward": 2 * third, "update": 4 * third})


def beside(spent, floors):
    """{"PART CPU s", "PART, floor s"} where there is one."""
    return {f"{part}{what}": value for part, seconds in spent.items()
            for what, value in ((" CPU s", seconds), (", floor s", floors.get(part))) if value}
