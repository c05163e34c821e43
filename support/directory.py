"""A run's directory: what the run is made of, its checkpoints, and where it goes on. Knows no equation.

    RUN/config.json         settings, data and base model that the run was begun with
    RUN/metrics.jsonl       one line a step; samples.jsonl: now and then a question with its completions
    RUN/results.json        one row an evaluation; RUN/predictions/ROW.jsonl has every answer of it
    RUN/checkpoints/N       to resume from: weights, optimizer, log and state after N steps; the last two of them
    RUN/stages/N-NAME       the end of every stage, a Hugging Face directory
    RUN/rejected-N.jsonl    what rejection sampling kept for stage N

Whatever is written is complete or absent: written aside (.writing-..), synced, renamed. A checkpoint's
state.json has a digest of each of its files, and is believed only if all of them fit; else the one before is
taken. What a run wrote after the checkpoint that it continues from is taken back: it will be written again.

A run is made of its settings, the bytes of its data, images and base model, and the code: told by name where
they differ. Paths are no content: a copy of the same bytes elsewhere is no change.
"""

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from support.base import checkpoint_folder, first_line
from support.files import (
    Digested, clear_leftovers, damage, digest, joined, read_jsonl, read_record, sync, write_aside, write_record)
from support.ranks import gather, world
from support.words import RunError, UserError, say

KEPT_CHECKPOINTS = 2  # within a stage; the end of every stage is kept in any case
CODE = Path(__file__).resolve().parent.parent
# Settings that change time, memory, places and what is shown: a resumed run may have others.
HARMLESS = {
    "model", "data", "image_root", "questions", "out", "resume", "allow_changes", "timeout_minutes",
    "save_every", "micro_batch", "max_rows", "checkpoint_activations", "offload", "report_to", "judge_url",
    "judge_model"}


