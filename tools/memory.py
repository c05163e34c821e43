"""What memory a run needs: estimated before every run, and added up tensor by tensor from the real step without data.

    python -m tools.memory              # 3B and 7B on the cards of docs/3b.md: both figures, side by side
    python -m tools.memory --size 7b --ranks 4 --prompt_length 4096 --checkpoint_activations --beta 0

`memory_needed` is arithmetic on the configuration, the settings and the longest prompt that was read. `simulate` runs
the project's own prefill, decode step, scoring, backward and optimizer at full size, on tensors that have shapes and no
data, and adds up what lives. Neither knows what CUDA takes for itself: OVERHEAD is set aside for that.
"""

import argparse
import contextlib
import copy
import math
import os
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import distributed
import engine
from data import Prompt
from distributed import UserError, say
from tools.terminal import terminal

OVERHEAD = 2**30  # bytes: CUDA's context, cuBLAS's workspaces, captured decode steps and their pool. Estimated
CHUNK = 2**26     # numbers in a chunk of logits (engine.SelectedLogps) and of masters (distributed.ShardedAdamW)


# ---- Estimated ----

def memory_needed(config, cfg, ranks, prompt_length=None):
    """Estimated bytes per GPU of a run, by what they hold; config is the checkpoint's own (transformers) config.

    prompt_length: tokens of the longest prompt (default: one image of --max_pixels and 200 tokens of text). The first
    four are exact; cache, activations and logits follow from --max_rows, --micro_batch and the lengths.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = {name: n for name, n in sizes.items() if not (cfg.freeze_vision and ".visual." in name)}
    total, width, text = sum(sizes.values()), width_of(cfg), config.text_config
    P, C = prompt_length or cfg.max_pixels // 784 + 200, cfg.max_completion_length
    rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
    shared = engine.shares_prompts("cuda", P, rows, cfg.num_generations)  # also where a CPU estimates
    slots = rows * C + (2 * rows // cfg.num_generations if shared else rows) * P
    head = text.hidden_size // text.num_attention_heads
    owned = max(math.ceil(sum(trained.values()) / ranks), max(trained.values()))  # whole tensors are dealt out
    return {"weights": total * width, "gradients": sum(trained.values()) * width,
            "reference": total * width * (cfg.beta > 0),
            "optimizer": 0 if cfg.offload else owned * (8 + 4 * (width == 2)),
            "cache": slots * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width,
            **activations(config, cfg, P, width), "logits": logits(config, cfg, P, width)}


def peak(needed, cfg):
    """Bytes at the worst moment: all at once; with offload gradients come when activations and logits have gone."""
    if not cfg.offload:
        return sum(needed.values())
    forward, backward = needed["activations"] + needed["logits"], needed["gradients"]
    return sum(needed.values()) - min(forward, backward)


def width_of(cfg):
    """Bytes of a weight."""
    return 4 if cfg.dtype == "float32" or (cfg.dtype == "auto" and not torch.cuda.is_available()) else 2


def activations(config, cfg, P, width):
    """{"activations": bytes that layers keep for the backward pass of a micro-batch, "layer": of the one at work}."""
    text, tower = config.text_config, config.vision_config
    tokens = cfg.micro_batch * (P + cfg.num_generations * cfg.max_completion_length)
    layers = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size)]
    if not cfg.freeze_vision:
        patches = cfg.micro_batch * cfg.max_pixels // 196
        layers.append((tower.depth, patches, tower.hidden_size, tower.intermediate_size))
    # a layer keeps its normed, projected and attended states (13 H) and four states of its MLP (4 I)
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layers]
    kept = sum(depth * w for (depth, *_), w in zip(layers, whole)) - max(whole)
    if cfg.checkpoint_activations:  # every layer's input; the layer at work is computed again
        kept = sum(depth * n * h * width for depth, n, h, _ in layers)
    return {"activations": kept, "layer": max(whole)}


def logits(config, cfg, P, width):
    """Bytes of one chunk of logits in float32 and what is made of it, and of the head's gradient before it is added."""
    text, tokens = config.text_config, cfg.micro_batch * cfg.num_generations * cfg.max_completion_length
    return 12 * min(CHUNK, tokens * text.vocab_size) + text.vocab_size * text.hidden_size * width


