"""A row as people have it -> the one row that data.py reads. What is read is taken out; what is left is told.

    {"problem": text, "solution": text, "history": [(role, text), ..], "images": [path, ..],
     "task": text or None, "form": text or None, "box_format": text or None,
     "chat": were they turns that end in the answer?, "unread": names of columns that may say more}

Read are problem and solution under any of their names, with options, context, system and history beside them;
and chats of role/content (OpenAI, TRL, verl, LLaMA-Factory, ms-swift) or from/value (LLaVA, Qwen2.5-VL's
fine-tuning, VLM-R1, InternVL, Geo170K, MathV360K), contents as text or as a list of parts, ending in the answer
or in a question with its truth beside. What changes the question and cannot be read is a UserError.
"""

import ast
import json
import re
import string
from collections import Counter

from support.answers import extract_answer, parse_letters
from support.images import ENDINGS
from support.words import UserError

PROBLEMS = ("problem", "question", "query", "instruction", "input", "prompt")  # the first that a row has
SOLUTIONS = (  # the first that a row has
    "solution", "answer", "ground_truth", "correct_answer", "answerKey", "gt_answer", "final_answer", "gt", "correct_option",
    "correct_choice", "correct_choice_idx", "multiple_choice_answer", "label", "target", "response", "output",
    "completion", "answers")
RIVALS = SOLUTIONS[:5]  # each of which is meant as the truth
TURNS = ("messages", "conversations", "conversation", "message", "prompt")  # as a list of turns, or its JSON
ROLES = {"human": "user", "gpt": "assistant"} | {x: x for x in ("user", "assistant", "system")}
CONTEXTS = (  # said before the question
    "context", "hint", "passage", "paragraph", "article", "document", "story", "background", "premise", "facts")
IMAGES = ("images", "image", "image_path", "img", "img_path")  # a path or a list of them
FILES = ("file_name", "filename", "path", "image_filename", "image_file", "image_name", "img_name", "imgname")
IMAGE_IDS = ("image_id", "imageId", "img_id", "imgid")  # the name of a file without its ending
NUMBERED = re.compile(r"(?:image|img|picture)_?([0-9]{1,2})")  # one of several
OPTION_KEYS = re.compile(r"(?i)(?:(?:answer|mc|multiple|question|text)_)?(?:choices?|options?|candidates|alternatives)"
                         r"(?:_(?:list|texts?|en|zh))?")
ONE_OPTION = re.compile(r"(?:(?i:option|choice|opt|op|candidate|alternative)[_ ]?)?([A-Ja-j0-9])")
LETTER = re.compile(r"\(?[A-Ja-j][.):]?\)?")  # an option without a text: it is said elsewhere
LETTERED = re.compile(r"(?:^|(?<=\s))\(?[A-J][.):]\)?\s")  # "(A) 30" or "A. 30"
LETTERS = string.ascii_uppercase
STYLES = ("letter", "text", "index", "number")  # how a truth names an option; an index counts from 0
NEUTRAL = re.compile(  # what says nothing of the question
    r"(?i)(?:.*_)?(?:ids?|idx|index|uid|uuid|pid|qid|key|source|dataset|url|link|license|split|subset|category|"
    r"topic|subject|subfield|grade|level|difficulty|skill|domain|field|ability|language|lang|width|height|size|"
    r"area|date|author|version|types?|metadata|meta|info|tags?|comments?|notes?|year|score|confidence)")
UNREAD = ".tif .tiff .heic .avif .svg .mp4 .avi .mov .mkv .webm .wav .mp3"
MEDIA_ENDINGS = (*ENDINGS, *UNREAD.split())
MEDIA = re.compile(r"(?i)(image|img|picture|photo|video|audio)s?_?(path|file|name|url|list|[0-9]{1,3})?s?")
TAG = re.compile(r"<image[ _]?([0-9]{1,2})>")  # a place for one of several images
PLACE = re.compile(r"<(?:video|audio|bbox|ref-object|ref|box|quad|img|ImageHere)>")
SPEAKS = re.compile(r"(?i)<image>|\b(?:image|picture|photo|figure|diagram)s?\b")
CLOSING = re.compile(r"(?i)(?:####|\b(?:the )?(?:final |correct )?answer(?: is)?:|\bthe (?:final |correct )?"
                     r"answer is)\s*(?:option )?([^\s.][^\n]*?)\.?\s*$")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}\W*$")


