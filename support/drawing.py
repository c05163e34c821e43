"""An image with boxes over it, drawn with Pillow."""

from pathlib import Path

from PIL import Image, ImageDraw

from support.images import load_image

VIEW_SIDE = 600  # pixels of the longer side of a drawn image


def view(path, size, boxes):
    """The image at `path` with its longer side VIEW_SIDE pixels, and frames around boxes.

    boxes: [(color, [(x1, y1, x2, y2), ..]), ..], x1 <= x2 and y1 <= y2, in pixels of an image of
    `size` (w, h) (None: of the file itself), clipped to it. The second color's frames are thinner:
    of two equal boxes both are seen. UserError for a file that is no image.
    """
    image = load_image(path)
    (w, h), scale = size or image.size, VIEW_SIDE / max(image.size)
    sides = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(sides, Image.Resampling.LANCZOS)
    pen, last = ImageDraw.Draw(image), (image.width - 1, image.height - 1)
    frames = [(box, color, width) for width, (color, group) in zip((7, 4), boxes) for box in group]
    for rim in (2, 0):  # first a white rim around each frame: it sets red boxes off from red things
        for (x1, y1, x2, y2), color, width in frames:
            grow = width + rim
            corners = (x1 / w * last[0] - grow, y1 / h * last[1] - grow,
                       x2 / w * last[0] + grow, y2 / h * last[1] + grow)
            inside = [min(max(side, 0), most) for side, most in zip(corners, last * 2)]
            pen.rectangle(inside, outline="white" if rim else color, width=grow + rim)
    return image


def save_picture(image, out):
    """Write a picture as PNG, in a directory that need not be there yet; returns its path."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    image.save(out, "PNG")
    return Path(out)
