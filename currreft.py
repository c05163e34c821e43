"""Curr-ReFT: curriculum reinforcement fine-tuning of a small vision-language model (arXiv 2503.07065).

Phase 1, curriculum RL. GRPO on the same tasks (detection, classification, math) asked in three forms of rising
difficulty: yes/no (binary), option letters (choice), free answers (open). A small model almost never gets an open
answer right, so open-only RL has little to learn from; yes/no almost always gives signal.
Phase 2, rejected-sampling-based self-improvement. The RL model answers general questions N times, a judge scores every
answer from 0 to 100, the best answer above 85 is kept, and the model is fine-tuned on what was kept.

One GRPO step (`grpo_step`), top to bottom: a batch of prompts q -> G completions o_1..o_G of each -> their rewards r ->
group-normalized advantages A -> log-probabilities under the policy, the old policy and the reference -> loss -> one
optimizer step. `group_advantages`, `token_logps` and `grpo_loss` are the equations. Departures from the paper and from
the authors' code are listed, with reasons, in the README.

Shapes: B prompts of this rank, G completions of each, R = B * G completions, T tokens of the longest completion,
N tokens of a packed row (engine.py), H hidden size, V vocabulary.

    python currreft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --out RUN                         # one GPU
    torchrun --nproc_per_node 8 currreft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --out RUN    # one node
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 currreft.py ...  # several
"""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

from card import write_cards
from data import (FORMS, VOC_LABELS, Processor, RunError, UserError, batch_indices, derive, find_files, labels_of,
                  load_examples)
from engine import SelectedLogps, forbidden_bias, generate, image_features, load_policy, pack, packed_hidden
from report import Reporter
from rewards import accuracy_reward, format_reward
from sample import (Judge, collective, evaluate, gather, kept_examples, read_jsonl, rejection_sample, results_table,
                    world)

# ---------------------------------------------------------------------------------------------------------------------
# Settings: field = flag, comment = its --help


@dataclass(frozen=True)
class Config:
    """Every setting of a run. All batch sizes are global: the same run on any number of GPUs."""

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # directory or hub name of a Qwen2.5-VL checkpoint to start from
    data: str = ""  # directory with grpo_data/{train,test} and SFT_data/reject, or {train,test}
    image_root: str = ""  # directory that image paths are relative to (default: --data)
    task: str = ""  # task of rows that name none: detection, classify or math
    out: str = "runs/curr-reft"  # run directory, shared by all nodes; an existing one is an error unless --resume
    resume: bool = False  # continue the run in --out where it stopped
    allow_changes: bool = False  # resume although settings differ from those the run began with

    stages: tuple = ("binary:600", "choice:500", "open:2300", "reject:400")  # the curriculum, FORM[+FORM]:STEPS each
    advance_at: float = 0.0  # end a stage early once its mean accuracy reward over 50 steps reaches this (0: never)
    reference: str = "stage"  # KL reference: policy at the start of the 'stage', or of the whole run ('base')
    prompts_per_step: int = 8  # prompts in one GRPO step, over all GPUs
    num_generations: int = 8  # completions of each prompt, G
    updates_per_rollout: int = 1  # optimizer steps taken on one rollout
    temperature: float = 1.0  # of the sampled and scored distribution in RL
    max_completion_length: int = 512  # new tokens of a completion at most
    max_prompt_length: int = 4096  # longer prompts (image tokens included) are refused, never truncated
    max_pixels: int = 401_408  # pixels of an image at most; 28 x 28 of them are one token

    lr: float = 1e-6  # RL learning rate (paper 2e-5, model card 1e-5, released code 1e-6)
    lr_schedule: str = "cosine"  # within each stage: 'cosine' to zero, or 'constant'
    warmup_steps: int = 0  # linear warm-up at the start of each stage
    weight_decay: float = 0.0  # decoupled weight decay of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    beta: float = 0.04  # weight of the KL penalty; 0 loads no reference model
    epsilon: float = 0.2  # clip range of the probability ratio
    partial_credit: float = 0.2  # choice reward for a non-empty proper subset of several right letters
    soft_iou: bool = False  # open detection is rewarded with the matched IoU itself instead of IoU > 0.5
    freeze_vision: bool = False  # keep the vision tower fixed and encode each image once per step

    sft_lr: float = 2e-7  # learning rate of the sft and reject stages
    sft_batch: int = 32  # examples in one SFT step, over all GPUs
    questions: str = ""  # JSONL of questions for rejection sampling (default: found under --data)
    reject_samples: int = 8  # answers sampled per question
    reject_threshold: float = 85.0  # an answer is kept only if its score (0-100) is above this
    judge_url: str = ""  # OpenAI-compatible endpoint that scores answers (default: rules; key in JUDGE_API_KEY)
    judge_model: str = ""  # model name sent to the judge

    check: bool = False  # look before a long run: data, one rollout, log-probabilities, memory, time; trains nothing
    seed: int = 0  # everything random follows from it
    micro_batch: int = 1  # groups (RL) or examples (SFT) in one forward pass; changes speed and memory, not results
    max_rows: int = 64  # completions in flight in a rollout, per GPU
    checkpoint_activations: bool = False  # recompute activations in the update: slower, far less memory
    dtype: str = "auto"  # of weights and compute: auto (bfloat16 on CUDA, else float32), bfloat16 or float32
    threads: int = 0  # CPU threads (0: torch's choice)
    timeout_minutes: float = 30.0  # a rank that others wait for longer than this ends the run

    save_every: int = 50  # steps between checkpoints to resume from
    keep: int = 2  # such checkpoints kept; the end of every stage is kept in any case
    sample_every: int = 10  # steps between printed samples
    eval_limit: int = 0  # test examples of each split at most (0: all)
    eval_rows: int = 64  # completions in flight in evaluation, per GPU
    report_to: str = ""  # log to tensorboard (in --out) or wandb as well; what is not installed is an error
    skip_bad_rows: bool = False  # drop and count bad data rows instead of stopping
    allow_outside: bool = False  # allow image paths outside --image_root

    def __post_init__(self):
        checks = [
            (self.num_generations >= 2, "--num_generations must be at least 2: an advantage compares answers"),
            (self.prompts_per_step >= 1, "--prompts_per_step must be at least 1"),
            (self.temperature > 0, "--temperature must be above 0"),
            (self.max_completion_length >= 1, "--max_completion_length must be at least 1"),
            (self.max_pixels >= 3136, "--max_pixels must be at least 3136 (56 x 56)"),
            (self.lr > 0 and self.sft_lr > 0, "--lr and --sft_lr must be above 0"),
            (self.beta >= 0 and self.weight_decay >= 0, "--beta and --weight_decay must not be negative"),
            (0 < self.epsilon < 1, "--epsilon must lie between 0 and 1"),
            (0 <= self.partial_credit <= 1, "--partial_credit must lie between 0 and 1"),
            (0 <= self.advance_at <= 1, "--advance_at must lie between 0 and 1"),
            (0 <= self.reject_threshold <= 100, "--reject_threshold must lie between 0 and 100"),
            (min(self.micro_batch, self.updates_per_rollout, self.sft_batch, self.reject_samples, self.max_rows,
                 self.eval_rows, self.keep, self.save_every, self.sample_every, self.max_prompt_length) >= 1,
             "--micro_batch, --updates_per_rollout, --sft_batch, --reject_samples, --max_rows, --eval_rows, --keep, "
             "--save_every, --sample_every and --max_prompt_length must be at least 1"),
            (min(self.warmup_steps, self.threads, self.eval_limit) >= 0 and self.max_grad_norm > 0
             and self.timeout_minutes > 0, "--warmup_steps, --threads and --eval_limit must not be negative, "
             "--max_grad_norm and --timeout_minutes must be above 0"),
            (self.reference in ("stage", "base"), "--reference must be 'stage' or 'base'"),
            (self.lr_schedule in ("cosine", "constant"), "--lr_schedule must be 'cosine' or 'constant'"),
            (self.dtype in ("auto", "bfloat16", "float32"), "--dtype must be auto, bfloat16 or float32"),
            (self.report_to in ("", "tensorboard", "wandb"), "--report_to must be tensorboard or wandb"),
            (self.task in ("", "detection", "classify", "math"), "--task must be detection, classify or math"),
        ]
        if failed := [sentence for passed, sentence in checks if not passed]:
            raise UserError("\n".join(failed))
        self.curriculum  # raises for a malformed stage

    @property
    def curriculum(self):
        """The list of Stages that --stages asks for."""
        return [Stage.parse(i, text) for i, text in enumerate(self.stages)]


