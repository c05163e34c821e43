"""Pictures and tables of runs. The name of a test says which defect it keeps out."""

import math

import pytest
from PIL import Image, ImageColor

from support.drawing import VIEW_SIDE, view
from support.files import write_record
from support.page import BLUE, GREEN, RED, printable, text_width, wrap
from support.tables import table, wilson
from support.tiny import tiny_data, tiny_image, write_jsonl
from support.words import UserError
from tools.pictures import TILE, bars, by_stage, curves, main, prediction_tile, running_mean

ANSWER = {"image": None, "size": None, "problem": "?", "solution": "<answer>[]</answer>",
          "answer": "", "task": "detection", "form": "open", "split": "open_id", "completion": "",
          "correct": False}


def write_run(folder, rows):
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def step(number, stage="binary", index=0, **values):
    return {"stage": stage, "stage_index": index, "step": number, **values}


def shows(picture, color):
    """Whether a picture, or one in a file, has pixels of about a color."""
    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    return any(all(abs(a - b) <= 12 for a, b in zip(pixel, ImageColor.getrgb(color)))
               for _, pixel in image.convert("RGB").getcolors(2**24))


# ---- Charts ----

def test_what_is_no_number_is_a_gap_and_no_zero_and_means_divide_by_what_is_there():
    rows = [step(i, reward=value) for i, value in enumerate([2.0, None, 4.0, "2", math.nan], 1)]
    (first, points), (second, rest) = by_stage([*rows, step(6, "sft", 1, loss=2.0)], "reward")
    assert (first, second) == ("binary", "sft")
    assert [y for _, y in points + rest if not math.isnan(y)] == [2.0, 4.0]
    assert [y for _, y in running_mean(points, 3) if not math.isnan(y)] == [2.0, 4.0]
    assert running_mean([(1, 0.0), (2, 3.0), (3, 6.0)], 3) == [(1, 1.5), (2, 3.0), (3, 4.5)]


@pytest.mark.parametrize("rows", [
    [step(1, reward=1.0)],                                  # one step: no width to divide by
    [step(i, reward=0.0) for i in (1, 2)],                  # a flat line: no height
    [step(i, reward=0.1) for i in range(60)],               # flat but for the rounding of its means
    [step(1, reward=-1e-7), step(2, "reject", 1, loss=3.0)],  # a stage without the metric
    [step(i, f"\x1b[31m\u202estage {i}" * 30, i, reward=i / 60) for i in range(60)],  # long names
])
def test_odd_runs_are_drawn(tmp_path, rows):
    out = curves([write_run(tmp_path / "run", rows)], tmp_path / "new" / "out.png")
    assert len(Image.open(out).getcolors(2**24)) > 10


def test_runs_of_one_name_are_both_drawn_and_lie_beside_the_first(tmp_path):
    runs = [write_run(tmp_path / name / "run", [step(i, loss=y) for i in (1, 2)])
            for name, y in (("a", 0), ("b", 1))]
    out = curves(runs)
    assert out == runs[0] / "compared.png" and shows(out, BLUE) and shows(out, "#e07b00")


def test_a_cell_without_figures_is_no_zero(tmp_path):
    out = tmp_path / "bars.png"
    assert shows(bars({"row": {"id": (50, 9, [41, 59]), "ood": None}}, out), BLUE)
    with pytest.raises(UserError, match="no number"):
        bars({"row": {"ood": None}}, out)


# ---- Text and boxes ----

@pytest.mark.parametrize("text", ["", "x" * 5000, "word " * 500, " \n", "中" * 3000, "ﷺ" * 3000])
def test_hostile_text_stays_inside_its_width_and_lines_and_plain_text_is_kept(text):
    lines = wrap(text, 14, TILE, 3)
    assert len(lines) <= 3 and all(text_width(line, 14) <= TILE + 9 for line in lines)
    assert bool(lines) == bool(text.strip())
    assert wrap("two words\nmore", 14, TILE, 2) == ["two words", "more"]
    assert " ".join(wrap("some words " * 12, 14, TILE, 9)) == ("some words " * 12).strip()
    assert printable("\x1b[31mred\x07 \u202eevil\ud800 Z\u0337\u0322a\n\tb") == "[31mred evil Za b"
    assert printable("2 × π² ≤ é – 中") == "2 x pi2 <= e - ?"


