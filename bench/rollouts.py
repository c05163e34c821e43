"""Rollouts: the engine beside transformers' generate, vLLM, and itself with copied prompts.

A sampler is a function (prompts, n, new, temperature) -> (n lists of `new` tokens for each prompt;
Cost, where another process has done the work, or None). Temperature 0 is greedy.
"""

import atexit
import json
import statistics
import subprocess
import tempfile
from functools import lru_cache, partial
from pathlib import Path

import torch

from bench.ground import (
    Cost, alternately, as_transformers, bandwidth, build, compared, make_prompt, plain_inputs)
from data import Prompt
from engine import Engine, generate
from packed import attach_attention
from support.words import UserError


def beside(others, model, processor, repeats, prompts, G, C):
    """Figures of a rollout by the engine and {name: sampler}; the share of equal greedy tokens.

    The share of bandwidth is what a decode step must read, weights and cache, against `bandwidth` in
    all of the engine's time, its prefill included.
    """
    def engine(prompts, n, new, temperature):
        groups = generate(attach_attention(model), processor, prompts, n, new, temperature,
                          max_rows=len(prompts) * n)
        return [o.tokens for group in groups for o in group], None

    def rollout(name):
        tokens, cost = samplers[name](prompts, G, C, 1.0)
        if [len(each) for each in tokens] != [C] * len(prompts) * G:
            raise UserError(f"{name} answered at another length: there is nothing to compare")
        return cost
    samplers = {"engine": engine, **others}
    rounds = alternately({name: partial(rollout, name) for name in samplers}, repeats)
    figures, cache = compared(rounds, model.device.type), model.engine.cache
    kept = len(prompts) * (1 if cache.prompts else G) * len(prompts[0].input_ids)  # tokens of prompts
    read = (kept + len(prompts) * G * C / 2) * sum(t[:, :1, :, :1].nbytes for t in cache.tails)
    step = sum(p.nbytes for p in model.model.language_model.parameters()) + read
    figures |= {"engine tok/s": len(prompts) * G * C / figures["engine s"], "graphs": len(model.engine.graphs),
                "share of bandwidth": C * step / figures["engine s"] / bandwidth(model.device)}
    first, *rest = [sample(prompts, 1, 16, 0.0)[0] for sample in samplers.values()]
    same = [a == b for other in rest for pair in zip(first, other) for a, b in zip(*pair)]
    return figures | ({"greedy tokens alike": statistics.mean(same)} if others else {})


def engine_alone(size, device, repeats, B, G, P, C):
    """A rollout of prompts with pictures."""
    model, processor = build(size, device)
    return beside({}, model, processor, repeats, [make_prompt(processor, P, seed) for seed in range(B)], G, C)


def beside_generate(size, device, repeats, B, G, P, C):
    """The engine beside transformers' generate; prompts have pictures."""
    model, processor = build(size, device)

    @torch.no_grad()
    def sample(prompts, n, new, temperature):
        how = {"do_sample": True, "top_k": 0} if temperature else {  # not then: it costs time
            "suppress_tokens": processor.forbidden_ids(len(model.lm_head.weight))}
        out = as_transformers(model).generate(
            **plain_inputs(processor, prompts, device), **how, num_return_sequences=n,
            min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        return out[:, P:].tolist(), None
    prompts = [make_prompt(processor, P, seed) for seed in range(B)]
    return beside({"generate": sample}, model, processor, repeats, prompts, G, C)


def vllm_sampler(python, banned, mode, **settings):
    """(name, the sampler that vLLM is in a process of its own Python); mode: eager or compiled."""
    process = subprocess.Popen([python, Path(__file__).with_name("vllm_side.py")], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.kill)

    def ask(**request):
        print(json.dumps(request), file=process.stdin, flush=True)
        if answer := process.stdout.readline():
            return json.loads(answer)
        raise UserError("vLLM has ended, see above. --python must name a Python that has it "
                        "(docs/speed.md says how)")

    def sample(prompts, n, new, temperature):
        answer = ask(prompts=[p.input_ids.tolist() for p in prompts], n=n, new=new,
                     temperature=temperature, banned=[] if temperature else banned)
        return answer["tokens"], Cost(*answer["cost"])
    return f"vLLM {ask(mode=mode, **settings)['version']} {mode}", sample


@lru_cache
def vllm_pair(python, size, device):
    """({name: sampler}, model, processor) of the same weights, loaded once."""
    with tempfile.TemporaryDirectory() as folder:
        model, processor = build(size, device, folder)
        banned = processor.forbidden_ids(len(model.lm_head.weight))
        return dict(vllm_sampler(python, banned, mode, model=folder, device=device)
                    for mode in ("eager", "compiled")), model, processor


def beside_vllm(python, size, device, repeats, B, G, P, C):
    """The engine beside vLLM, which is not asked for log-probabilities; prompts are text."""
    prompts = [Prompt(torch.randint(0, 300, (P,)), None, None) for _ in range(B)]
    return beside(*vllm_pair(python, size, device), repeats, prompts, G, C)


def shared_prompts(size, device, repeats, B, G, P, C):
    """A rollout whose groups keep their prompt once, beside one with a copy in every row."""
    model, processor = build(size, device)
    prompts = [make_prompt(processor, P, seed) for seed in range(B)]
    seeds = [[i * G + g for g in range(G)] for i in range(B)]
    engines = {name: Engine(attach_attention(model), processor, P, B * G, C, width=G,
                            shared=name == "once") for name in ("once", "copied")}
    rollouts = {name: partial(e.run, prompts, [P] * B, seeds) for name, e in engines.items()}
    once, copied = (sum(t.numel() for t in (*e.cache.tails, *(e.cache.prompts or ())))
                    for e in engines.values())
    return {**compared(alternately(rollouts, repeats), device), "cache ratio": once / copied}
