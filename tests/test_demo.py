"""The demo's world and base model: what pictures, data set, tokenizer and habit promise."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import Processor, load_examples
from demo import base, world
from rewards import accuracy_reward, format_reward, is_correct
from support.answers import iou
from support.blind import blind_accuracy
from support.rows import find_files
from support.words import UserError


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """data.Processor on a saved, untrained tiny model."""
    tokenizer = base.corpus_tokenizer(base.school("tokenizer", 60)[1])
    path = tmp_path_factory.mktemp("base")
    base.save_model(path, base.build_model(tokenizer, 0), tokenizer)
    return Processor.from_pretrained(path)


@pytest.mark.slow
def test_data_are_functions_of_the_seed_and_parts_are_asked_alone_first(tmp_path, monkeypatch):
    for table in ("SPLITS", "GENERAL"):
        monkeypatch.setattr(world, table, [(name, 40, *rest) for name, _, *rest in getattr(world, table)])
    for again in "ab":
        world.write_data(tmp_path / again / "data", 3)
        for parts in (1, 3):
            world.write_parts(tmp_path / again / str(parts), 3, parts)
    a, b = tmp_path / "a", tmp_path / "b"
    files = [path.relative_to(a) for path in a.rglob("*.*")]
    assert len(files) > 500 and all((a / f).read_bytes() == (b / f).read_bytes() for f in files)
    one, three = (a / name / "grpo_data/train" for name in "13")
    for name in ("binary.jsonl", "choice.jsonl"):
        assert (one / name).read_bytes() == (three / name).read_bytes()
    for folder, commas in ((one, 0), (three, 2)):
        rows = map(json.loads, (folder / "open.jsonl").read_text().splitlines())
        assert {row["solution"].count(",") for row in rows} == {commas}


@pytest.mark.slow
def test_every_file_loads_and_no_training_question_tells_without_its_picture(tmp_path):
    world.write_data(tmp_path, 3)
    found = find_files(tmp_path)
    for form, path in found["train"].items():
        examples = load_examples(path, image_root=tmp_path)
        # of the other forms those that share candidates
        assert len(examples) == 720 or form != "open" and 480 < len(examples) < 720
        assert {e.form for e in examples} == {form} and {e.size for e in examples} == {(84, 84)}
        assert {e.task for e in examples} == {"detection", "classify", "math"}
        for task in ("detection", "math") if form != "open" else ():
            share, chance, _ = blind_accuracy([e for e in examples if e.task == task])
            assert share - chance < 0.1, (form, task)
    assert set(found["test"]) == {
        "binary_id", "choice_id", "open_id", "open_ood_pairs", "open_ood_more", "general"}
    for form, path in found["test"].values():
        assert {e.form for e in load_examples(path, image_root=tmp_path)} == {form}
    general = load_examples(tmp_path / "SFT_data/reject/questions.jsonl", image_root=tmp_path)
    assert {(len(e.images), e.task) for e in general} == {(n, "general") for n in range(3)}


def test_no_held_out_pair_and_no_crowd_in_training():
    rng = random.Random(0)
    scenes = [world.random_scene(rng) for _ in range(2000)]
    assert {s[:2] for scene in scenes for s in scene} == set(world.SEEN)
    assert {len(scene) for scene in scenes} == {1, 2, 3}
    for _ in range(200):
        assert {s[:2] for s in world.random_scene(rng, held_out=True)} & set(world.HELD_OUT)


def test_boxes_hold_what_is_drawn():
    rng, empty = random.Random(1), np.asarray(world.draw(()))
    for shape in (shape for _ in range(100) for shape in world.random_scene(rng)):
        ys, xs = np.nonzero((np.asarray(world.draw((shape,))) != empty).any(-1))
        drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        x0, y0, x1, y1 = box = world.cell_box(shape.cell)
        assert x0 <= drawn[0] and y0 <= drawn[1] and x1 >= drawn[2] and y1 >= drawn[3]
        assert iou(drawn, box) > 0.6


def test_answers_of_several_parts_are_those_of_the_scene():
    """Each part is read off the scene again, from the words of the question alone."""
    rng = random.Random(4)
    for n in range(300):
        scene = world.parts_scene(rng)
        question = world.parts_question(scene, rng, 1 + n % 3)
        asked, found = re.split(", | and ", question.problem[len("What is "):-1]), []
        for part in asked:
            words = part.split()
            cells = [s.cell for s in scene if part.endswith((f"the {s}", "the last object"))]
            count = sum(word.startswith(words[3]) or words[3].startswith(word) for s in scene for word in s[:2])
            found.append(str(count if "number" in words else cells[-1] + 1))
        assert question.answer == ", ".join(found) and len(asked) == 1 + n % 3


def test_pre_training_sees_what_the_processor_makes(processor, tmp_path):
    scenes, lessons, _ = base.school("seen", 10)
    for n, scene in enumerate(scenes):
        world.draw(scene).save(tmp_path / f"{n}.png")
    for images, _, example in lessons:
        files = tuple(str(tmp_path / f"{i}.png") for i in images)
        prompt = processor(replace(example, images=files))
        text = base.prompt_text(processor.tokenizer, example)
        assert prompt.input_ids.tolist() == processor.tokenizer(text)["input_ids"]
        if images:
            pixels = base.pixels_of([scenes[i] for i in images])
            torch.testing.assert_close(prompt.pixel_values, pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parts", [False, True])
def test_careful_answers_are_right_and_hasty_open_ones_never(processor, parts):
    _, lessons, rng = base.school("answers", 150, parts)
    guessed = []
    for _, question, example in lessons:
        careful = world.careful_response(question, example)
        hasty = world.hasty_response(question, example, rng)
        if example.task != "general":
            assert is_correct(careful, example)
            assert format_reward(careful, example) == format_reward(hasty, example) == 1
            if example.form == "binary":
                guessed.append(accuracy_reward(hasty, example))
            assert example.form != "open" or accuracy_reward(hasty, example) == 0
        ids = processor.response_ids(careful)
        assert processor.decode(ids) == careful and (parts or len(ids) <= 64)
    assert len(processor.response_ids("<answer>84</answer>")) == 4  # a number is one token
    assert 0.35 < sum(guessed) / len(guessed) < 0.65


@pytest.mark.slow
def test_the_habit_is_taught_to_the_probability_it_is_given(processor):
    """A rare reasoning cannot be learned from -log p alone; no careful thought begins hastily."""
    scenes, lessons, _ = base.school("taught", 8)
    model, tokenizer = base.build_model(processor.tokenizer, 1), processor.tokenizer
    teacher = base.Teacher(model, tokenizer, scenes)
    odds = {"binary": -0.4, "choice": 0.0, "open": -9.2}
    items = teacher.tokenized(lessons, world.careful_response, odds)
    assert all(item.response[1] != teacher.haste for item in items)
    assert {item.odds for item in items} == {None, -0.4, 0.0, -9.2}
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    base.pretrain("habit", 60, lambda n: teacher.study(items), [optimizer])
    for item in (item for item in items if item.odds is not None):
        row = torch.tensor([item.prompt + item.response[:1]])
        with torch.no_grad():
            logits = model(row, pixel_values=teacher.pixels[list(item.images)].flatten(0, 1),
                           image_grid_thw=torch.tensor([[1, 6, 6]]),
                           mm_token_type_ids=(row == model.config.image_token_id).int()).logits[0, -1]
        p = logits.softmax(-1)[teacher.haste].double()
        assert torch.log((1 - p) / p).item() == pytest.approx(item.odds, abs=2.0)


@pytest.mark.slow
def test_a_base_is_built_from_nothing(tmp_path):
    """Pre-training teaches no decision, the habit almost nothing else: no weight may be lost."""
    for name in ("careful", "base"):
        (tmp_path / name).mkdir()
    base.build_careful(tmp_path / "careful", 0, 2, count=40)
    base.build_base(tmp_path / "base", tmp_path / "careful", 0, (0.15, 0.15, 0.001), steps=2)
    before, after = (base.Model.from_pretrained(tmp_path / name).state_dict() for name in ("careful", "base"))
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert Processor.from_pretrained(tmp_path / "base").tokenizer.chat_template


def test_finished_work_is_kept_and_foreign_folders_are_refused(tmp_path):
    built = []
    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        base.make(tmp_path / "x", settings, built.append)
    assert len(built) == 2
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError):
        base.make(tmp_path / "mine", {}, built.append)
