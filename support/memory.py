"""What memory a run needs: arithmetic on the model, the settings and the longest prompt read.

Said before every run. tests/test_memory.py adds up the same step tensor by tensor; docs/3b.md has a
table of both (python -m tools.memory). Neither knows what CUDA takes for itself: OVERHEAD.
"""

import math
import os

import torch
import transformers

from support.words import UserError, say

OVERHEAD = 2**30  # bytes: CUDA's context, cuBLAS's workspaces, captured steps. Estimated
CHUNK = 2**26     # numbers in a chunk of logits (SelectedLogps) and of masters (ShardedAdamW)


def memory_needed(config, cfg, ranks, prompt_length=None):
    """Estimated bytes per GPU of a run, by what they hold: {"weights": .., "gradients": .., ..}.

    config: the checkpoint's own (transformers). cfg: the settings, currreft.Config. prompt_length:
    tokens of the longest prompt (default: one image of --max_pixels and 200 tokens of text). The
    first four are exact; cache, activations and logits follow from --max_rows, --micro_batch and
    the lengths.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = {name: n for name, n in sizes.items()
               if not (cfg.freeze_vision and ".visual." in name)}
    total, width, text = sum(sizes.values()), width_of(cfg), config.text_config
    P = prompt_length or cfg.max_pixels // 784 + 200
    rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
    slots = rows * (P + cfg.max_completion_length)  # on a GPU each row has its prompt
    head = text.hidden_size // text.num_attention_heads
    # whole tensors are dealt out to ranks: the owner of the largest holds all of it
    owned = max(math.ceil(sum(trained.values()) / ranks), max(trained.values()))
    return {"weights": total * width, "gradients": sum(trained.values()) * width,
            "reference": total * width * (cfg.beta > 0),
            "optimizer": 0 if cfg.offload else owned * (8 + 4 * (width == 2)),
            "cache": slots * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width,
            **activations(config, cfg, P, width), "logits": logits(config, cfg, width)}


def width_of(cfg):
    """Bytes of a weight."""
    cuda = torch.cuda.is_available()
    return 4 if cfg.dtype == "float32" or cfg.dtype == "auto" and not cuda else 2


def activations(config, cfg, P, width):
    """{"activations": bytes that layers keep for the backward pass, "layer": of one at work}."""
    text, tower = config.text_config, config.vision_config
    tokens = cfg.micro_batch * (P + cfg.num_generations * cfg.max_completion_length)
    layers = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size)]
    if not cfg.freeze_vision:
        patches = cfg.micro_batch * cfg.max_pixels // 196
        layers.append((tower.depth, patches, tower.hidden_size, tower.intermediate_size))
    # a layer keeps its normed, projected and attended states (13 H) and four of its MLP (4 I)
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layers]
    kept = sum(depth * w for (depth, *_), w in zip(layers, whole)) - max(whole)
    if cfg.checkpoint_activations:  # every layer's input; the layer at work is computed again
        kept = sum(depth * n * h * width for depth, n, h, _ in layers)
    return {"activations": kept, "layer": max(whole)}


def logits(config, cfg, width):
    """Bytes of a chunk of logits, in float32 and what is made of it, and of the head's gradient."""
    text = config.text_config
    tokens = cfg.micro_batch * cfg.num_generations * cfg.max_completion_length
    chunk = min(CHUNK, tokens * text.vocab_size)
    return 12 * chunk + text.vocab_size * text.hidden_size * width


def check_memory(needed, cfg, say=say):
    """Say what a run needs per process; UserError for what a GPU cannot hold, or memory by far."""
    parts = " + ".join(f"{name} {n / 2**30:.1f}" for name, n in needed.items() if n > 2**27)
    most = sum(needed.values())
    say(f"memory per process, estimated: {most / 2**30:.1f} GiB ({parts or 'all small'})")
    cuda = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if cuda else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lasting = ("weights", "gradients", "reference", "optimizer")
    fixed = OVERHEAD + sum(needed[name] for name in lasting)
    if cuda and fixed > there:
        raise UserError(
            f"{', '.join(lasting)} and CUDA need {fixed / 2**30:.1f} GiB on each GPU, which has "
            f"{there / 2**30:.1f}: use --offload, more GPUs (the optimizer is shared among them), "
            "--freeze_vision or --beta 0")
    if most > 1.5 * there:  # what is near is tried
        raise UserError(
            f"the run needs about {most / 2**30:,.0f} GiB in each process, most of it for "
            f"{max(needed, key=needed.get)}, and there are {there / 2**30:,.0f}: lower --max_rows, "
            "--micro_batch, --max_completion_length or --max_pixels, or add "
            "--checkpoint_activations")
