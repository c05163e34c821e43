"""--check: what a careful person would look at before hours of training. Trains nothing and writes nothing."""

import time

import torch

from distributed import one_line, say
from engine import generate
from tools.blind import blind_report
from tools.doubts import text_only_truths


def check(run):
    """Show what each stage trains on, one rollout with its rewards, sampled against scored log-probs, and the time."""
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
    asked = [e for rows in run.examples.values() for e in rows]
    if as_written := list(dict.fromkeys(text_only_truths(asked))):
        say(f"{len(as_written)} true answers are paid only as they are written: "
            f"{', '.join(map(one_line, as_written[:3]))}")
    for sentence in blind_report(asked):
        say(sentence)
    examples = [rows[0] for rows in run.examples.values()] or run.questions[:1]
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
    gap = torch.cat(differences)
    say(f"log-probabilities while sampling against scoring: mean difference {gap.mean():.2g}, largest difference "
        f"{gap.max():.2g} (rounding: about 1e-5 at most in float32; in bfloat16 0.005 on average and 0.3 at most)")
    say(f"time of a step: about {share * (rollout + update * (1.4 if cfg.beta else 1)):.1f} s, first-call costs "
        f"included; {sum(stage.steps for stage in cfg.curriculum)} steps planned")
