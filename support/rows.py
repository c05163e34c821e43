"""Files of rows: where they lie in a data directory, how they are read, and what their names say.

Rows as people have them -> the one row that data.py reads; tables tell what each part is called.

    {"problem": text, "solution": text, "history": [(role, text), ..], "images": [path, ..],
     "task": text or None, "form": text or None, "chat": were they turns that end in the answer?}

Read are problem and solution under any of their names, and chats of role/content (OpenAI, TRL, LLaMA-Factory,
ms-swift) or from/value (LLaVA, Qwen2.5-VL's fine-tuning, VLM-R1, InternVL, Geo170K, MathV360K), contents as
text or as a list of parts, ending in the answer or in a question with its truth beside. What would be left
unread and changes what is asked (a video, a picture under another key, a place for one) is a UserError.
"""

import json
import os
import re
from pathlib import Path

from support.answers import extract_answer
from support.images import ENDINGS
from support.words import UserError, say

PROBLEMS = ("problem", "question", "query", "prompt")  # the first that a row has
SOLUTIONS = ("solution", "answer", "ground_truth", "response")
TURNS = ("messages", "conversations", "prompt")  # these as a list of turns
ROLES = {"human": "user", "gpt": "assistant"} | {x: x for x in ("user", "assistant", "system")}
IMAGES = ("images", "image", "image_path", "img", "img_path")  # a path or a list of them
FILES = ("file_name", "filename", "path")  # likewise, if they end as images do
UNREAD = ".tif .tiff .heic .avif .svg .mp4 .avi .mov .mkv .webm .wav .mp3"
MEDIA_ENDINGS = (*ENDINGS, *UNREAD.split())
MEDIA = re.compile(r"(?i)(image|img|picture|photo|video|audio)s?_?(path|file|name|url|list|[0-9]{1,3})?s?")
PLACE = re.compile(r"<(?:video|audio|bbox|ref-object|ref|box|quad|img|image_?\d{1,3}|ImageHere)>")
SPEAKS = re.compile(r"(?i)<image>|\b(?:image|picture|photo|figure|diagram)s?\b")
CLOSING = re.compile(r"(?i)(?:####|\b(?:the )?(?:final |correct )?answer(?: is)?:|\bthe (?:final |correct )?"
                     r"answer is)\s*(?:option )?([^\s.][^\n]*?)\.?\s*$")


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
        raise UserError(f"{root} holds no data: looked in it and in its grpo_data for train/binary.jsonl (or "
                        "judge, choice, open) and test/*.jsonl, for SFT_data/reject/*.jsonl and for "
                        "questions.jsonl.")
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


def row_task(row: dict, file, declared: dict, chat_task=None):
    """A row's own task, else its file's, else a chat's `chat_task`, else that of all others."""
    named = declared[key] if (key := file_key(declared, file)) else None
    return row["task"] or named or row["chat"] and chat_task or declared.get("")


def check_names(declared, paths) -> None:
    """UserError if a NAME of --task NAME=TASK is that of no data file: rows get another task."""
    files = [file for path in paths if path for file in json_files(path) or [path]]
    for name in filter(None, declared):
        if not any(file_key({name: ""}, file) for file in files):
            raise UserError(f"--task: no file or folder of the data begins with {name!r}.")


# ---- A file ----

def read_rows(path) -> list[tuple]:
    """[("file:line", row, or a UserError for a broken one)] of a file, or of a folder but `*_test`.

    A file holds JSON values, each beginning a line; one list of objects; or one object of objects (then the
    number of the object stands for the line).
    """
    files = [file for file in json_files(path) if not file.stem.endswith("_test")]
    files = files if Path(path).is_dir() else [Path(path)]
    return [(f"{file}:{number}", row) for file in files for number, row in file_rows(file)]


def file_rows(file) -> list[tuple]:
    """[(line or number, row or UserError)] of one file."""
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"{file} is no regular file.")
        text = file.read_text("utf-8-sig")  # any line ends
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file} cannot be read as JSON in UTF-8: {error}.") from error
    rows = json_values(text) or [(n, parsed(x)) for n, x in enumerate(text.split("\n"), 1) if x.strip()]
    whole = rows[0][1] if len(rows) == 1 else None
    if isinstance(whole, dict) and not {*PROBLEMS, *TURNS} & {*whole}:
        if {"images", "annotations"} <= {*whole}:
            raise UserError(f"{file} is an annotation file of the COCO kind; make rows of it with python -m "
                            "tools.convert.")
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


def usable_rows(path, results, convention: str, skip: bool) -> list:
    """The values among `results` of a file, [("file:line", value or UserError)].

    UserErrors are raised as one, or with `skip` counted, unless none is left or the file as a whole seems to
    mean something else, as the sentence `convention` says.
    """
    usable = [value for _, value in results if not isinstance(value, UserError)]
    errors = [f"{where}: {error}" for where, error in results if isinstance(error, UserError)]
    if not results:
        raise UserError(f"{path} holds no rows.")
    if errors and (convention or not skip or not usable):
        head = f"{path}: {len(errors)} of {len(results)} rows cannot be used."
        tail = convention or "Correct these rows, or drop them with --skip_bad_rows."
        raise UserError("\n".join([head, *first(errors), tail]))
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


# ---- A row ----

