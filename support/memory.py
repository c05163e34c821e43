"""What memory a run needs: arithmetic on the model, the settings and the longest prompts read.

Said before every run. tests/test_memory.py adds up the life of a run tensor by tensor; docs/3b.md has
a table of both (python -m tools.memory). Neither knows what CUDA takes for itself: OVERHEAD.
"""

import math
import os
from pathlib import Path

import torch
import transformers

from support.words import UserError, say

OVERHEAD = 5 * 2**29  # bytes: CUDA's context, cuBLAS's workspaces and up to 64 captured steps. Estimated
PROCESS = 2**31       # bytes of the host's that a process takes with its libraries. Estimated
CHUNK = 2**26         # numbers in a chunk of logits (SelectedLogps) and of masters (ShardedAdamW)
PREFILL = 16_384      # tokens that the engine prefills together
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def memory_needed(config, cfg, ranks, prompt_length=None, asked_length=None):
    """Estimated bytes per GPU of a run, by what they hold: {"weights": .., "gradients": .., ..}.

    config: the checkpoint's own (transformers). cfg: the settings, currreft.Config. prompt_length:
    tokens of the longest prompt that is trained on (default: one image of --max_pixels and 200
    tokens of text); asked_length: of the longest test and question (default: prompt_length). The
    first four are exact, the others follow from --max_rows, --micro_batch and the lengths, at the
    worst moment of an update. "evaluation" is what one needs beyond that: it lives without
    gradients, reference and optimizer, but with all of --max_rows.
    """
    total, trained = parameters(config, cfg)
    width, P = width_of(cfg), prompt_length or cfg.max_pixels // 784 + 200
    prompts = math.ceil(cfg.prompts_per_step / ranks)
    rows = max(min(cfg.max_rows, cfg.num_generations * prompts), cfg.num_generations)
    needed = {"weights": total * width, "gradients": sum(trained) * width,
              "reference": total * width * (cfg.beta > 0),
              "optimizer": 0 if cfg.offload else owned(trained, ranks) * (8 + 4 * (width == 2)),
              "cache": cache(config, cfg, rows, P),
              **activations(config, cfg, P, width), "logits": logits(config, cfg, width)}
    if prompts <= cfg.micro_batch:  # in one backward pass gradients come as activations go
        needed["activations"] = max(0, needed["activations"] - needed["gradients"])
    at_most = max([cfg.max_rows] + [cfg.reject_samples for s in cfg.curriculum if s.name == "reject"])
    L = asked_length or P
    asked = total * width + cache(config, cfg, at_most, L) + prefill(config, width, min(PREFILL, at_most * L))
    return {**needed, "evaluation": max(0, asked - sum(needed.values()))}


def parameters(config, cfg):
    """(number of all parameters, [number of each weight that is trained])."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return sum(sizes.values()), [n for name, n in sizes.items()
                                 if not (cfg.freeze_vision and ".visual." in name)]


def owned(trained, ranks):
    """Parameters of a rank's share: whole tensors are dealt out, so one rank has all of the largest."""
    return max(math.ceil(sum(trained) / ranks), max(trained))


def width_of(cfg):
    """Bytes of a weight."""
    cuda = torch.cuda.is_available()
    return 4 if cfg.dtype == "float32" or cfg.dtype == "auto" and not cuda else 2


