"""Files of rows: where they lie in a data directory, how they are read, and which form and task a file's name says."""

import json
import os
import re
from pathlib import Path

from distributed import UserError, say
from tasks import CLOSED, TASKS
from tools.shapes import PROBLEMS, TURNS

MAX_LINE = 2_000_000                    # characters of a row


# ---- A data directory ----

def form_of(name: str) -> str:
    """The form that a file name or path speaks of: "judge_val" -> binary; open if of none."""
    words = re.split(r"[^a-z]+", name.lower())
    return "binary" if "binary" in words or "judge" in words else "choice" if "choice" in words else "open"


def find_files(data_dir) -> dict:
    """What a task directory holds: {"train": {form: path}, "test": {split: (form, path)}, "questions": path}.

    In `data_dir/grpo_data` or `data_dir`: train/{binary|judge,choice,open}, each a .jsonl or .json file or a folder of
    them, and test splits test/**/*.jsonl and train/**/*_test.jsonl; SFT_data/reject or questions.jsonl. None where
    there is none; UserError where there is nothing at all.
    """
    root, train, test = Path(data_dir), dict.fromkeys((*CLOSED, "open")), {}
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"--data {root} is no folder that can be read.")
    for base in (root, root / "grpo_data"):             # the later and the more exact name wins
        for name in ("judge", "binary", "choice", "open"):
            names = (base / "train" / f"{name}{ending}" for ending in ("", ".json", ".jsonl"))
            found = [path for path in names if os.path.exists(path)]
            train[form_of(name)] = found[-1] if found else train[form_of(name)]
        for file in json_files(base / "test") + json_files(base / "train", "**/*_test"):
            split = file.stem if file.stem not in test else f"{file.parent.name}_{file.stem}"
            test[split] = (form_of(str(file.relative_to(base))), file)
    questions = [path for path in (root / "questions.jsonl", root / "SFT_data" / "reject") if os.path.exists(path)]
    if not (any(train.values()) or test or questions):
        raise UserError(f"{root} holds no data: looked in it and in its grpo_data for train/binary.jsonl (or judge, "
                        "choice, open) and test/*.jsonl, and for SFT_data/reject/*.jsonl and questions.jsonl.")
    return {"train": train, "test": test, "questions": questions[-1] if questions else None}


# ---- Rows of files ----

def json_files(folder, name: str = "**/*") -> list[Path]:
    """The .jsonl and .json files of a folder whose names without ending match, sorted."""
    return sorted(file for ending in (".jsonl", ".json") for file in Path(folder).glob(name + ending))


def read_rows(path) -> list[tuple]:
    """[("file:line", row, or the UserError that stands for a broken one)]; of a folder, all files but `*_test`.

    JSON lines, JSON objects one after the other over any lines, one list of objects, or one object of objects (then
    the number of the object stands for the line).
    """
    path = Path(path)
    files = [file for file in json_files(path) if not file.stem.endswith("_test")] if path.is_dir() else [path]
    return [(f"{file}:{number}", row) for file in files for number, row in file_rows(file)]


def file_rows(file) -> list[tuple]:
    """[(line or number, row or UserError)] of one file."""
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"{file} is no regular file.")
        text = file.read_text("utf-8-sig")              # any line ends
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), 1))
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON in UTF-8: {error}.") from error
    rows = [(number, parsed(line)) for number, line in lines]
    if rows and isinstance(rows[0][1], UserError) and len(lines[0][1]) < MAX_LINE and (spread := objects(text)):
        rows = spread                                   # objects over several lines
    if len(rows) != 1 or not isinstance(table := rows[0][1], dict) or {*PROBLEMS, *TURNS} & set(table):
        return rows
    if {"images", "annotations"} <= set(table):
        raise UserError(f"{file} is an annotation file of the COCO kind; make rows of it with python -m tools.convert.")
    lists = [value for value in table.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:                                 # {"version": 1, "data": [rows]}
        return list(enumerate(lists[0], 1))
    return list(enumerate(table.values(), 1)) if all(isinstance(value, dict) for value in table.values()) else rows


def parsed(line: str):
    """The object of one line, or a UserError as a value, so that all broken lines are told together."""
    if len(line) > MAX_LINE:
        return UserError(f"the row has {len(line):,} characters; a question is text, and names images by their paths.")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"broken JSON ({error}).")


def objects(text: str) -> list[tuple]:
    """[(line it starts on, value)] of JSON values one after the other; [] if the text is anything else."""
    decoder, found, end = json.JSONDecoder(), [], 0
    while start := re.compile(r"\S").search(text, end):
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return []
        found.append((text.count("\n", 0, start.start()) + 1, value))
    return found


def tell_faults(path, faults: list[str], count: int, doubt: str, skip: bool) -> None:
    """UserError that lists the faults of a file of `count` rows; with `skip`, and no doubt about the file, one line."""
    if not count:
        raise UserError(f"{path} holds no rows.")
    if faults and (doubt or not skip):
        more = [f".. and {len(faults) - 20} more."] if len(faults) > 20 else []
        raise UserError("\n".join([f"{path}: {len(faults)} of {count} rows cannot be used.", *faults[:20], *more,
                                   doubt or "Correct these rows, or drop them with --skip_bad_rows."]))
    if faults:
        say(f"{path}: dropped {len(faults)} of {count} rows, the first {faults[0]}")


# ---- Tasks by file: --task ----

def declared_tasks(text) -> dict:
    """{beginning of a file's or folder's name, "" for all others: task} that --task says; UserError for nonsense.

    "math RefGTA=detection" -> {"": "math", "refgta": "detection"}
    """
    words = [text or ""] if isinstance(text, str | None) else text
    declared, text = {}, " ".join(map("=".join, text.items()) if isinstance(text, dict) else words)
    for word in re.split(r"[\s,]+", text):
        name, _, task = word.rpartition("=")
        if word and (task not in TASKS or name.lower() in declared):
            raise UserError(f"--task: {word!r} is not TASK, or NAME=TASK for files or folders whose names begin with "
                            f"NAME, said once, where TASK is one of {', '.join(TASKS)}.")
        declared |= {name.lower(): task} if word else {}
    return declared


def file_key(declared: dict, file) -> str:
    """The most exact key of `declared` that speaks of a file, "" if none does."""
    names = (Path(file).stem.lower(), Path(file).parent.name.lower())
    return max((key for key in declared if any(name.startswith(key) for name in names)), key=len, default="")


def task_of(row: dict, file, declared: dict, chat_task=None):
    """A row's own task, else its file's, else a chat's `chat_task`, else that of all rows; else a chat is general."""
    if key := file_key(declared, file):
        return row["task"] or declared[key]
    return row["task"] or row["chat"] and chat_task or declared.get("") or ("general" if row["chat"] else None)


def check_names(task, paths) -> None:
    """UserError if a NAME of --task NAME=TASK is that of no data file: its rows would get another task."""
    files = [file for path in paths if path for file in (json_files(path) if Path(path).is_dir() else [path])]
    for name in declared_tasks(task):
        if name and not any(file_key({name: ""}, file) for file in files):
            raise UserError(f"--task: no file or folder of the data begins with {name!r}.")
