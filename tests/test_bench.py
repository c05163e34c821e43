"""The benchmark's own code: a measure that only a GPU takes for real must not fail there for the first time."""

import json
import sys

import tools.bench as bench
import pytest
import torch


@pytest.fixture(scope="module")
def model():
    """(a random model of the smallest size, its stand-in processor)."""
    return bench.build("demo", "cpu", torch.float32)


def test_every_measure_runs_at_a_trivial_size(model):
    figures = {
        **bench.rollout(*model, "cpu", 1, prompts=2, G=2, new=3, length=40),
        **bench.full_step(*model, "demo", "cpu", 1, P=40, C=3, G=2, prompts=2, groups=(2, 4)),
        **bench.scaling(*model, "cpu", 1, P=40, C=2), **bench.patches(*model, "cpu", 1, count=1, P=40)}
    for separate in (False, True):
        bench.group_update(*model, P=40, C=3, G=2, separate=separate)()
    varied = bench.varied_updates(*model, P=40, C=8, G=2, groups=3)
    varied()
    assert 3 * (20 + 2 * 2) <= varied.tokens <= 3 * (40 + 2 * 8)
    assert {"engine tok/s", "share of bandwidth", "rollout s", "reference s", "update s", "optimizer s"} <= set(figures)
    assert figures["largest G that fits"] == "4 of (2, 4)"


def test_prompts_kept_once_are_measured_beside_copies(model):
    """Two groups of four, in slots of 16: room for 4 prompts of 96 and 8 tails of 16, beside 8 rows of 112."""
    figures = bench.shared_prompts(*model, "cpu", 1, 2, 4, 90, 3)
    assert figures["cache ratio"] == pytest.approx((4 * 96 + 8 * 16) / (8 * 112))


@pytest.mark.parametrize("flag, title", [("--rewards", "rewards, slowest of accuracy and quality"),
                                         ("--prompts", "2 prompts of 40 tokens x 2, 3 new")])
def test_every_table_is_printed_as_json_with_the_machine(flag, title, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", [(2, 2, 40, 3)])
    bench.main(["--size", "demo", "--repeats", "1", "--json", flag])
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["torch"] == torch.__version__ and set(report) == {"machine", title} and report[title]


def test_the_largest_group_is_the_last_before_memory_runs_out(model, monkeypatch):
    inner = bench.generate

    def small_card(policy, processor, batch, G, *args):
        if G > 4:
            raise torch.OutOfMemoryError
        return inner(policy, processor, batch, G, *args)
    monkeypatch.setattr(bench, "generate", small_card)
    figures = bench.full_step(*model, "demo", "cpu", 1, P=40, C=2, G=2, prompts=1, groups=(2, 4, 8, 16))
    assert figures["largest G that fits"] == "4 of (2, 4, 8, 16)"


def test_the_slowest_rewards_are_measured():
    assert {"boxes, 64 x 64", "slowest text, math"} <= set(bench.slowest_rewards())


def test_hours_of_the_released_schedule():
    """3400 steps of an hour, 3000 questions x 8 at the same rate, and nothing that an update would cost."""
    seconds = {"rollout": 3600.0, "reference": 0.0, "update": 0.0, "optimizer": 0.0}
    assert bench.schedule(seconds, P=100, C=100, G=8, prompts=8).startswith("3775.0 h on one device: RL 3400.0")


def test_our_side_of_the_comparison_trains_at_full_length(tmp_path):
    bench.write_checkpoint("demo", tmp_path)
    step, run = bench.our_step(tmp_path, bench.write_examples(tmp_path, 2, 84), 2, 5)
    before = run.policy.lm_head.weight.clone()
    stats, _ = step(1)
    assert stats["completion_length"] == (2 * 2 * 5, 2 * 2), "no completion may end early"
    assert (run.policy.lm_head.weight != before).any()


def test_without_trl_the_comparison_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit):
        bench.main(["--against_trl"])
    assert "pip install trl torchvision" in capsys.readouterr().err
