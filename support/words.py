"""Words to the user: errors that are sentences, and one way to the terminal. Needs no torch.

Control characters and escapes become visible marks, whether they come from a row, a file's name, a judge or a
library; what the locale cannot write becomes an escape; and a pipe that was closed, or no stream at all, ends
no run.
"""

import functools
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

KEPT = {"\n", "\t"}


class UserError(Exception):
    """A mistake in data, files or flags. `str(error)` is read by the user: what is wrong, and what to do."""


class RunError(UserError):
    """Why a run cannot go on though its settings are right: a full disk, a dead peer. Exits with 1, not 2."""


def say(text):
    """Print a line on the terminal, once: rank 0 speaks for all. Above a progress bar where there is one."""
    if int(os.environ.get("RANK") or 0) == 0:
        tqdm.write(text, file=sys.stderr)


def last_words(text):
    """Say how a program ends, on a line of its own; in the log, too, where stdout alone goes into one."""
    for bar in list(tqdm._instances):
        bar.close()  # else its line goes on with the sentence, and it is drawn again below
    for stream in [sys.stderr] + [sys.stdout] * (sys.stderr.isatty() and not sys.stdout.isatty()):
        print(text, file=stream, flush=True)


def one_line(text, limit=300):
    """Model text made safe and short for a terminal: no control characters, no line breaks."""
    return "".join(c if c.isprintable() else " " for c in text[:limit]) + ("..." if len(text) > limit else "")


def visible(text):
    """Text in which nothing acts on a terminal: "\\x1b[2J" -> "?[2J". A progress bar's leading "\\r" stays."""
    bar = "\r" * (len(text) - len(text.lstrip("\r")))
    return bar + "".join(c if c.isprintable() or c in KEPT else "?" for c in text[len(bar):])


class Safe:
    """A text stream around another one, or around none."""

    def __init__(self, stream):
        self.stream = stream if stream is not None else open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        self._try(lambda: self.stream.write(visible(text)))
        return len(text)

    def flush(self):
        self._try(lambda: self.stream.flush())

    def _try(self, action):
        try:
            action()
        except (OSError, ValueError):  # a closed pipe or file: nobody reads any more
            try:  # nor does Python's own last flush fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            except (OSError, ValueError):
                pass
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def terminal():
    """Everything that is printed within goes through Safe streams."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Safe, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def command(main):
    """Decorator of a command's main(argv=None): it returns the exit code, and a user's mistake is a sentence.

    0 or what `main` returns; 2 for a UserError or a file that cannot be used; 1 for a RunError; 130 after Ctrl-C.
    """
    @functools.wraps(main)
    def run(argv=None):
        with terminal():
            try:
                return main(argv) or 0
            except (UserError, OSError) as error:
                file = Path(main.__code__.co_filename)
                name = file.stem if file.stem != "__main__" else file.parent.name
                last_words(f"{name}: {error}")
                return 1 if isinstance(error, RunError) else 2
            except KeyboardInterrupt:
                return 130
    return run
