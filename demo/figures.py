"""The ablation's figures: tables with their uncertainty, and pictures of the runs, from whatever is finished."""

import itertools
import json
import math
import statistics
from pathlib import Path

from data import FORMS, find_files, load_examples
from demo.plan import COMPARED, IMPROVE, PAIRS, label, results_of
from distributed import UserError
from tools.blind import blind_accuracy
from tools.pictures import bars, curves, grid, line_chart, read_metrics, wilson

ESCAPED = 10  # % of open questions right at the end: a run has left the plateau without reward
# Student's t of a 95 % interval, by the number of pairs
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201, 16: 2.131}


def figures_of(jobs, rows, bases):
    """{row: {(base name, seed): splits}} of what is finished on `bases`; splits as in a run's results.json."""
    there = {}
    for name, stages in rows.items():
        for job in jobs:
            splits = results_of(job.folder).get(label(stages))
            if job.base in bases and splits and job.stages.split()[:len(stages.split())] == stages.split():
                there.setdefault(name, {}).setdefault((job.base.name, job.seed), splits)
    return there


def score(splits, split, task="all"):
    """(accuracy in %, number of questions) of one split and task, or None."""
    found = splits.get(split, {}).get(task)
    return (100 * found["accuracy"], found["n"]) if found and found["n"] else None


def spread(runs, split, task="all"):
    """(mean over runs, half its interval, [each run's]) in %, or None where no run has the split.

    The interval is Wilson's for as many questions as the bases have together: it says how well the questions measure
    a model. How much runs differ is said by their range.
    """
    scores = {key: found for key, splits in runs.items() if (found := score(splits, split, task))}
    if not scores:
        return None
    each = [accuracy for accuracy, _ in scores.values()]
    n = sum({base: n for (base, _), (_, n) in scores.items()}.values())
    mean = statistics.mean(each)
    return mean, 100 * wilson(mean / 100 * n, n), each


def cell(found):
    """(56.1, 3.2, [53, 59]) -> "56 ±3 (53-59)"."""
    if not found:
        return "-"
    mean, half, each = found
    return f"{mean:.0f} ±{half:.0f}" + (f" ({min(each):.0f}-{max(each):.0f})" if len(each) > 1 else "")


