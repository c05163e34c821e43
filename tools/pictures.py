"""Pictures of runs and data: training curves, sheets of images with boxes; tables of accuracies.

    python -m tools.pictures run RUN                 # RUN/curves.png, RUN/sheet.png: a finished run
    python -m tools.pictures curves RUN --metric kl  # RUN/curves.png: a metric against the step
    python -m tools.pictures curves A B --out x.png  # one line a run (default: A/compared.png)
    python -m tools.pictures table A B               # accuracies in % with 95 % intervals
    python -m tools.pictures examples DIR            # DIR/sheet.png: rows as a run trains on them

Boxes are in pixels of the image as the model sees it.
"""

import argparse
import itertools
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from data import training_forms
from rewards import FORMS, TASKS
from support.answers import extract_answer, parse_boxes, truth_of
from support.drawing import VIEW_SIDE, save_picture, view
from support.files import read_jsonl
from support.page import (
    BLUE, GREEN, GREY, INK, LINE, OVERSAMPLE, RED, Page, pale, text_width)
from support.rows import find_files
from support.tables import read_results, results_table, run_names
from support.words import UserError, command

PALETTE = (BLUE, "#e07b00", "#159a72", "#8a56b8", "#c93a6b", "#7a6a1c", "#2ba3c7", "#5b6470")
CHART = (1100, 620)  # width and height
ROWS_SHOWN = 12
PREDICTED = "problem solution answer completion correct image size task form split".split()
TILE, PAD = VIEW_SIDE // OVERSAMPLE, 14  # width of a tile, and the space around it


# ---- Charts ----

def line_chart(series, out, title="", xlabel="", ylabel="", bands=(), faint=None):
    """Lines through `series`, {name: [(x, y), ..]} in order of x, saved as `out`; returns its path.

    A y of NaN is a gap. bands: [(x0, x1, name), ..] behind the lines; faint: series drawn faintly
    behind the line of the same name. UserError where there is no number to draw.
    """
    faint = faint or {}
    points = [point for line in (*series.values(), *faint.values()) for point in line]
    if all(math.isnan(y) for _, y in points):
        raise UserError(f"nothing to draw for {title or out}: there is no number")
    page, (width, height) = Page(*CHART), CHART
    page.text(30, 22, title, INK, 21, width=width - 90 - text_width(ylabel, 13))
    page.text(width - 30, 40, ylabel, GREY, 13, "rs")
    page.text(width / 2, height - 16, xlabel, GREY, anchor="ms")
    place = draw_axes(page, points, bands, bool(xlabel))
    x = 30
    for (name, line), color in zip(series.items(), itertools.cycle(PALETTE)):
        draw_line(page, faint.get(name, ()), place, pale(color, 0.35), 1)
        draw_line(page, line, place, color, 2.5)
        if len(series) > 1:
            page.text(x, 62, name, color, width=320)
            x += min(320, text_width(name, 14)) + 24
    return save_picture(page.finish(), out)


def draw_axes(page, points, bands, counted):
    """Bands, grid and labels, of x too if it is `counted`; returns place(x, y) on the page."""
    x0, y0, x1, y1 = 80, 112, CHART[0] - 30, CHART[1] - 66
    xs = [x for x, _ in points] + [x for band in bands for x in band[:2]]
    ys = [y for _, y in points if not math.isnan(y)]
    left, low, size = min(xs), min(ys), max(map(abs, ys)) or 1
    flat = size / 2 if max(ys) - low <= 1e-9 * size else 0  # a flat line runs mid-height
    grid_at = ticks(low - flat, max(ys) + flat, 6)
    width, height = max(xs) - left or 1, grid_at[-1] - grid_at[0]

    def place(x, y):
        return x0 + (x - left) / width * (x1 - x0), y1 - (y - grid_at[0]) / height * (y1 - y0)

    for i, (start, end, name) in enumerate(bands):
        a, b = place(start, low)[0], place(end, low)[0]
        page.box(a, y0, b, y1, ("#f6f7f8", "#e9ecee")[i % 2])
        if b - a > 40:
            page.text((a + b) / 2, y0 - 9, name, GREY, anchor="ms", width=b - a - 12)
    for y in grid_at:
        page.line([place(left, y), place(left + width, y)])
        page.text(x0 - 10, place(left, y)[1], f"{y:.6g}", GREY, anchor="rm")
    for x in ticks(left, left + width, 10) if counted else ():
        if left <= x <= left + width and x == int(x):  # there is no step 1.5
            page.line([(place(x, low)[0], y1), (place(x, low)[0], y1 + 6)], GREY)
            page.text(place(x, low)[0], y1 + 12, f"{x:g}", GREY, anchor="ma")
    page.line([(x0, y1), (x1, y1)], GREY)
    return place


def draw_line(page, points, place, color, width):
    """A line through the points that have a value; a dot between two gaps."""
    for gap, part in itertools.groupby(points, key=lambda point: math.isnan(point[1])):
        if not gap:
            page.line([place(x, y) for x, y in part], color, width)