def cache(config, cfg, rows, length):
    """Bytes of keys and values of a rollout: on a GPU each row has its prompt, in slots of 256."""
    text, slots = config.text_config, -(-length // 256) * 256 + cfg.max_completion_length
    head = text.hidden_size // text.num_attention_heads
    slots = -(-slots // 256) * 256
    return rows * slots * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width_of(cfg)


def prefill(config, width, tokens):
    """Bytes at work in a prefill: the vision tower's MLP, if all of it were pictures, and their pixels."""
    tower = config.vision_config
    return 4 * tokens * (4 * 1176 + width * (2 * tower.hidden_size + 3 * tower.intermediate_size))


def activations(config, cfg, P, width):
    """{"activations": bytes that layers keep for the backward pass, "layer": of one at work}."""
    text, tower = config.text_config, config.vision_config
    T, rows = cfg.max_completion_length, cfg.num_generations * cfg.micro_batch
    tokens = cfg.micro_batch * P + rows * T
    layers = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size)]
    if not cfg.freeze_vision:
        patches = cfg.micro_batch * cfg.max_pixels // 196
        layers.append((tower.depth, patches, tower.hidden_size, tower.intermediate_size))
    # a layer keeps its normed, projected and attended states (13 H) and four of its MLP (4 I)
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layers]
    kept = sum(depth * w for (depth, *_), w in zip(layers, whole)) - max(whole)
    if cfg.checkpoint_activations:  # every layer's input; the layer at work is computed again
        kept = sum(depth * n * h * width for depth, n, h, _ in layers)
    repeats = text.num_attention_heads // text.num_key_value_heads
    mask = (rows if cfg.micro_batch > 1 else 1) * T * repeats * (P + T) * width  # Packed.attend
    return {"activations": kept + mask, "layer": max(whole)}


def logits(config, cfg, width):
    """Bytes of a chunk of logits, in float32 and what is made of it, and of the head's gradient."""
    text = config.text_config
    tokens = cfg.micro_batch * cfg.num_generations * cfg.max_completion_length
    chunk = min(CHUNK, tokens * text.vocab_size)
    return 12 * chunk + text.vocab_size * text.hidden_size * width


def host_needed(config, cfg, ranks, here=1):
    """Estimated bytes of a machine's memory that its `here` ranks need.

    Weights pass through it when they are loaded and saved. With --offload it keeps each rank's sums
    of gradients, and the masters and moments of its share, all in float32.
    """
    total, trained = parameters(config, cfg)
    offloaded = 4 * sum(trained) + 12 * owned(trained, ranks) if cfg.offload else 0
    return here * (PROCESS + total * width_of(cfg) + offloaded)


def check_memory(needed, cfg, say=say, host=0):
    """Say what a run needs per process; UserError for what a GPU cannot hold, or memory by far.

    host: what `host_needed` returns; the machine, or its container, must have it.
    """
    parts = " + ".join(f"{name} {n / 2**30:.1f}" for name, n in needed.items() if n > 2**27)
    most = sum(needed.values())
    cuda = torch.cuda.is_available()
    say(f"memory per process, estimated: {most / 2**30:.1f} GiB ({parts or 'all small'})"
        + f"; of this machine's: {host / 2**30:.1f} GiB" * cuda)
    limit = LIMIT.read_text().strip() if LIMIT.exists() else ""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = min(machine, int(limit)) if limit.isdigit() else machine
    there = torch.cuda.get_device_properties(0).total_memory if cuda else machine
    if cuda and host > machine:
        raise UserError(
            f"this machine has {machine / 2**30:.1f} GiB of memory beside its GPUs, and its ranks need "
            f"{host / 2**30:.1f}: weights pass through it, and --offload keeps masters, moments and sums "
            "of gradients there. Use a machine (or container) with more, fewer ranks, or --freeze_vision")
    own = OVERHEAD * cuda
    lasting = own + sum(needed[name] for name in ("weights", "gradients", "reference", "optimizer"))
    if cuda and lasting > there or most > 1.5 * there:  # what is near is tried
        raise UserError(
            f"the run needs about {(most + own) / 2**30:,.0f} GiB in each process, most of it for "
            f"{max(needed, key=needed.get)}, and there are {there / 2**30:,.0f}. --offload or more GPUs, which "
            "share it, take less for the optimizer; --freeze_vision for gradients; --beta 0 for the reference; "
            "--checkpoint_activations or a lower --micro_batch for activations; a lower --max_rows for cache "
            "and evaluation; shorter --max_completion_length or fewer --max_pixels for the rest")
