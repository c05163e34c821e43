"""The real Qwen2.5-VL-3B without its weights: facts of its configuration, and a rehearsal of the whole run.

    python -m tools.rehearse            on CUDA with all 3.75 B parameters in bfloat16, elsewhere shrunk: about a minute
    python -m tools.rehearse --no-full    shrunk: width / 8, 4 text layers, 8 vision layers, everything else as it is

What it shows: the released configuration and files (flat config, tokens at their ids, two end tokens, a template of
its own for images, a head wider than the tokenizer) pass through the real command line, every phase of it, and come
out as a checkpoint that plain transformers opens with the same logits. What it does not show: anything about learning,
quality or speed. Weights are random, so no answer is right: RL is given a stand-in reward that differs between answers,
and rejection sampling keeps the reference answers (--reject_threshold 0). The tokenizer's merges are not Qwen's.
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import currreft
from data import load_examples
from engine import load_policy, pack, packed_hidden
from run import Run, latest_checkpoint
from tools.tiny import SPECIAL, SPLIT, TEMPLATE, tiny_data, tiny_tokenizer  # noqa: E402
from tools.terminal import terminal

# config.json, generation_config.json, preprocessor_config.json and tokenizer_config.json of
# Qwen/Qwen2.5-VL-3B-Instruct, in the layout of their release (transformers 4: text settings lie flat)
CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 128_000, "max_window_layers": 70, "num_attention_heads": 16,
    "num_hidden_layers": 36, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "sliding_window": 32_768,
    "use_sliding_window": False, "use_cache": True, "tie_word_embeddings": True, "vocab_size": 151_936,
    "bos_token_id": 151_643, "eos_token_id": 151_645, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653,
    "vision_token_id": 151_654, "image_token_id": 151_655, "video_token_id": 151_656, "transformers_version": "4.41.2",
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}}
GENERATION = {"bos_token_id": 151_643, "pad_token_id": 151_643, "do_sample": True, "eos_token_id": [151_645, 151_643],
              "repetition_penalty": 1.05, "temperature": 1e-6, "transformers_version": "4.49.0"}
PREPROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
ORDINARY = 151_643  # tokens before the first special one
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>"]  # added, but not special: 151,657 to 151,664
# tokenizer_config.json has the text models' template, which knows tools and fails on an image; the one for images is in
# chat_template.json. Both are shortened here to what matters.
TEXT_TEMPLATE = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def real_config(width=1):
    """The released config.json as a dict; with width > 1 that much narrower and fewer layers deep.

    Head sizes (128 and 80), hence rotary sections, the windows, one full layer in eight, and the vocabulary stay.
    """
    config = copy.deepcopy(CONFIG)
    if width > 1:
        vision = config["vision_config"]
        for sizes, names in ((config, ("hidden_size", "intermediate_size", "num_attention_heads")),
                             (vision, ("hidden_size", "intermediate_size", "num_heads", "out_hidden_size"))):
            sizes.update({name: sizes[name] // width for name in names})
        config |= {"num_hidden_layers": 4, "num_key_value_heads": 1}
        vision |= {"depth": 8, "fullatt_block_indexes": [7]}
    return config


def real_shaped_tokenizer(path):
    """Write a tokenizer in Qwen2.5-VL's files and shape: bytes, a few merges, filler, then 22 added tokens."""
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    vocab = {token: i for token, i in bpe["vocab"].items() if i < 256 + len(bpe["merges"])}
    vocab |= {f"Ġw{i}": i for i in range(len(vocab), ORDINARY)}
    merges = [tuple(pair) for pair in bpe["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in PLAIN])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (path / "merges.txt").write_text("\n".join(map(" ".join, merges)) + "\n")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(ORDINARY + i): {"content": name, **flags, "special": name in SPECIAL}
             for i, name in enumerate(SPECIAL + PLAIN)}
    write(path / "tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:], "bos_token": None, "chat_template": TEXT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131_072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})
    write(path / "chat_template.json", {"chat_template": TEMPLATE})


def write(path, value):
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))