class RunDirectory:
    """RUN on disk. `stages` as they are written ("binary:600"), `labels` of their ends ("1-binary")."""

    def __init__(self, out, stages, labels):
        self.out, self.stages, self.labels = Path(out), list(stages), list(labels)
        self.lock = None  # an open file; the kernel gives a lock back at any death

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.lock:
            self.lock.close()

    def _take(self):
        """Keep every other process out of the directory, from now on. Rank 0 alone."""
        self.lock = self.lock or open(self.out / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: another process runs in it; wait for its end, or name another "
                            "directory") from None
        except OSError as error:  # a file system without locks, as some Lustre and NFS are mounted
            say(f"--out {self.out} cannot be locked ({error}): start no second run in it")

    def stage_end(self, index):
        """Where the end of a stage is kept."""
        return self.out / "stages" / self.labels[index]

    def checkpoint(self, global_step):
        """Where a checkpoint within a stage is kept."""
        return self.out / "checkpoints" / f"{global_step:07d}"

    def weights_before(self, index):
        """A name of the weights that a stage begins with: digests, of the base's or the last stage's end."""
        if index:
            files = read_record(self.stage_end(index - 1) / "state.json")["files"]
        else:
            files = read_record(self.out / "config.json")["made_of"]["model"]
        return {name: value for name, value in files.items() if not name.endswith(".jsonl")}

    def last_checkpoint(self):
        """What a sentence calls the checkpoint that a run would be resumed from."""
        return next((path for path, _ in self.checkpoints()[0]), "the base model")

    def way_back(self):
        """What to do when numbers have run away."""
        return (f"The last good checkpoint is {self.last_checkpoint()}; resume with a lower --lr or a higher "
                "--beta and --allow_changes.")

    # ---- Write a checkpoint ----

    def save(self, path, state, policy, processor, optimizer=None, rests_on=()):
        """Write a Hugging Face directory plus what resuming needs: complete or absent, whatever happens.

        state: a dict for JSON; optimizer: within a stage; rests_on: files of the run that resuming from here
        would read. All ranks call it together; RunError on all of them if any could not write its share.
        Says how long it took, which is minutes for the 53 GB of a 3B model.
        """
        started = time.monotonic()
        aside = path.with_name(f".writing-{path.name}")
        if world()[0] == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        gather(None)  # the folder exists for everybody
        problem, files = None, {}
        try:
            files = self._write_share(aside, policy, processor, optimizer)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk shows as any of them
            problem = f"{path} could not be written ({first_line(error.__context__ or error)})"
        shares = gather((problem, files))
        if problems := [problem for problem, _ in shares if problem]:
            if world()[0] == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise RunError(f"{problems[0]}. Make room and continue with --resume; the last complete checkpoint is "
                           f"{self.last_checkpoint()}.")
        if world()[0] == 0:
            write_record(aside / "state.json", {
                **state, "stages": self.stages, "rests_on": self._digests(rests_on),
                "files": {name: value for _, share in shares for name, value in share.items()}})
            sync(aside)
            if path.exists():
                shutil.rmtree(path)
            aside.rename(path)
            sync(path.parent)
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:  # `begin` has removed what was later
                shutil.rmtree(old)
            say(f"saved {path} in {time.monotonic() - started:.1f} s")
        gather(None)

    def _checkpoints(self):
        """Directories that this program named checkpoints, oldest first."""
        return sorted(path for path in (self.out / "checkpoints").glob("*/") if re.fullmatch(r"\d{7}", path.name))

    def _digests(self, paths):
        """{path below the run: digest} of files, and of all files of checkpoints."""
        found = {}
        for path in paths:
            name = str(path.relative_to(self.out))
            files = read_record(path / "state.json")["files"] if path.is_dir() else None
            found |= {f"{name}/{file}": value for file, value in files.items()} if files else {name: digest(path)}
        return found

    def _write_share(self, folder, policy, processor, optimizer):
        """Write this rank's files of a checkpoint; returns {name: digest} of them."""
        rank, mine, found = world()[0], [], {}
        if optimizer:  # nearly all bytes of a checkpoint
            with Digested(folder / f"optimizer-{rank}.pt") as file:
                torch.save(optimizer.state_dict(), file)
            sync(file.name)
            found = {f"optimizer-{rank}.pt": joined(file.blocks)}
        if rank == 0:
            policy.save_pretrained(folder)
            processor.save_pretrained(folder)
            shutil.copyfile(self.out / "metrics.jsonl", folder / "metrics.jsonl")
            mine = [file for file in folder.iterdir() if not file.name.startswith("optimizer-")]
        for file in mine:
            file.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read
            sync(file)
        return found | {file.name: digest(file) for file in mine}

    # ---- Find where to go on ----

    def checkpoints(self):
        """([(path, state)] whose state.json can be read, the furthest first; [what is wrong with others])."""
        found, faults = [], []
        for folder in ("checkpoints", "stages"):
            for path in self.out.glob(f"{folder}/[0-9]*/"):
                try:
                    found.append((path, read_record(path / "state.json")))
                except UserError as error:
                    faults.append(str(error))
        return sorted(found, key=lambda item: (item[1]["stage"], item[1]["stage_step"]), reverse=True), faults

    def whole_checkpoint(self):
        """(path, state) of the furthest checkpoint that is whole, with all that it rests on, or None."""
        found, faults = self.checkpoints()
        for sentence in faults:
            say(f"{sentence}; that checkpoint is left out")
        for path, state in found:
            problem = damage(path, state["files"]) or damage(self.out, state["rests_on"])
            if not problem:
                return path, state
            say(f"{path} is damaged ({problem}); the checkpoint before it is taken")
        if found or faults:
            say(f"no checkpoint of {self.out} is whole: the run starts again from the base model")
        return None

    def find(self, settings, made_of, base):
        """(path, state, record, changed): where the run begins or goes on, for all ranks. Writes nothing.

        settings: {field: value} of Config; made_of: see `made_of`; base: path of the base model. UserError if
        --out cannot be begun or continued, or if something has changed and --allow_changes is not given.
        """
        answer = None
        if world()[0] == 0:
            if (self.out / "config.json").exists():
                self._take()
            record, changed = self._compare(settings, made_of)
            path, state = self.whole_checkpoint() or (base, {"stage": 0, "stage_step": 0, "stages": [], "files": {}})
            self._check_stages(state)
            answer = path, state, record, changed
        path, state, record, changed = gather(answer)[0]
        if not all(gather(not state["files"] or Path(path).exists())):
            raise UserError(f"--out {self.out} must be a directory that all nodes share; {path} is not on all of them")
        return path, state, record, changed

    def _compare(self, settings, made_of):
        """The record for config.json, and sentences on what in it has changed since the run was begun."""
        out, file = self.out, self.out / "config.json"
        record = json.loads(json.dumps({**settings, "made_of": made_of, "changes": []}))
        there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "read-only" if there.is_dir() else "a file"
            raise UserError(f"--out {out} cannot be a directory: {there} is {what}")
        if not file.exists():
            there = [path.name for path in out.iterdir()] if out.exists() else []
            if any(not name.startswith((".writing-", ".lock")) for name in there):  # which a killed start may leave
                raise UserError(f"--out {out} exists and is not empty, and has no config.json of a run; name another "
                                "directory")
            if settings["resume"]:
                raise UserError(f"--out {out} holds no run to resume; begin one without --resume")
            return record, []
        if not settings["resume"]:
            raise UserError(f"--out {out} holds a run already; continue it with --resume or name another directory")
        try:
            before = read_record(file)
            record["changes"], changed = before["changes"], differences(before, record)
        except UserError as error:
            changed = [str(error)]
        if changed and not settings["allow_changes"]:
            raise UserError("\n  ".join(["this is not what the run was begun with:", *changed]) + "\nResume with what "
                            "it had, or accept the changes with --allow_changes; they are written down. Or begin "
                            f"anew: name another --out, or remove {out}")
        for sentence in changed:
            say(f"accepted: {sentence}")
        return record, changed

    def _check_stages(self, state):
        """UserError unless --stages has the finished stages as they were, and room for the one under way."""
        was, now, n = list(state["stages"]), self.stages, state["stage"]
        if was[:n] != now[:n]:
            raise UserError(f"--out {self.out}: finished as {' '.join(was[:n])}, and --stages begins with "
                            f"{' '.join(now[:n]) or 'nothing'}. Leave finished stages as they were; what is to be "
                            "trained besides is a stage of its own after them")
        name, _, steps = (now[n] if n < len(now) else ":0").partition(":")
        if state["stage_step"] and (name != was[n].partition(":")[0] or int(steps) < state["stage_step"]):
            raise UserError(f"--out {self.out}: stage {n + 1} has taken {state['stage_step']} steps as {was[n]}, "
                            f"and --stages has {now[n] if n < len(now) else 'nothing'} in its place")

    # ---- Go on ----

    def begin(self, path, state, record, changed):
        """Make the directory what it was at a checkpoint: what is later will be written again. Rank 0 alone.

        Returns the rows of results.json: the checkpoint's, and that of its own evaluation if it was made.
        """
        step, fresh = state.get("global_step", 0), not self.lock
        self.out.mkdir(parents=True, exist_ok=True)
        self._take()
        if fresh and (self.out / "config.json").exists():  # while this one loaded its weights
            raise UserError(f"--out {self.out}: another run has begun in it; name another directory")
        clear_leftovers(self.out)
        for damaged in [path for path in self._checkpoints() if int(path.name) > step]:
            shutil.rmtree(damaged)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        if step:
            write_aside(self.out / "metrics.jsonl", (Path(path) / "metrics.jsonl").read_text("utf-8"))
        samples = self.out / "samples.jsonl"
        if samples.exists():
            rows = [row for row in read_jsonl(samples) if row.get("step", step + 1) <= step]
            write_aside(samples, "".join(json.dumps(row) + "\n" for row in rows))
        finished = state["stage"] + (not changed or state["stage_step"] > 0)  # or sampled by what is still so
        for file in self.out.glob("rejected-*"):
            name = re.match(r"rejected-(\d+)\.jsonl", file.name)
            if name and int(name[1]) > finished:
                file.unlink()
        rows = state.get("results", [])
        if (self.out / "results.json").exists() and not state["stage_step"]:
            own = self.labels[state["stage"] - 1] if state["stage"] else "base"
            try:
                rows = rows + [row for row in read_record(self.out / "results.json")["rows"] if row["name"] == own]
            except UserError as error:
                say(f"{error}; what it said since the checkpoint is found out again")
        if changed:
            record["changes"].append({"after_step": step, "changed": changed})
        write_record(self.out / "config.json", record)  # first: without it the directory is a stranger's
        write_record(self.out / "results.json", {"rows": rows})
        return rows

    def write_results(self, rows, predictions):
        """results.json, and the answers that its last row was counted from. Rank 0 alone."""
        file = self.out / "predictions" / f"{rows[-1]['name']}.jsonl"
        file.parent.mkdir(exist_ok=True)
        write_aside(file, "".join(json.dumps(row) + "\n" for row in predictions))
        write_record(self.out / "results.json", {"rows": rows})


