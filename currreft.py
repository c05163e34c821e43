"""Curr-ReFT: curriculum reinforcement fine-tuning of a small vision-language model (arXiv 2503.07065).

Phase 1, curriculum RL. GRPO on the same tasks (detection, classification, math) asked in three forms of rising
difficulty: yes/no (binary), option letters (choice), free answers (open). A small model almost never gets an open
answer right, so open-only RL has little to learn from; yes/no almost always gives signal.
Phase 2, rejected-sampling-based self-improvement. The RL model answers general questions N times, a judge scores every
answer from 0 to 100, the best answer above 85 is kept, and the model is fine-tuned on what was kept.

This file is the method, from the settings to the run: `Config` and `Stage`, the equations (`group_advantages`,
`token_logps`, `grpo_loss`), one step (`grpo_step`: rollout, judge, update), one stage (`train_stage`), all of them
(`train`). What it rests on: data.py makes prompts, tasks.py and rewards.py judge answers, engine.py has the two fast
forward passes, sample.py evaluates and samples for phase 2, run.py keeps the run directory, distributed.py the ranks.

What is left out of GRPO as others do it, and why:
- No DDP wrapper: every loss is divided by constants of the whole step, and gradients are summed over ranks, so that
  micro-batches, padding and the number of ranks cannot change the result.
- No importance correction between sampling and scoring: both are softmax(logits / temperature) without the tokens that
  no answer may hold, of the same weights. How far they are apart is logged (`logp_gap`).
- No mask on truncated completions, no length shaping, no normalisation over the batch, no entropy bonus, no learned
  value or reward model. docs/departures.md has what differs from the paper and from the authors' code.

Shapes: B prompts of this rank, G completions of each, R = B * G completions, T tokens of the longest completion,
N tokens of a packed row (engine.py), H hidden size, V vocabulary.

    python currreft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --out RUN                         # one GPU
    torchrun --nproc_per_node 8 currreft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --out RUN    # one node
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 currreft.py ...  # several
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: no traceback. `main` listens later

import dataclasses
import logging
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import FORMS, Example, Processor, Prompt, load_data, refuse_long_prompts, taught
from distributed import RunError, ShardedAdamW, UserError, gather, join_ranks, leave, say, world
from engine import SelectedLogps, generate, load_policy, packed_hidden  # noqa: F401 (load_policy is imported from here)
from rewards import accuracy_reward, format_reward, paid
from run import Run, write_aside
from sample import Judge, kept_examples, rejection_sample
from tools import doubts
from tools.accept import base_config
from tools.card import write_cards
from tools.endings import Stopped, ending, signals
from tools.flags import check_values, parse
from tools.layout import declared_tasks
from tools.memory import check_memory, memory_needed
from tools.terminal import terminal

# ---------------------------------------------------------------------------------------------------------------------
# Settings: field = flag, comment = its --help


@dataclass(frozen=True)
class Config:
    """Every setting of a run. All batch sizes are global: the same run on any number of GPUs."""

    # what is trained, on what, and where
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # directory or hub name of a Qwen2.5-VL checkpoint to start from
    data: str = ""  # directory with grpo_data/{train,test} and SFT_data/reject, or {train,test}
    image_root: str = ""  # directory that image paths are relative to (default: --data)
    task: tuple = ()  # task of rows that name none: TASK, or NAME=TASK for files whose names begin with NAME
    out: str = "runs/curr-reft"  # run directory, shared by all nodes; an existing one is an error unless --resume
    resume: bool = False  # continue the run in --out where it stopped
    allow_changes: bool = False  # resume although settings differ from those the run began with

    # the curriculum, and what GRPO samples
    stages: tuple = ("binary:600", "choice:500", "open:2300", "reject:400")  # the curriculum, FORM[+FORM]:STEPS each
    advance_at: float = 0.0  # end a stage early once its mean accuracy reward over 50 steps reaches this (0: never)
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
    warmup_steps: int = 0  # linear warm-up at the start of each stage
    weight_decay: float = 0.0  # decoupled weight decay of AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
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
    judge_url: str = ""  # OpenAI-compatible endpoint that scores answers (default: rules; key in JUDGE_API_KEY)
    judge_model: str = ""  # model name sent to the judge

    # how it is done: time and memory, not results
    check: bool = False  # look before a long run: data, one rollout, log-probabilities, memory, time; trains nothing
    micro_batch: int = 1  # groups (RL) or examples (SFT) in one forward pass; changes speed and memory, not results
    max_rows: int = 64  # completions in flight in a rollout, per GPU
    checkpoint_activations: bool = False  # recompute activations in the update: slower, far less memory
    offload: bool = False  # float32 masters, moments and gradient sums in host memory: slower, 42 GiB less at 3B
    dtype: str = "auto"  # of weights and compute: auto (bfloat16 on CUDA, else float32), bfloat16 or float32
    threads: int = 0  # CPU threads (0: torch's choice)
    timeout_minutes: float = 30.0  # a rank that others wait for longer than this ends the run

    # what is kept and shown
    save_every: int = 50  # steps between checkpoints to resume from
    keep: int = 2  # such checkpoints kept; the end of every stage is kept in any case
    sample_every: int = 10  # steps between printed samples
    eval_limit: int = 0  # test examples of each split at most (0: all)
    eval_rows: int = 64  # completions in flight in evaluation, per GPU
    report_to: str = ""  # log to tensorboard (in --out) or wandb as well; what is not installed is an error
    skip_bad_rows: bool = False  # drop and count bad data rows instead of stopping
    allow_outside: bool = False  # allow image paths outside --image_root

    def __post_init__(self):
        check_values(vars(self))
        self.curriculum, declared_tasks(self.task)  # raise for a malformed stage, or a task that is none

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
# The method: equations


def group_advantages(rewards):
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group, std unbiased. rewards (..., G) -> advantages (..., G).

    group_advantages(tensor([1., 0., 0., 1.])) -> about [0.866, -0.866, -0.866, 0.866]. All rewards equal -> exactly 0.
    (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.)
    """
    centered = rewards - rewards.mean(-1, keepdim=True)
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)
    return torch.where(equal, 0.0, centered / (rewards.std(-1, keepdim=True) + 1e-4))


