"""Rows and files as people have them: read as they are meant, or refused; never misread."""

import json
import os
import random

import pytest
from runs import load_rows

import currreft
from data import load_data, load_examples, taught
from rewards import TASKS, accuracy_reward
from support.answers import truth_of
from support.rows import declared_tasks, find_files, read_rows
from support.shapes import CONTEXTS, IMAGES, PROBLEMS, SOLUTIONS, TURNS, one_row, option_styles
from support.tiny import tiny_data, tiny_image, write_jsonl
from support.warnings import text_only_truths
from support.words import UserError

BOXES = '[{"bbox_2d": [21, 14, 42, 28]}]'
ASK, SAY = "How many boxes are there?", "1"
PLUS = {"problem": "1 + 1?", "solution": "2", "task": "math"}


def turn(role, content):
    return {"role": role, "content": content}


def llava(question, answer, **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def chat(*texts, **more):
    return {"messages": [turn(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)], **more}


# Each shape: its row, and (task, truth, number of images) as it must be read under --task math.
IMAGE_PART, TEXT_PART = {"type": "image"}, {"type": "text", "text": ASK}
URL_PART = {"type": "image_url", "image_url": {"url": "file:///elsewhere/a.png"}}
MATH = ("math", SAY, 1)
BOX = {"problem": "Where is the box?", "task": "detection", "image": "a.png"}
SHAPES = {
    "problem": ({"problem": ASK, "solution": "<answer>1</answer>", "image": "a.png"}, MATH),
    "no image": (PLUS | {"image": None, "images": []}, ("math", "2", 0)),
    "EasyR1": ({"problem": f"<image>{ASK}", "answer": SAY, "images": ["a.png"], "task": None}, MATH),
    "R1-V": ({"image_path": "a.png", "question": ASK, "ground_truth": 1}, MATH),
    "query and response": ({"query": ASK, "response": SAY, "img": "a.png"}, MATH),
    "TRL": ({"prompt": [turn("user", [IMAGE_PART, TEXT_PART])], "image": "a.png", "solution": SAY}, MATH),
    "TRL, plain": ({"prompt": ASK, "images": ["a.png"], "solution": SAY}, MATH),
    "TRL, completion": ({"prompt": [turn("user", ASK)], "completion": [turn("assistant", SAY)],
                         "images": ["a.png"]}, MATH),
    "ms-swift": ({"messages": [turn("system", "Be brief."), turn("user", f"<image>{ASK}")],
                  "images": ["a.png"], "solution": SAY}, MATH),
    "OpenAI": (chat([URL_PART, TEXT_PART], SAY), MATH),
    "LLaMA-Factory": (chat(f"<image>{ASK}", SAY, images=["a.png"], task="general"), ("general", SAY, 1)),
    "LLaVA": (llava(f"<image>\n{ASK}", SAY, id="7", image="a.png"), MATH),
    "LLaVA, text": (llava("What is 1 + 1?", "2", id="8"), ("math", "2", 0)),
    "Qwen2.5-VL": (llava(f"<image>\n<image>\n{ASK}", SAY, image=["a.png", "b.png"]), ("math", SAY, 2)),
    "InternVL": (llava(f"<image>\n{ASK}", SAY, id=0, image="a.png", width=84, height=56), MATH),
    "Geo170K": (llava("<image>\nChoices:\nA:30\nB:45\nWhich is it?", "As 2 x = 90, x = 45.\nAnswer:B",
                      image="a.png"), ("math", "B", 1)),
    "MathV360K": (llava(f"<image>Question: {ASK}", "The answer is 1", image="a.png", id="x"), MATH),
    "GSM8K": ({"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}, ("math", "7", 0)),
    "VLM-R1": (llava(f"<image>{ASK}", SAY, image="a.png", task="math"), MATH),
    "VLM-R1, boxes": (BOX | {"normal_caption": "the box", "solution": [21, 14, 42, 28],
                             "normalized_solution": [250, 250, 500, 500]},
                      ("detection", "[21, 14, 42, 28]", 1)),
    "labeled boxes": (BOX | {"solution": [{"bbox_2d": [21, 14, 42, 28], "label": "box"}]},
                      ("detection", None, 1)),
    **{key: ({key: "a.png", "question": ASK, "answer": SAY}, MATH)
       for key in ("file_name", "filename", "path", "img_path")},
    "labels": ({"image": "a.png", "problem": "What is there?", "solution": ["café", "犬"], "task": "classify"},
               ("classify", '["café", "犬"]', 1)),
}


@pytest.fixture
def root(tmp_path):
    tiny_image(tmp_path / "a.png")
    tiny_image(tmp_path / "b.png", (112, 112))
    return tmp_path


# ---- Shapes ----

@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_read_prompted_and_paid_as_it_is(root, processor, shape):
    row, (task, truth, images) = SHAPES[shape]
    (example,) = load_rows(root, row, task="math")
    assert (example.task, example.form, len(example.images)) == (task, "open", images)
    assert truth in (None, truth_of(example))
    assert ("<image>" in example.problem) == bool(example.history)
    if "Geo" in shape:
        assert example.solution.startswith("<think>As 2 x = 90, x = 45.</think>"), "kept for SFT"
    grid = processor(example).image_grid_thw
    assert (0 if grid is None else len(grid)) == images
    assert accuracy_reward(taught(example), example) == 1.0


def test_files_are_lists_objects_and_lines(root):
    row = {"problem": ASK, "solution": SAY}
    for text, lines in ((json.dumps([row, row]), [1, 2]), (json.dumps(row, indent=1), [1]),
                        (json.dumps(row, indent=1) + "\n\n" + json.dumps(row, indent=1), [1, 6]),
                        (json.dumps({"7": row, "9": row}, indent=1), [1, 2]),
                        (json.dumps({"version": 1, "data": [row]}), [1]),
                        ("\ufeff" + json.dumps(row | {"note": "\u2028"}, ensure_ascii=False), [1]),
                        (f"{json.dumps(row)}\r{json.dumps(row)}\r\n", [1, 2])):
        (root / "rows.json").write_text(text)
        examples = load_examples(root / "rows.json", task="math")
        assert [int(e.where.rpartition(":")[2]) for e in examples] == lines
        assert {e.problem for e in examples} == {ASK}
    (root / "rows.json").write_text(json.dumps(row) * 2)
    with pytest.raises(UserError, match="rows.json:1: broken JSON"):
        load_examples(root / "rows.json", task="math")


# A file's rows, and what each must ask and hold as its truth: nothing that carries the question is lost.
LETTERED = "Which?\nA. cat\nB. dog"
WHOLE = {
    "ScienceQA": ([{"question": "Which?", "choices": ["cat", "dog"], "answer": n, "hint": hint, "image": "a.png",
                    "task": "closed choice", "lecture": "Of pets.", "solution": "A dog it is, as one sees."}
                   for n, hint in ((1, "A pet."), (0, ""))], [(f"A pet.\n{LETTERED}", "B"), (LETTERED, "A")]),
    "AI2D": ([{"question": "Which?", "options": texts, "answer": n, "image": "a.png"} for texts, n in (
        (["2", "0", "3", "1"], "2"), (["cat", "dog"], "0"))],
        [("Which?\nA. 2\nB. 0\nC. 3\nD. 1", "C"), (LETTERED, "A")]),
    "counted from 1": ([{"question": "Which?", "options": ["cat", "dog"], "label_id": 1, "answer": n} for n in (1, 2)],
                       [(LETTERED, "A"), (LETTERED, "B")]),
    "MMMU": ([{"question": "In <image 2>, not <image 1>?", "options": "['cat', \"dog\"]", "answer": "B",
               "image_1": "a.png", "image_2": "b.png", "image_3": None, "question_type": "multiple-choice"},
              {"question": "<image 1> How many?", "options": "[]", "answer": "3", "image_1": "a.png"}],
             [("In <image>, not <image>?\nA. cat\nB. dog", "B"), ("How many?", "3")]),
    "MathVista": ([{"question": "Which?", "choices": ["cat", "dog"], "answer": "dog", "image": "a.png",
                    "query": "Hint: give the letter.\nQuestion: Which?\nChoices:\n(A) cat\n(B) dog"}], [(LETTERED, "B")]),
    "Video-R1": ([{"problem": "Which?", "options": ["A. cat", "B. dog"], "solution": "<answer>B</answer>",
                   "path": "./a.png", "data_type": "image"}], [(LETTERED, "B")]),
    "MMBench": ([{"question": "Which?", "hint": float("nan"), "A": "cat", "B": "dog", "C": None, "answer": "A"}],
                [(LETTERED, "A")]),
    "choice_a": ([{"question": "Which?", "choice_a": "cat", "choice_b": "dog", "answer": "b"}], [(LETTERED, "B")]),
    "ARC": ([{"question": "Which?", "choices": {"text": ["cat", "dog"], "label": ["A", "B"]}, "answerKey": "B"}],
            [(LETTERED, "B")]),
    "own letters": ([{"question": "Which?", "options": ["B. dog", "A. cat"], "answer": "B"},
                     {"question": "Which?", "choices": {"2": "dog", "1": "cat"}, "answer": "1"},
                     {"question": "Which?", "option1": "cat", "option2": "dog", "answer": "1"}],
                    [(LETTERED, "B"), (LETTERED, "A"), (LETTERED, "A")]),
    "letters in a question": ([{"question": "Which is longer, A or B?", "options": ["B", "A"], "answer": 0}],
                              [("Which is longer, A or B?\nA. B\nB. A", "A")]),
    "a reply beside": ([{"question": ASK, "response": "2", "label": "1"}], [(ASK, "1")]),
    "listed already": ([{"question": LETTERED, "options": {"A": "cat", "B": "dog"}, "answer": ["A", "B"]}],
                       [(LETTERED, "A, B")]),
    "BLINK": ([{"question": "Which?", "prompt": "Look. Which?\n(A) cat\n(B) dog", "choices": ["(A)", "(B)"],
                "answer": "(B)"}], [("Look. Which?\n(A) cat\n(B) dog", "B")]),
    "A-OKVQA": ([{"question": "Which?", "choices": ["cat", "dog"], "correct_choice_idx": 1}], [(LETTERED, "B")]),
    "ChartQA": ([{"query": ASK, "label": ["1"], "imgname": "a.png"}], [(ASK, "1")]),
    "verl": ([{"data_source": "x", "prompt": [turn("user", f"<image>{ASK}")], "images": ["a.png"],
               "reward_model": {"style": "rule", "ground_truth": "1"}, "extra_info": {"question": ASK}}],
             [(f"<image>{ASK}", "1")]),
    "lmm-r1": ([{"message": json.dumps([turn("user", [{"type": "image", "image": "a.png"}, TEXT_PART])]),
                 "question": ASK, "answer": "1"}], [(ASK, "1")]),
    "alpaca": ([{"instruction": "Add.", "input": "1 + 1", "output": "2"}], [("Add.\n1 + 1", "2")]),
    "MATH": ([{"problem": ASK, "solution": r"There is one, so it is $\boxed{1}$.", "answer": "1"}], [(ASK, "1")]),
    "DocVQA": ([{"question": ASK, "answers": ["one", "1", "1"]}], [(ASK, "1")]),
}


@pytest.mark.parametrize("shape", WHOLE)
def test_options_hints_and_places_are_part_of_the_question(root, shape, processor, capsys):
    rows, expected = WHOLE[shape]
    found = load_rows(root, *rows, task="math")
    assert [(example.problem.removeprefix("<image>"), truth_of(example)) for example in found] == [
        (problem.removeprefix("<image>"), truth) for problem, truth in expected]
    for example in found:
        assert accuracy_reward(taught(example), example) == 1.0 and len(processor(example).input_ids)


def test_system_and_history_stand_before_the_question(root):
    row = {"system": "Be brief.", "history": [["What is there?", "Cups."]], "query": "And more?", "response": "3"}
    (example,) = load_rows(root, row, task="math")
    assert example.history == (("system", "Be brief."), ("user", "What is there?"), ("assistant", "Cups."))


def test_columns_that_are_not_read_are_told_once(root, capsys):
    rows = [{"id": n, "question": ASK, "answer": "1", "rationale": "As seen.", "imageId": "b", "source": "web",
             "grid_3d": [1]} for n in range(3)]
    assert [example.images[0] for example in load_rows(root, *rows, task="math")] == [str(root / "b.png")] * 3
    said = capsys.readouterr().err
    assert said.count("not read are the columns rationale, grid_3d") == 1 and "3 images are found" in said
    write_jsonl(root / "train" / "open.jsonl", [PLUS, PLUS | {"image": "a.png"}])
    load_data(settings(root))
    assert "no picture have 1 of 2 training rows" in capsys.readouterr().err


# ---- Tasks and forms of files ----

def settings(root, *flags):
    return currreft.parse_args(["--data", str(root), "--stages", "open:1", *flags])


def test_each_file_of_the_released_test_folder_has_its_task(root):
    """No task in any row: superCLEVR's counts and RefGTA's boxes; one --task was all there was."""
    test = root / "grpo_data" / "test"
    write_jsonl(root / "grpo_data" / "train" / "open.jsonl", [PLUS])
    write_jsonl(test / "superclever" / "superclevr_test200_counting_problems.jsonl",
                [{"image": "/mnt/authors/images/a.png", "problem": ASK, "solution": 1},
                 {"problem": "Is it?", "solution": "yes", "form": "binary"}])  # its own form wins
    box = {"image": "a.png", "problem": "Where?", "solution": [1, 2, 30, 40]}
    write_jsonl(test / "Refgta" / "refgta_subsample_resize.json", [json.dumps([box])])
    with pytest.raises(UserError, match="--task names it"):
        load_data(settings(root))
    tests = load_data(settings(root, "--task", "superCLEVR=math", "RefGTA=detection"))[1]
    assert {(e.task, e.form) for e in tests} == {("math", "open"), ("math", "binary"), ("detection", "open")}
    with pytest.raises(UserError, match="no file or folder of the data begins with 'superclvr'"):
        load_data(settings(root, "--task", "superCLVR=math"))


@pytest.mark.parametrize("text", ["maths", "math math", "a=math a=detection", "a=", "=", "a math"])
def test_nonsense_in_task_is_a_sentence(text):
    with pytest.raises(UserError, match="--task"):
        declared_tasks(text, TASKS)


def test_a_chat_of_the_reject_stage_stays_general_under_task(root):
    tiny_data(root)
    questions = load_data(settings(root, "--stages", "reject:1", "--task", "math"))[2]
    assert {e.task for e in questions} == {"general"}
    assert [load_rows(root, chat(ASK, SAY), task=task)[0].task for task in (
        None, "math", "rows=math", "other=math")] == ["general", "math", "math", "general"]


# ---- Nothing misread in silence ----

OPTIONS = "Which?\nA. 1\nB. 2"
PROSE = "We see that the sum of all the angles here is the one before, so it must be 3"
MISREAD = [
    ({"video": "a.mp4"}, '"video" seems to name'), ({"videos": ["a.mp4"]}, '"videos" seems to name'),
    ({"Image": "a.png"}, '"Image" seems to name'), ({"source": "a.png"}, '"source" seems to name'),
    ({"image": "a.png", "image_2": "b.png"}, '"image_2" seems to name'),
    ({"image": "a.png", "img_path": "b.png"}, "name different images"),
    ({"image": None, "problem": "What is in the picture?"}, "speaks of an image"),
    ({"image": "", "problem": "<image>What?"}, "speaks of an image"),
    ({"problem": "<image>What?"}, "0 images"),
    ({"image": {"bytes": "iVBO", "path": None}}, "are not read"), ({"image": 3}, "not the path"),
    ({"image": "data:image/png;base64," + "iVBO" * 1200}, "are not read"),
    ({"image": "train/a.png"}, "no image train/a.png"), ({"image": "x" * 999}, "no image"),
    ({"problem": "Find <ref-object>"}, "<ref-object>"), ({"solution": "<bbox>"}, "<bbox>"),
    ({"problem": "Read <|image_pad|> this"}, "image_pad"), ({"solution": "3<|im_end|>"}, "im_end"),
    ({"problem": "half \ud800"}, "ud800"), ({"problem": "x" * 300_000}, "300,001 characters"),
    ({"prompt": [turn("user", "Another one?")]}, "ask different things"), ({"history": "Hi"}, '"history" must be'),
    ({"options": ["1", "2"]}, "none of its options"), ({"options": [["1"]]}, "no list of texts"),
    ({"options": "see picture"}, "no list of texts"),
    ({"options": ["a.png", "b.png"]}, "no list of texts"), ({"options": ["4", "3"], "choices": ["3", "5"]}, "different opt"),
    ({"options": ["2", "0", "3"], "solution": "2"}, "may be the options' text or index"), ({"hint": 3}, "no text"),
    ({"options": "['cat' 'dog']"}, "no list of texts"), ({"options": ["4", "3"], "solution": [0, 1, 0, 0]}, "none of its"),
    ({"problem": {"en": "How many?"}}, "is no text"),
    ({"imageId": "77"}, "no image 77"), ({"image_1": "a.png", "problem": "In <image 2>?"}, "the images 2, and it has"),
    ({"answers": [3], "solution": None}, "no list of texts"), ({"solution": {"text": "3"}}, "or an object"),
    ({"problem": None}, '"problem"'), ({"task": ["math"]}, "no name"), ({"answer": "4"}, "two truths"),
    (chat([{"type": "video", "video": "a"}]), "'video'"), ({"messages": "Hi"}, "must be a list"),
    ({"messages": [turn("tool", "x"), turn("user", "y")]}, "must be a list"),
    ({"messages": [turn("assistant", "Hi")]}, "alternate"),
    ({"image": "a.png", "solution": [1, 2, 30, 40]}, "is a box"), ({"solution": ["two", "2"]}, "is a list"),
    ({"solution": PROSE}, "is prose"), ({"solution": "<answer></answer>"}, "empty"),
    ({"solution": "<answer>1</answer><answer>2</answer>"}, "exactly one"),
    ({"solution": "<think>so 3</think> 3"}, "exactly one"),
    ({"form": "binary", "solution": "yes or no"}, "neither yes nor no"),
    *(({"form": "choice", "problem": OPTIONS, "solution": truth}, "not letters") for truth in ("C", "a dog")),
    ({"task": "classify", "solution": "[]"}, "no label"),
    ({"task": "classify", "solution": ", ".join(map(str, range(1200)))}, "does not score 1"),
    ({"image": "a.png", "problem": 'In {"bbox_2d": [0.1, 0.2, 0.5, 0.6]}?'}, "shares of the"),
    ({"images": ["a.png", "b.png"], "problem": f"What is in {BOXES}?"}, "2 images"),
    ({"task": "detection"}, "needs an image"),
    ({"images": ["a.png", "b.png"], "task": "detection", "solution": BOXES}, "2 images"),
    *(({"task": "detection", "image": "a.png", "solution": truth}, words) for truth, words in (
        ("somewhere", "neither JSON"), ("[" * 9999, "neither JSON"), ("[9, 2, 3, 8]", "x1 < x2"),
        *((text, "neither JSON") for text in ("[1, 2, 3]", "[1, 2, 3, NaN]", "[true, 2, 3, 4]")),
        ('[{"box": [1, 2, 3, 4]}]', "neither JSON"), ("[1, 1, 3, 1" + "0" * 400 + "]", "not"),
        ("[1, 1, 3, 150]", "leaves"), ([[0.1, 0.2, 0.5, 0.6]], "shares of the image"),
        ([[n, 1, n + 9, 9] for n in range(65)], "64 tim"),
        ([{"bbox_2d": [n, 1, n + 9, 9], "label": "x" * 60} for n in range(60)], "does not score 1")))]


@pytest.mark.parametrize("fields, words", MISREAD)
def test_what_would_be_misread_is_a_sentence_with_file_and_line(root, fields, words):
    row = fields if "messages" in fields else {"problem": ASK, "solution": "3", "task": "math"} | fields
    with pytest.raises(UserError) as error:
        load_rows(root, row)
    assert f"{root / 'rows.jsonl'}:" in str(error.value) and words in str(error.value)


def test_no_row_of_any_columns_raises_anything_else():
    rng, values = random.Random(0), [
        0, 1, 2.5, True, 1e999, float("nan"), "", "a b?", "A", "1", "['a', 'b']", "{'A': 'x'}", "[1", "[[" * 900, "(" * 900,
        "<image 2>", [], ["a"], ["a", "b"], [1, 2], [["a", "b"]], [None, "a"], {}, {"A": "x", "B": "y"}, {"text": ["a"]},
        [turn("user", "q")], [turn("user", "q"), turn("assistant", "a")], [{"from": "human", "value": None}],
        {"ground_truth": None}, [{"answer": "x"}], "\\boxed{" * 50]
    columns = [*PROBLEMS, *SOLUTIONS, *TURNS, *CONTEXTS, *IMAGES, "options", "A", "B", "history", "system", "task", "form",
               "reward_model", "image_1", "image_2", "image_id"]
    for _ in range(5000):
        row = {name: rng.choice(values) for name in rng.sample(columns, rng.randrange(1, 7))}
        for read in (one_row, lambda row: option_styles([row])):
            try:
                read(row)
            except UserError:
                pass


def test_marked_boxes_of_any_task_are_converted_and_others_counted(root, capsys):
    tiny_image(root / "large.png", (1280, 960))
    box = {"form": "binary", "image": "large.png", "task": "math", "solution": "yes"}
    marked, loose = load_rows(root, box | {"problem": 'Is it in {"bbox_2d": [128, 96, 640, 480]}?'},
                         box | {"problem": "Is it in [128, 96, 640, 480]?"})
    assert marked.size == (728, 532) and '{"bbox_2d": [73, 53, 364, 266]}' in marked.problem
    assert "[128, 96, 640, 480]" in loose.problem
    assert "1 questions of tasks without boxes" in capsys.readouterr().err
    earlier = chat('Look at {"bbox_2d": [128, 96, 640, 480]}.', "Yes.", ASK, "2", images=["large.png"])
    (example,) = load_rows(root, earlier)
    assert "[73, 53, 364, 266]" in example.history[0][1]


def where(boxes):
    return [{"problem": f"Where {n}?", "solution": box, "task": "detection", "image": "large.png"}
            for n, box in enumerate(boxes)]


@pytest.mark.parametrize("boxes, words", [
    ([[200, 300, 900, 950], [10, 20, 700, 800], [100, 5, 400, 950]], "thousandths"),
    ([[100, 50, 80, 40], [200, 100, 90, 60], [10, 10, 300, 200]], "--boxes xywh")])
def test_a_files_convention_is_named_and_never_skipped(root, boxes, words):
    """Rows that happen to fit are other boxes: --skip_bad_rows would keep just these."""
    tiny_image(root / "large.png", (640, 480))
    for options in ({}, {"skip_bad_rows": True}):
        with pytest.raises(UserError) as error:
            load_rows(root, *where(boxes), **options)
        assert words in str(error.value) and "tools.convert rows" in str(error.value)
    strange = where([[1, 2, 90, 80]] * 40 + boxes[:1])
    assert len(load_rows(root, *strange, skip_bad_rows=True)) == 40, "one in forty is a mistake"


def test_doubled_rows_other_machines_and_test_rows_in_training_are_said(root, capsys):
    photo = "photo_jpg.rf.1a.png"
    rows = [{"problem": f"{n} + 1?", "solution": str(n + 1), "task": "math", "image": name}
            for n, name in enumerate((photo, "/mnt/data/a.png", "C:\\data\\b.png"))]
    for name in (photo, "photo_jpg.rf.2b.png", "c.png"):
        tiny_image(root / name)
    rows += [rows[0], rows[0] | {"image": str(root / "c.png")}]
    write_jsonl(root / "train" / "open.jsonl", rows)
    write_jsonl(root / "test" / "id.jsonl", [
        rows[1], rows[0] | {"image": "photo_jpg.rf.2b.png"}, rows[2] | {"image": "a.png"}])
    load_data(settings(root))
    said = capsys.readouterr().err
    for words in ("1 of 5 rows are there more than once", "2 images are found by the ends of paths",
                  "test id: 1 of 3 rows are training rows",
                  "test id: 2 of 2 images, or versions of them, are training images"):
        assert words in said


def test_what_a_file_may_not_mean_is_said(root, capsys):
    tiny_image(root / "photo.png", (4000, 3000))
    box = {"task": "detection", "image": "photo.png"}
    load_rows(root, box | {"problem": "Where?", "solution": [900, 900, 911, 911]},
              box | {"problem": "Where, between 0 and 1000?", "solution": [9, 9, 3000, 2900]},
              {"task": "classify", "problem": "What?", "solution": ["sofa", "couch"]})
    said = capsys.readouterr().err
    for words in ("1 of 2 boxes are less than 14 pixels", "1 questions have rules of their own",
                  "1 truths are lists of labels"):
        assert words in said
    load_rows(root, *({"task": "math", "problem": f"{n}?", "solution": "1", "image": "a.png"} for n in range(60)))
    assert "60 of 60 rows show one picture" in capsys.readouterr().err


def test_truths_that_count_only_as_they_are_written_are_listed():
    truths = ["20", "B", "(1, 2)", "isosceles", "10 apples or 12", "x^2 + 1", r"x \in A", "90,180"]
    assert text_only_truths(truths) == ["10 apples or 12", "x^2 + 1", r"x \in A", "90,180"]


def test_odd_files_are_a_sentence(root, monkeypatch):
    for name, words in (("a.csv", "pandas"), ("a.arrow", "load_from_disk"), ("a.parquet", "convert parquet")):
        (root / name).touch()
        with pytest.raises(UserError, match=words):
            load_examples(root / name)
    (root / "latin.json").write_bytes(b'{"problem": "caf\xe9"}')
    (root / "coco.json").write_text(json.dumps({"images": [], "annotations": []}))
    for name, words in (("none", "No such file"), ("latin", "UTF-8"), ("coco", "tools.convert")):
        with pytest.raises(UserError, match=words):
            load_examples(root / f"{name}.json", task="math")
    with pytest.raises(UserError, match=r"(?s)holds no data.*train/binary\.jsonl.*questions\.jsonl.*1 x .parquet"):
        find_files(root)
    with pytest.raises(UserError, match="no regular file"):
        read_rows("/dev/zero")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root nothing is forbidden
    with pytest.raises(UserError, match="no folder that can be read"):
        find_files(root)