def one_row(row, styles=STYLES) -> dict:
    """A row of any known shape as the one of the heading; styles: how truths name options, the likeliest first.

    UserError if it is none, or holds what changes the question and is not read.
    """
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError("the row is not a JSON object {..}.")
    left = filled(row)
    turns, names = take_turns(left)
    spoken = [role for number, (role, _) in enumerate(turns) if number or role != "system"]
    alternating = (["user", "assistant"] * len(spoken))[:len(spoken)]
    if spoken in ([], ["assistant"]) or spoken != alternating or not all(text for _, text in turns):
        raise UserError("its turns must alternate user and assistant, none empty, and end with the reference "
                        'answer, or with a question whose "solution" stands beside.')
    chat, options = spoken[-1] == "assistant", take_options(left)
    if isinstance(left.get("reward_model"), dict):  # verl
        left["ground_truth"] = left.pop("reward_model").get("ground_truth")
    if any(name in left for name in RIVALS) or not chat:
        turns = turns[:len(turns) - chat] + [("assistant", take_truth(left, options, styles))]
        chat = False
    *history, (_, problem), (_, solution) = turns
    if options and all(map(LETTER.fullmatch, options)):  # their texts are said elsewhere
        fuller = [name for name in PROBLEMS if isinstance(left.get(name), str) and problem in left[name]]
        problem, options = (left.pop(fuller[0]), []) if fuller else (problem, options)
    problem = "\n".join([*take_contexts(left, problem), problem])
    if not all(re.search(rf"(?<![A-Za-z]){letter}[\s.):]*{re.escape(text)}", problem)
               for letter, text in zip(LETTERS, options)):  # they are not listed in it already
        problem = "\n".join([problem, *(f"{letter}. {text}" for letter, text in zip(LETTERS, options))])
    named = {name: left.pop(name, None) for name in ("task", "form", "box_format")}
    if not all(isinstance(name, str | None) for name in named.values()):
        raise UserError(f'its "task" {named["task"]!r} or its "form" {named["form"]!r} is no name.')
    images = take_images(left, names)
    if not images and any(name in row for name in IMAGES) and SPEAKS.search(problem):
        raise UserError("it speaks of an image that is empty; name it, or take the key out.")
    texts, images = with_plain_places([*(text for _, text in history), problem], images)
    if place := PLACE.search("\n".join([*texts, solution])):
        raise UserError(f"a text says {place[0]}, and nothing is put there; write it out.")
    return named | {
        "problem": texts[-1], "solution": solution.replace("thinking>", "think>"), "chat": chat, "images": images,
        "history": [(role, text) for (role, _), text in zip(history, texts)],
        "unread": [name for name in left if not NEUTRAL.fullmatch(name)]}


def filled(row: dict) -> dict:
    """The columns of a row that hold something: no null, NaN or empty text."""
    return {name: value for name, value in row.items() if value == value and value not in (None, "", [], {})}


# ---- The question ----

