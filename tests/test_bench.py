"""The benchmark: each measure at a trivial size, and no comparison of work that is not the same."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.ground import Cost, build, compared, alternately, make_prompt, as_transformers, plain_inputs
from bench.rollouts import beside_vllm, engine_alone, shared_prompts, vllm_pair
from bench.updates import Turns, full_step, group_update, our_run
from engine import generate
from packed import attach_attention, forbidden_bias, pack, token_logps
from support.words import UserError


@pytest.fixture(scope="module")
def model():
    return build("demo")


SHAPE = {"B": 2, "G": 2, "P": 40, "C": 3}


@pytest.mark.slow
@pytest.mark.parametrize("flag, figures", [
    ("--prompts", {"once s", "copied / once", "cache ratio"}),
    ("--against=generate", {"engine tok/s", "generate / engine", "greedy tokens alike"})])
def test_every_table_is_json_with_the_machine(flag, figures, monkeypatch, capsys):
    monkeypatch.setattr("bench.__main__.LENGTHS", [SHAPE])
    assert main(["--size", "demo", "--repeats", "1", "--json", flag]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    measured = report.pop("B 2, G 2, P 40, C 3")
    assert set(report) == {"machine"} and "B 2, G 2, P 40, C 3" in printed.err
    assert report["machine"]["torch"] == torch.__version__
    assert figures <= set(measured) and measured.get("greedy tokens alike", 1) == 1


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, capsys):
    def measure(*_, P, **__):
        if P == 40:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return {"figure": 1.0}
    monkeypatch.setattr("bench.__main__.LENGTHS", [SHAPE, {**SHAPE, "P": 50}])
    monkeypatch.setattr("bench.__main__.shared_prompts", measure)
    assert main(["--size", "demo", "--prompts"]) == 0
    printed = capsys.readouterr()
    assert "did not fit                     CUDA out of memory.\n" in printed.out and "figure" in printed.out
    assert printed.err.endswith("did not fit in the memory that is there: B 2, G 2, P 40, C 3\n")


def test_a_rollout_alone_says_what_its_steps_must_read():
    """On a GPU: at most the bandwidth of a copy. One captured step counts once, here there are none."""
    figures = engine_alone("demo", "cpu", 1, **SHAPE)
    assert figures["graphs"] == 0 and 0 < figures["share of bandwidth"] < 1 and "engine tok/s" in figures


def test_the_real_size_needs_a_gpu_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--size", "3b"]) == 2 and "needs a GPU" in capsys.readouterr().err
    parameters = sum(p.numel() for p in build("3b", "meta")[0].parameters())
    assert parameters == 3_754_622_976, "that of Qwen/Qwen2.5-VL-3B-Instruct"


def test_costs_are_taken_in_turn_and_compared_by_cpu_seconds_on_a_cpu():
    calls = []
    functions = {"here": lambda: calls.append("here"),
                 "elsewhere": lambda: calls.append("elsewhere") or Cost(9.0, 4.0)}
    rounds = alternately(functions, 2)
    assert calls == ["here", "elsewhere"] * 3 and rounds[1]["here"].wall < 1
    assert [costs["elsewhere"] for costs in rounds] == [(9.0, 4.0)] * 3
    rounds = [{"a": Cost(50, 50), "b": Cost(1, 1)}] + [{"a": Cost(1, 2), "b": Cost(9, 4)}] * 2
    assert compared(rounds, "cpu") == {
        "a s": 1, "a CPU s": 2, "b s": 9, "b CPU s": 4, "b / a": 2}, "the first round warms up"
    assert compared(rounds, "cuda")["b / a"] == 9


def test_prompts_kept_once_are_measured_beside_copies():
    """Two groups of four, slots of 16: 4 prompts of 96 and 8 tails of 16, or 8 rows of 112."""
    figures = shared_prompts("demo", "cpu", 1, B=2, G=4, P=90, C=3)
    assert figures["cache ratio"] == pytest.approx((4 * 96 + 8 * 16) / (8 * 112))


def test_updates_do_the_same_work_packed_and_in_rows(model):
    """Log-probabilities of a packed group are those of the rows that it is measured beside."""
    prompt, group = make_prompt(model[1], 40), torch.tensor([[5, 6, 7], [8, 9, 10]])
    row = pack(attach_attention(model[0]), [prompt], [group.tolist()])
    ours = token_logps(model[0], row, 0 * forbidden_bias(*model).nan_to_num())
    rows = [replace(prompt, input_ids=torch.cat([prompt.input_ids, answer])) for answer in group]
    logits = as_transformers(model[0])(**plain_inputs(model[1], rows, "cpu"), logits_to_keep=4).logits
    theirs = logits[:, :-1].log_softmax(-1).gather(2, group[..., None])[..., 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert {"packed s", "separate / packed"} <= set(group_update("demo", "cpu", 1, G=2, P=40, C=3))


def test_a_step_trains_at_full_length_and_takes_turns(tmp_path):
    run = our_run("demo", "cpu", str(tmp_path), B=2, G=2, C=5, side=84, micro_batch=2)
    before, turns = run.policy.lm_head.weight.clone(), Turns(run)
    turns.on_train_begin()
    turns.on_step_end()
    assert (run.policy.lm_head.weight != before).any() and set(turns.rounds[0]) == {"ours", "TRL"}
    prompts = run.prompts(run.examples["open"])
    lengths = {len(o.tokens) for o in generate(run.policy.eval(), run.processor, prompts, 8, 50)[0]}
    assert lengths == {50}, "no completion may end early"
    figures = full_step("demo", "cpu", 1, B=2, G=2, C=3, side=84, offload=True, beta=0.0)
    assert figures["hours of 3,400 such steps"] == pytest.approx(3400 * figures["step s"] / 3600)


@pytest.mark.parametrize("missing", [None, "made for another torch"])
def test_without_trl_the_comparison_says_what_to_install(missing, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "trl", None)
    if missing:
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        (tmp_path / "torchvision.py").write_text(f"raise RuntimeError({missing!r})")
        monkeypatch.syspath_prepend(tmp_path)
    assert main(["--size", "demo", "--against", "trl"]) == 2
    said = capsys.readouterr().err
    assert "pip install trl torchvision" in said and (missing or "") in said


FAKE = """
__version__ = "0"
class SamplingParams:
    def __init__(self, **settings): self.__dict__ |= settings
