"""Tests of data.py: rows become checked examples, examples become prompts. Names say the defect."""

import json
from dataclasses import replace

import pytest
from runs import load_rows
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from data import Processor, answer_of, batch_indices, instruction, load_examples, prompt_messages, taught
from rewards import Example, accuracy_reward, format_reward, truth_boxes
from support.rows import find_files
from support.tiny import SPECIAL_TOKENS, tiny_data, tiny_image, write_jsonl
from support.words import UserError


@pytest.fixture
def picture(tmp_path):
    return tiny_image(tmp_path / "a.png", (100, 100))


def row(**fields):
    return {"problem": "How many?", "solution": "<answer>3</answer>", "task": "math", **fields}


# ---- Reading ----

def test_released_layout_is_read_as_it_is(tmp_path):
    files = find_files(root := tiny_data(tmp_path))
    assert set(files["test"]) == {"open_id", "binary_ood"} and files["test"]["binary_ood"][0] == "binary"
    for form, path in files["train"].items():  # the name says the form: judge is binary
        assert [e.form for e in load_examples(path, image_root=root)] == [form] * 12
    questions = load_examples(files["questions"], image_root=root)
    assert [(e.task, len(e.images)) for e in questions] == [("general", n) for n in (0, 0, 1, 2, 1)]


def test_nested_release_keeps_test_files_out_of_training(tmp_path):
    for name in ("train/open/coco/a_train", "train/open/coco/a_test", "train/judge/a", "test/b/c"):
        write_jsonl(tmp_path / "grpo_data" / f"{name}.jsonl", [row(problem=name)])
    files = find_files(tmp_path)
    assert set(files["test"]) == {"a_test", "c"} and files["train"]["choice"] is None
    assert [e.problem for e in load_examples(files["train"]["open"])] == ["train/open/coco/a_train"]


def test_all_bad_rows_are_named_at_once_with_their_lines(tmp_path, capsys):
    rows = [row(), "{broken", "[1]", row(problem=" "), row(solution=None),
            row(task="segment"), row(task=None)]
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, *rows)
    words = "broken JSON", "not a JSON object", '"problem"', '"solution"', "'segment'", "--task"
    for line, (word, said) in enumerate(zip(words, str(error.value).splitlines()[1:]), 2):
        assert f"rows.jsonl:{line}: " in said and word in said
    assert len(load_rows(tmp_path, *rows, skip_bad_rows=True)) == 1
    assert "dropped 6 of 7 rows" in capsys.readouterr().err
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, *["{"] * 30)
    assert ".. and 10 more" in str(error.value) and len(str(error.value).splitlines()) == 23


# ---- Coordinates ----

def test_boxes_of_truth_and_problem_share_the_models_pixels(tmp_path, processor):
    tiny_image(tmp_path / "a.png", (1000, 800))
    box = row(task="detection", image="a.png", problem="Is [100, 80, 500, 400] it?")
    rows = (box | {"form": "binary", "solution": "yes"},
            box | {"form": "open", "solution": '[{"bbox_2d": [1e2, 80.0, 500, 400]}]'})
    asked, opened = load_rows(tmp_path, *rows, max_pixels=112 * 112)
    assert asked.size == opened.size == (112, 84)  # not the original, not the largest, not square
    assert asked.problem == opened.problem == "Is [11, 8, 56, 42] it?"
    assert truth_boxes(opened) == [[11, 8, 56, 42]]
    with pytest.raises(UserError, match="another max_pixels"):
        processor(opened)


# ---- Prompts and tokens ----

def test_chat_rows_keep_turns_and_image_places(tmp_path, picture, processor):
    def chat(*texts, images=1):
        turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        return {"conversations": turns, "images": ["a.png"] * images}

    several = chat("Hi", "Hello", "Is <image> larger than <image>?", "no", images=2)
    single, several = load_rows(tmp_path, chat("<image>\nWhat color?", "red"), several)
    assert (single.task, single.problem, single.solution) == ("general", "What color?", "red")
    assert several.history == (("user", "Hi"), ("assistant", "Hello"))
    messages = prompt_messages(several)
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[2]["content"]] == ["text", "image"] * 2 + ["text"]
    assert processor(several).image_grid_thw.shape == (2, 3)
    with pytest.raises(UserError, match="2 times.*1 images"):
        load_rows(tmp_path, chat("<image><image>What color?", "red"))


