"""Curr-ReFT: curriculum reinforcement fine-tuning of a small vision-language model (arXiv 2503.07065).

Phase 1, curriculum RL. GRPO on the same tasks (detection, classification, math) asked in three forms of rising
difficulty: yes/no (binary), option letters (choice), free answers (open). A small model almost never gets an
open answer right, so open-only RL has little to learn from; yes/no almost always gives signal.
Phase 2, rejected-sampling-based self-improvement. The RL model answers general questions N times, a judge scores
every answer from 0 to 100, the best answer above 85 is kept, and the model is fine-tuned on these.

This file is the method: settings (`Config`, `Stage`), the equations (`group_advantages`, `grpo_loss`), one step
(`grpo_step`: rollout, assign_rewards, update), the state of a run (`Run`), one stage (`train_stage`), all of them
(`train`). Beside it, rewards.py pays answers, forms.py asks one annotation in three forms, data.py makes prompts,
packed.py scores and engine.py samples completions, sample.py evaluates and samples for phase 2.

What is left out of GRPO as others do it, and why:
- No DDP wrapper: losses are divided by constants of the whole step, and gradients are summed over ranks, so that
  micro-batches, padding and the number of ranks cannot change the result.
- No importance correction between sampling and scoring: both are softmax(logits / temperature) without the tokens
  that no answer may hold, of the same weights. How far they are apart is logged (`logp_gap`).
- No mask on truncated completions, no length shaping, no normalisation over the batch, no entropy bonus, no learned
  value or reward model. docs/departures.md has what differs from the paper and from the released code.

Shapes: B prompts of this rank, G completions of each, R = B * G completions, T tokens of the longest completion.

    M=Qwen/Qwen2.5-VL-3B-Instruct
    python currreft.py --model $M --data DIR --out RUN                          # one GPU
    torchrun --nproc_per_node 8 currreft.py --model $M --data DIR --out RUN     # one node; several: README.md
"""

import os
import signal

if __name__ == "__main__":  # before libraries load
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C meanwhile: no traceback. `main` listens later
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # groups differ in lengths

import copy
import dataclasses
import hashlib
import logging
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from data import (
    Processor, Prompt, batch_indices, instruction, load_data, refuse_long_prompts, taught)
from engine import generate, load_policy
from packed import forbidden_bias, image_features, pack, token_logps
from rewards import FORMS, TASKS, Example, accuracy_reward, format_reward, safe_reward
from sample import Rules, evaluate, kept_examples, rejection_sample
from support import warnings
from support.base import base_config, named, not_finite
from support.card import write_cards
from support.directory import RunDirectory, made_of
from support.endpoint import EndpointJudge
from support.files import read_jsonl
from support.flags import check_values, parse
from support.log import Log, over_ranks
from support.memory import check_memory, host_needed, memory_needed
from support.optimizer import ShardedAdamW
from support.ranks import gather, join_ranks, leave, world
from support.rows import declared_tasks
from support.signals import Stopped, ending, signals
from support.tables import results_table
from support.words import RunError, UserError, say, terminal

MAX_GRAD_NORM = 1.0  # gradients are scaled down to it


# ---- Settings: field = flag, comment = its --help ----