def take_turns(left: dict) -> tuple[list, list]:
    """([(role, text), ..], [image, ..]) of a row; of problem and solution one turn of the user."""
    key = next((key for key in TURNS if key in TURNS[:2] and key in left or chat_of(left.get(key))), None)
    if key:
        turns, names = read_turns(chat_of(left.pop(key)), key)
        if isinstance(left.get("completion"), list):
            turns += read_turns(left.pop("completion"), "completion")[0]
    else:
        if {"instruction", "input"} <= {*left}:  # alpaca
            left["instruction"] = f'{left["instruction"]}\n{left.pop("input")}'
        key = next((key for key in PROBLEMS if key in left), PROBLEMS[0])
        if isinstance(left.get(key), list | dict) and not isinstance(left[key], str):
            raise UserError(f'its "{key}" is no text: {str(left[key])[:80]}')
        turns, names = [("user", text_of(left, key, PROBLEMS))], []
        del left[key]
    asked = "".join("".join(text.split()) for role, text in turns if role == "user")
    for other in PROBLEMS:
        text = "".join(left[other].split()) if isinstance(left.get(other), str) else ""
        if text not in asked and asked not in text and " " in left[other].strip():  # a key is no question
            raise UserError(f'"{key}" and "{other}" ask different things; keep one of them.')
        if text and text in asked:
            del left[other]
    earlier, system = left.pop("history", []), left.pop("system", None) or left.pop("system_prompt", None)
    if isinstance(earlier, list) and all(isinstance(turn, dict) for turn in earlier):
        before, shown = read_turns(earlier, "history")
        earlier, turns, names = [], before + turns, shown + names
    if not (isinstance(earlier, list) and all(isinstance(pair, list) and [*map(type, pair)] == [str, str]
                                              for pair in earlier)):
        raise UserError('its "history" must be a list of [question, answer].')
    turns = [turn for pair in earlier for turn in zip(("user", "assistant"), pair)] + turns
    if system:
        turns = [("system", str(system)), *(turn for turn in turns if turn[0] != "system")]
    return turns, names


def text_of(left: dict, key, names) -> str:
    """The text under a key; a number or a list as its JSON; UserError without one."""
    value = left.get(key)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if value is None or not text:
        raise UserError(f'it has no "{names[0]}" (or {", ".join(names[1:])}), or an empty one; its columns are '
                        f'{", ".join(left)[:200]}.')
    return text


def chat_of(value):
    """A list of turns, also from its JSON in a text; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("[") and "role" in value + "from":
        value = literal(value)
    return value if isinstance(value, list) else None


def literal(text):
    """The value of a text in JSON or as Python prints it, else the text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def read_turns(turns, key: str) -> tuple[list, list]:
    """([(role, text), ..], [image, ..]); images in a list of parts stand as <image> in its text."""
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


def take_contexts(left: dict, problem: str) -> list[str]:
    """What is said before the question, and is not in it."""
    texts = [left.pop(name) for name in CONTEXTS if name in left]
    texts = [line for text in texts for line in (text if isinstance(text, list) else [text])]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"its {' or '.join(CONTEXTS)} is no text; write it into the question, or take it out.")
    return [text.strip() for text in texts if text.strip() not in problem]


# ---- Options, and the truth that names one ----

def take_options(left: dict) -> list[str]:
    """The texts of a row's options, in the order of their letters; [] without any."""
    named = {name: read_options(left[name]) for name in left
             if OPTION_KEYS.fullmatch(name) and not isinstance(left[name], int | float)}
    found = {name: ONE_OPTION.fullmatch(name)[1].upper() for name in left
             if ONE_OPTION.fullmatch(name) and (len(name) > 1 or name.isupper())}
    letters = sorted(found, key=found.get)
    if len(found) > 1 and found[letters[0]] in "A01" and not named:
        named = {letters[0]: read_options({found[name]: left[name] for name in letters})}
    else:
        letters = []
    options = next(iter(named.values()), [])
    if any(texts != options for texts in named.values()) or len(options) > len(LETTERS):
        raise UserError(f"its {' and '.join(named)} hold different options, or more than {len(LETTERS)}.")
    for name in (*named, *letters):
        left.pop(name, None)
    return options