@dataclass(frozen=True)
class Stage:
    """One row of the curriculum.

    | written       | trains on                              | by           | learning rate |
    |---------------|----------------------------------------|--------------|---------------|
    | binary:600    | yes/no questions                       | GRPO         | --lr          |
    | choice:500    | option letters                         | GRPO         | --lr          |
    | open:2300     | free answers                           | GRPO         | --lr          |
    | a+b:N         | the forms a and b, mixed               | GRPO         | --lr          |
    | sft:N         | the true answers of the open questions | SFT          | --sft_lr      |
    | reject:N      | own best answers to general questions  | sampling+SFT | --sft_lr      |
    """

    index: int
    name: str
    steps: int

    @staticmethod
    def parse(index, text):
        """Stage.parse(0, 'binary+choice:600') -> Stage(0, 'binary+choice', 600); UserError if malformed."""
        name, _, steps = text.partition(":")
        known = name in ("sft", "reject") or all(form in FORMS for form in name.split("+"))
        if not known or not re.fullmatch("[0-9]{1,9}", steps) or int(steps) == 0:
            raise UserError(f"--stages: {text!r} is not FORM:STEPS, where FORM is binary, choice, open, a mix such as "
                            "binary+choice, sft or reject, and STEPS a whole number above 0")
        return Stage(index, name, int(steps))

    @property
    def label(self):
        """Name of its results and of its checkpoint, unique in a run: '1-binary'."""
        return f"{self.index + 1}-{self.name}"

    @property
    def forms(self):
        """Answer forms that an RL stage trains on; empty for sft and reject."""
        return () if self.name in ("sft", "reject") else tuple(self.name.split("+"))


# ---------------------------------------------------------------------------------------------------------------------
# The method


def group_advantages(rewards):
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group, std unbiased. rewards (..., G) -> advantages (..., G).

    group_advantages(tensor([1., 0., 0., 1.])) -> about [0.866, -0.866, -0.866, 0.866]. All rewards equal -> exactly 0.
    (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.)
    """
    centered = rewards - rewards.mean(-1, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centered / (rewards.std(-1, keepdim=True) + 1e-4))


def token_logps(model, batch, bias, temperature=1.0):
    """log pi(o_t | q, o_<t) of every completion token: (R, T) float32, 0 on padding.

    batch: engine.Packed. bias (V,): engine.forbidden_bias. The distribution is softmax(logits / temperature) without
    the forbidden tokens, the one that was sampled. Policy, old policy and reference all come from this function.
    """
    hidden = packed_hidden(model, batch)  # (N, H)
    targets = batch.input_ids[len(batch.prompt_real):]
    logps = SelectedLogps.apply(hidden[batch.predictor], model.lm_head.weight, targets, bias, temperature)
    flat = logps.new_zeros(batch.mask.numel()).scatter(0, batch.completion_real, logps)
    return flat.view_as(batch.mask)


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, beta=0.04, epsilon=0.2, num_completions=None):
    """The GRPO loss of R completions, and sums for the log.

        loss = - 1/R sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta KL_t ]
        rho  = pi(o_t) / pi_old(o_t)           KL_t = exp(ref - logp) - (ref - logp) - 1   (k3, always >= 0)

    logp, logp_old, logp_ref, mask (R, T); advantages (R,). logp_ref None: no KL term. num_completions: the R of the
    whole step, over all micro-batches and ranks, so that gradients add up to the same sum however the step is split.
    Returns (scalar loss, {"kl": sum over tokens, "clipped": number of tokens, "tokens": number of tokens}).
    """
    A = advantages[:, None]  # (R, 1)
    ratio = (logp - logp_old).exp()  # (R, T)
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    kl = torch.zeros_like(logp)
    if logp_ref is not None:
        difference = (logp_ref - logp).clamp(-20, 20)
        kl = difference.exp() - difference - 1
    per_completion = ((surrogate - beta * kl) * mask).sum(1) / mask.sum(1)  # (R,)
    loss = -per_completion.sum() / (num_completions or len(logp))
    clipped = (ratio * A > surrogate) * mask  # tokens whose gradient the clip cuts off
    sums = {"kl": kl.detach() * mask, "clipped": clipped, "tokens": mask}
    return loss, {name: value.sum().item() for name, value in sums.items()}


def sft_loss(logp, mask, num_tokens):
    """Mean negative log-likelihood of the answers' tokens: logp, mask (R, T); num_tokens of the whole step."""
    return -(logp * mask).sum() / num_tokens


