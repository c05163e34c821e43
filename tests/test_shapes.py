"""Rows and files as people have them: read as they are meant, or refused with a sentence; never misread in silence."""

import json
import os
from collections import Counter

import pytest

import currreft
import data
from currreft import main
from data import load_examples
from support import warnings as doubts
from support.answers import parse_labels, truth_of
from support.rows import declared_tasks, read_rows
from support.tiny import tiny_checkpoint, tiny_data, tiny_image, write_jsonl
from support.words import UserError
from tools import convert

BOXES = '[{"bbox_2d": [21, 14, 42, 28]}]'
ASK, SAY = "How many boxes are there?", "1"


def turn(role, content, keys=("role", "content")):
    return dict(zip(keys, (role, content)))


def llava(question, answer, **more):
    names = ("from", "value")
    return {"conversations": [turn("human", question, names), turn("gpt", answer, names)], **more}


# Each shape: its row, and (task, truth, number of images) as it must be read under --task math.
SHAPES = {
    "problem and solution": ({"problem": ASK, "solution": "<answer>1</answer>", "image": "a.png"}, ("math", SAY, 1)),
    "EasyR1": ({"problem": f"<image>{ASK}", "answer": SAY, "images": ["a.png"]}, ("math", SAY, 1)),
    "R1-V": ({"image_path": "a.png", "question": ASK, "ground_truth": 1}, ("math", SAY, 1)),
    "query and response": ({"query": ASK, "response": SAY, "img": "a.png"}, ("math", SAY, 1)),
    "TRL": ({"prompt": [turn("user", [{"type": "image"}, {"type": "text", "text": ASK}])], "image": "a.png",
             "solution": SAY}, ("math", SAY, 1)),
    "TRL, plain": ({"prompt": ASK, "images": ["a.png"], "solution": SAY}, ("math", SAY, 1)),
    "TRL, completion": ({"prompt": [turn("user", ASK)], "completion": [turn("assistant", SAY)], "images": ["a.png"]},
                        ("math", SAY, 1)),
    "ms-swift": ({"messages": [turn("system", "Be brief."), turn("user", f"<image>{ASK}")], "images": ["a.png"],
                  "solution": SAY}, ("math", SAY, 1)),
    "OpenAI": ({"messages": [turn("user", [{"type": "image_url", "image_url": {"url": "file:///elsewhere/a.png"}},
                                           {"type": "text", "text": ASK}]), turn("assistant", SAY)]}, ("math", SAY, 1)),
    "LLaMA-Factory": ({"messages": [turn("user", f"<image>{ASK}"), turn("assistant", SAY)], "images": ["a.png"],
                       "task": "general"}, ("general", SAY, 1)),
    "LLaVA": (llava(f"<image>\n{ASK}", SAY, id="7", image="a.png"), ("math", SAY, 1)),
    "LLaVA, text": (llava("What is 1 + 1?", "2", id="8"), ("math", "2", 0)),
    "Qwen2.5-VL": (llava(f"<image>\n<image>\n{ASK}", SAY, image=["a.png", "b.png"]), ("math", SAY, 2)),
    "InternVL": (llava(f"<image>\n{ASK}", SAY, id=0, image="a.png", width=84, height=56), ("math", SAY, 1)),
    "Geo170K": (llava("<image>\nChoices:\nA:30\nB:45\nWhich is it?", "As 2 x = 90, x = 45.\nAnswer:B", image="a.png"),
                ("math", "B", 1)),
    "MathV360K": (llava(f"<image>Question: {ASK}", "The answer is 1", image="a.png", id="x"), ("math", SAY, 1)),
    "GSM8K": ({"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}, ("math", "7", 0)),
    "VLM-R1": (llava(f"<image>{ASK}", SAY, image="a.png", task="math"), ("math", SAY, 1)),
    "VLM-R1, boxes": ({"image": "a.png", "problem": "Where is the box?", "normal_caption": "the box", "solution":
                       [21, 14, 42, 28], "task": "detection", "normalized_solution": [250, 250, 500, 500]},
                      ("detection", "[21, 14, 42, 28]", 1)),
    "detection with labels": ({"img_path": "a.png", "problem": "Where is the box?", "task": "detection", "solution":
                               [{"bbox_2d": [21, 14, 42, 28], "label": "box"}]}, ("detection", None, 1)),
    "file_name": ({"file_name": "a.png", "question": ASK, "answer": SAY}, ("math", SAY, 1)),
    "filename": ({"filename": "a.png", "question": ASK, "answer": SAY}, ("math", SAY, 1)),
    "path": ({"path": "a.png", "question": ASK, "answer": SAY}, ("math", SAY, 1)),
    "labels": ({"image": "a.png", "problem": "What is there?", "solution": ["café", "犬"], "task": "classify"},
               ("classify", '["café", "犬"]', 1)),
}


@pytest.fixture
def root(tmp_path):
    tiny_image(tmp_path / "a.png")
    tiny_image(tmp_path / "b.png", (112, 112))
    return tmp_path


def load(folder, *rows, **options):
    return load_examples(write_jsonl(folder / "rows.jsonl", rows), **options)


# ---- Shapes ----

@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_read_as_it_is(root, shape):
    row, (task, truth, images) = SHAPES[shape]
    (example,) = load(root, row, task="math")
    assert (example.task, example.form, len(example.images)) == (task, "open", images)
    assert truth in (None, truth_of(example)) and ("<image>" in example.problem) == bool(example.history)
    assert "Geo" not in shape or example.solution.startswith("<think>As 2 x = 90, x = 45.</think>"), "kept for SFT"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def train(base, folder, *flags):
    main(["--model", str(base), "--data", str(folder), "--out", str(folder / "run"), "--num_generations", "2",
          "--max_completion_length", "4", "--threads", "1", *flags])


def test_a_step_trains_on_every_shape_at_once(base, root, monkeypatch):
    """One file a shape, one JSON list, one pretty-printed object and what each converter writes, all in one step."""
    for number, (row, _) in enumerate(SHAPES.values()):
        write_jsonl(root / "train" / "open" / f"{number}.jsonl", [row])
    (root / "train" / "open" / "list.json").write_text(json.dumps([SHAPES["EasyR1"][0] | {"problem": "How many?"}]))
    one = SHAPES["file_name"][0] | {"question": "Count."}
    (root / "train" / "open" / "one.json").write_text(json.dumps(one, indent=2))
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.375 0.375 0.25 0.25\n")
    (root / "names.txt").write_text("box\nball\n")
    (root / "xml").mkdir()
    (root / "xml" / "a.xml").write_text(VOC)
    common = ["--image_root", str(root), "--out"]
    for command, *arguments in (("yolo", root / "labels", "--names", root / "names.txt"), ("voc", root / "xml")):
        convert.main([command, *map(str, arguments), *common, str(root / "train" / "open" / f"{command}.jsonl")])
    count = len(SHAPES) + 2 + 2 + 2
    rollout, shown = currreft.rollout, []
    monkeypatch.setattr(currreft, "rollout", lambda *arguments: shown.append(rollout(*arguments)) or shown[-1])
    train(base, root, "--stages", "open:1", "--prompts_per_step", str(count), "--task", "math")
    trained = [group.example for group in shown[0]]
    assert len({example.where for example in trained}) == count and (root / "run" / "stages" / "1-open").is_dir()
    assert {example.task for example in trained} == {"math", "detection", "classify", "general"}


def test_files_are_lists_objects_and_lines(root):
    row = {"problem": ASK, "solution": SAY}
    for text, lines in ((json.dumps([row, row]), [1, 2]), (json.dumps(row, indent=1), [1]),
                        (json.dumps(row, indent=1) + "\n\n" + json.dumps(row, indent=1), [1, 6]),
                        (json.dumps({"7": row, "9": row}, indent=1), [1, 2]),
                        (json.dumps({"version": 1, "data": [row]}), [1]),
                        (f"{json.dumps(row)}\r{json.dumps(row)}\r\n", [1, 2])):
        (root / "rows.json").write_text(text)
        examples = load_examples(root / "rows.json", task="math")
        assert [int(e.where.rpartition(":")[2]) for e in examples] == lines and {e.problem for e in examples} == {ASK}


def test_chats_keep_earlier_turns_and_images_at_their_places(root):
    names = ("from", "value")
    row = {"conversations": [turn(role, text, names) for role, text in (
        ("human", "Hi"), ("gpt", "Hello"), ("human", "Is <image> larger than <image>?"), ("gpt", "no"))],
        "image": ["a.png", "b.png"]}
    (example,) = load(root, row)
    assert example.task == "general" and example.history == (("user", "Hi"), ("assistant", "Hello"))
    parts = data.prompt_messages(example)[2]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]


# ---- Tasks and forms of files ----

def test_each_file_of_the_released_test_folder_has_its_task(root):
    """One folder, no task in any row: superCLEVR's counts and RefGTA's boxes; one --task for both was all there was."""
    test = root / "grpo_data" / "test"
    write_jsonl(root / "grpo_data" / "train" / "open.jsonl", [{"problem": "1 + 1?", "solution": "2", "task": "math"}])
    write_jsonl(test / "superclever" / "superclevr_test200_counting_problems.jsonl",
                [{"image": "/mnt/authors/images/a.png", "problem": ASK, "solution": 1}])
    write_jsonl(test / "Refgta" / "refgta_subsample_resize.json",
                [json.dumps([{"image": "a.png", "problem": "Where?", "solution": [1, 2, 30, 40]}])])
    flags = ["--data", str(root), "--stages", "open:1"]
    cfg = currreft.parse_args(flags)
    with pytest.raises(UserError, match="--task names it"):
        data.load_data(cfg)
    cfg = currreft.parse_args([*flags, "--task", "superCLEVR=math", "RefGTA=detection"])
    assert Counter(e.task for e in data.load_data(cfg)[1]) == {"math": 1, "detection": 1}
    cfg = currreft.parse_args([*flags, "--task", "superCLVR=math"])
    with pytest.raises(UserError, match="no file or folder of the data begins with 'superclvr'"):
        data.load_data(cfg)


@pytest.mark.parametrize("text", ["maths", "math math", "a=math a=detection", "a=", "=", "a math"])
def test_nonsense_in_task_is_a_sentence(text):
    with pytest.raises(UserError, match="--task"):
        declared_tasks(text)


def test_a_chat_of_the_reject_stage_stays_general_under_task(root):
    tiny_data(root)
    cfg = currreft.parse_args(["--data", str(root), "--stages", "reject:1", "--task", "math"])
    assert {e.task for e in data.load_data(cfg)[2]} == {"general"}
    row = {"messages": [turn("user", ASK), turn("assistant", SAY)]}
    assert [load(root, row, task=task)[0].task for task in (None, "math", "rows=math", "other=math")] == [
        "general", "math", "math", "general"]


def test_a_rows_own_form_wins_over_its_files_name_in_a_data_directory(root):
    write_jsonl(root / "train" / "open.jsonl", [{"problem": "1 + 1?", "solution": "2", "task": "math"}])
    row = {"problem": "Is it?", "solution": "yes", "task": "math", "form": "binary"}
    write_jsonl(root / "test" / "yesno.jsonl", [row])
    cfg = currreft.parse_args(["--data", str(root), "--stages", "open:1"])
    assert [e.form for e in data.load_data(cfg)[1]] == ["binary"]


# ---- Nothing misread in silence ----

MISREAD = {
    "video": ({"video": "a.mp4"}, '"video" seems to name'),
    "videos": ({"videos": ["a.mp4"]}, '"videos" seems to name'),
    "another key": ({"Image": "a.png"}, '"Image" seems to name'),
    "second image": ({"image": "a.png", "image_2": "b.png"}, '"image_2" seems to name'),
    "picture under a strange key": ({"source": "a.png"}, '"source" seems to name'),
    "two images for one": ({"image": "a.png", "img_path": "b.png"}, "name different images"),
    "null image": ({"image": None, "problem": "What is in the picture?"}, "speaks of an image"),
    "empty image": ({"image": "", "problem": "<image>What?"}, "speaks of an image"),
    "bytes": ({"image": {"bytes": "iVBO", "path": None}}, "tools.parquet"),
    "base64": ({"image": "data:image/png;base64,iVBO"}, "no path"),
    "place of a video": ({"problem": "<video>What?"}, "<video>"),
    "place of a box": ({"problem": "Find <ref-object>", "solution": "<bbox>"}, "<ref-object>"),
    "place in an answer": ({"solution": "<bbox>"}, "<bbox>"),
    "relative path elsewhere": ({"image": "train/a.png"}, "no image train/a.png"),
    "address": ({"image": "https://host/a.png"}, "no path under"),
    "bucket": ({"image": "s3://bucket/a.png"}, "no path under"),
    "home": ({"image": "~/a.png"}, "no path under"),
    "boxes as math": ({"image": "a.png", "solution": [1, 2, 30, 40]}, "is a box"),
    "texts as math": ({"solution": ["two", "2"]}, "is a list"),
    "prose as math": ({"solution": "We see that the sum of all the angles here is the one before, so it must be 3"},
                      "is prose"),
    "two truths": ({"answer": "4"}, "two truths"),
    "a video part": ({"messages": [turn("user", [{"type": "video", "video": "a"}])]}, "type 'video'"),
    "a tool": ({"messages": [turn("tool", "x"), turn("user", "y")]}, "must be a list"),
    "no question": ({"problem": None}, '"problem"'),
    "task of numbers": ({"task": ["math"]}, "no name"),
    "shares": ({"image": "a.png", "task": "detection", "solution": [[0.1, 0.2, 0.5, 0.6]]}, "shares of the image"),
    "shares in a question": ({"image": "a.png", "problem": 'In {"bbox_2d": [0.1, 0.2, 0.5, 0.6]}?'}, "shares of the"),
    "boxes in two images": ({"images": ["a.png", "b.png"], "task": "detection", "solution": BOXES}, "2 images"),
    "marked box of two images": ({"images": ["a.png", "b.png"], "problem": f"What is in {BOXES}?"}, "2 images"),
    "65 boxes": ({"image": "a.png", "task": "detection", "solution": [[n, 1, n + 9, 9] for n in range(65)]}, "64 tim"),
    "a long answer": ({"image": "a.png", "task": "detection", "solution": json.dumps(
        [{"bbox_2d": [n, 1, n + 9, 9], "label": "x" * 60} for n in range(60)])}, "does not score 1"),
    "a long label list": ({"task": "classify", "solution": ", ".join(map(str, range(1200)))}, "does not score 1"),
    "an endless text": ({"problem": "x" * 300_000}, "300,001 characters"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_would_be_misread_is_a_sentence_with_file_and_line(root, case):
    fields, words = MISREAD[case]
    row = {"problem": "How many?", "solution": "3", "task": "math"} | fields
    with pytest.raises(UserError) as error:
        load(root, {key: value for key, value in row.items() if "messages" not in fields or key == "messages"})
    assert f"{root / 'rows.jsonl'}:1: " in str(error.value) and words in str(error.value)


def test_a_row_without_an_image_may_say_so(root):
    (example,) = load(root, {"problem": "1 + 1?", "solution": "2", "task": "math", "image": None, "images": []})
    assert example.images == ()


def test_truths_keep_their_characters(root):
    (example,) = load(root, {"problem": "What?", "solution": ["café", "犬"], "task": "classify"})
    assert parse_labels(truth_of(example)) == ["café", "犬"]


def test_marked_boxes_of_any_task_are_converted_and_others_counted(root, capsys):
    tiny_image(root / "large.png", (1280, 960))
    rows = [{"problem": text, "solution": "yes", "task": "math", "form": "binary", "image": "large.png"} for text in (
        'Is it in {"bbox_2d": [128, 96, 640, 480]}?', "Is it in [128, 96, 640, 480]?")]
    marked, loose = load(root, *rows)
    assert marked.size == (728, 532) and '{"bbox_2d": [73, 53, 364, 266]}' in marked.problem
    assert "[128, 96, 640, 480]" in loose.problem and "1 questions of tasks without boxes" in capsys.readouterr().err
    earlier = {"messages": [turn("user", 'Look at {"bbox_2d": [128, 96, 640, 480]}.'), turn("assistant", "Yes."),
                            turn("user", "How many?"), turn("assistant", "2")], "images": ["large.png"]}
    assert "[73, 53, 364, 266]" in load(root, earlier)[0].history[0][1]


@pytest.mark.parametrize("boxes, words", [
    ([[200, 300, 900, 950], [10, 20, 700, 800], [100, 5, 400, 950]], "thousandths"),
    ([[100, 50, 80, 40], [200, 100, 90, 60], [10, 10, 300, 200]], "[x, y, width, height]")])
def test_a_files_convention_is_named_and_never_skipped(root, boxes, words):
    """Of rows in another convention those that happen to fit are other boxes: --skip_bad_rows would keep just these."""
    tiny_image(root / "large.png", (640, 480))
    rows = [{"problem": f"Where {n}?", "solution": box, "task": "detection", "image": "large.png"}
            for n, box in enumerate(boxes)]
    for options in ({}, {"skip_bad_rows": True}):
        with pytest.raises(UserError) as error:
            load(root, *rows, **options)
        assert words in str(error.value) and "tools.convert rows" in str(error.value)
    strange = [rows[0] | {"problem": f"Where {n}?", "solution": [1, 2, 90, 80]} for n in range(40)] + [rows[0]]
    assert len(load(root, *strange, skip_bad_rows=True)) == 40, "one in forty is a mistake, not a convention"


def test_thousandths_that_no_box_contradicts_are_doubted(root, capsys):
    tiny_image(root / "large.png", (3000, 2000))
    rows = [{"problem": f"Where {n}?", "solution": [n, n, 900 + n, 990], "task": "detection", "image": "large.png"}
            for n in range(20)]
    load(root, *rows)
    assert "no box passes 1000" in capsys.readouterr().err


def test_paths_of_other_machines_are_counted(root, capsys):
    rows = [{"problem": f"{n}?", "solution": "1", "task": "math", "image": f"{where}/a.png"}
            for n, where in enumerate(("/mnt/data", "C:\\data", str(root)))]
    assert len(load(root, *rows)) == 3 and "2 images are named by paths of another machine" in capsys.readouterr().err


def test_doubled_rows_and_test_rows_in_training_are_told(root, capsys):
    rows = [{"problem": f"{n} + 1?", "solution": str(n + 1), "task": "math", "image": name}
            for n, name in enumerate(("photo_jpg.rf.1a.png", "a.png", "b.png"))]
    for name in ("photo_jpg.rf.1a.png", "photo_jpg.rf.2b.png", "c.png"):
        tiny_image(root / name)
    write_jsonl(root / "train" / "open.jsonl", [*rows, rows[0]])
    write_jsonl(root / "test" / "id.jsonl", [
        rows[1], rows[0] | {"image": "photo_jpg.rf.2b.png"}, rows[2] | {"image": "c.png"}])
    data.load_data(currreft.parse_args(["--data", str(root), "--stages", "open:1"]))
    said = capsys.readouterr().err
    for words in ("1 of 4 rows are there more than once", "test id: 1 of 3 rows are training rows",
                  "test id: 2 of 3 images, or versions of them, are training images"):
        assert words in said


def test_truths_that_count_only_as_they_are_written_are_listed(root):
    truths = ["20", "B", "(1, 2)", "isosceles", "10 apples or 12", "x^2 + 1", r"x \in A"]
    examples = load(root, *({"problem": "?", "solution": truth, "task": "math"} for truth in truths))
    assert doubts.text_only_truths(examples) == ["10 apples or 12", "x^2 + 1", r"x \in A"]


# ---- Odd files ----

def test_odd_files_are_a_sentence(root, monkeypatch):
    os.mkfifo(root / "pipe.jsonl")
    (root / "line.jsonl").write_text('{"problem": "' + "x" * 5_000_000 + '"}')
    (root / "latin.jsonl").write_bytes(b'{"problem": "caf\xe9"}')
    (root / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    for name, words in (("pipe.jsonl", "no regular file"), ("line.jsonl", "5,000,015 characters"),
                        ("none.jsonl", "No such file"), ("latin.jsonl", "UTF-8"), ("coco.json", "tools.convert")):
        with pytest.raises(UserError, match=words):
            load_examples(root / name, task="math")
    with pytest.raises(UserError, match="no regular file"):
        read_rows("/dev/zero")
    monkeypatch.setattr(os, "access", lambda *_: False)          # as root nothing is forbidden
    with pytest.raises(UserError, match="no folder that can be read"):
        data.find_files(root)


VOC = """<annotation><filename>a.png</filename><size><width>84</width><height>56</height><depth>3</depth></size>
<object><name>box</name><difficult>0</difficult>
<bndbox><xmin>22</xmin><ymin>15</ymin><xmax>42</xmax><ymax>28</ymax></bndbox></object></annotation>"""
