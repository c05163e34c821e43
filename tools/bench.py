"""How fast it is, beside other programs and beside what no program can avoid, in one run on this machine.

    python -m tools.bench                      a CPU: about 5 minutes
    python -m tools.bench --size 3b            a GPU: the real Qwen2.5-VL-3B configuration with random bfloat16 weights
    python -m tools.bench --against generate   rollouts beside transformers' generate, at eight sizes
    python -m tools.bench --against vllm --python ENV/bin/python    the same beside vLLM, eager and compiled
    python -m tools.bench --against trl        whole training steps beside TRL's GRPOTrainer
    python -m tools.bench --prompts            rollouts whose groups keep their prompt once, beside copies
    python -m tools.bench --parts              where a step's time goes, beside the least that it could take
    python -m tools.bench --growth             how cost grows, and whether long work stays flat
    python -m tools.bench --json > out.json    any of them, for machines

Weights are random: the work is the same. Compared measures are interleaved; figures are medians of --repeats. Ratios are of
CPU seconds, which other work disturbs less than seconds on the wall; on a GPU, of seconds on the wall.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers

import engine
from currreft import group_advantages, grpo_loss
from engine import generate
from packed import attach_attention, forbidden_bias, pack, token_logps
from rewards import Example, accuracy_reward
from sample import quality_score
from support.optimizer import ShardedAdamW
from support.words import UserError, terminal
from tools.against import against_trl, against_vllm
from tools.floor import decode_parts, update_floor, update_parts
from tools.growth import growth_cases
from tools.timing import SIZES, build, compared, hf_inputs, interleaved, make_prompt, plain, timed


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

    costs = interleaved({"engine": ours, "generate": theirs}, device, repeats)
    tokens, seconds = prompts * G * new, {name: cost.wall for name, cost in costs.items()}
    # A decode step must read every weight once; the limit is what this memory can be read at.
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".visual." not in n)
    x = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    bandwidth = 2 * x.numel() / statistics.median(timed(x.clone, device).wall for _ in range(20))
    model.engine = None
    return {"engine tok/s": tokens / seconds["engine"], "generate tok/s": tokens / seconds["generate"],
            **compared(costs, device), "bandwidth GB/s": bandwidth / 1e9,
            "share of bandwidth": weights / bandwidth / (seconds["engine"] / new)}


SHAPES = [(B, 8, P, C) for P in (100, 600) for B in (4, 8) for C in (64, 128)]  # prompts, G, prompt tokens, new tokens


def shared_prompts(model, processor, device, repeats, B, G, P, C):
    """Seconds and cache bytes of a rollout whose groups keep their prompt once, and of one with a copy in every row."""
    batch = [make_prompt(model, processor, P, seed=i) for i in range(B)]
    engines = {name: engine.Engine(attach_attention(model), processor, P, B * G, C, width=G, shared=name == "once")
               for name in ("once", "copied")}
    seeds = [[i * G + g for g in range(G)] for i in range(B)]
    costs = interleaved({name: partial(e.run, batch, [P] * B, seeds) for name, e in engines.items()}, device, repeats)
    size = {name: sum(t.numel() * t.element_size() for t in (*e.cache.tails, *(e.cache.prompts or ())))
            for name, e in engines.items()}
    return {**compared(costs, device), "cache ratio": size["once"] / size["copied"]}


@torch.no_grad()
def patches(model, processor, device, repeats, count=8, P=600):
    """Seconds to embed the patches of `count` pictures, two thirds of P tokens each: by one product, by convolution."""
    module = attach_attention(model).model.visual.patch_embed
    pixels = torch.cat([make_prompt(model, processor, P, seed=i).pixel_values for i in range(count)]).to(device)
    return compared(interleaved({"product": lambda: module(pixels),
                                 "convolution": lambda: type(module).forward(module, pixels)}, device, repeats), device)


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


def varied_updates(model, processor, P, C, G, groups=8):
    """A function that updates on groups of other lengths each: half to all of P, a quarter to all of C."""
    rng = random.Random(0)
    bias = forbidden_bias(model, processor)
    batch = [(make_prompt(model, processor, rng.randint(P // 2, P), seed=i),
              [[0] * rng.randint(C // 4, C) for _ in range(G)]) for i in range(groups)]

    def run():
        attach_attention(model)
        for prompt, group in batch:
            token_logps(model.train(), pack(model, [prompt], [group]).to(model.device), bias).sum().backward()
        model.zero_grad()
    run.tokens = sum(len(prompt.input_ids) + sum(map(len, group)) for prompt, group in batch)
    return run


def update(model, processor, size, device, repeats, P=600, C=200, G=8):
    """Seconds and memory of one group's update, packed against separate rows; and of groups whose lengths vary.

    Each group of a run has lengths of its own: what builds or plans anew for a new shape shows in the last figure, the
    cost of a token there over its cost in equal groups.
    """
    varied = varied_updates(model, processor, P, C, G)
    costs = interleaved({"packed": group_update(model, processor, P, C, G), "varied": varied,
                         "separate": group_update(model, processor, P, C, G, True)}, device, repeats)
    memory = {name: peak_memory(model, processor, size, device, P, C, G, name == "separate")
              for name in ("packed", "separate")}
    floor = update_floor(model, P, C, G, patches=len(make_prompt(model, processor, P).pixel_values))
    spent = {name: cost.wall if device == "cuda" else cost.cpu for name, cost in costs.items()}
    return {**compared({name: costs[name] for name in ("packed", "separate")}, device),
            "floor s": floor, "separate / floor": spent["separate"] / floor,
            "a token where lengths vary": spent["varied"] / varied.tokens / (spent["packed"] / (P + G * C)),
            "packed MB": memory["packed"] / 1e6, "separate MB": memory["separate"] / 1e6,
            "memory ratio": memory["packed"] / memory["separate"]}


def full_step(model, processor, size, device, repeats, P=700, C=512, G=8, prompts=8, groups=(8, 16, 32, 64, 128)):
    """A full fine-tuning step with activations checkpointed: memory, seconds by phase, and what follows from them.

    What follows: an estimate of the released schedule's hours, and the largest of `groups` (values of G) that fits.
    """
    reference = attach_attention(build(size, device, model.dtype)[0])
    attach_attention(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    optimizer, bias = ShardedAdamW(model.named_parameters()), forbidden_bias(model, processor)
    batch = [make_prompt(model, processor, P, seed=i) for i in range(prompts)]

    def update(packs, references, G):
        for packed, logp_ref in zip(packs, references):
            logp, advantages = token_logps(model.train(), packed, bias), group_advantages(torch.rand(G))
            grpo_loss(logp, logp.detach(), logp_ref, advantages.to(device), packed.mask)[0].backward()

    @torch.no_grad()
    def score(packs):
        return [token_logps(reference, packed, bias) for packed in packs]

    def step(batch, G):
        """One step; returns seconds by phase."""
        groups, references = [], []
        rollout = timed(lambda: groups.extend(generate(model.eval(), processor, batch, G, C)), device).wall
        packs = [pack(model, [p], [[o.tokens for o in g]]).to(device) for p, g in zip(batch, groups)]
        return {"rollout": rollout, "reference": timed(lambda: references.extend(score(packs)), device).wall,
                "update": timed(lambda: update(packs, references, G), device).wall,
                "optimizer": timed(lambda: (optimizer.reduce_gradients(1.0), optimizer.step(1e-6),
                                            optimizer.zero_grad()), device).wall}

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = [step(batch, G) for _ in range(repeats + 1)][1:]
    seconds = {phase: statistics.median(s[phase] for s in steps) for phase in steps[0]}
    peak = {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {}
    fits = 0
    for group in groups:
        try:
            step(batch[:1], group)
        except torch.OutOfMemoryError:
            break
        fits = group
    model.engine = None
    return {**peak, **{f"{phase} s": value for phase, value in seconds.items()}, "step s": sum(seconds.values()),
            "rollout tok/s": prompts * G * C / seconds["rollout"], "largest G that fits": f"{fits} of {groups}",
            "schedule, estimated": schedule(seconds, P, C, G, prompts)}


def schedule(seconds, P, C, G, prompts, questions=3000, sft_batch=32):
    """The released schedule's hours, from one step's seconds by phase, as a sentence.

    binary:600 choice:500 open:2300 reject:400; every completion is taken to be C tokens long. The number of questions
    that are sampled from is not published; an SFT example costs the share of a group's update that its tokens have.
    """
    rl = (600 + 500 + 2300) * sum(seconds.values())
    sampling = questions / prompts * 8 / G * seconds["rollout"]
    sft = 400 * (sft_batch / prompts * seconds["update"] * (P + C) / (P + G * C) + seconds["optimizer"])
    return (f"{(rl + sampling + sft) / 3600:.1f} h on one device: RL {rl / 3600:.1f} (3400 steps, {prompts} prompts "
            f"x {G}), sampling {sampling / 3600:.1f} ({questions} questions x 8), "
            f"SFT {sft / 3600:.1f} (400 steps, {sft_batch})")


def slowest_rewards():
    """{case: milliseconds of CPU} of accuracy and quality on texts that are made to be slow, 4,000 characters each."""
    pieces = ("√1", "\\frac{1}{", "{", "(", "[1,2],", "{{1,2},{3,4}},", "a,", "\\text{a}", "10^", "(1,2),", "9,",
              "word ")
    truths = ("12", "B", "2√{2}-2", "{1,2,3}", "{" + ",".join(f"{{{i},{i + 1}}}" for i in range(12)) + "}")

    def cost(answer, truth, task):
        example, times = Example(problem="", solution=truth, task=task), []
        text = f"<think>{answer}</think><answer>{answer}</answer>"
        for function in (accuracy_reward, quality_score):
            start = time.process_time()
            function(text, example)
            times.append(1000 * (time.process_time() - start))
        return max(times)
    cases = {f"boxes, {n} x {m}": cost(boxes_of(n, 0), boxes_of(m, 5), "detection")
             for n, m in ((16, 64), (32, 32), (32, 64), (64, 64))}
    for task in ("math", "general", "classify"):
        cases[f"slowest text, {task}"] = max(
            cost((piece * 4000)[:3990], truth, task) for piece in pieces for truth in truths)
    return {name: f"{value:.1f} ms" for name, value in cases.items()}


def boxes_of(count, shift):
    """So many boxes that all overlap, as JSON."""
    return json.dumps([{"bbox_2d": [i + shift, i, i + 500, i + 500]} for i in range(count)])


def main(argv=None):
    """Run the measures that are asked for; print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--json", action="store_true")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--against", choices=("generate", "trl", "vllm"), help="beside another program")
    table.add_argument("--parts", action="store_true", help="a step part by part beside its floor, on a CPU")
    table.add_argument("--growth", action="store_true", help="cost as work grows, on a CPU")
    table.add_argument("--prompts", action="store_true",
                       help="rollouts whose groups keep their prompt once, beside a copy in every row")
    table.add_argument("--rewards", action="store_true", help="the slowest texts that a reward may meet")
    parser.add_argument("--python", default=sys.executable, help="of --against vllm: the Python that has it")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cpu_only = args.against == "trl" or args.parts or args.growth or args.rewards
    device = "cuda" if torch.cuda.is_available() and not cpu_only else "cpu"
    if args.size == "3b" and device == "cpu":
        parser.error("--size 3b needs a GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, processor = build(args.size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    report = {"machine": {
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{args.size}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else
        f"{cpu_name()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "transformers": transformers.__version__}}
    try:
        cases = chosen(args, model, processor, device)
        if not args.json:
            show("machine", report["machine"])
        for name, measure in cases.items():
            report[name] = measure()
            if not args.json:
                show(name, report[name])
    except UserError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps(report, indent=1))