def grpo_step(run, stage, step):
    """Roll out, score and learn from one batch of prompts; returns sums and counts for the log."""
    cfg, started = run.cfg, time.perf_counter()
    numbers, examples = run.batch(run.examples[stage.name], stage, step, cfg.prompts_per_step)
    prompts = [run.processor(example) for example in examples]  # q
    run.encode_images(prompts)
    seeds = [[run.seed(stage.index, step, number, g) for g in range(cfg.num_generations)] for number in numbers]
    run.policy.eval()
    groups = generate(run.policy, run.processor, prompts, cfg.num_generations, cfg.max_completion_length,
                      cfg.temperature, seeds=seeds, max_rows=cfg.max_rows)  # o_1..o_G ~ pi_old
    rolled_out = time.perf_counter()

    accuracy, formatted = (torch.tensor([[reward(o.text, example) for o in group] for example, group in
                                         zip(examples, groups)], dtype=torch.float64)
                           for reward in (run.accuracy_reward, format_reward))
    rewards = accuracy + formatted  # r (B, G)
    advantages = group_advantages(rewards).float()  # A (B, G)

    sums = {"kl": 0.0, "clipped": 0.0, "tokens": 0.0}
    micro_batches = [slice(i, i + cfg.micro_batch) for i in range(0, len(prompts), cfg.micro_batch)]
    old = {}  # log-probabilities under the weights that sampled, filled in by the first update
    for _ in range(cfg.updates_per_rollout):
        run.policy.train()
        for m in micro_batches:
            batch = run.pack(prompts[m], [[o.tokens for o in group] for group in groups[m]])
            logp = token_logps(run.policy, batch, run.bias, cfg.temperature)  # (R, T)
            logp_old = old.setdefault(m.start, logp.detach())
            with torch.no_grad():
                logp_ref = token_logps(run.reference, batch, run.bias, cfg.temperature) if cfg.beta else None
            loss, stats = grpo_loss(logp, logp_old, logp_ref, advantages[m].flatten().to(logp.device), batch.mask,
                                    cfg.beta, cfg.epsilon, cfg.prompts_per_step * cfg.num_generations)
            loss.backward()
            sums = {name: sums[name] + stats[name] for name in sums}
        run.optimizer_step(stage, step, cfg.lr)

    completions = [o for group in groups for o in group]
    run.show_sample(step, examples[:1], groups[:1], accuracy, formatted)
    equal = (rewards.amax(1) == rewards.amin(1)).float()
    table = {"reward": rewards, "reward/accuracy": accuracy, "reward/format": formatted, "equal_groups": equal,
             "completion_length": torch.tensor([len(o.tokens) for o in completions]),
             "truncated": torch.tensor([o.truncated for o in completions])}
    for task in {example.task for example in examples}:
        table[f"reward/accuracy/{task}"] = accuracy[[example.task == task for example in examples]]
    stats = {name: (value.sum().item(), value.numel()) for name, value in table.items()}
    stats["kl"] = (sums["kl"], sums["tokens"])
    stats["clip_fraction"] = (sums["clipped"], sums["tokens"])
    return stats, {"rollout": rolled_out - started, "update": time.perf_counter() - rolled_out,
                   "tokens": sum(len(o.tokens) for o in completions)}


