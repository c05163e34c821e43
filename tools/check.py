"""Before a run: what memory it will need, and --check, what a careful person would look at before hours of training."""

import math
import time

import torch
import transformers

from distributed import UserError, one_line, say
from engine import generate
from sample import Judge


def memory_needed(config, cfg, ranks, prompt_length=None):
    """Estimated bytes per GPU of a run, by what they hold; config is the checkpoint's own (transformers) config.

    The first four are exact; cache, activations and logits follow from --max_rows, --micro_batch and the lengths.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    trained = total - vision * cfg.freeze_vision
    width = 4 if cfg.dtype == "float32" or (cfg.dtype == "auto" and not torch.cuda.is_available()) else 2
    text, tower = config.text_config, config.vision_config
    P = prompt_length or cfg.max_pixels // 784 + 200
    C, tokens = cfg.max_completion_length, cfg.micro_batch * (P + cfg.num_generations * cfg.max_completion_length)
    patches = cfg.micro_batch * cfg.max_pixels // 196
    # saved by one layer for its backward: normed, projected and attended states (13 H), four MLP states (4 I)
    layer = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size),
             (tower.depth * (not cfg.freeze_vision), patches, tower.hidden_size, tower.intermediate_size)]
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layer]
    activations = max(whole) + sum(d * n * h * width for d, n, h, _ in layer) if cfg.checkpoint_activations else \
        sum(d * w for (d, *_), w in zip(layer, whole))
    head = text.hidden_size // text.num_attention_heads
    rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
    return {"weights": total * width, "gradients": trained * width, "reference": total * width * (cfg.beta > 0),
            "optimizer": trained * (8 + 4 * (width == 2)) // ranks,
            "cache": rows * (P + C) * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width,
            "activations": activations,  # then chunks of logits, and the head's gradient in two widths
            "logits": 12 * min(2**26, tokens * text.vocab_size) + text.vocab_size * text.hidden_size * (width + 4)}


def check_memory(needed, say):
    """Say what a run will need per GPU; UserError where weights, gradients and optimizer alone cannot fit."""
    parts = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items() if size > 2**27)
    say(f"memory per process, estimated: {sum(needed.values()) / 2**30:.1f} GiB ({parts or 'all small'})")
    fixed = sum(needed[name] for name in ("weights", "gradients", "reference", "optimizer"))
    if torch.cuda.is_available() and fixed > (there := torch.cuda.get_device_properties(0).total_memory):
        raise UserError(f"weights, gradients, reference and optimizer need {fixed / 2**30:.1f} GiB on each GPU, which "
                        f"has {there / 2**30:.1f}: use more GPUs (the optimizer is shared among them), --freeze_vision "
                        "or --beta 0")


def check(run):
    """What a careful person would do by hand before a long run; trains nothing and writes nothing."""
    from currreft import Group, judge, token_logps  # which imports this file
    cfg = run.cfg
    run.load_weights(cfg.model)
    run.policy.eval()
    for stage in cfg.curriculum:
        rows = run.examples.get(stage.name, run.questions)
        lengths = sorted(run.processor.prompt_length(e) for e in rows)
        say(f"{stage.label}: {stage.steps} steps over {len(rows)} examples, prompts of {lengths[0]} to {lengths[-1]} "
            f"tokens, median {lengths[len(lengths) // 2]}\n    {rows[0].where}: {one_line(rows[0].problem)}\n"
            f"    truth: {one_line(rows[0].solution)}")
    examples = [rows[0] for rows in run.examples.values()] or run.questions[:1]
    if run.questions:
        Judge(cfg.judge_url, cfg.judge_model).probe()
    prompts = run.prompts(examples)
    started = time.perf_counter()
    completions = generate(run.policy, run.processor, prompts, cfg.num_generations, cfg.max_completion_length,
                           cfg.temperature, max_rows=cfg.max_rows)
    rollout = time.perf_counter() - started
    groups = [Group(*group) for group in zip(examples, prompts, completions)]
    judge(cfg, groups)
    for group in groups:
        say(f"asked {one_line(group.example.problem)}\n    answered {one_line(group.completions[0].text)}\n    "
            f"accuracy {group.accuracy[0]:g}, format {group.format[0]:g}")
    differences, started = [], time.perf_counter()
    for group in groups:
        packed = run.pack([group.prompt], [[o.tokens for o in group.completions]]).to(run.device)
        logps = token_logps(run.policy.train(), packed, run.bias, cfg.temperature)
        (logps * 0).sum().backward()
        sampled = torch.cat([o.logps for o in group.completions]).to(logps.device)
        differences.append((logps.detach()[packed.mask.bool()] - sampled).abs())
    update = time.perf_counter() - started
    share = cfg.prompts_per_step / run.ranks / len(groups)
    say(f"log-probabilities while sampling against scoring: largest difference {torch.cat(differences).max():.2g} "
        "(about 1e-5 in float32, up to 0.1 in bfloat16)")
    say(f"time of a step: about {share * (rollout + update * (1.4 if cfg.beta else 1)):.1f} s, first-call costs "
        f"included; {sum(stage.steps for stage in cfg.curriculum)} steps planned")
