"""What a run needs, estimated, against the same step added up on fake tensors at full size."""

from pathlib import Path

import pytest
import torch
import transformers
from tools import memory
from tools.memory import check_memory, configuration, memory_needed, peak, simulate
from tools.rehearse import real_config

from currreft import Config
from distributed import UserError


def settings(**flags):
    return Config(data="d", dtype="bfloat16", **flags)


def test_memory_of_the_real_3b_configuration():
    """3,754,622,976 parameters, the tied head counted once."""
    config = transformers.Qwen2_5_VLConfig(**real_config())
    one, eight = (memory_needed(config, settings(checkpoint_activations=True), ranks) for ranks in (1, 8))
    assert one["weights"] == one["gradients"] == one["reference"] == 2 * 3_754_622_976
    assert one["optimizer"] == 12 * 3_754_622_976 and eight["optimizer"] == one["optimizer"] // 8
    assert 68e9 < sum(one.values()) < 80e9 and sum(eight.values()) < 40e9
    less = memory_needed(config, settings(beta=0.0, freeze_vision=True), 1)
    assert less["reference"] == 0 and less["gradients"] < one["gradients"]
    assert memory_needed(config, settings(), 1)["activations"] > 5 * one["activations"]


def test_the_longest_prompt_that_was_read_decides_not_a_guess(monkeypatch):
    """64 rows of 4,096-token prompts, each with a copy, need a cache of 10 GiB, not of 2.8; shared by groups, of 3.4."""
    config = configuration("3b")
    short, long = (memory_needed(config, settings(), 1, length) for length in (None, 4096))
    assert short["cache"] < 3 * 2**30 and long["activations"] > short["activations"]
    assert long["cache"] == (64 * 512 + 16 * 4096) * 36 * 2 * 128 * 2 * 2
    monkeypatch.setattr(memory.engine, "shares_prompts", lambda *_: False)
    assert memory_needed(config, settings(), 1, 4096)["cache"] > 10 * 2**30


def test_whole_tensors_are_dealt_out_to_ranks():
    """The rank that owns the embedding holds all of it, on however many ranks."""
    needed = memory_needed(configuration("3b"), settings(), 32)
    assert needed["optimizer"] == 12 * 151_936 * 2048


@pytest.mark.parametrize("size, ranks, flags, length", [
    pytest.param("3b", 1, {"checkpoint_activations": True}, None, marks=pytest.mark.slow),
    pytest.param("3b", 8, {}, 1500, marks=pytest.mark.slow),
    pytest.param("7b", 1, {"checkpoint_activations": True, "offload": True}, None, marks=pytest.mark.slow)])
def test_the_estimate_is_within_five_percent_of_the_step_added_up(size, ranks, flags, length):
    config, cfg = configuration(size), settings(**flags)
    estimated, peaks = peak(memory_needed(config, cfg, ranks, length), cfg), simulate(config, cfg, ranks, length)
    assert estimated == pytest.approx(max(peaks.values()), rel=0.05), peaks
    assert peaks["rollout"] < peaks["backward"]


def test_what_lives_is_counted_once_and_forgotten_when_it_goes():
    with memory.Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert live.now == 4000
        c = a + 1
        del a, c
        assert (live.now, live.peak) == (4000, 8000)
        del b
        assert live.now == 0


def test_what_cannot_fit_is_refused_with_a_sentence(monkeypatch):
    needed = {"weights": 8 * 2**30, "gradients": 0, "reference": 0, "optimizer": 0, "cache": 2**40}
    said = []
    with pytest.raises(UserError, match="about 1,032 GiB in each process, most of it for cache"):
        check_memory(needed, settings(), said.append)
    assert "1032.0 GiB" in said[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 6 * 2**30}))
    with pytest.raises(UserError, match="9.0 GiB on each GPU, which has 6.0"):
        check_memory(needed, settings(), said.append)


def test_the_table_in_the_docs_is_what_the_command_estimates():
    """All columns but the last, which takes the command minutes to add up."""
    written = [text for text in (Path(__file__).parents[1] / "docs" / "3b.md").read_text().splitlines()
               if text.startswith(("| 3b |", "| 7b |"))]
    assert len(written) == len(memory.CARDS)
    for text, (size, ranks, card, flags) in zip(written, memory.CARDS):
        cfg = settings(**flags)
        needed = memory_needed(configuration(size), cfg, ranks)
        figures = [f"{value / 2**30:.1f}" for value in (*needed.values(), peak(needed, cfg))]
        cells = [cell.strip() for cell in text.strip("|").split("|")]
        assert cells[:2] == [size, f"{ranks} x {card} GB"] and cells[3:-1] == figures
        assert float(cells[-1]) == pytest.approx(float(cells[-2]), rel=0.05)
