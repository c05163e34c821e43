"""Evaluation, pass@k, rejection sampling, and the command line around them."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from runs import refused

import sample
from data import load_examples
from engine import Completion, load_policy
from rewards import Example, is_correct
from sample import Rules, evaluate, kept_examples, main, pass_at_k, question_keys, rejection_sample, summarize
from support.files import sealed
from support.rows import find_files
from support.tiny import tiny_checkpoint, tiny_data, tiny_image
from support.words import RunError, UserError

RIGHT, WRONG = "<think>1 + 1 = 2</think><answer>2</answer>", "<think>hm</think><answer>3</answer>"
CASE = Example(problem="1 + 1?", solution="<answer>2</answer>")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(policy, processor, checkpoint, test examples, questions)."""
    path = tmp_path_factory.mktemp("world")
    checkpoint, data = tiny_checkpoint(path / "model"), tiny_data(path / "data")
    files = find_files(data)
    tests = [replace(e, split=split) for split, (form, file) in files["test"].items()
             for e in load_examples(file, image_root=data, form=form)]
    return *load_policy(checkpoint), checkpoint, tests, load_examples(files["questions"], image_root=data)


@pytest.fixture
def scripted(monkeypatch):
    """Let `generate` answer RIGHT or WRONG by a function of (prompt number, sample number)."""
    def script(answer):
        def generate(model, processor, prompts, n, *args, seeds, max_rows, on_finish, **_):
            groups = []
            for i in range(len(prompts)):
                groups.append([Completion([1, 2], torch.zeros(2), False, answer(i, s)) for s in range(n)])
                on_finish(i, groups[-1])
            return groups
        monkeypatch.setattr(sample, "generate", generate)
    return script


def test_pass_at_k_counts_the_subsets_that_hold_a_right_answer_and_refuses_what_cannot_be():
    for n, c in (1, 0), (1, 1), (4, 1), (5, 2), (6, 6):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    for counts in (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5):
        with pytest.raises(ValueError):
            pass_at_k(*counts)


def test_evaluation_counts_what_the_strict_scorer_says(world, scripted):
    examples = [*[replace(CASE, split="id")] * 2, replace(CASE, split="ood", task="classify", solution="3")]
    scripted(lambda i, s: RIGHT if (i, s) in ((0, 0), (0, 1), (1, 3)) else WRONG)
    splits, predictions = evaluate(*world[:2], examples, samples=4, temperature=1.0)
    both = pytest.approx((pass_at_k(4, 2, 2) + pass_at_k(4, 1, 2)) / 2)
    expected = {"accuracy": 3 / 8, "n": 2, "pass@1": 3 / 8, "pass@2": both, "pass@4": 1}
    assert {name: splits["id"]["math"][name] for name in expected} == expected
    assert splits["ood"]["classify"]["accuracy"] == 1 and splits["ood"]["all"] == splits["ood"]["classify"]
    assert [p["correct"] for p in predictions[:4]] == [True, True, False, False]
    assert summarize(predictions, 4) == splits


def test_evaluation_really_generates_and_is_repeatable(world):
    policy, processor, _, tests, _ = world
    first = evaluate(policy, processor, tests, max_completion_length=6, max_rows=2)
    assert first == evaluate(policy, processor, tests, max_completion_length=6)
    assert len(first[1]) == len(tests) and all(p["temperature"] == 0 and p["tokens"] <= 6 for p in first[1])


# ---- Rejection sampling ----

class Scripted(Rules):
    """A judge that scores by the answer's text."""

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, completion, example):
        return self.scores.get(completion, 0.0)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "kept.jsonl"


@pytest.fixture
def keep(world, out):
    """rejection_sample of examples by a table of scores; returns how many it kept."""
    def keep(examples, scores, samples=1, **settings):
        judge = Scripted(scores) if isinstance(scores, dict) else scores
        return rejection_sample(*world[:2], examples, out, judge=judge, samples=samples, **settings)
    return keep


