"""A page to draw text, lines and boxes on, with Pillow: for commands that make pictures.

All is drawn at OVERSAMPLE times its final size and scaled down once, which smooths every edge;
lengths are in final pixels. Text may be a model's: it is cleaned, wrapped and cut before it is drawn.
"""

import bisect
import functools
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from support.words import UserError

OVERSAMPLE = 2
INK, GREY, LINE = "#1f2933", "#6b7682", "#dde2e7"
GREEN, RED, BLUE = "#128a3e", "#d6202b", "#2f6fb2"
GLYPHS = {*map(chr, range(32, 127)), *"°±·«»‘’“”"}  # that Pillow's own font can draw
SPELLED = str.maketrans(dict(zip("–—−×√π≤≥→", "- - - x sqrt pi <= >= ->".split())))


def printable(text, limit=2000):
    """One line of characters that the font has: "é" becomes "e", "²" "2", "π" "pi", others "?".

    Control, direction and combining characters go; white space becomes single spaces.
    """
    text = unicodedata.normalize("NFKD", str(text)[:limit].translate(SPELLED))
    kept = [c for c in text if c.isspace() or unicodedata.category(c)[0] not in "CM"]
    return " ".join("".join(c if c in GLYPHS or c.isspace() else "?" for c in kept).split())


@functools.lru_cache
def font(size):
    """Pillow's own font at a final size."""
    return ImageFont.load_default(size=size * OVERSAMPLE)


def text_width(text, size):
    """Width of a line in final pixels."""
    return font(size).getlength(text) / OVERSAMPLE


def wrap(text, size, width, most):
    """At most `most` lines of the text, none wider than `width`, broken at spaces if there are any.

    "..." marks a cut; a line break in the text is one in the result.
    """
    lines = []
    for paragraph in str(text)[:2000].splitlines():
        rest = printable(paragraph)
        while rest and len(lines) <= most:
            fits = bisect.bisect_right(range(1, len(rest) + 1), width,
                                       key=lambda n: text_width(rest[:n], size)) or 1
            cut = len(rest) if fits == len(rest) else rest.rfind(" ", 1, fits + 1)
            cut = cut if cut > 0 else fits
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
    if len(lines) > most:
        last = lines[most - 1]
        while last and text_width(last + "...", size) > width:
            last = last[:-1]
        lines[most - 1:] = [last + "..."]
    return lines


def pale(color, share):
    """`color` with white mixed in: share 1 leaves it, 0 is white. Opaque: no blots at crossings."""
    mixed = (round(255 - share * (255 - int(color[i:i + 2], 16))) for i in (1, 3, 5))
    return "#" + "".join(f"{value:02x}" for value in mixed)


class Page:
    """A white page of width x height final pixels; `finish` scales it down."""

    def __init__(self, width, height):
        sides = round(width * OVERSAMPLE), round(height * OVERSAMPLE)
        self.image = Image.new("RGB", sides, "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=14, color=INK, anchor="la", width=2000):
        """One line of text, cut at `width`; anchors are Pillow's."""
        for line in wrap(text, size, width, 1):
            self.pen.text((x * OVERSAMPLE, y * OVERSAMPLE), line, color, font(size), anchor)

    def line(self, points, color=LINE, width=1):
        """A line through (x, y) points."""
        points = [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in points]
        self.pen.line(points, color, round(width * OVERSAMPLE), "curve")

    def dot(self, x, y, color, radius):
        """A filled circle."""
        self.pen.circle((x * OVERSAMPLE, y * OVERSAMPLE), radius * OVERSAMPLE, color)

    def box(self, x0, y0, x1, y1, color):
        """A filled rectangle."""
        self.pen.rectangle([side * OVERSAMPLE for side in (x0, y0, x1, y1)], color)

    def finish(self, height=None):
        """The page at its final size, down to `height`."""
        width, whole = (side // OVERSAMPLE for side in self.image.size)
        image = self.image.resize((width, whole), Image.Resampling.LANCZOS)
        return image.crop((0, 0, width, min(whole, round(height)))) if height else image


def save_picture(image, out):
    """Write a picture, and its directory if there is none; returns the path."""
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture {out}: {error}") from error
    return out
