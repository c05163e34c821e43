"""A rehearsal of the whole run on the real Qwen2.5-VL-3B without its weights.

    python -m tools.rehearse    on a GPU of 80 GB all 3.75 B parameters, 100 GB in TMPDIR; else shrunk

The released configuration and files (flat config, tokens at their ids, two end tokens, a template
of its own for images, a head wider than the tokenizer) pass through every phase of the command
line, and come out as a checkpoint that plain transformers opens with the same logits. It shows
nothing about learning or speed: weights are random, RL is given a stand-in reward that differs
between answers, and rejection sampling keeps reference answers. The merges are not Qwen's.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import transformers

import currreft
from data import load_examples
from engine import load_policy
from packed import pack, packed_hidden
from support.directory import RunDirectory
from support.ranks import usable_gpu
from support.tiny import SPECIAL_TOKENS, TEMPLATE, tiny_data, tiny_tokenizer
from support.words import command

# config.json, generation_config.json and preprocessor_config.json of Qwen/Qwen2.5-VL-3B-Instruct, in
# the layout of their release (text settings lie flat)
RELEASED = Path(__file__).parent / "released"
ORDINARY = 151_643  # tokens before the first special one
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]  # added, but not special
# tokenizer_config.json has the text models' template, which fails on an image; the one for images
# is in chat_template.json. Both are shortened here to what matters.
TEXT_TEMPLATE = """{% for message in messages %}\
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"""


def real_config(width=1):
    """The released config.json as a dict; with width > 1 that much narrower and fewer layers deep.

    Head sizes (128 and 80), hence rotary sections, the windows, one full layer in eight, and the
    vocabulary stay.
    """
    config = json.loads((RELEASED / "config.json").read_text())
    if width > 1:
        vision = config["vision_config"]
        for sizes in (config, vision):
            for name in {"hidden_size", "intermediate_size", "num_attention_heads", "num_heads",
                         "out_hidden_size"} & sizes.keys():
                sizes[name] //= width
        config |= {"num_hidden_layers": 4, "num_key_value_heads": 1}
        vision |= {"depth": 8, "fullatt_block_indexes": [7]}
    return config


def write_tokenizer(path):
    """Qwen2.5-VL's files and shape: bytes, a few merges, filler, then 22 added tokens."""
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    model = tokenizer["model"]
    vocab = {token: i for token, i in model["vocab"].items() if i < 256 + len(model["merges"])}
    model["vocab"] = vocab | {f"Ġw{i}": i for i in range(len(vocab), ORDINARY)}
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {ORDINARY + i: {"content": name, **flags, "special": name in SPECIAL_TOKENS}
             for i, name in enumerate(SPECIAL_TOKENS + PLAIN)}
    tokenizer["added_tokens"] = [{"id": i, **token} for i, token in added.items()]
    (path / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
    for name, value in (
            ("tokenizer", tokenizer), ("vocab", model["vocab"]),
            ("chat_template", {"chat_template": TEMPLATE}),
            ("tokenizer_config", {
                "added_tokens_decoder": added, "additional_special_tokens": SPECIAL_TOKENS[1:],
                "chat_template": TEXT_TEMPLATE, "clean_up_tokenization_spaces": False,
                "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "model_max_length": 131_072, "tokenizer_class": "Qwen2Tokenizer"})):
        (path / f"{name}.json").write_text(json.dumps(value))


def real_checkpoint(path, width=1, device="cpu", dtype=torch.float32):
    """A directory like the released one, random weights in several files and their index."""
    path, config = Path(path), real_config(width)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            transformers.Qwen2_5_VLConfig(**copy.deepcopy(config)), dtype=dtype)
    model.save_pretrained(path, max_shard_size="60MB" if width > 1 else "4GB")
    write_tokenizer(path)
    for name in ("generation_config.json", "preprocessor_config.json"):
        shutil.copy(RELEASED / name, path)
    (path / "config.json").write_text(json.dumps(config))
    return path


# ---- The rehearsal ----

@contextlib.contextmanager
def phase(name):
    """Run a phase silently; then "ok" and its seconds, or all that it printed."""
    said, started = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException:
        print(f"{said.getvalue()}  FAILED  {name}", flush=True)
        raise
    gc.collect(), torch.cuda.empty_cache()
    print(f"  ok  {time.perf_counter() - started:6.1f} s  {name}", flush=True)


def some_reward(text, example, **_):
    """Differs between answers, so that advantages are not all zero; rewards nothing."""
    return sum(map(ord, text)) % 10 / 10


def rehearse(folder, width, device="cpu", dtype=torch.float32):
    """Every phase of a run on a checkpoint of the real shape; returns (base, run directory)."""
    folder, run, step = Path(folder), Path(folder) / "run", currreft.grpo_step
    with phase("checkpoint in the released layout, random weights"):
        base = real_checkpoint(folder / "base", width, device, dtype)
        data = tiny_data(folder / "data")
    flags = ["--model", str(base), "--data", str(data), "--out", str(run), *(
        "--prompts_per_step 2 --num_generations 4 --max_completion_length 16 --sft_batch 2 "
        "--reject_samples 2 --reject_threshold 0 --eval_limit 1 --lr 1e-5 --sft_lr 1e-5 "
        "--checkpoint_activations --stages binary:1 choice:2 open:1 reject:1").split()]

    def stopped(run, stage, number):  # SIGTERM within the second step, as a scheduler sends it
        if stage.name == "choice":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, stage, number)
    with phase("python -m tools.check"):
        looked = subprocess.run([sys.executable, "-m", "tools.check", *flags, "--stages", "open:1"],
                                cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert looked.returncode == 0 and "time of a step" in looked.stderr, looked.stderr
    with mock.patch.object(currreft, "accuracy_reward", some_reward):
        with phase("stopped by SIGTERM within the choice stage, everything saved"), \
                mock.patch.object(currreft, "grpo_step", stopped):
            try:
                currreft.main(flags)
            except SystemExit as stop:
                assert stop.code == 128 + signal.SIGTERM, stop.code
            assert RunDirectory(run, (), ()).checkpoints()[0][0][1]["global_step"] == 2
        with phase("resumed: rest of choice, open, rejection sampling, SFT"):
            currreft.main([*flags, "--resume"])
    with phase("log: every step once, with finite gradients; the first KL of a stage is 0"):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        stages = ["binary", "choice", "choice", "open", "reject"]
        assert [(row["step"], row["stage"]) for row in rows] == list(enumerate(stages, 1))
        assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
        assert all(abs(rows[i]["kl"]) < 1e-3 for i in (0, 1, 3))
    with phase("last checkpoint in plain transformers: same logits"):
        check_reload(run / "stages" / "4-reject", data, device, dtype)
    return base, run


def check_reload(path, data, device, dtype):
    """Plain transformers, told the path alone, computes the logits of the packed forward pass."""
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype)
    policy, processor = load_policy(path, device, dtype)
    rows = load_examples(data / "grpo_data/train/open.jsonl", image_root=data, form="open")
    prompt = processor(rows[-1])
    ids = prompt.input_ids[None].to(device)
    with torch.no_grad():
        hidden = packed_hidden(policy, pack(policy, [prompt], [[]]).to(device))
        logits = plain.to(device).eval()(
            input_ids=ids, pixel_values=prompt.pixel_values.to(device, dtype),
            image_grid_thw=prompt.image_grid_thw.to(device),
            mm_token_type_ids=(ids == processor.image_token_id).int()).logits[0]
        worst = (policy.lm_head(hidden) - logits).abs().max().item()
    assert worst < (1e-4 if dtype == torch.float32 else 0.5), f"logits differ by {worst}"


@command
def main(argv=None):
    """Rehearse, a line for each phase; a phase that fails ends it with its error."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args(argv)
    device, dtype = ("cuda", torch.bfloat16) if usable_gpu() else ("cpu", torch.float32)
    full = device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 70 * 2**30
    print(f"{'full size' if full else 'width / 8, 4 + 8 layers'}, random {dtype} weights, {device}")
    with tempfile.TemporaryDirectory() as folder:
        rehearse(folder, 1 if full else 8, device, dtype)


if __name__ == "__main__":
    sys.exit(main())
