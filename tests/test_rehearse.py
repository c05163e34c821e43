"""The released 3B configuration and tokenizer, and what a checkpoint must have to be served."""

import inspect
import json
import math

import pytest
import torch
import transformers
from safetensors import safe_open

from engine import generate, load_policy
from packed import forbidden_bias
from rewards import Example, format_reward
from support.base import checkpoint_files
from support.tiny import tiny_image
from tools.rehearse import ORDINARY, real_checkpoint, real_config, rehearse

QUESTION = Example(problem="Why?", solution="")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return load_policy(real_checkpoint(tmp_path_factory.mktemp("real"), width=16))


def test_facts_of_the_real_3b_configuration():
    config = transformers.Qwen2_5_VLConfig(**real_config())
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    vision, sections = model.model.visual, config.text_config.rope_parameters["mrope_section"]
    assert sum(p.numel() for p in model.parameters()) == 3_754_622_976
    assert sum(p.numel() for p in vision.parameters()) == 668_684_288
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert 2 * sum(sections) == 2048 // 16, "the sections must share half a head"
    assert list(vision.fullatt_block_indexes) == [7, 15, 23, 31] and len(vision.blocks) == 32


# ---- The tokenizer's shape ----

def test_special_tokens_have_their_real_ids(world):
    processor = world[1]
    assert len(processor.tokenizer) == 151_665 and processor.end_ids == (151_645, 151_643)
    assert processor.vision_ids == [151_655, 151_656, 151_652, 151_653]


def test_the_template_for_images_wins_over_the_tokenizers_own(world, tmp_path):
    """tokenizer_config.json holds the text models' template, on which a prompt with parts fails."""
    image = str(tiny_image(tmp_path / "a.png"))
    prompt = world[1](Example(problem="How many?", solution="", images=(image,)))
    text = world[1].tokenizer.decode(prompt.input_ids)
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>How many?\nFirst think")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and text.count("system") == 1


def test_a_hub_name_brings_the_files_that_no_loader_asks_for(tmp_path, monkeypatch):
    """AutoTokenizer and the image processor leave chat_template.json on the hub."""
    (tmp_path / "chat_template.json").write_text("{}")
    asked = []
    monkeypatch.setattr(inspect.getmodule(checkpoint_files), "snapshot_download",
                        lambda name, allow_patterns: asked.append(name) or tmp_path)
    assert checkpoint_files("Qwen/Qwen2.5-VL-3B-Instruct") == {"chat_template.json": b"{}"}
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]


def test_tags_are_several_ordinary_tokens_and_decode_to_a_formatted_answer(world):
    processor, answer = world[1], "<think> Zwei Größen: é, 中 </think>\n<answer>yes</answer>"
    ids = processor.response_ids(answer)
    assert max(ids[:-1]) < ORDINARY and ids[-1] == 151_645
    assert len(processor.response_ids("<think>")) > 2 and processor.decode(ids) == answer
    assert format_reward(answer, Example(problem="", solution="", form="binary")) == 1


def test_the_rollout_draws_from_the_model_alone(world, monkeypatch):
    """Uniform logits: every token that may be has one chance, whatever generation_config says."""
    model, processor = world
    bias = forbidden_bias(model, processor)
    forbidden = {151_644, *range(151_646, 151_657), *range(151_665, 151_936)}
    assert set(bias.isinf().nonzero()[:, 0].tolist()) == forbidden
    assert json.loads(processor.files["generation_config.json"])["repetition_penalty"] == 1.05
    norm = model.model.language_model.norm.weight
    monkeypatch.setattr(norm, "data", torch.zeros_like(norm))
    (group,) = generate(model, processor, [processor(QUESTION)], 4, 8)
    tokens = [token for completion in group for token in completion.tokens]
    assert len(set(tokens)) > 24 and not forbidden & set(tokens), "temperature 1e-6, or a penalty"
    for completion in group:
        uniform = torch.full((len(completion.tokens),), -math.log(151_936 - len(forbidden)))
        torch.testing.assert_close(completion.logps, uniform)


@pytest.mark.parametrize("end", [151_645, 151_643])
def test_either_end_token_ends_a_completion_and_is_scored(world, end, monkeypatch):
    model, processor = world
    only = torch.full((151_936,), float("-inf")).index_fill(0, torch.tensor([end]), 0.0)
    monkeypatch.setattr(inspect.getmodule(generate), "forbidden_bias", lambda *_: only)
    monkeypatch.setattr(model, "engine", None)  # the one that is kept has the real bias
    ((completion,),) = generate(model, processor, [processor(QUESTION)], 1, 8)
    assert completion.tokens == [end] and completion.logps.tolist() == [0.0]
    assert not completion.truncated and completion.text == ""


# ---- Getting out: a checkpoint of a run that was stopped and resumed, as others would open it ----

@pytest.mark.slow
def test_a_checkpoint_is_the_base_but_for_weights_and_pixel_limits(tmp_path):
    """Serving needs more than AutoTokenizer does: chat_template.json (else vLLM takes the template
    for tools), vocab.json and merges.txt (older tokenizers), generation_config.json (both end
    tokens), the flat config.json (transformers 4 finds no rotary sections in what 5 writes)."""
    base, run = rehearse(tmp_path, width=16)
    path = run / "stages" / "4-reject"
    kept = {file.name for file in base.iterdir() if not file.name.startswith("model")}
    assert kept > {"chat_template.json", "vocab.json", "merges.txt", "generation_config.json"}
    for name in kept - {"preprocessor_config.json"}:
        assert (path / name).read_bytes() == (base / name).read_bytes(), name
    # nothing else that is read: an index of the base's files or a second template would win
    read = {file.name for file in path.iterdir() if file.suffix in (".json", ".jinja", ".txt")}
    assert read == kept | {"state.json"}
    images = json.loads((path / "preprocessor_config.json").read_text())
    assert images["size"]["longest_edge"] == images["max_pixels"] == 401_408
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"  # how its class is found
    names = [{name for file in folder.glob("*.safetensors")
              for name in safe_open(file, "pt").keys()} for folder in (base, path)]
    assert names[0] == names[1] and "lm_head.weight" not in names[1], "the head is tied"
    assert "windowed_flash" not in (path / "config.json").read_text()  # a name of this program's
