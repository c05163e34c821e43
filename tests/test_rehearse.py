"""The released 3B configuration, a tokenizer of the real one's shape, and what a checkpoint must have to be served."""

import json
import math

import pytest
import tools.rehearse as real
import torch
from safetensors import safe_open
from tools import memory
from tools.tiny import tiny_image

import data
import engine
from currreft import Config
from data import Example, Processor, checkpoint_files
from distributed import UserError
from engine import forbidden_bias, generate, load_policy
from rewards import format_reward


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return load_policy(real.real_checkpoint(tmp_path_factory.mktemp("real"), width=16))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    return real.rehearse(tmp_path_factory.mktemp("rehearsal"), width=16)


def test_facts_of_the_real_3b_configuration():
    assert real.facts() == {
        "parameters": 3_754_622_976, "of them vision": 668_684_288, "head tied to the embedding": True,
        "vocabulary": 151_936, "text layers": 36, "head size": 128, "rotary sections": [16, 24, 24],
        "vision layers": 32, "with full attention": [7, 15, 23, 31], "the others' windows": 112}
    assert 2 * sum(real.CONFIG["rope_scaling"]["mrope_section"]) == 128, "the sections must share half a head"


def test_the_default_run_fits_the_cards_of_its_table():
    for size, ranks, card, settings in memory.CARDS:
        cfg = Config(data="d", dtype="bfloat16", **settings)
        needed = sum(memory.memory_needed(memory.configuration(size), cfg, ranks).values())
        assert needed + memory.OVERHEAD < (card - 1) * 2**30, (size, ranks, card)  # 80 GB cards have 79.1 GiB


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer's shape


def test_special_tokens_have_their_real_ids(world):
    _, processor = world
    assert len(processor.tokenizer) == 151_665 and processor.end_ids == (151_645, 151_643)
    assert processor.vision_ids == [151_655, 151_656, 151_652, 151_653]


def test_the_template_for_images_wins_over_the_tokenizers_own_for_tools(world, tmp_path):
    """tokenizer_config.json of Qwen2.5-VL holds the text models' template, on which a prompt with parts fails."""
    _, processor = world
    prompt = processor(Example(problem="How many?", solution="", images=(str(tiny_image(tmp_path / "a.png")),)))
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                           "<|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|>How many?\nFirst think")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and text.count("system") == 1


def test_without_a_template_for_images_a_sentence_says_so(world, tmp_path):
    for name, content in world[1].files.items():
        if name != "chat_template.json":
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="lacks a chat template with places for images"):
        Processor.from_pretrained(tmp_path)


def test_a_hub_name_brings_the_files_that_no_loader_asks_for(world, tmp_path, monkeypatch):
    """AutoTokenizer and the image processor leave chat_template.json on the hub."""
    (tmp_path / "chat_template.json").write_text("{}")
    asked = []
    monkeypatch.setattr(data, "snapshot_download", lambda name, allow_patterns: asked.append(name) or tmp_path)
    assert checkpoint_files("Qwen/Qwen2.5-VL-3B-Instruct") == {"chat_template.json": b"{}"}
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]


def test_tags_are_several_ordinary_tokens_and_decode_to_a_formatted_answer(world):
    _, processor = world
    answer = "<think> Zwei Größen: é, 中 </think>\n<answer>yes</answer>"
    ids = processor.response_ids(answer)
    assert max(ids[:-1]) < real.ORDINARY and ids[-1] == 151_645 and len(processor.response_ids("<think>")) > 2
    example = Example(problem="", solution="", form="binary")
    assert processor.decode(ids) == answer and format_reward(processor.decode(ids), example) == 1