@dataclass(frozen=True)
class Config:
    """Every setting of a run. All batch sizes are global: the same run on any number of GPUs."""

    # what is trained, on what, and where
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # directory or hub name of the checkpoint to start from
    data: str = ""  # directory with grpo_data/{train,test} and SFT_data/reject, or {train,test}
    image_root: str = ""  # directory that image paths are relative to (default: --data)
    task: tuple = ()  # task of rows that name none: TASK, or NAME=TASK for files whose names begin with NAME
    out: str = "runs/curr-reft"  # run directory, shared by all nodes; a new one unless --resume
    resume: bool = False  # continue the run in --out where it stopped
    allow_changes: bool = False  # resume although settings differ from those the run began with

    # the curriculum, and what GRPO samples
    stages: tuple = ("binary:600", "choice:500", "open:2300", "reject:400")  # FORM[+FORM]:STEPS each
    reference: str = "stage"  # KL reference: policy at the start of the 'stage', or of the whole run ('base')
    prompts_per_step: int = 8  # prompts in one GRPO step, over all GPUs
    num_generations: int = 8  # completions of each prompt, G
    updates_per_rollout: int = 1  # optimizer steps taken on one rollout
    seed: int = 0  # everything random follows from it
    temperature: float = 1.0  # of the sampled and scored distribution in RL
    max_completion_length: int = 512  # new tokens of a completion at most
    max_prompt_length: int = 4096  # longer prompts (image tokens included) are refused, never truncated
    max_pixels: int = 401_408  # pixels of an image at most; 28 x 28 of them are one token

    # the update
    lr: float = 1e-6  # RL learning rate (paper 2e-5, model card 1e-5, released code 1e-6)
    lr_schedule: str = "cosine"  # within each stage: 'cosine' to zero, or 'constant'
    beta: float = 0.04  # weight of the KL penalty; 0 loads no reference model
    epsilon: float = 0.2  # clip range of the probability ratio
    partial_credit: float = 0.2  # choice reward for a non-empty proper subset of several right letters
    soft_iou: bool = False  # open detection is rewarded with the matched IoU itself instead of IoU > 0.5
    freeze_vision: bool = False  # keep the vision tower fixed and encode each image once per step

    # phase 2, and supervised stages
    sft_lr: float = 2e-7  # learning rate of the sft and reject stages
    sft_batch: int = 32  # examples in one SFT step, over all GPUs
    questions: str = ""  # JSONL of questions for rejection sampling (default: found under --data)
    reject_samples: int = 8  # answers sampled per question
    reject_threshold: float = 85.0  # an answer is kept only if its score (0-100) is above this
    judge_url: str = ""  # OpenAI-compatible endpoint that scores answers (default: rules); key in JUDGE_API_KEY
    judge_model: str = ""  # model name sent to the judge

    # how it is done: time and memory, not results
    micro_batch: int = 1  # groups (RL) or examples (SFT) in one forward pass; changes no result
    max_rows: int = 64  # completions in flight in a rollout or an evaluation, per GPU
    checkpoint_activations: bool = False  # recompute activations in the update: slower, far less memory
    offload: bool = False  # masters, moments and gradient sums in host memory: slower, 42 GiB less at 3B
    dtype: str = "auto"  # of weights and compute: auto (bfloat16 on CUDA, else float32), bfloat16 or float32
    timeout_minutes: float = 30.0  # a rank that others wait for longer than this ends the run

    # what is kept and shown
    save_every: int = 200  # steps between checkpoints to resume from; one of 3B is 53 GB, a minute or two
    eval_limit: int = 0  # test examples of each split at most (0: all)
    report_to: str = ""  # log to tensorboard (in --out) or wandb as well; what is not installed is an error
    skip_bad_rows: bool = False  # drop and count bad data rows instead of stopping
    allow_outside: bool = False  # allow image paths outside --image_root

    def __post_init__(self):
        check_values(vars(self))
        self.curriculum, declared_tasks(self.task, TASKS)  # raise for a malformed stage or no task

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
            raise UserError(f"--stages: {text!r} is not FORM:STEPS, where FORM is binary, choice, open, a mix "
                            "such as binary+choice, sft or reject, and STEPS a whole number above 0")
        return Stage(index, name, int(steps))

    @property
    def label(self):
        """Name of its results and of its checkpoint, unique in a run: '1-binary'."""
        return f"{self.index + 1}-{self.name}"

    @property
    def forms(self):
        """Answer forms that an RL stage trains on; empty for sft and reject."""
        return () if self.name in ("sft", "reject") else tuple(self.name.split("+"))


# ---- The method: equations ----

def group_advantages(rewards):
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group, std unbiased: (..., G) -> (..., G).

    group_advantages(tensor([1., 0., 0., 1.])) -> about [0.866, -0.866, -0.866, 0.866].
    All rewards equal -> exactly 0. (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.)
    """
    centered = rewards - rewards.mean(-1, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centered / (rewards.std(-1, keepdim=True) + 1e-4))


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, beta=0.04, epsilon=0.2, num_completions=None):
    """The GRPO loss of R completions, and sums for the log.

        loss = - 1/R sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta KL_t ]
        rho  = pi(o_t) / pi_old(o_t)           KL_t = exp(ref - logp) - (ref - logp) - 1   (k3, always >= 0)

    logp, logp_old, logp_ref, mask (R, T); advantages (R,). logp_ref None: no KL term. num_completions: the R
    of the whole step, over all micro-batches and ranks, so that gradients add up to the same sum however the
    step is split. Returns (scalar loss, {"kl": sum over tokens, "clipped": number of tokens, "tokens": number
    of tokens}), all tensors: the host waits for none of them before the step is done.
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
    return loss, {name: value.sum() for name, value in sums.items()}


