"""What a run is made of: written down in RUN/config.json when it is begun, compared at every start, and said by name.

    settings     every field of Config
    made_of      data    of every file: rows that are used, digest
                 images  their number, and one digest of all paths, sizes and times of change
                 model   of every file: digest; of one above 16 MiB a sample of it; of a hub name its revision
    changes      what --allow_changes has accepted since, and after which step

A sample is the file's size, its first MiB (of weights: names, types and shapes) and 64 more MiB spread over it. Training
changes every part of a model, so another model is found in a second; a single flipped bit of 7 GB may not be.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from data import checkpoint_folder
from distributed import UserError
from tools.files import digest, read_record

# Settings that change time, memory and where numbers go, and nothing else: a resumed run may have others.
HARMLESS = {"resume", "allow_changes", "out", "threads", "timeout_minutes", "save_every", "keep", "sample_every",
            "micro_batch", "max_rows", "eval_rows", "checkpoint_activations", "offload", "check", "report_to",
            "judge_url", "judge_model"}  # a judge that had to be corrected


def made_of(cfg, examples):
    """{"data": {file: {"rows", "sha256"}}, "images": {"files", "sha256"}, "model": {file: digest}} of all Examples used."""
    lines = {}
    for example in examples:
        file, _, line = example.where.rpartition(":")
        lines.setdefault(file, set()).add(line)
    files = {shown(file, cfg.data): {"rows": len(rows), "sha256": digest(file)} for file, rows in sorted(lines.items())}
    return {"data": files, "images": image_digest(cfg, {path for example in examples for path in example.images}),
            "model": model_digest(cfg.model)}


def shown(file, folder):
    """The path of a file as it is told: relative to `folder` where it lies in it."""
    relative = os.path.relpath(file, folder or ".")
    return str(file) if relative.startswith("..") else relative


def image_digest(cfg, paths):
    """{"files": n, "sha256": of all paths, sizes and times}: no pixel is read."""
    total = hashlib.sha256()
    for path in sorted(paths):
        stat = os.stat(path)
        total.update(f"{shown(path, cfg.image_root or cfg.data)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {"files": len(paths), "sha256": total.hexdigest()}


def model_digest(path):
    """{file: digest} of a model directory, or {"revision": commit} of a hub name."""
    folder = checkpoint_folder(path)
    if not Path(path).is_dir():
        return {"revision": folder.name}
    return {file.name: sample(file) for file in sorted(folder.iterdir())
            if file.suffix in (".json", ".jinja", ".txt", ".safetensors")}


def sample(path, piece=2**20, pieces=64):
    """A digest of a file of any size that reads 65 MiB at most."""
    size = os.path.getsize(path)
    if size <= 2**24:
        return digest(path)
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(pieces + 1):
            file.seek(i * (size - piece) // pieces)
            total.update(file.read(piece))
    return total.hexdigest()


def differences(before, now, model=""):
    """Sentences on how two records differ; a record is settings and "made_of"."""
    found = [f"--{name} was {before.get(name)!r}, is {value!r}" for name, value in now.items()
             if name not in (*HARMLESS, "made_of", "changes") and before.get(name) != value]
    if not (was := before.get("made_of")) or not (made := now.get("made_of")):
        return found
    for name in sorted(was["data"] | made["data"]):
        old, new = was["data"].get(name), made["data"].get(name)
        if old != new:
            found.append(f"{name} is new, with {new['rows']} rows" if not old else
                         f"{name}, {old['rows']} rows, is not used any more" if not new else
                         f"{name} had {old['rows']} rows, has {new['rows']}" if old["rows"] != new["rows"] else
                         f"{name} has changed, in its {new['rows']} rows")
    if was["images"] != made["images"]:
        found.append(f"images have changed: there were {was['images']['files']}, there are {made['images']['files']}, "
                     "and paths, sizes or times differ")
    if was["model"] != made["model"]:
        files = [name for name in sorted(was["model"] | made["model"]) if was["model"].get(name) != made["model"].get(name)]
        found.append(f"the base model in {model} has changed ({', '.join(files)})")
    return found


def check_out(cfg, made=None):
    """The record for RUN/config.json, and what in it has changed; UserError unless --out can be begun or continued.

    made: `made_of` the run; without it settings alone are compared. Writes nothing.
    """
    out, file = Path(cfg.out), Path(cfg.out) / "config.json"
    record = json.loads(json.dumps({**dataclasses.asdict(cfg), "made_of": made, "changes": []}))
    if blocked := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise UserError(f"--out {out} cannot be a directory: {blocked} is a file")
    if not file.exists():
        there = [path.name for path in out.iterdir()] if out.exists() else []
        if any(not name.startswith(".writing-") for name in there):  # which a start that was killed may leave
            raise UserError(f"--out {out} exists and is not empty, and has no config.json of a run; name another directory")
        if cfg.resume and not there:
            raise UserError(f"--out {out} holds no run to resume; begin one without --resume")
        return record, []
    if not cfg.resume:
        raise UserError(f"--out {out} holds a run already; continue it with --resume or name another directory")
    try:
        before = read_record(file)
        record["changes"], changed = before["changes"], differences(before, record, cfg.model)
    except UserError as error:
        changed = [str(error)]
    if changed and not cfg.allow_changes:
        raise UserError("this is not what the run was begun with:\n  " + "\n  ".join(changed)
                        + "\nResume with what it had, or accept the changes with --allow_changes; they are written down")
    return record, changed
