"""A page to draw text, lines and boxes on, with Pillow: for commands that make pictures.

All is drawn at OVERSAMPLE times its final size and scaled down once, which smooths every edge;
lengths are in final pixels. Text may be a model's: it is cleaned, wrapped and cut.
"""

import bisect
import functools
import unicodedata

from PIL import Image, ImageDraw, ImageFont

OVERSAMPLE = 2
INK, GREY, LINE = "#1f2933", "#6b7682", "#dde2e7"
GREEN, RED, BLUE = "#128a3e", "#d6202b", "#2f6fb2"
GLYPHS = {*map(chr, range(32, 127)), *"°±·«»‘’“”"}  # that Pillow's own font can draw
SPELLED = str.maketrans(dict(zip("–—−×√π≤≥→", "- - - x sqrt pi <= >= ->".split())))


def printable(text):
    """One line of characters that the font has: "é" becomes "e", "²" "2", "π" "pi", others "?".

    Control, direction and combining characters go; white space becomes single spaces.
    """
    text = unicodedata.normalize("NFKD", text[:2000].translate(SPELLED))
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
    """At most `most` lines of a text, no wider than `width`, broken at spaces if there are any.

    A line break in the text is one in the result; "..." marks a cut.
    """
    lines = []
    for rest in map(printable, text[:2000].splitlines()):
        while rest and len(lines) <= most:
            fits = bisect.bisect_right(range(1, len(rest) + 1), width,
                                       key=lambda n: text_width(rest[:n], size)) or 1
            fits = fits if fits == len(rest) else rest.rfind(" ", 1, fits + 1) + 1 or fits
            lines.append(rest[:fits].rstrip())
            rest = rest[fits:].lstrip()
    return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-3] + "..."]


def pale(color, share):
    """`color` with white mixed in: 1 leaves it, 0 is white. Opaque: crossing lines add no blots."""
    mixed = (round(255 - share * (255 - int(color[i:i + 2], 16))) for i in (1, 3, 5))
    return "#" + "".join(f"{value:02x}" for value in mixed)


class Page:
    """A white page of width x height final pixels; `finish` scales it down."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * OVERSAMPLE, height * OVERSAMPLE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x, y, text, color=INK, size=14, anchor="la", width=2000, most=1):
        """At most `most` lines, none wider than `width`; returns y below them. Pillow's anchors."""
        for line in wrap(text, size, width, most):
            self.pen.text((x * OVERSAMPLE, y * OVERSAMPLE), line, color, font(size), anchor)
            y += size + 5
        return y

    def line(self, points, color=LINE, width=1):
        """A line through (x, y) points; a dot where there is only one."""
        points = [(x * OVERSAMPLE, y * OVERSAMPLE) for x, y in points]
        self.pen.line(points, color, round(width * OVERSAMPLE), "curve")
        if len(points) == 1:
            self.pen.circle(points[0], width * 1.6 * OVERSAMPLE, color)

    def box(self, x0, y0, x1, y1, color):
        """A filled rectangle."""
        self.pen.rectangle([side * OVERSAMPLE for side in (x0, y0, x1, y1)], color)

    def finish(self, height=None):
        """The page at its final size, down to `height`."""
        image = self.image.reduce(OVERSAMPLE)
        return image.crop((0, 0, image.width, min(image.height, round(height or image.height))))
