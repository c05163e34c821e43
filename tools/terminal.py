"""One way to the terminal."""

from support.words import Safe, terminal, visible  # noqa: F401