@pytest.fixture
def plain(world):
    """Questions whose references do not compete: they have no reasoning."""
    return [replace(question, solution="x") for question in world[-1]]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def test_the_best_answer_above_the_threshold_is_kept(plain, scripted, keep, out):
    scripted(lambda i, s: [["bad", "good"], ["bad", "exactly 85"], ["better", "good"]][i % 3][s])
    plain = plain[:3]
    assert keep(plain, {"bad": 10.0, "good": 90.0, "better": 95.0, "exactly 85": 85.0}, 2) == 2
    rows = rows_of(out)
    keys = question_keys(plain)
    found = [(row["question"], row["messages"][-1]["content"], row["score"], row["judge"]) for row in rows]
    assert found == [(keys[0], "good", 90.0, "rules"), (keys[2], "better", 95.0, "rules")]
    assert [e.solution for e in kept_examples(out, plain)] == ["good", "better"]
    assert kept_examples(out, plain)[0] == replace(plain[0], solution="good"), "asked again exactly as it was"
    assert load_examples(out, image_root="/", allow_outside=True)[0].task == "general", "it is chat JSONL"


def test_the_reference_competes_where_it_has_reasoning(plain, scripted, keep, out):
    reference = replace(plain[0], solution="<think>because</think><answer>7</answer>")
    scripted(lambda i, s: "weak")
    both = [reference, replace(reference, solution="bare")]
    keep(both, {"weak": 86.0, reference.solution: 99.0, "bare": 99.0}, 4)
    assert [e.solution for e in kept_examples(out, both)] == [reference.solution, "weak"]


def test_an_outage_of_the_judge_costs_no_sample(plain, scripted, keep, out):
    scripted(lambda i, s: "fine")
    with pytest.raises(RunError, match="0 of 6 scores.*--resume"):
        keep(plain[:3], {"fine": None}, 2)
    assert not out.exists()
    scripted(lambda i, s: pytest.fail("nothing is left to sample"))
    assert keep(plain[:3], {"fine": 80.0}, 2) == 0 and keep(plain[:3], {}, 2, threshold=50) == 3


def test_scores_that_were_had_are_not_asked_for_again(plain, scripted, keep, out):
    scripted(lambda i, s: f"answer {s}")
    with pytest.raises(RunError, match="1 of 2 scores"):
        keep(plain[:1], {"answer 0": 86.0, "answer 1": None}, 2)
    assert keep(plain[:1], {"answer 0": 0.0, "answer 1": 99.0}, 2) == 1
    assert rows_of(out)[0]["messages"][-1]["content"] == "answer 1"
    last = rows_of(out.with_name("kept.jsonl.rank-0.partial"))[-1]
    assert last["scores"] == [86.0, 99.0] and last["answers"] == ["answer 0", "answer 1"], "all are kept"


def test_a_torn_or_damaged_line_costs_one_question(world, scripted, keep, out):
    questions, asked = world[-1][:4], []
    keys, row = question_keys(questions), {"sampled": ["", 1, 1.0, 512, 0], "answers": ["a"], "scores": [90.0]}
    rows = [json.dumps(sealed({"key": key, "judge": "rules", **row})) for key in keys]
    lines = [rows[0], rows[1][:-9], rows[2].replace("90.0", "99.0"), '{"key": 3}', "[]"]
    out.with_name("kept.jsonl.rank-0.partial").write_text("\n".join(lines))
    scripted(lambda i, s: asked.append(i) or "fine")
    assert keep(questions, {"fine": 91.0}) == 4
    assert len(asked) == 3 and [row["question"] for row in rows_of(out)] == keys


def test_an_answer_is_taken_up_if_sampled_alike_a_score_if_the_judge_is_the_same(plain, scripted, keep, out):
    asked = []
    scripted(lambda i, s: asked.append(i) or "fine")
    judge, other = Scripted({"fine": 90.0}), Scripted({"fine": 95.0})
    other.name = "another"

    def sample_again(judge, **settings):
        keep(plain[:1], judge, **settings)
        return rows_of(out)[0], len(asked)
    assert sample_again(judge, weights="a")[1] == sample_again(judge, weights="a")[1] == 1
    row, count = sample_again(other, weights="a")
    assert (row["judge"], row["score"], count) == ("another", 95.0, 1), "the same answers, judged anew"
    assert sample_again(other, weights="b")[1] == 2 and sample_again(other, weights="b", seed=1)[1] == 3


