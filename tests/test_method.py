"""The method, recomputed by hand: whole steps of a run against plain transformers, scalars and a fresh AdamW.

Rewards depend on the question and on the answer, the temperature is not 1, and there are two stages. So these tests
fail if rewards meet the wrong question, if random numbers come again, if policy or reference are scored without the
temperature, if kl is divided by anything but tokens, if the format reward is left out of the advantages, and if the
optimizer outlives its stage. (Each of these was planted once, and passed all other tests.)
"""

import json
import math
import shutil
import signal
import zlib
from pathlib import Path

import pytest
import torch
import transformers

import currreft
from currreft import main
from data import load_examples
from support.tiny import tiny_checkpoint, tiny_data

T, BETA, LR, G, P, LENGTH = 0.7, 0.5, 1e-2, 4, 2, 6


def accuracy_of(text, problem):
    """In [0, 1], and another for every question and answer."""
    return zlib.crc32(f"{problem}|{text}".encode()) % 11 / 10


def format_of(text):
    """0 or 1, and not the accuracy."""
    return float(zlib.crc32(f"format {text}".encode()) % 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("method")
    return tiny_checkpoint(path / "model"), tiny_data(path / "data")


@pytest.fixture
def recorded(monkeypatch):
    """What every call of generate was given, and what it returned: [(prompts, seeds, groups)]."""
    monkeypatch.setattr(currreft, "accuracy_reward", lambda text, example, **_: accuracy_of(text, example.problem))
    monkeypatch.setattr(currreft, "format_reward", lambda text, example: format_of(text))
    calls, original = [], currreft.generate

    def recording(model, processor, prompts, *args, seeds, **kwargs):
        calls.append((prompts, seeds, original(model, processor, prompts, *args, seeds=seeds, **kwargs)))
        return calls[-1][2]
    monkeypatch.setattr(currreft, "generate", recording)
    return calls


def load(path):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).train()


