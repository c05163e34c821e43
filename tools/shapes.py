"""Rows as people have them -> the one row that data.py reads. What a shape calls its parts is in the tables below.

    {"problem": text, "solution": text, "history": [(role, text), ..], "images": [path, ..],
     "task": text or None, "form": text or None, "chat": whether it was a list of turns that ends in the answer}

Read are a problem and a solution under any of their names; chats of role/content (OpenAI, TRL, LLaMA-Factory, ms-swift)
or of from/value (LLaVA, Qwen2.5-VL's fine-tuning, VLM-R1, InternVL, Geo170K, MathV360K), their contents as text or as a
list of parts, ending in the answer or in a question whose truth stands beside. What would be left unread and changes
what is asked (a video, a picture under another key, a place for one) is a UserError.
"""

import json
import re

from distributed import UserError
from tools.images import ENDINGS

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
BOX = re.compile(r'("bbox_2d"\s*:\s*)?\[\s*{n}\s*,\s*{n}\s*,\s*{n}\s*,\s*{n}\s*\]'.format(    # (mark, four numbers)
    n=r"(-?\d{1,6}(?:\.\d+)?(?:[eE][+-]?\d{1,2})?)"))


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


# ---- Texts and turns ----

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


# ---- Images ----

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


# ---- Truths in prose ----

def bare(solution: str) -> str:
    """A truth in prose that closes with its answer, as reasoning and answer; any other as it is.

    "3 + 4 = 7. The answer is 7." -> "<think>3 + 4 = 7.</think><answer>7</answer>"; also "#### 7" and "Answer:B".
    """
    match = CLOSING.search(solution, max(0, len(solution) - 300))
    if not match or "<answer>" in solution or "<think>" in solution:
        return solution
    before = solution[:match.start()].strip()
    return (f"<think>{before}</think>" if before else "") + f"<answer>{match[1].strip()}</answer>"
