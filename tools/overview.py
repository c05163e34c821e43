"""The whole method on one line: an annotation, its three forms, the stages of the curriculum, rejection sampling.

    python -m tools.overview --data runs/demo/data --out docs/method.png        # drawn from the first detection row
"""

import argparse
import sys

from answers import parse_boxes
from data import derive, find_files, load_examples
from distributed import UserError
from tasks import truth_of
from tools.pictures import GREEN, GREY, INK, Canvas, pale, save, view, wrap
from tools.terminal import terminal

WIDTH, HEIGHT, CARD, SIZE = 1560, 506, 132, 19
BLUE, ORANGE, TEAL = "#2f6fb2", "#e07b00", "#159a72"
STAGES = {  # form -> what it asks for, what its accuracy is, why it stands where it stands
    "binary": ("yes or no", "1 for the right verdict", "a guess is right half the time: signal at once"),
    "choice": ("option letters", "1 for the right letters, 0.2 for a part", "a guess is right one time in four"),
    "open": ("a free answer", "IoU above 0.5, label overlap, the number", "a guess is hardly ever right")}
REJECT = ("general questions, text-only ones too", "8 sampled answers to each",
          "a judge scores 0 to 100: accuracy, logic, format, fluency", "the best is kept, if above 85",
          "fine-tuned on what was kept")


def card(page, x, y, width, height, title, color):
    """A framed box with a title on its upper edge."""
    page.box(x, y, x + width, y + height, pale(color, 0.55))
    page.box(x + 2, y + 2, x + width - 2, y + height - 2, pale(color, 0.07))
    page.text(x + 14, y + 10, title, SIZE + 1, color)


def arrow(page, x0, y, x1):
    """A line from left to right with a head."""
    page.line([(x0, y), (x1 - 3, y)], GREY, 2.5)
    page.line([(x1 - 11, y - 7), (x1 - 2, y), (x1 - 11, y + 7)], GREY, 2.5)


def down(page, x, y, length):
    """A short arrow downwards."""
    page.line([(x, y), (x, y + length)], GREY, 2.5)
    page.line([(x - 7, y + length - 8), (x, y + length), (x + 7, y + length - 8)], GREY, 2.5)


def annotation(page, example):
    """The image with its true boxes, and the truth as it is written."""
    picture = view(example.images[0], example.size, [(GREEN, parse_boxes(truth_of(example)) or [])])
    share = 2 * 212 / max(picture.size)
    picture = picture.resize([round(side * share) for side in picture.size])
    page.image.paste(picture, (48, 2 * 72))
    below = lines(page, 24, 72 + picture.height / 2 + 12, 222, example.problem, INK, 2, SIZE - 2)
    below = lines(page, 24, below, 222, truth_of(example), GREEN, 3, SIZE - 4)
    lines(page, 24, below + 4, 222, "or the labels in it, or a count", GREY, 2, SIZE - 3)


def lines(page, x, y, width, text, color=INK, most=3, size=SIZE):
    """Wrapped text; returns where it ends."""
    for part in text.splitlines():
        for row in wrap(part, size, width, most):
            page.text(x, y, row, size, color)
            y += size + 7
    return y


def draw(example, out):
    """Save the picture of the method for one open example with an image; returns its path."""
    page = Canvas(WIDTH, HEIGHT)
    for x, title in ((24, "1  An annotation"), (288, "2  asked in three forms"), (708, "3  GRPO, stage by stage"),
                     (1250, "4  Its own best answers")):
        page.text(x, 20, title, SIZE + 3)
    annotation(page, example)
    arrow(page, 246, 64 + CARD * 1.5 + 16, 284)
    y = 64
    for form, (what, accuracy, note) in STAGES.items():
        asked, middle = derive(example, form), y + CARD / 2
        card(page, 288, y, 368, CARD, f"{form}: {what}", BLUE)
        question, *rest = asked.problem.splitlines()
        options = ["   ".join(rest[n:n + 2]) for n in (1, 3)] if form == "choice" else rest
        below = lines(page, 302, y + 38, 344, "\n".join([question, *options]), INK, 1, SIZE - 3)
        lines(page, 302, below, 344, f"truth: {truth_of(asked)}", GREEN, 1, SIZE - 3)
        arrow(page, 660, middle, 704)
        card(page, 708, y, 466, CARD, f"{form} stage", ORANGE)
        pays = f"accuracy: {accuracy}\nformat: 1 for thinking, then an answer"
        below = lines(page, 722, y + 40, 440, pays, INK, 1, SIZE - 2)
        lines(page, 722, below, 440, note, GREY, 1, SIZE - 3)
        if form != "open":
            down(page, 900, y + CARD + 1, 15)
            page.text(916, y + CARD, "policy: start and KL reference of the next", SIZE - 5, GREY)
        y += CARD + 18
    arrow(page, 1178, 64 + CARD * 2.5 + 36, 1246)
    page.text(1212, 64 + CARD * 2.5 + 26, "policy", SIZE - 4, GREY, "ms")
    card(page, 1250, 64, 286, 3 * CARD + 36, "reject stage: SFT", TEAL)
    below = 110
    for text in REJECT:
        if text != REJECT[0]:
            down(page, 1393, below - 2, 18)
            below += 26
        below = lines(page, 1264, below, 264, text, INK, 3, SIZE - 1) + 2
    return save(page.finish(), out)


def main(argv=None):
    """The command; returns its exit code, 2 with a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="data directory, as currreft.py's")
    parser.add_argument("--row", type=int, default=1, help="which detection row of the open training file, from 1")
    parser.add_argument("--out", default="method.png")
    args = parser.parse_args(argv)
    try:
        rows = load_examples(find_files(args.data)["train"]["open"], image_root=args.data, form="open")
        shown = [example for example in rows if example.task == "detection"]
        if not 1 <= args.row <= len(shown):
            raise UserError(f"--row {args.row}: {args.data} has {len(shown)} detection rows in its open training file")
        print(draw(shown[args.row - 1], args.out))
    except UserError as error:
        print(f"tools.overview: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
