"""What a trained policy is used for: answers, evaluation, and the samples of phase 2.

    python sample.py answer --model RUN/stages/3-open --image photo.jpg --question "Where is the dog?" --task detection
    python sample.py evaluate --model RUN --data DIR --samples 8     # of a run, the end of its last stage

The engine that generates (`load_policy`, `generate`) is in engine.py.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data import load_examples, model_size, with_places
from engine import generate, load_policy
from rewards import FORMS, TASKS, Example, accuracy_reward, format_reward, is_correct, safe_reward, task_of
from support.answers import extract_answer, parse_boxes
from support.drawing import save_picture, view
from support.files import read_jsonl, sealed, write_aside
from support.flags import check_values
from support.images import inspect_image
from support.ranks import gather, usable_gpu, world
from support.reasons import leads_to, sentences, substance, tokens
from support.rows import find_files
from support.words import RunError, UserError, command, say

# ---- Evaluation ----

def pass_at_k(n, c, k):
    """Unbiased chance that k of n samples, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    pass_at_k(4, 1, 2) == 0.5. Raises ValueError unless 0 <= c <= n and 1 <= k <= n. (Chen et al., arXiv 2107.03374.)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, processor, examples, *, samples=1, temperature=0.0, top_p=1.0, max_completion_length=512,
             max_rows=64, seed=0, on_finish=None, description="evaluate"):
    """Strict accuracy of `samples` answers to each example; greedy by default. Ranks share the work.

    Returns (splits, predictions) on every rank. splits: {split: {task or "all": {n, accuracy, format, length,
    truncated, and pass@k for k = 1, 2, 4, .. samples}}}, accuracies as shares in [0, 1], length in tokens. predictions:
    one dict an answer.
    """
    model.eval()
    rank, ranks = world()
    mine = range(rank, len(examples), ranks)
    bar = tqdm(total=len(mine), desc=description, disable=None if rank == 0 else True, leave=False)

    def finished(*args):
        bar.update()
        if on_finish:
            on_finish(*args)

    groups = generate(
        model, processor, [examples[i] for i in mine], samples, max_completion_length, temperature,
        top_p=top_p, seeds=[[(seed << 40) + i * samples + s for s in range(samples)] for i in mine],
        max_rows=max_rows, on_finish=finished)
    bar.close()
    rows = [(i, prediction(examples[i], o, temperature)) for i, group in zip(mine, groups) for o in group]
    rows = sorted((row for share in gather(rows) for row in share), key=lambda row: row[0])
    predictions = [row for _, row in rows]
    return summarize(predictions, samples), predictions


def prediction(example, completion, temperature):
    """One answer as a plain dict: question, truth, completion and what the strict scorer says of it."""
    return {"image": example.images[0] if example.images else None, "problem": example.problem,
            "solution": example.solution, "task": example.task, "form": example.form, "split": example.split,
            "where": example.where, "size": example.size, "temperature": temperature, "completion": completion.text,
            "answer": extract_answer(completion.text),
            "correct": bool(safe_reward(is_correct, completion.text, example)),
            "format": safe_reward(format_reward, completion.text, example), "tokens": len(completion.tokens),
            "truncated": completion.truncated}


def summarize(predictions, samples):
    """{split: {task or "all": figures}} of consecutive groups of `samples` answers."""
    splits = {}
    for start in range(0, len(predictions), samples):
        group = predictions[start:start + samples]
        for task in (group[0]["task"], "all"):
            splits.setdefault(group[0]["split"], {}).setdefault(task, []).append(group)
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]

    def figures(groups):
        """{name: value} of a list of questions, each a list of its answers' rows."""
        rows = [row for group in groups for row in group]
        mean = {name: sum(row[key] for row in rows) / len(rows) for name, key in (
            ("accuracy", "correct"), ("format", "format"), ("length", "tokens"), ("truncated", "truncated"))}
        at_k = {f"pass@{k}": sum(pass_at_k(samples, sum(r["correct"] for r in g), k) for g in groups) / len(groups)
                for k in ks if samples > 1}
        return {"n": len(groups), **mean, **at_k}

    return {split: {task: figures(groups) for task, groups in tasks.items()} for split, tasks in splits.items()}


# ---- The quality score ----