def sft_step(run, stage, step):
    """One supervised step on the stage's question-answer pairs; the loss is on the answer and its end token alone."""
    cfg, started = run.cfg, time.perf_counter()
    _, examples = run.batch(run.examples[stage.name], stage, step, cfg.sft_batch)
    prompts = [run.processor(example) for example in examples]
    run.encode_images(prompts)
    answers = [run.processor.response_ids(example.solution) for example in examples]
    total = sum(gather(sum(map(len, answers))))
    run.policy.train()
    loss_sum = 0.0
    for i in range(0, len(prompts), cfg.micro_batch):
        batch = run.pack(prompts[i:i + cfg.micro_batch], [[a] for a in answers[i:i + cfg.micro_batch]])
        loss = sft_loss(token_logps(run.policy, batch, run.bias), batch.mask, total)
        loss.backward()
        loss_sum += loss.item() * total
    run.optimizer_step(stage, step, cfg.sft_lr)
    tokens = sum(map(len, answers))
    return {"loss": (loss_sum, tokens)}, {"update": time.perf_counter() - started, "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: float32 masters, sharded over ranks


class ShardedAdamW:
    """AdamW whose float32 master weights and moments live on one rank each; every rank holds the compute weights.

    At lr 1e-6 bfloat16 weights alone would round nearly every update away, so the update happens in float32 on the
    owner and the rounded result is broadcast. With float32 weights the master is the weight itself.
    """

    def __init__(self, named_parameters, weight_decay=0.0):
        self.params = {name: p for name, p in named_parameters if p.requires_grad}
        rank, ranks = world()
        load, self.owner = [0] * ranks, {}
        for name, p in sorted(self.params.items(), key=lambda item: -item[1].numel()):
            self.owner[name] = load.index(min(load))
            load[self.owner[name]] += p.numel()
        # .detach().float() copies bfloat16 weights and aliases float32 ones
        self.masters = {n: p.detach().float() for n, p in self.params.items() if self.owner[n] == rank}
        fused = True if next(iter(self.params.values())).is_cuda else None
        self.adam = torch.optim.AdamW(self.masters.values(), weight_decay=weight_decay, fused=fused)

    def reduce_gradients(self, max_norm):
        """Sum gradients over ranks and clip them; returns their norm before clipping.

        One explicit all-reduce in place of the DDP wrapper: a rank whose micro-batches held no image contributes zeros,
        so every rank reduces the same tensors, and a sum is right because each loss is divided by the global count.
        """
        for p in self.params.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if world()[1] > 1:
            with collective():
                for work in [dist.all_reduce(p.grad, async_op=True) for p in self.params.values()]:
                    work.wait()
        return torch.nn.utils.clip_grad_norm_(self.params.values(), max_norm).item()

    @torch.no_grad()
    def step(self, lr, chunk=2**26):
        """Update the owned masters a chunk at a time (so that few float32 gradients exist at once), then broadcast."""
        for group in self.adam.param_groups:
            group["lr"] = lr
        names = list(self.masters)
        while names:
            size, batch = 0, []
            while names and (not batch or size + self.params[names[0]].numel() <= chunk):
                batch.append(names.pop(0))
                size += self.params[batch[-1]].numel()
            for name in batch:
                self.masters[name].grad = self.params[name].grad.float()
            self.adam.step()  # passes over masters without a gradient
            for name in batch:
                self.params[name].copy_(self.masters[name])
                self.masters[name].grad = None
        if world()[1] > 1:
            with collective():
                for name, p in self.params.items():
                    dist.broadcast(p, self.owner[name])

    def zero_grad(self):
        """Free the gradients."""
        for p in self.params.values():
            p.grad = None

    def state_dict(self):
        """{parameter name: moments, step and (unless weights are float32 themselves) master} of this rank's share."""
        keep_master = next(iter(self.params.values())).dtype != torch.float32
        return {name: {**self.adam.state[master], **({"master": master} if keep_master else {})}
                for name, master in self.masters.items() if master in self.adam.state}

    def load(self, files):
        """Take this rank's share from the shards of any number of ranks."""
        for file in files:
            try:
                shard = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
            except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
                raise RunError(f"{file} is damaged or not an optimizer state ({str(error).splitlines()[0]}); remove "
                               "its directory to resume from the checkpoint before") from error
            for name, state in shard.items():
                if name in self.masters:
                    master = self.masters[name]
                    if "master" in state:
                        master.copy_(state.pop("master"))
                    self.adam.state[master] = {k: v.to(master.device, copy=True) for k, v in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A run: data, models, checkpoints, log


class Stopped(Exception):
    """SIGTERM arrived and everything worth keeping is saved."""


class Run:
    """The state of one run on one rank."""

    def __init__(self, cfg, device):
        self.cfg, self.device, self.out = cfg, device, Path(cfg.out)
        (self.rank, self.ranks), self.stopping = world(), False
        self.global_step, self.recent, self.skipped, self.bad_in_a_row = 0, [], 0, 0
        self.grad_norm = self.learning_rate = 0.0
        self.policy = self.reference = self.optimizer = None
        self.report = Reporter(cfg.report_to)  # on every rank, so that all find it missing; rank 0 starts it
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_):
        self.stopping = True

    def check_stop(self, *_):
        """Raise Stopped if SIGTERM has arrived: for long work that keeps its own progress."""
        if self.stopping:
            raise Stopped

    def load_weights(self, path):
        """Start from, or replace all weights by, the checkpoint at `path`."""
        dtype = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.cfg.dtype]
        self.policy, self.processor = load_policy(path, self.device, dtype, self.cfg.max_pixels)
        self.bias = forbidden_bias(self.policy, self.processor)
        self.policy.model.visual.requires_grad_(not self.cfg.freeze_vision)
        if self.cfg.checkpoint_activations:  # only acts in train mode, which only the update uses
            enable = getattr(self.policy, "activation_checkpointing_enable", None)  # newer name
            (enable or self.policy.gradient_checkpointing_enable)({"use_reentrant": False})

    def load_reference(self, path):
        """The KL reference: the checkpoint at `path`, frozen; none where beta is 0."""
        if self.cfg.beta:
            self.reference = load_policy(path, self.device, self.policy.dtype, self.cfg.max_pixels)[0]
            self.reference.requires_grad_(False)

    # -- batches ------------------------------------------------------------------------------------------------------

    def seed(self, *numbers):
        """A 63-bit seed from (run seed, numbers..): the same on every rank count and after every resume."""
        return seed_from(self.cfg.seed, *numbers)

    def batch(self, examples, stage, step, size):
        """This rank's share of the global batch of a step: (places in the global batch, examples)."""
        indices = batch_indices(len(examples), size, step, self.seed(stage.index))
        share = range(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)
        return list(share), [examples[indices[i]] for i in share]

    def encode_images(self, prompts):
        """With a frozen vision tower: encode each image once, for rollout, old policy, reference and update alike."""
        if self.cfg.freeze_vision:
            for prompt in prompts:
                if prompt.pixel_values is not None:
                    with torch.no_grad():
                        prompt.features = image_features(
                            self.policy, prompt.pixel_values.to(self.device), prompt.image_grid_thw.to(self.device))

    def pack(self, prompts, completions):
        """engine.pack on this rank's device."""
        return pack(self.policy, prompts, completions).to(self.device)

    def accuracy_reward(self, text, example):
        """rewards.accuracy_reward with this run's settings."""
        return accuracy_reward(text, example, partial_credit=self.cfg.partial_credit, soft_iou=self.cfg.soft_iou)

    # -- one optimizer step -------------------------------------------------------------------------------------------

    def optimizer_step(self, stage, step, base_lr):
        """Reduce, clip and apply gradients; non-finite ones are skipped on all ranks (they share the norm)."""
        self.learning_rate = learning_rate(self.cfg, stage, step, base_lr)
        self.grad_norm = self.optimizer.reduce_gradients(self.cfg.max_grad_norm)
        if math.isfinite(self.grad_norm):
            self.optimizer.step(self.learning_rate)
            self.bad_in_a_row = 0
        else:
            self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
        self.optimizer.zero_grad()
        if self.bad_in_a_row >= 5:
            last = latest_checkpoint(self.out)
            raise RunError(f"stage {stage.name}, step {step + 1}: gradients were not finite five times in a row. The "
                           f"last good checkpoint is {last[0] if last else 'the base model'}; resume with a lower --lr "
                           "or a higher --beta and --allow_changes.")

    # -- log ----------------------------------------------------------------------------------------------------------

    def log(self, stage, step, stats, seconds):
        """Reduce sums and counts over ranks, divide once, write the step's line. Returns {name: mean}."""
        shares = gather((stats, seconds, self.stopping))
        self.stopping = any(stopping for _, _, stopping in shares)  # all ranks stop together
        self.global_step += 1
        totals = {}
        for share, _, _ in shares:
            for name, (value, count) in share.items():
                a, b = totals.get(name, (0.0, 0))
                totals[name] = a + value, b + count
        means = {name: value / max(count, 1) for name, (value, count) in sorted(totals.items())}
        tokens = sum(s["tokens"] for _, s, _ in shares)
        slowest = {name: max(s[name] for _, s, _ in shares) for name in ("rollout", "update") if name in seconds}
        row = {"step": self.global_step, "stage": stage.name, "stage_index": stage.index, "stage_step": step + 1,
               **means, "grad_norm": self.grad_norm, "lr": self.learning_rate, "skipped_steps": self.skipped,
               **{f"seconds_{name}": value for name, value in slowest.items()},
               "tokens_per_second": tokens / next(iter(slowest.values()))}
        if self.rank == 0:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(rounded) + "\n")
            self.report(rounded)
            self._show(stage, row)
        return means

    def _show(self, stage, row):
        """The progress bar, or one line a step where nobody watches a terminal."""
        names = ("reward", "reward/accuracy", "loss", "kl", "equal_groups", "completion_length", "tokens_per_second")
        short = {"reward/accuracy": "accuracy", "equal_groups": "equal", "completion_length": "length",
                 "tokens_per_second": "tok/s"}
        text = " ".join(f"{short.get(n, n)} {row[n]:.{0 if row[n] >= 100 else 3}f}" for n in names if n in row)
        if self.bar is None:
            seconds = row.get("seconds_rollout", 0) + row["seconds_update"]
            print(f"{stage.name} {row['stage_step']}/{stage.steps} {text} {seconds:.1f} s", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def show_sample(self, step, examples, groups, accuracy, formatted):
        """Now and then one decoded completion with its rewards, so that a person sees what is being rewarded."""
        if self.rank == 0 and step % self.cfg.sample_every == 0:
            tqdm.write(f"--- {examples[0].problem}\n    truth {one_line(examples[0].solution)}\n"
                       f"    model {one_line(groups[0][0].text)}\n"
                       f"    accuracy {accuracy[0, 0]:g}  format {formatted[0, 0]:g}", file=sys.stderr)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, path, stage_index, stage_step):
        """Write a Hugging Face directory plus what resuming needs: complete or absent, whatever happens meanwhile."""
        path, aside = Path(path), Path(path).with_name(f".writing-{Path(path).name}")
        problem = None
        if self.rank == 0:
            sync(self.out / "metrics.jsonl")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        gather(None)  # the folder exists for everybody
        try:
            if self.rank == 0:
                self.policy.save_pretrained(aside)
                self.processor.save_pretrained(aside)
                state = {"stage": stage_index, "stage_step": stage_step, "global_step": self.global_step,
                         "recent": self.recent, "skipped": self.skipped, "bad_in_a_row": self.bad_in_a_row}
                (aside / "state.json").write_text(json.dumps(state))
            if stage_step:
                torch.save(self.optimizer.state_dict(), aside / f"optimizer-{self.rank}.pt")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk shows as any of them
            problem = f"{path} could not be written ({str(error).splitlines()[0]})"
        if any(problems := gather(problem)):
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            last = latest_checkpoint(self.out)
            raise RunError(f"{next(filter(None, problems))}. Make room and continue with --resume; "
                           f"the last complete checkpoint is {last[0] if last else 'the base model'}.")
        if self.rank == 0:
            for file in aside.iterdir():
                sync(file)
            sync(aside)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            sync(path.parent)
            for old in sorted((self.out / "checkpoints").glob("[0-9]*"))[:-self.cfg.keep]:
                shutil.rmtree(old)
        gather(None)

    def resume(self):
        """Load the newest complete checkpoint, or the base model; returns (stage index, steps done in that stage)."""
        found = latest_checkpoint(self.out)
        if not found:
            self.load_weights(self.cfg.model)
            state = {"stage": 0, "stage_step": 0, "global_step": 0}
        else:
            path, state = found
            self.load_weights(path)
            self.recent, self.skipped, self.bad_in_a_row = state["recent"], state["skipped"], state["bad_in_a_row"]
            self.optimizer_files = sorted(path.glob("optimizer-*.pt"))
        self.global_step = state["global_step"]
        if len(set(gather((state["stage"], state["stage_step"])))) > 1:
            raise UserError(f"--out {self.out} must be a directory that all nodes share; theirs differ")
        if state["stage"] > len(self.cfg.curriculum):
            raise UserError(f"--out {self.out} has already finished more stages than --stages names")
        if self.rank == 0 and (self.out / "metrics.jsonl").exists():  # drop what was logged after the checkpoint
            rows = read_jsonl(self.out / "metrics.jsonl")
            write_aside(self.out / "metrics.jsonl",
                        "".join(json.dumps(r) + "\n" for r in rows if r["step"] <= self.global_step))
        return state["stage"], state["stage_step"]

    # -- stages -------------------------------------------------------------------------------------------------------

    def stage_dir(self, index):
        """Where the end of a stage is kept; index -1 is the base model."""
        return self.cfg.model if index < 0 else self.out / "stages" / self.cfg.curriculum[index].label

    def train_stage(self, stage, first):
        """One row of the curriculum: optimizer, schedule and reference start afresh, then its steps."""
        self.optimizer = self.reference = None  # the last stage's are freed before this stage's are made
        self.optimizer = ShardedAdamW(self.policy.named_parameters(), self.cfg.weight_decay)
        if first:
            self.optimizer.load(self.optimizer_files)
        else:
            self.recent = []
        if stage.forms:
            self.load_reference(self.stage_dir(stage.index - 1 if self.cfg.reference == "stage" else -1))
        do_step = grpo_step if stage.forms else sft_step
        self.bar = tqdm(total=stage.steps, initial=first, desc=stage.name, dynamic_ncols=True) \
            if self.rank == 0 and sys.stderr.isatty() else None
        for step in range(first, stage.steps):
            means = self.log(stage, step, *do_step(self, stage, step))
            reached = self.reached_threshold(means.get("reward/accuracy", 0.0))
            if self.stopping and not reached and step + 1 < stage.steps:
                self.save(self.out / "checkpoints" / f"{self.global_step:07d}", stage.index, step + 1)
                raise Stopped
            if reached:
                self.say(f"{stage.name}: mean accuracy reward {sum(self.recent) / len(self.recent):.3f} over the last "
                         f"{len(self.recent)} steps, next stage")
                break
            if (step + 1) % self.cfg.save_every == 0 and step + 1 < stage.steps:
                self.save(self.out / "checkpoints" / f"{self.global_step:07d}", stage.index, step + 1)
        if self.bar is not None:
            self.bar.close()

    def reached_threshold(self, accuracy, window=50):
        """Whether the running mean of the accuracy reward has reached --advance_at."""
        self.recent = (self.recent + [accuracy])[-window:]
        mean = sum(self.recent) / len(self.recent)
        return bool(self.cfg.advance_at) and len(self.recent) == window and mean >= self.cfg.advance_at

    def self_improve(self, stage, first):
        """Phase 2: sample answers to the questions, judge them, keep the best; returns the kept as SFT examples."""
        kept = self.out / f"rejected-{stage.index + 1}.jsonl"
        if first:  # fine-tuning has begun on what was kept
            return kept_examples(kept, self.questions)
        self.say(f"{stage.name}: sampling {self.cfg.reject_samples} answers to each of {len(self.questions)} questions")
        count = rejection_sample(
            self.policy, self.processor, self.questions, kept, judge=Judge(self.cfg.judge_url, self.cfg.judge_model),
            samples=self.cfg.reject_samples, threshold=self.cfg.reject_threshold, max_rows=self.cfg.max_rows,
            max_completion_length=self.cfg.max_completion_length, seed=self.seed(stage.index),
            on_finish=self.check_stop)
        self.say(f"{stage.name}: kept {count} of {len(self.questions)} questions, in {kept}")
        if not count:
            raise RunError(f"{stage.name}: no answer scored above --reject_threshold {self.cfg.reject_threshold:g}, so "
                           "there is nothing to fine-tune on")
        return kept_examples(kept, self.questions)

    def evaluate(self, name):
        """Greedy accuracy on every test split; adds a row to results.json unless it is there already."""
        file = self.out / "results.json"
        rows = json.loads(file.read_text())["rows"] if self.rank == 0 and file.exists() else []
        if gather(not self.tests or name in [row["name"] for row in rows])[0]:
            return
        splits, predictions = evaluate(
            self.policy, self.processor, self.tests, max_completion_length=self.cfg.max_completion_length,
            max_rows=self.cfg.eval_rows, on_finish=self.check_stop, description=f"evaluate {name}")
        if self.rank == 0:
            (self.out / "predictions").mkdir(exist_ok=True)
            write_aside(self.out / "predictions" / f"{name}.jsonl", "".join(json.dumps(p) + "\n" for p in predictions))
            write_aside(file, json.dumps({"rows": rows + [{"name": name, "splits": splits}]}, indent=1))
            self.report.results(self.global_step, splits)
        gather(None)

    def say(self, text):
        """Print a line, once."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)


def seed_from(*numbers):
    """A 63-bit seed from any numbers, alike on every machine: seed_from(0, 1) != seed_from(1, 0)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def learning_rate(cfg, stage, step, base):
    """Learning rate of a stage's step: linear warm-up, then constant or half a cosine down to zero."""
    if step < cfg.warmup_steps:
        return base * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, stage.steps - cfg.warmup_steps)
    return base * (0.5 + 0.5 * math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else base


def one_line(text, limit=300):
    """Model text made safe and short for a terminal: no control characters, no line breaks."""
    return "".join(c if c.isprintable() else " " for c in text[:limit]) + ("..." if len(text) > limit else "")


def write_aside(path, text):
    """Write a small file so that it is complete or unchanged."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(text)
    sync(aside)
    aside.rename(path)


def sync(path):
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_checkpoint(out):
    """(path, state) of the furthest complete checkpoint of a run, or None."""
    found = [(path.parent, json.loads(path.read_text())) for folder in ("checkpoints", "stages")
             for path in Path(out).glob(f"{folder}/[0-9]*/state.json")]
    return max(found, key=lambda item: (item[1]["stage"], item[1]["stage_step"]), default=None)


def load_data(cfg):
    """Read and check every file the run will need, before any model is loaded.

    Returns (stage name -> examples, test examples, questions). A form without a file is derived from the open one.
    """
    files, options = find_files(cfg.data), {
        "image_root": cfg.image_root or cfg.data, "task": cfg.task or None, "max_pixels": cfg.max_pixels,
        "skip_bad_rows": cfg.skip_bad_rows, "allow_outside": cfg.allow_outside}
    forms = {}

    def form_examples(form):  # read or derived once, however many stages ask
        if form not in forms:
            path = files["train"].get(form)
            if path:
                forms[form] = load_examples(path, form=form, **options)
            elif form == "open":
                raise UserError(f"--data {cfg.data}: no open training file, which --stages needs")
            else:
                source = form_examples("open")
                pool = sorted({label for e in source if e.task == "classify" for label in labels_of(e.solution)})
                forms[form] = derive_all(source, form, pool or VOC_LABELS, cfg)
        return forms[form]

    examples, questions = {}, []
    for stage in cfg.curriculum:
        if stage.forms:
            examples[stage.name] = [e for form in stage.forms for e in form_examples(form)]
        elif stage.name == "sft":
            examples["sft"] = form_examples("open")
        elif not questions:
            path = cfg.questions or files.get("questions")
            if not path:
                raise UserError(f"--data {cfg.data}: no question file for the reject stage; name one with --questions")
            questions = load_examples(path, **options)
    tests = []  # every split's rows, labeled with its name
    for split, (form, path) in files["test"].items():
        rows = load_examples(path, form=form, **options)
        rows = [dataclasses.replace(e, split=split) for e in rows]
        tests += rows[:cfg.eval_limit or None]
    return examples, tests, questions


def derive_all(examples, form, pool, cfg):
    """Every example in another form; all that cannot be derived are named in one UserError, or dropped and counted."""
    derived, faults = [], []
    for example in examples:
        try:
            derived.append(derive(example, form, pool=pool, seed=cfg.seed))
        except UserError as error:
            faults.append(str(error))
    if faults and not (cfg.skip_bad_rows and derived):
        more = f"\n.. and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError("\n".join(faults[:20]) + more + "\nCorrect them, give the form a file of its own, or drop the "
                        "rows with --skip_bad_rows")
    if faults and world()[0] == 0:
        print(f"{form}: dropped {len(faults)} rows that have no such form; the first: {faults[0]}", file=sys.stderr)
    return derived


def refuse_long_prompts(cfg, processor, examples):
    """The examples whose prompts fit; UserError if any does not, unless --skip_bad_rows drops and counts them."""
    lengths = [processor.prompt_length(e) for e in examples]
    long = [f"{e.where} ({n} tokens)" for e, n in zip(examples, lengths) if n > cfg.max_prompt_length]
    if long and not (cfg.skip_bad_rows and len(long) < len(examples)):
        named = ", ".join(long[:5])
        raise UserError(f"{len(long)} prompts are longer than --max_prompt_length {cfg.max_prompt_length}: {named}. "
                        "Raise it, lower --max_pixels, or drop them with --skip_bad_rows")
    if long and world()[0] == 0:
        print(f"dropped {len(long)} of {len(examples)} prompts longer than {cfg.max_prompt_length} tokens",
              file=sys.stderr)
    return [e for e, n in zip(examples, lengths) if n <= cfg.max_prompt_length]


def memory_needed(config, cfg, ranks, prompt_length=None):
    """Estimated bytes per GPU of a run, by what they hold; config is the checkpoint's own (transformers) config.

    The first four are exact; cache, activations and logits follow from --max_rows, --micro_batch and the lengths.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    trained = total - vision * cfg.freeze_vision
    width = 4 if cfg.dtype == "float32" or (cfg.dtype == "auto" and not torch.cuda.is_available()) else 2
    text, tower = config.text_config, config.vision_config
    P = prompt_length or cfg.max_pixels // 784 + 200
    C, tokens = cfg.max_completion_length, cfg.micro_batch * (P + cfg.num_generations * cfg.max_completion_length)
    patches = cfg.micro_batch * cfg.max_pixels // 196
    # saved by one layer for its backward: normed, projected and attended states (13 H), four MLP states (4 I)
    layer = [(text.num_hidden_layers, tokens, text.hidden_size, text.intermediate_size),
             (tower.depth * (not cfg.freeze_vision), patches, tower.hidden_size, tower.intermediate_size)]
    whole = [n * width * (13 * h + 4 * i) for _, n, h, i in layer]
    activations = max(whole) + sum(d * n * h * width for d, n, h, _ in layer) if cfg.checkpoint_activations else \
        sum(d * w for (d, *_), w in zip(layer, whole))
    head = text.hidden_size // text.num_attention_heads
    rows = min(cfg.max_rows, cfg.num_generations * math.ceil(cfg.prompts_per_step / ranks))
    return {"weights": total * width, "gradients": trained * width, "reference": total * width * (cfg.beta > 0),
            "optimizer": trained * (8 + 4 * (width == 2)) // ranks,
            "cache": rows * (P + C) * text.num_hidden_layers * text.num_key_value_heads * head * 2 * width,
            "activations": activations,  # then chunks of logits, and the head's gradient in two widths
            "logits": 12 * min(2**26, tokens * text.vocab_size) + text.vocab_size * text.hidden_size * (width + 4)}


def check_memory(needed, say):
    """Say what a run will need per GPU; UserError where weights, gradients and optimizer alone cannot fit."""
    parts = " + ".join(f"{name} {size / 2**30:.1f}" for name, size in needed.items() if size > 2**27)
    say(f"memory per process, estimated: {sum(needed.values()) / 2**30:.1f} GiB ({parts or 'all small'})")
    fixed = sum(needed[name] for name in ("weights", "gradients", "reference", "optimizer"))
    if torch.cuda.is_available() and fixed > (there := torch.cuda.get_device_properties(0).total_memory):
        raise UserError(f"weights, gradients, reference and optimizer need {fixed / 2**30:.1f} GiB on each GPU, which "
                        f"has {there / 2**30:.1f}: use more GPUs (the optimizer is shared among them), --freeze_vision "
                        "or --beta 0")


def check(run):
    """What a careful person would do by hand before a long run; trains nothing and writes nothing."""
    cfg, say = run.cfg, run.say
    run.load_weights(cfg.model)
    run.policy.eval()
    for stage in cfg.curriculum:
        rows = run.examples.get(stage.name, run.questions)
        lengths = sorted(run.processor.prompt_length(e) for e in rows)
        say(f"{stage.label}: {stage.steps} steps over {len(rows)} examples, prompts of {lengths[0]} to {lengths[-1]} "
            f"tokens, median {lengths[len(lengths) // 2]}\n    {rows[0].where}: {one_line(rows[0].problem)}\n"
            f"    truth: {one_line(rows[0].solution)}")
    rows = [rows[0] for rows in run.examples.values()] or run.questions[:1]
    if run.questions:
        Judge(cfg.judge_url, cfg.judge_model).probe()
    prompts = [run.processor(example) for example in rows]
    started = time.perf_counter()
    groups = generate(run.policy, run.processor, prompts, cfg.num_generations, cfg.max_completion_length,
                      cfg.temperature, max_rows=cfg.max_rows)
    rollout = time.perf_counter() - started
    for example, group in zip(rows, groups):
        say(f"asked {one_line(example.problem)}\n    answered {one_line(group[0].text)}\n    accuracy "
            f"{run.accuracy_reward(group[0].text, example):g}, format {format_reward(group[0].text, example):g}")
    worst, started = 0.0, time.perf_counter()
    for prompt, group in zip(prompts, groups):
        batch = run.pack([prompt], [[o.tokens for o in group]])
        logps = token_logps(run.policy.train(), batch, run.bias, cfg.temperature)
        (logps * 0).sum().backward()
        for row, o in zip(logps.tolist(), group):
            worst = max(worst, *(abs(a - b) for a, b in zip(row, o.logps.tolist())))
    update = time.perf_counter() - started
    share = cfg.prompts_per_step / run.ranks / len(rows)
    say(f"log-probabilities while sampling against scoring: largest difference {worst:.2g} "
        "(about 1e-5 in float32, up to 0.1 in bfloat16)")
    say(f"time of a step: about {share * (rollout + update * (1.4 if cfg.beta else 1)):.1f} s, first-call costs "
        f"included; {sum(stage.steps for stage in cfg.curriculum)} steps planned")


def prepare_out(cfg):
    """Create the run directory, or check that the one to resume was begun with the same settings."""
    out = Path(cfg.out)
    settings = json.loads(json.dumps(dataclasses.asdict(cfg)))
    free = {"resume", "allow_changes", "out", "threads", "timeout_minutes", "save_every", "keep", "sample_every",
            "micro_batch", "max_rows", "eval_rows", "checkpoint_activations", "check",
            "report_to"}  # change time, memory and where numbers go alone
    if (out / "config.json").exists():
        if not cfg.resume:
            raise UserError(f"--out {out} holds a run already; continue it with --resume or name another directory")
        before = json.loads((out / "config.json").read_text())
        changed = [f"--{name} was {before.get(name)!r}, is {settings[name]!r}" for name in settings
                   if name not in free and before.get(name) != settings[name]]
        if changed and not cfg.allow_changes:
            raise UserError("these settings differ from those the run began with:\n  " + "\n  ".join(changed)
                            + "\nResume with the old ones, or add --allow_changes")
    elif cfg.resume:
        raise UserError(f"--out {out} holds no run to resume")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists and is not empty; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "config.json", json.dumps(settings, indent=1))


