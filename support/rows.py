"""Files of rows: where they lie in a data directory, how they are read, and what their names say."""

import json
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path

from support.shapes import PROBLEMS, TURNS, one_row, option_styles
from support.words import UserError, say

UNPACK, TO_JSON = "unpack it", 'pandas.read_csv(FILE).to_json("open.jsonl", orient="records", lines=True)'
FOREIGN = {  # how files of other kinds become rows
    ".parquet": "python -m tools.convert parquet FILE ..", ".csv": TO_JSON, ".tsv": TO_JSON,
    ".arrow": "datasets.load_from_disk(DIR).to_parquet(FILE), then python -m tools.convert parquet FILE ..",
    ".tar": UNPACK, ".gz": UNPACK, ".tgz": UNPACK, ".zip": UNPACK, ".xml": "python -m tools.convert voc FOLDER ..",
    ".txt": "python -m tools.convert yolo FOLDER .."}


# ---- A data directory ----

def form_of(name: str) -> str:
    """The form that a file name or path speaks of: "judge_val" -> binary; open if of none."""
    words = {*re.split("[^a-z]+", name.lower())}
    closed = "binary" if words & {"binary", "judge"} else "choice" if "choice" in words else ""
    return closed or "open"


def find_files(data_dir) -> dict:
    """A task directory: {"train": {form: path}, "test": {split: (form, path)}, "questions": path}.

    In `data_dir/grpo_data` or `data_dir`: train/{binary|judge,choice,open}, each a .jsonl or .json file or a
    folder of them, and test splits test/**/*.jsonl and train/**/*_test.jsonl; SFT_data/reject or
    questions.jsonl. None where there is none; UserError where there is nothing.
    """
    root, train, test = Path(data_dir), dict.fromkeys(("binary", "choice", "open")), {}
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        raise UserError(f"--data {root} is no folder that can be read.")
    for base in (root, root / "grpo_data"):  # the later and the more exact name wins
        for name in ("judge", "binary", "choice", "open"):
            for path in (base / "train" / f"{name}{ending}" for ending in ("", ".json", ".jsonl")):
                train[form_of(name)] = path if os.path.exists(path) else train[form_of(name)]
        for file in json_files(base / "test") + json_files(base / "train", "**/*_test"):
            split = file.stem if file.stem not in test else f"{file.parent.name}_{file.stem}"
            test[split] = (form_of(str(file.relative_to(base))), file)
    places = (root / "SFT_data" / "reject", root / "questions.jsonl")
    questions = next(filter(os.path.exists, places), None)
    if not (any(train.values()) or test or questions):
        kinds = Counter(path.suffix.lower() for path in islice(root.rglob("*"), 10_000) if path.is_file())
        there = "".join(f"\n    {n} x {kind}: {FOREIGN[kind]}" for kind, n in kinds.items() if kind in FOREIGN)
        raise UserError(f"{root} holds no data: looked in it and in its grpo_data for train/binary.jsonl (or "
                        "judge, choice, open) and test/*.jsonl, for SFT_data/reject/*.jsonl and for "
                        f"questions.jsonl.{' There are' * bool(there)}{there}")
    return {"train": train, "test": test, "questions": questions}


def json_files(folder, name: str = "**/*") -> list[Path]:
    """The .jsonl and .json files of a folder whose names without ending match, sorted."""
    return sorted(file for end in (".jsonl", ".json") for file in Path(folder).glob(name + end))


def declared_tasks(text, known) -> dict:
    """What --task, a text or several, says: {beginning of a file's or folder's name: task}.

    "math RefGTA=detection" -> {"": "math", "refgta": "detection"}. UserError unless one of `known`.
    """
    declared = {}
    for word in re.split(r"[\s,]+", text if isinstance(text, str) else " ".join(text or ())):
        name, _, task = word.rpartition("=")
        if word and (task not in known or name.lower() in declared):
            raise UserError(f"--task: {word!r} is not TASK, or NAME=TASK for files or folders that begin "
                            f"with NAME, said once; TASK is one of {', '.join(known)}.")
        declared |= {name.lower(): task} if word else {}
    return declared


def file_key(declared, file) -> str:
    """The most exact key of `declared` that speaks of a file, "" if none does."""
    names = (Path(file).stem.lower(), Path(file).parent.name.lower())
    keys = (key for key in declared if any(name.startswith(key) for name in names))
    return max(keys, key=len, default="")


def row_task(row: dict, file, declared: dict, known, chat_task=None):
    """A row's own task, else its file's, else a chat's `chat_task`, else that of all others.

    A set's own word for its tasks, "closed choice", is none of the `known` ones, and is told where one is declared.
    """
    named = declared[key] if (key := file_key(declared, file)) else None
    named = named or row["chat"] and chat_task or declared.get("")
    return row["task"] if row["task"] in known or not named else named