def test_prompt_holds_one_token_for_four_patches(tmp_path, processor):
    paths = tuple(str(tiny_image(tmp_path / f"{w}.png", (w, h))) for w, h in ((84, 56), (200, 100)))
    example = Example(problem="Which is red?", solution="", images=paths, form="binary")
    prompt = processor(example)
    assert prompt.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 14]]
    assert prompt.pixel_values.shape == (24 + 112, 1176)
    assert prompt.input_ids.tolist().count(processor.image_token_id) == (24 + 112) // 4
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text.index("<|image_pad|>") < text.index("Which is red?\n" + instruction(example))
    assert text.endswith("<|im_start|>assistant\n") and text.count("system") == 1  # the template's
    assert processor(replace(example, images=())).pixel_values is None


def test_text_cannot_forge_special_tokens(processor):
    for token in SPECIAL_TOKENS:
        with pytest.raises(UserError, match="cannot carry"):
            processor(Example(problem=f"x{token}", solution=""))
        ids = processor.response_ids(f"a{token}b")
        assert not set(ids[:-1]) & set(processor.tokenizer.all_special_ids)
        assert ids[-1] == processor.end_ids[0] and processor.decode(ids) == f"a{token}b"


def test_no_answer_may_hold_special_tokens_or_padded_vocabulary(processor):
    ids = set(processor.forbidden_ids(448))
    count = len(processor.tokenizer)
    names = processor.tokenizer.convert_ids_to_tokens([i for i in ids if i < count])
    assert set(names) == set(SPECIAL_TOKENS) - {"<|im_end|>", "<|endoftext|>"}
    assert set(range(count, 448)) < ids and not set(processor.end_ids) & ids
    assert not ids & set(processor.response_ids("<|im_start|> <think>a</think>"))


def test_a_saved_processor_is_the_checkpoints_own_with_these_limits(tmp_path, base):
    """Old limits of a checkpoint neither win nor are written; plain transformers reads what is."""
    for file in base[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((base[0] / "preprocessor_config.json").read_text())
    settings |= {"min_pixels": 3136, "max_pixels": 12_845_056}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    path = tiny_image(tmp_path / "a.png", (1000, 1000))
    processor = Processor.from_pretrained(tmp_path, max_pixels=112 * 112)
    prompt = processor(Example(problem="", solution="", images=(str(path),)))
    assert prompt.image_grid_thw.tolist() == [[1, 8, 8]]
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["max_pixels"] == 112 * 112
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size["longest_edge"] == 112 * 112
    messages = prompt_messages(Example(problem="How many?", solution=""))
    plain, own = AutoTokenizer.from_pretrained(tmp_path), processor.tokenizer
    assert plain.apply_chat_template(messages) == own.apply_chat_template(messages)


# ---- Order, and what supervised stages teach ----

def test_every_epoch_shows_every_example_once_and_resume_needs_no_state():
    stream = [i for step in range(10) for i in batch_indices(7, 3, step, seed=1)]  # across epochs
    assert all(sorted(stream[start:start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert stream[:7] != stream[7:14] and batch_indices(7, 3, 4, seed=1) == stream[12:15]
    assert sorted(batch_indices(2, 5, 0, seed=0)).count(0) in (2, 3)  # more than there are
    assert batch_indices(7, 7, 0, seed=1) != batch_indices(7, 7, 0, seed=2)


@pytest.mark.parametrize("task, bare", [("detection", "[28, 14, 84, 70]"), ("classify", "dog, cat"),
                                        ("math", "20/3"), ("general", "It is red.")])
def test_a_truth_is_taught_within_tags_and_read_by_the_scorer_as_right(task, bare):
    """A stage never teaches a form of answer that earns nothing."""
    tagged = f"<answer>{bare}</answer>"
    for solution in (bare, tagged, f"<think>So.</think>{tagged}"):
        example = Example(problem="?", solution=solution, task=task, images=("a",), size=(280, 196))
        text = taught(example)
        assert accuracy_reward(text, example) == 1.0
        assert text.count("<answer>") == text.count("</answer>") == 1
        assert text.startswith("<think>") == solution.startswith("<think>")
        thought = text if "<think>" in text else f"<think>there</think>{text}"
        assert format_reward(thought, example) == 1.0, "boxes as the prompt asks for them"
        assert answer_of(solution) == bare
