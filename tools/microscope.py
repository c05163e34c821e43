"""One GRPO step under the microscope: a picture of a real step, from a run's own numbers.

    python -m tools.microscope RUN                          # a step that RUN has the weights of
    python -m tools.microscope RUN --step 111 --group 2     # this one, and this of its groups

The step is taken again by the functions that train, from the weights before it: it samples what it
sampled. Those are kept for the first step of every stage and for the steps after the last checkpoints.
RUN/step.png shows
    the image, and the question that was asked; of a yes/no or choice question the open one, too;
    the group's G completions with accuracy + format = r and a bar for the advantage A;
    of the best and the worst the tokens, shaded by -d loss / d logp: green is made likelier, red less,
    and strength is |A| times the ratio over the completion's length. The blue bar below a token is
    its KL_t to the reference that the step was trained against, to one scale in the picture.
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
from support.answers import parse_boxes, truth_of
from support.drawing import view
from support.files import read_jsonl, read_record
from support.page import BLUE, GREEN, GREY, INK, LINE, OVERSAMPLE, RED
from support.page import Page, pale, printable, save_picture, text_width, wrap
from support.rows import find_files
from support.words import UserError, command, say
from rewards import TASKS

WIDE, LEFT, SIZE = 1280, 330, 15  # of the page, of its left column, of text


# ---- The step ----

@dataclasses.dataclass
class Look:
    """One group of a step as the loss sees it; G completions of up to T tokens."""

    title: str
    against: str        # what the KL is to
    group: Group
    source: object      # the open Example that the question was made of, or None
    tokens: list        # G lists of token texts
    push: torch.Tensor  # (G, T) -d loss / d logp
    kl: torch.Tensor    # (G, T)
    loss: float         # of this group alone


def recorded(folder, data=None):
    """The Config of a run directory, wherever it and what it was made of lie now.

    Recorded paths lie as far from the run as they did, if there is something; else where they did.
    data: where the run's data are, if neither. UserError if there is no run or no data.
    """
    if not (Path(folder) / "config.json").exists():
        raise UserError(f"{folder} is no directory of a run: there is no config.json in it")
    record = read_record(Path(folder) / "config.json")
    fields = [field.name for field in dataclasses.fields(Config) if field.name in record]
    settings = {name: tuple(record[name]) if isinstance(record[name], list) else record[name]
                for name in fields}
    moves = [(record["out"], folder), *([(record["data"], data)] if data else [])]
    for name in ("model", "data", "image_root"):
        for was, now in moves if record[name] else ():
            there = os.path.normpath(os.path.join(now, os.path.relpath(record[name], was)))
            settings[name] = there if os.path.exists(there) else settings[name]
    if not os.path.exists(settings["data"]):
        raise UserError(f"the data of the run, {record['data']}, are not there; --data says where")
    return Config(**{**settings, "out": str(folder), "report_to": "", "skip_bad_rows": True})


def steps_at_hand(run, lines):
    """{step of the run: (its line of the log, path of the weights before it)} of RL steps."""
    found, cfg, directory = {}, run.cfg, run.directory
    for line in lines:
        stage = cfg.curriculum[line["stage_index"]]
        path = directory.checkpoint(line["step"] - 1)
        if line["stage_step"] == 1:
            path = directory.stage_end(stage.index - 1) if stage.index else cfg.model
        if stage.forms and (path == cfg.model or path.exists()):
            found[line["step"]] = line, path
    return found


def look(folder, step=None, number=None, data=None):
    """Take a step again; returns a Look at one of its groups. UserError if there is nothing to see."""
    cfg = recorded(folder, data)
    run = Run(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    log = Path(folder) / "metrics.jsonl"
    at_hand = steps_at_hand(run, read_jsonl(log) if log.exists() else [])
    if step not in (None, *at_hand) or not at_hand:
        raise UserError(f"{folder} has no weights from before step {step or 1}; --step can be "
                        f"{', '.join(map(str, at_hand)) or 'nothing: no RL step is finished'}")
    line, path = at_hand[step or max(at_hand)]
    stage, done = cfg.curriculum[line["stage_index"]], line["stage_step"] - 1
    stages = [f"{stage.name}:1", *(["open:1"] if find_files(cfg.data)["train"]["open"] else [])]
    examples = load_data(dataclasses.replace(cfg, stages=tuple(stages)))[0]
    run.load_weights(path)
    run.load_reference(stage, resumed=done > 0)
    run.examples = {stage.name: refuse_long_prompts(cfg, run.processor, examples[stage.name])}
    groups = rollout(run, stage, done)
    assign_rewards(cfg, groups)
    reward = torch.cat([group.rewards for group in groups]).mean().item()
    if abs(reward - line["reward"]) > 1e-4:
        say(f"this is not quite the step that was taken: its mean reward is {reward:.6g}, and was "
            f"{line['reward']:.6g}. Data, code or machine are others than the run's")
    group = chosen(groups, number)
    title = (f"Step {line['step']} of the run: {stage.name} stage, step {done + 1} of {stage.steps}, "
             f"{group.example.task}")
    return examine(run, group, title, source_of(group.example, examples.get("open", ())))


def chosen(groups, number):
    """The group of that number (from 1), or that whose rewards differ most; UserError if none does."""
    if number is not None and not 1 <= number <= len(groups):
        raise UserError(f"--group {number}: the step has groups 1 to {len(groups)}")
    group = groups[number - 1] if number else max(groups, key=lambda group: group.rewards.std().item())
    if not group.advantages.any():
        raise UserError("all rewards of the group are equal, so every advantage is 0 and nothing is "
                        "pushed anywhere; name another --step or --group")
    return group


def source_of(example, opened):
    """The open question that a yes/no or choice question was made of, or begins with; or None."""
    return next((e for e in opened if e.where == example.where or e.images == example.images
                 and e.task == example.task and example.problem.startswith(e.problem)), None)


def examine(run, group, title, source=None):
    """What the loss does to each token of a group, by its own gradient."""
    cfg = run.cfg
    packed = run.pack([group.prompt], [[o.tokens for o in group.completions]])
    with torch.no_grad():
        logp = token_logps(run.policy.train(), packed, run.bias, cfg.temperature)  # (G, T)
        logp_ref = None
        if cfg.beta:
            logp_ref = token_logps(run.reference, packed, run.bias, cfg.temperature)
    leaf = logp.clone().requires_grad_()
    advantages = group.advantages.to(run.device)
    loss, _ = grpo_loss(leaf, logp, logp_ref, advantages, packed.mask, cfg.beta, cfg.epsilon)
    loss.backward()
    difference = (logp - logp if logp_ref is None else logp_ref - logp).clamp(-20, 20)
    kl = (difference.exp() - difference - 1) * packed.mask
    decode = run.processor.tokenizer.decode
    start = {"stage": "the policy at the stage's start", "base": "the base model"}[cfg.reference]
    return Look(title, start if cfg.beta else "", group, source,
                [[decode([token], skip_special_tokens=False) for token in o.tokens]
                 for o in group.completions], -leaf.grad.cpu(), kl.cpu(), loss.item())


# ---- The picture ----

def draw_step(seen, out):
    """Save the picture of a Look; returns its path."""
    group = seen.group
    order = group.advantages.argsort(descending=True, stable=True).tolist()
    page = Page(WIDE, 1800 + 60 * len(order))
    page.text(30, 24, seen.title, 23)
    page.text(WIDE - 30, 66, f"mean(r) {group.rewards.mean():.3g}   std(r) {group.rewards.std():.3g}"
              f"   loss {seen.loss:.3g}", SIZE, GREY, "rs")
    y = max(question_column(page, seen), completion_table(page, seen, order)) + 8
    page.line([(30, y), (WIDE - 30, y)])
    x, y = 30, y + 22
    mean = seen.kl.sum() / sum(map(len, seen.tokens))
    for color, text in ((GREEN, "made likelier"), (RED, "made less likely, by |A| ratio / |o|"),
                        (BLUE, f"KL to {seen.against}, {mean:.2g} a token" if seen.against else
                         "no KL: beta is 0, so the step had no reference")):
        page.box(x, y + (12 if color == BLUE else 0), x + 26, y + 16, color)
        page.text(x + 34, y - 1, text, SIZE, GREY)
        x += 60 + text_width(text, SIZE)
    y += 32
    for i in (order[0], order[-1]):
        y = draw_tokens(page, seen, i, y)
    return save_picture(page.finish(y), out)


def question_column(page, seen):
    """The image with its true boxes, and the question; returns where it ends."""
    example, y = seen.group.example, 80
    opened = seen.source or example
    placed = opened.form == "open" and TASKS[opened.task].resize
    if example.images:
        boxes = parse_boxes(truth_of(opened)) or [] if placed else []
        picture = view(example.images[0], example.size, [(GREEN, boxes)])
        page.image.paste(picture, (30 * OVERSAMPLE, y * OVERSAMPLE))
        y += picture.height / OVERSAMPLE + 18
    for asked in dict.fromkeys((example, opened)):
        here = asked is example
        texts = ((asked.form + ", asked here" * here, BLUE if here else GREY, 1),
                 (asked.problem, INK if here else GREY, 9), (truth_of(asked), GREEN, 3))
        for text, color, most in texts:
            for part in wrap(text, SIZE, LEFT - 30, most):
                page.text(30, y, part, SIZE, color)
                y += 20
        y += 12
    return y


def completion_table(page, seen, order):
    """The completions by advantage: text, accuracy + format = r, and A as a bar; returns its end."""
    group, x, y, middle, half = seen.group, LEFT + 40, 84, WIDE - 150, 90
    page.text(x, y, f"{len(order)} completions", SIZE, GREY)
    page.text(middle - half - 30, y, "accuracy + format = r", SIZE, GREY, "ra")
    page.text(middle, y, "advantage A", SIZE, GREY, "ma")
    most, y = group.advantages.abs().max().item(), y + 28
    for i in order:
        a, text = group.advantages[i].item(), group.completions[i].text
        sum_of = f"{group.accuracy[i]:.2g} + {group.format[i]:.0f} = {group.rewards[i]:.2g}"
        page.text(middle - half - 30, y, sum_of, SIZE, anchor="ra")
        left, right = sorted((middle, middle + half * a / most))
        page.box(left, y + 1, right, y + 17, GREEN if a > 0 else RED)
        page.text(middle + half + 34, y, f"{a:+.2f}", SIZE, anchor="ma")
        for part in wrap(text, SIZE, middle - half - 200 - x, 2) or ["(nothing)"]:
            page.text(x, y, part, SIZE)
            y += 20
        y += 16
    page.line([(middle, 108), (middle, y - 8)], GREY)
    return y + 8


def label_of(token):
    """A token's text in a box: no control characters, not too long, never empty."""
    text = printable(token.replace("\n", "\\n"))
    return (text[:22] + "..." if len(text) > 25 else text) or "·"