def test_boxes_are_scaled_from_model_pixels_and_clipped_to_the_image(tmp_path):
    path = tiny_image(tmp_path / "a.png", (200, 100), "white")  # the model sees it as 112 x 56
    boxes = [("#00ff00", [(28, 14, 84, 42)]), ("#ff0000", [(-9, -1e9, 1e9, 99)])]
    image = view(path, (112, 56), boxes)
    assert image.size == (VIEW_SIDE, VIEW_SIDE // 2)
    for point in ((146, 150), (454, 150), (300, 71), (300, 229)):  # around 150, 75, 450, 225
        assert image.getpixel(point) == (0, 255, 0)
    assert image.getpixel((300, 150)) == image.getpixel((134, 150)) == (255, 255, 255)
    assert image.getpixel((2, 150)) == image.getpixel((597, 150)) == (255, 0, 0)
    view(path, None, [("#ff0000", [(900, 900, 950, 950)])])  # wholly outside


@pytest.mark.parametrize("task, form, drawn", [("detection", "open", True), ("math", "open", False),
                                               ("detection", "binary", False)])
def test_of_equal_boxes_both_are_seen_and_only_places_are_boxes(tmp_path, task, form, drawn):
    image, box = str(tiny_image(tmp_path / "a.png", (56, 56), "blue")), "[14, 14, 42, 42]"
    row = {"image": image, "size": [56, 56], "solution": box, "answer": box}
    picture = prediction_tile(ANSWER | row | {"task": task, "form": form}).crop((0, 0, TILE, TILE))
    assert shows(picture, GREEN) == shows(picture, RED) == drawn


# ---- The commands ----

def test_a_run_is_drawn_from_its_directory_whatever_its_answers_say(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(i, loss=1 / i) for i in (1, 2, 3)])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    answers = [None, "", "\x00\u202e" * 99, "[" * 5000, '[{"bbox_2d": [NaN, 1, 1e999, -3]}]']
    images = [None, str(tmp_path / "none.png"), str(tmp_path / "broken.png")]
    write_jsonl(run / "predictions" / "1-sft.jsonl", [{"solution": "a row of another program"}] + [
        ANSWER | {"image": image, "answer": answer} for answer in answers for image in images])
    write_record(run / "results.json", {"rows": [{"name": "1-sft", "splits": {}}]})
    assert main(["run", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "curves.png"), str(run / "sheet.png")]
    assert (run / "curves.png").exists() and shows(run / "sheet.png", RED)
    write_record(run / "results.json", {"rows": []})  # of a run without a test file
    assert main(["run", str(run)]) == 0 and "sheet" not in capsys.readouterr().out


def test_rows_are_drawn_beside_the_data(tmp_path):
    data = tiny_data(tmp_path / "data")
    assert main(["examples", str(data)]) == 0 and shows(data / "sheet.png", GREEN)


def test_mistakes_are_sentences_and_exit_with_2(tmp_path, capsys):
    run = write_run(tmp_path / "run", [step(1, reward=1.0, kl=0.1)])
    (run / "results.json").write_text('{"rows": [{"name": "base"}]}')
    for argv, words in ((["curves", run, "--metric", "rewards"], "kl, reward"),
                        (["table", run], "edited"), (["curves", tmp_path], "directory of a run?"),
                        (["table", tmp_path], "directory of a run?"),
                        (["examples", tmp_path / "none.jsonl"], "none.jsonl"),
                        (["curves", run, "--out", tmp_path], str(tmp_path))):
        assert main(list(map(str, argv))) == 2 and words in capsys.readouterr().err


# ---- Tables ----

def test_the_wilson_interval_by_hand():
    # 5 of 10: 1.96 / (1 + 3.8416 / 10) * sqrt(0.025 + 3.8416 / 400) = 1.416021 * 0.186021
    assert wilson(5, 10) == pytest.approx(0.263410, abs=1e-6)
    # 0 of 10: 1.416021 * sqrt(3.8416 / 400), not 0 as p (1 - p) alone would say
    assert wilson(0, 10) == pytest.approx(0.138770, abs=1e-6) and math.isnan(wilson(0, 0))


def test_the_table_has_a_line_a_row_and_a_column_a_split_and_task():
    half = {"n": 10, "accuracy": 0.5}
    base = {"open_id": {"math": half, "all": half}}
    both = {"open_id": {"math": half | {"n": 20}}, "open_ood": {"math": {"n": 0, "accuracy": 0.0}}}
    one = [{"name": "base", "splits": base}, {"name": "\x1bopen", "splits": both}]
    assert table({"a": one}).split("\n") == ["       open_id  open_ood",
                                             "          math      math",
                                             "       n=10-20       n=0",
                                             "base    50 ±26         -",
                                             " open   50 ±20         -"]
    assert "a: base" in table({"a": one, "b": one}) and "b: base" in table({"a": one, "b": one})
    narrow = table({"a": one}, width=20)
    assert max(map(len, narrow.split("\n"))) <= 20 and narrow.count("base") == 2
    assert table({"a": []}) == ""
