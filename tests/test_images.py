"""Image files: formats that are meant, sentences for all others, bounded memory, a start that looks at each once."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageFile

import data
from data import Processor, load_examples
from rewards import Example
from support import images
from support.images import image_sizes, inspect_image, load_image
from support.tiny import tiny_checkpoint, tiny_image, write_jsonl
from support.words import RunError, UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def decoded(monkeypatch):
    """The names of files that were looked at, in order."""
    seen, inspect = [], images.inspect_image
    monkeypatch.setattr(images, "inspect_image", lambda path: seen.append(Path(path).name) or inspect(path))
    return seen


# ---- One image ----

@pytest.mark.parametrize("format, reads", [("PNG", True), ("JPEG", True), ("WEBP", True), ("BMP", True), ("GIF", True),
                                           ("EPS", False), ("TIFF", False), ("DDS", False), ("AVIF", False)])
def test_a_format_is_read_or_refused_whatever_its_name(tmp_path, monkeypatch, format, reads):
    """Pillow starts Ghostscript for an EPS named .jpg; its rarer decoders end a run by tracebacks."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    Image.new("RGB", (84, 56), "red").save(path := tmp_path / "a.jpg", format)
    if reads:
        assert inspect_image(path) == load_image(path).size == (84, 56)
    for read in (inspect_image, load_image) if not reads else ():
        with pytest.raises(UserError, match="a.jpg cannot be decoded as PNG, JPEG, WebP, BMP or GIF"):
            read(path)


