"""Image files: formats that are meant, sentences for others, bounded memory, one look at each."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from runs import load_rows

import data
from data import refuse_long_prompts
from rewards import Example
from support import images
from support.base import MIN_PIXELS
from support.images import find_images, image_sizes, inspect_image, load_image, resolve_image
from support.tiny import tiny_image
from support.words import RunError, UserError

HERE = Path(__file__).parent.parent


@pytest.fixture
def decoded(monkeypatch):
    """The names of files that were looked at, in order."""
    seen, inspect = [], images.inspect_image
    monkeypatch.setattr(images, "inspect_image", lambda path: seen.append(Path(path).name) or inspect(path))
    return seen


def row(**fields):
    return {"problem": "How many?", "solution": "1", "task": "math", **fields}


# ---- One image ----

def unusable(path):
    """Writes what a picture of this name is."""
    image = Image.new("L", {"thin": (4000, 40), "wide": (16_385, 200)}.get(path.stem, (90, 90)))
    if path.stem == "truncated":  # the header is whole: only decoding finds out
        Image.effect_noise((90, 90), 90).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:9000])
    elif path.stem == "animated":
        image.save(path, save_all=True, append_images=[Image.new("L", (90, 90), 255)])
    elif path.stem == "deep":
        Image.fromarray(np.full((90, 90), 40_000, np.uint16)).save(path)
    elif path.stem == "empty":
        path.touch()
    elif path.stem != "missing":
        image.save(path)


@pytest.mark.parametrize("name, words", [
    ("missing", "no image"), ("truncated", "be decoded"), ("empty", "be decoded"), ("deep", "8 bits"),
    ("animated", "several frames"), ("thin", "less than 100 times"), ("wide", "2 to 16,384 pixels")])
def test_unusable_image_is_said_before_training(tmp_path, name, words):
    unusable(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{words}"):
        load_rows(tmp_path, row(image=f"{name}.png"))


@pytest.mark.parametrize("kind, reads", [
    *((kind, True) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "MPO")),
    *((kind, False) for kind in ("EPS", "TIFF", "DDS", "AVIF"))])
def test_a_format_is_read_or_refused_whatever_its_name(tmp_path, monkeypatch, kind, reads):
    """Pillow starts Ghostscript for an EPS named .jpg; its rarer decoders end in tracebacks."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("started"))
    image, path = Image.new("RGB", (84, 56), "red"), tmp_path / "a.jpg"
    thumbnail = {"save_all": True, "append_images": [image.resize((42, 28))]}  # of a camera's photo
    image.save(path, kind, **thumbnail if kind == "MPO" else {})
    if reads:
        assert inspect_image(path) == load_image(path).size == (84, 56)
    for read in (inspect_image, load_image) if not reads else ():
        with pytest.raises(UserError, match="a.jpg cannot be decoded as PNG, JPEG"):
            read(path)


