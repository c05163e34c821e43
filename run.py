"""A run on one rank: what it is made of, its directory, its log, its checkpoints. No equation of the method is here.

    RUN/config.json         settings that the run was begun with
    RUN/metrics.jsonl       one line a step
    RUN/results.json        one row an evaluation; RUN/predictions/ROW.jsonl has every answer of it
    RUN/checkpoints/N       to resume from: weights, optimizer and state after N steps; the last --keep of them
    RUN/stages/N-NAME       the end of every stage, a Hugging Face directory
    RUN/rejected-N.jsonl    what rejection sampling kept for stage N

Whatever is written is complete or absent: written aside (.writing-..), synced, renamed.
"""

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import batch_indices
from distributed import RunError, UserError, gather, one_line, say, world
from engine import forbidden_bias, image_features, load_policy, pack
from sample import evaluate, read_jsonl, results_table
from tools.report import Reporter

# What a checkpoint keeps of a Run beside weights and optimizer: attributes, by name.
SAVED = ("global_step", "recent", "skipped", "bad_in_a_row")
# Settings that change time, memory and where numbers go, and nothing else: a resumed run may have others.
HARMLESS = {"resume", "allow_changes", "out", "threads", "timeout_minutes", "save_every", "keep", "sample_every",
            "micro_batch", "max_rows", "eval_rows", "checkpoint_activations", "offload", "check",
            "report_to"}


class Stopped(Exception):
    """SIGTERM arrived and everything worth keeping is saved."""