def logps_by_hand(model, processor, prompt, tokens):
    """log pi of one completion's tokens: one unpadded sequence, transformers' own attention and full logits."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens)])
    images = {} if prompt.pixel_values is None else {
        "pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    logits = model(input_ids=ids[None], mm_token_type_ids=(ids == processor.image_token_id).int()[None],
                   **images).logits[0, len(prompt.input_ids) - 1:-1].float()
    logits = logits / T
    logits[:, list(processor.forbidden_ids(logits.shape[1]))] = -math.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def question_in(processor, prompt, problems):
    """The question that a prompt really asks, read off its tokens."""
    text = processor.tokenizer.decode(prompt.input_ids)
    (found,) = {problem for problem in problems if problem + "\nFirst think" in text}
    return found


def step_by_hand(model, reference, processor, prompts, groups, problems):
    """(log line, gradients left on the model) of one GRPO step, sequence by sequence, in plain arithmetic."""
    kl, gap, tokens, rewards_of, all_rewards, lengths = 0.0, 0.0, 0, [], [], []
    for prompt, group in zip(prompts, groups):
        problem = question_in(processor, prompt, problems)
        rewards = [accuracy_of(o.text, problem) + format_of(o.text) for o in group]
        mean = sum(rewards) / G
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (G - 1))
        rewards_of.append(std)
        for o, reward in zip(group, rewards):
            logp = logps_by_hand(model, processor, prompt, o.tokens)
            with torch.no_grad():
                difference = logps_by_hand(reference, processor, prompt, o.tokens) - logp
            ratio = (logp - logp.detach()).exp()
            k3 = (difference + logp.detach() - logp).exp() - (difference + logp.detach() - logp) - 1
            advantage = (reward - mean) / (std + 1e-4)
            (-(ratio * advantage - BETA * k3).mean() / (P * G)).backward()
            kl, gap, tokens = kl + k3.sum().item(), gap + (logp - o.logps).abs().sum().item(), tokens + len(o.tokens)
            all_rewards.append(reward)
            lengths.append(len(o.tokens))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    return {"reward": sum(all_rewards) / len(all_rewards), "reward_std": sum(rewards_of) / P, "kl": kl / tokens,
            "logp_gap": gap / tokens, "grad_norm": norm, "completion_length": sum(lengths) / len(lengths)}


def test_every_step_of_two_stages_equals_its_computation_by_hand(base, recorded, tmp_path):
    model_path, data = base
    run = tmp_path / "run"
    main(["--model", str(model_path), "--data", str(data), "--out", str(run), "--stages", "open:3", "choice:2",
          "--prompts_per_step", str(P), "--num_generations", str(G), "--max_completion_length", str(LENGTH),
          "--temperature", str(T), "--beta", str(BETA), "--lr", str(LR), "--lr_schedule", "constant",
          "--save_every", "1", "--keep", "9", "--threads", "1", "--eval_limit", "1"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    problems = {example.problem for form in ("open", "choice")
                for example in load_examples(data / "grpo_data" / "train" / f"{form}.jsonl", image_root=data)}
    stage_ends = [model_path, run / "stages" / "1-open", run / "stages" / "2-choice"]
    weights = [model_path, *(run / "checkpoints" / f"{n:07d}" for n in (1, 2)), stage_ends[1],
               run / "checkpoints" / "0000004", stage_ends[2]]
    processor = currreft.Processor.from_pretrained(model_path)
    optimizer = None
    for n, (line, (prompts, seeds, groups)) in enumerate(zip(lines, recorded, strict=True)):
        model, reference = load(weights[n]), load(stage_ends[line["stage_index"]])
        by_hand = step_by_hand(model, reference, processor, prompts, groups, problems)
        for name, value in by_hand.items():
            assert line[name] == pytest.approx(value, rel=2e-3, abs=2e-6), (n, name)
        assert line["kl"] > 1e-4 or line["stage_step"] == 1, "the policy has left its reference"
        # a stage begins with fresh moments: its first AdamW step is lr * sign(gradient), about
        moments = None if line["stage_step"] == 1 else optimizer.state_dict()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        if moments:
            optimizer.load_state_dict(moments)
        optimizer.step()
        after = load(weights[n + 1]).state_dict()
        moved = torch.cat([(after[name] - value).flatten().abs() for name, value in model.state_dict().items()])
        assert moved.mean() < 0.02 * LR, (n, moved.mean())  # signs of gradients near zero may differ by rounding
    every_seed = [seed for _, seeds, _ in recorded for row in seeds for seed in row]
    assert len(set(every_seed)) == len(every_seed) == 5 * P * G, "a random number came twice"


@pytest.mark.parametrize("kept", [30, 49])
def test_the_window_of_advance_at_survives_a_resume(base, monkeypatch, tmp_path, kept):
    """The mean over 50 steps that ends a stage early spans steps before and after a resume."""
    monkeypatch.setattr(currreft, "accuracy_reward", lambda *_, **__: 1.0)
    monkeypatch.setattr(currreft, "format_reward", lambda *_: 0.0)
    log = currreft.Run.log

    def stopping(self, *args):
        means = log(self, *args)
        if self.global_step == kept:
            signal.raise_signal(signal.SIGTERM)
        return means
    monkeypatch.setattr(currreft.Run, "log", stopping)
    model, data = base
    (tmp_path / "data").mkdir()
    shutil.copytree(data / "images", tmp_path / "data" / "images")
    shutil.copytree(data / "grpo_data" / "train", tmp_path / "data" / "train")  # no test files: nothing to evaluate
    flags = ["--model", str(model), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--stages",
             "binary:60", "--prompts_per_step", "1", "--num_generations", "2", "--max_completion_length", "1",
             "--advance_at", "0.9", "--beta", "0", "--threads", "1", "--sample_every", "100"]
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 143
    main([*flags, "--resume"])
    lines = (Path(tmp_path) / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 50
