"""What a run writes down and shows of each step: metrics.jsonl, a line on the terminal, now and then a sample."""

import json
import math
import sys

from tqdm import tqdm

from support.ranks import gather, world
from support.report import Reporter
from support.warnings import Watch
from support.words import one_line, say

SAMPLE_EVERY = 10  # steps
SHOWN = {  # column of metrics.jsonl -> what the line of a step calls it
    "reward": "reward", "reward/accuracy": "accuracy", "loss": "loss", "kl": "kl", "entropy": "entropy",
    "equal_groups": "equal", "truncated": "truncated", "completion_length": "length", "tokens_per_second": "tok/s"}


def over_ranks(sums, seconds, signal):
    """Add up {name: (sum, count)} of all ranks: (totals, {part: seconds of the slowest rank}, any signal)."""
    totals, slowest, arrived = {}, {}, 0
    for others, times, number in gather((sums, seconds, signal)):
        arrived = arrived or number
        for name, (value, count) in others.items():
            a, b = totals.get(name, (0.0, 0))
            totals[name] = a + value, b + count
        for name, value in times.items():
            slowest[name] = max(value, slowest.get(name, 0.0))
    return totals, slowest, arrived


class Log:
    """The log of a run; `bar` is the progress bar of a stage, where somebody watches a terminal."""

    def __init__(self, out, report_to):
        self.out, self.bar, self.watch = out, None, Watch()
        self.report = Reporter(report_to)  # on every rank, so that all find it missing; rank 0 starts it

    def open_bar(self, stage, done):
        """Begin to show a stage."""
        watched = world()[0] == 0 and sys.stderr.isatty()
        self.bar = tqdm(total=stage.steps, initial=done, desc=stage.name, dynamic_ncols=True) if watched else None

    def end_stage(self):
        """Leave the bar's line, so that what is said next has one of its own; say how the stage went."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.watch.end()

    def step(self, stage, head, totals, seconds, tail):
        """Write and show a step: means of `totals` between the columns of `head` and `tail`. Rank 0 alone.

        tokens_per_second: sampled in a rollout, or answers' tokens learned from in a supervised update.
        """
        part = "rollout" if "rollout" in seconds else "update"
        tokens = totals["completion_length" if part == "rollout" else "loss"][part == "update"]
        row = {**head, **{name: value / max(count, 1) for name, (value, count) in sorted(totals.items())}, **tail,
               **{f"seconds_{name}": value for name, value in seconds.items()},
               "tokens_per_second": tokens / seconds[part]}
        rounded = {name: rounded_or_none(value) if isinstance(value, float) else value for name, value in row.items()}
        self.append("metrics.jsonl", rounded)
        self.report(rounded)
        self._show(stage, row)
        self.watch(row)

    def append(self, name, row):
        """One more line of a JSONL file of the run."""
        with open(self.out / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _show(self, stage, row):
        """The progress bar, or one line a step where nobody watches a terminal."""
        text = " ".join(f"{short} {row[name]:.{0 if row[name] >= 100 else 3}f}"
                        for name, short in SHOWN.items() if name in row)
        if self.bar is None:
            seconds = row.get("seconds_rollout", 0) + row["seconds_update"]
            print(f"{stage.name} {row['stage_step']}/{stage.steps} {text} {seconds:.1f} s", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def sample(self, stage_step, step, group):
        """Now and then one answer with its rewards on the terminal, and all of its group in samples.jsonl."""
        if stage_step % SAMPLE_EVERY or world()[0]:
            return
        example, worth = group.example, (group.accuracy, group.format, group.advantages)
        completions = [{"text": o.text, "truncated": o.truncated, "accuracy": accuracy, "format": form,
                        "advantage": round(advantage, 4)}
                       for o, accuracy, form, advantage in zip(group.completions, *(x.tolist() for x in worth))]
        self.append("samples.jsonl", {
            "step": step, "where": example.where, "form": example.form, "problem": example.problem,
            "solution": example.solution, "images": example.images, "completions": completions})
        first = completions[0]
        say(f"--- {one_line(example.problem)}\n    truth {one_line(example.solution)}\n"
            f"    model {one_line(first['text'])}{' (truncated)' if first['truncated'] else ''}\n"
            f"    accuracy {first['accuracy']:g}  format {first['format']:g}  advantage {first['advantage']:.2f}")


def rounded_or_none(value):
    """Six digits of a number; None where it is not finite, which JSON has no word for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
