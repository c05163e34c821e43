"""What is looked for in a base model before anything is begun, so that only what can be trained is.

`read_processors`: are tokenizer, template and image processor there, and show what is asked? `base_config`:
are they and the configuration those of one Qwen2.5-VL? `check_weights`: are all numbers there?
"""

import json
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from support.words import UserError

TEXTS = ["*.json", "*.jinja", "*.txt"]  # what a checkpoint has beside its weights
SPECIAL = [f"<|{name}|>" for name in "im_end endoftext image_pad video_pad vision_start vision_end".split()]
MIN_PIXELS = 56 * 56  # of a resized image: 4 image tokens
CHAT = "What is 3 plus 4?", "It is 7.", "What color is the box?"
TAGGED = "<think>3</think><answer>4</answer>"
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
          "vision_start_token_id": "<|vision_start|>"}
FLOATS = {"F32", "F16", "BF16"}
WRONG = {"missing_keys": "lacks weights that the model has",
         "unexpected_keys": "has weights that the model has no place for",
         "mismatched_keys": "has weights of another shape"}


def checkpoint_folder(path) -> Path:
    """The directory of a checkpoint; of a hub name that of its newest revision's small files."""
    return Path(path if Path(path).is_dir() else snapshot_download(path, allow_patterns=TEXTS))


def checkpoint_files(path) -> dict[str, bytes]:
    """{file name: content} of what stands beside the weights: configs, tokenizer, templates."""
    folder = checkpoint_folder(path)
    files = [file for pattern in TEXTS for file in folder.glob(pattern)]
    return {file.name: file.read_bytes() for file in files  # an index names other weights
            if file.name != "state.json" and not file.name.endswith(".index.json")}


def read_processors(path, max_pixels=None):
    """(tokenizer, image processor, files) of a Qwen2.5-VL directory or hub name; else UserError.

    max_pixels: of an image at most, MIN_PIXELS at least; None: what the checkpoint itself says.
    """
    if max_pixels is not None and max_pixels < MIN_PIXELS:
        raise UserError(f"max_pixels is {max_pixels}; an image takes at least {MIN_PIXELS}.")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"its model type is {config.model_type}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        files = checkpoint_files(path)
        if "chat_template.json" in files:  # the tokenizer's own knows tools, but no images
            tokenizer.chat_template = json.loads(files["chat_template.json"])["chat_template"]
        if missing := set(SPECIAL) - set(tokenizer.get_vocab()):
            raise ValueError(f"its tokenizer lacks {named(missing)}")
    except Exception as error:  # not narrower: a broken tokenizer.json raises Exception itself
        raise UserError(f"{path} is no complete Qwen2.5-VL checkpoint: {first_line(error)}") from error
    if (text := tokenizer.decode(tokenizer(TAGGED)["input_ids"], True)) != TAGGED:
        raise UserError(f"{path}: its tokenizer reads {TAGGED} back as {text!r}: special tokens do not reach "
                        "rewards. Make tags ordinary ones (special: false in tokenizer.json and "
                        "tokenizer_config.json)")
    check_template(path, tokenizer)
    # Only now: a checkpoint's own min_pixels and max_pixels would win over a size for its loader.
    most = max_pixels or image_processor.size["longest_edge"]
    image_processor.size = {"shortest_edge": MIN_PIXELS, "longest_edge": most}
    return tokenizer, image_processor, files