def sft_loss(logp, mask, num_tokens):
    """Mean negative log-likelihood of the answers' tokens. logp, mask (R, T); num_tokens: the whole step's."""
    return -(logp * mask).sum() / num_tokens


# ---- The method: one step ----

@dataclass
class Group:
    """One prompt q and its G completions, through a whole step; tensors are (G,)."""

    place: int                      # of the prompt in the step's global batch, over all ranks
    example: Example                # the question and its truth
    prompt: Prompt                  # what the model is shown
    completions: list               # o_1 .. o_G, each an engine.Completion
    accuracy: torch.Tensor = None   # accuracy reward, in [0, 1]
    format: torch.Tensor = None     # format reward, 0 or 1
    rewards: torch.Tensor = None    # r, their sum
    advantages: torch.Tensor = None # A


def grpo_step(run, stage, step):
    """One GRPO step: sample, reward, learn. Returns ({name: (sum, count)}, {part: seconds}) for the log."""
    started = time.perf_counter()
    groups = rollout(run, stage, step)
    rolled_out = time.perf_counter()
    assign_rewards(run.cfg, groups)
    sums = update(run, stage, step, groups)
    seconds = {"rollout": rolled_out - started, "update": time.perf_counter() - rolled_out}
    run.log.sample(step, run.global_step + 1, groups[0])
    return statistics(groups, sums), seconds


def rollout(run, stage, step):
    """Sample o_1 .. o_G ~ pi_old for each prompt of this rank's slice of the batch: a list of B Groups.

    Which questions, and every random number, follow from (seed, stage, step, place in the global batch, g):
    the same on any number of ranks and after any resume. A completion that finds no end within
    --max_completion_length is truncated and then treated like any other: rewarded as it stands, which is
    mostly worth 0, and trained on at its full length.
    """
    cfg = run.cfg
    places, examples = run.batch(stage, step, cfg.prompts_per_step)
    prompts = run.prompts(examples)  # q
    seeds = [[seed_from(cfg.seed, stage.index, step, place, g) for g in range(cfg.num_generations)]
             for place in places]
    run.policy.eval()
    completions = generate(run.policy, run.processor, prompts, cfg.num_generations, cfg.max_completion_length,
                           cfg.temperature, seeds=seeds, max_rows=cfg.max_rows)
    return [Group(*group) for group in zip(places, examples, prompts, completions)]


def assign_rewards(cfg, groups):
    """Give each completion its rewards, by the truth of its own question, and its advantage in its group."""
    for group in groups:
        texts, example = [o.text for o in group.completions], group.example
        settings = {"partial_credit": cfg.partial_credit, "soft_iou": cfg.soft_iou}
        group.accuracy = torch.tensor([safe_reward(accuracy_reward, text, example, **settings)
                                       for text in texts], dtype=torch.float64)
        group.format = torch.tensor([safe_reward(format_reward, text, example) for text in texts],
                                    dtype=torch.float64)
        group.rewards = group.accuracy + group.format
        group.advantages = group_advantages(group.rewards).float()


def update(run, stage, step, groups):
    """Learn from the groups: one optimizer step, or --updates_per_rollout of them. Returns sums over tokens.

    pi_old is the first update's own forward pass: the weights are still those that sampled, so rho is exactly 1.
    It and the reference are scored once, however many updates follow; "kl" and "clipped" are summed over all.
    Without KL, groups whose rewards are all equal are left out: their gradient is exactly zero.
    """
    cfg, sums, old_and_ref = run.cfg, Counter(kl=0, clipped=0, tokens=0, logp_gap=0, compared=0), {}
    groups = [group for group in groups if cfg.beta or group.advantages.any()]
    batches = [groups[i:i + cfg.micro_batch] for i in range(0, len(groups), cfg.micro_batch)]
    run.policy.train()
    for _ in range(cfg.updates_per_rollout):
        for m, batch in enumerate(batches):
            packed = run.pack([group.prompt for group in batch],
                              [[o.tokens for o in group.completions] for group in batch])
            logp = token_logps(run.policy, packed, run.bias, cfg.temperature)  # (R, T)
            if m not in old_and_ref:
                with torch.no_grad():
                    logp_ref = token_logps(run.reference, packed, run.bias, cfg.temperature) \
                        if cfg.beta else None
                old_and_ref[m] = logp.detach(), logp_ref
                sampled = torch.cat([o.logps for group in batch for o in group.completions]).to(logp.device)
                at_tokens = logp.detach().flatten()[packed.completion_slots]
                sums["logp_gap"] += (at_tokens - sampled).abs().sum()
                sums["compared"] += len(sampled)
            advantages = torch.cat([group.advantages for group in batch]).to(logp.device)  # (R,)
            loss, token_sums = grpo_loss(logp, *old_and_ref[m], advantages, packed.mask, cfg.beta, cfg.epsilon,
                                         cfg.prompts_per_step * cfg.num_generations)
            loss.backward()
            sums.update(token_sums)
        run.optimizer_step(stage, step, cfg.lr)
    return {name: float(value) for name, value in sums.items()}