def real_checkpoint(path, width=1, device="cpu", dtype=torch.float32):
    """A directory like the released one, with random weights in several files and their index; returns `path`."""
    path = Path(path)
    config = real_config(width)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            transformers.Qwen2_5_VLConfig(**copy.deepcopy(config)), dtype=dtype)
    model.save_pretrained(path, max_shard_size="60MB" if width > 1 else "4GB")
    real_shaped_tokenizer(path)
    for name, value in (("config", config), ("generation_config", GENERATION), ("preprocessor_config", PREPROCESSOR)):
        write(path / f"{name}.json", value)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Facts, from the configuration alone


def facts():
    """What the configuration says, on the meta device: {name: value}."""
    config = transformers.Qwen2_5_VLConfig(**real_config())
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    text, vision = config.text_config, model.model.visual
    head = text.hidden_size // text.num_attention_heads
    full = [i for i in range(len(vision.blocks)) if i in vision.fullatt_block_indexes]
    return {"parameters": sum(p.numel() for p in model.parameters()),
            "of them vision": sum(p.numel() for p in vision.parameters()),
            "head tied to the embedding": model.lm_head.weight is model.get_input_embeddings().weight,
            "vocabulary": len(model.lm_head.weight), "text layers": len(model.model.language_model.layers),
            "head size": head, "rotary sections": text.rope_parameters["mrope_section"],
            "vision layers": len(vision.blocks), "with full attention": full,
            "the others' windows": config.vision_config.window_size}


def show():
    """Print the facts. (What memory a run needs: python -m tools.memory.)"""
    for name, value in facts().items():
        print(f"  {name:<28}{value:,}" if isinstance(value, int) and value > 1 else f"  {name:<28}{value}")


# ---------------------------------------------------------------------------------------------------------------------
# The rehearsal


@contextlib.contextmanager
def phase(name):
    """Run a phase silently; say "ok" and its seconds, or what it printed, its error, and exit with 1."""
    said, started = io.StringIO(), time.perf_counter()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    except (Exception, SystemExit):
        print(f"{said.getvalue()}{traceback.format_exc()}  FAILED  {name}", flush=True)
        sys.exit(1)
    finally:  # the handler of SIGTERM would keep a finished run, and its models, alive
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.collect(), torch.cuda.empty_cache()
    print(f"  ok  {time.perf_counter() - started:6.1f} s  {name}", flush=True)


@contextlib.contextmanager
def watched(names):
    """While it lasts, count and time functions of currreft: watched({label: name}) -> {label: [calls, seconds]}."""
    times, originals = {label: [0, 0.0] for label in names}, []

    def timed(label, function):
        def call(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                times[label][0] += 1
                times[label][1] += time.perf_counter() - started
        return call
    for label, name in names.items():
        owner, attribute = (Run, name[4:]) if name.startswith("Run.") else (currreft, name)
        originals.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, timed(label, getattr(owner, attribute)))
    try:
        yield times
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


PHASES = {"stage": "train_stage", "reference loaded": "Run.load_reference", "GRPO step": "grpo_step",
          "rollout": "generate", "log-probabilities": "token_logps", "optimizer step": "Run.optimizer_step",
          "rejection sampling": "rejection_sample", "SFT step": "sft_step", "checkpoint": "Run.save",
          "evaluation": "Run.evaluate"}


def stand_in_reward(text, example, **_):
    """Differs between answers, so that advantages are not all zero; rewards nothing."""
    return sum(map(ord, text)) % 10 / 10


def stop_after(step):
    """SIGTERM at the end of a global step, as a scheduler sends it; returns what undoes it."""
    log = Run.log

    def stopping(self, *args):
        means = log(self, *args)
        if self.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return means
    Run.log = stopping
    return lambda: setattr(Run, "log", log)


