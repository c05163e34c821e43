"""An image with boxes over it, drawn with Pillow."""

from PIL import Image, ImageDraw

from support.images import load_image

SIDE = 600  # pixels of the longer side of a drawn image


def view(path, size, boxes):
    """The image at `path` with its longer side SIDE pixels, and boxes over it.

    boxes: [(color, [(x1, y1, x2, y2), ..]), ..], x1 <= x2 and y1 <= y2, in pixels of an image of
    `size` (w, h) (None: of the file itself), and clipped to it. UserError if it is no image.
    """
    image = load_image(path)
    w, h = size or image.size
    scale = SIDE / max(image.size)
    sides = [max(1, round(side * scale)) for side in image.size]
    image = image.resize(sides, Image.Resampling.LANCZOS)
    draw_boxes(image, [(color, [(x1 / w, y1 / h, x2 / w, y2 / h) for x1, y1, x2, y2 in group])
                       for color, group in boxes])
    return image


def draw_boxes(image, boxes):
    """Frames around boxes, given as shares of the image's sides; of two equal boxes both are seen.

    The second color's frames are thinner, and a white rim sets red frames off from red things.
    """
    pen, last = ImageDraw.Draw(image), (image.width - 1, image.height - 1) * 2
    frames = [(box, color, width) for width, (color, group) in zip((7, 4), boxes) for box in group]
    for rim in (2, 0):
        for box, color, width in frames:
            grow = width + rim
            sides = [share * most + sign * grow
                     for share, most, sign in zip(box, last, (-1, -1, 1, 1))]
            inside = [min(max(side, 0), most) for side, most in zip(sides, last)]
            pen.rectangle(inside, outline="white" if rim else color, width=grow + rim)