def save_processors(path, image_processor, files):
    """Write `files` of a checkpoint into a directory, with the pixel limits of an image processor.

    Training changes weights alone, so whatever opens the checkpoint opens the result: older transformers,
    vLLM. The limits stand wherever one of them looks, or it would show images in other pixels: `size` is read
    by transformers 5, the two others by 4.49 to 4.52, and AutoProcessor prefers processor_config.json.
    """
    image_processor.save_pretrained(path)
    for name, content in files.items():
        (Path(path) / name).write_bytes(content)
    size = dict(image_processor.size)
    limits = {"size": size, "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    for name in {"preprocessor_config.json", "processor_config.json"} & set(files):
        settings = json.loads(files[name])
        own = settings.setdefault("image_processor", {}) if name[:4] == "proc" else settings
        own.update(limits)
        (Path(path) / name).write_text(json.dumps(settings, indent=2), "utf-8")


def render(tokenizer, messages: list[dict], ask: bool = True) -> str:
    """Chat messages as the template writes them; `ask`: with the beginning of the answer."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # not narrower: a template may raise anything
        raise UserError(f"the base model's chat template fails: {first_line(error)}") from error


def check_template(path, tokenizer):
    """UserError unless the template writes a chat in order, its image in place, and then asks."""
    turns = [{"role": role, "content": [{"type": "text", "text": text}]}
             for role, text in zip(("user", "assistant", "user"), CHAT)]
    turns[2]["content"].insert(0, {"type": "image"})
    text = render(tokenizer, turns)
    places = [text.find(part) for part in (*CHAT[:2], "<|image_pad|>", CHAT[2])]
    if min(places) < 0 or places != sorted(places):
        raise UserError(f"{path}: its chat template leaves out or reorders what it is given: two questions "
                        f"with an image become {text[:200]!r}")
    if len(text) == len(render(tokenizer, turns, ask=False)):
        raise UserError(f"{path}: its chat template does not end with the assistant's turn")


def base_config(path, processor):
    """The configuration of a checkpoint that can be trained and fits its processor; else UserError."""
    if "adapter_config.json" in processor.files:
        raise UserError(f"{path} holds an adapter (adapter_config.json), which would be left out; merge it "
                        "into the weights (peft: merge_and_unload), or remove the file")
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            transformers.Qwen2_5_VLForConditionalGeneration._from_config(config)
    except Exception as error:  # not narrower: its modules raise anything, an AssertionError, too
        raise UserError(f"{path}: its config.json makes no Qwen2.5-VL model: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{path} is quantized, and quantized weights cannot be trained; name the checkpoint "
                        "it was made of")
    tokenizer, images, vision = processor.tokenizer, processor.image_processor, config.vision_config
    count, vocabulary = len(tokenizer), config.text_config.vocab_size
    wrong = [f"{name} is not that of the tokenizer's {token}" for name, token in TOKENS.items()
             if getattr(config, name) != tokenizer.convert_tokens_to_ids(token)]
    if count > vocabulary:
        wrong.append(f"the tokenizer has {count} tokens, the model {vocabulary}")
    shown = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    if not shown == (14, 2, 2) == (images.patch_size, images.merge_size, images.temporal_patch_size):
        wrong.append("model and image processor do not both merge 2 by 2 patches of 14 pixels and 2 frames")
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}")
    return config


def check_weights(path, model, info):
    """UserError unless each weight came from the checkpoint, a finite float of its own shape.

    info: what transformers says of the loading: names that are missing, unexpected, mismatched.
    """
    for key, words in WRONG.items():
        if names := {name if isinstance(name, str) else name[0] for name in info[key]}:
            raise UserError(f"{path} {words}: {named(names)}")
    for file in checkpoint_folder(path).glob("model*.safetensors"):
        with safe_open(file, "pt") as tensors:
            odd = [name for name in tensors.keys() if tensors.get_slice(name).get_dtype() not in FLOATS]
        if odd:
            raise UserError(f"{path} has integer or quantized weights, never trained: {named(odd)}")
    if bad := not_finite(model):
        raise UserError(f"{path} has weights that are not finite: {named(bad)}")


def not_finite(model):
    """Names of the model's weights that hold a NaN or an infinity."""
    return [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]


def named(names, most=3):
    """Names for a sentence: "a, b, c and 4 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def first_line(error):
    """What an error of a library says first, or its class if it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
