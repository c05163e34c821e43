"""Only what can be trained is accepted: what is looked for in a base model before anything is begun.

`check_template`: does the chat template show the model what was asked? `base_config`: are configuration, tokenizer and
image processor those of one trainable Qwen2.5-VL? `check_weights`: are all of its numbers there, and nothing else?
"""

import torch
import transformers
from safetensors import safe_open

from data import checkpoint_folder, render
from distributed import UserError

ASKED = "What is 3 plus 4?", "It is 7.", "What color is the box?"
TAGGED = "<think>3</think><answer>4</answer>"
TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>"}
FLOATS = {"F32", "F16", "BF16"}


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