def parse_args(argv=None):
    """Config from flags. Every field is a flag of the same name; its comment in the source is the help text."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default)}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(field.default, tuple):
            kind = {"nargs": "+"}
        parser.add_argument(f"--{field.name}", default=field.default, help=comments[field.name].replace("%", "%%")
                            + ("" if field.default == "" else f" [{field.default}]"), **kind)
    values = vars(parser.parse_args(argv))
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def setup(cfg):
    """Join the other ranks if torchrun started us; returns this rank's device."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes were started, but there are {torch.cuda.device_count()} GPUs: one each")
    if cuda:
        torch.cuda.set_device(local)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=cfg.timeout_minutes))
    for name, size in (("prompts_per_step", cfg.prompts_per_step), ("sft_batch", cfg.sft_batch)):
        if size % world()[1]:
            raise UserError(f"--{name} {size} is not a multiple of the {world()[1]} ranks")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def train(cfg):
    """The whole run: data, base evaluation, every stage of the curriculum, pictures."""
    device = setup(cfg)
    examples, tests, questions = load_data(cfg)
    processor = Processor.from_pretrained(cfg.model, cfg.max_pixels)
    run = Run(cfg, device)
    run.examples = {name: refuse_long_prompts(cfg, processor, rows) for name, rows in examples.items()}
    run.tests, run.questions = (refuse_long_prompts(cfg, processor, rows) for rows in (tests, questions))
    config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
    check_memory(memory_needed(config, cfg, run.ranks), run.say)
    if cfg.check:
        return check(run)
    if run.rank == 0:
        prepare_out(cfg)
    gather(None)
    first_stage, first_step = run.resume()
    if run.rank == 0:
        run.report.start(run.out, dataclasses.asdict(cfg), run.global_step)
    if not first_step:  # nothing is done twice: a row that is there already is left alone
        run.evaluate(cfg.curriculum[first_stage - 1].label if first_stage else "base")
    for stage in cfg.curriculum[first_stage:]:
        if run.rank == 0:
            write_cards(run, write_aside)  # of the stage before, now that it is evaluated
        first = first_step if stage.index == first_stage else 0
        if stage.name == "reject":
            run.examples["reject"] = run.self_improve(stage, first)
        run.train_stage(stage, first)
        run.save(run.stage_dir(stage.index), stage.index + 1, 0)
        run.evaluate(stage.label)
    if run.rank == 0:
        write_cards(run, write_aside)
        finish(run)


