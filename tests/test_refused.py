"""What is refused, and how: one sentence, exit code 2, no traceback, no --out. Flags, places, data, bases."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from runs import refused
from safetensors.torch import load_file, save_file

import currreft
import sample
from support.flags import check_values, parse
from support.tiny import tiny_image, write_jsonl
from support.words import UserError
from tools import memory


def run_refused(capsys, *arguments):
    return refused(capsys, arguments)


# ---- Flags ----

FLAGS = [
    "--lr=inf", "--lr=nan", "--lr=0", "--lr=-1", "--lr=fast", "--sft_lr=inf", "--temperature=inf",
    "--temperature=1e-300", "--temperature=nan", "--temperature=0", "--beta=inf", "--beta=-1", "--epsilon=1",
    "--epsilon=nan", "--timeout_minutes=inf", "--timeout_minutes=1e30", "--timeout_minutes=1e-9",
    f"--max_pixels={10**40}", "--max_pixels=10", f"--num_generations={10**8}", "--num_generations=1",
    f"--prompts_per_step={10**9}", "--prompts_per_step=0", "--updates_per_rollout=0", "--reject_samples=0",
    "--max_completion_length=0", "--partial_credit=nan", "--reject_threshold=101", "--save_every=0",
    "--micro_batch=0", "--eval_limit=-1", "--seed=1e3", f"--seed={2**70}", "--reference=none", "--dtype=int8",
    "--lr_schedule=linear", "--report_to=paper", "--task=poetry", "--stages=open", "--stages=open:0",
    "--stages=open:1e3", "--stages=binary+sft:10", f"--stages=open:{10**10}", "--learning_rate=1", "--adv=1"]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag(flag, capsys):
    assert flag.split("=")[0] in run_refused(capsys, "--data", "nowhere", flag)


@pytest.mark.parametrize("flag", [
    "--temperature=-1", "--temperature=nan", "--temperature=inf", "--top_p=0", "--top_p=-1", "--top_p=5",
    "--top_p=nan", "--max_completion_length=0", "--max_pixels=1"])
def test_a_flag_of_sample(flag, capsys):
    said = refused(capsys, ["answer", "--model", "x", "--question", "?", flag], program=sample.main)
    assert flag.split("=")[0] in said


@pytest.mark.parametrize("flag", ["--ranks=0", "--ranks=-1", "--prompt_length=-5"])
def test_a_flag_of_the_estimate(flag, capsys):
    assert flag.split("=")[0] in refused(capsys, [flag], program=memory.main)


@dataclasses.dataclass(frozen=True)
class Forked:
    gamma: float = 0.5  # what a fork added

    def __post_init__(self):
        check_values(vars(self))


@dataclasses.dataclass(frozen=True)
class Uncommented:
    gamma: float = 0.5


def test_defaults_lie_within_bounds_and_a_field_of_a_fork_must_have_a_comment_and_be_finite():
    check_values(vars(currreft.Config()))
    assert parse(Forked, ["--gamma", "2"], "").gamma == 2
    for bad in ("inf", "nan"):
        with pytest.raises(UserError, match="--gamma must lie between"):
            parse(Forked, ["--gamma", bad], "")
    with pytest.raises(UserError, match="gamma has no comment"):
        parse(Uncommented, [], "")


# ---- Places ----

def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


PLACES = {  # name: (what is done to --out, words of the sentence)
    "--out is a file": (write, "--out"),
    "--out lies in a file": (lambda out: write(out.parent), "--out"),
    "--out holds something else": (lambda out: write(out / "thesis.txt"), "not empty"),
    "--out holds a run": (lambda out: write(out / "config.json", "{}"), "--resume"),
    "--out holds no run to resume": (lambda out: None, "holds no run to resume")}


@pytest.mark.parametrize("place", PLACES)
def test_a_place(place, base, tmp_path, capsys):
    make, words = PLACES[place]
    make(out := tmp_path / "folder" / "run")
    resume = ["--resume"] if "resume" in place else []
    assert words in run_refused(capsys, "--model", base[0], "--data", base[1], "--out", out, *resume)
    assert out.exists() == (place not in ("--out lies in a file", "--out holds no run to resume"))


def asked(*rows):
    """A data directory whose open questions are these rows; a dict changes a good row."""
    row = {"problem": "1 + 1?", "solution": "2", "task": "math"}
    rows = [row | change if isinstance(change, dict) else change for change in rows]
    return lambda data: write_jsonl(data / "grpo_data/train/open.jsonl", rows)


def fifo(data):
    (data / "grpo_data/train/open.jsonl").unlink(missing_ok=True)
    os.mkfifo(data / "grpo_data/train/open.jsonl")


DATA = {  # name: (what is done to a data directory, words of the sentence)
    "no folder": (shutil.rmtree, "no folder"),
    "nothing in it": (lambda data: [file.unlink() for file in data.rglob("*.jsonl")],
                      "needs a training file of open questions"),
    "a FIFO": (fifo, "no regular file"),
    "one line of 5 MB": (asked("x" * 5_000_000), "broken JSON"),
    "broken JSON": (asked({}, "{"), "open.jsonl:2: broken JSON"),
    "no rows": (asked(), "no rows"),
    "a URL": (asked({"image": "http://x/a.png"}), "open.jsonl:1"),
    "a home": (asked({"image": "~/images/a.png"}), "open.jsonl:1"),
    "outside": (lambda data: asked({"image": str(tiny_image(data.parent / "o.png"))})(data), "--allow_outside"),
    "a truth that is none": (asked({"solution": ""}), "open.jsonl:1"),
    "an unknown task": (asked({"task": "maths"}), "'maths'"),
    "a flat picture": (lambda data: tiny_image(data / "images/a.png", (84, 1)), "a.png is 84 x 1"),
    "a torn picture": (lambda data: write(data / "images/a.png", "\x89PNG\r\n"), "a.png cannot be decoded"),
    "no test truth": (lambda data: write(data / "grpo_data/test/open_id.jsonl", '{"a": 1}'), "open_id.jsonl:1"),
    "no questions": (lambda data: shutil.rmtree(data / "SFT_data"), "--questions"),
    "a picture in text": (asked({"problem": "<video>?"}), "<video>"),
    "prompts too long": (asked({"problem": "a " * 3900}), "--max_prompt_length"),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name, base, tmp_path, capsys):
    shutil.copytree(base[1], data := tmp_path / "data")
    spoil, words = DATA[name]
    spoil(data)
    said = run_refused(capsys, "--model", base[0], "--data", data, "--out", tmp_path / "run",
                   "--stages", "open:1", "reject:1", "--max_prompt_length", 600)
    assert words in said and not (tmp_path / "run").exists()


# ---- Bases ----

def weights(change):
    """A base whose weights are changed by `change`, a function of {name: tensor}."""
    def spoil(model):
        change(tensors := load_file(model / "model.safetensors"))
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return spoil


def edited(name, change):
    """A base one of whose JSON files is changed by `change`, a function of its value."""
    def spoil(model):
        change(value := json.loads((model / name).read_text()))
        (model / name).write_text(json.dumps(value))
    return spoil


def cut(name, keep):
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:keep])


def template(text):
    def spoil(model):
        for file in model.glob("chat_template*"):
            file.unlink()
        edited("tokenizer_config.json", lambda value: value.update(chat_template=text))(model)
    return spoil


def special(tokenizer):
    added = tokenizer["added_tokens"]
    top = max(token["id"] for token in added)
    for n, tag in enumerate(("<think>", "</think>"), 1):
        added.append(added[0] | {"id": top + n, "content": tag, "special": True})


NORM, HEAD, NOT_WHOLE = "model.norm.weight", "model.embed_tokens.weight", "no complete Qwen2.5-VL"
BASES = {  # name: (what is done to a base, words of the sentence)
    "a tensor is missing": (weights(lambda t: t.pop(NORM)), "lacks weights"),
    "no vision tower": (weights(lambda t: [t.pop(name) for name in [*t] if "visual" in name]), "lacks"),
    "a tensor too many": (weights(lambda t: t.update({"model.extra": torch.zeros(2)})), "has no place for"),
    "another shape": (weights(lambda t: t.update({NORM: torch.ones(32)})), "another shape"),
    "integer weights": (weights(lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})), "integer or"),
    "a NaN": (weights(lambda t: t[NORM].fill_(float("nan"))), "not finite"),
    "an infinity": (weights(lambda t: t[HEAD][3].fill_(float("inf"))), "not finite"),
    "weights cut": (cut("model.safetensors", 5000), "cannot be loaded"),
    "weights empty": (cut("model.safetensors", 0), "cannot be loaded"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "cannot be loaded"),
    "no config": (lambda model: (model / "config.json").unlink(), NOT_WHOLE),
    "config cut": (cut("config.json", 40), NOT_WHOLE),
    "another model": (edited("config.json", lambda c: c.update(model_type="qwen2_vl")), NOT_WHOLE),
    "another image token": (edited("config.json", lambda c: c.update(image_token_id=3)), "image_token_id"),
    "another patch": (edited("config.json", lambda c: c["vision_config"].update(patch_size=16)), "patches"),
    "another merge": (edited("config.json", lambda c: c["vision_config"].update(spatial_merge_size=1)), ""),
    "a smaller vocabulary": (edited("config.json", lambda c: c["text_config"].update(vocab_size=64)), ""),
    "quantized": (edited("config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantized"),
    "an adapter beside": (lambda model: (model / "adapter_config.json").write_text("{}"), "adapter"),
    "no tokenizer": (lambda model: [file.unlink() for file in model.glob("tokenizer*")], ""),
    "tokenizer cut": (cut("tokenizer.json", 300), NOT_WHOLE),
    "no image processor": (lambda model: (model / "preprocessor_config.json").unlink(), NOT_WHOLE),
    "no image place": (template("{% for m in messages %}{{ m['role'] }}{% endfor %}"), "chat template"),
    "a template without the question": (
        template("{% for m in messages %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}x"), "chat template"),
    "a template with a mistake": (template("{% for %}"), ""),
    "tags are special": (edited("tokenizer.json", special), "special tokens"),
}


@pytest.mark.parametrize("name", [*BASES, "/nowhere", "", "."])
def test_a_base(name, base, tmp_path, capsys):
    shutil.copytree(base[0], model := tmp_path / "model")
    spoil, words = BASES.get(name, (lambda model: None, ""))
    spoil(model)
    model = model if name in BASES else name
    said = run_refused(capsys, "--model", model, "--data", base[1], "--out", tmp_path / "run")
    assert words in said and not (tmp_path / "run").exists()


def test_what_cannot_fit_ends_before_it_is_tried(base, tmp_path, capsys):
    said = run_refused(capsys, "--model", base[0], "--data", base[1], "--out", tmp_path / "run", "--stages",
                       "open:1", "--num_generations", 4096, "--prompts_per_step", 65536,
                       "--max_completion_length", 10**6, "--max_rows", 65536)
    assert "GiB" in said and not (tmp_path / "run").exists()
