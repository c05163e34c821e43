"""Accuracies of runs as text: a table in % with 95 % intervals."""

import itertools
import math
from pathlib import Path

from support.files import read_record
from support.words import UserError, one_line


def wilson(correct, n, z=1.96):
    """Half the width of the 95 % Wilson score interval of correct / n: wilson(5, 10) -> 0.263.

    z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / (4 n^2)), p = correct / n; NaN for n = 0. The
    interval's middle lies a little nearer to 1/2 than p.
    """
    if not n:
        return math.nan
    p = correct / n
    return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))


def results_table(runs):
    """The results of run directories as one table; UserError where one has none."""
    return table(dict(zip(run_names(runs), map(read_results, runs))))


def run_names(runs):
    """The directories' names, or where two would be the same their paths as they were given."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(map(str, runs))


def read_results(run):
    """The rows of RUN/results.json, one an evaluation: [{"name": .., "splits": ..}, ..]."""
    file = Path(run) / "results.json"
    if not file.exists():
        raise UserError(f"there is no {file}; is {run} the directory of a run?")
    return read_record(file)["rows"]


def table(results, width=80):
    """{run: its rows of results} as text: a line a row, a column each split and task: "43 ±7".

    That is accuracy in % and half its 95 % Wilson interval; n in the heading counts the questions.
    Splits beyond `width` characters follow in a block below.
    """
    rows = [(f"{run}: {row['name']}" if len(results) > 1 else row["name"], row["splits"])
            for run, found in results.items() for row in found]
    columns = dict.fromkeys(
        (split, task) for _, splits in rows for split, tasks in splits.items()
        for task in sorted(tasks, key=lambda task: (task == "all", task))
        if task != "all" or len(tasks) > 2)  # "all" of one task only says it again
    names = ["", "", "", *(one_line(name, 60) for name, _ in rows)]
    left = max(map(len, names))
    blocks, room = [], 0
    for split, group in itertools.groupby(columns, key=lambda column: column[0]):
        cells = [column_text(split, task, [splits.get(split, {}).get(task) for _, splits in rows])
                 for _, task in group]
        lines = ["  " + "  ".join(line) for line in zip(*cells)]
        if room < len(lines[0]):
            blocks.append([name.ljust(left) for name in names])
            room = width - left
        blocks[-1] = [before + line for before, line in zip(blocks[-1], lines)]
        room -= len(lines[0])
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def column_text(split, task, scores):
    """A column's three heading lines and its cells, all of one width; a score may be None."""
    counts = sorted({score["n"] for score in scores if score})
    n = "-".join(map(str, sorted({counts[0], counts[-1]})))
    texts = [one_line(split, 40), one_line(task, 40), f"n={n}"]
    for score in scores:
        share, count = (score["accuracy"], score["n"]) if score else (0, 0)
        half = wilson(share * count, count)
        texts.append(f"{100 * share:.0f} ±{100 * half:.0f}" if count else "-")
    return [text.rjust(max(map(len, texts))) for text in texts]