KEEP_ABOVE = 85.0                       # paper: what scores more is kept
MAX_THINKING = 6000                     # characters; longer reasoning is padding


def quality_score(completion, example):
    """0..100, by rules where the paper asks a model. Above KEEP_ABOVE: right, in format, reasoned.

    Reasoning is neither empty (nothing beyond the question, the answer and fillers) nor copied nor
    said over again, and does not end in another value than the answer. Of several the one that says
    more scores higher. Rules see form alone: not whether a reason is true, fits the image, leads to
    the next one, or was taken from another question that has the same answer, or closes in rare words; nor whether
    the last words name another answer that is neither a number, a letter nor yes or no.
    """
    thinking = completion.partition("<think>")[2].partition("</think>")[0]
    accuracy = accuracy_reward(completion, example, partial_credit=0.0)
    said, answer = sentences(thinking[:MAX_THINKING]), tokens(extract_answer(completion) or "")
    asked = tokens(example.problem[:MAX_THINKING])
    fluency = substance(said, answer, asked) if len(thinking) <= MAX_THINKING else 0.0
    logic = leads_to(said, answer, asked)
    score = 50 * accuracy + 20 * logic + 15 * format_reward(completion, example) + 15 * fluency
    return score if accuracy == 1 and fluency else min(score, KEEP_ABOVE)


class Rules:
    """The judge of phase 2 that needs no endpoint, support/endpoint.py: `quality_score`."""
    name, problem, stopping = "rules", "", False

    def __call__(self, completion, example):
        return safe_reward(quality_score, completion, example)

    def probe(self):
        """Nothing can be wrong with rules."""


# ---- Rejection sampling ----

def rejection_sample(model, processor, questions, out, *, judge=None, samples=8, threshold=85.0, temperature=1.0,
                     max_completion_length=512, max_rows=64, seed=0, weights="", on_finish=None):
    """Keep each question's best-scored answer if it scores above `threshold`: chat JSONL in `out`.

    The reference answer competes where it has reasoning. Ranks share the questions; each writes down every
    finished question at once, with all its answers and scores (out + .rank-R.partial): a killed run repeats
    what was in flight, an outage of the judge costs scores, never samples. An answer is taken up again if it
    was sampled alike, from the same `weights` (any name of them), a score if the same judge gave it. Returns
    the number kept. RunError where more than 5 % of the scores are missing. (Paper section 3.2; 1,520 of about
    12,000 kept there.)
    """
    judge, out, keys = judge or Rules(), Path(out), question_keys(questions)
    judge.probe()
    rank, ranks = world()
    sampled = [weights, samples, temperature, max_completion_length, seed]  # what answers depend on
    done = gather(answered(out, sampled, judge) if rank == 0 else None)[0]  # read before anybody appends
    mine = [i for i in range(rank, len(questions), ranks) if None in done.get(keys[i], {"scores": [None]})["scores"]]
    bar = tqdm(total=len(mine), desc="rejection sampling", disable=None if rank == 0 else True, leave=False)
    lock, pending, written = threading.Lock(), [], {}

    def score(i, answers, scores):
        """Judge the answers of question i that have no score yet, and write the line of its record."""
        scores = [judge(answer, questions[i]) if had is None else had for answer, had in zip(answers, scores)]
        with lock:
            row = {"key": keys[i], "sampled": sampled, "answers": answers, "judge": judge.name, "scores": scores}
            written[keys[i]] = row
            file.write("\n" + json.dumps(sealed(row)))  # ends a torn line
            file.flush()
            bar.update()

    def finished(number, group):
        """Hand a question's completions to the judge, who may be slow and works beside the decoding."""
        answers = [o.text for o in group]
        reference = [fresh[number].solution] if "<think>" in fresh[number].solution else []
        pending.append(pool.submit(score, unseen[number], answers + reference, [None] * len(answers + reference)))
        if on_finish:
            on_finish()

    unseen = [i for i in mine if keys[i] not in done]
    fresh = [questions[i] for i in unseen]
    with open(f"{out}.rank-{rank}.partial", "a") as file, ThreadPoolExecutor(8) as pool:
        try:
            for i in mine:
                if keys[i] in done:  # sampled before, but not all scores were to be had
                    pending.append(pool.submit(score, i, done[keys[i]]["answers"], done[keys[i]]["scores"]))
            model.eval()
            generate(model, processor, fresh, samples, max_completion_length, temperature,
                     seeds=[[(seed + i * samples + s) % 2**63 for s in range(samples)] for i in unseen],
                     max_rows=max_rows, on_finish=finished)
            for future in pending:
                future.result()
                if on_finish:
                    on_finish()
        except BaseException:
            judge.stopping = True  # nobody waits for a judge any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    bar.close()
    judge.problem = next(filter(None, gather(judge.problem)), "")  # of any rank
    for rows in gather(written):  # not read again: a shared disk may show another node's files late
        done |= rows
    kept = gather(merge_partials(out, done, questions, threshold, judge) if rank == 0 else None)[0]
    if isinstance(kept, str):
        raise RunError(kept)
    return kept