def test_the_rollout_draws_from_the_model_alone(world):
    """Uniform logits: every token has 1 / (rows - special - rows without a token), whatever generation_config says."""
    model, processor = world
    bias = forbidden_bias(model, processor)
    forbidden = {151_644, *range(151_646, 151_657), *range(151_665, 151_936)}
    assert set(bias.isinf().nonzero()[:, 0].tolist()) == forbidden
    assert json.loads(processor.files["generation_config.json"])["repetition_penalty"] == 1.05, "and it is not read"
    norm = model.model.language_model.norm.weight
    kept, norm.data = norm.data, torch.zeros_like(norm)
    try:
        (group,) = generate(model, processor, [processor(Example(problem="Why?", solution=""))], 4, 8)
    finally:
        norm.data = kept
    tokens = [token for completion in group for token in completion.tokens]
    assert len(set(tokens)) > 24 and not forbidden & set(tokens), "temperature 1e-6 or a penalty bent the distribution"
    for completion in group:
        uniform = torch.full((len(completion.tokens),), -math.log(151_936 - len(forbidden)))
        torch.testing.assert_close(completion.logps, uniform)


@pytest.mark.parametrize("end", [151_645, 151_643])
def test_either_end_token_ends_a_completion_and_is_scored(world, end, monkeypatch):
    model, processor = world
    only = torch.full((151_936,), float("-inf")).index_fill(0, torch.tensor([end]), 0.0)
    monkeypatch.setattr(engine, "forbidden_bias", lambda *_: only)
    model.engine = None  # the one that is kept has the real bias
    ((completion,),) = generate(model, processor, [processor(Example(problem="Why?", solution=""))], 1, 8)
    model.engine = None
    assert completion.tokens == [end] and completion.logps.tolist() == [0.0]
    assert not completion.truncated and completion.text == ""


# ---------------------------------------------------------------------------------------------------------------------
# Getting out: a checkpoint of a run that was stopped and resumed, as transformers and vLLM would open it


def names(path):
    """Weight names of all safetensors in a directory."""
    found = set()
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.slow
def test_a_checkpoint_is_the_base_but_for_weights_and_pixel_limits(rehearsal):
    """Serving needs more than AutoTokenizer does: chat_template.json (else vLLM takes the template for tools, whose
    prompts have no place for images), vocab.json and merges.txt (older tokenizers), generation_config.json (both end
    tokens), the flat config.json (transformers 4 does not read the rotary sections of a config that 5 has written)."""
    base, run = rehearsal
    path = run / "stages" / "4-reject"
    kept = {file.name for file in base.iterdir() if not file.name.startswith("model")}
    assert kept > {"chat_template.json", "vocab.json", "merges.txt", "generation_config.json", "config.json"}
    for name in kept - {"preprocessor_config.json"}:
        assert (path / name).read_bytes() == (base / name).read_bytes(), name
    # nothing else that is read: an index of the base's files or a second template would win over what is there
    read = {file.name for file in path.iterdir() if file.suffix in (".json", ".jinja", ".txt", ".safetensors")}
    assert read == kept | {"model.safetensors", "state.json"}


@pytest.mark.slow
def test_a_checkpoint_shows_images_as_training_did(rehearsal):
    settings = json.loads((rehearsal[1] / "stages" / "4-reject" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 3136, "longest_edge": 401_408} and settings["max_pixels"] == 401_408
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"  # how AutoImageProcessor finds its class
    assert (settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]) == (14, 2, 2)


@pytest.mark.slow
def test_weights_have_the_released_names(rehearsal):
    """vLLM maps `model.` and `visual.`, or `model.language_model.` and `model.visual.`; a head that is tied to the
    embedding must not be there a second time, or the two could differ."""
    base, run = rehearsal
    saved = names(run / "stages" / "4-reject")
    assert saved == names(base) and "lm_head.weight" not in saved and "model.embed_tokens.weight" in saved
    assert all(name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "visual.")) for name in saved)


@pytest.mark.slow
def test_config_says_what_vllm_reads(rehearsal):
    config = json.loads((rehearsal[1] / "stages" / "4-reject" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]  # by which vLLM picks its model class
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": [16, 24, 24]}  # else 1-D positions, silently
    assert config["tie_word_embeddings"] is True  # else it waits for the head's weights
    assert not {"shared_prefix", "windowed_flash"} & set(json.dumps(config).split('"'))  # names of this program's own