def check_memory(needed, cfg, say=say):
    """Say what a run will need per process; UserError for what a GPU cannot hold, or memory not by far (an estimate)."""
    parts = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items() if size > 2**27)
    say(f"memory per process, estimated: {peak(needed, cfg) / 2**30:.1f} GiB ({parts or 'all small'})")
    cuda = torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if cuda else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fixed = OVERHEAD + sum(needed[name] for name in ("weights", "gradients", "reference", "optimizer"))
    if cuda and fixed > there:
        raise UserError(f"weights, gradients, reference, optimizer and CUDA need {fixed / 2**30:.1f} GiB on each GPU, "
                        f"which has {there / 2**30:.1f}: use --offload, more GPUs (the optimizer is shared among "
                        "them), --freeze_vision or --beta 0")
    if peak(needed, cfg) > 1.5 * there:     # what is near is tried
        raise UserError(f"the run needs about {peak(needed, cfg) / 2**30:,.0f} GiB in each process, most of it for "
                        f"{max(needed, key=needed.get)}, and there are {there / 2**30:,.0f}: lower --max_rows, "
                        "--micro_batch, --max_completion_length or --max_pixels, or add --checkpoint_activations")


# ---- Added up ----

class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live while it is on: `now`, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes, self.host = 0, 0, {}, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0 if self.host else storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    @contextlib.contextmanager
    def elsewhere(self, host):
        """What begins to live meanwhile lives on the host, if `host`, and is not counted."""
        self.host = host
        yield
        self.host = False


def simulate(config, cfg, ranks, prompt_length=None):
    """{"rollout" | "backward" | "optimizer": peak bytes} of the second of two whole steps of one rank."""
    from currreft import grpo_loss, token_logps  # which imports this file
    side = 2 * int((cfg.max_pixels // 784) ** 0.5)
    prompt = stand_in(config, prompt_length or cfg.max_pixels // 784 + 200, side)
    packed = engine.pack(SimpleNamespace(config=config, dtype=torch.bfloat16, device="cpu"), [prompt] * cfg.micro_batch,
                         [[[0] * cfg.max_completion_length] * cfg.num_generations] * cfg.micro_batch)
    tower = tower_arguments(config, prompt.image_grid_thw.repeat(cfg.micro_batch, 1))
    mode, live, peaks = FakeTensorMode(allow_non_fake_inputs=True), Live(), {}
    with pretended(ranks, mode, tower), mode, live:
        policy = engine.attach_attention(make_model(config, cfg))
        policy.model.visual.requires_grad_(not cfg.freeze_vision)
        reference = engine.attach_attention(make_model(config, cfg)).requires_grad_(False) if cfg.beta else None
        if cfg.checkpoint_activations:
            policy.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        with live.elsewhere(cfg.offload):
            optimizer = distributed.ShardedAdamW(policy.named_parameters(), offload=cfg.offload)
        packed = engine.Packed(**{k: v if v is None else mode.from_tensor(v) for k, v in vars(packed).items()})
        bias, A = torch.zeros(config.text_config.vocab_size), torch.ones(len(packed.prompt_of))
        processor = SimpleNamespace(end_ids=(1, 2), forbidden_ids=lambda v: (0,))
        rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
        decoder = engine.Engine(policy, processor, len(prompt.input_ids), rows, cfg.max_completion_length,
                                width=cfg.num_generations, capture=False, shared=engine.shares_prompts(
                                    "cuda", len(prompt.input_ids), rows, cfg.num_generations))
        for _ in range(2):  # in the second step, the optimizer has its moments
            live.peak = live.now
            with torch.no_grad():
                decoder._decode(rows, decoder.tail, *(
                    (decoder.groups, cfg.num_generations, decoder.longest) if decoder.shared else ()))
            peaks["rollout"], live.peak = live.peak, live.now
            policy.train()
            for _ in range(2):  # the second micro-batch finds the first one's gradients
                logp = token_logps(policy, packed, bias, cfg.temperature)
                with torch.no_grad():
                    logp_ref = token_logps(reference, packed, bias, cfg.temperature) if cfg.beta else None
                grpo_loss(logp, logp.detach(), logp_ref, A, packed.mask)[0].backward()
                with live.elsewhere(cfg.offload):
                    optimizer.collect()
            peaks["backward"], live.peak = live.peak, live.now
            with live.elsewhere(cfg.offload):
                optimizer.reduce_gradients(cfg.max_grad_norm)
                optimizer.step(cfg.lr)
            peaks["optimizer"] = live.peak
            optimizer.zero_grad()
    return peaks


def make_model(config, cfg):
    """The model of a configuration, without data where fake tensors are on."""
    dtype = torch.bfloat16 if width_of(cfg) == 2 else torch.float32
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)


def stand_in(config, length, side):
    """A prompt of `length` tokens with a square image of side x side patches, as far as it fits."""
    side = min(side, 2 * int((length - 20) ** 0.5))
    ids = torch.zeros(length, dtype=torch.long)
    ids[10:10 + side * side // 4] = config.image_token_id
    return Prompt(ids, torch.zeros(side * side, 1176), torch.tensor([[1, side, side]]),
                  position_ids=torch.arange(length).expand(3, -1))


def tower_arguments(config, grids):
    """What the vision tower reads off the grids before its first layer: fake tensors have no values to read."""
    from transformers import vision_utils as utils
    vision = config.vision_config
    cu, _ = utils.get_vision_attention_seqlens(grids, vision)
    index, windows = utils.get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size,
                                                   vision.patch_size)
    return {"position_ids": utils.get_vision_position_ids(grids, vision.spatial_merge_size), "cu_seqlens": cu,
            "max_seqlen": int(cu.diff().max()), "window_index": index, "cu_window_seqlens": windows,
            "max_window_seqlen": int(windows.diff().max())}


@contextlib.contextmanager
def pretended(ranks, mode, tower):
    """So many ranks, whose collectives do nothing; a vision tower that is told its windows; AdamW fused as on CUDA."""
    fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in tower.items()}
    for name in ("cu_seqlens", "cu_window_seqlens"):
        fake[name].windows = tuple(x if x is None else mode.from_tensor(x) for x in engine.windows(tower[name]))

    def features(model, pixels, grids):
        return model.model.visual(pixels.to(model.dtype), grid_thw=grids, **fake).pooler_output

    class Norm(float):
        item = float.__float__

    class Fused(torch.optim.AdamW):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "fused": True})
    nothing = SimpleNamespace(all_reduce=lambda *_, **__: SimpleNamespace(wait=lambda: None), broadcast=lambda *_: None,
                              is_initialized=lambda: False)
    with mock.patch.object(distributed, "world", lambda: (0, ranks)), mock.patch.object(distributed, "dist", nothing), \
            mock.patch.object(engine, "image_features", features), mock.patch.object(torch.optim, "AdamW", Fused), \
            mock.patch.object(torch.nn.utils, "get_total_norm", lambda gradients: Norm(1)):
        yield


