"""The benchmark's own code: a measure that only a GPU takes for real must not fail there for the first time."""

import json
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tools.against as against
import tools.bench as bench
import tools.floor as floor
import tools.growth as growth
from currreft import token_logps
from distributed import UserError
from engine import attach_attention, forbidden_bias, pack
from tools.timing import Cost, compared, interleaved, make_prompt


@pytest.fixture(scope="module")
def model():
    """(a random model of the smallest size, its stand-in processor)."""
    return bench.build("demo", "cpu", torch.float32)


def test_every_measure_runs_at_a_trivial_size(model):
    figures = {
        **bench.rollout(*model, "cpu", 1, prompts=2, G=2, new=3, length=40),
        **bench.full_step(*model, "demo", "cpu", 1, P=40, C=3, G=2, prompts=2, groups=(2, 4)),
        **bench.patches(*model, "cpu", 1, count=1, P=40)}
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
                                         ("--prompts", "2 prompts of 40 tokens x 2, 3 new"),
                                         ("--against=generate", "rollout, 2 prompts of 40 tokens x 2, 3 new")])
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
    against.write_checkpoint("demo", tmp_path)
    step, run = against.our_step(tmp_path, against.write_examples(tmp_path, 2, 84), 2, 5)
    before = run.policy.lm_head.weight.clone()
    stats, _ = step(1)
    assert stats["completion_length"] == (2 * 2 * 5, 2 * 2), "no completion may end early"
    assert (run.policy.lm_head.weight != before).any()


def test_without_trl_the_comparison_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit):
        bench.main(["--size", "demo", "--against", "trl"])
    assert "pip install trl torchvision" in capsys.readouterr().err


def test_costs_are_interleaved_and_compared_by_cpu_seconds_on_a_cpu():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or (Cost(9.0, 4.0) if name == "elsewhere" else [1])
                 for name in ("here", "elsewhere")}
    costs = interleaved(functions, "cpu", 2)
    assert calls == ["here", "elsewhere"] * 3 and costs["elsewhere"] == (9.0, 4.0) and costs["here"].wall < 1
    figures = compared({"a": Cost(1.0, 2.0), "b": Cost(9.0, 4.0)}, "cpu")
    assert figures == {"a s": 1.0, "a CPU s": 2.0, "b s": 9.0, "b CPU s": 4.0, "b / a": 2.0}
    assert compared({"a": Cost(1.0, 2.0), "b": Cost(9.0, 4.0)}, "cuda")["b / a"] == 9.0


# ---------------------------------------------------------------------------------------------------------------------
# Floors


@pytest.mark.parametrize("image", [0, 36])
def test_operations_are_those_that_torch_counts(model, image):
    """torch counts every product of a real forward pass. Its attention works in rectangles; what is seen is needed."""
    P, C, G = 70, 9, 3
    packed = pack(attach_attention(model[0]), [make_prompt(*model, P, image=image)], [[[1] * C for _ in range(G)]])
    with FlopCounterMode(display=False) as counter:
        token_logps(model[0], packed, forbidden_bias(*model))
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in counted.items() if "attention" not in op and "bmm" not in op)  # bmm: angles
    pairs = sum(range(1, P + 1)) + G * sum(P + t for t in range(1, C + 1))
    assert floor.group_operations(model[0], P, C, G, 4 * image) == products + 4 * pairs * 128 * 4


def test_a_rollouts_parts_add_up_and_have_floors_below_them(model):
    figures = floor.decode_parts(*model, 1, 2, 2, 40, 6)
    parts = [name for name in figures if name.endswith(" CPU s") and name != "rollout CPU s"]
    assert sum(figures[name] for name in parts) == pytest.approx(figures["rollout CPU s"])
    assert all(figures[name] > 0 for name in parts) and len(parts) == 8
    assert 0 < figures["rollout, floor s"] < figures["rollout CPU s"]
    figures = floor.update_parts(*model, 1, 1, 2, 40, 6)
    assert figures["backward, floor s"] == pytest.approx(2 * figures["policy forward, floor s"])


def test_a_call_within_a_counted_one_is_counted_once():
    clock = floor.Clock()
    inner = clock.counted("inner", lambda: sum(range(10**6)))
    clock.counted("outer", lambda: inner() + inner())()
    assert set(clock.seconds) == {"outer"} and clock.seconds["outer"] > 0
    start = time.process_time()
    inner()
    assert 0 < clock.seconds["inner"] <= time.process_time() - start


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, played by a module of its name; growth


FAKE = """
__version__ = "0"
class SamplingParams:
    def __init__(self, **settings): self.__dict__ |= settings
class LLM:
    def __init__(self, model, **settings): assert settings["max_model_len"] == 40 + 3 + 16
    def reset_prefix_cache(self): pass
    def generate(self, prompts, settings, use_tqdm):
        class One: token_ids = [7] * LENGTH
        class Each: outputs = [One] * settings.n
        return [Each for _ in prompts]
"""


def play_vllm(folder, monkeypatch, length):
    """A Python with a vLLM that answers tokens 7, as many as `length` says."""
    (folder / "vllm.py").write_text(FAKE.replace("LENGTH", length))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return against.against_vllm("demo", "cpu", 1, sys.executable, [(2, 2, 40, 3)])


def test_vllm_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    (measure,) = play_vllm(tmp_path, monkeypatch, "settings.max_tokens").values()
    figures = measure()
    assert figures["engine CPU s"] > figures["vLLM eager CPU s"] >= 0 and figures["vLLM"] == "0"
    assert 0 <= figures["greedy tokens alike"] < 0.5


def test_vllm_that_answers_at_another_length_is_no_comparison(tmp_path, monkeypatch):
    (measure,) = play_vllm(tmp_path, monkeypatch, "2").values()
    with pytest.raises(UserError, match="another length"):
        measure()


@pytest.mark.parametrize("python, said", [(sys.executable, "vLLM ended: ModuleNotFoundError: No module named 'vllm'"),
                                          ("/nowhere/python", "--python /nowhere/python cannot be started")])
def test_without_vllm_the_comparison_says_what_to_name(python, said, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--size", "demo", "--against", "vllm", "--python", python])
    assert said in capsys.readouterr().err


def test_growth_is_measured_at_a_trivial_size(model):
    base = dict(prompts=1, G=2, P=40, C=3, image=16)
    figures = growth.grown(*model, 1, base, grown={"P": (60,), "image": (36,)})
    assert set(figures) == {f"{case}, {part}" for case in ("prompt tokens 40 -> 60", "picture tokens 16 -> 36")
                            for part in ("rollout", "update")} | {"base, rollout CPU s", "base, update CPU s"}
    long = growth.long_work("demo", count=8, samples=2, new=2)
    assert {f"{work}, quarter {i}: answers/s" for i in (1, 2, 3, 4)
            for work in ("evaluation", "rejection sampling")} <= set(long)
    assert set(growth.start_up("demo", sizes=(20, 40), pictures=3)) == {"20 rows s", "40 rows s"}


@pytest.mark.slow
def test_steps_on_two_ranks_are_measured_beside_one():
    figures = growth.ranks("demo", 1, prompts=2, G=2, new=3)
    assert figures["speed-up of the same work"] == figures["1 rank s"] / figures["2 ranks, the same work s"]