def cpu_name():
    """What this CPU is called, and its widest vectors."""
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()})"


def chosen(args, model, processor, device):
    """{title: a function without arguments that measures} of the table that is asked for."""
    work = (model, processor, device, args.repeats)
    if args.rewards:
        return {"rewards, slowest of accuracy and quality": slowest_rewards}
    if args.prompts:
        return {f"{B} prompts of {P} tokens x {G}, {C} new": partial(shared_prompts, *work, B, G, P, C)
                for B, G, P, C in SHAPES}
    if args.parts:
        return {f"{what}, {B} prompts of {P} tokens x {G}, {C} new": partial(
            measure, model, processor, args.repeats, B, G, P, C)
            for B, G, P, C in ((8, 8, 98, 64), (2, 8, 489, 200))
            for what, measure in (("rollout", decode_parts), ("update", update_parts))}
    if args.growth:
        return growth_cases(args.size, model, processor, args.repeats)
    if args.against == "vllm":
        return against_vllm(args.size, device, args.repeats, args.python, SHAPES)
    if args.against == "generate":
        return {f"rollout, {B} prompts of {P} tokens x {G}, {C} new": partial(rollout, *work, B, G, C, P)
                for B, G, P, C in SHAPES}
    if args.against == "trl":  # short steps as in the demo, and longer ones of which most is picture
        return {f"whole step, {B} prompts with a picture of {side} x {side} x 8, {new} new":
                partial(against_trl, args.size, args.repeats, B, 8, new, side)
                for B, new, side in ((8, 64, 84), (2, 200, 560))}
    return own_cases(args.size, *work)


def own_cases(size, model, processor, device, repeats):
    """{title: a function without arguments that measures}, as much as this machine can."""
    work = (model, processor, device, repeats)
    cases = {"patches of 8 pictures, by one product": partial(patches, *work)}
    cases |= {f"rollout, 4 prompts of {P} tokens x 8, 128 new": partial(rollout, *work, length=P) for P in (100, 600)}
    if device == "cuda":
        cases["rollout, 8 prompts of 700 tokens x 8, 256 new"] = partial(rollout, *work, 8, 8, 256, 700)
    cases["update of a group, P=600 C=200 G=8"] = partial(update, model, processor, size, device, repeats)
    if size == "3b":
        cases["full fine-tuning step, 8 prompts, P=700 C=512 G=8"] = partial(
            full_step, model, processor, size, device, repeats)
    return cases


def show(name, figures):
    """A block of the table for people."""
    print(name)
    for key, value in figures.items():
        text = value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        print(f"    {key:<34}{text}", flush=True)


if __name__ == "__main__":
    with terminal():
        main()
