"""A run on one rank: what it is made of, its directory, its log, its checkpoints. No equation of the method is here.

    RUN/config.json         settings, data and base model that the run was begun with (tools/identity.py)
    RUN/metrics.jsonl       one line a step
    RUN/samples.jsonl       every --sample_every steps one question with all its completions and rewards
    RUN/results.json        one row an evaluation; RUN/predictions/ROW.jsonl has every answer of it
    RUN/checkpoints/N       to resume from: weights, optimizer, log and state after N steps; the last --keep of them
    RUN/stages/N-NAME       the end of every stage, a Hugging Face directory
    RUN/rejected-N.jsonl    what rejection sampling kept for stage N

Whatever is written is complete or absent: written aside (.writing-..), synced, renamed. A checkpoint's state.json has a
digest of each of its files, and is believed only if all of them fit; else the one before is taken. What a run wrote
after the checkpoint that it continues from is taken back: it will be written again.
"""

import copy
import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from data import batch_indices
from distributed import RunError, UserError, gather, one_line, say, world
from engine import forbidden_bias, image_features, load_policy, pack
from sample import evaluate, read_jsonl, results_table
from tools.accept import named, not_finite
from tools.checkpoints import check_stages, latest_checkpoint, take_back, whole_checkpoint
from tools.doubts import Watch
from tools.endings import signals
from tools.files import digest, read_record, sync, write_aside, write_record
from tools.identity import check_out, made_of
from tools.report import Reporter

