"""Flags from the fields of a dataclass: numbers within bounds, words among choices, --help.

A field is a flag of the same name, the comment on its line is its help, and the comment above a block of
fields is the title of a group. A new field works without an entry here: a number must be finite in any case.
"""

import argparse
import dataclasses
import inspect
import re

from support.words import UserError

FINITE, COUNT, RATE, SHARE = (-2**62, 2**62), (1, 10**6), (1e-12, 10), (0, 1)
BOUNDS = {  # field -> (least, most), both allowed; what it costs in memory is told by the estimate
    "prompts_per_step": COUNT, "num_generations": (2, 10**6), "updates_per_rollout": COUNT,
    "temperature": (0.01, 100), "max_completion_length": COUNT, "max_pixels": (3136, 10**9),
    "lr": RATE, "beta": (0, 1000), "epsilon": (1e-6, 0.999), "partial_credit": SHARE,
    "sft_lr": RATE, "sft_batch": COUNT, "reject_samples": COUNT, "reject_threshold": (0, 100),
    "micro_batch": COUNT, "max_rows": COUNT, "timeout_minutes": (0.01, 10**5),
    "save_every": (1, 10**9), "eval_limit": (0, 10**9), "samples": COUNT, "top_p": (1e-6, 1),
    "ranks": COUNT, "prompt_length": COUNT}
CHOICES = {"reference": ("stage", "base"), "lr_schedule": ("cosine", "constant"),
           "report_to": ("", "tensorboard", "wandb"), "dtype": ("auto", "bfloat16", "float32")}


def check_values(values: dict) -> None:
    """UserError that names every number out of bounds, every word that is no choice."""
    faults = []
    for name, value in values.items():
        least, most = BOUNDS.get(name, FINITE)
        shown = str(value)[:40]
        if isinstance(value, int | float) and not least <= value <= most:  # NaN lies nowhere
            faults.append(f"--{name} must lie between {least:g} and {most:g}, not {shown}")
        if name in CHOICES and value not in CHOICES[name]:
            words = " or ".join(filter(None, CHOICES[name]))
            faults.append(f"--{name} must be {words}, not {shown!r}")
    if faults:
        raise UserError("\n".join(faults))


def parse(config, argv, description):
    """`config`, a dataclass, from the command line; its UserError for values that cannot be."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    parser = group = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for line in inspect.getsource(config).splitlines():
        if title := re.match(r"    # (.*)$", line):
            group = parser.add_argument_group(title[1])
        name, comment = re.match(r"(?:    (\w+): (?:.*?  # (.*))?)?", line).groups()
        if name not in defaults:
            continue
        if not comment:
            raise UserError(f"{config.__name__}.{name} has no comment on its line: its --help")
        default, shown = defaults[name], f"[{defaults[name]}]"
        how = {"type": type(default)}
        if isinstance(default, bool):
            how, shown = {"action": argparse.BooleanOptionalAction}, ""
        elif isinstance(default, tuple):
            how, shown = {"nargs": "+"}, f"[{' '.join(default)}]"
        words = f"{comment} {shown.replace('[]', '')}".strip().replace("%", "%%")
        group.add_argument(f"--{name}", default=default, help=words, **how)
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
