"""Files of rows: where they lie in a data directory, how they are read, and which form and task a file's name says.

Rows as people have them -> the one row that data.py reads. What a shape calls its parts is in the tables below.

    {"problem": text, "solution": text, "history": [(role, text), ..], "images": [path, ..],
     "task": text or None, "form": text or None, "chat": whether it was a list of turns that ends in the answer}

Read are a problem and a solution under any of their names; chats of role/content (OpenAI, TRL, LLaMA-Factory, ms-swift)
or of from/value (LLaVA, Qwen2.5-VL's fine-tuning, VLM-R1, InternVL, Geo170K, MathV360K), their contents as text or as a
list of parts, ending in the answer or in a question whose truth stands beside. What would be left unread and changes
what is asked (a video, a picture under another key, a place for one) is a UserError.
"""

import json
import os
import re
from pathlib import Path

from support.images import ENDINGS
from support.words import UserError, say

MAX_LINE = 2_000_000                    # characters of a row


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
    root, train, test = Path(data_dir), dict.fromkeys(("binary", "choice", "open")), {}
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


def declared_tasks(text, known) -> dict:
    """{beginning of a file's or folder's name, "" for all others: task, one of `known`} that --task says; or UserError.

    "math RefGTA=detection" -> {"": "math", "refgta": "detection"}
    """
    words = [text or ""] if isinstance(text, str | None) else text
    declared, text = {}, " ".join(map("=".join, text.items()) if isinstance(text, dict) else words)
    for word in re.split(r"[\s,]+", text):
        name, _, task = word.rpartition("=")
        if word and (task not in known or name.lower() in declared):
            raise UserError(f"--task: {word!r} is not TASK, or NAME=TASK for files or folders whose names begin with "
                            f"NAME, said once, where TASK is one of {', '.join(known)}.")
        declared |= {name.lower(): task} if word else {}
    return declared


def file_key(declared: dict, file) -> str:
    """The most exact key of `declared` that speaks of a file, "" if none does."""
    names = (Path(file).stem.lower(), Path(file).parent.name.lower())
    return max((key for key in declared if any(name.startswith(key) for name in names)), key=len, default="")


def row_task(row: dict, file, declared: dict, chat_task=None):
    """A row's own task, else its file's, else a chat's `chat_task`, else that of all rows; else a chat is general."""
    if key := file_key(declared, file):
        return row["task"] or declared[key]
    return row["task"] or row["chat"] and chat_task or declared.get("") or ("general" if row["chat"] else None)


def check_names(declared, paths) -> None:
    """UserError if a NAME of --task NAME=TASK is that of no data file: its rows would get another task."""
    files = [file for path in paths if path for file in (json_files(path) if Path(path).is_dir() else [path])]
    for name in declared:
        if name and not any(file_key({name: ""}, file) for file in files):
            raise UserError(f"--task: no file or folder of the data begins with {name!r}.")


PROBLEMS = ("problem", "question", "query", "prompt")           # the first that a row has
SOLUTIONS = ("solution", "answer", "ground_truth", "response")
TURNS = ("messages", "conversations", "prompt")                 # these as a list of turns
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
IMAGES = ("images", "image", "image_path", "img", "img_path")   # a path or a list of them
FILES = ("file_name", "filename", "path")                       # likewise, if they end as images do
MEDIA_ENDINGS = (*ENDINGS, ".tif", ".tiff", ".heic", ".avif", ".svg", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav",
                 ".mp3")


MEDIA = re.compile(r"(image|img|picture|photo|video|audio)s?_?(path|file|name|url|list|[0-9]{1,3})?s?", re.IGNORECASE)
PLACE = re.compile(r"<(?:video|audio|bbox|ref-object|ref|box|quad|img|image_?[0-9]{1,3}|ImageHere)>")
SPEAKS = re.compile(r"<image>|\b(?:image|picture|photo|figure|diagram)s?\b", re.IGNORECASE)
CLOSING = re.compile(r"(?:####|\b(?:the )?(?:final |correct )?answer(?: is)?:|\bthe (?:final |correct )?answer is)\s*"
                     r"(?:option )?([^\s.][^\n]*?)\.?\s*$", re.IGNORECASE)


