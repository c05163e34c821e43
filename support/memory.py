"""What memory a run needs: estimated before every run, and added up tensor by tensor from the real step without data.

    python -m tools.memory              # 3B and 7B on the cards of docs/3b.md: both figures, side by side
    python -m tools.memory --size 7b --ranks 4 --prompt_length 4096 --checkpoint_activations --beta 0

`memory_needed` is arithmetic on the configuration, the settings and the longest prompt that was read. `simulate` runs
the project's own prefill, decode step, scoring, backward and optimizer at full size, on tensors that have shapes and no
data, and adds up what lives. Neither knows what CUDA takes for itself: OVERHEAD is set aside for that.
"""

import math
import os

import torch
import transformers

import engine
from support.words import UserError, say

OVERHEAD = 2**30  # bytes: CUDA's context, cuBLAS's workspaces, captured decode steps and their pool. Estimated
CHUNK = 2**26     # numbers in a chunk of logits (engine.SelectedLogps) and of masters (distributed.ShardedAdamW)


# ---- Estimated ----

def memory_needed(config, cfg, ranks, prompt_length=None):
    """Estimated bytes per GPU of a run, by what they hold; config is the checkpoint's own (transformers) config.

    prompt_length: tokens of the longest prompt (default: one image of --max_pixels and 200 tokens of text). The first
    four are exact; cache, activations and logits follow from --max_rows, --micro_batch and the lengths.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = {name: n for name, n in sizes.items() if not (cfg.freeze_vision and ".visual." in name)}
    total, width, text = sum(sizes.values()), width_of(cfg), config.text_config
    P, C = prompt_length or cfg.max_pixels // 784 + 200, cfg.max_completion_length
    rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
    shared = engine.shares_prompts("cuda", P, rows, cfg.num_generations)  # also where a CPU estimates
    slots = rows * C + (2 * rows // cfg.num_generations if shared else rows) * P
    head = text.hidden_size // text.num_attention_heads
    owned = max(math.ceil(sum(trained.values()) / ranks), max(trained.values()))  # whole tensors are dealt out
    return {"weights": total * width, "gradients": sum(trained.values()) * width,
            "reference": total * width * (cfg.beta > 0),
            "optimizer": 0 if cfg.offload else owned * (8 + 4 * (width == 2)),
            "cache": slots * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width,
            **activations(config, cfg, P, width), "logits": logits(config, cfg, P, width)}


def peak(needed, cfg):
    """Bytes at the worst moment: all at once; with offload gradients come when activations and logits have gone."""
    if not cfg.offload:
        return sum(needed.values())
    forward, backward = needed["activations"] + needed["logits"], needed["gradients"]
    return sum(needed.values()) - min(forward, backward)


def width_of(cfg):
    """Bytes of a weight."""
    return 4 if cfg.dtype == "float32" or (cfg.dtype == "auto" and not torch.cuda.is_available()) else 2


def activations(config, cfg, P, width):
    """{"activations": bytes that layers keep for the backward pass of a micro-batch, "layer": of the one at work}."""
    text, tower = config.text_config, config.vision_config
    tokens = cfg.micro_batch * (P + cfg.num_generations * cfg.max_completion_length)
    layers = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size)]
    if not cfg.freeze_vision:
        patches = cfg.micro_batch * cfg.max_pixels // 196
        layers.append((tower.depth, patches, tower.hidden_size, tower.intermediate_size))
    # a layer keeps its normed, projected and attended states (13 H) and four states of its MLP (4 I)
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layers]
    kept = sum(depth * w for (depth, *_), w in zip(layers, whole)) - max(whole)
    if cfg.checkpoint_activations:  # every layer's input; the layer at work is computed again
        kept = sum(depth * n * h * width for depth, n, h, _ in layers)
    return {"activations": kept, "layer": max(whole)}


def logits(config, cfg, P, width):
    """Bytes of one chunk of logits in float32 and what is made of it, and of the head's gradient before it is added."""
    text, tokens = config.text_config, cfg.micro_batch * cfg.num_generations * cfg.max_completion_length
    return 12 * min(CHUNK, tokens * text.vocab_size) + text.vocab_size * text.hidden_size * width


def check_memory(needed, cfg, say=say):
    """Say what a run will need per process; UserError for what a GPU cannot hold, or memory not by far (an estimate)."""
    parts = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items() if size > 2**27)
    say(f"memory per process, estimated: {peak(needed, cfg) / 2**30:.1f} GiB ({parts or 'all small'})")
    cuda = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if cuda else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fixed = OVERHEAD + sum(needed[name] for name in ("weights", "gradients", "reference", "optimizer"))
    if cuda and fixed > there:
        raise UserError(f"weights, gradients, reference, optimizer and CUDA need {fixed / 2**30:.1f} GiB on each GPU, "
                        f"which has {there / 2**30:.1f}: use --offload, more GPUs (the optimizer is shared among "
                        "them), --freeze_vision or --beta 0")
    if peak(needed, cfg) > 1.5 * there:     # what is near is tried
        raise UserError(f"the run needs about {peak(needed, cfg) / 2**30:,.0f} GiB in each process, most of it for "
                        f"{max(needed, key=needed.get)}, and there are {there / 2**30:,.0f}: lower --max_rows, "
                        "--micro_batch, --max_completion_length or --max_pixels, or add --checkpoint_activations")