def test_kept_answers_meet_their_questions_by_what_these_say_never_by_place(plain, scripted, keep, out):
    scripted(lambda i, s: f"<think>about {i}</think>")
    keep(plain, {f"<think>about {i}</think>": 90.0 for i in range(9)})
    there, reversed_ = ({e.problem + str(e.images): e.solution for e in kept_examples(out, questions)}
                        for questions in (plain, plain[::-1]))
    assert there == reversed_
    scripted(lambda i, s: pytest.fail("reversing the questions costs no sample"))
    assert keep(plain[::-1], {}) == len(plain)
    with pytest.raises(UserError, match="kept from other questions: 1 of its"):
        kept_examples(out, plain[1:])


def test_the_kept_file_holds_each_question_as_it_was_asked(world, plain, scripted, keep, out):
    """Earlier turns, and the places of images: other trainers refuse rows whose images have none."""
    scripted(lambda i, s: "<think>so</think>")
    asked = [replace(plain[0], history=(("user", "And before?"), ("assistant", "Yes."))),
             next(question for question in plain if len(question.images) == 2)]
    keep(asked, {"<think>so</think>": 9.0}, threshold=0)
    rows, processor = rows_of(out), world[1]
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert sum(m["content"].count("<image>") for m in rows[1]["messages"]) == 2 == len(rows[1]["images"])
    for again, question in zip(load_examples(out, image_root="/", allow_outside=True), asked):
        assert processor(again).input_ids.equal(processor(question).input_ids), "read back as it was asked"


def test_the_rules_never_keep_a_wrong_answer(scripted, keep):
    scripted(lambda i, s: WRONG)
    assert not is_correct(WRONG, CASE) and keep([replace(CASE, solution="2")], Rules(), 2) == 0


# ---- Command line ----

def test_answer_prints_and_draws_the_box(world, tmp_path, monkeypatch, capsys):
    _, _, checkpoint, tests, _ = world
    image = next(e.images[0] for e in tests if e.images)
    text = '<think>there</think><answer>[{"bbox_2d": [2, 3, 40, 30]}]</answer>'
    monkeypatch.setattr(sample, "generate", lambda *_, **__: [[Completion([1], torch.zeros(1), False, text)]])
    main(["answer", "--model", str(checkpoint), "--image", image, "--question", "Where?", "--task", "detection",
          "--out", str(tmp_path / "a.png")])
    assert text in capsys.readouterr().out and Image.open(tmp_path / "a.png").size[0] > 0


def test_evaluate_takes_the_form_from_the_files_name(world, tmp_path, capsys):
    _, _, checkpoint, tests, _ = world
    file = next(e.where.rpartition(":")[0] for e in tests if e.form == "binary")
    root = file.split("grpo_data")[0]
    main(["evaluate", "--model", str(checkpoint), "--data", file, "--image_root", root, "--samples", "2",
          "--max_completion_length", "4", "--out", str(tmp_path / "p.jsonl")])
    rows = rows_of(tmp_path / "p.jsonl")
    assert rows and {row["form"] for row in rows} == {"binary"} and {row["temperature"] for row in rows} == {1.0}
    assert "pass@2" in capsys.readouterr().out


def test_evaluate_takes_a_run_and_a_data_directory_and_writes_beside_the_run(world, tmp_path):
    _, _, checkpoint, tests, _ = world
    for name in ("2-open", "10-sft"):
        shutil.copytree(checkpoint, tmp_path / "run" / "stages" / name)
    (tmp_path / "run" / "stages" / "2-open" / "model.safetensors").unlink()  # the last one is asked
    data = tests[0].where.split("grpo_data")[0]
    main(["evaluate", "--model", str(tmp_path / "run"), "--data", data, "--max_completion_length", "4"])
    rows = rows_of(tmp_path / "run" / "predictions.jsonl")
    assert {row["split"] for row in rows} == {*find_files(data)["test"]} and len(rows) == len(tests)


@pytest.mark.parametrize("argv, words", [
    (["evaluate", "--model", "nowhere-at-all/x/y", "--data", "nothing.jsonl"], "nowhere"),
    (["answer", "--model", "x", "--question", "?", "--image", "none.png"], "none.png"),
    (["answer", "--model", "x", "--question", "?", "--image", "strip.png"], "9000 x 50"),
    (["evaluate", "--model", "x", "--data", "x", "--device", "cuda"], "--device"),  # a GPU is taken if there is one
    (["answer", "--model", "x"], "--question"), (["dance"], "invalid choice")])
def test_mistakes_are_sentences(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_image(tmp_path / "strip.png", (9000, 50))
    assert words in refused(capsys, argv, program=main)
