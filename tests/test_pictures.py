"""Pictures and tables of runs. The name of a test says which defect it keeps out."""
import json
import math

import pytest
from PIL import Image

from data import UserError
from tools.pictures import (TILE, SCALE, curves, line_chart, main, prediction_tile, printable, read_metrics, running_mean,
                      sheet, stages, table, text_width, ticks, view, wilson, wrap)


def write_run(folder, rows, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def step(number, stage="binary", index=0, **values):
    return {"stage": stage, "stage_index": index, "step": number, **values}


def colors(path):
    with Image.open(path) as image:
        return {color for _, color in image.convert("RGB").getcolors(2**24)}


def near(pixel, color):
    return all(abs(a - b) <= 12 for a, b in zip(pixel, color))


# ---- metrics ----

def test_a_torn_last_line_and_lines_without_a_step_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run", [step(1, reward=1.0), [3], {"reward": 2.0}], '{"stage": "bin')
    assert list(read_metrics(run)) == [1]


def test_the_last_row_of_a_repeated_step_wins_and_steps_are_in_order(tmp_path):
    run = write_run(tmp_path / "run", [step(1, reward=1), step(2, reward=2), step(3, reward=3), step(2, reward=9)])
    assert [row["reward"] for row in read_metrics(run).values()] == [1, 9, 3]


def test_missing_and_non_finite_values_are_gaps_and_not_zeros(tmp_path):
    values = [1.0, math.nan, math.inf, None, "2", True, 10**400]
    rows = [step(i, reward=value) for i, value in enumerate(values, 1)] + [step(8, "reject", 1, loss=2.0)]
    (first, points), (second, rest) = stages(read_metrics(write_run(tmp_path / "run", rows)), "reward")
    assert (first, second) == ("binary", "reject")
    assert [y for _, y in points + rest if y == y] == [1.0]


def test_the_running_mean_divides_by_what_is_there():
    assert running_mean([(1, 0.0), (2, 3.0), (3, 6.0)], 3) == [(1, 1.5), (2, 3.0), (3, 4.5)]
    (_, first), (_, gap), (_, last) = running_mean([(1, 2.0), (2, math.nan), (3, 4.0)], 3)
    assert (first, last) == (2.0, 4.0) and math.isnan(gap)


# ---- charts ----

@pytest.mark.parametrize("rows", [
    [step(1, reward=1.0)],                                             # one step: no width to divide by
    [step(i, reward=0.0) for i in (1, 2)],                             # a flat line: no height
    [step(i, reward=1e20) for i in (1, 2)],                            # flat and so large that + 0.5 changes nothing
    [step(i, reward=-1e-7 * i) for i in (1, 2)],
    [step(1, reward=1.0), step(2, "reject", 1, loss=3.0)],             # a stage without the metric
    [step(1, "open", 0, reward=1.0), step(2, "binary", 1, reward=0.5), step(3, "open", 2, reward=1.5)],
    [step(i, f"\x1b[31m\u202estage {i}" * 30, i, reward=i / 60) for i in range(60)],  # names wider than their bands
])
def test_curves_draws_odd_runs(tmp_path, rows):
    out = curves([write_run(tmp_path / "run", rows)], tmp_path / "new" / "out.png")
    assert len(colors(out)) > 10


def test_runs_of_one_name_are_both_drawn(tmp_path):
    runs = [write_run(tmp_path / name / "run", [step(i, reward=y) for i in (1, 2)]) for name, y in (("a", 0), ("b", 1))]
    drawn = colors(curves(runs, tmp_path / "out.png"))
    assert any(near(c, (0x2f, 0x6f, 0xb2)) for c in drawn) and any(near(c, (0xe0, 0x7b, 0x00)) for c in drawn)


def test_a_metric_that_was_never_logged_is_an_error_that_names_the_others(tmp_path):
    run = write_run(tmp_path / "run", [step(1, reward=1.0, kl=0.1)])
    with pytest.raises(UserError, match="kl, reward"):
        curves([run], tmp_path / "out.png", metric="rewards")


def test_a_logarithmic_axis_refuses_zero_and_an_empty_chart_is_an_error(tmp_path):
    line_chart({"base": [(1, 0.2), (2, 0.4), (64, None)]}, tmp_path / "out.png", logx=True)
    line_chart({"base": [(1, 0.2)]}, tmp_path / "out.png", logx=True)
    for series in ({"base": [(0, 0.2), (2, 0.4)]}, {"base": [(1, None)]}, {}):
        with pytest.raises(UserError):
            line_chart(series, tmp_path / "out.png", logx=True)


def test_ticks_are_round_and_reach_over_the_data():
    assert ticks(0.13, 1.9, 5) == [0, 0.5, 1, 1.5, 2]
    assert ticks(0.5, 4.5, 10, whole=True) == [0, 1, 2, 3, 4, 5]  # there is no step 1.5
    assert ticks(-3e-6, 5e-6)[0] <= -3e-6 and ticks(-3e-6, 5e-6)[-1] >= 5e-6


# ---- hostile text ----

def test_control_direction_and_combining_characters_are_not_drawn():
    assert printable("\x1b[31mred\x07 \u202eevil\u0000\ud800 Z\u0337\u0322a\n\tb  c") == "[31mred evil Za b c"
    assert printable("2 × π² ≤ é – 中") == "2 x pi2 <= e - ?"


@pytest.mark.parametrize("text", ["", "x" * 5000, "word " * 500, " \n", "中" * 3000, "ﷺ" * 3000, "a " + "b" * 300])
def test_wrapped_text_stays_inside_its_width_and_lines(text):
    lines = wrap(text, 14, TILE, 3)
    assert len(lines) <= 3 and all(text_width(line, 14) <= TILE for line in lines)
    assert not text.strip() or lines


def test_short_text_is_wrapped_without_loss():
    assert wrap("two words", 14, TILE, 1) == ["two words"]
    assert " ".join(wrap("some words " * 12, 14, TILE, 9)) == ("some words " * 12).strip()


# ---- sheets ----

def test_boxes_are_scaled_from_model_pixels_to_the_drawn_size(tmp_path):
    Image.new("RGB", (200, 100), "blue").save(tmp_path / "image.png")  # the model sees it as 112 x 56
    image = view(str(tmp_path / "image.png"), (112, 56), [("#00ff00", [(28, 14, 84, 42)])])
    assert image.size == (TILE * SCALE, TILE * SCALE // 2)
    left, top, right, bottom = (round(side * share) for side, share in zip(image.size * 2, (1/4, 1/4, 3/4, 3/4)))
    middle = (image.width // 2, image.height // 2)
    for point in ((left - 4, middle[1]), (right + 4, middle[1]), (middle[0], top - 4), (middle[0], bottom + 4)):
        assert image.getpixel(point) == (0, 255, 0)
    for point in (middle, (left + 9, middle[1]), (left - 16, middle[1])):
        assert image.getpixel(point) == (0, 0, 255)


def test_a_box_beyond_the_image_is_clipped_to_its_edge(tmp_path):
    Image.new("RGB", (100, 100), "blue").save(tmp_path / "image.png")
    image = view(str(tmp_path / "image.png"), (112, 112), [("#00ff00", []), ("#ff0000", [(-50, -1e9, 1e9, 500)])])
    assert image.getpixel((2, 300)) == image.getpixel((image.width - 3, 300)) == (255, 0, 0)


def test_both_of_two_equal_boxes_are_seen_and_only_open_detection_has_boxes(tmp_path):
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "image.png")
    row = {"image": str(tmp_path / "image.png"), "size": [56, 56], "solution": "[14, 14, 42, 42]",
           "answer": "[14, 14, 42, 42]", "completion": "", "problem": "", "correct": False}
    frames = prediction_tile(row | {"task": "detection", "form": "open"}).crop((0, 0, TILE, TILE))
    assert {near(c, (0x12, 0x8a, 0x3e)) - near(c, (0xd6, 0x20, 0x2b)) for _, c in frames.getcolors(99999)} == {-1, 0, 1}
    plain = prediction_tile(row | {"task": "math", "form": "open"}).crop((0, 0, TILE, TILE))
    assert all(near(color, (0, 0, 255)) or near(color, (14, 14, 255)) for _, color in plain.getcolors())


def test_a_sheet_takes_hostile_rows_and_rows_without_a_readable_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    answers = [None, "", "\x00\u202e" * 99, "9" * 5000, "[" * 5000, '[{"bbox_2d": [NaN, 1, 1e999, -3]}]']
    rows = [{"image": image, "problem": "?", "solution": "<answer>[]</answer>", "answer": answer, "size": None,
             "task": "detection", "form": "open", "completion": "\ud800" * 9, "correct": False}
            for answer in answers for image in (None, str(tmp_path / "none.png"), str(tmp_path / "broken.png"))]
    assert sheet(rows, tmp_path / "sheet.png").exists()
    with pytest.raises(UserError, match="no rows"):
        sheet([], tmp_path / "sheet.png")


# ---- table ----

def test_the_wilson_interval_by_hand():
    # 5 of 10: 1.96 / (1 + 3.8416 / 10) * sqrt(0.025 + 3.8416 / 400) = 1.416021 * 0.186021 = 0.263410
    assert wilson(5, 10) == pytest.approx(0.263410, abs=1e-6)
    # 0 of 10: 1.96 / 1.38416 * sqrt(3.8416 / 400) = 1.41602 * 0.098 = 0.138770: not 0, as p (1 - p) alone would say
    assert wilson(0, 10) == pytest.approx(0.138770, abs=1e-6)
    assert math.isnan(wilson(0, 0))


def test_the_table_has_a_line_a_row_and_a_column_a_split_and_task():
    base = {"open_id": {"math": {"n": 10, "accuracy": 0.5}, "all": {"n": 10, "accuracy": 0.5}}}
    both = {"open_id": {"math": {"n": 20, "accuracy": 0.5}}, "open_ood": {"math": {"n": 0, "accuracy": 0.0}}}
    one = {"rows": [{"name": "base", "splits": base}, {"name": "\x1b[1mopen", "splits": both}]}
    assert table({"a": one}).split("\n") == ["         open_id  open_ood",  # "all" of one task only says it again
                                             "            math      math",
                                             "         n=10-20       n=0",
                                             "base      50 ±26         -",
                                             "[1mopen   50 ±20         -"]
    assert "a: base" in table({"a": one, "b": one}) and "b: base" in table({"a": one, "b": one})
    narrow = table({"a": one}, width=20)
    assert max(map(len, narrow.split("\n"))) <= 20 and narrow.count("base") == 2


# ---- command line ----

@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"rows": [{"name": "base"}]}'])
def test_bad_results_are_a_sentence_and_exit_code_2(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["table", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


def test_examples_shows_the_three_forms_and_bad_arguments_exit_2(tmp_path, capsys):
    Image.new("RGB", (84, 84), "blue").save(tmp_path / "image.png")
    row = {"problem": "Where is it?", "task": "detection", "image": "image.png",
           "solution": '<answer>[{"bbox_2d": [10, 12, 34, 36]}]</answer>'}
    (tmp_path / "open.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "sheet.png"
    assert main(["examples", str(tmp_path / "open.jsonl"), "--image_root", str(tmp_path), "--out", str(out)]) == 0
    assert any(near(color, (0x12, 0x8a, 0x3e)) for color in colors(out))
    assert main(["examples", str(tmp_path / "none.jsonl")]) == 2
    assert main(["curves", str(tmp_path)]) == 2
    assert main(["examples", str(tmp_path / "open.jsonl"), "--image_root", str(tmp_path), "--out", "x.nope"]) == 2
    for bad in (["curves", "run", "--smooth", "0"], ["examples", "x", "-n", "-3"], ["nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(bad)