def token_logps(model, packed, bias, temperature=1.0):
    """log pi(o_t | q, o_<t) of every completion token: (R, T) float32, 0 on padding.

    packed: engine.Packed. bias (V,): engine.forbidden_bias. The distribution is softmax(logits / temperature) without
    the forbidden tokens, the one that was sampled. Policy, old policy and reference all come from this function.
    """
    hidden = packed_hidden(model, packed)  # (N, H)
    logps = SelectedLogps.apply(hidden[packed.predictors], model.lm_head.weight, packed.targets, bias, temperature)
    return logps.new_zeros(packed.mask.numel()).scatter(0, packed.completion_slots, logps).view_as(packed.mask)


def grpo_loss(logp, logp_old, logp_ref, advantages, mask, beta=0.04, epsilon=0.2, num_completions=None):
    """The GRPO loss of R completions, and sums for the log.

        loss = - 1/R sum_i 1/|o_i| sum_t [ min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) - beta KL_t ]
        rho  = pi(o_t) / pi_old(o_t)           KL_t = exp(ref - logp) - (ref - logp) - 1   (k3, always >= 0)

    logp, logp_old, logp_ref, mask (R, T); advantages (R,). logp_ref None: no KL term. num_completions: the R of the
    whole step, over all micro-batches and ranks, so that gradients add up to the same sum however the step is split.
    Returns (scalar loss, {"kl": sum over tokens, "clipped": number of tokens, "tokens": number of tokens}), all
    tensors: the host waits for none of them before the step is done.
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
    """Mean negative log-likelihood of the answers' tokens: logp, mask (R, T); num_tokens of the whole step."""
    return -(logp * mask).sum() / num_tokens


# ---------------------------------------------------------------------------------------------------------------------
# The method: one step


@dataclass
class Group:
    """One prompt q and its G completions, through a whole step; tensors are (G,)."""

    example: Example                     # the question and its truth
    prompt: Prompt                       # what the model is shown
    completions: list                    # o_1 .. o_G, each an engine.Completion
    accuracy: torch.Tensor = None        # accuracy reward, in [0, 1]
    format: torch.Tensor = None          # format reward, 0 or 1
    rewards: torch.Tensor = None         # r, their sum
    advantages: torch.Tensor = None      # A


