"""How fast it is, against transformers' generate and against separate rows, in one run on this machine.

    python tests/bench.py                  a CPU: about 5 minutes
    python tests/bench.py --size 3b        a GPU: the real Qwen2.5-VL-3B configuration with random bfloat16 weights
    python tests/bench.py --json > out.json

Weights are random: the work is the same. Compared measures are interleaved; figures are medians of --repeats.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from currreft import ShardedAdamW, token_logps  # noqa: E402
from data import Prompt  # noqa: E402
from engine import attach_attention, forbidden_bias, generate, pack  # noqa: E402

SIZES = {  # text hidden, intermediate, layers, heads, kv heads, vocabulary; vision hidden, intermediate, depth, heads
    "tiny": (192, 512, 4, 4, 2, 512, 64, 128, 2, 4),
    "small": (512, 1408, 8, 8, 2, 8192, 128, 256, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151_936, 1280, 3420, 32, 16),  # config.json of Qwen/Qwen2.5-VL-3B-Instruct
}


def build(size, device, dtype):
    """A random Qwen2.5-VL of a named size, in eval mode, with the engine's attention; and a stand-in processor."""
    hidden, inner, layers, heads, kv, vocabulary, v_hidden, v_inner, depth, v_heads = SIZES[size]
    half = hidden // heads // 2
    section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 at 3B
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
            "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": None, "eos_token_id": None},
        vision_config={
            "hidden_size": v_hidden, "intermediate_size": v_inner, "depth": depth, "num_heads": v_heads,
            "out_hidden_size": hidden, "window_size": 112,
            "fullatt_block_indexes": list(range(depth))[7::8] or [depth - 1]},
        image_token_id=vocabulary - 4, video_token_id=vocabulary - 3, vision_start_token_id=vocabulary - 6,
        vision_end_token_id=vocabulary - 5, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    processor = SimpleNamespace(end_ids=(-1,), image_token_id=vocabulary - 4, decode=lambda ids: "",
                                forbidden_ids=lambda v: range(v - 6, v))
    return model.to(device).eval(), processor


def make_prompt(model, processor, length, seed=0):
    """A prompt of `length` tokens; two thirds of them are a square image, as in this method's data."""
    g = torch.Generator().manual_seed(seed)
    side = int((length * 2 / 3) ** 0.5)
    grid, image = (2 * side, 2 * side), side * side
    ids = torch.randint(0, model.config.text_config.vocab_size - 10, (length,), generator=g)
    ids[10:10 + image] = processor.image_token_id
    return Prompt(ids, torch.randn(grid[0] * grid[1], 1176, generator=g), torch.tensor([[1, *grid]]))


def plain(model):
    """The same model with transformers' own attention: what the anchors use."""
    model.set_attn_implementation("sdpa")
    return model


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, device):
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def interleaved(functions, device, repeats, warmup=1):
    """Median seconds of each of several functions, run in turn."""
    times = {name: [] for name in functions}
    for i in range(warmup + repeats):
        for name, function in functions.items():
            seconds = timed(function, device)
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def hf_inputs(processor, prompts, device):
    ids = torch.stack([p.input_ids for p in prompts]).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == processor.image_token_id).int(),
            "pixel_values": torch.cat([p.pixel_values for p in prompts]).to(device),
            "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]).to(device)}


def rollout(model, processor, device, repeats, prompts=4, G=8, new=128, length=200):
    """Tokens per second of the engine and of generate(num_return_sequences=G): same prompts, same number of tokens."""
    batch = [make_prompt(model, processor, length, seed=i) for i in range(prompts)]

    def ours():
        attach_attention(model)
        generate(model, processor, batch, G, new, max_rows=prompts * G)

    def theirs():
        with torch.no_grad():
            plain(model).generate(**hf_inputs(processor, batch, device), num_return_sequences=G, do_sample=True,
                                  top_k=0, top_p=1.0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    seconds = interleaved({"engine": ours, "generate": theirs}, device, repeats)
    tokens = prompts * G * new
    out = {"engine tok/s": tokens / seconds["engine"], "generate tok/s": tokens / seconds["generate"],
           "speed-up": seconds["generate"] / seconds["engine"]}
    if device == "cuda":  # a decode step must read every weight once; the limit is what this card can read
        weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".visual." not in n)
        x = torch.empty(2**30, dtype=torch.uint8, device=device)
        copy = statistics.median(timed(lambda: x.clone(), device) for _ in range(20))
        bandwidth = 2 * x.numel() / copy
        out |= {"bandwidth GB/s": bandwidth / 1e9,
                "share of bandwidth": weights / bandwidth / (seconds["engine"] / new)}
    model.engine = None
    return out