class LLM:
    def __init__(self, model, **settings): assert settings["block_size"] == 32
    def reset_prefix_cache(self): pass
    def generate(self, prompts, settings, use_tqdm):
        class One: token_ids = [7] * LENGTH
        class Each: outputs = [One] * settings.n
        return [Each for _ in prompts]
"""


@pytest.mark.parametrize("length", ["settings.max_tokens", "2"])
def test_vllm_is_measured_in_a_process_of_its_own(length, tmp_path, monkeypatch):
    """Played by a module of its name; and refused where it answers at another length."""
    (tmp_path / "vllm.py").write_text(FAKE.replace("LENGTH", length))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vllm_pair.cache_clear()
    if length == "2":
        with pytest.raises(UserError, match="vLLM 0 eager answered at another length"):
            beside_vllm(sys.executable, "demo", "cpu", 1, **SHAPE)
        return
    figures = beside_vllm(sys.executable, "demo", "cpu", 1, **SHAPE)
    assert figures["engine CPU s"] > figures["vLLM 0 eager CPU s"] >= 0
    assert figures["greedy tokens alike"] < 0.5


@pytest.mark.parametrize("python, said", [(sys.executable, "--python must name a Python that"),
                                          ("/nowhere/python", "'/nowhere/python'")])
def test_without_vllm_the_comparison_says_what_to_name(python, said, monkeypatch, capsys, tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('no vLLM here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vllm_pair.cache_clear()
    assert main(["--size", "demo", "--against", "vllm", "--python", python]) == 2
    assert said in capsys.readouterr().err
