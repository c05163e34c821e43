"""One GRPO step under the microscope: a picture of a real step, from a run's own numbers.

    python -m tools.microscope RUN                          # a step that RUN has the weights of
    python -m tools.microscope RUN --step 111 --group 2     # this one, and this of its groups

The step is taken again by the functions that train, from the weights before it: it samples what
it sampled. Weights are kept before the first step of a stage and at the last checkpoints.
RUN/step.png shows the image, the question, its G completions by advantage, and of the best and the
worst the tokens, shaded by -d loss / d logp: green is made likelier, red less, and strength is |A|
times the ratio over the completion's length. The blue bar below a token is its KL_t to the
reference that was trained against, to one scale.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

import torch
import transformers

from currreft import Config, Group, Run, assign_rewards, grpo_loss, rollout
from data import load_data, refuse_long_prompts
from packed import token_logps
from rewards import TASKS
from support.answers import parse_boxes, truth_of
from support.drawing import save_picture, view
from support.files import read_jsonl, read_record
from support.page import (
    BLUE, GREEN, GREY, INK, LINE, OVERSAMPLE, RED, Page, pale, printable, text_width)
from support.words import UserError, command, say

PAGE_WIDTH, LEFT, SIZE = 1280, 330, 15  # of the page, of its left column, of text
TOKENS_SHOWN = 100  # tokens of a completion
REFERENCES = {"stage": "KL to the policy at the stage's start", "base": "KL to the base model"}


# ---- The step ----

@dataclasses.dataclass
class Look:
    """One group of a step as the loss sees it; G completions of up to T tokens."""

    title: str
    reference: str      # what the KL is to
    group: Group
    tokens: list        # G lists of token texts
    push: torch.Tensor  # (G, T) -d loss / d logp
    kl: torch.Tensor    # (G, T)
    loss: float         # of this group alone


def recorded(folder, data=None):
    """The Config of a run directory, wherever it lies now; `data`: where its data lie now.

    What the run was made of is looked for as far from it as it was, and then where it was.
    """
    file = Path(folder) / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is no directory of a run: there is no {file}")
    record = read_record(file)
    settings = {field.name: record[field.name] for field in dataclasses.fields(Config)
                if field.name in record}
    moves = {record["out"]: folder, **({record["data"]: data} if data else {})}
    for name in ("model", "data", "image_root"):
        for was, now in moves.items() if record[name] else ():
            there = os.path.normpath(os.path.join(now, os.path.relpath(record[name], was)))
            settings[name] = there if os.path.exists(there) else settings[name]
    return Config(**{**settings, "out": str(folder), "report_to": ""})


def steps_at_hand(run):
    """{step: (its row of metrics.jsonl, the weights before it)} of RL steps that can be taken."""
    found, file = {}, run.directory.out / "metrics.jsonl"
    names = "step", "stage_index", "stage_step", "reward"
    for row in read_jsonl(file, *names) if file.exists() else ():
        stage = run.cfg.curriculum[row["stage_index"]]
        path = run.directory.checkpoint(row["step"] - 1)
        if row["stage_step"] == 1:
            path = run.directory.stage_end(stage.index - 1) if stage.index else run.cfg.model
        if stage.forms and (row["step"] == 1 or path.exists()):
            found[row["step"]] = row, path
    return found


def look(folder, step=None, number=None, data=None):
    """Take a step again; returns a Look at one of its groups. UserError if none can be seen."""
    cfg = recorded(folder, data)
    run = Run(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    at_hand = steps_at_hand(run)
    if not at_hand or step not in (None, *at_hand):
        raise UserError(f"{folder} has no weights from before step {step or 1}; --step can be "
                        f"{', '.join(map(str, at_hand)) or 'nothing: no RL step is finished'}")
    row, path = at_hand[step or max(at_hand)]
    stage, done = cfg.curriculum[row["stage_index"]], row["stage_step"] - 1
    examples = load_data(dataclasses.replace(cfg, stages=(f"{stage.name}:1",)))[0][stage.name]
    run.load_weights(path)
    run.load_reference(stage, resumed=done > 0)
    run.examples = {stage.name: refuse_long_prompts(cfg, run.processor, examples)}
    groups = rollout(run, stage, done)
    assign_rewards(cfg, groups)
    reward = torch.cat([group.rewards for group in groups]).mean().item()
    if abs(reward - row["reward"]) > 1e-4:
        say(f"not quite the step that was taken: its reward was {row['reward']:.6g} and is "
            f"{reward:.6g}. Data, code or machine are others than the run's")
    group = group_to_show(groups, number)
    return examine(run, group, f"Step {row['step']} of the run: {stage.name} stage, step "
                               f"{done + 1} of {stage.steps}, {group.example.task}")


def group_to_show(groups, number):
    """The group of that number (from 1), or that whose rewards differ most."""
    if number not in (None, *range(1, len(groups) + 1)):
        raise UserError(f"--group {number}: the step has groups 1 to {len(groups)}")
    group = groups[number - 1] if number else max(groups, key=lambda group: group.rewards.std())
    if not group.advantages.any():
        raise UserError("all rewards of the group are equal, so every advantage is 0 and nothing "
                        "is pushed anywhere; name another --step or --group")
    return group


def examine(run, group, title):
    """What the loss does to each token of a group, by its own gradient."""
    cfg, decode = run.cfg, run.processor.tokenizer.decode
    packed = run.pack([group.prompt], [[o.tokens for o in group.completions]])
    run.policy.train()
    with torch.no_grad():
        logp, logp_ref = (  # (G, T)
            token_logps(model, packed, run.bias, cfg.temperature) if model else None
            for model in (run.policy, run.reference))
    leaf, advantages = logp.clone().requires_grad_(), group.advantages.to(run.device)
    loss, _ = grpo_loss(leaf, logp, logp_ref, advantages, packed.mask, cfg.beta, cfg.epsilon)
    loss.backward()
    difference = (logp_ref - logp).clamp(-20, 20) if cfg.beta else torch.zeros_like(logp)
    kl = (difference.exp() - difference - 1) * packed.mask
    reference = REFERENCES[cfg.reference] if cfg.beta else "no KL: beta is 0, no reference"
    tokens = [[decode([token], skip_special_tokens=False) for token in o.tokens]
              for o in group.completions]
    return Look(title, reference, group, tokens, -leaf.grad.cpu(), kl.cpu(), loss.item())


# ---- The picture ----

def draw_step(seen, out):
    """Save the picture of a Look; returns its path."""
    group, mean_kl = seen.group, seen.kl.sum() / sum(map(len, seen.tokens))
    order = group.advantages.argsort(descending=True, stable=True).tolist()
    page = Page(PAGE_WIDTH, 3200 + 60 * len(order))
    page.text(30, 24, seen.title, INK, 23)
    page.text(30, 62, f"mean(r) {group.rewards.mean():.3g}, std(r) {group.rewards.std():.3g}, "
                      f"loss {seen.loss:.3g}, KL {mean_kl:.2g} a token", GREY, SIZE)
    x, y = 30, max(draw_question(page, group.example), draw_completions(page, group, order)) + 20
    for color, text in ((GREEN, "made likelier"), (RED, "made less likely, by |A| ratio / |o|"),
                        (BLUE, seen.reference)):
        page.box(x, y + 12 * (color == BLUE), x + 26, y + 16, color)
        page.text(x + 34, y - 1, text, GREY, SIZE)
        x += 60 + text_width(text, SIZE)
    y += 40
    for i in (order[0], order[-1]):
        y = draw_tokens(page, seen, i, y)
    return save_picture(page.finish(y), out)


def draw_question(page, example):
    """The image with its true boxes, question and truth; returns where it ends."""
    y, truth = 100, truth_of(example)
    if example.images:
        placed = example.form == "open" and TASKS[example.task].resize
        boxes = parse_boxes(truth) or [] if placed else []
        picture = view(example.images[0], example.size, [(GREEN, boxes)])
        page.image.paste(picture, (30 * OVERSAMPLE, y * OVERSAMPLE))
        y += picture.height / OVERSAMPLE + 18
    y = page.text(30, y, example.problem, INK, SIZE, width=LEFT - 30, most=12)
    return page.text(30, y, f"truth: {truth}", GREEN, SIZE, width=LEFT - 30, most=3)


def draw_completions(page, group, order):
    """The completions by advantage: text, accuracy + format = r, A as a bar; returns the end."""
    x, y, middle, half = LEFT + 40, 128, PAGE_WIDTH - 170, 90
    page.text(x, 100, f"{len(order)} completions", GREY, SIZE)
    page.text(middle - half - 30, 100, "accuracy + format = r", GREY, SIZE, "ra")
    page.text(middle, 100, "advantage A", GREY, SIZE, "ma")
    for i in order:
        a, r = group.advantages[i].item(), group.rewards[i]
        text = f"{group.accuracy[i]:.2g} + {group.format[i]:.0f} = {r:.2g}"
        page.text(middle - half - 30, y, text, INK, SIZE, "ra")
        end = middle + half * a / group.advantages.abs().max().item()
        page.box(min(middle, end), y + 1, max(middle, end), y + 17, GREEN if a > 0 else RED)
        page.text(middle + half + 34, y, f"{a:+.2f}", INK, SIZE, "ma")
        text = group.completions[i].text.strip() or "(nothing)"
        y = page.text(x, y, text, INK, SIZE, width=middle - half - 200 - x, most=2) + 16
    return y


def draw_tokens(page, seen, i, y):
    """A completion's first tokens as shaded boxes with bars for their KL_t; returns the end."""
    strongest, largest = seen.push.abs().max().item(), max(seen.kl.max().item(), 1e-9)
    tokens = seen.tokens[i][:TOKENS_SHOWN]
    cut = f", the first {TOKENS_SHOWN}" if len(tokens) < len(seen.tokens[i]) else ""
    page.text(30, y, f"A = {seen.group.advantages[i]:+.2f}, r = {seen.group.rewards[i]:.2g}, "
                     f"|o| = {len(seen.tokens[i])} tokens{cut}", GREY, SIZE)
    x, y = 30, y + 26
    for token, push, kl in zip(tokens, seen.push[i].tolist(), seen.kl[i].tolist()):
        label = printable(token.replace("\n", "\\n"))[:25] or "·"
        width = text_width(label, SIZE) + 16
        x, y = (30, y + 46) if x + width > PAGE_WIDTH - 30 else (x, y)
        color = pale(GREEN if push > 0 else RED, 0.75 * abs(push) / strongest) if push else LINE
        page.box(x, y, x + width, y + 28, color)
        page.text(x + 8, y + 5, label, INK, SIZE)
        if kl > 0.01 * largest:
            page.box(x, y + 38 - 8 * kl / largest, x + width, y + 38, BLUE)
        x += width + 4
    return y + 58


@command
def main(argv=None):
    """Look at a step and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument("--step", type=int, help="of the run, from 1 (default: the last at hand)")
    parser.add_argument("--group", type=int, help="of the step, from 1 (default: the most varied)")
    parser.add_argument("--data", help="where the run's data are now, if they were moved alone")
    parser.add_argument("--out", help="the picture (default: RUN/step.png)")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    seen = look(args.run, args.step, args.group, args.data)
    print(draw_step(seen, args.out or Path(args.run) / "step.png"))


if __name__ == "__main__":
    sys.exit(main())