UMASK = os.umask(0)
os.umask(UMASK)


# ---- What a run is made of ----

def made_of(cfg, examples):
    """{"data": {file: digest}, "images": .., "model": .., "code": ..} of all that a run uses.

    Files and images are named relative to --data and --image_root where they lie in them.
    """
    files = {example.where.rpartition(":")[0] for example in examples}
    images = {image for example in examples for image in example.images}
    return {"data": digests(files, cfg.data), "images": digests(images, cfg.image_root or cfg.data),
            "model": model_digest(cfg.model), "code": code_digest()}


def digests(files, folder):
    """{name: digest} of files; of those elsewhere that have one name, all their digests."""
    files, found = list(files), {}
    with ThreadPoolExecutor(8) as pool:
        for file, value in zip(files, pool.map(digest, files)):
            found.setdefault(shown_as(file, folder), []).append(value)
    return {name: " ".join(sorted(values)) for name, values in sorted(found.items())}


def shown_as(file, folder):
    """The path of a file relative to `folder` where it lies in it, else its name."""
    relative = os.path.relpath(file, folder or ".")
    return os.path.basename(file) if relative.split(os.sep)[0] == ".." else relative


def model_digest(path):
    """{file: digest} of a model directory, or {"revision": commit} of a hub name."""
    folder = checkpoint_folder(path)
    if not Path(path).is_dir():
        return {"revision": folder.name}
    return {file.name: digest(file) for file in sorted(folder.iterdir())
            if file.suffix in (".json", ".jinja", ".txt", ".safetensors")}


