"""The ablation's figures: tables with their uncertainty and a picture, of what is finished."""

import itertools
import math
import statistics
from pathlib import Path

from demo.plan import COMPARED, PAIRS
from support.tables import wilson
from support.words import UserError
from tools.pictures import bars

ESCAPED = 10  # % of open questions right at the end: a run has left the plateau without reward
# Student's t of a 95 % interval, by the number of pairs
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262, 12: 2.201, 16: 2.131}


def figures_of(jobs, rows, bases):
    """{row: {(base name, seed): {(split, task): (accuracy in %, questions)}}} of finished rows."""
    there = {}
    for (name, stages), job in itertools.product(rows.items(), jobs):
        if job.base in bases and job.carries(stages) and (found := job.results(stages)):
            there.setdefault(name, {}).setdefault((job.base.name, job.seed), found)
    return there


def spread(runs, key):
    """(mean over runs, half its interval, [each run's]) in %; None where no run has the key.

    The interval is Wilson's for as many questions as the bases have together: it says how well the questions
    measure a model. How much runs differ is said by their range.
    """
    scores = {run: found[key] for run, found in runs.items() if key in found}
    if not scores:
        return None
    n = sum({base: n for (base, _), (_, n) in scores.items()}.values())
    mean = statistics.mean(each := [accuracy for accuracy, _ in scores.values()])
    return mean, 100 * wilson(mean / 100 * n, n), each


def paired(each):
    """(mean, half its 95 % t interval, p) of differences.

    p: the share of all 2^n changes of their signs that bring the mean as far from 0, an exact test of "as
    often the one as the other way". paired([1, 1, 1, 1])[2] == 1/8. The interval is infinite for one
    difference; an n that T95 lacks takes the next smaller's t, which is larger.
    """
    n, mean = len(each), statistics.mean(each)
    half = math.inf
    if n > 1:
        half = T95[max(k for k in T95 if k <= n)] * statistics.stdev(each) / math.sqrt(n)
    flips = (abs(sum(flipped)) for flipped in itertools.product(*((x, -x) for x in each)))
    return mean, half, sum(total >= abs(sum(each)) - 1e-9 for total in flips) / 2 ** n


def cell(there, key, one, other=None):
    """Row `one` as text: mean, half its interval, range over runs: "56 ±3 (53-59)"; "-" for none.

    Or row `one` minus row `other`, run by run: "+55 ±9 (+50 to +58), 6 of 6 above, p 0.031".
    there: see `figures_of`; key: (split, task).
    """
    mine, others = there.get(one, {}), there.get(other, {})
    if other is None:
        mean, half, each = spread(mine, key) or (0, 0, [])
        ends = f" ({min(each):.0f}-{max(each):.0f})" if len(each) > 1 else ""
        return f"{mean:.0f} ±{half:.0f}{ends}" if each else "-"
    each = [found[key][0] - others[run][key][0] for run, found in mine.items()
            if key in found and key in others.get(run, {})]
    if not each:
        return "-"
    mean, half, p = paired(each)
    half, p = (f" ±{half:.0f}", f", p {p:.2g}") if len(each) > 1 else ("", "")
    return (f"{round(mean):+}{half} ({round(min(each)):+} to {round(max(each)):+}), "
            f"{sum(x > 0 for x in each)} of {len(each)} above{p}")


def escapes(runs, key):
    """Runs that left the plateau, with the share's 95 % Wilson interval: "5 of 8 (31-86 %)"."""
    ends = [found[key][0] > ESCAPED for found in runs.values() if key in found]
    if not (n := len(ends)):
        return "-"
    middle, half = (sum(ends) + 1.92) / (n + 3.84), wilson(sum(ends), n)
    low, high = max(0, middle - half), min(1, middle + half)
    return f"{sum(ends)} of {n} ({100 * low:.0f}-{100 * high:.0f} %)"


def markdown(heading, lines, columns, text):
    """A Markdown table of {name: line} by {name: column}, text(line, column) in its cells."""
    table = [[heading, *columns], ["---"] * (1 + len(columns))]
    table += [[name, *(text(line, column) for column in columns.values())] for name, line in lines.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in table) + "\n"


def report(args, bases, jobs, rows, rollouts):
    """Write results.md and settings.png of what is finished; returns the text. rollouts: of one step."""
    there = figures_of(jobs, rows, bases[:1])
    if not there:
        raise UserError(f"{args.out} holds no finished run yet")
    keys = dict.fromkeys(key for runs in there.values() for found in runs.values() for key in found)
    every = {split: (split, task) for split, task in keys if task == "all"}
    opened = {split: key for split, key in every.items() if split.startswith("open")} or every
    by_task = {" ".join(key): key for key in keys if key[0] in opened and key[1] != "all"}
    alone, pairs = {row: (row,) for row in there}, {f"{a} - {b}": (a, b) for a, b in PAIRS}
    b, c, o = args.steps
    parts = [
        "# What did every row of the ablation score?\n",
        f"{b + c + o} updates of {rollouts} rollouts a row ({b} + {c} + {o} in the curriculum), seeds "
        f"{', '.join(map(str, args.seeds))}. Greedy accuracy in %, strict scorer: mean over runs, half the "
        "95 % interval for as many questions, range over runs in brackets. A difference is paired: mean, "
        "half its 95 % interval over pairs, range, and p of an exact test that changes the signs of the "
        "differences.\n",
        "## Rows\n", *(markdown("row", alone, columns, lambda row, key: cell(there, key, *row))
                       for columns in (every, by_task) if columns),
        "## Run by run, the same base and seed\n",
        markdown("difference", pairs, opened, lambda pair, key: cell(there, key, *pair))]
    settings = {name: figures_of(jobs, rows, [base for base in bases if base.setting == name])
                for name in dict.fromkeys(base.setting for base in bases)}
    if len(settings) > 1:
        parts += in_settings(settings, opened)
    text = "\n".join(parts)
    Path(args.out, "results.md").write_text(text)
    split, key = next(iter(opened.items()))
    shown = {name: {row: spread(runs.get(row, {}), key) for row in COMPARED}
             for name, runs in settings.items() if runs}
    if any(found and found[0] for spreads in shown.values() for found in spreads.values()):
        title = f"{split} in every setting: mean, every run"
        bars(shown, Path(args.out, "settings.png"), title, "accuracy in %")
    return text


def in_settings(settings, splits):
    """Tables of the COMPARED rows in every setting {name: its figures}: accuracy, escapes."""
    ours, *others = COMPARED[::-1]
    columns = {row: (row,) for row in COMPARED} | {f"{ours} - {row}": (ours, row) for row in others}
    parts = ["## In every setting\n", "Runs on all bases of a setting together.\n"]
    for split, key in splits.items():
        cells = markdown("setting", settings, columns, lambda there, rows: cell(there, key, *rows))
        parts += [f"{split}:\n", cells]
    split, key = next(iter(splits.items()))
    cells = markdown("setting", settings, dict(zip(COMPARED, COMPARED)),
                     lambda there, row: escapes(there.get(row, {}), key))
    return parts + [f"Runs that end above {ESCAPED} % on {split}, with the share's 95 % interval:\n", cells]