def one_row(row) -> dict:
    """A row of any known shape as the one row of the heading; UserError says what it lacks, or what is left unread."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError("the row is not a JSON object {..}.")
    turns, names = turns_of(row)
    spoken = [role for number, (role, _) in enumerate(turns) if number or role != "system"]
    chat = spoken[-1:] == ["assistant"]
    if not spoken or spoken == ["assistant"] or not all(text for _, text in turns) or (
            spoken != (["user", "assistant"] * len(spoken))[:len(spoken)]):
        raise UserError("its turns must alternate user and assistant, none empty, and end with the reference answer, "
                        'or with a question whose "solution" stands beside.')
    *history, (_, problem), (_, solution) = turns if chat else [*turns, ("assistant", text_of(row, SOLUTIONS))]
    if chat and any(row.get(name) is not None for name in SOLUTIONS[:3]):
        chat, solution = False, text_of(row, SOLUTIONS)
    if place := PLACE.search("\n".join([problem, solution, *(text for _, text in history)])):
        raise UserError(f"a text says {place[0]}, and nothing is put in its place; write out what stands there.")
    if odd := [key for key in ("task", "form") if not isinstance(row.get(key), str | None)]:
        raise UserError(f'its "{odd[0]}" is {row[odd[0]]!r}, which is no name.')
    return {"problem": problem, "solution": solution.replace("thinking>", "think>"), "history": history, "chat": chat,
            "images": image_names(row, names, problem), "task": row.get("task"), "form": row.get("form")}


def text_of(row: dict, names) -> str:
    """The text under the first of `names` that the row has; a number or a list as its JSON. Two truths: UserError."""
    texts = {name: value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for name in names if (value := row.get(name)) is not None}
    if not (text := next(iter(texts.values()), "")):
        raise UserError(f'the row has no "{names[0]}" (or {", ".join(names[1:])}), or an empty one.')
    rival = texts.get("answer", texts.get("ground_truth", text)) if names is SOLUTIONS else text
    if inside(text) != inside(rival):
        raise UserError(f'the row has two truths, "solution" {text[:40]!r} and "answer" {rival[:40]!r}; keep one.')
    return text


def inside(text: str) -> str:
    """What stands in the tags of an answer, if it has any."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def turns_of(row: dict) -> tuple[list, list]:
    """([(role, text), ..], [name of an image, ..]) of a row; one of problem and solution is one turn of the user."""
    key = next((key for key in TURNS if isinstance(row.get(key), list)), None)
    key = key or next((key for key in TURNS[:2] if row.get(key)), None)
    if not key:
        return [("user", text_of(row, PROBLEMS))], []
    turns, names = read_turns(row[key], key)
    if key == "prompt" and isinstance(row.get("completion"), list):
        turns += read_turns(row["completion"], "completion")[0]
    return turns, names


def read_turns(turns, key: str) -> tuple[list, list]:
    """The same of a list of turns; the images of a content that is a list of parts stand as <image> in its text."""
    said, names = [], []
    try:
        for turn in turns:
            role, content = turn.get("role") or turn.get("from"), turn["content" if "content" in turn else "value"]
            texts = [read_part(part, names) for part in (content if isinstance(content, list) else [content])]
            said.append((ROLES[role], "".join(texts).strip()))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'"{key}" must be a list of {{"role" or "from": user, assistant or system, "content" or '
                        '"value": text, or a list of parts}.') from error
    return said, names


def read_part(part, names: list) -> str:
    """The text of a part of a content; an image's is <image>, and its name, if the part has one, goes to `names`."""
    if isinstance(part, str):
        return part
    kind = part.get("type") or next(iter(part), None)
    if kind == "text":
        return part["text"]
    if kind not in ("image", "image_url"):
        raise UserError(f"a message has a part of type {str(kind)[:40]!r}; text and images are read.")
    name = part.get("image", part.get("image_url", part.get("url", part.get("path"))))
    names += [name["url"] if isinstance(name, dict) and "url" in name else name] if name else []
    return "<image>"


def image_names(row: dict, named: list, problem: str) -> list:
    """Names of the row's images, those `named` in its turns included. UserError for a picture or video left unread."""
    given = {"its turns": named} if named else {}
    for key, value in row.items():
        file = key in FILES and isinstance(value, str) and value.lower().endswith(MEDIA_ENDINGS)
        if value and (key in IMAGES or file):
            given[key] = value if isinstance(value, list) else [value]
    names = next(iter(given.values()), [])
    for key, others in given.items():
        if [str(name).rpartition("/")[2] for name in others] != [str(name).rpartition("/")[2] for name in names]:
            raise UserError(f'"{next(iter(given))}" and "{key}" name different images; keep one of them.')
    for key, value in row.items():
        if value and key not in given and (MEDIA.fullmatch(key) or not names and names_media(value)):
            raise UserError(f'its "{key}" seems to name a picture, a video or a sound, and is not read; images are '
                            f'named by {", ".join(IMAGES)}. Rename it, or take it out.')
    if not names and any(key in row for key in IMAGES) and SPEAKS.search(problem):
        raise UserError("the question speaks of an image, and the row's is empty; name it, or take the key out.")
    return names


def names_media(value) -> bool:
    """Whether a value is, or lists, the name of a picture, a video or a sound."""
    words = value if isinstance(value, list) else [value]
    return any(isinstance(word, str) and word.lower().endswith(MEDIA_ENDINGS) for word in words)


def bare(solution: str) -> str:
    """A truth in prose that closes with its answer, as reasoning and answer; any other as it is.

    "3 + 4 = 7. The answer is 7." -> "<think>3 + 4 = 7.</think><answer>7</answer>"; also "#### 7" and "Answer:B".
    """
    match = CLOSING.search(solution, max(0, len(solution) - 300))
    if not match or "<answer>" in solution or "<think>" in solution:
        return solution
    before = solution[:match.start()].strip()
    return (f"<think>{before}</think>" if before else "") + f"<answer>{match[1].strip()}</answer>"
