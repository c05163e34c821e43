"""Tests of data.py. Each name says the defect that it keeps out."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoTokenizer

import data
import rewards as tasks
from data import Processor, load_examples
from forms import derive
from rewards import Example, accuracy_reward, format_reward
from support.answers import iou, parse_letters
from support.images import inspect_image
from support.tiny import SPECIAL, tiny_checkpoint, tiny_data, tiny_image, write_jsonl
from support.words import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def processor(checkpoint):
    return Processor.from_pretrained(checkpoint)


@pytest.fixture
def picture(tmp_path):
    return tiny_image(tmp_path / "a.png", (100, 100))


def row(**fields):
    return {"problem": "How many?", "solution": "<answer>3</answer>", "task": "math", **fields}


def load(folder, *rows, **options):
    return load_examples(write_jsonl(folder / "rows.jsonl", rows), **options)


# ---- Reading ----

def test_released_layout_is_read_as_it_is(tmp_path):
    root = tiny_data(tmp_path)
    files = data.find_files(root)
    assert set(files["test"]) == {"open_id", "binary_ood"} and files["test"]["binary_ood"][0] == "binary"
    for form, path in files["train"].items():
        examples = load_examples(path, image_root=root)     # the name alone says the form: judge means binary
        assert len(examples) == 12 and {e.form for e in examples} == {form}
    questions = load_examples(files["questions"], image_root=root)
    assert {e.task for e in questions} == {"general"} and [len(e.images) for e in questions] == [0, 0, 1, 2, 1]


def test_nested_release_keeps_test_files_out_of_training(tmp_path):
    for name in ("train/open/coco/detection_train", "train/open/coco/detection_test", "train/judge/a", "test/voc/all"):
        write_jsonl(tmp_path / "grpo_data" / f"{name}.jsonl", [row(problem=name)])
    files = data.find_files(tmp_path)
    assert set(files["test"]) == {"detection_test", "all"} and files["train"]["choice"] is None
    assert [e.problem for e in load_examples(files["train"]["open"])] == ["train/open/coco/detection_train"]


def test_directory_without_data_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"holds no data.*train/binary\.jsonl.*questions\.jsonl"):
        data.find_files(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_examples(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="no rows"):
        load(tmp_path, "", " ")


def test_odd_but_released_rows_are_read(tmp_path):
    write_jsonl(tmp_path / "rows.json", [json.dumps([row(solution=3, task=None)])])
    assert load_examples(tmp_path / "rows.json", task="math")[0].solution == "3"          # bare int, task by flag, list
    (example,) = load(tmp_path, "\ufeff" + json.dumps(row(problem="a\u2028b")))       # byte order mark, odd line end
    assert example.problem == "a\u2028b" and example.where.endswith("rows.jsonl:1") and example.images == ()


def test_all_bad_rows_are_told_at_once_with_their_lines(tmp_path, capsys):
    rows = [row(), "{broken", "[1]", row(problem=" "), row(solution=None), row(task="segment"), row(task=None)]
    with pytest.raises(UserError) as error:
        load(tmp_path, *rows)
    for line, words in {2: "broken JSON", 3: "not a JSON object", 4: '"problem"', 5: '"solution"', 6: "'segment'",
                        7: "--task"}.items():
        assert any(f"rows.jsonl:{line}: " in told and words in told for told in str(error.value).splitlines())
    assert len(load(tmp_path, *rows, skip_bad_rows=True)) == 1
    assert "dropped 6 of 7 rows" in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        load(tmp_path, *["{"] * 30)
    assert ".. and 10 more" in str(error.value) and len(str(error.value).splitlines()) == 23


@pytest.mark.parametrize("fields, words", [
    ({"solution": "<answer></answer>"}, "empty"),
    ({"solution": "<answer>1</answer><answer>2</answer>"}, "exactly one"),
    ({"solution": "<think>so 3</think> 3"}, "exactly one"),
    ({"form": "binary", "solution": "yes or no"}, "neither yes nor no"),
    ({"form": "choice", "problem": "Which?\nA. 1\nB. 2", "solution": "C"}, "not letters"),
    ({"form": "choice", "problem": "Which?\nA. 1\nB. 2", "solution": "a dog"}, "not letters"),
    ({"task": "classify", "solution": "[]"}, "no label"),
    ({"task": "detection"}, "needs an image"),
    ({"problem": "Read <|image_pad|> this"}, "image_pad"),
    ({"solution": "3<|im_end|>"}, "im_end"),
    ({"problem": "half \ud800"}, "ud800"),
    ({"image": "x" * 999}, "no image"),
    ({"problem": "<image>How many?"}, "0 images"),
    ({"image": 3}, "not the path"),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, "alternate"),
    ({"messages": "Hi"}, "must be a list"),
])
def test_unusable_row_is_refused(tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, row(**fields))


@pytest.mark.parametrize("truth, words", [
    ("somewhere", "neither JSON"), ("[" * 9999, "neither JSON"), ("[9, 2, 3, 8]", "x1 < x2"),
    ("[1, 2, 3]", "neither JSON"), ("[1, 2, 3, NaN]", "neither JSON"), ("[true, 2, 3, 4]", "neither JSON"),
    ('[{"box": [1, 2, 3, 4]}]', "neither JSON"), ("[1, 1, 3, 1" + "0" * 400 + "]", "not"), ("[1, 1, 3, 150]", "leaves"),
])
def test_malformed_true_box_is_refused(tmp_path, picture, truth, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, row(task="detection", image="a.png", solution=truth))


def test_chat_rows_keep_turns_and_image_places(tmp_path, picture, processor):
    def chat(*texts, images=("a.png",)):
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        return {"messages": turns, "images": list(images)}

    rows = chat("<image>\nWhat color?", "red"), chat("Hi", "Hello", "<image>Is it red?", "yes")
    single, several = load(tmp_path, *rows)
    assert single.problem == "What color?" and single.solution == "red" and several.history[1] == ("assistant", "Hello")
    messages = data.prompt_messages(several)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[2]["content"]] == ["image", "text"]
    assert processor(several).image_grid_thw.shape == (1, 3)
    with pytest.raises(UserError, match="2 times.*1 images"):
        load(tmp_path, chat("<image><image>What color?", "red"))


# ---- Images ----

@pytest.mark.parametrize("name, words", [
    ("missing", "no image"), ("text", "be decoded"), ("truncated", "be decoded"), ("empty", "be decoded"),
    ("animated", "several frames"), ("pixel", "too small"), ("thin", "too thin"), ("wide", "too large"), ("deep", "8 bits")])
def test_unusable_image_is_told_before_training(tmp_path, name, words):
    path = tmp_path / f"{name}.png"
    if name == "text":
        path.write_text("no image")
    elif name == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:9000])          # the header is whole: only decoding finds out
    elif name == "animated":
        Image.new("L", (60, 60)).save(path, save_all=True, append_images=[Image.new("L", (60, 60), 255)])
    elif name == "deep":
        Image.fromarray(np.full((60, 60), 40_000, np.uint16)).save(path)
    elif name == "empty":
        path.touch()
    elif name != "missing":
        Image.new("L", {"pixel": (1, 60), "thin": (400, 2), "wide": (16_385, 100)}[name]).save(path)
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{words}"):
        load(tmp_path, row(image=path.name))


def test_modes_are_converted_as_seen(tmp_path, processor):
    red, paths = Image.new("RGB", (60, 120), "red"), []
    clear = Image.new("RGBA", (60, 120), (0, 0, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6                                      # to be shown turned by a quarter
    for name, image, options in (("cmyk.jpg", red.convert("CMYK"), {}), ("palette.png", red.convert("P"), {}),
                                 ("clear.png", clear, {}), ("turned.jpg", red, {"exif": turned})):
        image.save(tmp_path / name, **options)
        paths.append(tmp_path / name)
    cmyk, palette, clear, turned = map(data.load_image, paths)
    assert all(image.mode == "RGB" for image in (cmyk, palette, clear, turned))
    assert cmyk.getpixel((0, 0))[0] > 225 and max(cmyk.getpixel((0, 0))[1:]) < 30
    assert palette.getpixel((0, 0)) == (255, 0, 0)
    assert clear.getpixel((0, 0)) == (255, 255, 255)        # not the black that hides below transparent pixels
    assert turned.size == inspect_image(paths[3]) == (120, 60)
    (example,) = load(tmp_path, row(image="turned.jpg"))
    assert example.size == (112, 56) and processor(example).image_grid_thw.tolist() == [[1, 4, 8]]


def test_image_paths_are_rerooted_and_kept_inside(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("root/coco/1.png", "root/1.png", "outside.png"):
        tiny_image(tmp_path / name)
    assert data.resolve_image("/mnt/they/data/coco/1.png", root) == str(root / "coco/1.png")      # the longest tail
    assert data.resolve_image("coco/1.png", root) == data.resolve_image(str(root / "coco/1.png"), root)
    for name in ("../outside.png", "coco/../../outside.png", str(tmp_path / "outside.png")):
        with pytest.raises(UserError, match="--allow_outside"):
            data.resolve_image(name, root)
        assert data.resolve_image(name, root, allow_outside=True) == str(tmp_path / "outside.png")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match="--allow_outside"):
        data.resolve_image("../outside.png", Path("."))


# ---- Boxes ----

def test_boxes_of_truth_and_problem_share_the_models_pixels(tmp_path, processor):
    tiny_image(tmp_path / "a.png", (1000, 800))
    rows = [row(task="detection", image="a.png", form=form, problem="Is [100, 80, 500, 400] it?", solution=solution)
            for form, solution in (("binary", "yes"), ("open", '[{"bbox_2d": [1e2, 80.0, 500, 400]}]'))]
    asked, opened = load(tmp_path, *rows, max_pixels=112 * 112)
    assert asked.size == opened.size == (112, 84)           # not the original, not the largest, not square
    assert asked.problem == opened.problem == "Is [11, 8, 56, 42] it?"
    assert tasks.truth_boxes(opened) == [[11, 8, 56, 42]]
    with pytest.raises(UserError, match="another max_pixels"):
        processor(opened)


def test_number_lists_of_other_tasks_are_no_boxes(tmp_path, picture):
    assert load(tmp_path, row(problem="Mean of [1, 2, 3, 4]?", image="a.png"))[0].problem == "Mean of [1, 2, 3, 4]?"


def test_resize_box_scales_each_axis_and_never_vanishes():
    assert data.resize_box([10, 20, 30, 40], (100, 100), (112, 84)) == [11, 17, 34, 34]
    assert data.resize_box([50, 50, 51, 51], (10_000, 10_000), (112, 112)) == [1, 1, 2, 2]


@pytest.mark.parametrize("size", [(84, 56), (640, 480), (30, 900), (2, 300), (900, 700)])
def test_model_size_is_what_the_processor_does(tmp_path, processor, size):
    path = tiny_image(tmp_path / "a.png", size)
    grid = processor(Example(problem="", solution="", images=(str(path),))).image_grid_thw[0].tolist()
    assert (grid[2] * 14, grid[1] * 14) == data.model_size(size)
    assert data.MIN_PIXELS <= grid[1] * grid[2] * 196 <= data.MAX_PIXELS


# ---- Derived forms ----

OPEN = {
    "detection": Example(problem="Where is the cup?", solution='<answer>[{"bbox_2d": [28, 14, 84, 70]}]</answer>',
                         task="detection", images=("x/a.png",), size=(280, 196)),
    "classify": Example(problem="List them.", solution="<answer>cat, dog</answer>", task="classify"),
    "math": Example(problem="How many?", solution="<think>..</think><answer>3</answer>"),
}


def variants(task, count=400):
    return [replace(OPEN[task], problem=f"{OPEN[task].problem} ({n})") for n in range(count)]


def right_letters(example):
    return sorted(parse_letters(data.answer_of(example.solution)))


@pytest.mark.parametrize("task", OPEN)
def test_yes_is_no_likelier_than_no_and_letters_are_uniform(task):
    said = Counter(derive(e, "binary").solution for e in variants(task))
    assert set(said) == {"<answer>yes</answer>", "<answer>no</answer>"} and 160 < said["<answer>yes</answer>"] < 240
    letters = Counter(letter for e in variants(task) for letter in right_letters(derive(e, "choice")))
    assert set(letters) == set("ABCD") and max(letters.values()) < 1.6 * min(letters.values())


@pytest.mark.parametrize("task", OPEN)
def test_binary_answer_is_true(task):
    for example in variants(task, 60):
        derived = derive(example, "binary")
        asked = derived.problem.splitlines()[-1]
        right = {"detection": "[28, 14, 84, 70]" in asked, "classify": asked in ("Is there a cat?", "Is there a dog?"),
                 "math": asked == "Is the answer 3?"}[task]
        assert derived.solution == f"<answer>{'yes' if right else 'no'}</answer>"


@pytest.mark.parametrize("task", OPEN)
def test_choice_letters_name_exactly_the_right_options(task):
    right = {"detection": {"[28, 14, 84, 70]"}, "classify": {"cat", "dog"}, "math": {"3"}}[task]
    for example in variants(task, 60):
        derived = derive(example, "choice")
        options = dict(line.split(". ", 1) for line in derived.problem.splitlines()[-4:])
        letters = set(right_letters(derived))
        assert list(options) == list("ABCD") and len(set(options.values())) == 4
        assert letters and letters == {letter for letter, option in options.items() if option in right}


def test_derive_is_the_same_in_every_process_and_on_every_machine():
    example = OPEN["detection"]
    assert derive(example, "choice") == derive(example, "choice")
    assert derive(replace(example, images=("/elsewhere/a.png",)), "choice").problem == derive(example, "choice").problem
    assert len({derive(example, "choice", seed=seed).problem for seed in range(9)}) > 5
    pinned = "Which of these are there?\nA. dog\nB. potted plant\nC. car\nD. boat"  # not by hash() or a set's order
    assert derive(OPEN["classify"], "choice").problem == pinned


def test_wrong_boxes_are_wrong_and_inside():
    for boxes in ([[0, 0, 280, 196]], [[28, 14, 84, 70], [9, 9, 10, 10]], [[5, 5, 270, 190], [0, 0, 140, 98]], []):
        example = replace(OPEN["detection"], solution=json.dumps(boxes) if boxes else "no objects")
        wrong = [json.loads(text) for text in data.wrong_answers(example, (), random.Random(0))]
        assert len(wrong) == 3
        for box in wrong:
            assert 0 <= box[0] < box[2] <= 280 and 0 <= box[1] < box[3] <= 196
            assert all(iou(box, true) < 0.3 for true in boxes)


def test_image_without_objects_can_be_asked_about():
    example = replace(OPEN["detection"], solution="<answer>no objects</answer>")
    derived = derive(example, "choice")
    assert f"{right_letters(derived)[0]}. no objects" in derived.problem


@pytest.mark.parametrize("truth, pattern", [
    ("3", r"\d+"), ("0", r"\d+"), ("-5", r"-[1-9]\d*"), ("0.50", r"0\.\d\d"), ("12 cm", r"\d+ cm"),
    (r"\frac{3}{4}", r"\\frac\{[1-9]\d*\}\{[1-9]\d*\}"), ("1,200", r"(\d,)?\d{3}"), ("9" * 60, r"\d{60,61}")])
def test_wrong_numbers_look_like_the_truth(truth, pattern):
    for seed in range(50):
        wrong = data.wrong_answers(replace(OPEN["math"], solution=truth), (), random.Random(seed))
        assert len({truth, *wrong}) == 4 and all(re.fullmatch(pattern, text) for text in wrong), wrong


def test_middle_option_is_no_better_guess():
    wrong = [data.wrong_answers(replace(OPEN["math"], solution="20"), (), random.Random(n)) for n in range(800)]
    ranks = Counter(sum(int(text) < 20 for text in texts) for texts in wrong)
    assert set(ranks) == {0, 1, 2, 3} and min(ranks.values()) > 100


def test_letter_truth_keeps_its_options():
    example = Example(problem="How long?\nA. 3\nB. 4\nC. 5", solution="<answer>B</answer>")
    assert derive(example, "choice") == replace(example, form="choice")
    asked = {derive(example, "binary", seed=seed) for seed in range(40)}
    assert {(e.problem.splitlines()[-1], e.solution) for e in asked} == {
        ("Is the answer A?", "<answer>no</answer>"), ("Is the answer B?", "<answer>yes</answer>"),
        ("Is the answer C?", "<answer>no</answer>")}


def test_derive_refuses_what_it_cannot_do():
    words, general = replace(OPEN["math"], solution="isosceles"), replace(OPEN["math"], task="general")
    for example in (words, general, OPEN["classify"]):
        with pytest.raises(UserError):
            derive(example, "choice", pool=("Cat", "dog"))


# ---- Prompts and tokens ----

def test_a_base_whose_tags_are_special_tokens_is_refused(tmp_path):
    """Decoding leaves special tokens out, so no reward would ever see a <think>."""
    path = tiny_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")], special_tokens=True)
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="<think> and </think> are special tokens"):
        Processor.from_pretrained(path)


def test_no_special_token_but_an_end_can_hide_in_an_answer(processor):
    forbidden = set(processor.forbidden_ids(400))
    assert {processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_start", "box_start", "image_pad")} <= forbidden
    assert not forbidden & set(processor.end_ids) and not forbidden & set(processor.response_ids("<|im_start|> <think>a</think>"))



def test_prompt_holds_one_token_for_four_patches(tmp_path, processor):
    paths = tuple(str(tiny_image(tmp_path / f"{n}.png", size)) for n, size in enumerate([(84, 56), (200, 100)]))
    example = Example(problem="Which is red?", solution="", images=paths, form="binary")
    prompt = processor(example)
    assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 14]] and prompt.pixel_values.shape == (24 + 112, 1176)
    assert prompt.input_ids.tolist().count(processor.image_token_id) == (24 + 112) // 4
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text.index("<|image_pad|>") < text.index("Which is red?\n" + data.instruction(example))
    assert text.endswith("<|im_start|>assistant\n") and text.count("system") == 1     # the template's own, none of ours
    assert processor(replace(example, images=())).pixel_values is None


def test_text_cannot_forge_special_tokens(processor):
    for token in SPECIAL:
        with pytest.raises(UserError, match="cannot carry"):
            processor(Example(problem=f"x{token}", solution=""))
        ids = processor.response_ids(f"a{token}b")
        assert not set(ids[:-1]) & set(processor.tokenizer.all_special_ids) and ids[-1] == processor.end_ids[0]
        assert processor.decode(ids) == f"a{token}b"


def test_forbidden_ids_cover_special_tokens_and_padded_vocabulary(processor):
    ids = processor.forbidden_ids(448)
    names = {processor.tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(processor.tokenizer)}
    assert names == set(SPECIAL) - {"<|im_end|>", "<|endoftext|>"}
    assert set(range(len(processor.tokenizer), 448)) < set(ids) and not set(processor.end_ids) & set(ids)


def test_saved_processor_loads_in_plain_transformers(tmp_path, checkpoint, processor):
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
    processor.save_pretrained(tmp_path)
    messages = data.prompt_messages(Example(problem="How many?", solution=""))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == \
        processor.tokenizer.apply_chat_template(messages, tokenize=False)
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size["longest_edge"] == data.MAX_PIXELS


def test_old_pixel_limits_of_a_checkpoint_do_not_win(tmp_path, checkpoint):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    settings.update(min_pixels=3136, max_pixels=12_845_056)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    path = tiny_image(tmp_path / "a.png", (1000, 1000))
    processor = Processor.from_pretrained(tmp_path, max_pixels=112 * 112)
    assert processor(Example(problem="", solution="", images=(str(path),))).image_grid_thw.tolist() == [[1, 8, 8]]


def test_wrong_checkpoint_is_a_sentence(tmp_path, checkpoint):
    with pytest.raises(UserError, match="no complete Qwen2.5-VL"):
        Processor.from_pretrained(tmp_path)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="model type is qwen2"):
        Processor.from_pretrained(tmp_path)


# ---- Order ----

def test_every_epoch_shows_every_example_once_and_resume_needs_no_state():
    stream = [i for step in range(10) for i in data.batch_indices(7, 3, step, seed=1)]      # batches straddle epochs
    assert all(sorted(stream[start:start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert stream[:7] != stream[7:14] and data.batch_indices(7, 3, 4, seed=1) == stream[12:15]
    assert sorted(data.batch_indices(2, 5, 0, seed=0)).count(0) in (2, 3)                    # more than there are
    assert data.batch_indices(7, 7, 0, seed=1) != data.batch_indices(7, 7, 0, seed=2)


# ---- What supervised stages teach ----

@pytest.mark.parametrize("task", ["detection", "classify", "math", "general"])
def test_a_bare_truth_is_taught_within_tags_and_read_by_the_scorer_as_right(task):
    """A stage never teaches a form of answer that earns nothing."""
    bare = {"detection": "[28, 14, 84, 70]", "classify": "dog, cat", "math": "20/3", "general": "It is red."}[task]
    for solution in (bare, f"<answer>{bare}</answer>", f"<think>So.</think><answer>{bare}</answer>"):
        example = Example(problem="?", solution=solution, task=task, images=("a.png",), size=(280, 196))
        text = data.taught(example)
        assert accuracy_reward(text, example) == 1.0 and text.count("<answer>") == text.count("</answer>") == 1
        assert text.startswith("<think>") == solution.startswith("<think>")


def test_boxes_are_taught_as_the_prompt_asks_for_them():
    example = Example(problem="?", solution="[[28, 14, 84, 70]]", task="detection", images=("a.png",), size=(280, 196))
    assert format_reward(f"<think>there</think>{data.taught(example)}", example) == 1.0
