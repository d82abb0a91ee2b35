"""Files that are either whole or absent."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from nirvana.errors import InputError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    When the block raises, the temporary file is removed and `path` stays as it was.

    Raises:
        InputError: where no file can be made.
    """
    path = writable_file(path)
    _make(path.parent, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder; it becomes `path` when the block succeeds.

    An existing folder at `path` is replaced as a whole, and only then.

    Raises:
        InputError: where no folder can be made.
    """
    path = Path(path)
    _make(path.parent, path)
    try:
        temporary = Path(mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Gives a finished folder its name, in place of what was there; both lie in one folder."""
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for the owner alone
        _flush(file)
    temporary.chmod(0o755)
    _flush(temporary)
    if path.exists():
        old = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old / "old")
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    _flush(path.parent)


@contextmanager
def sole_use(folder: str | Path) -> Iterator[None]:
    """Keeps other processes that ask for the same out of a folder while the block runs; a process
    that is killed gives it back.

    Raises:
        InputError: when another process has it, or it cannot be made.
    """
    folder = Path(folder)
    _make(folder, folder)
    with open(folder / ".lock", "w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process works there; wait or end it") from None
        except OSError:
            pass  # a file system without locks
        yield


def replaceable_folder(path: str | Path, results: Iterable[str]) -> Path:
    """The folder `path`, absolute, if `atomic_folder` may replace it.

    Args:
        results: names, or patterns with *, of what earlier results leave there.

    Raises:
        InputError: for a file, a folder that holds anything else, or a place without write access.
    """
    path, patterns = Path(path).resolve(), list(results)
    _require_place(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder to write")
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    if others:
        raise InputError(f"{path} holds {others[0]}; give a new or empty folder to write")
    return path


def writable_file(path: str | Path) -> Path:
    """The same path, if a file may be written there: asked before the work that ends in it.

    Raises:
        InputError: for a folder, or a place where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file to write")
    _require_place(path)
    return path


def _require_place(path: Path) -> None:
    """Refuses a path of which no folder above it can be written to."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path} cannot be written: {above} is no folder that can be written to")


def _make(folder: Path, wanted: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{wanted} cannot be written: {error.strerror}") from error


def sha256(path: str | Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    """Forces a file's content, or a folder's names, to the disk, so that no rename outruns it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