def grpo_step(run, stage, step):
    """One GRPO step: sample, judge, learn, say. Returns ({name: (sum, count)}, {part: seconds}) for the log."""
    started = time.perf_counter()
    groups = rollout(run, stage, step)
    rolled_out = time.perf_counter()
    judge(run.cfg, groups)
    sums = update(run, stage, step, groups)
    run.show_sample(step, groups[0])
    return statistics(groups, sums), {"rollout": rolled_out - started, "update": time.perf_counter() - rolled_out}


def rollout(run, stage, step):
    """Sample o_1 .. o_G ~ pi_old for each prompt of this rank's slice of the batch; returns a list of B Groups.

    Which questions, and every random number, follow from (seed, stage, step, place in the global batch, g): the same on
    any number of ranks and after any resume. A completion that finds no end within --max_completion_length is truncated
    and then treated like any other: judged as it stands, which is mostly worth 0, and trained on at its full length.
    """
    cfg = run.cfg
    places, examples = run.batch(stage, step, cfg.prompts_per_step)
    prompts = run.prompts(examples)  # q
    seeds = [[run.seed(stage.index, step, place, g) for g in range(cfg.num_generations)] for place in places]
    run.policy.eval()
    completions = generate(run.policy, run.processor, prompts, cfg.num_generations, cfg.max_completion_length,
                           cfg.temperature, seeds=seeds, max_rows=cfg.max_rows)
    return [Group(*group) for group in zip(examples, prompts, completions)]


def judge(cfg, groups):
    """Give each completion its rewards, by the truth of its own question, and its advantage within its group."""
    for group in groups:
        texts, example = [o.text for o in group.completions], group.example
        group.accuracy = torch.tensor([paid(accuracy_reward, text, example, partial_credit=cfg.partial_credit,
                                            soft_iou=cfg.soft_iou) for text in texts], dtype=torch.float64)
        group.format = torch.tensor([paid(format_reward, text, example) for text in texts], dtype=torch.float64)
        group.rewards = group.accuracy + group.format
        group.advantages = group_advantages(group.rewards).float()


def update(run, stage, step, groups):
    """Learn from the groups: one optimizer step, or --updates_per_rollout of them. Returns sums over tokens.

    pi_old is the first update's own forward pass: the weights are still those that sampled, so rho is exactly 1 there.
    It and the reference are scored once, however many updates follow; "kl" and "clipped" are summed over all of them.
    Without KL, groups whose rewards are all equal are left out: their gradient is exactly zero.
    """
    cfg, sums, scored = run.cfg, Counter(kl=0, clipped=0, tokens=0, logp_gap=0, scored=0), {}
    groups = [group for group in groups if cfg.beta or group.advantages.any()]
    batches = [groups[i:i + cfg.micro_batch] for i in range(0, len(groups), cfg.micro_batch)]
    packs = [run.pack([group.prompt for group in batch], [[o.tokens for o in group.completions] for group in batch])
             for batch in batches]
    run.policy.train()
    for _ in range(cfg.updates_per_rollout):
        for m, (batch, packed) in enumerate(zip(batches, packs)):
            packed = packed.to(run.device)
            logp = token_logps(run.policy, packed, run.bias, cfg.temperature)  # (R, T)
            if m not in scored:
                with torch.no_grad():
                    logp_ref = token_logps(run.reference, packed, run.bias, cfg.temperature) if cfg.beta else None
                scored[m] = logp.detach(), logp_ref
                sampled = torch.cat([o.logps for group in batch for o in group.completions]).to(logp.device)
                at_tokens = logp.detach().flatten()[packed.completion_slots]
                sums["logp_gap"] += (at_tokens - sampled).abs().sum()
                sums["scored"] += len(sampled)
            advantages = torch.cat([group.advantages for group in batch]).to(logp.device)  # (R,)
            loss, token_sums = grpo_loss(logp, *scored[m], advantages, packed.mask, cfg.beta, cfg.epsilon,
                                         cfg.prompts_per_step * cfg.num_generations)
            loss.backward()
            run.optimizer.collect()
            sums.update(token_sums)
        run.optimizer_step(stage, step, cfg.lr)
    return {name: float(value) for name, value in sums.items()}


