"""Parquet files of the hub -> JSON lines and image files, by the user's own pyarrow (none of this project's packages).

    hf download lmms-lab/multimodal-open-r1-8k-verified --repo-type dataset --local-dir hub
    python -m tools.parquet hub/data/*.parquet --out DIR/train/open.jsonl --images DIR/images

Every column stays what it is; a picture ({"bytes", "path"}, or bare bytes, alone or in a list) becomes a file under
--images, and its place in the row that file's path, from the folder that --images is in (here DIR: --image_root). What
the columns are called is read as tools/shapes.py says.
"""

import argparse
import hashlib
import json
import os
import sys
from io import BytesIO
from pathlib import Path

from support.images import opened
from support.words import UserError, terminal


def parquet_rows(files):
    """(file, number from 1, row as a dict) of each row, a few in memory at a time."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError("parquet files need pyarrow, which is not installed here: pip install pyarrow") from error
    for file in files:
        number = 0
        try:
            for batch in ParquetFile(file).iter_batches(16):
                for number, row in enumerate(batch.to_pylist(), number + 1):
                    yield file, number, row
        except ArrowException as error:
            raise UserError(f"{file} cannot be read as parquet ({str(error).splitlines()[0]}).") from error


def with_files(value, folder):
    """A value with every picture in it replaced by the path of its file in `folder`, which is written if it is new."""
    if isinstance(value, list):
        return [with_files(item, folder) for item in value]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return with_files(value["bytes"], folder) if value["bytes"] else value["path"]
    if isinstance(value, dict):
        return {key: with_files(item, folder) for key, item in value.items()}
    if not isinstance(value, bytes):
        return value
    with opened(BytesIO(value), "in it") as image:
        path = folder / f"{hashlib.sha256(value).hexdigest()[:20]}.{image.format.lower()}"     # the same picture, once
    if not path.exists():
        aside = path.with_name(f".writing-{path.name}")
        aside.write_bytes(value)
        aside.rename(path)
    return f"{folder.name}/{path.name}"


def convert(args):
    """Write the rows of all files; those with a picture that is none are told, or dropped with --skip_bad_rows."""
    out, images, faults, count = Path(args.out), Path(os.path.abspath(args.images)), [], 0
    if out.exists() and not args.force:
        raise UserError(f"{out} exists already; name another --out, or replace it with --force.")
    images.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".writing-{out.name}")
    with open(aside, "w", encoding="utf-8") as lines:
        for file, number, row in parquet_rows(args.files):
            try:
                lines.write(json.dumps(with_files(row, images), ensure_ascii=False, default=str) + "\n")
                count += 1
            except UserError as error:
                faults.append(f"{file}:{number}: {error}")
    if faults and not (args.skip_bad_rows and count):
        aside.unlink()
        raise UserError("\n".join([*faults[:20], f"{len(faults)} rows cannot be used; --skip_bad_rows drops them."]))
    aside.rename(out)
    dropped = f"; dropped {len(faults)} rows" if faults else ""
    print(f"{out}: {count} rows, to be read with --image_root {images.parent}{dropped}")


def main(argv=None):
    """Command line; exits with 2 and a sentence for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", help="parquet files, in order")
    parser.add_argument("--out", required=True, help="JSONL to write, such as DIR/train/open.jsonl")
    parser.add_argument("--images", required=True, help="folder for the image files, such as DIR/images")
    parser.add_argument("--skip_bad_rows", action="store_true", help="drop and count rows whose picture cannot be read")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    try:
        convert(args)
    except (UserError, OSError) as error:
        print(f"parquet: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    with terminal():
        main()
