"""One way to the terminal: whatever is printed, by whomever, passes through `Safe`, a stream that nothing can upset.

Control characters and escapes become visible marks, whether they come from a row, a file's name, a judge or a library;
what the locale cannot write becomes an escape; and a pipe that was closed, or no stream at all, ends no run.
"""

import os
import sys
from contextlib import contextmanager

KEPT = {"\n", "\t"}


def visible(text: str) -> str:
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
        except (OSError, ValueError):       # a closed pipe or file: nobody reads any more
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())   # nor does Python's own last flush fail
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
