"""Pictures of a run: training curves, sheets of images with boxes, and the table of accuracies.

    python -m tools.pictures curves runs/demo --out curves.png                 # reward against step, one band a stage
    python -m tools.pictures curves runs/a runs/b --out both.png --metric kl           # one line a run: compare forks
    python -m tools.pictures table runs/a runs/b                               # accuracies in % with 95 % intervals
    python -m tools.pictures examples DIR --out sheet.png -n 12                # rows as a run on DIR trains on them

Everything is drawn with Pillow at SCALE times its final size and scaled down once, which smooths every edge. Lengths
are in final pixels, boxes in pixels of the image as the model sees it. Model text is hostile: it is cleaned, wrapped
and cut before it is drawn, and boxes that it holds are clipped to the image.
"""
import argparse
import bisect
import functools
import itertools
import json
import math
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from answers import extract_answer, parse_boxes
from data import FORMS, derive_all, find_files, load_examples, load_image, training_forms
from distributed import UserError
from tasks import TASKS
from tools.terminal import terminal

SCALE = 2
INK, GREY, LINE, PAGE = "#1f2933", "#6b7682", "#dde2e7", "#f1f3f5"
GREEN, RED = "#128a3e", "#d6202b"
PALETTE = ("#2f6fb2", "#e07b00", "#159a72", "#8a56b8", "#c93a6b", "#7a6a1c", "#2ba3c7", "#5b6470")
GLYPHS = frozenset(map(chr, range(32, 127))) | set("°±·«»‘’“”…")  # all that Pillow's own font can draw
SPELLED = str.maketrans(dict(zip("–—−×√π≤≥→", ("-", "-", "-", "x", "sqrt", "pi", "<=", ">=", "->"))))
WIDTH, HEIGHT = 1100, 620    # of a chart
TILE, PAD = 300, 14          # width of a tile's content, and the space around it


# ---- drawing: text, ticks, page ----

@functools.lru_cache
def font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size * SCALE)


def printable(text: object, limit: int = 2000) -> str:
    """One line of characters that the font has: control, direction and combining characters go, white space becomes
    single spaces, "é" becomes "e", "²" "2", "π" "pi", and what has no such spelling "?"."""
    text = unicodedata.normalize("NFKD", str(text)[:limit].translate(SPELLED))
    kept = (c for c in text if c.isspace() or unicodedata.category(c)[0] not in "CM")
    return " ".join("".join(c if c in GLYPHS or c.isspace() else "?" for c in kept).split())


def text_width(text: str, size: float) -> float:
    return font(size).getlength(text) / SCALE


def wrap(text: object, size: float, width: float, max_lines: int) -> list[str]:
    """Lines of printable(text) no wider than width, broken at spaces where there are any; "…" marks a cut."""
    rest, lines = printable(text), []
    while rest and len(lines) < max_lines:
        fits = bisect.bisect_right(range(1, len(rest) + 1), width, key=lambda n: text_width(rest[:n], size)) or 1
        cut = len(rest) if fits == len(rest) else rest.rfind(" ", 1, fits + 1)
        cut = cut if cut > 0 else fits
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    while rest and lines[-1] and text_width(lines[-1] + "…", size) > width:
        lines[-1] = lines[-1][:-1]
    return lines[:-1] + [lines[-1] + "…"] if rest else lines


def pale(color: str, share: float) -> str:
    """`color` with white mixed in: share 1 leaves it, share 0 is white. Opaque, so that crossing lines add no blots."""
    return "#" + "".join(f"{round(255 - share * (255 - int(color[i:i + 2], 16))):02x}" for i in (1, 3, 5))


