"""Rows of results: JSON, one a line, in a .jsonl file or compressed in a .jsonl.xz file."""

import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from nirvana.errors import InputError

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Adds a row, see `append_rows`."""
    append_rows(path, [row])


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows; several processes may do so at once.

    What an interrupted call left of its rows is removed. In a .xz file the rows of a call
    are a compressed stream of their own; `xz` and Python read such files as one.

    Raises:
        InputError: for a file that is damaged before its end.
        ValueError: for numbers that JSON lacks, such as NaN; nothing is written.
    """
    text = "".join(
        json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with lock, open(path, "a+b") as file:
        file.seek(0)
        _, intact = _intact(path, file.read())
        file.truncate(intact)
        file.write(lzma.compress(text) if _compressed(path) else text)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none if there is no such file; a last one that was cut off is left out.

    Raises:
        InputError: for a file that cannot be read, or is damaged before its end.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(_intact(path, content)[0].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise InputError(f"{path}, line {number}: not JSON") from None
    return rows


def _compressed(path: Path) -> bool:
    return path.suffix == ".xz"


def _intact(path: Path, content: bytes) -> tuple[bytes, int]:
    """The whole lines of a file, and how many of its bytes hold them."""
    if not _compressed(path):
        length = content.rfind(b"\n") + 1
        return content[:length], length
    text, length = b"", 0
    while length < len(content):
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        try:
            found = stream.decompress(content[length:])
        except lzma.LZMAError as error:
            raise InputError(f"{path}, byte {length}: not an .xz stream: {error}") from None
        if not stream.eof:  # cut off
            break
        text += found
        length = len(content) - len(stream.unused_data)
    return text, length
