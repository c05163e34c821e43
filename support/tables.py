"""Placeholder."""
import itertools
import json
import math
from pathlib import Path

from support.words import UserError


def wilson(correct: float, n: int, z: float = 1.96) -> float:
    """Half the width of the 95 % Wilson score interval of correct / n: wilson(5, 10) -> 0.263. NaN for n = 0.

    z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / (4 n^2)), p = correct / n. The interval's middle lies a little
    nearer to 1/2 than p.
    """
    p = correct / n if n else math.nan
    return z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) if n else math.nan

def table(results: dict[str, dict], width: int = 120) -> str:
    """results.json of each run (by name) as text: a line a row, a column each split and task, such as "43 ±7".

    That is accuracy in % and half its 95 % Wilson interval; n in the heading counts the questions. Splits beyond
    `width` characters follow in a block below.
    """
    rows = [(f"{run}: {row['name']}" if len(results) > 1 else row["name"], row["splits"])
            for run, result in results.items() for row in result["rows"]]
    columns = list(dict.fromkeys((split, task) for _, splits in rows for split, tasks in splits.items()
                                 for task in sorted(tasks, key=lambda task: (task == "all", task))
                                 if task != "all" or len(tasks) > 2))
    names = [printable(name, 60) for name, _ in rows]
    left = max(map(len, names), default=0)
    blocks, room = [], 0
    for split, group in itertools.groupby(columns, key=lambda column: column[0]):
        cells = [column_text(split, task, [splits.get(split, {}).get(task) for _, splits in rows]) for _, task in group]
        lines = ["  ".join(line) for line in zip(*cells)]
        if room < len(lines[0]) + 2:
            blocks.append([name.ljust(left) for name in ["", "", "", *names]])
            room = width - left
        blocks[-1] = [before + "  " + line for before, line in zip(blocks[-1], lines)]
        room -= len(lines[0]) + 2
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)

def column_text(split: str, task: str, scores: list[dict | None]) -> list[str]:
    """A column's three heading lines and its cells, all of one width."""
    counts = sorted({score["n"] for score in scores if score})
    heading = [printable(split, 40), printable(task, 40), f"n={'-'.join(map(str, sorted({counts[0], counts[-1]})))}"]
    cells = [f"{100 * s['accuracy']:.0f} ±{100 * wilson(s['accuracy'] * s['n'], s['n']):.0f}" if s and s["n"] else "-"
             for s in scores]
    return [text.rjust(max(map(len, heading + cells))) for text in heading + cells]

def read_results(run: str) -> dict:
    """The parsed results.json of a run directory (or the file itself); UserError says what is wrong with it."""
    path = Path(run) / "results.json" if Path(run).is_dir() else Path(run)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(row["splits"], dict) and row["name"] for row in results["rows"]):
            raise ValueError("a row has no name or no splits")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; has the run been evaluated?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold the results of a run: {error}") from error
    return results

def results_table(runs):
    return ""