def statistics(groups, sums):
    """What a step has to say, as {name: (sum, count)}: over ranks both are added up, then divided once."""
    rewards = torch.stack([group.rewards for group in groups])  # (B, G)
    completions = [o for group in groups for o in group.completions]
    values = {"reward": rewards, "reward_std": rewards.std(1),
              "equal_groups": rewards.amax(1) == rewards.amin(1),
              "reward/accuracy": torch.cat([group.accuracy for group in groups]),
              "reward/format": torch.cat([group.format for group in groups]),
              "completion_length": torch.tensor([len(o.tokens) for o in completions]),
              "truncated": torch.tensor([o.truncated for o in completions])}
    for task in {group.example.task for group in groups}:
        values[f"reward/accuracy/{task}"] = torch.cat([g.accuracy for g in groups if g.example.task == task])
    if entropies := [o.entropy for o in completions if o.entropy is not None]:  # not every generator knows it
        values["entropy"] = torch.cat(entropies)
    return {**{name: (value.double().sum().item(), value.numel()) for name, value in values.items()},
            "logp_gap": (sums["logp_gap"], sums["compared"]),
            "kl": (sums["kl"], sums["tokens"]), "clip_fraction": (sums["clipped"], sums["tokens"])}


def sft_step(run, stage, step):
    """One supervised step on the stage's pairs; the loss is on the answer and its end token alone."""
    cfg, started = run.cfg, time.perf_counter()
    _, examples = run.batch(stage, step, cfg.sft_batch)
    prompts = run.prompts(examples)
    answers = [run.processor.response_ids(taught(example)) for example in examples]
    num_tokens = sum(gather(sum(map(len, answers))))  # of the whole step, over all ranks
    run.policy.train()
    loss_sum = 0.0
    for i in range(0, len(prompts), cfg.micro_batch):
        packed = run.pack(prompts[i:i + cfg.micro_batch], [[a] for a in answers[i:i + cfg.micro_batch]])
        loss = sft_loss(token_logps(run.policy, packed, run.bias), packed.mask, num_tokens)
        loss.backward()
        loss_sum += loss.detach() * num_tokens
    run.optimizer_step(stage, step, cfg.sft_lr)
    return {"loss": (loss_sum.item(), sum(map(len, answers)))}, {"update": time.perf_counter() - started}


# ---- The state of a run: models, optimizer, counts; and what follows from them: batches, seeds, schedule ----