def question_keys(questions):
    """What tells a question from all others, whatever its place in the file: a digest of what it says and shows."""
    seen, keys = Counter(), []
    for question in questions:
        said = [question.problem, question.solution, question.history, [Path(image).name for image in question.images]]
        digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()
        keys.append(f"{digest}-{seen[digest]}")  # the same question twice is two questions
        seen[digest] += 1
    return keys


def answered(out, sampled, judge):
    """{question key: row} of what every rank has written down, whole and `sampled` alike; the last of each."""
    rows = {}
    for file in sorted(out.parent.glob(f"{out.name}.rank-*.partial")):
        for row in read_jsonl(file):
            if row == sealed(row) and row["sampled"] == sampled:
                again = {} if row["judge"] == judge.name else {"scores": [None] * len(row["answers"])}
                rows[row["key"]] = row | again
    return rows


def merge_partials(out, rows, questions, threshold, judge):
    """Rank 0: of `rows`, see `answered`, one chat JSONL of what was kept, in the order of the questions.

    Returns how many; or a sentence, where too many scores are missing. A wrong answer is not kept,
    whatever its score, where the task can tell: all but general questions, which may ask for prose.
    """
    kept = []
    rows = [(question, key, rows[key]) for question, key in zip(questions, question_keys(questions)) if key in rows]
    wanted, had = (sum(len(row["scores"]) - none * row["scores"].count(None) for *_, row in rows) for none in (0, 1))
    if had < wanted:
        said = f"the judge gave {had} of {wanted} scores ({judge.problem})"
        if had < 0.95 * wanted:
            return f"{said}. All sampled answers are kept; put it right and continue with --resume"
        say(said)
    for question, key, row in rows:
        prose = task_of(question) is TASKS["general"]
        right = [(score, answer) for score, answer in zip(row["scores"], row["answers"])
                 if score is not None and (prose or safe_reward(is_correct, answer, question))]
        score, answer = max(right, key=lambda pair: pair[0], default=(0, ""))  # of equal ones the first
        if score > threshold:
            kept.append({"messages": chat_turns(question, answer), "images": [
                os.path.abspath(image) for image in question.images], "question": key, "score": score,
                "judge": judge.name, "source": question.where})
    write_aside(out, "".join(json.dumps(row) + "\n" for row in kept))
    return len(kept)


def chat_turns(question, answer):
    """A question as it was asked, earlier turns and places of images included, and an answer, as chat messages."""
    turns = with_places([*question.history, ("user", question.problem)], len(question.images))
    return [{"role": role, "content": text} for role, text in (*turns, ("assistant", answer))]


def kept_examples(path, questions):
    """What rejection sampling kept, to fine-tune on: each question as it was asked, with its best answer.

    Paired by what a question says, never by its place. UserError where a kept question is not among `questions`.
    """
    by_key = dict(zip(question_keys(questions), questions))
    rows = gather(read_jsonl(path) if world()[0] == 0 else None)[0]
    if lost := [row for row in rows if row["question"] not in by_key]:
        raise UserError(f"{path} was kept from other questions: {len(lost)} of its {len(rows)} are not among those of "
                        f"now, the first of {lost[0]['source']}. Give the run its questions back")
    return [replace(by_key[row["question"]], solution=row["messages"][-1]["content"]) for row in rows]


# ---- Command line ----

