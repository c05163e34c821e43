"""Only what can be trained is accepted: what is looked for in a base model before anything is begun.

`check_template`: does the chat template show the model what was asked? `base_config`: are configuration, tokenizer and
image processor those of one trainable Qwen2.5-VL? `check_weights`: are all of its numbers there, and nothing else?
"""

import resource
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open

from support.words import UserError

TEXTS = ["*.json", "*.jinja", "*.txt"]                  # what a checkpoint has beside its weights
ASKED = "What is 3 plus 4?", "It is 7.", "What color is the box?"
TAGGED = "<think>3</think><answer>4</answer>"
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
FLOATS = {"F32", "F16", "BF16"}


def checkpoint_folder(path) -> Path:
    """The directory of a checkpoint; of a hub name that of its newest revision, where small files are fetched to."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), allow_patterns=TEXTS))


def checkpoint_files(path) -> dict[str, bytes]:
    """Configs, tokenizer and templates of a checkpoint directory or hub name: {file name: content}."""
    folder = checkpoint_folder(path)
    return {file.name: file.read_bytes() for kind in TEXTS for file in folder.glob(kind)
            if file.name != "state.json" and not file.name.endswith(".index.json")}     # an index names other weights


def render(tokenizer, messages: list[dict], ask: bool = True) -> str:
    """Chat messages as the template writes them; `ask`: with the beginning of the answer. UserError if it cannot."""
    try:
        with limits("the chat template of the base model"):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except UserError:
        raise
    except Exception as error:                          # not narrower: a template may raise anything
        raise UserError(f"the chat template of the base model fails: {str(error).split(chr(10))[0]}") from error
    if len(text) > 10_000_000:
        raise UserError(f"the chat template of the base model makes {len(text):,} characters of a chat.")
    return text


def places_images(tokenizer) -> bool:
    """Whether the chat template has a place for an image; that of Qwen's text models fails on a list of parts."""
    try:
        return "<|image_pad|>" in render(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])
    except UserError as error:
        if isinstance(error.__cause__, TimeoutError | MemoryError):
            raise
        return False


def named(names, most=3):
    """Names for a sentence: "a, b, c and 4 more"."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_template(path, tokenizer):
    """UserError unless the template writes every turn of a chat in order, the picture in its place, and then asks."""
    turns = [{"role": role, "content": [{"type": "text", "text": text}]}
             for role, text in zip(("user", "assistant", "user"), ASKED)]
    turns[2]["content"].insert(0, {"type": "image"})
    text = render(tokenizer, turns)
    places = [text.find(part) for part in (*ASKED[:2], "<|image_pad|>", ASKED[2])]
    if min(places) < 0 or places != sorted(places):
        raise UserError(f"{path}: its chat template leaves out or reorders what it is given: a chat of two questions with "
                        f"an image becomes {text[:200]!r}")
    if len(text) == len(render(tokenizer, turns, ask=False)):
        raise UserError(f"{path}: its chat template does not end with the assistant's turn when it is asked for one")


def base_config(path, processor):
    """The model configuration of a checkpoint; UserError if it, tokenizer and image processor do not fit or are no base."""
    if "adapter_config.json" in processor.files:
        raise UserError(f"{path} holds an adapter (adapter_config.json), which would be left out; merge it into the "
                        "weights (peft: merge_and_unload), or remove the file")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise UserError(f"{path}: a {config.model_type} model; --model needs a Qwen2.5-VL checkpoint")
        with torch.device("meta"):
            transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    except UserError:
        raise
    except Exception as error:  # not narrower: transformers raises what its modules meet, down to an AssertionError
        raise UserError(f"{path}: its config.json makes no Qwen2.5-VL model: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path} is quantized, and quantized weights cannot be trained; name the checkpoint it was made of")
    check_template(path, processor.tokenizer)
    vision, images, tokenizer = config.vision_config, processor.image_processor, processor.tokenizer
    wrong = {name: token for name, token in TOKENS.items()
             if getattr(config, name) != tokenizer.convert_tokens_to_ids(token)}
    facts = ((not wrong, f"{named(wrong)} of config.json is not the tokenizer's {named(wrong.values())}"),
             (len(tokenizer) <= config.text_config.vocab_size,
              f"the tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}"),
             ((vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size) == (14, 2, 2)
              == (images.patch_size, images.merge_size, images.temporal_patch_size),
              "model and image processor do not both have patches of 14 pixels and 2 frames, merged 2 by 2"),
             (vision.out_hidden_size == config.text_config.hidden_size,
              f"the vision tower gives {vision.out_hidden_size} numbers, the text model takes {config.text_config.hidden_size}"),
             (processor.decode(processor.response_ids(TAGGED)) == TAGGED,
              "its tokenizer does not read back what it writes: <think> or <answer> is a special token, or lost"))
    if faults := [sentence for holds, sentence in facts if not holds]:
        raise UserError(f"{path}: {'; '.join(faults)}")
    return config


def check_weights(path, model, info):
    """UserError unless every weight of the loaded model came from the checkpoint, as a finite float of its own shape.

    info: what transformers says of the loading: names of weights that are missing, unexpected, mismatched.
    """
    for kind, words in (("missing_keys", "lacks weights that the model has"), ("mismatched_keys", "has weights of another shape"),
                        ("unexpected_keys", "has weights that the model has no place for")):
        if names := {name if isinstance(name, str) else name[0] for name in info[kind]}:
            raise UserError(f"{path} {words}: {named(names)}")
    for file in checkpoint_folder(path).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if odd := {name for name in tensors.keys() if tensors.get_slice(name).get_dtype() not in FLOATS}:
                raise UserError(f"{path} has integer or quantized weights, which cannot be trained: {named(odd)}")
    if bad := not_finite(model):
        raise UserError(f"{path} has weights that are not finite: {named(bad)}")


def not_finite(model):
    """Names of the model's weights that hold a NaN or an infinity."""
    return [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]


def first_line(error):
    """What an error of a library says first, or its kind if it says nothing."""
    return next(filter(None, (line.strip() for line in str(error).splitlines())), type(error).__name__)


@contextmanager
def limits(what, seconds=5.0, memory=2**30):
    """UserError, which begins with `what`, if the body takes longer, or `memory` bytes more than the process has."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return

    def late(*_):
        raise TimeoutError
    before, (soft, hard) = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    pages, statm = resource.getpagesize(), Path("/proc/self/statm")  # Linux; elsewhere time alone is bounded
    bound = int(statm.read_text().split()[0]) * pages + memory if statm.exists() else soft
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))
    try:
        yield
    except (TimeoutError, MemoryError) as error:
        limit = f"{seconds:g} seconds" if isinstance(error, TimeoutError) else f"{memory / 2**20:.0f} MiB of memory"
        raise UserError(f"{what} takes more than {limit}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)
