"""One GRPO step under the microscope: a picture of a real step, from a run's own numbers.

    python -m tools.microscope RUN                          # a step that RUN has the weights of
    python -m tools.microscope RUN --step 111 --group 2     # this one, and this of its groups

The step is taken again, by the functions that train (currreft.rollout, judge, token_logps, grpo_loss): from the weights
before it, so it samples what it sampled. Those are kept for the first step of every stage, and for the steps after the
checkpoints that --keep left. Drawn are
    the image, and the question in its three forms, the one that was asked in black;
    the group's G completions with accuracy + format = r and a bar for the advantage A = (r - mean) / std;
    of the best and the worst the tokens, shaded by -d loss / d logp: green is made likelier, red less, and strength is
    |A| times the ratio over the completion's length. The blue bar below a token is its KL_t, to one scale per picture.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
import transformers

from answers import parse_boxes
from currreft import Config, Group, grpo_loss, judge, rollout, token_logps
from data import FORMS, derive_all, load_data
from distributed import UserError
from run import Run
from sample import read_jsonl
from tasks import TASKS, truth_of
from tools.pictures import GREEN, GREY, INK, LINE, RED, Canvas, pale, printable, save, text_width, view, wrap
from tools.terminal import terminal

WIDTH, LEFT, BLUE = 1280, 330, "#2f6fb2"


# ---- The step ----

@dataclasses.dataclass
class Look:
    """One group of a step as the loss sees it; R = G completions of up to T tokens."""

    title: str
    group: Group
    forms: dict            # form -> the Example in that form
    tokens: list           # G lists of token texts
    push: torch.Tensor     # (R, T) -d loss / d logp
    kl: torch.Tensor       # (R, T)
    loss: float            # of this group alone


def steps_at_hand(folder, cfg, lines):
    """{step of the run: (stage, step in its stage, path of the weights before it)} of all that can be shown."""
    found = {}
    for line in lines:
        stage = cfg.curriculum[line["stage_index"]]
        path = folder / "checkpoints" / f"{line['step'] - 1:07d}"
        if line["stage_step"] == 1:
            path = folder / "stages" / cfg.curriculum[stage.index - 1].label if stage.index else Path(cfg.model)
        if stage.forms and (path.exists() or line["step"] == 1):
            found[line["step"]] = stage, line["stage_step"] - 1, path
    return found


def look(folder, step=None, number=None):
    """Take a step again; returns a Look at one of its groups. UserError where there is nothing to see."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
        cfg = Config(**{f.name: tuple(settings[f.name]) if isinstance(settings[f.name], list) else settings[f.name]
                        for f in dataclasses.fields(Config) if f.name in settings})
        at_hand = steps_at_hand(folder, cfg, read_jsonl(folder / "metrics.jsonl"))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder} is no directory of a run with finished steps ({error})") from error
    if not at_hand or step not in (None, *at_hand):
        raise UserError(f"{folder} has no weights from before step {step or 1}; --step can be "
                        f"{', '.join(map(str, at_hand)) or 'nothing: no RL step is finished'}")
    step = step or max(at_hand)
    stage, stage_step, path = at_hand[step]
    run = Run(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"), load_data(cfg)[0])
    run.load_weights(path)
    run.load_reference(stage, resumed=stage_step > 0)
    groups = rollout(run, stage, stage_step)
    judge(cfg, groups)
    group = chosen(groups, number)
    title = f"Step {step} of the run: {stage.name} stage, step {stage_step + 1} of {stage.steps}, {group.example.task}"
    return examine(run, group, title)


def chosen(groups, number):
    """The group of that number (from 1), or the one whose rewards differ most; UserError where there is none."""
    if number is not None and not 1 <= number <= len(groups):
        raise UserError(f"--group {number}: the step has groups 1 to {len(groups)}")
    group = groups[number - 1] if number else max(groups, key=lambda g: (g.rewards.std().item(), len(g.example.images)))
    if not group.advantages.any():
        raise UserError("all rewards of the group are equal, so every advantage is 0 and nothing is pushed anywhere; "
                        "name another --step or --group")
    return group


def examine(run, group, title):
    """What the loss does to each token of a group, by its own gradient."""
    cfg = run.cfg
    packed = run.pack([group.prompt], [[o.tokens for o in group.completions]]).to(run.device)
    with torch.no_grad():
        logp = token_logps(run.policy.train(), packed, run.bias, cfg.temperature)
        logp_ref = token_logps(run.reference, packed, run.bias, cfg.temperature) if cfg.beta else None
    leaf = logp.clone().requires_grad_()
    loss, _ = grpo_loss(leaf, logp, logp_ref, group.advantages.to(run.device), packed.mask, cfg.beta, cfg.epsilon)
    loss.backward()
    difference = (logp_ref - logp).clamp(-20, 20) if cfg.beta else torch.zeros_like(logp)
    decode = run.processor.tokenizer.decode
    return Look(title, group, forms_of(run, group.example),
                [[decode([token], skip_special_tokens=False) for token in o.tokens] for o in group.completions],
                -leaf.grad.cpu(), ((difference.exp() - difference - 1) * packed.mask).cpu(), loss.item())


def forms_of(run, example):
    """{form: Example} of the question as it was asked, and of its other forms where they can be found or derived."""
    found = {example.form: example}
    opened = load_data(dataclasses.replace(run.cfg, stages=("open:1",)))[0]["open"]
    alike = [e for e in opened if e.images == example.images and example.problem.startswith(e.problem[:12])]
    source = example if example.form == "open" else next(iter(alike), None)
    for form in FORMS if source and TASKS[source.task].right else ():
        if form not in found:
            found[form] = source if form == "open" else derive_all([source], form, run.cfg.seed)[0]
    return {form: found[form] for form in FORMS if form in found}


# ---- The picture ----

def draw(seen, out):
    """Save the picture of a Look; returns its path."""
    group = seen.group
    order = sorted(range(len(group.completions)), key=lambda i: -group.advantages[i].item())
    shown = [order[0], order[-1]]
    rows = [token_rows(seen.tokens[i]) for i in shown]
    top = max(image_column(Canvas(WIDTH, 1500), seen), completion_table(Canvas(WIDTH, 1500), seen, order))
    height = top + 70 + sum(38 + 46 * len(lines) for lines in rows)
    page = Canvas(WIDTH, height)
    page.text(30, 24, printable(seen.title), 23)
    page.text(WIDTH - 30, 42, f"mean(r) {group.rewards.mean():.3g}   std(r) {group.rewards.std():.3g}   KL "
              f"{seen.kl.sum() / sum(map(len, seen.tokens)):.2g} a token", 15, GREY, "rs")
    image_column(page, seen)
    completion_table(page, seen, order)
    page.line([(30, top + 8), (WIDTH - 30, top + 8)])
    legend(page, top + 30)
    y = top + 62
    for i, lines in zip(shown, rows):
        y = draw_tokens(page, seen, i, lines, y)
    return save(page.finish(), out)


def image_column(page, seen):
    """The image with its true boxes, and the forms of the question; returns where it ends."""
    example, y = seen.group.example, 70
    opened = seen.forms.get("open", example)
    boxes = parse_boxes(truth_of(opened)) or [] if TASKS[opened.task].boxes else []
    if example.images:
        picture = view(example.images[0], example.size, [(GREEN, boxes)])
        page.image.paste(picture, (60, round(2 * y)))
        y += picture.height / 2 + 18
    for form, asked in seen.forms.items():
        color = INK if form == example.form else GREY
        page.text(30, y, form + (", asked here" if form == example.form else ""), 15, BLUE if color == INK else GREY)
        lines = [part for text in asked.problem.splitlines() for part in wrap(text, 15, LEFT - 30, 2)][:7]
        for text in (*lines, *wrap("truth: " + truth_of(asked), 15, LEFT - 30, 2)):
            y += 20
            page.text(30, y, text, 15, GREEN if text.startswith("truth") and color == INK else color)
        y += 32
    return y


def completion_table(page, seen, order):
    """The completions by advantage: text, accuracy + format = r, and A as a bar; returns where it ends."""
    group, x, y = seen.group, LEFT + 40, 76
    middle, half = WIDTH - 150, 90
    page.text(x, y, f"{len(order)} completions", 15, GREY)
    page.text(middle - half - 30, y, "accuracy + format = r", 15, GREY, "ra")
    page.text(middle, y, "advantage A", 15, GREY, "ma")
    most, y = group.advantages.abs().max().item(), y + 28
    for i in order:
        text = wrap(group.completions[i].text, 15, middle - half - 200 - x, 2) or ["(nothing)"]
        for n, part in enumerate(text):
            page.text(x, y + 20 * n, part, 15)
        r = f"{group.accuracy[i]:.2g} + {group.format[i]:.0f} = {group.rewards[i]:.2g}"
        page.text(middle - half - 30, y, r, 15, anchor="ra")
        a = group.advantages[i].item()
        ends = sorted((middle, middle + half * a / most))
        page.box(ends[0], y + 1, ends[1], y + 17, GREEN if a > 0 else RED)
        page.text(middle + (half + 34), y, f"{a:+.2f}", 15, anchor="ma")
        y += 20 * len(text) + 16
    page.line([(middle, 100), (middle, y - 8)], GREY)
    r, a = group.rewards, group.advantages[order[0]].item()
    for text in (f"A = (r - mean(r)) / (std(r) + 0.0001), of the first: ({r[order[0]]:.2g} - {r.mean():.4g}) / "
                 f"({r.std():.4g} + 0.0001) = {a:+.2f}",
                 "L = - mean over completions and their tokens of min(ratio A, clip(ratio) A) - beta KL = "
                 f"{seen.loss:.3g}"):
        page.text(x, y + 8, text, 15, GREY)
        y += 24
    return y + 8


def legend(page, y):
    """What the colors mean."""
    x = 30
    for color, text in ((GREEN, "made likelier"), (RED, "made less likely, by |A| times ratio / |o|")):
        page.box(x, y, x + 26, y + 16, pale(color, 0.6))
        page.text(x + 34, y - 1, text, 15, GREY)
        x += 60 + text_width(text, 15)
    page.box(x, y + 12, x + 26, y + 16, BLUE)
    page.text(x + 34, y - 1, "KL of the token, to the reference", 15, GREY)


def label_of(token):
    """A token's text in a box: no control characters, not too long, never empty."""
    text = printable(token.replace("\n", "\\n"))
    return (text[:24] + "…" if len(text) > 25 else text) or "·"


def token_rows(tokens, most=8):
    """Numbers of the tokens on each line of boxes, [[0, 1, 2], [3, ..]]; at most `most` lines."""
    lines, x = [[]], 30
    for i, token in enumerate(tokens):
        width = text_width(label_of(token), 16) + 16
        if x + width > WIDTH - 30 and lines[-1]:
            lines, x = [*lines, []], 30
        lines[-1].append(i)
        x += width + 4
    return lines[:most]


def draw_tokens(page, seen, i, lines, y):
    """One completion's tokens as shaded boxes with a bar for each KL_t; returns where it ends."""
    group, push, kl = seen.group, seen.push[i], seen.kl[i]
    strongest, largest = seen.push.abs().max().item(), max(seen.kl.max().item(), 1e-9)
    cut = len(seen.tokens[i]) - sum(map(len, lines))
    page.text(30, y, f"A = {group.advantages[i]:+.2f}, r = {group.rewards[i]:.2g}, |o| = {len(seen.tokens[i])} tokens"
              + (f", the last {cut} not shown" if cut else ""), 15, GREY)
    y += 26
    for line in lines:
        x = 30
        for n in line:
            label, p = label_of(seen.tokens[i][n]), push[n].item()
            width = text_width(label, 16) + 16
            page.box(x, y, x + width, y + 28, pale(GREEN if p > 0 else RED, 0.75 * abs(p) / strongest) if p else LINE)
            page.text(x + 8, y + 5, label, 16)
            if kl[n] > 0.01 * largest:
                page.box(x, y + 38 - 8 * min(1.0, kl[n].item() / largest), x + width, y + 38, BLUE)
            x += width + 4
        y += 46
    return y + 12


def main(argv=None):
    """The command; returns its exit code, 2 with a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument("--step", type=int, help="step of the run, as metrics.jsonl counts (default: the last at hand)")
    parser.add_argument("--group", type=int, help="which of its groups, from 1 (default: where rewards differ most)")
    parser.add_argument("--out", default="step.png")
    args = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    try:
        print(draw(look(args.run, args.step, args.group), args.out))
    except UserError as error:
        print(f"tools.microscope: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with terminal():
        sys.exit(main())
