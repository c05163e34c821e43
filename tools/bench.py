"""How fast it is, against transformers' generate and against separate rows, in one run on this machine.

    python -m tools.bench                  a CPU: about 5 minutes
    python -m tools.bench --size 3b        a GPU: the real Qwen2.5-VL-3B configuration with random bfloat16 weights
    python -m tools.bench --prompts        rollouts whose groups keep their prompt once, beside copies
    python -m tools.bench --against_trl    whole training steps, in turn with those of TRL's GRPOTrainer
    python -m tools.bench --json > out.json

Weights are random: the work is the same. Compared measures are interleaved; figures are medians of --repeats.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import random
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers

import currreft
import engine
from currreft import Config, Stage, group_advantages, grpo_loss, token_logps
from data import Example, Prompt, instruction
from distributed import ShardedAdamW
from engine import attach_attention, forbidden_bias, generate, pack
from rewards import accuracy_reward, format_reward, quality_score
from run import Run
from tools.tiny import tiny_image, tiny_tokenizer
from tools.terminal import terminal

SIZES = {  # text hidden, intermediate, layers, heads, kv heads, vocabulary; vision hidden, intermediate, depth, heads
    "demo": (128, 384, 4, 4, 2, 1024, 128, 256, 2, 4),
    "tiny": (192, 512, 4, 4, 2, 512, 64, 128, 2, 4),
    "small": (512, 1408, 8, 8, 2, 8192, 128, 256, 4, 4),
    "3b": (2048, 11008, 36, 16, 2, 151_936, 1280, 3420, 32, 16),  # config.json of Qwen/Qwen2.5-VL-3B-Instruct
}


def build(size, device, dtype):
    """A random Qwen2.5-VL of a named size, in eval mode, with transformers' own attention; and a stand-in processor."""
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
    for module in model.modules():
        module.__dict__.pop("forward", None)  # the engine's norms
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
    # A decode step must read every weight once; the limit is what this memory can be read at.
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".visual." not in n)
    x = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    bandwidth = 2 * x.numel() / statistics.median(timed(x.clone, device) for _ in range(20))
    model.engine = None
    return {"engine tok/s": tokens / seconds["engine"], "generate tok/s": tokens / seconds["generate"],
            "speed-up": seconds["generate"] / seconds["engine"], "bandwidth GB/s": bandwidth / 1e9,
            "share of bandwidth": weights / bandwidth / (seconds["engine"] / new)}


SHAPES = [(B, 8, P, C) for P in (100, 600) for B in (4, 8) for C in (64, 128)]  # prompts, G, prompt tokens, new tokens


def shared_prompts(model, processor, device, repeats, B, G, P, C):
    """Seconds and cache bytes of a rollout whose groups keep their prompt once, and of one with a copy in every row."""
    batch = [make_prompt(model, processor, P, seed=i) for i in range(B)]
    engines = {name: engine.Engine(attach_attention(model), processor, P, B * G, C, width=G, shared=name == "once")
               for name in ("once", "copied")}
    seeds = [[i * G + g for g in range(G)] for i in range(B)]
    seconds = interleaved({name: partial(e.run, batch, [P] * B, seeds) for name, e in engines.items()}, device, repeats)
    size = {name: sum(t.numel() * t.element_size() for t in (*e.cache.tails, *(e.cache.prompts or ())))
            for name, e in engines.items()}
    return {"once s": seconds["once"], "copied s": seconds["copied"], "speed-up": seconds["copied"] / seconds["once"],
            "cache ratio": size["once"] / size["copied"]}