class Run:
    """One run on one rank. Whatever changes in a run is declared here; `directory` and `log` know none of it."""

    SAVED = ("global_step", "skipped", "bad_in_a_row", "results")  # attributes that a checkpoint keeps

    def __init__(self, cfg, device, examples=None, tests=(), questions=()):
        self.cfg = cfg                  # Config
        self.device = device            # of this rank
        self.rank, self.ranks = world()
        self.examples = examples or {}  # {stage name: its training examples}
        self.tests = tests              # test examples of all splits
        self.questions = questions      # of the reject stage

        self.policy = None              # the model that is trained; its weights change in place
        self.processor = None           # data.Processor: tokens, pixels
        self.bias = None                # (V,) -inf on tokens that no completion may hold
        self.reference = None           # frozen model of the KL term; None where beta is 0
        self.optimizer = None           # ShardedAdamW of the current stage
        self.optimizer_files = []       # shards to resume the stage's optimizer from

        self.global_step = 0            # optimizer steps of all stages
        self.skipped = 0                # steps skipped because their gradient was not finite
        self.bad_in_a_row = 0           # of them without a good one in between
        self.results = []               # rows of results.json: one an evaluation
        self.grad_norm = 0.0            # of the last step, before clipping
        self.learning_rate = 0.0        # of the last step

        self.directory = RunDirectory(cfg.out, cfg.stages, [stage.label for stage in cfg.curriculum])
        self.log = Log(self.directory.out, cfg.report_to)

    # ---- Models ----

    def load_weights(self, path):
        """Start from, or replace all weights by, the checkpoint at `path`."""
        dtype = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.cfg.dtype]
        self.policy, self.processor = load_policy(path, self.device, dtype, self.cfg.max_pixels)
        self.bias = forbidden_bias(self.policy, self.processor)
        self.log.watch.rounding = 1e-3 if self.policy.dtype == torch.float32 else 0.05
        self.policy.model.visual.requires_grad_(not self.cfg.freeze_vision)
        if self.cfg.checkpoint_activations:  # only acts in train mode, which only the update uses
            enable = getattr(self.policy, "activation_checkpointing_enable", None)  # newer name
            enable = enable or self.policy.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})

    def load_reference(self, stage, resumed=False):
        """The KL reference of a stage, frozen, or the base; none if beta is 0.

        The policy at the stage's start, which a resumed run finds as the end of the stage before.
        """
        if not self.cfg.beta:
            return
        if self.cfg.reference == "stage" and not resumed:
            self.policy.engine = None  # its graphs are the policy's own
            self.reference = copy.deepcopy(self.policy).eval()
        else:
            first = self.cfg.reference == "base" or stage.index == 0
            path = self.cfg.model if first else self.directory.stage_end(stage.index - 1)
            self.reference = load_policy(path, self.device, self.policy.dtype, self.cfg.max_pixels)[0]
        self.reference.requires_grad_(False)

    # ---- Batches ----

    def batch(self, stage, step, size):
        """This rank's slice of the global batch of a step: (places in the global batch, examples)."""
        examples = self.examples[stage.name]
        indices = batch_indices(len(examples), size, step, seed_from(self.cfg.seed, stage.index))
        places = range(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)
        return list(places), [examples[indices[i]] for i in places]

    def prompts(self, examples):
        """Examples as prompts. A frozen vision tower reads each image here, once for all that follows."""
        prompts = [self.processor(example) for example in examples]
        for prompt in prompts:
            if self.cfg.freeze_vision and prompt.pixel_values is not None:
                with torch.no_grad():
                    images = prompt.pixel_values.to(self.device), prompt.image_grid_thw.to(self.device)
                    prompt.features = image_features(self.policy, *images)
        return prompts

    def pack(self, prompts, completions):
        """packed.pack on this rank's device."""
        return pack(self.policy, prompts, completions).to(self.device)

    # ---- One optimizer step ----

    def optimizer_step(self, stage, step, base_lr):
        """Reduce, clip and apply gradients; non-finite ones are skipped on all ranks (they share the norm)."""
        self.learning_rate = learning_rate(self.cfg, stage, step, base_lr)
        self.grad_norm = self.optimizer.reduce_gradients(MAX_GRAD_NORM)
        if math.isfinite(self.grad_norm):
            self.optimizer.step(self.learning_rate)
            self.bad_in_a_row = 0
        else:
            self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
            say(f"{stage.name}, step {step + 1}: the gradient is not finite, so the step is skipped "
                f"({self.skipped} so far)")
        self.optimizer.zero_grad()
        if self.bad_in_a_row >= 5:
            raise RunError(f"stage {stage.name}, step {step + 1}: gradients were not finite five times in a "
                           f"row. {self.directory.way_back()}")

    # ---- Log, save, resume, evaluate ----

    def record(self, stage, step, sums, seconds):
        """Log a step over all ranks; returns the signal that has arrived on any, so that all stop."""
        totals, slowest, stopping = over_ranks(sums, seconds, signals.arrived())
        self.global_step += 1
        if self.rank == 0:
            self.log.step(
                stage, {"step": self.global_step, "stage": stage.name, "stage_index": stage.index,
                        "stage_step": step + 1}, totals, slowest,
                {"grad_norm": self.grad_norm, "lr": self.learning_rate, "skipped_steps": self.skipped})
        return stopping

    def save(self, stage, done=None):
        """A checkpoint: after `done` steps within a stage, its optimizer included; or of the stage's end."""
        if bad := not_finite(self.policy):  # the same on every rank
            raise RunError(f"after step {self.global_step} weights are not finite ({named(bad)}), so they are "
                           f"not saved. {self.directory.way_back()}")
        state = {name: getattr(self, name) for name in self.SAVED}
        if done is None:
            state |= {"stage": stage.index + 1, "stage_step": 0}
            path, optimizer, rests_on = self.directory.stage_end(stage.index), None, []
        else:
            state |= {"stage": stage.index, "stage_step": done}
            path, optimizer = self.directory.checkpoint(self.global_step), self.optimizer
            rests_on = list(self.directory.out.glob(f"rejected-{stage.index + 1}.jsonl"))
            if self.reference is not None and self.cfg.reference == "stage" and stage.index:
                rests_on.append(self.directory.stage_end(stage.index - 1))  # the reference
        self.directory.save(path, state, self.policy, self.processor, optimizer, rests_on)

    def begin_or_resume(self):
        """Begin the run directory, or go on from its furthest whole checkpoint: (stage index, its steps done).

        UserError if --out cannot be begun or continued, if the run is not made of what it was, or if the base
        model cannot be trained. Nothing is written before all of that is known.
        """
        cfg = self.cfg
        used = [e for rows in (*self.examples.values(), self.tests, self.questions) for e in rows]
        made = made_of(cfg, used) if self.rank == 0 else None
        path, state, record, changed = self.directory.find(dataclasses.asdict(cfg), made, cfg.model)
        self.load_weights(path)
        for name in self.SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.optimizer_files = [Path(path) / name for name in state["files"] if name.startswith("optimizer-")]
        if self.rank == 0:
            self.results = self.directory.begin(path, state, record, changed)
            self.log.report.start(self.directory.out, dataclasses.asdict(cfg), self.global_step)
            self.log.watch.recall(read_jsonl(self.directory.out / "metrics.jsonl") if self.global_step else ())
        self.results = gather(self.results)[0]
        return state["stage"], state["stage_step"]

    def evaluate(self, name):
        """Greedy accuracy on every test split: a row of results.json, unless it is there; then the model card."""
        if self.tests and name not in [row["name"] for row in self.results]:
            splits, predictions = evaluate(
                self.policy, self.processor, self.tests, max_completion_length=self.cfg.max_completion_length,
                max_rows=self.cfg.max_rows, on_finish=signals.check, description=f"evaluate {name}")
            self.results = self.results + [{"name": name, "splits": splits}]
            if self.rank == 0:
                self.directory.write_results(self.results, predictions)
                self.log.report.results(self.global_step, splits)
        if self.rank == 0:
            write_cards(self, instruction(Example(problem="", solution="", task="detection")))