def read_options(value) -> list[str]:
    """Texts of a list, an object, their JSON, or a text with an option a line; without their own letters."""
    value = literal(value) if isinstance(value, str) else value
    if isinstance(value, str):
        found = [part.strip(" ,;\n") for part in LETTERED.split(value)][1:] or re.split(r"\n|[;|]", value)
        value = found if len(found) > 1 else value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(item.get("label")): item.get("text") for item in value}  # [{"label": "A", "text": "a dog"}]
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # {"label": ["A"], "text": ["a dog"]}
        value = dict(zip(map(str, value.get("label", ())), value["text"]))
    if isinstance(value, dict):  # {"A": "a dog"}
        value = {str(key): text for key, text in value.items() if text not in (None, "")}
        keys, n = sorted(value, key=lambda key: (len(key), key)), len(value)
        numbered = [str(key + 1) for key in range(n)]
        if keys in (numbered, [str(key) for key in range(n)], [*LETTERS[:n].lower()], [*LETTERS[:n]]):
            texts = read_options([value[key] for key in keys])
            return Numbered(texts) if keys == numbered else texts
    if isinstance(value, list):
        texts = [" ".join(str(item).split()) for item in value if item is not None and item == item]
        own = {text[match.start():match.end()].strip("(.:) "): text[match.end():] for text in texts
               if (match := LETTERED.match(text))}
        if len(own) == len(texts) and sorted(own) == [*LETTERS[:len(own)]]:
            texts = [own[letter] for letter in sorted(own)]
        sound = all(isinstance(item, str | int | float | None) for item in value) and not names_media(value)
        if sound and len(texts) != 1 and len(own) in (0, len(texts)):
            return texts
    raise UserError(f"its options {str(value)[:80]!r} are no list of texts; write them into the question.")


class Numbered(list):
    """Options whose keys are 1, 2, ..: a truth in digits is such a key."""


def take_truth(left: dict, options, styles) -> str:
    """The truth of a row, the letter of an option where there are such; UserError for none or two."""
    given = [name for name in SOLUTIONS if name in left]
    texts = {name: text_of(left, name, SOLUTIONS) for name in given or SOLUTIONS[:1]}
    for name in given if options else ():
        if found := named_options(left[name], options):
            del left[name]
            return next(found[style] for style in (*styles, *STYLES) if style in found)
    if options:
        raise UserError(f'its truth "{texts[given[0]][:80]}" names none of its options, {", ".join(options)[:200]}.')
    if given == ["answers"]:
        left["answers (but the most frequent)"] = left["answers"]
        return most_frequent(left.pop("answers"))
    rivals = {name: texts[name] for name in RIVALS if name in texts} or {given[0]: texts[given[0]]}
    said = {name: extract_answer(bare(text)) or text for name, text in rivals.items()}
    short = min(said.values(), key=len)
    if any(text != short and not (len(text.split()) > 3 and said_in(short, text)) for text in said.values()):
        one, two = list(rivals.values())[:2]
        raise UserError(f'it has two truths, "{one[:40]}" and "{two[:40]}"; keep one.')
    for name in rivals:
        del left[name]
    return max((rivals[name] for name in rivals if said[name] == short), key=len)


def said_in(short: str, text: str) -> bool:
    """Whether a text holds a short one as words of its own."""
    return re.search(rf"(?<!\w){re.escape(short)}(?!\w)", text) is not None


def most_frequent(answers) -> str:
    """Of a list of acceptable answers the one that most people gave."""
    answers = answers if isinstance(answers, list) else [answers]
    texts = [item.get("answer") if isinstance(item, dict) else item for item in answers]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError('its "answers" are no list of texts; keep the one that is right, as "answer".')
    return Counter(text.strip() for text in texts).most_common(1)[0][0]


def named_options(value, options) -> dict[str, str]:
    """{style: letters} of each of STYLES in which a truth names some of the options."""
    if isinstance(value, list):
        parts = [named_options(item, options) for item in value]
        if len({*map(str, value)}) < len(value):  # [0, 1, 0, 0]
            return {}
        return {style: ", ".join(part[style] for part in parts) for style in STYLES
                if all(style in part for part in parts)}
    text = extract_answer(bare(str(value))) or str(value).strip()
    found, letters = {}, parse_letters(text) or set()
    if letters and letters <= {*LETTERS[:len(options)]}:
        found["letter"] = ", ".join(sorted(letters))
    same = [n for n, option in enumerate(options) if option.lower() == text.lower()]
    if len(same) == 1:
        found["text"] = LETTERS[same[0]]
    if text.isdecimal() and len(text) < 3 and not isinstance(value, bool):
        for style, first in (("index", 0), ("number", 1))[isinstance(options, Numbered):]:
            if 0 <= int(text) - first < len(options):
                found[style] = LETTERS[int(text) - first]
    return found