@torch.no_grad()
def patches(model, processor, device, repeats, count=8, P=600):
    """Seconds to embed the patches of `count` pictures, two thirds of P tokens each: by one product, by convolution."""
    module = attach_attention(model).model.visual.patch_embed
    pixels = torch.cat([make_prompt(model, processor, P, seed=i).pixel_values for i in range(count)]).to(device)
    seconds = interleaved({"product s": lambda: module(pixels),
                           "convolution s": lambda: type(module).forward(module, pixels)}, device, repeats)
    return {**seconds, "speed-up": seconds["convolution s"] / seconds["product s"]}


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
    seconds = interleaved({"packed": group_update(model, processor, P, C, G), "varied": varied,
                           "separate": group_update(model, processor, P, C, G, True)}, device, repeats)
    memory = {name: peak_memory(model, processor, size, device, P, C, G, name == "separate")
              for name in ("packed", "separate")}
    return {"packed s": seconds["packed"], "separate s": seconds["separate"],
            "a token where lengths vary": seconds["varied"] / varied.tokens / (seconds["packed"] / (P + G * C)),
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
        rollout = timed(lambda: groups.extend(generate(model.eval(), processor, batch, G, C)), device)
        packs = [pack(model, [p], [[o.tokens for o in g]]).to(device) for p, g in zip(batch, groups)]
        return {"rollout": rollout, "reference": timed(lambda: references.extend(score(packs)), device),
                "update": timed(lambda: update(packs, references, G), device),
                "optimizer": timed(lambda: (optimizer.reduce_gradients(1.0), optimizer.step(1e-6),
                                            optimizer.zero_grad()), device)}

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


# ---------------------------------------------------------------------------------------------------------------------
# Whole steps, in turn with TRL's


def write_checkpoint(size, folder):
    """A random model of a named size in `folder`, with the tests' tokenizer, as both programs read it."""
    model, tokenizer = build(size, "cpu", torch.float32)[0], tiny_tokenizer()
    for name, token in (("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
                        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>")):
        setattr(model.config, name, tokenizer.convert_tokens_to_ids(token))
    for part in (model, tokenizer, transformers.Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)


def write_examples(folder, count, side):
    """`count` questions about a square picture each, `side` pixels wide: 28 x 28 of them are a token."""
    pictures = [tiny_image(Path(folder) / f"{i}.png", (side, side), box=(i, i, 40, 40)) for i in range(count)]
    return [Example(problem=f"How many boxes are there in picture {i}?", solution="1", images=(str(picture),))
            for i, picture in enumerate(pictures)]


def cheap_reward(text):
    """Costs nothing and differs between completions."""
    return len(text) % 7 / 7


def our_step(folder, examples, G, new):
    """(a function that takes the GRPO step of a number on all examples and returns what grpo_step returns, its Run)."""
    cfg = Config(model=str(folder), prompts_per_step=len(examples), num_generations=G, max_completion_length=new,
                 micro_batch=len(examples), max_rows=len(examples) * G, sample_every=10**9)
    run = Run(cfg, torch.device("cpu"), {"open": examples})
    stage = Stage(0, "open", 10**6)
    run.load_weights(folder)
    run.load_reference(stage)
    run.processor.forbidden_ids = lambda vocabulary: never_sampled(run.processor)
    run.bias = forbidden_bias(run.policy, run.processor)
    run.optimizer = ShardedAdamW(run.policy.named_parameters())

    def step(number):
        with mock.patch.object(currreft, "accuracy_reward", lambda text, example, **_: cheap_reward(text)):
            return currreft.grpo_step(run, stage, number)
    return step, run


def never_sampled(processor):
    """Vision tokens, which no completion may hold, and end tokens, so that none stops early."""
    return [*processor.vision_ids, *processor.end_ids]


def trl_trainer(folder, examples, processor, G, new, steps):
    """TRL's GRPOTrainer set to the same step: one rollout, one update; no logging, saving or checkpointing."""
    from datasets import Dataset, Image
    from trl import GRPOConfig, GRPOTrainer
    rows = [{"prompt": [{"role": "user", "content": f"{e.problem}\n{instruction(e)}"}], "image": e.images[0]}
            for e in examples]
    config = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_steps=steps, beta=0.04, loss_type="grpo",
        num_generations=G, max_completion_length=new, learning_rate=1e-6, gradient_checkpointing=False,
        per_device_train_batch_size=G, gradient_accumulation_steps=len(examples),  # faster than all groups at once
        generation_kwargs={"suppress_tokens": never_sampled(processor)},
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False)

    def reward(completions, **_):
        texts = [completion[0]["content"] for completion in completions]
        return [cheap_reward(text) + format_reward(text, examples[0]) for text in texts]
    trainer = GRPOTrainer(model=str(folder), args=config, reward_funcs=reward,
                          train_dataset=Dataset.from_list(rows).cast_column("image", Image()))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def against_trl(size, repeats, prompts=4, G=8, new=64, side=112):
    """Seconds of whole GRPO steps, ours and TRL's in turn: same weights, prompts, images, sizes, lengths and loss.

    TRL's rollout is its call of generate alone; reading images, rewards, reference and loss are in its rest.
    """
    times, rollouts = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(size, folder)
        examples = write_examples(folder, prompts, side)
        step, run = our_step(folder, examples, G, new)
        asked = {tuple(run.processor(example).input_ids.tolist()) for example in examples}
        trainer = trl_trainer(folder, examples, run.processor, G, new, repeats + 1)
        inner = trainer.model.generate

        def generate_timed(input_ids, **inputs):
            start = time.perf_counter()
            out = inner(input_ids=input_ids, **inputs)
            rollouts.append(time.perf_counter() - start)
            if {tuple(ids) for ids in input_ids.tolist()} != asked or out.shape[1] != input_ids.shape[1] + new:
                raise RuntimeError("TRL was asked other prompts or answered at another length: no comparison")
            return out

        class Turns(transformers.TrainerCallback):
            def on_step_end(self, *_, **__):
                theirs, ours = time.perf_counter() - self.began, step(len(times) + 1)[1]
                times.append({"ours s": ours["rollout"] + ours["update"], "TRL s": theirs, "ours, rollout s":
                              ours["rollout"], "ours, rest s": ours["update"], "TRL, generate s": rollouts[-1],
                              "TRL, rest s": theirs - rollouts[-1]})
                self.began = time.perf_counter()

        trainer.model.generate, turns = generate_timed, Turns()
        trainer.add_callback(turns)
        turns.began = time.perf_counter()
        trainer.train()
    medians = {name: statistics.median(t[name] for t in times[1:]) for name in times[0]}
    return {"prompt tokens": str(max(map(len, asked))), "speed-up": medians["TRL s"] / medians["ours s"], **medians}


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
    """Run the measures that this machine can; print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--against_trl", action="store_true",
                        help="instead: whole training steps against TRL's GRPOTrainer, on the CPU")
    parser.add_argument("--prompts", action="store_true",
                        help="instead: rollouts whose groups keep their prompt once, beside a copy in every row")
    parser.add_argument("--rewards", action="store_true", help="instead: the slowest texts that a reward may meet")
    args = parser.parse_args(argv)
    if args.against_trl:
        try:
            import trl  # noqa: F401
            import torchvision  # noqa: F401  TRL's processor asks for it
        except ImportError as error:
            parser.error(f"--against_trl needs what this project does not: pip install trl torchvision ({error})")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and not args.against_trl else "cpu"
    if args.size == "3b" and device == "cpu":
        parser.error("--size 3b needs a GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, processor = build(args.size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    report = {"machine": {
        "date": time.strftime("%Y-%m-%d"),
        "model": f"{args.size}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "hardware": torch.cuda.get_device_name() if device == "cuda" else
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "transformers": transformers.__version__}}
    if args.against_trl:
        report["machine"]["trl"] = trl.__version__
    work = (model, processor, device, args.repeats)
    if args.rewards:
        cases = {"rewards, slowest of accuracy and quality": slowest_rewards}
    elif args.prompts:
        cases = {f"{B} prompts of {P} tokens x {G}, {C} new": partial(shared_prompts, *work, B, G, P, C)
                 for B, G, P, C in SHAPES}
    else:
        cases = against_trl_cases(args) if args.against_trl else own_cases(args, *work)
    if not args.json:
        show("machine", report["machine"])
    for name, measure in cases.items():
        report[name] = measure()
        if not args.json:
            show(name, report[name])
    if args.json:
        print(json.dumps(report, indent=1))


def own_cases(args, model, processor, device, repeats):
    """{title: a function without arguments that measures}, as much as this machine can."""
    work = (model, processor, device, repeats)
    cases = {"patches of 8 pictures, by one product": lambda: patches(*work)}
    cases |= {f"rollout, 4 prompts of {P} tokens x 8, 128 new tokens": lambda P=P: rollout(*work, length=P)
             for P in (100, 600)}
    if device == "cuda":
        cases["rollout, 8 prompts of 700 tokens x 8, 256 new tokens"] = lambda: rollout(*work, 8, 8, 256, 700)
    cases["update of a group, P=600 C=200 G=8"] = lambda: update(model, processor, args.size, device, repeats)
    cases["rollout + update as work grows"] = lambda: scaling(*work)
    if args.size == "3b":
        cases["full fine-tuning step, 8 prompts, P=700 C=512 G=8"] = \
            lambda: full_step(model, processor, args.size, device, repeats)
    return cases


def against_trl_cases(args):
    """The same for whole steps: short ones as in the demo, and longer ones of which most is picture."""
    return {f"whole step, {prompts} prompts with a picture of {side} x {side} x 8, {new} new tokens":
            lambda p=prompts, n=new, s=side: against_trl(args.size, args.repeats, p, 8, n, s)
            for prompts, new, side in ((8, 64, 84), (2, 200, 560))}


def show(name, figures):
    """A block of the table for people."""
    print(name)
    for key, value in figures.items():
        text = value if isinstance(value, str) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        print(f"    {key:<28}{text}", flush=True)


if __name__ == "__main__":
    with terminal():
        main()