class Run:
    """The state of one run on one rank. Whatever changes in a run is declared in __init__."""

    def __init__(self, cfg, device, examples=None, tests=(), questions=()):
        self.cfg = cfg                      # currreft.Config
        self.device = device                # of this rank
        self.out = Path(cfg.out)            # the run directory
        self.rank, self.ranks = world()
        self.examples = examples or {}      # {stage name: its training examples}
        self.tests = tests                  # test examples of all splits
        self.questions = questions          # of the reject stage

        self.policy = None                  # the model that is trained; its weights change in place
        self.processor = None               # data.Processor: tokens, pixels
        self.bias = None                    # (V,) -inf on tokens that no completion may hold
        self.reference = None               # frozen model of the KL term; None where beta is 0
        self.optimizer = None               # distributed.ShardedAdamW of the current stage
        self.optimizer_files = []           # shards to resume the stage's optimizer from

        self.global_step = 0                # optimizer steps of all stages                             (SAVED)
        self.recent = []                    # accuracy rewards of the stage's last steps, --advance_at  (SAVED)
        self.skipped = 0                    # steps skipped because their gradient was not finite       (SAVED)
        self.bad_in_a_row = 0               # of them without a good one in between                     (SAVED)
        self.grad_norm = 0.0                # of the last step, before clipping
        self.learning_rate = 0.0            # of the last step

        self.stopping = False               # SIGTERM has arrived on some rank
        self.bar = None                     # progress bar of the stage, where somebody watches
        self.report = Reporter(cfg.report_to)  # on every rank, so that all find it missing; rank 0 starts it
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_):
        self.stopping = True

    def check_stop(self, *_):
        """Raise Stopped if SIGTERM has arrived: for long work that keeps its own progress."""
        if self.stopping:
            raise Stopped

    # -- models -------------------------------------------------------------------------------------------------------

    def load_weights(self, path):
        """Start from, or replace all weights by, the checkpoint at `path`."""
        dtype = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.cfg.dtype]
        self.policy, self.processor = load_policy(path, self.device, dtype, self.cfg.max_pixels)
        self.bias = forbidden_bias(self.policy, self.processor)
        self.policy.model.visual.requires_grad_(not self.cfg.freeze_vision)
        if self.cfg.checkpoint_activations:  # only acts in train mode, which only the update uses
            enable = getattr(self.policy, "activation_checkpointing_enable", None)  # newer name
            (enable or self.policy.gradient_checkpointing_enable)({"use_reentrant": False, "preserve_rng_state": False})

    def load_reference(self, stage, resumed=False):
        """The KL reference of a stage, frozen: the policy at its start, or the base (--reference); none if beta is 0."""
        if not self.cfg.beta:
            return
        if self.cfg.reference == "stage" and not resumed:
            self.policy.engine = None  # its memory and graphs are the policy's own; the next rollout makes them anew
            self.reference = copy.deepcopy(self.policy).eval()
        else:
            path = self.stage_dir(stage.index - 1 if self.cfg.reference == "stage" else -1)
            self.reference = load_policy(path, self.device, self.policy.dtype, self.cfg.max_pixels)[0]
        self.reference.requires_grad_(False)

    # -- batches ------------------------------------------------------------------------------------------------------

    def seed(self, *numbers):
        """A 63-bit seed from (run seed, numbers..): the same on every rank count and after every resume."""
        return seed_from(self.cfg.seed, *numbers)

    def batch(self, stage, step, size):
        """This rank's slice of the global batch of a step: (places in the global batch, examples)."""
        examples = self.examples[stage.name]
        indices = batch_indices(len(examples), size, step, self.seed(stage.index))
        places = range(self.rank * size // self.ranks, (self.rank + 1) * size // self.ranks)
        return list(places), [examples[indices[i]] for i in places]

    def prompts(self, examples):
        """Examples as prompts. A frozen vision tower reads each image here, once for all that is done with it."""
        prompts = [self.processor(example) for example in examples]
        for prompt in prompts:
            if self.cfg.freeze_vision and prompt.pixel_values is not None:
                with torch.no_grad():
                    prompt.features = image_features(
                        self.policy, prompt.pixel_values.to(self.device), prompt.image_grid_thw.to(self.device))
        return prompts

    def pack(self, prompts, completions):
        """engine.pack on this rank's device."""
        return pack(self.policy, prompts, completions).to(self.device)

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
            raise RunError(f"stage {stage.name}, step {step + 1}: gradients were not finite five times in a row. The "
                           f"last good checkpoint is {self.last_checkpoint()}; resume with a lower --lr or a higher "
                           "--beta and --allow_changes.")

    # -- log ----------------------------------------------------------------------------------------------------------

    def log(self, stage, step, stats, seconds):
        """Reduce sums and counts over ranks, divide once, write the step's line. Returns {name: mean}.

        stats: {name: (sum, count)} of this rank. seconds: {"rollout" and "update", or "update": seconds of this rank}.
        """
        reports = gather((stats, seconds, self.stopping))
        self.stopping = any(stopping for _, _, stopping in reports)  # all ranks stop together
        self.global_step += 1
        totals = {}
        for sums, _, _ in reports:
            for name, (value, count) in sums.items():
                a, b = totals.get(name, (0.0, 0))
                totals[name] = a + value, b + count
        means = {name: value / max(count, 1) for name, (value, count) in sorted(totals.items())}
        slowest = {name: max(times[name] for _, times, _ in reports) for name in seconds}
        # tokens sampled in a rollout, or answer tokens trained on in an SFT update
        rollout = "completion_length" in totals
        tokens = totals["completion_length"][0] if rollout else totals["loss"][1]
        row = {"step": self.global_step, "stage": stage.name, "stage_index": stage.index, "stage_step": step + 1,
               **means, "grad_norm": self.grad_norm, "lr": self.learning_rate, "skipped_steps": self.skipped,
               **{f"seconds_{name}": value for name, value in slowest.items()},
               "tokens_per_second": tokens / slowest["rollout" if rollout else "update"]}
        if self.rank == 0:
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(rounded) + "\n")
            self.report(rounded)
            self._show(stage, row)
        return means

    def _show(self, stage, row):
        """The progress bar, or one line a step where nobody watches a terminal."""
        shown = {"reward": "reward", "reward/accuracy": "accuracy", "loss": "loss", "kl": "kl", "entropy": "entropy",
                 "equal_groups": "equal", "truncated": "truncated", "completion_length": "length",
                 "tokens_per_second": "tok/s"}
        text = " ".join(f"{short} {row[name]:.{0 if row[name] >= 100 else 3}f}"
                        for name, short in shown.items() if name in row)
        if self.bar is None:
            seconds = row.get("seconds_rollout", 0) + row["seconds_update"]
            print(f"{stage.name} {row['stage_step']}/{stage.steps} {text} {seconds:.1f} s", flush=True)
        else:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def show_sample(self, step, group):
        """Now and then one decoded completion with its rewards, so that a person sees what is being rewarded."""
        if step % self.cfg.sample_every == 0:
            example, completion = group.example, group.completions[0]
            say(f"--- {one_line(example.problem)}\n    truth {one_line(example.solution)}\n"
                f"    model {one_line(completion.text)}{' (truncated)' if completion.truncated else ''}\n"
                f"    accuracy {group.accuracy[0]:g}  format {group.format[0]:g}  advantage {group.advantages[0]:.2f}")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def stage_dir(self, index):
        """Where the end of a stage is kept; index -1 is the base model."""
        return self.cfg.model if index < 0 else self.out / "stages" / self.cfg.curriculum[index].label

    def last_checkpoint(self):
        """What a sentence calls the checkpoint that a run would be resumed from."""
        found = latest_checkpoint(self.out)
        return found[0] if found else "the base model"

    def save_within(self, stage, done):
        """A checkpoint to resume from after `done` steps of a stage, its optimizer included."""
        self.save(self.out / "checkpoints" / f"{self.global_step:07d}", stage.index, done)

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
                state = {"stage": stage_index, "stage_step": stage_step, **{name: getattr(self, name) for name in SAVED}}
                (aside / "state.json").write_text(json.dumps(state))
            if stage_step:
                torch.save(self.optimizer.state_dict(), aside / f"optimizer-{self.rank}.pt")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk shows as any of them
            problem = f"{path} could not be written ({str(error).splitlines()[0]})"
        if any(problems := gather(problem)):
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise RunError(f"{next(filter(None, problems))}. Make room and continue with --resume; "
                           f"the last complete checkpoint is {self.last_checkpoint()}.")
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
            state = {"stage": 0, "stage_step": 0}
        else:
            path, state = found
            self.load_weights(path)
            for name in SAVED:
                setattr(self, name, state[name])
            self.optimizer_files = sorted(path.glob("optimizer-*.pt"))
        if len(set(gather((state["stage"], state["stage_step"])))) > 1:
            raise UserError(f"--out {self.out} must be a directory that all nodes share; theirs differ")
        if state["stage"] > len(self.cfg.curriculum):
            raise UserError(f"--out {self.out} has already finished more stages than --stages names")
        if self.rank == 0 and (self.out / "metrics.jsonl").exists():  # drop what was logged after the checkpoint
            rows = read_jsonl(self.out / "metrics.jsonl")
            write_aside(self.out / "metrics.jsonl",
                        "".join(json.dumps(r) + "\n" for r in rows if r["step"] <= self.global_step))
        return state["stage"], state["stage_step"]

    # -- results ------------------------------------------------------------------------------------------------------

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


    def finish(self):
        """Draw the pictures; print the table, and where everything lies."""
        from tools.pictures import curves, sheet  # drawing is needed once, at the end
        curves([self.out], self.out / "curves.png", "reward" if any(s.forms for s in self.cfg.curriculum) else "loss")
        if self.tests:
            last = json.loads((self.out / "results.json").read_text())["rows"][-1]["name"]
            rows = read_jsonl(self.out / "predictions" / f"{last}.jsonl")
            sheet(random.Random(0).sample(rows, min(24, len(rows))), self.out / "sheet.png")
            print(results_table([self.out]))
        pictures = " ".join(map(str, sorted(self.out.glob("*.png"))))
        print(f"model    {self.stage_dir(len(self.cfg.curriculum) - 1)}\npictures {pictures}\n"
              f"metrics  {self.out / 'metrics.jsonl'}")


