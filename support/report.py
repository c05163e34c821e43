"""--report_to: every row of metrics.jsonl and every evaluation, in TensorBoard or Weights & Biases as well.

The run directory stays the record. A tracker that is asked for and missing, or that cannot start, ends the
program before any training; one that breaks later is given up, which is said once, and the run goes on.
"""
import json
import os
import sys
import uuid
from importlib import import_module

from support.words import RunError, UserError


class Reporter:
    """Where numbers go besides the run directory: kind "tensorboard", "wandb", or "" for nowhere."""

    def __init__(self, kind=""):
        """Import the tracker; UserError if it is not installed."""
        self.kind, self.send = kind, None
        try:
            if kind:
                self.module = import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
        except ImportError as error:
            raise UserError(f"--report_to {kind}: {error}. Install it with pip install {kind}, or leave the flag out: "
                            "metrics.jsonl has every number") from error

    def start(self, out, settings, step):
        """Begin the tracker's run for the run directory `out`, or continue it after `step` steps; else RunError.

        tensorboard: in out/tensorboard. wandb: under the id kept in out/wandb_id, and where its WANDB_..
        variables say. A tracker that is new to a resumed run is told the steps so far.
        """
        if not self.kind:
            return
        mark = out / {"tensorboard": "tensorboard", "wandb": "wandb_id"}[self.kind]
        known = mark.exists()
        try:
            self.send = (to_tensorboard if self.kind == "tensorboard" else to_wandb)(self.module, mark, settings, step)
        except Exception as error:  # whatever a tracker raises that finds no login, network or disk
            raise RunError(f"--report_to {self.kind} could not start ({error}). Put that right, or leave the flag "
                            "out, and continue with --resume") from error
        if not known and step:
            for line in (out / "metrics.jsonl").read_text().splitlines():
                self(json.loads(line))

    def __call__(self, row):
        """Send a row, whose "step" it belongs to. The first failure is said, and ends the sending."""
        try:
            if self.send:
                self.send(row)
        except Exception as error:  # an outage or a defect of a tracker must not end a run
            self.send = None
            print(f"--report_to {self.kind} failed at step {row['step']} ({error}). The run goes on without it; "
                  "metrics.jsonl has every number", file=sys.stderr)

    def results(self, step, splits):
        """Send the figures of an evaluation (sample.evaluate's `splits`) as eval/SPLIT/TASK/FIGURE."""
        self({"step": step, **{f"eval/{split}/{task}/{name}": value for split, tasks in splits.items()
                               for task, figures in tasks.items() for name, value in figures.items()}})


def to_tensorboard(module, mark, settings, step):
    """A function that sends a row; what a killed process wrote beyond `step` is hidden."""
    writer = module.SummaryWriter(str(mark), purge_step=step + 1)
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), step)

    def send(row):
        for name, value in row.items():
            if type(value) in (int, float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()
    return send


def to_wandb(module, mark, settings, step):
    """A function that sends a row, drawn over its "step": wandb's own counter refuses steps taken again."""
    if not mark.exists():
        mark.write_text(uuid.uuid4().hex)
    run = module.init(project=os.environ.get("WANDB_PROJECT", "curr-reft"), id=mark.read_text(), resume="allow",
                      name=mark.parent.name, dir=str(mark.parent), config=settings, allow_val_change=True)
    run.define_metric("*", step_metric="step")
    return run.log