def check_names(declared, paths) -> None:
    """UserError if a NAME of --task NAME=TASK is that of no data file: rows get another task."""
    files = [file for path in paths if path for file in json_files(path) or [path]]
    for name in filter(None, declared):
        if not any(file_key({name: ""}, file) for file in files):
            raise UserError(f"--task: no file or folder of the data begins with {name!r}.")


# ---- A file ----

def read_rows(path) -> list[tuple]:
    """[("file:line", row as `one_row` gives it, or a UserError)] of a file, or of a folder but `*_test`.

    A file holds JSON values, each beginning a line; one list of objects; or one object of objects (then the
    number of the object stands for the line). Columns that are not read are told.
    """
    files = [file for file in json_files(path) if not file.stem.endswith("_test")]
    found = []
    for file in files if Path(path).is_dir() else [Path(path)]:
        rows = file_rows(file)
        try:
            styles = option_styles([row for _, row in rows])
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        read = [(f"{file}:{number}", attempt(one_row, row, styles)) for number, row in rows]
        unread = Counter(name for _, row in read if isinstance(row, dict) for name in row["unread"])
        if unread:
            say(f"{file}: not read are the columns {', '.join(unread)}")
        found += read
    return found


def file_rows(file) -> list[tuple]:
    """[(line or number, row or UserError)] of one file."""
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"{file} is no regular file.")
        if advice := FOREIGN.get(file.suffix.lower()):
            raise UserError(f"{file} is no JSON: {advice}")
        text = file.read_text("utf-8-sig")  # any line ends
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read as JSON in UTF-8: {error}.") from error
    rows = json_values(text) or [(n, parsed(x)) for n, x in enumerate(text.split("\n"), 1) if x.strip()]
    whole = rows[0][1] if len(rows) == 1 else None
    if isinstance(whole, dict) and not {*PROBLEMS, *TURNS} & {*whole}:
        if {"images", "annotations"} <= {*whole} or "shapes" in whole:
            raise UserError(f"{file} is an annotation file of the COCO kind (or LabelMe's, which its own tools write "
                            "as COCO); make rows of it with python -m tools.convert.")
        values = list(whole.values())
        lists = [value for value in values if isinstance(value, list) and isinstance((value or [0])[0], dict)]
        if len(lists) == 1:  # {"version": 1, "data": [rows]}
            whole = lists[0]
        elif all(isinstance(value, dict) for value in values):
            whole = values
    return list(enumerate(whole, 1)) if isinstance(whole, list) else rows


def json_values(text: str) -> list[tuple]:
    """[(line it starts on, value)] of JSON values, each beginning a line; [] for any other text."""
    decoder, found, end, line = json.JSONDecoder(), [], 0, 1
    try:
        while start := re.compile(r"\S").search(text, end):
            skipped, begin = text.count("\n", end, start.start()), start.start()
            if found and not skipped:
                return []
            value, end = decoder.raw_decode(text, begin)
            found.append((line + skipped, value))
            line += skipped + text.count("\n", begin, end)
    except (ValueError, RecursionError):
        return []
    return found


def parsed(line: str):
    """The value of one line, or a UserError as a value, so that all broken lines are listed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return UserError(f"broken JSON ({error}).")


def usable_rows(path, results, conventions: list[str], skip: bool) -> list:
    """The values among `results` of a file, [("file:line", value or UserError)].

    UserErrors are raised as one, or with `skip` counted, unless none is left or a file as a whole means
    something else, as the sentences `conventions` say.
    """
    usable = [value for _, value in results if not isinstance(value, UserError)]
    errors = [f"{where}: {error}" for where, error in results if isinstance(error, UserError)]
    if not results:
        raise UserError(f"{path} holds no rows.")
    if conventions or errors and not (skip and usable):
        head = [f"{path}: {len(errors)} of {len(results)} rows cannot be used."] if errors else []
        tail = conventions or ["Correct these rows, or drop them with --skip_bad_rows."]
        raise UserError("\n".join([*head, *first(errors), *tail]))
    if errors:
        say(f"{path}: dropped {len(errors)} of {len(results)} rows, the first {errors[0]}")
    return usable


def first(sentences: list[str], most: int = 20) -> list[str]:
    """The first of many sentences, and how many more there are."""
    more = len(sentences) - most
    return sentences[:most] + ([f".. and {more} more."] if more > 0 else [])


def attempt(function, item, *arguments):
    """function(item, ..), or the UserError that it raises or that `item` is: for all are listed."""
    try:
        return item if isinstance(item, UserError) else function(item, *arguments)
    except UserError as error:
        return error