def seed_from(*numbers):
    """A 63-bit seed from any numbers, alike on every machine: seed_from(0, 1) != seed_from(1, 0)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def learning_rate(cfg, stage, step, base):
    """Learning rate of a stage's step: linear warm-up, then constant or half a cosine down to zero."""
    if step < cfg.warmup_steps:
        return base * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, stage.steps - cfg.warmup_steps)
    return base * (0.5 + 0.5 * math.cos(math.pi * done)) if cfg.lr_schedule == "cosine" else base


def latest_checkpoint(out):
    """(path, state) of the furthest complete checkpoint of a run, or None."""
    found = [(path.parent, json.loads(path.read_text())) for folder in ("checkpoints", "stages")
             for path in Path(out).glob(f"{folder}/[0-9]*/state.json")]
    return max(found, key=lambda item: (item[1]["stage"], item[1]["stage_step"]), default=None)


def prepare_out(cfg):
    """Create the run directory, or check that the one to resume was begun with the same settings."""
    out = Path(cfg.out)
    settings = json.loads(json.dumps(dataclasses.asdict(cfg)))
    if (out / "config.json").exists():
        if not cfg.resume:
            raise UserError(f"--out {out} holds a run already; continue it with --resume or name another directory")
        before = json.loads((out / "config.json").read_text())
        changed = [f"--{name} was {before.get(name)!r}, is {settings[name]!r}" for name in settings
                   if name not in HARMLESS and before.get(name) != settings[name]]
        if changed and not cfg.allow_changes:
            raise UserError("these settings differ from those the run began with:\n  " + "\n  ".join(changed)
                            + "\nResume with the old ones, or add --allow_changes")
    elif cfg.resume:
        raise UserError(f"--out {out} holds no run to resume")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists and is not empty; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    write_aside(out / "config.json", json.dumps(settings, indent=1))


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
