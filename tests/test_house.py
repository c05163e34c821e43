"""The house: imports run one way, each room knows only what it stands on, and every command in the texts runs."""

import argparse
import ast
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["support", "packed", "rewards", "forms", "data", "engine", "sample", "currreft", "tools", "bench", "demo"]
BESIDE = [{"packed", "rewards"}, {"packed", "forms"}, {"packed", "data"}, {"tools", "bench"}]  # neither needs the other


def room(module):
    return module.partition(".")[0]


def project_files():
    return [file for folder in (".", "support", "tools", "bench", "demo") for file in ROOT.joinpath(folder).glob("*.py")]


def imports(file):
    """(line, module) of every import in a file, also those within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, name) for name in (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module in FLOORS else [node.module]))


def test_no_import_runs_up():
    wrong = []
    for file in project_files():
        own = file.relative_to(ROOT).with_suffix("").parts[0]
        for line, module in imports(file):
            if room(module) in FLOORS and room(module) != own and (
                    FLOORS.index(room(module)) > FLOORS.index(own) or {room(module), own} in BESIDE):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong


def test_nothing_imports_a_command_but_demo():
    commands = {f"{folder}.{file.stem}" for folder in ("tools", "bench") for file in (ROOT / folder).glob("*.py")
                if "\n@command\n" in file.read_text()}
    assert len(commands) > 5
    wrong = [f"{file.relative_to(ROOT)}:{line} imports {module}" for file in project_files()
             for line, module in imports(file) if module in commands and file.parent.name != "demo"]
    assert not wrong


def test_rooms_of_support_have_no_circle():
    below = {file.stem: {module.partition(".")[2] for _, module in imports(file) if room(module) == "support"}
             for file in (ROOT / "support").glob("*.py")}
    while leaves := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below


def test_a_name_is_one_thing():
    """No two modules define the same name at their top level; every command has its `main`."""
    names = Counter()
    for file in project_files():
        for node in ast.parse(file.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            names.update({name for t in targets if (name := getattr(t, "name", getattr(t, "id", None)))})
    assert [name for name, count in names.items() if count > 1] == ["main"]


def test_errors_and_the_way_to_the_terminal_need_no_torch():
    assert not {room(module) for _, module in imports(ROOT / "support" / "words.py")} & {"torch", "transformers"}


# ---- Commands in the texts ----

CALL = re.compile(r"(?:python3? (?:-m )?|bash |torchrun .*?)(currreft\.py|sample\.py|train\.sh|(?:tools|bench|demo)[.\w]*)"
                  r"((?: (?:\"[^\"]*\"|[^\s`;|)\"#>]+))*)")


def calls():
    """[(file, program, its arguments)] of every command in README, docs, docstrings and train.sh."""
    found = []
    for file in [ROOT / "README.md", ROOT / "train.sh", *sorted((ROOT / "docs").glob("*.md")), *project_files()]:
        for line in re.sub(r"\s*\\+\n\s*", " ", file.read_text()).splitlines():
            if file.suffix != ".py" or line.startswith("    python "):
                for program, rest in CALL.findall(re.sub(r"^\S*\"\$\S*\" -m ", "python -m ", line)):
                    rest = re.split(r"  |\.\.|, |[.,;:]$|\[", rest.strip())[0]
                    found.append((file.name, program, shlex.split(rest)))
    return found


def test_every_command_of_the_texts_is_parsed_by_its_program(monkeypatch):
    """Flags that do not exist, and programs that are gone, are found; nothing is run."""
    class Parsed(BaseException):
        pass

    def parse(self, argv=None, namespace=None):
        result = original(self, argv, namespace)
        raise Parsed from None if self.prog else result

    def error(self, message):
        if "required" not in message and "expected" not in message:
            raise AssertionError(message)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    wrong, tried = [], 0
    for text, program, words in calls():
        name = {"train.sh": "demo.ablation" if "ablation" in words else "currreft"}.get(program, program.removesuffix(".py"))
        path = ROOT / name.replace(".", "/")
        module = f"{name}.__main__" if path.is_dir() else name
        words = ["1" if word == "N" else word for word in words if word != "ablation" and word[0] != "$"]
        try:
            importlib.import_module(module).main(words)
            wrong.append(f"{text}: {program} {words} parses no flags")
        except Parsed:
            tried += 1
        except SystemExit as end:  # --help
            wrong += [f"{text}: {program} {words}"] if end.code else []
        except (AssertionError, ImportError, AttributeError) as problem:
            wrong.append(f"{text}: {program} {words}: {problem!r}")
    assert tried > 20 and not wrong, "\n".join(wrong)