class Canvas:
    """A page of width x height final pixels; coordinates and sizes are final pixels, and `finish` scales down."""

    def __init__(self, width: float, height: float, color: str = "white"):
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), color)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: float = 14, color: str = INK, anchor: str = "la"):
        self.draw.text((x * SCALE, y * SCALE), text, color, font(size), anchor)

    def text_up(self, x: float, y: float, text: str, size: float = 14, color: str = INK):
        """Text that reads upwards, centered on (x, y)."""
        mask = Image.new("L", [round(side * SCALE) for side in (text_width(text, size) + 4, size * 1.5)])
        ImageDraw.Draw(mask).text((mask.width / 2, mask.height / 2), text, 255, font(size), "mm")
        mask = mask.rotate(90, expand=True)
        self.image.paste(color, (round(x * SCALE - mask.width / 2), round(y * SCALE - mask.height / 2)), mask)

    def line(self, points: list, color: str = LINE, width: float = 1):
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(points, color, round(width * SCALE), "curve")

    def dot(self, x: float, y: float, color: str, radius: float):
        self.draw.circle((x * SCALE, y * SCALE), radius * SCALE, color)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: str):
        self.draw.rectangle((x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE), color)

    def finish(self) -> Image.Image:
        return self.image.resize([max(1, side // SCALE) for side in self.image.size], Image.Resampling.LANCZOS)


def save(image: Image.Image, out) -> Path:
    """Writes the picture as PNG, making its directory; returns the path."""
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {out}: {error}") from error
    return out


def number(value: object) -> float:
    """A finite float, or NaN for what is none (missing, text, bool, infinite, an integer beyond floats)."""
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if finite else math.nan


def ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """Round tick values (steps of 1, 2, 2.5 or 5 times a power of ten) that reach from below low to above high.

    >>> ticks(0.13, 1.9, 5)
    [0.0, 0.5, 1.0, 1.5, 2.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


# ---- charts ----

def line_chart(series: dict, out, title: str = "", xlabel: str = "", ylabel: str = "", bands: list | None = None,
               logx: bool = False, raw: dict | None = None, note: str = "") -> Path:
    """Lines through `series` (name -> [(x, y), ..] in order of x), saved as the picture `out`, whose path is returned.

    A y that is None, NaN or infinite is a gap; a point between two gaps is a dot. `bands` are background bands
    (x0, x1, name), in the color of the series of that name if there is one. `raw` (as series) is drawn faintly behind
    the line of the same name. `note` stands small beside the title. Raises UserError where there is nothing to draw.
    """
    series, raw = ({name: [(float(x), number(y)) for x, y in points] for name, points in lines.items()}
                   for lines in (series, raw or {}))
    bands, colors = bands or [], dict(zip(series, itertools.cycle(PALETTE)))
    every = [point for points in (*series.values(), *raw.values()) for point in points]
    xs, ys = sorted({x for x, _ in every} | {x for b in bands for x in b[:2]}), [y for _, y in every if y == y]
    if not ys:
        raise UserError(f"nothing to draw for {title or out}: there is no finite number")
    if logx and xs[0] <= 0:
        raise UserError(f"a logarithmic axis needs values above 0, and {title or out} has {xs[0]:g}")
    page = Canvas(WIDTH, HEIGHT)
    page.text(30, 22, "".join(wrap(title, 21, WIDTH - 80 - text_width(note, 13), 1)), 21)
    page.text(WIDTH - 30, 40, note, 13, GREY, "rs")
    top = draw_legend(page, {name: colors[name] for name, points in series.items() if any(y == y for _, y in points)})
    frame = (88, top, WIDTH - 30, HEIGHT - 66)
    place = draw_axes(page, frame, xs, ys, bands, colors, logx)
    page.text((frame[0] + frame[2]) / 2, HEIGHT - 16, printable(xlabel), 14, GREY, "ms")
    page.text_up(24, (frame[1] + frame[3]) / 2, printable(ylabel, 60), 14, GREY)
    for lines, share, width in ((raw, 0.35, 1), (series, 1, 2.5)):
        for name in lines:
            draw_line(page, lines[name], place, pale(colors.get(name, GREY), share), width)
    return save(page.finish(), out)


def draw_legend(page: Canvas, colors: dict) -> float:
    """Names with their colors in at most four rows below the title; returns where the plot may begin."""
    x, y = 30, 72
    for i, (name, color) in enumerate(colors.items()):
        label = "".join(wrap(name, 14, 320, 1))
        step = text_width(label, 14) + 54
        x, y = (30, y + 24) if x + step > WIDTH - 20 else (x, y)
        if y > 144:
            page.text(30, y, f"and {len(colors) - i} more", 14, GREY, "lm")
            break
        page.line([(x, y), (x + 24, y)], color, 4)
        page.text(x + 31, y, label, 14, INK, "lm")
        x += step
    return y + 46


def draw_axes(page: Canvas, frame: tuple, xs: list, ys: list, bands: list, colors: dict, logx: bool):
    """Bands, grid and tick labels inside frame (x0, y0, x1, y1); returns place(x, y) -> point on the page."""
    x0, y0, x1, y1 = frame
    low, high = min(ys), max(ys)
    room = (abs(low) or 1) / 2 if high - low <= 1e-9 * max(-low, high) else 0  # a flat line runs mid-height
    yticks = ticks(low - room, high + room)
    bend = math.log if logx else float
    left, right = (xs[0], xs[-1]) if xs[-1] > xs[0] else (xs[0] / 2, xs[0] * 2) if logx else (xs[0] - 0.5, xs[0] + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        return (x0 + (bend(x) - bend(left)) / (bend(right) - bend(left)) * (x1 - x0),
                y1 - (y - yticks[0]) / (yticks[-1] - yticks[0]) * (y1 - y0))

    for i, (start, end, name) in enumerate(bands):
        a, b = place(start, low)[0], place(end, low)[0]
        page.box(a, y0, b, y1, pale(colors.get(name, ("#c4cbd2", "#8d98a3")[i % 2]), 0.10))
        page.line([(a, y0), (a, y1)], GREY if i else LINE)
        for label in wrap(name, 14, b - a - 12, 1):
            page.text((a + b) / 2, y0 - 9, label, 14, colors.get(name, GREY), "ms")
    for y in yticks:
        page.line([(x0, place(left, y)[1]), (x1, place(left, y)[1])])
        page.text(x0 - 10, place(left, y)[1], f"{y:.6g}", 14, GREY, "rm")
    xticks = xs[::math.ceil(len(xs) / 10)] if logx else ticks(left, right, 10, all(x % 1 in (0, 0.5) for x in xs))
    for x in (x for x in xticks if left <= x <= right):
        page.line([(place(x, low)[0], y1), (place(x, low)[0], y1 + 6)], GREY)
        page.text(place(x, low)[0], y1 + 12, f"{x:.6g}", 14, GREY, "ma")
    page.line([(x0, y1), (x1, y1)], GREY)
    return place


def draw_line(page: Canvas, points: list, place, color: str, width: float):
    """One line through the points that have a value; a gap where they have none."""
    for there, part in itertools.groupby(points, key=lambda point: point[1] == point[1]):
        placed = [place(x, y) for x, y in part] if there else []
        if len(placed) == 1:
            page.dot(*placed[0], color, width * 1.6)
        elif placed:
            page.line(placed, color, width)


def bars(rows: dict[str, dict], out, title: str = "", xlabel: str = "") -> Path:
    """A line a row and series: a dot at the mean, a bar as wide as its interval, small dots for the single runs.

    rows: {row: {series: (mean, half the interval, [each run's value]) or None}}; the axis begins at 0.
    """
    names = list(dict.fromkeys(name for series in rows.values() for name in series))
    step, colors = 15 * len(names) + 14, dict(zip(names, itertools.cycle(PALETTE)))
    found = [cell for series in rows.values() for cell in series.values() if cell]
    most = max((max(mean + half, *each) for mean, half, each in found), default=0)
    if not most:
        raise UserError(f"nothing to draw for {title or out}: there is no figure above 0")
    page = Canvas(WIDTH, 170 + step * len(rows))
    page.text(30, 22, "".join(wrap(title, 21, WIDTH - 60, 1)), 21)
    top, left, axis = draw_legend(page, colors) - 20, 230, ticks(0, most)
    bottom, scale = top + step * len(rows), (WIDTH - 40 - left) / axis[-1]
    for x in axis:
        page.line([(left + x * scale, top), (left + x * scale, bottom)])
        page.text(left + x * scale, bottom + 8, f"{x:g}", 14, GREY, "ma")
    page.text((left + WIDTH) / 2, bottom + 44, printable(xlabel), 14, GREY, "ms")
    for i, (row, series) in enumerate(rows.items()):
        page.text(left - 14, top + step * (i + 0.5), "".join(wrap(row, 14, left - 40, 1)), 14, INK, "rm")
        for j, name in enumerate(names):
            if series.get(name):
                (mean, half, each), y = series[name], top + step * i + 14 + 15 * j
                ends = max(0, mean - half), mean + half
                page.line([(left + x * scale, y) for x in ends], pale(colors[name], 0.3), 9)
                for x in each:
                    page.dot(left + x * scale, y, colors[name], 2)
                page.dot(left + mean * scale, y, colors[name], 4.5)
    return save(page.finish(), out)


def grid(pictures: list, out, columns: int = 2) -> Path:
    """Pictures of one size side by side at half their size."""
    images = [load_image(path).reduce(2) for path in pictures]
    width, height = images[0].size
    page = Image.new("RGB", (width * columns, height * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * width, i // columns * height))
    return save(page, out)


# ---- training curves ----

def read_metrics(run_dir) -> dict[int, dict]:
    """RUN/metrics.jsonl as step -> row, in order of step. The last row of a step wins (a resumed run writes steps
    again); lines that are no JSON object with a step, such as a torn last one, are passed over. Raises UserError."""
    path = Path(run_dir) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; is {run_dir} the directory of a run?") from error
    rows = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and abs(row["step"]) < 1e15:
            rows[row["step"]] = row
    if not rows:
        raise UserError(f"{path} holds no finished step yet")
    return dict(sorted(rows.items()))


def stages(rows: dict[int, dict], metric: str) -> list[tuple[str, list]]:
    """(stage name, [(step, value or NaN), ..]) of each stage in turn."""
    parts = itertools.groupby(rows.values(), key=lambda row: (row.get("stage_index"), str(row.get("stage", ""))))
    return [(stage, [(row["step"], number(row.get(metric))) for row in part]) for (_, stage), part in parts]


def running_mean(points: list, window: int) -> list:
    """Each y replaced by the mean of the finite values among the `window` points centered on it (fewer at the ends).

    A gap stays a gap. running_mean([(1, 0.), (2, 3.), (3, 6.)], 3) -> [(1, 1.5), (2, 3.0), (3, 4.5)]
    """
    half = window // 2
    near = ([y for _, y in points[max(0, i - half):i + half + 1] if y == y] for i in range(len(points)))
    return [(x, math.fsum(ys) / len(ys) if y == y else math.nan) for (x, y), ys in zip(points, near)]


def run_names(run_dirs: list) -> list[str]:
    """The directories' names; with their parents' where two would be the same."""
    paths = [Path(run).resolve() for run in run_dirs]
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else ["/".join(path.parts[-2:]) for path in paths]


def curves(run_dirs: list, out, metric: str = "reward", smooth: int | None = None, title: str = "") -> Path:
    """A metric against the step, saved as the picture `out`, whose path is returned.

    One run: its stages in colors; several: one line a run. Faint: every step. Strong: the mean of `smooth` steps
    (default: a twentieth of the longest run), which never mixes two stages. Steps without the metric are gaps.
    Raises UserError where a run has no readable metrics or never logged this one.
    """
    runs = dict(zip(run_names(run_dirs), map(read_metrics, run_dirs)))
    for name, rows in runs.items():
        if all(math.isnan(number(row.get(metric))) for row in rows.values()):
            known = sorted({key for row in rows.values() for key in row if not math.isnan(number(row[key]))})
            raise UserError(f"run {name} never logged a number for {metric!r}; it logged {', '.join(known)}")
    window = smooth or max(1, max(map(len, runs.values())) // 20)
    window += 1 - window % 2  # odd, so that it is centered
    parts = {name: stages(rows, metric) for name, rows in runs.items()}
    bands = [[(p[0][0] - 0.5, p[-1][0] + 0.5, stage) for stage, p in part] for part in parts.values()]
    raw, means = {}, {}
    for run, (stage, points) in ((run, part) for run in parts for part in parts[run]):
        for lines, values in ((raw, points), (means, running_mean(points, window))):
            gap = (points[-1][0] + 0.5, math.nan)  # no line joins two stages: their rewards are not alike
            lines.setdefault(stage if len(runs) == 1 else run, []).extend([*values, gap])
    title = title or f"{metric} of {next(iter(runs)) if len(runs) == 1 else f'{len(runs)} runs'}"
    note = "every step" if window == 1 else f"faint: every step; strong: mean of {window} steps"
    return line_chart(means, out, title, "step", metric, bands[0] if all(b == bands[0] for b in bands) else None,
                      raw=raw if window > 1 else None, note=note)


# ---- sheets of images ----

def view(path: str, size: tuple | None, boxes: list[tuple[str, list]]) -> Image.Image:
    """The image at `path` with its longer side TILE * SCALE pixels, and boxes over it.

    boxes: [(color, [(x1, y1, x2, y2), ..]), ..], x1 <= x2 and y1 <= y2, in pixels of an image of `size` (w, h) (None:
    of the file itself), and clipped to it. Frames lie around their boxes; the second color's are thinner, so that
    both of two equal boxes are seen. Raises UserError for a file that is no image.
    """
    image = load_image(path)
    w, h = size or image.size
    scale = TILE * SCALE / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    last = (image.width - 1, image.height - 1)
    frames = [([x1 / w * last[0], y1 / h * last[1], x2 / w * last[0], y2 / h * last[1]], color, width)
              for width, (color, group) in zip((7, 4), boxes) for x1, y1, x2, y2 in group[:50]]
    draw = ImageDraw.Draw(image)
    for rim in (2, 0):  # first a white rim around every frame: it sets red boxes off from red things
        for (x1, y1, x2, y2), color, width in frames:
            grown = zip((x1 - width - rim, y1 - width - rim, x2 + width + rim, y2 + width + rim), last * 2)
            inside = [min(max(value, 0), most) for value, most in grown]
            draw.rectangle(inside, outline="white" if rim else color, width=width + 2 * rim)
    return image


def tile(path: str | None, size: tuple | None, boxes: list, texts: list[tuple[str, str, int]]) -> Image.Image:
    """One card: the image (none: text only; unreadable: says so) above texts [(text, color, most lines), ..]."""
    picture = None
    try:
        picture = view(path, size, boxes) if path else None
    except (UserError, OSError, ValueError) as error:
        texts = [(f"no image: {error}", RED, 3), *texts]
    card = Canvas(TILE, TILE + 20 + sum(19 * most + 5 for _, _, most in texts))
    y = 0
    if picture:
        card.image.paste(picture, ((card.image.width - picture.width) // 2, 0))
        y = picture.height / SCALE + 16
    for text, color, most in texts:
        for line in wrap(text, 14, TILE, most):
            card.text(0, y, line, 14, color)
            y += 19
        y += 5
    return card.finish().crop((0, 0, TILE, round(y)))


def save_tiles(tiles: list[Image.Image], out, columns: int) -> Path:
    """The tiles as cards on a grid; a row is as high as its highest tile."""
    if not tiles:
        raise UserError(f"nothing to show in {out}: there are no rows")
    columns, outer = max(1, min(columns, len(tiles))), TILE + 3 * PAD
    rows = [tiles[i:i + columns] for i in range(0, len(tiles), columns)]
    tops = list(itertools.accumulate((max(card.height for card in row) + 3 * PAD for row in rows), initial=PAD))
    page = Image.new("RGB", (columns * outer + PAD, tops[-1]), PAGE)
    draw = ImageDraw.Draw(page)
    for row, top, below in zip(rows, tops, tops[1:]):
        for x, card in zip(range(PAD, page.width, outer), row):
            draw.rectangle((x, top, x + outer - PAD - 1, below - PAD - 1), "white", LINE)
            page.paste(card, (x + PAD, top + PAD))
    return save(page, out)


def prediction_tile(row: dict) -> Image.Image:
    """One line of predictions/*.jsonl: question, true answer, predicted answer (green when right, red when wrong)."""
    true, said = answer_in(row.get("solution", "")), row.get("answer")
    open_boxes = row.get("task", "detection") == "detection" and row.get("form", "open") == "open"
    boxes = [(GREEN, parse_boxes(true) or []), (RED, parse_boxes(str(said)) or [])] if open_boxes else []
    said = f"answered: {said}" if said is not None else f"no answer in: {row.get('completion', '')}"
    return tile(row.get("image"), row.get("size"), boxes, [
        (" · ".join(str(row[key]) for key in ("task", "form", "split") if row.get(key)), GREY, 1),
        (row.get("problem", ""), INK, 4), (f"true: {true}", INK, 3), (said, GREEN if row.get("correct") else RED, 3)])


def answer_in(solution: object) -> str:
    return extract_answer(str(solution)) or str(solution)


def sheet(predictions: list[dict], out, columns: int = 4) -> Path:
    """Predictions (rows of predictions/*.jsonl) as a sheet of cards, saved as the picture `out`, which is returned.

    Over the image: true boxes in green and predicted boxes in red, scaled from row["size"]. A row without an image
    gets a card of text alone. Raises UserError where there are no rows or `out` cannot be written.
    """
    return save_tiles([prediction_tile(row) for row in predictions], out, columns)


def example_tile(forms) -> Image.Image:
    """A training row with its true boxes, and its question and answer in each form that a run trains on."""
    plain = next((example for example in forms if example.form == "open"), forms[0])
    true = answer_in(plain.solution)
    boxes = parse_boxes(true) or [] if plain.task == "detection" and plain.form == "open" else []
    texts = [(f"{plain.task} · {Path(plain.where).name}", GREY, 1)]
    for form in forms:
        texts += [(f"{form.form}: {form.problem}", INK, 8), (answer_in(form.solution), GREEN, 3)]
    return tile(next(iter(plain.images), None), plain.size, [(GREEN, boxes)], texts)


def training_rows(place, image_root, task, seed, skip_bad_rows) -> list[list]:
    """[[one row as a run would train on it, in each of its forms], ..] of a data directory or of one file."""
    options = {"image_root": image_root, "task": task, "skip_bad_rows": skip_bad_rows}
    if Path(place).is_dir():
        files = find_files(place)["train"]
        forms = [form for form in FORMS if files[form] or files["open"]]
        read = training_forms(files, forms, seed, **options | {"image_root": image_root or place}).values()
    else:
        read = [load_examples(place, **options)]
        plain = [e for e in read[0] if e.form == "open" and TASKS[e.task].right]
        read = [derive_all(plain, form, seed, True) for form in ("binary", "choice") if plain] + read
    rows = {}
    for example in itertools.chain(*read):
        rows.setdefault(example.where, []).append(example)
    return list(rows.values())


# ---- table of accuracies ----

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


# ---- command line ----

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


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """`curves`, `table` and `examples`; returns the exit code, 2 with a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(prog="tools.pictures", description="Pictures and tables of training runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("curves", help="a metric against the step")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--out", default="curves.png")
    command.add_argument("--metric", help="a key of metrics.jsonl, such as kl (default: reward, or loss where none is)")
    command.add_argument("--smooth", type=whole, help="steps in the running mean (default: a twentieth of the run)")
    command = commands.add_parser("table", help="accuracies in %% with 95 %% intervals")
    command.add_argument("runs", nargs="+", metavar="RUN")
    command = commands.add_parser("examples", help="rows as a run trains on them, in their three forms")
    command.add_argument("data", metavar="DIR_OR_FILE", help="a data directory, or one file of rows")
    command.add_argument("--image_root", help="directory that image paths start from")
    command.add_argument("--task", nargs="+", default=[], help="task of rows that name none, as the run's")
    command.add_argument("--seed", type=int, default=0, help="the run's --seed")
    command.add_argument("--skip_bad_rows", action="store_true", help="drop and count bad rows")
    command.add_argument("--out", default="sheet.png")
    command.add_argument("-n", type=whole, default=12, help="how many examples, evenly from the whole file")
    args = parser.parse_args(argv)
    try:
        if args.command == "curves":
            rewarded = any("reward" in row for run in args.runs for row in read_metrics(run).values())
            print(curves(args.runs, args.out, args.metric or ("reward" if rewarded else "loss"), args.smooth))
        elif args.command == "table":
            print(table({name: read_results(run) for name, run in zip(run_names(args.runs), args.runs)}))
        else:
            rows = training_rows(args.data, args.image_root, args.task, args.seed, args.skip_bad_rows)
            rows = rows[::max(1, len(rows) // args.n)][:args.n]
            print(save_tiles([example_tile(forms) for forms in rows], args.out, 4))
    except UserError as error:
        print(f"tools.pictures: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