def option_styles(rows) -> tuple:
    """STYLES, those by which most truths of a file's rows name an option first; UserError where two fit."""
    found = []
    for row in (filled(row) for row in rows if isinstance(row, dict)):
        try:
            options = take_options(row)
        except UserError:  # which is told where the row is read
            continue
        found += [named for name in SOLUTIONS if options and name in row
                  and (named := named_options(row[name], options))][:1]
    count = Counter(style for named in found for style in named)
    styles = sorted(STYLES, key=lambda style: -count[style])
    first, second = styles[0], next(style for style in styles[1:] if style != "number")
    clash = any(named[first] != named[second] for named in found if {first, second} <= {*named})
    if clash and count[first] == count[second]:
        raise UserError(f"its truths may be the options' {first} or {second}; write letters.")
    return tuple(styles)


def bare(solution: str) -> str:
    r"""A truth in prose that closes with its answer, as reasoning and answer; any other as it is.

    "3 + 4 = 7. The answer is 7." -> "<think>3 + 4 = 7.</think><answer>7</answer>"; also "#### 7", "\boxed{7}".
    """
    if "<answer>" in solution or "<think>" in solution:
        return solution
    start = max(0, len(solution) - 300)
    if boxed := BOXED.search(solution, start):
        before, answer = solution.strip() if boxed.start() else "", boxed[1]
    elif match := CLOSING.search(solution, start):
        before, answer = solution[:match.start()].strip(), match[1]
    else:
        return solution
    return (f"<think>{before}</think>" if before else "") + f"<answer>{answer.strip()}</answer>"


# ---- Its images ----

def take_images(left: dict, named: list) -> list:
    """Names of the row's images, those `named` in its turns included; UserError for one unread."""
    given = {"its turns": named} if named else {}
    for key in [key for key in left if key in IMAGES or key in FILES and names_media(left[key])]:
        value = left.pop(key)
        given[key] = value if isinstance(value, list) else [value]
    numbers = {key: int(match[1]) for key in left if (match := NUMBERED.fullmatch(key))}
    if numbers and not given:  # image_1, image_2
        given["its images"] = [left.pop(key) for key in sorted(numbers, key=numbers.get)]
    ids = [left.pop(key) for key in IMAGE_IDS if key in left]
    given = given or ({"its id": [str(ids[0])]} if ids else {})
    names = next(iter(given.values()), [])
    last = [[str(name).rpartition("/")[2] for name in others] for others in given.values()]
    if any(others != last[0] for others in last):
        raise UserError(f'{" and ".join(given)} name different images; keep one of them.')
    for key, value in left.items():
        if MEDIA.fullmatch(key) or not names and names_media(value):
            raise UserError(f'its "{key}" seems to name a picture, a video or a sound, and is not read; '
                            f'{", ".join(IMAGES)} name images. Rename it, or take it out.')
    return names


def names_media(value) -> bool:
    """Whether a value is, or lists, the name of a picture, a video or a sound."""
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and name.lower().endswith(MEDIA_ENDINGS) for name in names)


def with_plain_places(texts: list[str], images: list) -> tuple[list, list]:
    """Texts whose <image 2> are <image>, and the images in the order of these places."""
    if not (order := [int(n) for text in texts for n in TAG.findall(text)]):
        return texts, images
    if {*order} != {*range(1, len(images) + 1)}:
        raise UserError(f"its texts have places for the images {', '.join(map(str, sorted({*order})))}, and it "
                        f"has {len(images)}.")
    return [TAG.sub("<image>", text) for text in texts], [images[n - 1] for n in order]