def seed_from(*numbers):
    """A 63-bit seed from any numbers, alike on every machine: seed_from(0, 1) != seed_from(1, 0)."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def learning_rate(cfg, stage, step, base):
    """Learning rate of a stage's step: constant, or half a cosine from `base` down to zero."""
    done = step / stage.steps
    return base * (0.5 + 0.5 * math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else base


# ---- The curriculum ----

def train(cfg):
    """The whole run: data, evaluation of the base, stage after stage with checkpoint and evaluation."""
    run = begin(cfg)
    with run.directory:  # nobody else's until the end
        reached, done = run.begin_or_resume()
        if not done:  # nothing is done twice: a row of results that is there already is left alone
            run.evaluate(cfg.curriculum[reached - 1].label if reached else "base")
        for stage in cfg.curriculum[reached:]:
            done = done if stage.index == reached else 0
            if stage.name == "reject":
                run.examples["reject"] = self_improve(run, stage, done)
            with signals.held():
                train_stage(run, stage, done)
                run.save(stage)
                stopping = max(gather(signals.arrived()))  # on any rank
            if stopping:
                raise Stopped(stopping)
            run.evaluate(stage.label)
    if run.rank == 0:
        print(f"{results_table([run.directory.out])}\nmodel    {run.directory.stage_end(-1)}\n"
              f"metrics  {run.directory.out / 'metrics.jsonl'}")


def begin(cfg):
    """Join the other ranks, check all data, tell what memory is needed: what can fail before a model loads."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what its warnings speak of is checked when a model is loaded
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    device = join_ranks(cfg.timeout_minutes)
    if device.type == "cpu":  # else threads add up the gradients of what is read twice in any order
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    for name, size in (("prompts_per_step", cfg.prompts_per_step), ("sft_batch", cfg.sft_batch)):
        if size % world()[1]:
            raise UserError(f"--{name} {size} is not a multiple of the {world()[1]} ranks")
    examples, tests, questions = load_data(cfg)
    if not Path(cfg.model).exists():
        say(f"--model {cfg.model} is no directory here, so it is looked for on the Hugging Face hub")
    processor = Processor.from_pretrained(cfg.model, cfg.max_pixels)
    examples = {name: refuse_long_prompts(cfg, processor, rows) for name, rows in examples.items()}
    tests, questions = (refuse_long_prompts(cfg, processor, rows) for rows in (tests, questions))
    for sentence in warnings.of_a_run(cfg, examples):
        say(sentence)
    used = [example for rows in (*examples.values(), questions) for example in rows]
    longest, asked = (max(processor.prompt_lengths(rows), default=None) for rows in (used, [*tests, *questions]))
    config, ranks = base_config(cfg.model, processor), world()[1]
    check_memory(memory_needed(config, cfg, ranks, longest, asked), cfg, host=host_needed(
        config, cfg, ranks, here=int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if questions:
        judge_of(cfg).probe()  # better now than after all RL stages
    return Run(cfg, device, examples, tests, questions)


def train_stage(run, stage, done):
    """One row of the curriculum, from its step `done` on.

    At a switch of stage all starts afresh from the policy as it is: the optimizer (no moments, float32 masters
    copied from the weights), the learning rate's schedule (it counts the stage's own steps), the KL reference
    (the policy now, unless --reference base), the order of the data. Weights and the count of steps go on.
    """
    run.policy.engine = None  # an evaluation's memory, freed before this stage's is taken
    run.optimizer = ShardedAdamW(run.policy.named_parameters(), run.cfg.offload)
    if done:  # resumed within the stage
        run.optimizer.load(run.optimizer_files)
    if stage.forms:
        run.load_reference(stage, resumed=done > 0)
    take_step = grpo_step if stage.forms else sft_step
    run.log.open_bar(stage, done)
    for step in range(done, stage.steps):
        stopping = run.record(stage, step, *take_step(run, stage, step))
        if step + 1 == stage.steps:
            break
        stopping = stopping or run.ranks == 1 and signals.arrived()  # several ranks agree in `record`
        if stopping or (step + 1) % run.cfg.save_every == 0:
            run.save(stage, step + 1)
        if stopping:
            raise Stopped(stopping)
    run.log.end_stage()
    run.optimizer = run.reference = None  # before an evaluation takes memory


def self_improve(run, stage, done):
    """Phase 2: sample answers to the questions, judge them, keep the best: the kept as SFT examples."""
    cfg, kept = run.cfg, run.directory.out / f"rejected-{stage.index + 1}.jsonl"
    if done:  # fine-tuning has begun on what was kept
        return kept_examples(kept, run.questions)
    say(f"{stage.name}: sampling {cfg.reject_samples} answers to each of {len(run.questions)} questions")
    count = rejection_sample(
        run.policy, run.processor, run.questions, kept, judge=judge_of(cfg), samples=cfg.reject_samples,
        threshold=cfg.reject_threshold, max_rows=cfg.max_rows,
        max_completion_length=cfg.max_completion_length, seed=seed_from(cfg.seed, stage.index),
        weights=run.directory.weights_before(stage.index), on_finish=signals.check)
    passes = stage.steps * cfg.sft_batch / max(1, count)
    say(f"{stage.name}: kept {count} of {len(run.questions)} questions, in {kept}; {stage.steps} steps of "
        f"{cfg.sft_batch} are {passes:.3g} passes over them")
    if not count:
        raise RunError(f"{stage.name}: no answer scored above --reject_threshold {cfg.reject_threshold:g}, so "
                       "there is nothing to fine-tune on")
    return kept_examples(kept, run.questions)


def judge_of(cfg):
    """Who scores the answers of phase 2: the endpoint at --judge_url, or rules."""
    return EndpointJudge(cfg.judge_url, cfg.judge_model) if cfg.judge_url else Rules()


# ---- Command line ----

def parse_args(argv=None):
    """Config from flags: every field is a flag of its name, and its comment in the source is the help."""
    return parse(Config, argv, __doc__.splitlines()[0])


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake, 1 for a run that cannot go on."""
    with terminal(), signals:
        cfg = None
        try:
            cfg = parse_args(argv)
            train(cfg)
        except (Stopped, Exception) as error:
            leave(*ending(error, begun=cfg is not None and os.path.exists(f"{cfg.out}/config.json")))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