def short(x):
    """53.2 -> "53", 0.0412 -> "0.041"."""
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def markdown(heading, lines):
    """A Markdown table of texts."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [heading, ["---"] * len(heading), *lines])


def results_tables(there):
    """Two tables: every split over all tasks, and the open splits by task."""
    first = [splits for runs in there.values() for splits in runs.values()]
    splits = list(dict.fromkeys(split for found in first for split in found))
    by_task = [(split, task) for split in splits for task in dict.fromkeys(t for f in first for t in f.get(split, {}))
               if task != "all" and split.startswith("open")]
    return [markdown(["row", *columns], [[name, *(cell(spread(runs, *key)) for key in keys)]
                                         for name, runs in there.items()])
            for columns, keys in ((splits, [(split,) for split in splits]),
                                  ([f"{split} {task}" for split, task in by_task], by_task)) if keys]


def pairs_of(there, one, other, split, key=None):
    """[(one, other)] in % of runs of the same base and seed; `key`: a split on which both must have escaped."""
    both = [(there[one][run], there[other][run]) for run in there.get(one, {}) if run in there.get(other, {})]
    found = [(a, b) for a, b in both if not key or all((score(s, key) or (0,))[0] > ESCAPED for s in (a, b))]
    found = [(score(a, split), score(b, split)) for a, b in found]
    return [(a[0], b[0]) for a, b in found if a and b]


def paired(each):
    """(mean, half its 95 % t interval, p) of differences.

    p: the share of all 2^n changes of their signs that bring the mean as far from 0, an exact test of "as often the one
    as the other way". paired([1, 1, 1, 1])[2] == 1/8. The interval is infinite for one difference; an n that T95 lacks
    takes the next smaller's t, which is larger.
    """
    n, mean = len(each), statistics.mean(each)
    half = T95[max(k for k in T95 if k <= n)] * statistics.stdev(each) / math.sqrt(n) if n > 1 else math.inf
    flips = (abs(sum(sign * x for sign, x in zip(signs, each))) for signs in itertools.product((1, -1), repeat=n))
    return mean, half, sum(total >= abs(sum(each)) - 1e-9 for total in flips) / 2 ** n


def difference(there, one, other, split, key=None):
    """Row `one` minus row `other`, run by run: "+55 ±9 (+50 to +58), 6 of 6 above, p 0.031"."""
    each = [a - b for a, b in pairs_of(there, one, other, split, key)]
    if not each:
        return "-"
    above = f"{sum(x > 0 for x in each)} of {len(each)} above"
    return f"{change_text(each)}, {above}" + (f", p {paired(each)[2]:.2g}" if len(each) > 1 else "")


def escapes(runs, split):
    """How many runs have left the plateau, with the 95 % Wilson interval of the share: "5 of 8 (31-86 %)"."""
    ends = [found[0] > ESCAPED for splits in runs.values() if (found := score(splits, split))]
    if not ends:
        return "-"
    n, k = len(ends), sum(ends)
    middle, half = (k + 1.92) / (n + 3.84), wilson(k, n)
    return f"{k} of {n} ({max(0, 100 * (middle - half)):.0f}-{min(100, 100 * (middle + half)):.0f} %)"


def metrics_of(jobs, stages):
    """[[metrics of each RL step]] of the runs that begin with `stages`, as far as these go."""
    parts = stages.split()
    runs = []
    for job in jobs:
        try:
            runs += [read_metrics(job.folder).values()] if job.stages.split()[:len(parts)] == parts else []
        except UserError:  # not begun
            continue
    return [[row for row in run if row["stage_index"] < len(parts) and "equal_groups" in row] for run in runs]


def equal_groups(runs):
    """Mean share of groups whose rewards are all equal, as text."""
    shares = [row["equal_groups"] for run in runs for row in run]
    return f"{100 * statistics.mean(shares):.0f} %" if shares else "-"


def takeoff(runs, steps=10, level=0.1):
    """When open answers begin to score, as text, run by run: "113, never, 180", the first open step at which the
    accuracy reward of the last `steps` is above `level` on average. Runs without an open stage are left out.
    """
    said = []
    for run in runs:
        rewards = [row["reward/accuracy"] for row in run if row["stage"] == "open"]
        ends = (n for n in range(steps, len(rewards) + 1) if statistics.mean(rewards[n - steps:n]) > level)
        said += [str(next(ends, "never"))] if rewards else []
    return ", ".join(said) or "-"


def per_step(args, base):
    """Rollouts of one step of the runs on `base`."""
    return args.configs[base.name].prompts_per_step * args.configs[base.name].num_generations


def expected_hits(figures, rollouts, args):
    """pass@1 x rollouts as text; where nothing was right, what 95 % of such a measurement exclude (rule of three)."""
    share = figures["pass@1"] or 3 / (figures["n"] * args.samples)
    return f"{'' if figures['pass@1'] else '< '}{short(share * rollouts)}"


def predictors(bases, jobs, rows, args):
    """What predicts the outcome on each base: pass@k of the three forms, expected hits, groups without signal."""
    lines = []
    for base in bases:
        file = pass_file(args, base)
        figures = json.loads(file.read_text()) if file.exists() else {}
        ks = {form: [100 * share for k, share in at.items() if k.startswith("pass@")] for form, at in figures.items()}
        mine = [job for job in jobs if job.base == base]
        lines.append([base.name, *(f"{short(ks[form][0])} / {short(ks[form][-1])}" if form in ks else "-"
                                   for form in FORMS),
                      expected_hits(figures["open"], sum(args.steps) * per_step(args, base), args)
                      if "open" in ks else "-",
                      *(equal_groups(metrics_of(mine, rows[row])) for row in ("RL (open only)", "Curr-RL"))])
    return markdown(["base", *(f"{form}, pass@1 / pass@{args.samples} %" for form in FORMS),
                     "expected hits, all rollouts open", "equal groups, all steps of open only",
                     "equal groups, all steps of Curr-RL"], lines)


def settings_of(bases, wanted=COMPARED):
    """{setting: its bases} of those on which the wanted rows are run."""
    found = {}
    for base in bases:
        if not base.rows or set(wanted) <= set(base.rows):
            found.setdefault(base.setting, []).append(base)
    return found


def regimes(bases, jobs, rows, splits):
    """Tables of the COMPARED rows in every setting: accuracy by split, escapes, when open answers begin to score."""
    found = {name: figures_of(jobs, rows, mine) for name, mine in settings_of(bases).items()}
    ours, *others = COMPARED[::-1]
    heading = ["setting", *COMPARED, *(f"{ours} - {other}" for other in others)]
    parts = [f"{split}:\n\n" + markdown(heading, [
        [name, *(cell(spread(there.get(row, {}), split)) for row in COMPARED),
         *(difference(there, ours, other, split) for other in others)] for name, there in found.items()]) + "\n"
        for split in splits]
    parts += [f"Runs that end above {ESCAPED} % on {splits[0]}, with the 95 % interval of the share:\n",
              markdown(["setting", *COMPARED], [[name, *(escapes(there.get(row, {}), splits[0]) for row in COMPARED)]
                                                for name, there in found.items()]), ""]
    parts += [f"{ours} - {other}, of the pairs in which both end above {ESCAPED} % on {splits[0]}:\n\n" + markdown(
        ["setting", *splits], [[name, *(difference(there, ours, other, split, splits[0]) for split in splits)]
                               for name, there in found.items()]) + "\n" for other in others]
    return [*parts, "Open step at which the accuracy reward of the last 10 steps first averaged above 0.1:\n",
            markdown(["setting", *COMPARED[::2]],  # no step of Mix has open questions alone
                     [[name, *(takeoff(metrics_of([job for job in jobs if job.base in mine], rows[row]))
                               for row in COMPARED[::2])] for name, mine in settings_of(bases).items()])]


def ends_of(runs, form, steps=10):
    """Mean accuracy reward in the last steps of a stage of one form, in %: one a run."""
    return [100 * statistics.mean([row["reward/accuracy"] for row in run if row["stage"] == form][-steps:])
            for run in runs if any(row["stage"] == form for row in run)]


def leaks(bases, jobs, rows, args, splits):
    """The curriculum on questions that tell without a look beside the same on fair ones, of the same worlds."""
    lines, row = [], "Curr-RL"
    fair = bases[0].setting
    for setting in (fair, "leaky"):
        mine = [base for base in bases if base.setting == setting]
        blind = []
        for form in FORMS[:2]:
            rows_of = [e for base in mine[:1] for e in load_examples(
                find_files(base.data)["train"][form], image_root=base.data, form=form)]
            shares = [found for task in dict.fromkeys(e.task for e in rows_of)
                      if (found := blind_accuracy([e for e in rows_of if e.task == task]))]
            blind.append(", ".join(f"{100 * share:.0f} ({100 * chance:.0f})" for share, chance, _ in shares))
        runs = metrics_of([job for job in jobs if job.base in mine], rows[row])
        lines.append(["fair" if setting == fair else setting, *blind,
                      *(cell_of(ends_of(runs, form)) for form in FORMS),
                      *(cell(spread(figures_of(jobs, rows, mine).get(row, {}), split)) for split in splits)])
    there = {name: {(base.name.rpartition("-")[2], seed): splits for base in bases if base.setting == setting
                    for (_, seed), splits in figures_of(jobs, rows, [base]).get(row, {}).items()}
             for name, setting in (("fair", fair), ("leaky", "leaky"))}
    lines.append(["fair - leaky", *["-"] * 5, *(difference(there, "fair", "leaky", split) for split in splits)])
    return markdown(["questions", *(f"{form}, blind right (chance) % by task" for form in FORMS[:2]),
                     *(f"reward, end of {form} stage" for form in FORMS), *splits], lines)


def cell_of(each):
    """[53, 59] -> "56 (53-59)"."""
    return f"{statistics.mean(each):.0f} ({min(each):.0f}-{max(each):.0f})" if each else "-"


def improvements(jobs, splits):
    """What phase 2 changes, in points, from the end of the curriculum on: by judge and number of passes."""
    lines = []
    for setting in IMPROVE:
        mine = [results_of(job.folder) | {"job": job} for job in jobs if job.base.setting == setting]
        mine = [found for found in mine if found["job"].last in found]
        kept = [len((found["job"].folder / "rejected-1.jsonl").read_text().splitlines()) for found in mine]
        changes = [[after[0] - before[0] for found in mine if (after := score(found[found["job"].last], split))
                    and (before := score(found["base"], split))] for split in splits]
        lines.append([setting, cell_of(kept), *(change_text(each) for each in changes)])
    return markdown(["phase 2", "answers kept", *splits], lines)


def change_text(each):
    """"+8 ±3 (+5 to +10)" of changes in points."""
    if not each:
        return "-"
    mean, half, _ = paired(each)
    return f"{round(mean):+}{f' ±{half:.0f}' if len(each) > 1 else ''} ({round(min(each)):+} to {round(max(each)):+})"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def draw(bases, jobs, rows, args, splits):
    """Every picture that there is something for; returns their paths."""
    out, main = Path(args.out), bases[:1]
    there = figures_of(jobs, rows, main)
    paths = [bars({name: {split: spread(runs, split) for split in splits} for name, runs in there.items()},
                  out / "rows.png", "Open questions: mean, 95 % interval of the questions, every run", "accuracy in %")]
    panels = []
    for name, stages in rows.items():
        runs = [job.folder for job in jobs if job.base in main and job.stages == stages and ":" in stages
                and not stages.startswith(("sft", "reject")) and (job.folder / "metrics.jsonl").exists()]
        if runs:
            panels.append(curves(runs, out / f"curve-{len(panels)}.png", "reward/accuracy", title=name))
    if panels:
        paths.append(grid(panels, out / "curves.png"))
        for panel in panels:
            panel.unlink()
    settings = {name: figures_of(jobs, rows, mine) for name, mine in settings_of(bases).items()}
    if len(settings) > 1:
        paths.append(bars({name: {row: spread(there.get(row, {}), splits[0]) for row in COMPARED}
                           for name, there in settings.items() if there}, out / "settings.png",
                          f"{splits[0]} in every setting: mean, every run", "accuracy in %"))
    forms = [json.loads(file.read_text()) for base in main if (file := pass_file(args, base)).exists()]
    if forms:
        lines = {form: [(int(k[5:]), 100 * statistics.mean(at[form][k] for at in forms)) for k in forms[0][form]
                        if k.startswith("pass@")] for form in FORMS if form in forms[0]}
        paths.append(line_chart(lines, out / "pass_at_k.png", "pass@k of the base model by form of the question", "k",
                                "%", logx=True))
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Report


def report(bases, jobs, rows, args):
    """Write results.md, results.json and the pictures from whatever is finished; returns the text."""
    there = figures_of(jobs, rows, bases[:1])
    if not there:
        raise UserError(f"{args.out} holds no finished run yet")
    every = list(next(iter(next(iter(there.values())).values())))
    splits = [split for split in every if split.startswith("open")] or every
    b, c, o = args.steps
    differences = [[f"{one} - {other}", *(difference(there, one, other, split) for split in splits)]
                   for one, other in PAIRS]
    head = (f"{b + c + o} updates of {per_step(args, bases[0])} rollouts a row ({b} + {c} + {o} in the curriculum), "
            f"seeds {', '.join(map(str, args.seeds))}. Greedy accuracy in %, strict scorer: mean over runs, half the "
            "95 % interval for as many questions, range over runs in brackets. A difference is paired: mean, half its "
            "95 % interval over pairs, range, and p of an exact test that changes the signs of the differences.")
    fair = [base for base in bases if base.setting != "leaky"]
    parts = [f"# What did every row of the ablation score?\n\n{head}\n",
             "## What predicts the outcome\n", predictors(fair, jobs, rows, args), "",
             "## Rows\n", *[table + "\n" for table in results_tables(there)],
             "## Run by run, the same base and seed\n",
             markdown(["difference", *splits], differences)]
    if len(bases) > 1:
        parts += ["\n## In every setting\n\nRuns on all bases of a setting together.\n",
                  *regimes(bases, jobs, rows, splits)]
    if any(base.setting == "leaky" for base in bases):
        parts += ["\n## Questions that tell without a look\n", leaks(bases, jobs, rows, args, splits)]
    if any(job.base.setting in IMPROVE and results_of(job.folder) for job in jobs):
        parts += ["\n## Phase 2, from the end of the curriculum\n\nChange in points, paired by seed.\n",
                  improvements(jobs, every)]
    after = {}
    for name, _, base, file in measured(bases, jobs, rows, args):
        if base == bases[0] and file.exists():
            after.setdefault(name, []).append(json.loads(file.read_text()))
    parts += ["\n## pass@k before and after\n\nSampled answers, mean over seeds.\n", pass_table(after, args)]
    text = "\n".join(parts) + "\n"
    (Path(args.out) / "results.md").write_text(text)
    (Path(args.out) / "results.json").write_text(json.dumps(
        {name: {f"{base} seed {seed}": splits for (base, seed), splits in runs.items()}
         for name, runs in there.items()}, indent=1))
    draw(bases, jobs, rows, args, splits)
    return text


def pass_file(args, base, name="base"):
    """Where pass@k of a base, or of the end of a row on it, is kept."""
    return Path(args.out) / base.name / f"pass{args.samples}-{name}.json"


def measured(bases, jobs, rows, args):
    """[(name, checkpoint, base, file)] to measure pass@k of: the bases, and on the first the COMPARED rows' stages."""
    found = [("base", base.model, base, pass_file(args, base)) for base in bases
             if not base.flags and base.setting != "leaky"]
    for row in COMPARED:
        parts = rows[row].split()
        ends = [label(" ".join(parts[:end])) for end in range(1, len(parts) + 1)]
        mine = [job for job in jobs if job.base == bases[0] and job.stages.split()[:len(parts)] == parts]
        for end, job in itertools.product(ends, mine):
            name = row if len(ends) == 1 else f"{row}, {end}"
            file = pass_file(args, job.base, f"{name}-seed{job.seed}")
            found.append((name, job.folder / "stages" / end, job.base, file))
    return found


def pass_table(after, args):
    """pass@1 and pass@k of each form, a line each {name: [figures of a seed]}."""
    ks = ("pass@1", f"pass@{args.samples}")
    return markdown(["after", *(f"{form} {k}" for form in FORMS for k in ks)],
                    [[name, *(short(100 * statistics.mean(at[form][k] for at in seeds)) if form in seeds[0] else "-"
                              for form in FORMS for k in ks)] for name, seeds in after.items()])
