"""Files that are whole or not there: written aside, synced, renamed, and known by a digest when read again."""

import errno
import hashlib
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.words import UserError

BLOCK = 2**24  # bytes that are hashed at a time


def write_aside(path, text):
    """Write a small file so that it is complete or unchanged."""
    aside = path.with_name(f".writing-{path.name}")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.rename(path)


def sync(path):
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some network disks sync no directory
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def clear_leftovers(out):
    """Remove what killed processes had begun to write below the directory `out`."""
    for path in list(Path(out).rglob(".writing-*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def digest(path):
    """SHA-256 of a file as hex; of one above BLOCK that of its blocks' SHA-256s, which are made side by side.

    A checkpoint of 50 GB would take a minute and more in one piece.
    """
    def hashed(start):
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(BLOCK))
    starts = range(0, max(1, os.path.getsize(path)), BLOCK)
    if len(starts) == 1:  # thousands of images
        return joined([hashed(0)])
    with ThreadPoolExecutor(8) as pool:
        return joined(list(pool.map(hashed, starts)))


def joined(blocks):
    """The `digest` of a file whose blocks have these SHA-256s."""
    whole = blocks[0] if len(blocks) == 1 else hashlib.sha256(b"".join(block.digest() for block in blocks))
    return whole.hexdigest()


class Digested(io.BufferedWriter):
    """A new file that is hashed while it is written, from its beginning to its end: nobody reads it again."""

    def __init__(self, path):
        super().__init__(io.FileIO(path, "w"))
        self.blocks, self.room, self.pool = [hashlib.sha256()], BLOCK, ThreadPoolExecutor(8)

    def write(self, data):
        """Write bytes, and hash their blocks meanwhile; `joined(self.blocks)` is the digest so far."""
        rest, hashing = memoryview(data).cast("B"), []
        while len(rest):
            if not self.room:
                self.blocks, self.room = [*self.blocks, hashlib.sha256()], BLOCK
            piece, rest = rest[:self.room], rest[self.room:]
            hashing.append(self.pool.submit(self.blocks[-1].update, piece))
            self.room -= len(piece)
        written = super().write(data)
        for each in hashing:
            each.result()
        return written


def damage(folder, files):
    """What is wrong with the first bad one of `files`, {name: digest}, in a folder, or None: "a is missing"."""
    for name, expected in files.items():
        try:
            if digest(Path(folder) / name) != expected:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def sealed(value):
    """A dict with its own digest under "sha256", however it is spelled; `value == sealed(value)` if it is whole."""
    rest = {name: part for name, part in value.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def write_record(path, value):
    """Write a dict as JSON that carries its own digest, for `read_record`."""
    write_aside(path, json.dumps(sealed(value), indent=1))


def read_record(path):
    """The dict that `write_record` wrote; UserError if the file is missing, cut, edited or damaged."""
    try:
        value = json.loads(Path(path).read_text("utf-8"))
        if value != sealed(value):
            raise ValueError("its digest is that of another content")
        return {name: part for name, part in value.items() if name != "sha256"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} cannot be read: it is damaged or was edited ({reason})") from error


def read_jsonl(path, *names):
    """The complete rows, all of which have `names`, of a JSONL file whose writer may have been killed in a line."""
    rows = []
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and row.keys() >= {*names}]
