"""Which checkpoint a run continues from, and what of its directory is taken back to it.

A checkpoint is believed only if its state.json and every file that it names have the digests they were written with. One
that is not is named, and the one before it is taken; the last of all is the base model.
"""

import json
import math
from pathlib import Path

from distributed import UserError, say
from tools.files import clear_leftovers, fault, read_record, write_aside, write_record


def checkpoints(out):
    """([(path, state)] of a run's checkpoints whose state.json can be read, the furthest first; [what is said of others])."""
    found, faults = [], []
    for path in (path for folder in ("checkpoints", "stages") for path in Path(out).glob(f"{folder}/[0-9]*")):
        try:
            found.append((path, read_record(path / "state.json")))
        except UserError as error:
            faults.append(str(error))
    return sorted(found, key=lambda item: (item[1]["stage"], item[1]["stage_step"]), reverse=True), faults


def latest_checkpoint(out):
    """(path, state) of the furthest checkpoint, or None; its files are not looked at."""
    return next(iter(checkpoints(out)[0]), None)


def whole_checkpoint(out):
    """(path, state) of the furthest checkpoint that is whole, and all that it rests on, or None. Says which are not."""
    found, faults = checkpoints(out)
    for sentence in faults:
        say(f"{sentence}; that checkpoint is left out")
    for path, state in found:
        problem = fault(path, state["files"]) or fault(out, state["rests_on"])
        if not problem:
            return path, state
        say(f"{path} is damaged ({problem}); the checkpoint before it is taken")
    if found or faults:
        say(f"no checkpoint of {out} is whole: the run starts again from the base model")
    return None


def check_stages(cfg, state):
    """UserError unless --stages has the finished stages as they were trained, and room for the one that is under way."""
    was, now, n = list(state["stages"]), list(cfg.stages), state["stage"]
    for i in range(n):
        if was[i] != (now[i] if i < len(now) else ""):
            raise UserError(f"--out {cfg.out}: stage {i + 1} is finished as {was[i]}, and --stages has "
                            f"{now[i] if i < len(now) else 'nothing'} in its place. Leave it as it was; what is to be "
                            "trained besides is a stage of its own after the finished ones")
    if state["stage_step"]:
        stage = cfg.curriculum[n] if n < len(now) else None
        if not stage or stage.name != was[n].split(":")[0] or stage.steps < state["stage_step"]:
            raise UserError(f"--out {cfg.out}: stage {n + 1} has taken {state['stage_step']} steps as {was[n]}, and "
                            f"--stages has {now[n] if stage else 'nothing'} in its place")


def take_back(run, path, state, changed):
    """Make the run directory what it was at a checkpoint: what is later will be written again. Rank 0 alone.

    changed: whether settings, data or base are others from here on, so that answers sampled for phase 2 are stale.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run.out)
    (run.out / "metrics.jsonl").unlink(missing_ok=True)
    if run.global_step:
        write_aside(run.out / "metrics.jsonl", (path / "metrics.jsonl").read_text())
    samples = run.out / "samples.jsonl"
    if samples.exists():
        write_aside(samples, "".join(line for line in open(samples, errors="replace") if step_of(line) <= run.global_step))
    stages = state["stage"] + (not changed or state["stage_step"] > 0)  # whose kept answers are still right
    for file in run.out.glob("rejected-[0-9]*"):
        if int(file.name.split("-")[1].split(".")[0]) > stages:
            file.unlink()
    run.results = whole_results(run, state)
    if run.results or (run.out / "results.json").exists():
        write_record(run.out / "results.json", {"rows": run.results})


def step_of(line):
    """The step that a line of samples.jsonl was written in; infinite for one that was cut."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def whole_results(run, state):
    """The checkpoint's rows of results.json, and that of its own evaluation if it was made and all of it is whole."""
    rows, file, own = list(run.results), run.out / "results.json", None
    if not state["stage_step"]:
        own = run.cfg.curriculum[state["stage"] - 1].label if state["stage"] else "base"
    try:
        rows += [row for row in read_record(file)["rows"] if row["name"] == own] if file.exists() else []
    except UserError as error:
        say(f"{error}; what it said since the checkpoint is found out again")
    for row in list(rows):
        if problem := fault(run.out / "predictions", {f"{row['name']}.jsonl": row["predictions"]}):
            say(f"{run.out / 'predictions'}: {problem}" + ("; that evaluation is made again" if row["name"] == own else ""))
            rows = [other for other in rows if row["name"] != own or other is not row]
    return rows