def test_a_camera_photo_with_a_thumbnail_is_one_image(tmp_path):
    photo = Image.new("RGB", (84, 56), "red")
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photo.resize((42, 28))])
    assert inspect_image(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size == (84, 56)


@pytest.mark.parametrize("error", [IndexError("list"), RuntimeError("dav1d"), NotImplementedError("?"), MemoryError()])
def test_whatever_a_decoder_raises_is_a_sentence_with_the_path(tmp_path, monkeypatch, error):
    def broken(self):
        raise error
    path = tiny_image(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    for read in (inspect_image, load_image):
        with pytest.raises(UserError, match="a.png cannot be decoded"):
            read(path)
    rows = write_jsonl(tmp_path / "rows.jsonl", [
        {"problem": "?", "solution": "1", "task": "math", **image} for image in ({"image": "a.png"}, {})])
    assert len(load_examples(rows, skip_bad_rows=True)) == 1


def test_a_gif_cut_between_its_frames_is_a_sentence(tmp_path):
    frames = [Image.new("RGB", (84, 56), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    content = (tmp_path / "a.gif").read_bytes()
    for end in range(20, len(content), 7):
        (tmp_path / "a.gif").write_bytes(content[:end])
        try:
            inspect_image(tmp_path / "a.gif")
        except UserError as error:
            assert "a.gif" in str(error)


@pytest.mark.parametrize("tag", range(1, 9))
def test_every_orientation_is_set_upright_in_size_and_pixels(tmp_path, tag):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x0112] = tag
    image = Image.new("RGB", (60, 120), "white")
    image.paste("red", (0, 0, 20, 60))
    image.save(path := tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert load_image(path).tobytes() == upright.convert("RGB").tobytes() and inspect_image(path) == upright.size


@pytest.mark.parametrize("cut", [15, 2000, 60_000])
def test_a_photo_without_its_end_is_found_although_only_an_eighth_is_computed(tmp_path, cut):
    Image.effect_noise((640, 480), 90).convert("RGB").save(tmp_path / "a.jpg", quality=90)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[:-cut])
    for read in (inspect_image, load_image):
        with pytest.raises(UserError, match="truncated"):
            read(tmp_path / "a.jpg")


SCRIPT = """
import os, resource, sys
from PIL import Image
from tools.images import checked, load_image
folder = sys.argv[1]
exif = bytes.fromhex("45786966000049492a000800000002001201 0200ff000000ffff0000 0f0102000900 0000ffff000000000000")
Image.new("RGB", (84, 56)).save(folder + "/odd.jpg", exif=exif)
large = [f"{folder}/{n}.png" for n in range(6)]
Image.new("RGBA", (5000, 4000), (9, 9, 9, 99)).save(large[0], compress_level=1)
for path in large[1:]:
    os.link(large[0], path)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
blocker = bytearray(max(0, peak() - now()) * 1024)     # so that what is measured is above all that was there before
start = peak()
checked([folder + "/odd.jpg", *large], 0)
print((peak() - start) / (80_000_000 / 1024))           # in copies of one image's RGBA pixels
load_image(large[0])
print((peak() - start) / (80_000_000 / 1024))
"""


def test_large_images_cost_two_copies_and_are_decoded_one_at_a_time_without_warnings(tmp_path):
    """88 megapixels of RGBA cost 1.7 GiB, eight rows of them 12.5; corrupt EXIF data warned with a line of Pillow."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True,
                          cwd=HERE.parent, env={"PYTHONPATH": str(HERE.parent), "PATH": ""})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    checking, loading = map(float, done.stdout.split())
    assert checking < 1.4 and loading < 2.4


def test_a_picture_that_goes_bad_within_a_run_is_named(tmp_path, processor):
    path = tiny_image(tmp_path / "a.png")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "?", "solution": "1", "task": "math", "image": "a.png"}])
    (example,) = load_examples(rows)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RunError, match=r"rows.jsonl:1: image .*a.png cannot be decoded"):
        processor(example)


def test_the_size_shown_is_made_as_the_image_processor_makes_it(tmp_path, processor):
    """Resized before, a large image never becomes arrays; the pixels must be those of transformers' own resize."""
    path = tmp_path / "a.png"
    for size in ((1999, 1501), (57, 30), (30, 900)):
        Image.effect_noise(size, 90).convert("RGB").save(path)
        shown = processor(Example(problem="", solution="", images=(str(path),)))
        plain = processor.image_processor([load_image(path)], return_tensors="pt")
        assert shown.pixel_values.equal(plain["pixel_values"].float())


# ---- The start ----

def test_many_rows_of_one_image_decode_it_once(tmp_path, decoded):
    tiny_image(tmp_path / "a.png")
    load_examples(write_jsonl(tmp_path / "rows.jsonl", [
        {"problem": f"{n}?", "solution": "1", "task": "math", "image": "a.png"} for n in range(8)]))
    assert decoded == ["a.png"]


def test_a_second_start_decodes_only_what_has_changed(tmp_path, decoded, monkeypatch, capsys):
    monkeypatch.setattr(images, "MANY", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [str(tiny_image(tmp_path / f"{n}.png", (84 + 28 * n, 56))) for n in range(4)]
    (tmp_path / "bad.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    paths.append(str(tmp_path / "bad.png"))
    first = image_sizes(paths, tmp_path)
    assert len(decoded) == 5 and first[paths[3]] == (168, 56) and "bad.png cannot" in first[paths[4]]
    assert "decoding 5 images, once" in capsys.readouterr().err
    decoded.clear()
    assert image_sizes(paths, tmp_path) == first and decoded == ["bad.png"], "only what passed is remembered"
    tiny_image(paths[0], (200, 100))
    decoded.clear()
    assert image_sizes(paths, tmp_path)[paths[0]] == (200, 100) and sorted(decoded) == ["0.png", "bad.png"]
    image_sizes(paths[1:], tmp_path)                            # another file of the same data keeps what is known
    decoded.clear()
    image_sizes(paths, tmp_path)
    assert decoded == ["bad.png"]
    (stamp,) = (tmp_path / "cache" / "curr-reft").iterdir()
    for damage in ("", "[]", '{"%s": [1]}' % paths[0]):
        stamp.write_text(damage)
        assert image_sizes(paths, tmp_path) == image_sizes(paths, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")          # a cache that cannot be written
    assert image_sizes(paths, tmp_path)[paths[0]] == (200, 100)


def test_ranks_share_the_images_and_all_are_told(tmp_path, decoded, monkeypatch):
    paths = [str(tiny_image(tmp_path / f"{n}.png")) for n in range(6)]
    for rank in (0, 1):
        other = {path: (1, 2) for path in paths[1 - rank::2]}
        monkeypatch.setattr(images, "world", lambda: (rank, 2))
        monkeypatch.setattr(images, "gather", lambda value: [{}, {}] if not value else [value, other])
        decoded.clear()
        sizes = image_sizes(paths, tmp_path)
        assert sorted(decoded) == [Path(path).name for path in paths[rank::2]] and len(sizes) == 6
        assert sizes[paths[rank]] == (84, 56) and sizes[paths[1 - rank]] == (1, 2)


def test_lengths_of_prompts_are_right_without_opening_an_image_and_counted_once(tmp_path, processor, monkeypatch):
    for name, size in (("a", (640, 480)), ("b", (84, 56))):
        tiny_image(tmp_path / f"{name}.png", size)
    examples = load_examples(write_jsonl(tmp_path / "rows.jsonl", [
        {"problem": f"{n}?", "solution": "1", "task": "math", "images": ["a.png", "b.png"][:n]} for n in range(3)]))
    expected = [len(processor(example).input_ids) for example in examples]
    assert processor.prompt_lengths([replace(example, where="") for example in examples]) == expected
    renders, render = [], data.render
    monkeypatch.setattr(data, "render", lambda *arguments: renders.append(1) or render(*arguments))
    monkeypatch.setattr(data, "opened", lambda path: pytest.fail("an image was opened"))
    assert processor.prompt_lengths(examples[:2] * 3) == expected[:2] * 3 and len(renders) == 2


def test_ranks_share_the_prompts(tmp_path, processor, monkeypatch):
    from types import SimpleNamespace
    examples = [Example(problem=f"How many {n}?", solution="1") for n in range(5)]
    renders, render = [], data.render
    monkeypatch.setattr(data, "render", lambda *arguments: renders.append(1) or render(*arguments))
    monkeypatch.setattr(data, "world", lambda: (1, 2))
    monkeypatch.setattr(data, "gather", lambda value: [[7, 8, 999], value])
    cfg = SimpleNamespace(max_prompt_length=100, skip_bad_rows=True)
    assert [e.problem for e in data.refuse_long_prompts(cfg, processor, examples)] == [e.problem for e in examples[:4]]
    assert len(renders) == 2