def statistics(groups, sums):
    """What a step has to say, as {name: (sum, count)}: over ranks both are added up, then divided once."""
    rewards = torch.stack([group.rewards for group in groups])  # (B, G)
    completions = [o for group in groups for o in group.completions]
    tokens = sum(len(o.tokens) for o in completions)
    values = {"reward": rewards, "reward_std": rewards.std(1), "equal_groups": rewards.amax(1) == rewards.amin(1),
              "reward/accuracy": torch.cat([group.accuracy for group in groups]),
              "reward/format": torch.cat([group.format for group in groups]),
              "completion_length": torch.tensor([len(o.tokens) for o in completions]),
              "truncated": torch.tensor([o.truncated for o in completions])}
    for task in {group.example.task for group in groups}:
        values[f"reward/accuracy/{task}"] = torch.cat([g.accuracy for g in groups if g.example.task == task])
    return {**{name: (value.double().sum().item(), value.numel()) for name, value in values.items()},
            "entropy": (sum(o.entropy.sum().item() for o in completions), tokens),
            "logp_gap": (sums["logp_gap"], sums["scored"]),
            "kl": (sums["kl"], sums["tokens"]), "clip_fraction": (sums["clipped"], sums["tokens"])}


def sft_step(run, stage, step):
    """One supervised step on the stage's question-answer pairs; the loss is on the answer and its end token alone."""
    cfg, started = run.cfg, time.perf_counter()
    _, examples = run.batch(stage, step, cfg.sft_batch)
    prompts = run.prompts(examples)
    answers = [run.processor.response_ids(taught(example)) for example in examples]
    num_tokens = sum(gather(sum(map(len, answers))))  # of the whole step, over all ranks
    run.policy.train()
    loss_sum = 0.0
    for i in range(0, len(prompts), cfg.micro_batch):
        packed = run.pack(prompts[i:i + cfg.micro_batch], [[a] for a in answers[i:i + cfg.micro_batch]]).to(run.device)
        loss = sft_loss(token_logps(run.policy, packed, run.bias), packed.mask, num_tokens)
        loss.backward()
        run.optimizer.collect()
        loss_sum += loss.detach() * num_tokens
    run.optimizer_step(stage, step, cfg.sft_lr)
    return {"loss": (loss_sum.item(), sum(map(len, answers)))}, {"update": time.perf_counter() - started}


# ---------------------------------------------------------------------------------------------------------------------
# The curriculum


def train(cfg):
    """The whole run: data, evaluation of the base, stage after stage with its checkpoint and evaluation, pictures."""
    run = begin(cfg)
    if cfg.check:
        from tools.check import check  # needs this file
        return check(run)
    reached, done = run.resume()
    if run.rank == 0:
        run.report.start(run.out, dataclasses.asdict(cfg), run.global_step)
    if not done:  # nothing is done twice: a row of results that is there already is left alone
        run.evaluate(cfg.curriculum[reached - 1].label if reached else "base")
    for stage in cfg.curriculum[reached:]:
        if run.rank == 0:
            write_cards(run, write_aside)  # of the stage before, now that it is evaluated
        done = done if stage.index == reached else 0
        if stage.name == "reject":
            run.examples["reject"] = self_improve(run, stage, done)
        with signals.held():
            train_stage(run, stage, done)
            run.save(run.stage_dir(stage.index), stage.index + 1, 0)
        run.evaluate(stage.label)
    if run.rank == 0:
        write_cards(run, write_aside)
        run.finish()