def draw_tokens(page, seen, i, y, rows=8):
    """One completion's tokens as shaded boxes, a bar below each for its KL_t; returns the end.

    What does not fit in so many rows is not shown, and said to be so.
    """
    group, tokens = seen.group, seen.tokens[i]
    strongest, largest = seen.push.abs().max().item(), max(seen.kl.max().item(), 1e-9)
    title = f"A = {group.advantages[i]:+.2f}, r = {group.rewards[i]:.2g}, |o| = {len(tokens)} tokens"
    page.text(30, y, title, SIZE, GREY)
    x, y = 30, y + 26
    for n, (token, push, kl) in enumerate(zip(tokens, seen.push[i].tolist(), seen.kl[i].tolist())):
        label = label_of(token)
        width = text_width(label, SIZE) + 16
        if x + width > WIDE - 30:
            x, y, rows = 30, y + 46, rows - 1
        if not rows:
            page.text(30, y, f"and {len(tokens) - n} more", SIZE, GREY)
            break
        color = pale(GREEN if push > 0 else RED, 0.75 * abs(push) / strongest) if push else LINE
        page.box(x, y, x + width, y + 28, color)
        page.text(x + 8, y + 5, label, SIZE)
        if kl > 0.01 * largest:
            page.box(x, y + 38 - 8 * kl / largest, x + width, y + 38, BLUE)
        x += width + 4
    return y + 58


@command
def main(argv=None):
    """Look at a step and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument("--step", type=int, help="of metrics.jsonl (default: the last at hand)")
    parser.add_argument("--group", type=int, help="of the step, from 1 (default: rewards differ most)")
    parser.add_argument("--data", help="where the run's data are now, if they were moved alone")
    parser.add_argument("--out", help="the picture (default: RUN/step.png)")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    seen = look(args.run, args.step, args.group, args.data)
    print(draw_step(seen, args.out or Path(args.run) / "step.png"))


if __name__ == "__main__":
    sys.exit(main())