def loaded(args, name):
    """(model, processor, --out): of a run the end of its last stage; `name` beside it, or here if it is of the hub."""
    stages = sorted(Path(args.model).glob("stages/[0-9]*"), key=lambda path: int(path.name.partition("-")[0]))
    out = Path(args.out or (Path(args.model, name) if Path(args.model).is_dir() else name))
    return *load_policy([args.model, *stages][-1], "cuda" if usable_gpu() else "cpu", max_pixels=args.max_pixels), out


def answer(args):
    """Answer one question about any number of images; draw the boxes found on the first."""
    sizes = [inspect_image(image) for image in args.image]  # what cannot be shown is said before weights are loaded
    model, processor, out = loaded(args, "answer.png")
    example = Example(problem=args.question, solution="", task=args.task, form="open", images=tuple(args.image))
    (group,) = generate(model, processor, [processor(example)], 1, args.max_completion_length, args.temperature,
                        args.top_p)
    print(group[0].text)
    boxes = parse_boxes(extract_answer(group[0].text) or "")
    if args.image and boxes:
        size = model_size(sizes[0], processor.max_pixels)  # the pixels that the model speaks of
        save_picture(view(args.image[0], size, [("red", boxes)]), out)
        print(f"{len(boxes)} boxes drawn in {out}", file=sys.stderr)


def evaluate_files(args):
    """Evaluate a checkpoint on test files; print the table and save every prediction."""
    model, processor, out = loaded(args, "predictions.jsonl")
    examples = []
    for path in args.data:
        folder = Path(path).is_dir()
        for split, (form, file) in (find_files(path)["test"] if folder else {Path(path).stem: (None, path)}).items():
            rows = load_examples(file, image_root=args.image_root or (path if folder else None), task=args.task,
                                 form=args.form or form, max_pixels=processor.max_pixels)
            examples += [replace(example, split=split) for example in rows]
    if not examples:
        raise UserError(f"--data {' '.join(args.data)} has no test files; name the files themselves")
    out.parent.mkdir(parents=True, exist_ok=True)
    open(out, "a").close()  # whether it can be written is known before the work
    temperature = args.temperature if args.samples == 1 else args.temperature or 1.0
    splits, predictions = evaluate(model, processor, examples, samples=args.samples, temperature=temperature,
                                   top_p=args.top_p, max_completion_length=args.max_completion_length)
    out.write_text("".join(json.dumps(row) + "\n" for row in predictions), encoding="utf-8")
    print(json.dumps(splits, indent=1))
    print(f"{len(predictions)} predictions in {out}", file=sys.stderr)


@command
def main(argv=None):
    """`answer` and `evaluate`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("answer", help="answer one question, about images or none", allow_abbrev=False)
    one.add_argument("--question", required=True)
    one.add_argument("--image", nargs="*", default=[])
    one.add_argument("--task", choices=TASKS, default="general")
    one.add_argument("--out", help="the image with the boxes found (default: answer.png in --model)")
    files = commands.add_parser("evaluate", help="accuracy and pass@k of a checkpoint", allow_abbrev=False)
    files.add_argument("--data", nargs="+", required=True, help="data directory, as currreft.py's, or files")
    files.add_argument("--image_root", help="what image paths are relative to (default: --data)")
    files.add_argument("--task", nargs="+", help="task of rows that name none: TASK, or NAME=TASK by file")
    files.add_argument("--form", choices=FORMS, help="form of the questions (default: by the file's name)")
    files.add_argument("--samples", type=int, default=1, help="answers to each question; more than 1 give pass@k")
    files.add_argument("--out", help="every answer (default: predictions.jsonl in --model)")
    for each, function in ((one, answer), (files, evaluate_files)):
        each.add_argument("--model", required=True, help="run, checkpoint or hub name")
        each.add_argument("--max_pixels", type=int, help="pixels of an image at most (default: the checkpoint's)")
        each.add_argument("--max_completion_length", type=int, default=512)
        each.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
        each.add_argument("--top_p", type=float, default=1.0, help="sample from so much probability only")
        each.set_defaults(function=function)
    args = parser.parse_args(argv)
    greedy = {"temperature"} if args.temperature == 0 else set()
    check_values({name: value for name, value in vars(args).items() if name not in greedy})
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