# What a checkpoint keeps of a Run beside weights and optimizer: attributes, by name.
SAVED = ("global_step", "recent", "skipped", "bad_in_a_row", "results")


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
        self.results = []                   # rows of results.json: one an evaluation                   (SAVED)
        self.grad_norm = 0.0                # of the last step, before clipping
        self.learning_rate = 0.0            # of the last step

        self.stopping = False               # a signal has arrived on some rank
        self.bar = None                     # progress bar of the stage, where somebody watches
        self.watch = Watch()                # says why nothing seems to be learned
        self.report = Reporter(cfg.report_to)  # on every rank, so that all find it missing; rank 0 starts it

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
        """The KL reference of a stage, frozen: the policy at its start or the base (--reference); none if beta is 0."""
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
            say(f"{stage.name}, step {step + 1}: the gradient is not finite, so the step is skipped "
                f"({self.skipped} so far)")
        self.optimizer.zero_grad()
        if self.bad_in_a_row >= 5:
            raise RunError(f"stage {stage.name}, step {step + 1}: gradients were not finite five times in a row. "
                           f"{self.way_back()}")

    # -- log ----------------------------------------------------------------------------------------------------------

    def log(self, stage, step, stats, seconds):
        """Reduce sums and counts over ranks, divide once, write the step's line. Returns {name: mean}.

        stats: {name: (sum, count)} of this rank. seconds: {"rollout" and "update", or "update": seconds of this rank}.
        """
        reports = gather((stats, seconds, signals.arrived()))
        self.stopping = any(number for _, _, number in reports)  # all ranks stop together
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
            rounded = {k: rounded_or_none(v) if isinstance(v, float) else v for k, v in row.items()}
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(rounded) + "\n")
            self.report(rounded)
            self._show(stage, row)
            self.watch(self.cfg, row)
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
        """Now and then one decoded completion with its rewards, so that a person sees what is being rewarded.

        All of its group go to samples.jsonl.
        """
        if step % self.cfg.sample_every == 0:
            example, completion = group.example, group.completions[0]
            if self.rank == 0:
                worth = zip(group.completions, *(
                    values.tolist() for values in (group.accuracy, group.format, group.advantages)))
                row = {"step": self.global_step + 1, "where": example.where, "form": example.form,
                       "problem": example.problem, "solution": example.solution, "images": example.images,
                       "completions": [{"text": o.text, "truncated": o.truncated, "accuracy": accuracy,
                                        "format": form, "advantage": round(advantage, 4)}
                                       for o, accuracy, form, advantage in worth]}
                with open(self.out / "samples.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
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

    def way_back(self):
        """What to do when numbers have run away."""
        return (f"The last good checkpoint is {self.last_checkpoint()}; resume with a lower --lr or a higher --beta "
                "and --allow_changes.")

    def save_within(self, stage, done):
        """A checkpoint to resume from after `done` steps of a stage, its optimizer included."""
        self.save(self.out / "checkpoints" / f"{self.global_step:07d}", stage.index, done)

    def save(self, path, stage_index, stage_step):
        """Write a Hugging Face directory plus what resuming needs: complete or absent, whatever happens meanwhile."""
        path, aside = Path(path), Path(path).with_name(f".writing-{Path(path).name}")
        if bad := not_finite(self.policy):  # the same on every rank
            raise RunError(f"after step {self.global_step} weights are not finite ({named(bad)}), so they are not "
                           f"saved. {self.way_back()}")
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        gather(None)  # the folder exists for everybody
        problem, files = None, {}
        try:
            files = self.write_share(aside, stage_step)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk shows as any of them
            problem = f"{path} could not be written ({str(error).splitlines()[0]})"
        shares = gather((problem, files))
        if any(problem for problem, _ in shares):
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise RunError(f"{next(problem for problem, _ in shares if problem)}. Make room and continue with "
                           f"--resume; the last complete checkpoint is {self.last_checkpoint()}.")
        if self.rank == 0:
            write_record(aside / "state.json", {
                "stage": stage_index, "stage_step": stage_step, "stages": self.cfg.stages,
                "files": {name: value for _, share in shares for name, value in share.items()},
                "rests_on": self.rests_on(stage_index) if stage_step else {},
                **{name: getattr(self, name) for name in SAVED}})
            sync(aside)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            sync(path.parent)
            for old in sorted((self.out / "checkpoints").glob("[0-9]*"))[:-self.cfg.keep]:
                shutil.rmtree(old)
        gather(None)

    def write_share(self, folder, with_optimizer):
        """Write this rank's files of a checkpoint; returns {name: digest} of them."""
        mine = [folder / f"optimizer-{self.rank}.pt"] if with_optimizer else []
        if mine:
            torch.save(self.optimizer.state_dict(), mine[0])
        if self.rank == 0:
            self.policy.save_pretrained(folder)
            self.processor.save_pretrained(folder)
            shutil.copyfile(self.out / "metrics.jsonl", folder / "metrics.jsonl")
            mine += [file for file in folder.iterdir() if not file.name.startswith("optimizer-")]
        for file in mine:
            file.chmod(0o644)  # safetensors lets nobody else read
            sync(file)
        return {file.name: digest(file) for file in mine}

    def rests_on(self, stage_index):
        """{file of the run: digest} of what a checkpoint within a stage needs besides: kept answers, reference."""
        files = {file.name: digest(file) for file in self.out.glob(f"rejected-{stage_index + 1}.jsonl")}
        if self.reference is not None and self.cfg.reference == "stage" and stage_index:
            folder = self.stage_dir(stage_index - 1)
            files |= {f"stages/{folder.name}/{name}": value
                      for name, value in read_record(folder / "state.json")["files"].items()}
        return files

    # -- begin or continue --------------------------------------------------------------------------------------------

    def resume(self):
        """Begin the run directory or continue from its furthest whole checkpoint: (stage index, its steps done).

        UserError if --out cannot be begun or continued, if anything but HARMLESS settings is not as it was, or if the
        base model cannot be trained. Nothing is written before all of that is known.
        """
        record, changed, found = None, [], None
        if self.rank == 0:
            examples = [e for rows in (*self.examples.values(), self.tests, self.questions) for e in rows]
            record, changed = check_out(self.cfg, made_of(self.cfg, examples))
            found = whole_checkpoint(self.out)
        found = gather(found)[0]
        path, state = found or (self.cfg.model, {"stage": 0, "stage_step": 0, "stages": [], "files": {}})
        if not all(gather(not found or path.exists())):
            raise UserError(f"--out {self.out} must be a directory that all nodes share; {path} is not on all of them")
        check_stages(self.cfg, state)
        self.load_weights(path)
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
        self.optimizer_files = [path / name for name in state["files"] if name.startswith("optimizer-")]
        if self.rank == 0:
            take_back(self, path, state, changed)
            if changed:
                record["changes"].append({"after_step": self.global_step, "changed": changed})
            write_record(self.out / "config.json", record)
        self.results = gather(self.results)[0]
        return state["stage"], state["stage_step"]

    # -- results ------------------------------------------------------------------------------------------------------

    def evaluate(self, name):
        """Greedy accuracy on every test split; adds a row to results.json unless it is there already."""
        if not self.tests or name in [row["name"] for row in self.results]:
            return
        splits, predictions = evaluate(
            self.policy, self.processor, self.tests, max_completion_length=self.cfg.max_completion_length,
            max_rows=self.cfg.eval_rows, on_finish=signals.check, description=f"evaluate {name}")
        row = {"name": name, "splits": splits}
        if self.rank == 0:
            file = self.out / "predictions" / f"{name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            write_aside(file, "".join(json.dumps(p) + "\n" for p in predictions))
            row["predictions"] = digest(file)
            write_record(self.out / "results.json", {"rows": self.results + [row]})
            self.report.results(self.global_step, splits)
        self.results = self.results + gather(row)[:1]

    def finish(self):
        """Draw the pictures; print the table, and where everything lies."""
        from tools.pictures import curves, sheet  # drawing is needed once, at the end
        curves([self.out], self.out / "curves.png", "reward" if any(s.forms for s in self.cfg.curriculum) else "loss")
        if self.results:
            rows = read_jsonl(self.out / "predictions" / f"{self.results[-1]['name']}.jsonl")
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


def rounded_or_none(value):
    """Six digits of a number; None where it is not finite, which JSON has no word for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
