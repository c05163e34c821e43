"""Image files: which formats are read, where a named one lies, whether it decodes."""

import math
import os
import re
import unicodedata
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from support.ranks import gather, world
from support.words import UserError, say

# Not all that Pillow could read: an EPS starts Ghostscript; a TIFF may have 200,000 pages.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # a phone's MPO is read as JPEG
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_SIDE, MAX_NAME = 16_384, 4096  # of an original image; letters of a path
MAX_ASPECT = 100  # rounding sides to 28 pixels may double it, and the resizer raises beyond 200
MAX_AREA = Image.MAX_IMAGE_PIXELS  # beyond which Pillow warns of a bomb
LARGE = 2**24  # pixels; of such images one is decoded at a time
MANY = 1000  # images that are worth a line
# Pillow's warnings name a line of Pillow and no image; what matters among them is refused here.
warnings.filterwarnings("ignore", module=r"PIL\b")
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,  # EXIF orientation ->
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,  # what sets it upright
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


@contextmanager
def opened(path, name=None):
    """An open image of one of FORMATS, no pixel read yet; whatever goes wrong is a UserError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # not narrower: a decoder may raise anything
        none = isinstance(error, UnidentifiedImageError)
        reason = "it is none" if none else str(error) or type(error).__name__
        raise UserError(f"image {name or path} cannot be decoded as PNG, JPEG, WebP, BMP or GIF "
                        f"({reason}); save it as one of these, or drop the row.") from error


def load_image(path) -> Image.Image:
    """The image as RGB, upright by its EXIF tag, on white where clear; UserError if damaged."""
    with opened(path) as image:
        image.load()
        if (tag := image.getexif().get(0x0112)) in UPRIGHT:
            image = image.transpose(UPRIGHT[tag])
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, (0, 0), image)
        return white


def inspect_image(path) -> tuple[int, int]:
    """(width, height) of an image as `load_image` gives it; UserError if it cannot be shown."""
    with opened(path) as image:
        width, height = image.size
        short, long = sorted(image.size)
        if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: and its thumbnail
            raise UserError(f"image {path} has several frames; save the one that is meant.")
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits a channel; save it with 8.")
        if short < 2 or long > MAX_SIDE or long >= MAX_ASPECT * short or short * long > MAX_AREA:
            raise UserError(f"image {path} is {width} x {height}, and its sides must be 2 to "
                            f"{MAX_SIDE:,} pixels, one less than {MAX_ASPECT} times the other, all "
                            f"at most {MAX_AREA:,} pixels; crop or scale it, or drop the row.")
        image.draft(None, (width // 8, height // 8))  # of a JPEG: all is read, an eighth computed
        image.load()
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def resolve_image(name, root, allow_outside: bool = False) -> str:
    """The image's path under `root`, a folder or several; UserError if it is not there, or outside.

    An absolute path of another machine loses parts from the left until it exists: /elsewhere/coco/1.jpg ->
    root/coco/1.jpg. A name may be written in other letters (case, %20, \\, Unicode) or without its ending.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > MAX_NAME \
            or name.startswith(("data:", "http:", "https:")):
        raise UserError(f"{str(name)[:80]!r} is not the path of an image. Images inside of a row "
                        "(bytes, base64) or on the web are not read; make files of them (docs/data.md).")
    roots = [Path(os.path.abspath(r)) for r in ([root] if isinstance(root, str | Path) else root)]
    name = name.removeprefix("file://")
    paths = [Path(os.path.normpath(base / name)) for base in roots]  # absolute: replaces the base
    found = [path for path in paths if os.path.isfile(path)]
    parts = PureWindowsPath(os.path.normpath(name)).parts  # knows / and \\, and C:
    elsewhere = PureWindowsPath(name).root and ".." not in parts
    tails = (base.joinpath(*parts[n:]) for base in roots for n in range(1, len(parts)) if elsewhere)
    spelled = (path for base in roots for n in (range(1, len(parts)) if elsewhere else [0])
               for path in [respelled(base, parts[n:])] if path)
    for path in chain(found, tails, spelled):
        inside = allow_outside or any(path.is_relative_to(base) for base in roots)
        if inside and os.path.isfile(path):
            return str(path)
    leaves = ", or allow paths that leave it with --allow_outside" if found else ""
    raise UserError(f"no image {name[:200]} under {' or '.join(map(str, roots))}; name its folder "
                    f"with --image_root{leaves}.")


def respelled(base: Path, parts):
    """The only path below `base` that has these names in other letters; None for none or several."""
    for part in parts:
        names = listing(str(base)).get(plain_name(part), []) if part != ".." else []
        if len(names) != 1:
            return None
        base = base / min(names)
    return base


@lru_cache(256)
def listing(folder: str) -> dict[str, set[str]]:
    """{plain name, or that without its ending: names} of a folder's entries."""
    found = defaultdict(set)
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            found[plain_name(name)].add(name)
            found[plain_name(Path(name).stem)].add(name)
    return found


def plain_name(name: str) -> str:
    """A name without what may differ: "Caf%C3%A9.PNG" -> "café.png"; of a bare number, as COCO's, the zeros."""
    name = unicodedata.normalize("NFC", unquote(name)).casefold()
    return name if name.endswith(ENDINGS) else re.sub(r"^(?:coco_[a-z]+20[0-9]{2}_)?0*(?=[0-9]+$)", "", name)


def find_images(names, root, file, allow_outside: bool, elsewhere: list) -> tuple[str, ...]:
    """Paths of the images that a row of a file names; `elsewhere` gets names that lie nowhere here.

    They lie under `root`, or under the folder in it that has the file (grpo_data, SFT_data).
    """
    root, file = Path(os.path.abspath(root)), Path(os.path.abspath(file))
    below = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    paths = [resolve_image(name, [root, *(root / part for part in below[:1])], allow_outside)
             for name in names]
    names = [name.removeprefix("file://") for name in names]
    elsewhere += [name for name, path in zip(names, paths)
                  if not path.endswith(os.path.normpath(name)) and not os.path.isfile(name)]
    return tuple(paths)


def image_sizes(paths) -> dict:
    """{path: (width, height) upright, or the sentence that says why the model cannot be shown it}.

    Each file is decoded once; ranks share them.
    """
    paths, (rank, ranks), sizes = sorted(set(paths)), world(), {}
    if len(paths) >= MANY:
        say(f"decoding {len(paths):,} images, once, to know that each can be shown")
    for part in gather(inspected(paths[rank::ranks], rank)):
        sizes.update(part)
    return sizes | inspected([path for path in paths if path not in sizes], rank)  # seen here alone


def inspected(paths, rank) -> dict:
    """{path: size or sentence}: several at a time, in threads, but LARGE ones one by one."""
    def look(path, most=LARGE):
        try:
            with opened(path) as image:
                large = image.width * image.height > most
            return None if large else inspect_image(path)
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor(8) as pool:
        silent = bool(rank) or None
        bar = tqdm(pool.map(look, paths), "images", len(paths), False, delay=2, disable=silent)
        sizes = dict(zip(paths, bar))
    return sizes | {path: look(path, math.inf) for path, size in sizes.items() if size is None}