def one_row(row) -> dict:
    """A row of any known shape as the one of the heading; else a UserError says what is wrong."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError("the row is not a JSON object {..}.")
    turns, names = turns_of(row)
    spoken = [role for number, (role, _) in enumerate(turns) if number or role != "system"]
    alternating = (["user", "assistant"] * len(spoken))[:len(spoken)]
    if spoken in ([], ["assistant"]) or spoken != alternating or not all(text for _, text in turns):
        raise UserError("its turns must alternate user and assistant, none empty, and end with the reference "
                        'answer, or with a question whose "solution" stands beside.')
    chat = answered = spoken[-1] == "assistant"
    if not answered or any(row.get(name) is not None for name in SOLUTIONS[:3]):
        chat, solution = False, text_of(row, SOLUTIONS)
        turns = [*turns[:len(turns) - answered], ("assistant", solution)]
    *history, (_, problem), (_, solution) = turns
    if place := PLACE.search("\n".join(text for _, text in turns)):
        raise UserError(f"a text says {place[0]}, and nothing is put there; write it out.")
    task, form = row.get("task"), row.get("form")
    if not isinstance(task, str | None) or not isinstance(form, str | None):
        raise UserError(f'its "task" {task!r} or its "form" {form!r} is no name.')
    images, solution = image_names(row, names, problem), solution.replace("thinking>", "think>")
    return {"problem": problem, "solution": solution, "chat": chat, "images": images, "history": history,
            "task": task, "form": form}


def text_of(row: dict, names) -> str:
    """The text under the first of `names` that the row has; a number or a list as its JSON."""
    values = {name: row[name] for name in names if row.get(name) is not None}
    texts = [value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for value in values.values()]
    if not texts or not texts[0]:
        raise UserError(f'it has no "{names[0]}" (or {", ".join(names[1:])}), or an empty one.')
    rivals = [text for name, text in zip(values, texts) if name in SOLUTIONS[:3]]
    if len({extract_answer(text) or text for text in rivals}) > 1:
        raise UserError(f'it has two truths, "{rivals[0][:40]}" and "{rivals[1][:40]}"; keep one.')
    return texts[0]


def turns_of(row: dict) -> tuple[list, list]:
    """([(role, text), ..], [image, ..]) of a row; of problem and solution one turn of the user."""
    lists = [key for key in TURNS if isinstance(row.get(key), list)]
    if not (keys := lists + [key for key in TURNS[:2] if row.get(key)]):
        return [("user", text_of(row, PROBLEMS))], []
    turns, names = read_turns(row[keys[0]], keys[0])
    if keys[0] == "prompt" and isinstance(row.get("completion"), list):
        turns += read_turns(row["completion"], "completion")[0]
    return turns, names


def read_turns(turns, key: str) -> tuple[list, list]:
    """The same of a list of turns; images in a list of parts stand as <image> in its text."""
    read, names = [], []
    try:
        for turn in turns:
            content = turn["content" if "content" in turn else "value"]
            parts = content if isinstance(content, list) else [content]
            text = "".join(read_part(part, names) for part in parts).strip()
            read.append((ROLES[turn.get("role") or turn.get("from")], text))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'"{key}" must be a list of {{"role" or "from": user, assistant or system, "content" '
                        'or "value": text, or a list of parts}.') from error
    return read, names


def read_part(part, names: list) -> str:
    """A part's text; an image's is <image>, and its name, if the part has one, goes to `names`."""
    if isinstance(part, str):
        return part
    part_type = part.get("type") or next(iter(part), None)
    if part_type == "text":
        return part["text"]
    if part_type not in ("image", "image_url"):
        raise UserError(f"a message has a part of type {str(part_type)[:40]!r}, no text or image.")
    name = part.get("image", part.get("image_url", part.get("url", part.get("path"))))
    names += [name["url"] if isinstance(name, dict) and "url" in name else name] if name else []
    return "<image>"


def image_names(row: dict, named: list, problem: str) -> list:
    """Names of the row's images, those `named` in its turns included; UserError for one unread."""
    given = {"its turns": named} if named else {}
    given |= {key: value if isinstance(value, list) else [value] for key, value in row.items()
              if value and (key in IMAGES or key in FILES and names_media(value))}
    names = next(iter(given.values()), [])
    last = [[str(name).rpartition("/")[2] for name in others] for others in given.values()]
    if any(others != last[0] for others in last):
        raise UserError(f'{" and ".join(given)} name different images; keep one of them.')
    for key, value in row.items():
        unread = MEDIA.fullmatch(key) or not names and names_media(value)
        if value and key not in given and unread:
            raise UserError(f'its "{key}" seems to name a picture, a video or a sound, and is not read; '
                            f'{", ".join(IMAGES)} name images. Rename it, or take it out.')
    if not names and any(key in row for key in IMAGES) and SPEAKS.search(problem):
        raise UserError("it speaks of an image that is empty; name it, or take the key out.")
    return names


def names_media(value) -> bool:
    """Whether a value is, or lists, the name of a picture, a video or a sound."""
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and name.lower().endswith(MEDIA_ENDINGS) for name in names)


def bare(solution: str) -> str:
    """A truth in prose that closes with its answer, as reasoning and answer; any other as it is.

    "3 + 4 = 7. The answer is 7." -> "<think>3 + 4 = 7.</think><answer>7</answer>"; also "#### 7".
    """
    match = CLOSING.search(solution, max(0, len(solution) - 300))
    if not match or "<answer>" in solution or "<think>" in solution:
        return solution
    before = solution[:match.start()].strip()
    return (f"<think>{before}</think>" if before else "") + f"<answer>{match[1].strip()}</answer>"
