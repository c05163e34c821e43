"""How cost grows with every size, and whether work that goes on for hours stays flat. On a CPU."""

import multiprocessing
import os
import re
import socket
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist

import currreft
from currreft import Config
from engine import generate, load_policy
from packed import attach_attention, forbidden_bias, pack, token_logps
from rewards import Example
from sample import evaluate, rejection_sample
from support.ranks import join_ranks
from support.tiny import tiny_image, write_jsonl
from tools.against import our_step, write_checkpoint, write_examples
from tools.timing import interleaved, make_prompt, timed

BASE = dict(prompts=2, G=8, P=200, C=64, image=100)  # a prompt of 200 tokens, 100 of them a picture of 280 x 280
GROWN = {"prompts": (4, 8), "G": (16, 32), "P": (400, 800), "C": (128, 256), "image": (196, 400)}  # x 2 and x 4
LABELS = {"prompts": "prompts", "G": "G", "P": "prompt tokens", "C": "completion tokens", "image": "picture tokens"}


def growth_cases(size, model, processor, repeats):
    """{title: a function without arguments that measures}."""
    return {"rollout and update as work grows": partial(grown, model, processor, repeats),
            "ranks of one thread each": partial(ranks, size, repeats),
            "2,000 questions": partial(long_work, size), "start-up": partial(start_up, size)}


def grown(model, processor, repeats, base=BASE, grown=GROWN):
    """CPU seconds of a rollout and of an update at a base size, and how often they go into those of larger work."""
    cases = {"base": base}
    for name, values in grown.items():
        for value in values:
            text = base["P"] - base["image"]
            cases[f"{LABELS[name]} {base[name]} -> {value}"] = {
                **base, name: value, **({"P": text + value} if name == "image" else {})}
    bias = forbidden_bias(attach_attention(model), processor)

    def measures(prompts, G, P, C, image):
        """The rollout, and the update, of work of this size."""
        batch = [make_prompt(model, processor, P, seed=i, image=image) for i in range(prompts)]
        packs = [pack(model, [prompt], [[[i] * C for i in range(G)]]) for prompt in batch]

        def rollout():
            model.engine = None  # each size has a cache of its own, which is made anew
            generate(model, processor, batch, G, C, max_rows=prompts * G)

        def update():
            for packed in packs:
                token_logps(model, packed, bias).sum().backward()
            model.zero_grad()
        return {"rollout": rollout, "update": update}
    functions = {(case, part): function for case, work in cases.items() for part, function in measures(**work).items()}
    seconds = {key: cost.cpu for key, cost in interleaved(functions, "cpu", repeats).items()}
    model.engine = None
    return {f"{case}, {part}{' CPU s' if case == 'base' else ''}": value if case == "base" else value / seconds[
        "base", part] for (case, part), value in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def ranks(size, repeats, prompts=4, G=8, new=64):
    """Seconds on the wall of a GRPO step on one rank and on two, of the same work in all, and of the same a rank."""
    def measure(count, prompts):
        with tempfile.TemporaryDirectory() as folder, socket.create_server(("localhost", 0)) as free:
            write_checkpoint(size, folder)
            port = free.getsockname()[1]
            free.close()
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            members = [context.Process(target=member, args=(rank, count, port, folder, prompts, G, new, repeats, there))
                       for rank in range(count)]
            for process in members:
                process.start()
            for process in members:
                process.join()
            if any(process.exitcode for process in members):
                raise RuntimeError("a rank of the measure failed")
            return here.recv()
    one, split, doubled = measure(1, prompts), measure(2, prompts), measure(2, 2 * prompts)
    return {"1 rank s": one, "2 ranks, the same work s": split, "2 ranks, the same work a rank s": doubled,
            "speed-up of the same work": one / split, "cost of the same work a rank": doubled / one}


def member(rank, count, port, folder, prompts, G, new, repeats, connection):
    """One rank: takes steps, rank 0 sends the median of their seconds."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    join_ranks(5)
    pictures = Path(folder, str(rank))
    pictures.mkdir()
    step, _ = our_step(folder, write_examples(pictures, prompts, 280), G, new)
    with redirect_stderr(StringIO()):
        seconds = [timed(lambda: step(i), "cpu").wall for i in range(1, repeats + 2)]
    if rank == 0:
        connection.send(statistics.median(seconds[1:]))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Work that goes on


def long_work(size, count=2_000, samples=4, new=16):
    """Answers a second and resident memory in each quarter of `count` questions: evaluated, and sampled for a judge."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        write_checkpoint(size, folder)
        model, processor = load_policy(folder, "cpu")
        picture = str(tiny_image(Path(folder) / "picture.png", (280, 280)))
        questions = [Example(problem=f"How many boxes? {i}", solution="1", images=(picture,), task="general",
                             form="open", split="long") for i in range(count)]

        def watched(name, work, answers):
            """Run work(on_finish), which calls on_finish after every question."""
            marks, seen = [(time.perf_counter(), resident())], []

            def finished(*_):
                seen.append(None)
                if len(seen) % (count // 4) == 0:
                    marks.append((time.perf_counter(), resident()))
            work(finished)
            marks = marks[:5]
            figures.update({f"{name}, quarter {i}: answers/s": answers / 4 / (after[0] - before[0])
                            for i, (before, after) in enumerate(zip(marks, marks[1:]), 1)})
            figures.update({f"{name}, after quarter {i}: MB": memory / 1e6 for i, (_, memory) in enumerate(marks) if i})
            model.engine = None

        watched("evaluation", lambda finished: evaluate(
            model, processor, questions, max_completion_length=new, on_finish=finished), count)
        watched("rejection sampling", lambda finished: rejection_sample(
            model, processor, questions, Path(folder) / "kept.jsonl", samples=samples, max_completion_length=new,
            on_finish=finished), count * samples)
    return figures


def resident():
    """Bytes of this process that are in memory (Linux)."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def start_up(size, sizes=(5_000, 10_000, 20_000), pictures=200):
    """Seconds from settings to a run whose data is all read, derived and checked, by training rows."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(size, folder / "model")
        names = [tiny_image(folder / "data" / f"{i}.png", (280, 280)).name for i in range(pictures)]
        for rows in sizes:
            write_jsonl(folder / "data" / "train" / "open.jsonl", (
                {"image": names[i % pictures], "task": "math", "problem": f"How many boxes of kind {i}?",
                 "solution": f"<answer>{i % 7}</answer>"} for i in range(rows)))
            cfg = Config(model=str(folder / "model"), data=str(folder / "data"),
                         stages=("binary:1", "choice:1", "open:1"))
            with redirect_stderr(StringIO()):
                figures[f"{rows:,} rows s"] = timed(lambda: currreft.begin(cfg), "cpu").wall
    return figures