def group_update(model, processor, P, C, G, separate=False):
    """A function that does forward and backward of one group: packed, or as G padded rows the way of other trainers."""
    device = str(model.device).split(":")[0]
    prompt = make_prompt(model, processor, P)
    group = [torch.randint(0, 400, (C,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(G)]
    bias = forbidden_bias(model, processor)

    def packed():
        attach_attention(model)
        token_logps(model.train(), pack(model, [prompt], [group]).to(model.device), bias).sum().backward()
        model.zero_grad()

    def rows():
        inputs = hf_inputs(processor, [prompt] * G, device)
        answers = torch.tensor(group, device=device)
        ids = torch.cat([inputs["input_ids"], answers], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                   "mm_token_type_ids": (ids == processor.image_token_id).int()}
        logits = plain(model).train()(**inputs, use_cache=False, logits_to_keep=C + 1).logits[:, :-1].float()
        logits.log_softmax(-1).gather(2, answers[..., None]).sum().backward()
        model.zero_grad()

    return rows if separate else packed


def _peak(connection, size, P, C, G, separate):
    """In a process of its own: peak memory of one update above what model and gradients take, in bytes (CPU)."""
    torch.set_num_threads(1)
    model, processor = build(size, "cpu", torch.float32)
    group_update(model, processor, 80, 4, 1, separate)()  # libraries and gradients are there
    gc.collect()
    function = group_update(model, processor, P, C, G, separate)
    before = _high_water("VmRSS")
    function()
    connection.send(_high_water("VmHWM") - before)


def _high_water(name):
    """Linux: resident bytes of this process now (VmRSS) or at their highest (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def peak_memory(model, processor, size, device, P, C, G, separate):
    """Bytes that one update needs above weights and gradients."""
    if device == "cuda":
        torch.cuda.synchronize(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        group_update(model, processor, P, C, G, separate)()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(there, size, P, C, G, separate))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the memory measure ended with exit code {process.exitcode}")
    return here.recv()


def update(model, processor, size, device, repeats, P=600, C=200, G=8):
    """Seconds and memory of one group's update, packed against separate rows."""
    seconds = interleaved({"packed": group_update(model, processor, P, C, G),
                           "separate": group_update(model, processor, P, C, G, True)}, device, repeats)
    memory = {name: peak_memory(model, processor, size, device, P, C, G, name == "separate") for name in seconds}
    return {"packed s": seconds["packed"], "separate s": seconds["separate"],
            "speed-up": seconds["separate"] / seconds["packed"],
            "packed MB": memory["packed"] / 1e6, "separate MB": memory["separate"] / 1e6,
            "memory ratio": memory["packed"] / memory["separate"]}


def scaling(model, processor, device, repeats, P=200, C=64):
    """Seconds of rollout plus update as the work grows: over G, prompts and completion length."""
    def step(prompts, G, new):
        batch = [make_prompt(model, processor, P, seed=i) for i in range(prompts)]

        def run():
            attach_attention(model)
            groups = generate(model.eval(), processor, batch, G, new, max_rows=prompts * G)
            for prompt, group in zip(batch, groups):
                group_loss = token_logps(model.train(), pack(model, [prompt], [[o.tokens for o in group]]).to(device),
                                         forbidden_bias(model, processor))
                group_loss.sum().backward()
            model.zero_grad()
        return run
    cases = {f"prompts {b}, G {g}, tokens {c}": (b, g, c)
             for b, g, c in ((2, 8, C), (2, 16, C), (4, 8, C), (2, 8, 2 * C))}
    seconds = interleaved({name: step(*case) for name, case in cases.items()}, device, repeats)
    model.engine = None
    first = next(iter(seconds.values()))
    return {name: f"{value:.2f} s, {value / first:.2f} x" for name, value in seconds.items()}


def full_step(model, processor, repeats, P=700, C=512, G=8, prompts=8):
    """CUDA: peak memory and seconds by phase of a full fine-tuning step, activations checkpointed."""
    from torch.nn import functional as F
    attach_attention(model)
    reference, _ = build("3b", "cuda", torch.bfloat16)
    attach_attention(reference)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    optimizer = ShardedAdamW(model.named_parameters())
    batch = [make_prompt(model, processor, P, seed=i) for i in range(prompts)]
    bias, times = forbidden_bias(model, processor), {"rollout": [], "reference": [], "update": [], "optimizer": []}
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        groups = []
        times["rollout"].append(timed(lambda: groups.extend(generate(model.eval(), processor, batch, G, C)), "cuda"))
        packs = [pack(model, [p], [[o.tokens for o in g]]).to("cuda") for p, g in zip(batch, groups)]
        with torch.no_grad():
            times["reference"].append(timed(lambda: [token_logps(reference, b, bias) for b in packs], "cuda"))
        times["update"].append(timed(lambda: [(-F.logsigmoid(token_logps(model.train(), b, bias)).sum()).backward()
                                              for b in packs], "cuda"))
        times["optimizer"].append(timed(lambda: (optimizer.reduce_gradients(1.0), optimizer.step(1e-6),
                                                 optimizer.zero_grad()), "cuda"))
    medians = {f"{name} s": statistics.median(values[1:]) for name, values in times.items()}
    return {"peak GiB": torch.cuda.max_memory_allocated() / 2**30, **medians}


def main(argv=None):
    """Run the measures that this machine can; print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "3b" and device == "cpu":
        parser.error("--size 3b needs a GPU")
    transformers.logging.set_verbosity_error()
    model, processor = build(args.size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    report = {"machine": {
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{args.size}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "transformers": transformers.__version__}}
    measures = {f"rollout, 4 prompts of {P} tokens x 8, 128 new tokens":
                lambda P=P: rollout(model, processor, device, args.repeats, length=P) for P in (100, 600)}
    if device == "cuda":
        measures["rollout, 8 prompts x 8, 256 tokens"] = \
            lambda: rollout(model, processor, device, args.repeats, 8, 8, 256, 700)
    measures["update of a group, P=600 C=200 G=8"] = lambda: update(model, processor, args.size, device, args.repeats)
    measures["rollout + update as work grows"] = lambda: scaling(model, processor, device, args.repeats)
    if args.size == "3b":
        measures["full fine-tuning step, 8 prompts, P=700 C=512 G=8"] = \
            lambda: full_step(model, processor, args.repeats)
    if not args.json:
        show("machine", report["machine"])
    for name, measure in measures.items():
        report[name] = measure()
        if not args.json:
            show(name, report[name])
    if args.json:
        print(json.dumps(report, indent=1))


def show(name, figures):
    """A block of the table for people."""
    print(name)
    for key, value in figures.items():
        text = value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        print(f"    {key:<28}{text}", flush=True)


if __name__ == "__main__":
    main()
