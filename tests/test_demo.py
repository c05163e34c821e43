"""The shapes world of demo/: what the pictures, the data set and the tokenizer promise."""

import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

import data
from answers import iou
from demo import base, world
from tools.blind import blind_accuracy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A written data set."""
    path = tmp_path_factory.mktemp("demo") / "data"
    base.make(path, {"seed": 3}, lambda aside: world.write_data(aside, 3))
    return path


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """data.Processor on a saved, untrained tiny model."""
    rng = random.Random(0)
    scenes = [world.random_scene(rng) for _ in range(60)]
    lessons = [base.lesson(scenes, n // 4, rng) for n in range(240)]
    tokenizer = base.corpus_tokenizer(lessons)
    path = tmp_path_factory.mktemp("base")
    base.save(path, base.build_model(tokenizer, 0), tokenizer)
    return data.Processor.from_pretrained(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_drawing_and_data_set_are_functions_of_the_seed(folder, tmp_path):
    world.write_data(tmp_path, 3)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) > 1000
    assert all((tmp_path / f).read_bytes() == (folder / f).read_bytes() for f in files)


def test_every_file_loads(folder):
    found = data.find_files(folder)
    for form, path in found["train"].items():
        examples = data.load_examples(path, image_root=folder)
        assert len(examples) == 720 or form != "open" and 480 < len(examples) < 720  # those that share candidates
        assert {e.form for e in examples} == {form}
        assert {e.task for e in examples} == {"detection", "classify", "math"}
        assert {e.size for e in examples} == {(84, 84)}
    assert set(found["test"]) == {"binary_id", "choice_id", "open_id", "open_ood_pairs", "open_ood_more", "general"}
    for form, path in found["test"].values():
        assert {e.form for e in data.load_examples(path, image_root=folder)} == {form}
    general = data.load_examples(folder / "SFT_data/reject/questions.jsonl", image_root=folder)
    assert {len(e.images) for e in general} == {0, 1, 2} and {e.task for e in general} == {"general"}


def test_no_held_out_pair_and_no_crowd_in_training():
    rng = random.Random(0)
    scenes = [world.random_scene(rng) for _ in range(2000)]
    assert {str(s) for scene in scenes for s in scene} == {" ".join(pair) for pair in world.SEEN}
    assert {len(scene) for scene in scenes} == {1, 2, 3}
    held_out = {" ".join(pair) for pair in world.HELD_OUT}
    for _ in range(200):
        assert held_out & {str(s) for s in world.random_scene(rng, held_out=True)}


def test_boxes_hold_what_is_drawn():
    rng = random.Random(1)
    for _ in range(100):
        scene = world.random_scene(rng)
        with_all = np.asarray(world.draw(scene)).astype(int)
        for n, shape in enumerate(scene):
            without = np.asarray(world.draw(scene[:n] + scene[n + 1:])).astype(int)
            ys, xs = np.nonzero((with_all != without).any(-1))
            drawn = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            x0, y0, x1, y1 = world.cell_box(shape.cell)
            assert x0 <= drawn[0] and y0 <= drawn[1] and x1 >= drawn[2] and y1 >= drawn[3]
            assert iou(drawn, world.cell_box(shape.cell)) > 0.6


@pytest.mark.slow
def test_only_the_leaky_data_tells_without_a_look(folder, tmp_path):
    def excess(path, form, task):
        """Points above chance of the learner that sees no image."""
        rows = data.load_examples(path / f"grpo_data/train/{form}.jsonl", image_root=path, form=form)
        share, chance, _ = blind_accuracy([e for e in rows if e.task == task])
        return 100 * (share - chance)
    world.write_data(tmp_path, 3, leaky=True)
    for form, task in itertools.product(("binary", "choice"), ("detection", "math")):
        assert excess(folder, form, task) < 10 and excess(tmp_path, form, task) > 15, (form, task)
    for name in ("grpo_data/train/open.jsonl", "grpo_data/test/choice_id.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()  # the rest is the same


def test_answers_of_several_parts_are_those_of_the_scene(tmp_path):
    """Each part is read off the scene again, from the words of the question alone."""
    rng = random.Random(4)
    for n in range(300):
        scene = world.parts_scene(rng)
        question = world.parts_question(scene, rng, 1 + n % 3)
        text = question.problem.removeprefix("What is ").removesuffix("?")
        asked, found = re.split(", | and ", text), []
        for part in asked:
            words = part.split()
            if words[1] == "number":
                word = words[3].removesuffix("es") if words[3] == "crosses" else words[3].removesuffix("s")
                found.append(sum(word in (s.color, s.kind) for s in scene))
            else:
                shapes = [s for s in scene if part.endswith(f"the {s}") or part.endswith("the last object")]
                found.append(shapes[-1].cell + 1)
        assert question.answer == ", ".join(map(str, found)) and len(asked) == 1 + n % 3
        response = world.careful_response(question, world.example_of(question, "x.png"))
        assert data.answer_of(response) == question.answer


def test_the_base_of_the_world_of_parts_is_taught_right_answers():
    rng = random.Random(6)
    scenes = [world.parts_scene(rng) for _ in range(50)]
    forms = set()
    for n in range(400):
        _, question, example = base.parts_lesson(scenes, n % 50, rng)
        forms.add(example.form)
        assert data.answer_of(world.careful_response(question, example)) == data.answer_of(example.solution)
    assert forms == {"binary", "choice", "open"}


def test_parts_are_asked_one_by_one_before_they_are_asked_together(tmp_path):
    for parts in (1, 3):
        world.write_parts(tmp_path / str(parts), 0, parts)
    one, three = (tmp_path / name / "grpo_data/train" for name in "13")
    assert (one / "choice.jsonl").read_bytes() == (three / "choice.jsonl").read_bytes()
    assert all(row["solution"].count(",") == 2 for row in read(three / "open.jsonl"))
    assert not any("," in row["solution"] for row in read(one / "open.jsonl"))
    assert not any("the cell" in row["problem"].partition("the cell")[2].partition("\n")[0]
                   for row in read(three / "binary.jsonl"))


def test_wrong_boxes_look_like_right_ones(folder):
    # A true box that is recognizable by its numbers alone would make detection a text problem.
    answers = {"yes": 0, "no": 0}
    for e in data.load_examples(data.find_files(folder)["train"]["binary"], image_root=folder):
        if e.task == "detection":
            box = json.loads(data.BOX.search(e.problem)[0])
            assert box in [world.cell_box(cell) for cell in range(9)]
            answers[data.answer_of(e.solution)] += 1
    assert min(answers.values()) > 0.35 * sum(answers.values())


def test_pre_training_sees_what_the_processor_makes(processor, tmp_path):
    rng = random.Random(2)
    scenes = [world.random_scene(rng) for _ in range(8)]
    for n, scene in enumerate(scenes):
        world.draw(scene).save(tmp_path / f"{n}.png")
    for n in range(40):
        images, _, example = base.lesson(scenes, n % 8, rng)
        files = tuple(str(tmp_path / f"{i}.png") for i in images)
        prompt = processor(data.replace(example, images=files))
        ids = processor.tokenizer(base.prompt_text(processor.tokenizer, example))["input_ids"]
        assert prompt.input_ids.tolist() == ids
        if images:
            torch.testing.assert_close(prompt.pixel_values, base.patches([scenes[i] for i in images]), atol=1e-5, rtol=0)


def test_tokenizer_round_trip(processor):
    texts = ['<think>red circle: top left</think><answer>[{"bbox_2d": [0, 28, 28, 56]}]</answer>', "Zwölf: 3.5 €?"]
    for text in texts:
        assert processor.decode(processor.response_ids(text)) == text
    ids = processor.response_ids("<answer>84</answer>")
    assert len(ids) == 4 and ids[-1] == processor.end_ids[0]


def test_responses_are_short_and_careful_ones_are_right(processor):
    rewards = pytest.importorskip("rewards")
    rng = random.Random(5)
    scenes = [world.random_scene(rng) for _ in range(100)]
    for n in range(400):
        _, question, example = base.lesson(scenes, n % 100, rng)
        response = world.careful_response(question, example)
        assert len(processor.response_ids(response)) <= 64
        if example.task != "general":
            assert rewards.is_correct(response, example) and rewards.format_reward(response, example) == 1


def test_a_hasty_answer_to_an_open_question_never_scores(processor):
    from rewards import accuracy_reward, format_reward
    rng, guessed = random.Random(6), []
    scenes = [world.random_scene(rng) for _ in range(50)]
    for n in range(600):
        _, question, example = base.lesson(scenes, n % 50, rng)
        response = world.hasty_response(question, example, rng)
        if example.task != "general":
            assert format_reward(response, example) == 1
            if example.form == "open":
                assert accuracy_reward(response, example) == 0
            elif example.form == "binary":
                guessed.append(accuracy_reward(response, example))
    assert 0.35 < sum(guessed) / len(guessed) < 0.65


@pytest.mark.slow
def test_the_habit_is_taught_to_the_probability_it_is_given(processor):
    """A rare reasoning cannot be learned from -log p alone; and no careful thought begins like a hasty one."""
    rng = random.Random(7)
    scenes = [world.random_scene(rng) for _ in range(8)]
    lessons = [base.lesson(scenes, n // 4, rng) for n in range(32)]
    tokenizer = processor.tokenizer
    model = base.build_model(tokenizer, 1)
    teacher = base.Teacher(model, tokenizer, scenes)
    odds = {"binary": -0.4, "choice": 0.0, "open": -9.2}
    items = teacher.items(lessons, lambda row: world.careful_response(row.question, row.example), odds)
    assert all(item.response[1] != teacher.haste for item in items)
    assert {item.odds for item in items} == {None, -0.4, 0.0, -9.2}
    base.train("habit", 60, lambda n: teacher.study(items), [base.adamw(model.parameters(), 3e-3)])
    for item in (item for item in items if item.odds is not None and not item.images[1:]):
        row = torch.tensor([item.prompt + item.response[:1]])
        grid = torch.tensor([[1, 6, 6]] * len(item.images))
        with torch.no_grad():
            logits = model(row, pixel_values=teacher.pixels[list(item.images)].flatten(0, 1), image_grid_thw=grid,
                           mm_token_type_ids=(row == model.config.image_token_id).int()).logits[0, -1]
        p = logits.softmax(-1)[teacher.haste].double()
        assert torch.log((1 - p) / p).item() == pytest.approx(item.odds, abs=2.0)


@pytest.mark.slow
def test_a_base_is_built_from_nothing(tmp_path):
    """Pre-training holds no decision to teach, the habit almost nothing else: neither may leave a weight non-finite."""
    for name in ("careful", "base"):
        (tmp_path / name).mkdir()
    base.build_careful(tmp_path / "careful", 0, 2, count=40)
    base.build_base(tmp_path / "base", tmp_path / "careful", 0, base.REASONS, steps=2)
    before, after = (base.Model.from_pretrained(tmp_path / name).state_dict() for name in ("careful", "base"))
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert data.Processor.from_pretrained(tmp_path / "base").tokenizer.chat_template


def test_orthogonal_moves_every_singular_value_near_one():
    for shape in ((3, 20, 50), (2, 50, 20)):
        values = torch.linalg.svdvals(base.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert 0.6 < values.min() and values.max() < 1.3


def test_finished_work_is_kept_and_foreign_folders_are_refused(tmp_path):
    built = []
    for settings in ({"seed": 0}, {"seed": 0}, {"seed": 1}):
        base.make(tmp_path / "x", settings, lambda aside: built.append(aside))
    assert len(built) == 2
    (tmp_path / "mine").mkdir()
    with pytest.raises(data.UserError):
        base.make(tmp_path / "mine", {}, built.append)