def begin(cfg):
    """Join the other ranks, read and check all data, say what memory is needed: what can fail before a model loads."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = join_ranks(cfg.timeout_minutes)
    for name, size in (("prompts_per_step", cfg.prompts_per_step), ("sft_batch", cfg.sft_batch)):
        if size % world()[1]:
            raise UserError(f"--{name} {size} is not a multiple of the {world()[1]} ranks")
    examples, tests, questions = load_data(cfg)
    if not Path(cfg.model).exists():
        say(f"--model {cfg.model} is no directory here, so it is looked for on the Hugging Face hub")
    processor = Processor.from_pretrained(cfg.model, cfg.max_pixels)
    examples = {name: refuse_long_prompts(cfg, processor, rows) for name, rows in examples.items()}
    tests, questions = (refuse_long_prompts(cfg, processor, rows) for rows in (tests, questions))
    for sentence in doubts.of_a_run(cfg, examples):
        say(sentence)
    longest = max((processor.prompt_length(e) for rows in (*examples.values(), questions) for e in rows), default=None)
    check_memory(memory_needed(base_config(cfg.model, processor), cfg, world()[1], longest), cfg)
    if questions:
        Judge(cfg.judge_url, cfg.judge_model).probe()  # better now than after all RL stages
    return Run(cfg, device, examples, tests, questions)


def train_stage(run, stage, done):
    """One row of the curriculum, from its step `done` on.

    At a switch of stage everything starts afresh from the policy as it is: the optimizer (no moments, float32 masters
    copied from the weights), the learning rate's schedule (it counts the stage's own steps), the KL reference (the
    policy at this moment, unless --reference base), the order of the data, and --advance_at's window. Only the weights
    and the count of steps go on.
    """
    run.optimizer = run.reference = None  # the last stage's are freed before this stage's are made
    run.optimizer = ShardedAdamW(run.policy.named_parameters(), run.cfg.weight_decay, run.cfg.offload)
    if done:  # resumed within the stage
        run.optimizer.load(run.optimizer_files)
    else:
        run.recent = []
    if stage.forms:
        run.load_reference(stage, resumed=done > 0)
    take_step = grpo_step if stage.forms else sft_step
    run.bar = tqdm(total=stage.steps, initial=done, desc=stage.name, dynamic_ncols=True) \
        if run.rank == 0 and sys.stderr.isatty() else None
    for step in range(done, stage.steps):
        means = run.log(stage, step, *take_step(run, stage, step))
        if advance(run, stage, means) or step + 1 == stage.steps:
            break
        stopping = run.stopping or run.ranks == 1 and signals.arrived()  # several ranks agree in `log`
        if stopping or (step + 1) % run.cfg.save_every == 0:
            run.save_within(stage, step + 1)
        if stopping:
            raise Stopped
    if run.bar is not None:
        run.bar.close()


def advance(run, stage, means, window=doubts.WINDOW):
    """Whether a stage ends early: its mean accuracy reward over `window` steps has reached --advance_at."""
    run.recent = (run.recent + [means.get("reward/accuracy", 0.0)])[-window:]
    mean = sum(run.recent) / len(run.recent)
    reached = bool(run.cfg.advance_at) and len(run.recent) == window and mean >= run.cfg.advance_at
    if reached:
        say(f"{stage.name}: mean accuracy reward {mean:.3f} over the last {window} steps, next stage")
    return reached


def self_improve(run, stage, done):
    """Phase 2: sample answers to the questions, judge them, keep the best; returns the kept as SFT examples."""
    cfg, kept = run.cfg, run.out / f"rejected-{stage.index + 1}.jsonl"
    if done:  # fine-tuning has begun on what was kept
        return kept_examples(kept, run.questions)
    say(f"{stage.name}: sampling {cfg.reject_samples} answers to each of {len(run.questions)} questions")
    count = rejection_sample(
        run.policy, run.processor, run.questions, kept, judge=Judge(cfg.judge_url, cfg.judge_model),
        samples=cfg.reject_samples, threshold=cfg.reject_threshold, max_rows=cfg.max_rows,
        max_completion_length=cfg.max_completion_length, seed=run.seed(stage.index), on_finish=signals.check)
    passes = stage.steps * cfg.sft_batch / max(1, count)
    say(f"{stage.name}: kept {count} of {len(run.questions)} questions, in {kept}; {stage.steps} steps of "
        f"{cfg.sft_batch} are {passes:.3g} passes over them")
    if not count:
        raise RunError(f"{stage.name}: no answer scored above --reject_threshold {cfg.reject_threshold:g}, so there is "
                       "nothing to fine-tune on")
    return kept_examples(kept, run.questions)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    """Config from flags. Every field is a flag of the same name; its comment in the source is the help text."""
    return parse(Config, argv, __doc__.splitlines()[0])


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake, 1 for a run that cannot go on."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what its warnings speak of is checked when a model is loaded
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    with terminal(), signals:
        cfg = None
        try:
            cfg = parse_args(argv)
            train(cfg)
        except (Stopped, Exception) as error:
            leave(*ending(error, begun=cfg is not None and Path(cfg.out, "config.json").exists()))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