@pytest.mark.parametrize("error", [IndexError("list"), RuntimeError("dav1d"), MemoryError()])
def test_whatever_a_decoder_raises_is_a_sentence_with_the_path(tmp_path, monkeypatch, error):
    def broken(self):
        raise error
    path = tiny_image(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    for read in (inspect_image, load_image):
        with pytest.raises(UserError, match="a.png cannot be decoded"):
            read(path)
    assert len(load_rows(tmp_path, row(image="a.png"), row(), skip_bad_rows=True)) == 1


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_set_upright_in_size_and_pixels(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    image = Image.new("RGB", (60, 120), "white")
    image.paste("red", (0, 0, 20, 60))
    image.save(path := tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert load_image(path).tobytes() == upright.convert("RGB").tobytes()
    assert inspect_image(path) == upright.size
    assert load_rows(tmp_path, row(image="a.png"))[0].size == data.model_size(upright.size)


@pytest.mark.parametrize("name, image, seen", [
    ("a.jpg", Image.new("RGB", (60, 120), "red").convert("CMYK"), (255, 0, 0)),
    ("a.png", Image.new("RGB", (60, 120), "red").convert("P"), (255, 0, 0)),
    ("a.png", Image.new("RGBA", (60, 120), (0, 0, 0, 0)), (255, 255, 255))])  # not the black below
def test_modes_are_converted_as_seen(tmp_path, name, image, seen):
    image.save(tmp_path / name)
    shown = load_image(tmp_path / name)
    assert shown.mode == "RGB" and np.allclose(shown.getpixel((0, 0)), seen, atol=30)


@pytest.mark.parametrize("cut", [15, 60_000])
def test_a_photo_without_its_end_is_found_although_only_an_eighth_is_computed(tmp_path, cut):
    path = tmp_path / "a.jpg"
    Image.effect_noise((640, 480), 90).convert("RGB").save(path, quality=90)
    path.write_bytes(path.read_bytes()[:-cut])
    for read in (inspect_image, load_image):
        with pytest.raises(UserError, match="truncated"):
            read(path)


SCRIPT = """
import os, resource, sys
from PIL import Image
from support.images import inspected, load_image
folder = sys.argv[1]
exif = bytes.fromhex("45786966000049492a0008000000020012010200ff000000ffff00"
                     "000f01020009000000ffff000000000000")
Image.new("RGB", (84, 56)).save(folder + "/odd.jpg", exif=exif)
large = [f"{folder}/{n}.png" for n in range(6)]
Image.new("RGBA", (5000, 4000), (9, 9, 9, 99)).save(large[0], compress_level=1)
for path in large[1:]:
    os.link(large[0], path)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with open("/proc/self/statm") as file:
    now = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
blocker = bytearray(max(0, peak() - now))  # so that all that is measured is new
start = peak()
inspected([folder + "/odd.jpg", *large], 0)
print((peak() - start) / 80_000_000)  # in copies of one image's RGBA pixels
load_image(large[0])
print((peak() - start) / 80_000_000)
"""


@pytest.mark.slow
def test_large_images_cost_two_copies_one_at_a_time_without_warnings(tmp_path):
    """88 megapixels of RGBA cost 1.7 GiB, eight rows of them 12.5; bad EXIF data warned."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", SCRIPT, str(tmp_path)], cwd=HERE,
                          capture_output=True, text=True, env={"PYTHONPATH": str(HERE), "PATH": ""})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    checking, loading = map(float, done.stdout.split())
    assert checking < 1.4 and loading < 2.4


# ---- Where they lie ----

def test_image_paths_are_rerooted_and_kept_inside(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("root/coco/1.png", "root/1.png", "outside.png"):
        tiny_image(tmp_path / name)
    tail = str(root / "coco/1.png")  # the longest
    for name in ("/mnt/they/data/coco/1.png", "C:\\data\\coco\\1.png", "file:///x/coco/1.png"):
        assert resolve_image(name, root) == tail
    assert resolve_image("coco/1.png", root) == resolve_image(tail, root) == tail
    for name in ("../outside.png", "coco/../../outside.png", str(tmp_path / "outside.png")):
        with pytest.raises(UserError, match="--allow_outside"):
            resolve_image(name, root)
        assert resolve_image(name, root, allow_outside=True) == str(tmp_path / "outside.png")
    for name in ("they/coco/1.png", "C:\\x\\..\\1.png", "/" + "x/" * 40_000, "a\0b", " "):
        with pytest.raises(UserError, match="no image|is not the path"):
            resolve_image(name, root)
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match="--allow_outside"):
        resolve_image("../outside.png", Path("."))
    tiny_image(root / "grpo_data" / "2.png")
    names, elsewhere = ["coco/1.png", "/mnt/2.png"], []
    paths = find_images(names, root, root / "grpo_data" / "train" / "a.jsonl", False, elsewhere)
    assert paths == (tail, str(root / "grpo_data/2.png")) and elsewhere == ["/mnt/2.png"]


# ---- The start ----

def test_a_picture_that_goes_bad_within_a_run_is_named(tmp_path, processor):
    path = tiny_image(tmp_path / "a.png")
    (example,) = load_rows(tmp_path, row(image="a.png"))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RunError, match=r"rows.jsonl:1: image .*a.png cannot be decoded"):
        processor(example)


@pytest.mark.parametrize("size", [(640, 480), (1999, 1501), (57, 30), (30, 900), (2, 199), (4000, 41)])
def test_the_size_shown_is_made_as_the_image_processor_makes_it(tmp_path, processor, size):
    """Resized before, a large image never becomes arrays; its pixels are transformers' own."""
    Image.effect_noise(size, 90).convert("RGB").save(path := tmp_path / "a.png")
    shown = processor(Example(problem="", solution="", images=(str(path),)))
    _, rows, columns = shown.image_grid_thw[0].tolist()
    assert (columns * 14, rows * 14) == data.model_size(size)
    assert MIN_PIXELS <= rows * columns * 196 <= data.MAX_PIXELS
    if max(size) < 4000:  # resized once more its sides would be too unlike
        plain = processor.image_processor([load_image(path)], return_tensors="pt")
        assert shown.pixel_values.equal(plain["pixel_values"].float())


def test_many_rows_of_one_image_decode_it_once(tmp_path, decoded, monkeypatch, capsys):
    monkeypatch.setattr(images, "MANY", 1)
    tiny_image(tmp_path / "a.png")
    load_rows(tmp_path, *(row(problem=f"{n}?", image="a.png") for n in range(8)))
    assert decoded == ["a.png"] and "decoding 1 images, once" in capsys.readouterr().err


def test_ranks_share_the_images_and_all_know_all(tmp_path, decoded, monkeypatch):
    paths = [str(tiny_image(tmp_path / f"{n}.png")) for n in range(6)]
    for rank in (0, 1):
        other = {path: (1, 2) for path in paths[1 - rank::2]}
        monkeypatch.setattr(images, "world", lambda: (rank, 2))
        monkeypatch.setattr(images, "gather", lambda value: [value, other])
        decoded.clear()
        sizes = image_sizes(paths)
        assert sorted(decoded) == [Path(path).name for path in paths[rank::2]] and len(sizes) == 6
        assert sizes[paths[rank]] == (84, 56) and sizes[paths[1 - rank]] == (1, 2)


@pytest.fixture
def renders(monkeypatch):
    """Grows by one with each prompt that is rendered."""
    seen, render = [], data.render
    monkeypatch.setattr(data, "render", lambda *args: seen.append(1) or render(*args))
    return seen


def test_prompt_lengths_need_no_image_and_are_counted_once(tmp_path, processor, renders, monkeypatch):
    for name, size in (("a", (640, 480)), ("b", (84, 56))):
        tiny_image(tmp_path / f"{name}.png", size)
    examples = load_rows(tmp_path, *(row(images=["a.png", "b.png"][:n]) for n in range(3)))
    expected = [len(processor(example).input_ids) for example in examples]
    assert processor.prompt_lengths([replace(e, where="") for e in examples]) == expected
    renders.clear()
    monkeypatch.setattr(data, "opened", lambda path: pytest.fail("an image was opened"))
    assert processor.prompt_lengths(examples[:2] * 3) == expected[:2] * 3 and len(renders) == 2


def test_ranks_share_the_prompts(processor, renders, monkeypatch):
    examples = [Example(problem=f"How many {n}?", solution="1") for n in range(5)]
    monkeypatch.setattr(data, "world", lambda: (1, 2))
    monkeypatch.setattr(data, "gather", lambda value: [[7, 8, 999], value])
    cfg = SimpleNamespace(max_prompt_length=100, skip_bad_rows=True)
    assert refuse_long_prompts(cfg, processor, examples) == examples[:4] and len(renders) == 2


def test_a_name_in_other_letters_is_found_if_one_file_can_be_meant(tmp_path):
    for name in ("caf\u00e9.png", "Sub Dir/IMG_1.PNG", "1.png", "000000000007.jpg", "2.png", "2.jpg"):
        tiny_image(tmp_path / name)
    for name, meant in (("cafe\u0301.png", "caf\u00e9.png"), ("CAF%C3%89.png", "caf\u00e9.png"), ("7", "000000000007.jpg"),
                        ("sub%20dir\\img_1.png", "Sub Dir/IMG_1.PNG"), ("C:\\x\\sub dir\\img_1.png", "Sub Dir/IMG_1.PNG")):
        assert resolve_image(name, tmp_path) == str(tmp_path / meant)
    for name in ("001.png", "2", "data:image/png;base64,iVBO", "https://x.org/1.png", "sub/img_1.png"):
        with pytest.raises(UserError):
            resolve_image(name, tmp_path)
