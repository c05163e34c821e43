"""What a careful person would look at before hours of training. Keeps nothing, writes nothing.

    python -m tools.check --model .. --data .. [currreft's flags]
    torchrun --nproc_per_node 8 -m tools.check --model .. --data .. [..]   # as the run will be

All data is read and checked; each GRPO stage takes a step, twice, at a rate that moves no weight.
"""

import dataclasses
import sys
import time

import torch
import torch.distributed as dist

from currreft import assign_rewards, begin, parse_args, rollout, update
from support.answers import truth_of
from support.blind import blind_report
from support.optimizer import ShardedAdamW
from support.ranks import leave
from support.signals import Stopped, ending, signals
from support.warnings import text_only_truths
from support.words import command, one_line, say


def check(run):
    """Say what there is to see of a run that `begin` has made."""
    run.cfg = dataclasses.replace(run.cfg, lr=1e-12)
    run.load_weights(run.cfg.model)
    for stage in run.cfg.curriculum:
        rows = run.examples.get(stage.name, run.questions)
        lengths = sorted(run.processor.prompt_lengths(rows))
        say(f"{stage.label}: {stage.steps} steps over {len(rows)} examples, prompts of "
            f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}\n"
            f"    {rows[0].where}: {one_line(rows[0].problem)}\n"
            f"    truth: {one_line(rows[0].solution)}")
    asked = [example for rows in run.examples.values() for example in rows]
    truths = [truth_of(e) for e in asked if (e.task, e.form) == ("math", "open")]
    if written := list(dict.fromkeys(text_only_truths(truths))):
        say(f"{len(written)} true answers are paid only as they are written, or read as one number: "
            f"{', '.join(map(one_line, written[:3]))}")
    for sentence in blind_report(asked):
        say(sentence)
    took = {stage: take_step(run, stage) for stage in run.cfg.curriculum if stage.forms}
    hours = sum(stage.steps * seconds for stage, seconds in took.items()) / 3600
    say(f"{sum(stage.steps for stage in took)} steps of GRPO planned, about {hours:.1f} hours")


def take_step(run, stage):
    """Show a stage's first step; returns its seconds when it is taken again."""
    run.optimizer = run.reference = None  # the last stage's are freed first
    run.optimizer = ShardedAdamW(run.policy.named_parameters(), offload=run.cfg.offload)
    run.load_reference(stage)
    for _ in range(2):  # what is compiled, captured and allocated is so the first time
        started = time.perf_counter()
        groups = rollout(run, stage, 0)
        sampled = time.perf_counter()
        assign_rewards(run.cfg, groups)
        for group in groups:  # also those that teach nothing yet, as all answers are wrong
            group.advantages = torch.ones_like(group.advantages)
        sums = update(run, stage, 0, groups)
    seconds, group, answer = time.perf_counter() - started, groups[0], groups[0].completions[0]
    say(f"{stage.label}: asked {one_line(group.example.problem)}\n"
        f"    answered {one_line(answer.text)}{' (truncated)' * answer.truncated}\n"
        f"    accuracy {group.accuracy[0]:g}, format {group.format[0]:g}\n"
        f"    log-probabilities while sampling against scoring: mean difference "
        f"{sums['logp_gap'] / sums['compared']:.2g} (rounding: 1e-6 in float32, 0.005 in bfloat16)\n"
        f"    time of a step: about {seconds:.1f} s, {sampled - started:.1f} s of it the rollout")
    return seconds


@command
def main(argv=None):
    """Ends as currreft.py does: with its sentences and exit codes, and with the other ranks."""
    with signals:
        try:
            check(begin(parse_args(argv)))
        except (Stopped, Exception) as error:
            leave(*ending(error, begun=False))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
