"""Flags: what values they may have, and --help in groups. Both follow from the fields of Config in currreft.py.

A field is a flag of the same name, the comment on its line is its help, and the comment above a block of fields is the
title of a group. A new field works without an entry here; a number must be finite in any case.
"""

import argparse
import dataclasses
import inspect
import re

from support.words import UserError

SOME, MANY, SHARE = (1, 65_536), (1, 10**6), (0, 1)
BOUNDS = {  # field -> (least, most), both allowed
    "advance_at": SHARE, "prompts_per_step": SOME, "num_generations": (2, 4096), "updates_per_rollout": (1, 1000),
    "temperature": (0.01, 100), "max_completion_length": MANY, "max_prompt_length": MANY,
    "max_pixels": (3136, 2**24), "lr": (1e-12, 10), "warmup_steps": (0, 10**9), "weight_decay": (0, 10),
    "max_grad_norm": (1e-9, 1e9), "beta": (0, 1000), "epsilon": (1e-6, 0.999), "partial_credit": SHARE,
    "sft_lr": (1e-12, 10), "sft_batch": SOME, "reject_samples": (1, 1000), "reject_threshold": (0, 100),
    "seed": (-2**62, 2**62), "micro_batch": SOME, "max_rows": SOME, "eval_rows": SOME, "threads": (0, 4096),
    "timeout_minutes": (0.01, 10**5), "save_every": (1, 10**9), "keep": (1, 10**6), "sample_every": (1, 10**9),
    "eval_limit": (0, 10**9),
    # of sample.py
    "samples": (1, 10_000), "top_p": (1e-6, 1)}
CHOICES = {"reference": ("stage", "base"), "lr_schedule": ("cosine", "constant"), "report_to": ("", "tensorboard", "wandb"),
           "dtype": ("auto", "bfloat16", "float32")}


def check_values(values: dict) -> None:
    """UserError that names every number outside of its bounds, and every word that is none of its choices."""
    faults = []
    for name, value in values.items():
        least, most = BOUNDS.get(name, (-1e300, 1e300))
        if name in BOUNDS and not isinstance(value, int | float) or isinstance(value, int | float) and not (
                least <= value <= most):                    # NaN lies nowhere
            faults.append(f"--{name} must lie between {least:g} and {most:g}, not {str(value)[:40]}")
        if name in CHOICES and value not in CHOICES[name]:
            faults.append(f"--{name} must be {' or '.join(filter(None, CHOICES[name]))}, not {str(value)[:40]!r}")
        if isinstance(value, str) and "\0" in value:
            faults.append(f"--{name} holds a NUL character")
    if faults:
        raise UserError("\n".join(faults))


def parse(config, argv, description):
    """`config`, a dataclass, from the command line; its UserError for values that cannot be."""
    lines = inspect.getsource(config).splitlines()
    comments = dict(found.groups() for line in lines if (found := re.match(r"    (\w+): .*?  # (.*)$", line)))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    fields, group = {field.name: field for field in dataclasses.fields(config)}, parser
    for line in lines:
        if title := re.match(r"    # (.*)$", line):
            group = parser.add_argument_group(title[1])
        name = line.strip().partition(":")[0]
        if line[4:5].isspace() or name not in fields:
            continue
        if name not in comments:
            raise UserError(f"Config.{name} has no comment on its line in currreft.py: that is its --help")
        default = fields[name].default
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(default, bool) else \
            {"nargs": "+"} if isinstance(default, tuple) else {"type": type(default)}
        shown = " ".join(default) if isinstance(default, tuple) else default
        group.add_argument(f"--{name}", default=default, help=comments[name].replace("%", "%%") + (
            f" [{shown}]" if str(shown) and not isinstance(default, bool) else ""), **kind)
    values = vars(parser.parse_args(argv))
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