def rehearse(folder, width, device="cpu", dtype=torch.float32):
    """Every phase of a run through currreft.main, on a stand-in checkpoint; returns (base, run directory)."""
    folder, run = Path(folder), Path(folder) / "run"
    with phase("checkpoint in the released layout, random weights"):
        base = real_checkpoint(folder / "base", width, device, dtype)
        data = tiny_data(folder / "data")
    flags = ["--model", str(base), "--data", str(data), "--out", str(run), "--prompts_per_step", "2",
             "--num_generations", "4", "--max_completion_length", "16", "--sft_batch", "2", "--reject_samples", "2",
             "--reject_threshold", "0", "--eval_limit", "1", "--lr", "1e-5", "--sft_lr", "1e-5",
             "--checkpoint_activations", "--stages", "binary:1", "choice:2", "open:1", "reject:1"]
    reward, currreft.accuracy_reward = currreft.accuracy_reward, stand_in_reward
    try:
        with phase("--check"):
            currreft.main([*flags, "--check"])
        with watched(PHASES) as times:
            with phase("stopped by SIGTERM within the choice stage, everything saved"):
                undo = stop_after(2)
                try:
                    currreft.main(flags)
                except SystemExit as stop:
                    assert stop.code == 128 + signal.SIGTERM, stop.code
                finally:
                    undo()
                assert latest_checkpoint(run)[1]["global_step"] == 2
            with phase("resumed: rest of choice, open, rejection sampling, SFT"):
                currreft.main([*flags, "--resume"])
    finally:
        currreft.accuracy_reward = reward
    for label, (calls, seconds) in times.items():
        print(f"  {'ok' if calls else 'FAILED'}  {seconds:6.1f} s      of that in {calls} x {label}")
    if not all(calls for calls, _ in times.values()):
        sys.exit(1)
    with phase("log: every step once and finite; both RL and SFT moved text and vision weights"):
        check_log(run)
        check_moved(base, run / "stages" / "3-open", run / "stages" / "4-reject")
    with phase("last checkpoint in plain transformers: same logits"):
        check_reload(run / "stages" / "4-reject", data, device, dtype)
    return base, run


def check_log(run):
    """Five steps in order; gradients exist and are finite; the first KL of a stage is 0."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 6)) and not rows[-1]["skipped_steps"]
    assert [row["stage"] for row in rows] == ["binary", "choice", "choice", "open", "reject"]
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)
    assert all(abs(rows[i]["kl"]) < 1e-3 for i in (0, 1, 3)), "the reference is not the policy at a stage's start"


def check_moved(*checkpoints):
    """From one checkpoint to the next, a text and a vision weight have changed."""
    def read(path, name):
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():
                    return tensors.get_tensor(name)
    for name in ("model.layers.0.mlp.down_proj.weight", "visual.blocks.0.mlp.down_proj.weight"):
        values = [read(path, name) for path in checkpoints]
        assert not any(map(torch.equal, values, values[1:])), f"{name} never moved"


def check_reload(path, data, device, dtype):
    """Plain transformers, told nothing but the path, computes the logits that the packed forward computes."""
    plain = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype).to(device).eval()
    policy, processor = load_policy(path, device, dtype)
    rows = load_examples(data / "grpo_data" / "train" / "open.jsonl", image_root=data, form="open")
    prompt = processor(rows[-1])
    ids = prompt.input_ids[None].to(device)
    with torch.no_grad():
        hidden = packed_hidden(policy, pack(policy, [prompt], [[]]).to(device))
        logits = plain(input_ids=ids, pixel_values=prompt.pixel_values.to(device, dtype),
                       image_grid_thw=prompt.image_grid_thw.to(device),
                       mm_token_type_ids=(ids == processor.image_token_id).int()).logits[0]
        worst = (policy.lm_head(hidden) - logits).abs().max().item()
    assert worst < (1e-4 if dtype == torch.float32 else 0.5), f"logits differ by {worst}"


def main(argv=None):
    """Print the facts, then rehearse; exits with 1 if a phase fails."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=cuda,
                        help="all 3.75 B parameters: needs a GPU of 80 GB and 100 GB of disk (default: on CUDA)")
    parser.add_argument("--out", help="directory for the rehearsal's files (default: a temporary one)")
    args = parser.parse_args(argv)
    if args.full and not cuda:
        parser.error("--full needs a GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    show()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    print(f"\n  {'full size' if args.full else 'width / 8, 4 + 8 layers'}, random {dtype}, {device}")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        rehearse(folder, 1 if args.full else 8, device, dtype)


if __name__ == "__main__":
    with terminal():
        main()
