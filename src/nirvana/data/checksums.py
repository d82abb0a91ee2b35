"""Files beside their recorded checksums, each read once as long as it does not change."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from nirvana.errors import InputError
from nirvana.files import cache_folder, sha256, write_json
from nirvana.progress import ProgressLines

THREADS = 4  # hashing releases Python's lock; one core hashes about 1.5 GB/s where it has SHA-NI
SHOWN = 2**30  # bytes from which progress is shown


def verify_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Compares the SHA-256 of files with the recorded ones.

    A file that was found right before is not read again while its size and its time of modification
    stay the same; the cache folder remembers which these are (`nirvana.files.cache_folder`).

    Args:
        folder: of the files.
        expected: SHA-256, in hexadecimal, by the name of the file within `folder`.

    Raises:
        InputError: naming the first file that differs or cannot be read.
    """
    known = _remembered(folder)
    try:
        states = {name: _state(folder / name) for name in expected}
        unread = [name for name in expected if known.get(name) != [*states[name], expected[name]]]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        quick = sum(states[name][0] for name in unread) < SHOWN
        with (
            ProgressLines(*columns, disable=quick) as progress,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            task = progress.add_task(f"verifying {folder}, files", total=len(unread))
            found = pool.map(lambda name: sha256(folder / name), unread)
            for name, sum_found in zip(unread, found, strict=True):
                if sum_found != expected[name]:
                    raise InputError(f"{folder / name}: damaged: its SHA-256 is not the recorded")
                progress.advance(task)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    if unread:
        _remember(folder, {name: [*states[name], expected[name]] for name in expected})


def remember_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Records that files were found right while they were written.

    Args:
        folder: of the files.
        expected: their SHA-256 by name.
    """
    _remember(folder, {name: [*_state(folder / name), expected[name]] for name in expected})


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _record(folder: Path) -> Path:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return cache_folder() / "verified" / f"{name}.json"


def _remembered(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_record(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(folder: Path, states: Mapping[str, Iterable[Any]]) -> None:
    try:
        write_json(_record(folder), {name: list(state) for name, state in states.items()})
    except (OSError, InputError):
        return  # without a cache the files are read again the next time
