"""Image files: which formats are read, where a named one lies, whether it decodes. A start looks at each file once."""

import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from support.files import write_aside
from support.ranks import gather, world
from support.words import UserError, say

# Not all that Pillow could read: an EPS starts Ghostscript, whatever its name; a TIFF may have 200,000 pages.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")     # a phone's MPO is read as JPEG
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MAX_SIDE, MAX_ASPECT = 16_384, 200      # of an original image; the resizer raises beyond the latter
LARGE = 2**24                           # pixels; of such images one is decoded at a time
MANY = 1000                             # images that are worth a line, a bar and a stamp
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # EXIF orientation -> what sets the image upright
# Pillow's warnings name a line of Pillow and no image; what matters among them is refused with a sentence here.
warnings.filterwarnings("ignore", module=r"PIL\b")


# ---- One image ----

@contextmanager
def opened(path, name=None):
    """An open image of one of FORMATS, no pixel read yet; whatever goes wrong with it is a UserError that names it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except Exception as error:          # not narrower: a decoder may raise anything
        reason = "it is none" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UserError(f"image {name or path} cannot be decoded as PNG, JPEG, WebP, BMP or GIF ({reason}); save it as "
                        "one of these, or drop the row.") from error


def load_image(path) -> Image.Image:
    """The image as RGB, upright by its EXIF tag, transparency laid on white; UserError if it cannot be decoded."""
    with opened(path) as image:
        image.load()
        if (tag := image.getexif().get(0x0112)) in TURNS:
            image = image.transpose(TURNS[tag])
        if image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            white = Image.new("RGB", image.size, "white")
            white.paste(image, (0, 0), image)
            return white
        return image if image.mode == "RGB" else image.convert("RGB")


def inspect_image(path) -> tuple[int, int]:
    """(width, height) of an image as `load_image` gives it; UserError if the model could not be shown it."""
    with opened(path) as image:
        width, height = image.size
        if image.format != "MPO" and getattr(image, "is_animated", False):      # MPO: a photo and its thumbnail
            raise UserError(f"image {path} has several frames; save the one that is meant.")
        if image.mode[0] in "IF":
            raise UserError(f"image {path} has more than 8 bits a channel; save it with 8.")
        if min(width, height) < 2 or max(width, height) >= MAX_ASPECT * min(width, height):
            raise UserError(f"image {path} is {width} x {height}, too small or too thin; crop it or drop the row.")
        if max(width, height) > MAX_SIDE or width * height > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"image {path} is {width} x {height}, too large; scale it and its boxes down.")
        image.draft(None, (width // 8, height // 8))    # of a JPEG: all is read, an eighth is computed
        image.load()
        return (height, width) if image.getexif().get(0x0112) in (5, 6, 7, 8) else (width, height)


def resolve_image(name, root, allow_outside: bool = False) -> str:
    """The image's path under `root`, a folder or several. UserError if there is none, or one outside.

    An absolute path of another machine loses parts from the left until it exists: /elsewhere/coco/1.jpg ->
    root/coco/1.jpg. Any other name means that file alone.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UserError(f"{str(name)[:80]!r} is not the path of an image. Images inside of a row (bytes, base64) are "
                        "not read; `python -m tools.parquet` makes files of them.")
    if name.startswith("~") or "://" in name.removeprefix("file://") or name.startswith("data:"):
        raise UserError(f"{name[:200]} is no path under the image folder; fetch it, and name the file.")
    roots = [Path(os.path.abspath(r)) for r in (root if isinstance(root, list | tuple) else [root])]
    name, outside = name.removeprefix("file://"), False
    for base in roots:
        path = Path(os.path.normpath(base / name))      # an absolute name replaces the base
        outside |= (found := os.path.isfile(path))
        if found and (allow_outside or any(path.is_relative_to(r) for r in roots)):
            return str(path)
    for base in roots if is_absolute(name) else ():
        parts = PureWindowsPath(os.path.normpath(name)).parts   # which knows both / and \
        for start in range(1, len(parts)) if ".." not in parts else ():
            if os.path.isfile(tail := base.joinpath(*parts[start:])):
                return str(tail)
    raise UserError(f"no image {name[:200]} under {' or '.join(map(str, roots))}; name its folder with --image_root" +
                    (", or allow paths that leave it with --allow_outside." if outside else "."))