def ticks(low, high, count):
    """Round values, steps of 1, 2, 2.5 or 5 times a power of ten, from below low to above high.

    ticks(0.13, 1.9, 5) -> [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def bars(rows, out, title="", ylabel=""):
    """A band a row, a color a series: a dot at the mean, a line as its interval.

    rows: {row: {series: (mean, half the interval, [each run's value]) or None}}; runs: faint dots.
    """
    means, spread = {}, {}
    for i, cells in enumerate(rows.values()):
        for j, (name, cell) in enumerate(cells.items()):
            mean, half, each = cell or (math.nan, math.nan, [])
            x = i + 0.6 * (j + 0.5) / len(cells) - 0.3
            gap = (x, math.nan)
            means.setdefault(name, []).extend([(x, mean), gap])
            ends = [(x, max(mean - half, 0)), (x, mean + half)]
            spread.setdefault(name, []).extend([*ends, gap])
            spread[name] += [point for value in each for point in ((x, value), gap)]
    bands = [(i - 0.5, i + 0.5, row) for i, row in enumerate(rows)]
    return line_chart(means, out, title, "", ylabel, bands, spread)


# ---- Training curves ----

def read_metrics(run):
    """The rows of RUN/metrics.jsonl, one a step; UserError if there are none."""
    file = Path(run) / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"there is no {file}; is {run} the directory of a run?")
    if not (rows := read_jsonl(file, "step", "stage", "stage_index")):
        raise UserError(f"{file} holds no finished step yet")
    return rows


def by_stage(rows, metric):
    """[(stage, [(step, value), ..]), ..] in turn; NaN for a value that is missing or no number."""
    def point(row):
        value = row.get(metric)
        return row["step"], float(value) if isinstance(value, int | float) else math.nan

    parts = itertools.groupby(rows, key=lambda row: (row["stage_index"], row["stage"]))
    return [(stage, list(map(point, part))) for (_, stage), part in parts]


def running_mean(points, window):
    """Each y replaced by the mean of the values among the `window` points centered on it.

    Fewer at the ends; a gap stays one. running_mean([(1, 0.), (2, 3.), (3, 6.)], 3) ->
    [(1, 1.5), (2, 3.0), (3, 4.5)]
    """
    means, half = [], window // 2
    for i, (x, y) in enumerate(points):
        near = [y for _, y in points[max(0, i - half):i + half + 1] if not math.isnan(y)]
        means.append((x, y if math.isnan(y) else math.fsum(near) / len(near)))
    return means


def curves(runs, out=None, metric=None):
    """A metric against the step, one line a run, saved as a picture; returns its path.

    out: by default beside the first run's log. metric: by default the reward, or the loss where
    none is logged. Faint: every step. Strong: the mean of a twentieth of the longest run's steps,
    which never mixes two stages. UserError where a run never logged the metric.
    """
    out = out or Path(runs[0]) / ("curves.png" if len(runs) == 1 else "compared.png")
    logs = dict(zip(run_names(runs), map(read_metrics, runs)))
    rewarded = any("reward" in row for rows in logs.values() for row in rows)
    metric = metric or ("reward" if rewarded else "loss")
    window = max(map(len, logs.values())) // 20 // 2 * 2 + 1  # odd, so that it is centered
    faint, strong, bands = {}, {}, {}
    for name, rows in logs.items():
        faint[name], strong[name], bands[name] = [], [], []
        for stage, points in by_stage(rows, metric):
            end = points[-1][0] + 0.5
            gap = [(end, math.nan)]  # no line joins two stages: their rewards are not alike
            faint[name] += points + gap
            strong[name] += running_mean(points, window) + gap
            bands[name].append((points[0][0] - 0.5, end, stage))
        if all(math.isnan(y) for _, y in faint[name]):
            known = ", ".join(sorted({key for row in rows for key in row}))
            raise UserError(f"run {name} never logged a number for {metric!r}; it logged {known}")
    first, *others = bands.values()
    note = f"{metric}; strong: mean of {window} steps" if window > 1 else metric
    return line_chart(strong, out, f"{metric} of {' and '.join(logs)}", "step", note,
                      first if all(other == first for other in others) else (),
                      faint if window > 1 else None)


# ---- Sheets of tiles ----

def tile(path, size, boxes, texts):
    """The image, if `path` names one, above texts [(text, color, most lines), ..].

    An image that cannot be read is said in its place.
    """
    picture, y = None, 0
    try:
        picture = view(path, size, boxes) if path else None
    except (UserError, OSError) as error:
        texts = [(f"no image: {error}", RED, 3), *texts]
    page = Page(TILE, TILE + 20 + sum(19 * most + 5 for _, _, most in texts))
    if picture:
        page.image.paste(picture, ((page.image.width - picture.width) // 2, 0))
        y = picture.height / OVERSAMPLE + 16
    for text, color, most in texts:
        y = page.text(0, y, text, color, width=TILE, most=most) + 5
    return page.finish(y)


def save_tiles(tiles, out, columns=4):
    """Tiles as cards on a grid, each row as high as its highest; UserError without any."""
    if not tiles:
        raise UserError(f"nothing to show in {out}: there are no rows")
    columns, outer = min(columns, len(tiles)), TILE + 3 * PAD
    rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(each.height for each in row) + 3 * PAD for row in rows]
    whole = Image.new("RGB", (columns * outer + PAD, sum(heights) + PAD), "#f1f3f5")
    pen, top = ImageDraw.Draw(whole), PAD
    for row, height in zip(rows, heights):
        for x, each in zip(range(PAD, whole.width, outer), row):
            pen.rectangle((x, top, x + outer - PAD - 1, top + height - PAD - 1), "white", LINE)
            whole.paste(each, (x + PAD, top + PAD))
        top += height
    return save_picture(whole, out)


def places_in(text, row_task, form):
    """The boxes of an answer, if it is one to an open question about places in an image."""
    placed = form == "open" and row_task in TASKS and TASKS[row_task].resize
    return parse_boxes(text) or [] if placed else []


def prediction_tile(row):
    """A prediction: question, true answer, the model's answer (green if right, red if not)."""
    true, said = extract_answer(row["solution"]) or row["solution"], row["answer"]
    boxes = [(color, places_in(text or "", row["task"], row["form"]))
             for color, text in ((GREEN, true), (RED, said))]
    said = f"no answer in: {row['completion']}" if said is None else f"answered: {said}"
    return tile(row["image"], row["size"], boxes, [
        (f"{row['task']} · {row['form']} · {row['split']}", GREY, 1), (row["problem"], INK, 8),
        (f"true: {true}", INK, 3), (said, GREEN if row["correct"] else RED, 3)])


def draw_run(run):
    """Draw RUN/curves.png and RUN/sheet.png: 24 answers of the last evaluation; returns paths."""
    paths = [curves([run])]
    if rows := read_results(run):
        answers = read_jsonl(Path(run) / "predictions" / f"{rows[-1]['name']}.jsonl", *PREDICTED)
        answers = random.Random(0).sample(answers, min(24, len(answers)))
        paths.append(save_tiles([prediction_tile(row) for row in answers], Path(run) / "sheet.png"))
    return paths


def example_tile(asked):
    """A training row with its true boxes, its question and answer in each form."""
    plain = next((example for example in asked if example.form == "open"), asked[0])
    boxes = [(GREEN, places_in(truth_of(plain), plain.task, plain.form))]
    texts = [(f"{plain.task} · {Path(plain.where).name}", GREY, 1)]
    for example in asked:
        texts += [(f"{example.form}: {example.problem}", INK, 8), (truth_of(example), GREEN, 3)]
    return tile(next(iter(plain.images), None), plain.size, boxes, texts)


# ---- Command line ----

def draw_examples(args):
    """A sheet of rows, evenly from all, in the forms that a run trains on; returns its path."""
    files, rows = find_files(args.data)["train"], {}
    shown = [form for form in FORMS if files[form] or files["open"]]
    forms = training_forms(files, shown, args.seed, image_root=args.image_root or args.data,
                           task=args.task, skip_bad_rows=True)
    for example in itertools.chain(*forms.values()):
        rows.setdefault(example.where, []).append(example)
    asked = list(rows.values())[::max(1, len(rows) // ROWS_SHOWN)][:ROWS_SHOWN]
    return save_tiles(list(map(example_tile, asked)), args.out or Path(args.data, "sheet.png"))


@command
def main(argv=None):
    """`run`, `curves`, `table` and `examples`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)

    def add(name, action, text, place, **options):
        one = commands.add_parser(name, help=text, allow_abbrev=False)
        one.set_defaults(action=action)
        one.add_argument(place, **options)
        return one.add_argument

    add("run", lambda args: "\n".join(map(str, draw_run(args.run))),
        "curves and answers of a finished run", "run", metavar="RUN")
    add("table", lambda args: results_table(args.runs),
        "accuracies in %% with 95 %% intervals", "runs", metavar="RUN", nargs="+")
    curve = add("curves", lambda args: curves(args.runs, args.out, args.metric),
                "a metric against the step", "runs", metavar="RUN", nargs="+")
    curve("--metric", help="a key of metrics.jsonl (default: reward, or loss where there is none)")
    example = add("examples", draw_examples, "rows as a run trains on them, in their three forms",
                  "data", metavar="DIR")
    example("--image_root", help="directory that image paths start from")
    example("--task", nargs="+", default=[], help="task of rows that name none, as the run's")
    example("--seed", type=int, default=0, help="the run's --seed")
    for option in (curve, example):
        option("--out", help="the picture (default: beside what it shows)")
    args = parser.parse_args(argv)
    print(args.action(args))


if __name__ == "__main__":
    sys.exit(main())