def finish(run):
    """Draw the pictures and print the table and where everything lies."""
    from pictures import curves, sheet
    curves([run.out], run.out / "curves.png", "reward" if any(s.forms for s in run.cfg.curriculum) else "loss")
    predictions = run.out / "predictions"
    if run.tests:
        last = json.loads((run.out / "results.json").read_text())["rows"][-1]["name"]
        rows = read_jsonl(predictions / f"{last}.jsonl")
        sheet(random.Random(0).sample(rows, min(24, len(rows))), run.out / "sheet.png")
        print(results_table([run.out]))
    pictures = " ".join(map(str, sorted(run.out.glob("*.png"))))
    print(f"model    {run.stage_dir(len(run.cfg.curriculum) - 1)}\npictures {pictures}\n"
          f"metrics  {run.out / 'metrics.jsonl'}")


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake, 1 for a run that cannot go on."""
    transformers.logging.disable_progress_bar()
    try:
        train(parse_args(argv))
    except UserError as error:
        leave(str(error), 1 if isinstance(error, RunError) else 2)
    except Stopped:
        leave("stopped by SIGTERM, everything is saved; continue with --resume", 128 + signal.SIGTERM)
    except OSError as error:
        leave(f"{error}; what was finished is kept, continue with --resume", 1)
    except torch.OutOfMemoryError as error:
        leave(f"out of GPU memory ({str(error).splitlines()[0]}). Lower --micro_batch or --max_rows, or add "
              "--checkpoint_activations, and continue with --resume", 1)
    except Exception:  # a defect of this program: its traceback, and no waiting for other ranks
        leave(traceback.format_exc(), 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(sentence, code):
    """Say why and end this process at once: a rank that tidied up first would wait for ranks that wait for it."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(1)  # rank 0 says what all of them found; another speaks only if it outlives rank 0
    print(f"currreft{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized() and world()[1] > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
