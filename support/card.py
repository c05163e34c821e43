"""The model card of a finished stage: README.md beside its weights, with the numbers that the run wrote down."""

import dataclasses
import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from string import Template

import torch
import transformers

from support.files import read_jsonl, write_aside
from support.tables import wilson

HIDDEN = {"model", "data", "image_root", "out", "questions", "judge_url", "resume", "allow_changes", "report_to"}


def code(value):
    """Any text as Markdown code that a table cell can hold: on one line, nothing in it acts."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text.strip() or ' '}`"


def base_model(name):
    """(hub name or None, what to call it): no path of this machine. A hub cache's folder tells the hub name."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", f"{Path(name).absolute()}/")
    if cached or not Path(name).exists():
        hub = "/".join(cached.groups()) if cached else str(name)
        return hub, f"[{hub}](https://huggingface.co/{hub})"
    return None, f"a local checkpoint, {code(Path(name).resolve().name)}"


def front_matter(hub):
    """YAML; every value is a quoted JSON string, which YAML reads as it is."""
    rows = [f"base_model: {json.dumps(hub)}"] if hub else []
    return "\n".join([*rows, "library_name: transformers", "pipeline_tag: image-text-to-text", "tags:", "- curr-reft",
                      "- grpo", "- qwen2_5_vl", "# license: yours to choose, as far as base model and data allow"])


def trained_on(run, stage, steps):
    """(number of rows, passes of `steps` steps over them, names of their files) of a stage."""
    rows = run.examples.get(stage.name, [])
    count = len(rows)
    if stage.name == "reject":
        rows, kept = run.questions, run.directory.out / f"rejected-{stage.index + 1}.jsonl"
        count = len(read_jsonl(kept))
    files = Counter(Path(example.where.rpartition(":")[0]).name for example in rows)
    used = f"{count} kept of {len(rows)} questions" if stage.name == "reject" else str(count)
    passes = steps * (run.cfg.prompts_per_step if stage.forms else run.cfg.sft_batch) / max(1, count)
    return used, f"{passes:.3g}", ", ".join(f"{code(file)} ({n})" for file, n in files.items())


def stage_table(run, last):
    """Rows of the stages up to `last`; steps are counted in metrics.jsonl."""
    logged = [row["stage_index"] for row in read_jsonl(run.directory.out / "metrics.jsonl")]
    done = [(stage, logged.count(stage.index)) for stage in run.cfg.curriculum[:last.index + 1]]
    return "\n".join(f"| {stage.label} | {steps} of {stage.steps} | {' | '.join(trained_on(run, stage, steps))} |"
                     for stage, steps in done)


def setting_table(cfg):
    """Rows of the settings that differ from their defaults, but for paths and addresses."""
    changed = [(f.name, getattr(cfg, f.name)) for f in dataclasses.fields(cfg)
               if f.name not in HIDDEN and getattr(cfg, f.name) != f.default]
    return "\n".join(f"| `{name}` | {code(' '.join(value) if isinstance(value, tuple) else value)} |"
                     for name, value in changed)


def result_table(run, label):
    """Accuracies of this checkpoint beside the base model's, as results.json has them."""
    file = run.directory.out / "results.json"
    rows = {row["name"]: row["splits"] for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
    if label not in rows:
        return "Not evaluated: the data held no test questions."

    def cell(scores):
        return f"{100 * scores['accuracy']:.1f} ±{100 * wilson(scores['accuracy'] * scores['n'], scores['n']):.1f}" \
            if scores else "-"
    lines = [f"| {code(split)} | {code(task)} | {scores['n']} | "
             f"{cell(rows.get('base', {}).get(split, {}).get(task))} | {cell(scores)} |"
             for split, tasks in rows[label].items() for task, scores in tasks.items()]
    head = ["Greedy accuracy in %, and half the width of its 95 % Wilson interval; one run, one seed.", "",
            "| test split | task | questions | base model | this checkpoint |", "|---|---|---|---|---|"]
    return "\n".join(head + lines)


def commit():
    """The project's commit, "-dirty" if files differ from it; "unknown" outside of a clone."""
    here = Path(__file__).resolve().parent.parent
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(["git", f"--git-dir={here / '.git'}", f"--work-tree={here}", *describe], check=True,
                              capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def card(run, stage, instruction):
    """The text of a finished stage's card; run: currreft.Run, stage: its currreft.Stage; see `write_cards`."""
    hub, base = base_model(run.cfg.model)
    template = Template((Path(__file__).parent / "card.md").read_text("utf-8"))
    return template.substitute(
        front=front_matter(hub), title=f"Curr-ReFT, {stage.label}", number=stage.index + 1,
        total=len(run.cfg.curriculum), base=base, stages=stage_table(run, stage), settings=setting_table(run.cfg),
        results=result_table(run, stage.label), instruction=repr(instruction),
        tokens=run.cfg.max_completion_length, torch=torch.__version__, transformers=transformers.__version__,
        commit=commit())


def write_cards(run, instruction):
    """README.md for every finished stage that has none: also for one whose run was killed before it was written.

    instruction: what a prompt of open detection ends with, for the example of its use.
    """
    for stage in run.cfg.curriculum:
        folder = run.directory.stage_end(stage.index)
        if folder.exists() and not (folder / "README.md").exists():
            write_aside(folder / "README.md", card(run, stage, instruction))