# ---- Command ----

SEVEN = {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28, "num_hidden_layers": 28,
         "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False}  # Qwen2.5-VL-7B's, beside 3B's


def configuration(size):
    """The released configuration of "3b" or "7b"."""
    from tools.rehearse import real_config
    config = real_config()
    if size == "7b":
        config |= SEVEN
        config["vision_config"] |= {"out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(**config)


LEAN = {"checkpoint_activations": True}
CARDS = (("3b", 1, 80, LEAN), ("3b", 8, 80, {}), ("3b", 8, 40, LEAN), ("3b", 32, 80, {"prompts_per_step": 32}),
         ("3b", 1, 32, {**LEAN, "offload": True}), ("3b", 1, 24, {**LEAN, "offload": True, "beta": 0.0, "max_rows": 32}),
         ("7b", 8, 80, LEAN), ("7b", 1, 80, {**LEAN, "offload": True}))  # size, GPUs, GB of each, flags


def line(size, ranks, settings, prompt_length=None, card=""):
    """One line of the table: both figures in GiB, and what the estimate is made of."""
    from currreft import Config
    cfg, config = Config(data="-", dtype="bfloat16", **settings), configuration(size)
    needed = memory_needed(config, cfg, ranks, prompt_length)
    added = max(simulate(config, cfg, ranks, prompt_length).values())
    shown = " ".join(f"--{k}" if v is True else f"--{k} {v}" for k, v in settings.items()) or "-"
    cells = [size, f"{ranks}{card and f' x {card} GB'}", shown, *(f"{needed[name] / 2**30:.1f}" for name in needed),
             f"{peak(needed, cfg) / 2**30:.1f}", f"{added / 2**30:.1f}"]
    return "| " + " | ".join(cells) + " |"


HEADING = ("| size | GPUs | flags | weights | gradients | reference | optimizer | cache | activations | layer | logits "
           "| estimated | added up |\n|" + "---|" * 13)


def main(argv=None):
    """Print the table of docs/3b.md, or one line for the flags that are given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=("3b", "7b"), help="one line for this size alone, with the flags below")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, help="tokens of the longest prompt (default: an image and 200)")
    for name in ("micro_batch", "max_rows", "prompts_per_step", "num_generations", "max_completion_length",
                 "max_pixels"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--beta", type=float)
    for name in ("checkpoint_activations", "freeze_vision", "offload"):
        parser.add_argument(f"--{name}", action="store_true", default=None)
    args = vars(parser.parse_args(argv))
    size, ranks, length = (args.pop(name) for name in ("size", "ranks", "prompt_length"))
    print(f"GiB per GPU, bfloat16 weights, float32 masters; about {OVERHEAD / 2**30:.0f} more for CUDA itself\n\n"
          + HEADING)
    if size:
        print(line(size, ranks, {k: v for k, v in args.items() if v is not None}, length))
    else:
        for size, ranks, card, settings in CARDS:
            print(line(size, ranks, settings, card=card), flush=True)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