def code_digest():
    """{file: digest of its code, comments aside} of currreft.py and all of this project that it imports; versions."""
    found = {f"{library.__name__} {library.__version__}": "" for library in (torch, transformers)}
    todo = ["currreft.py"]
    for name in todo:  # which grows meanwhile
        found[name], files = code_of((CODE / name).read_bytes())
        todo += sorted(file for file in files - {*todo} if (CODE / file).exists())
    return found


@lru_cache(None)
def code_of(source):
    """(digest of a program without its comments, names that files of what it imports would have)."""
    tree, files = ast.parse(source), set()
    for node in ast.walk(tree):
        modules = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{name}" for name in modules)]
        files |= {f"{module.replace('.', '/')}.py" for module in modules}
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16], files


def differences(before, now):
    """Sentences on how two records differ; a record is settings and "made_of"."""
    found = [f"--{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items()
             if name not in (*HARMLESS, "made_of", "changes") and before.get(name) != value]
    for part, files in now["made_of"].items():
        was = before["made_of"].get(part, {})
        changed = [name for name in sorted(was | files) if was.get(name) != files.get(name)]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            words = [f"{name} {'is new' if name not in was else 'is gone' if name not in files else 'has changed'}"
                     for name in changed[:3]]
            found.append(f"{part}: {', '.join(words)}{more}")
    return found