@lru_cache(16)
def image_roots(root, file) -> list[Path]:
    """Where images of a data file may lie: `root`, and the folder of it that the file is in (grpo_data, SFT_data)."""
    root, file = Path(os.path.abspath(root)), Path(os.path.abspath(file))
    below = file.relative_to(root).parts[:-1] if file.is_relative_to(root) else ()
    return [root, root / below[0]] if below else [root]


def is_absolute(name: str) -> bool:
    """Whether a path starts at the root of some machine: /mnt/a.jpg, C:\\a.jpg, file:///mnt/a.jpg."""
    return name.removeprefix("file://").startswith("/") or PureWindowsPath(name).is_absolute()


def rerooted(name: str, path: str) -> bool:
    """Whether an image that a row names was found at another place than the row says."""
    return is_absolute(name) and os.path.normpath(name.removeprefix("file://")) != path


# ---- All images of a file ----

def image_sizes(paths, root) -> dict:
    """{path: (width, height) upright, or the sentence that says why the model cannot be shown it}.

    Each file is decoded once; ranks share them. Of MANY, those that passed an earlier start are known again by their
    bytes and time of change, from a stamp in the user's cache directory.
    """
    paths, (rank, ranks) = sorted(set(paths)), world()
    stamp = stamp_file(root) if rank == 0 and len(paths) >= MANY else None
    rows, states = (read_stamp(stamp), {path: file_state(path) for path in paths}) if stamp else ({}, {})
    known = {path: tuple(rows[path][2:]) for path in states if rows.get(path, ())[:2] == states[path]}
    known = gather(known)[0]
    todo = [path for path in paths if path not in known]
    if len(todo) >= MANY:
        say(f"decoding {len(todo):,} images, once, to know that each can be shown")
    for part in gather(checked(todo[rank::ranks], rank)):
        known.update(part)
    if stamp and todo:
        passed = [path for path in todo if not isinstance(known[path], str)]
        write_stamp(stamp, rows | {path: [*states[path], *known[path]] for path in passed})
    return known | checked([path for path in paths if path not in known], rank)     # seen by this rank alone


def checked(paths, rank) -> dict:
    """{path: size or sentence}: several at a time, as decoding releases the interpreter lock; LARGE ones one by one."""
    def look(path, alone=False):
        try:
            with opened(path) as image:
                large = image.width * image.height > LARGE
            return None if large and not alone else inspect_image(path)
        except UserError as error:
            return str(error)
    with ThreadPoolExecutor(8) as pool:
        bar = tqdm(pool.map(look, paths), "images", len(paths), leave=False, delay=2, disable=bool(rank) or None)
        sizes = dict(zip(paths, bar))
    return sizes | {path: look(path, alone=True) for path, size in sizes.items() if size is None}


def stamp_file(root) -> Path:
    """Where it is written down which images under `root` passed; of another version of these checks, another file."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(f"1 {FORMATS} {MAX_SIDE} {MAX_ASPECT} {os.path.abspath(root)}".encode()).hexdigest()[:16]
    return cache / "curr-reft" / f"images-{key}.json"


def file_state(path) -> list[int]:
    """[bytes, time of change]: what a file cannot be changed without."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns]


def read_stamp(stamp) -> dict:
    """{path: [bytes, time of change, width, height]}; {} without a readable one."""
    try:
        rows = json.loads(stamp.read_text())
        return {path: row for path, row in rows.items() if isinstance(row, list) and list(map(type, row)) == [int] * 4}
    except (OSError, ValueError, AttributeError):
        return {}


def write_stamp(stamp, rows) -> None:
    """Write a stamp; a cache that cannot be written only costs the next start its time."""
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_aside(stamp, json.dumps(rows))
    except OSError:
        pass
