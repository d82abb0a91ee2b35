"""Token shards at an address that fsspec opens, copied to the local cache and verified."""

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

from nirvana.data.checksums import remember_files
from nirvana.data.tokenizer import TOKENIZER_FILES
from nirvana.errors import InputError
from nirvana.files import atomic_file, cache_folder
from nirvana.progress import ProgressLines

THREADS = 4  # files that are copied at the same time
BLOCK = 2**22  # bytes read at a time
TOKENIZER_JSON = "tokenizer/tokenizer.json"
_PLAIN_NAME = re.compile(r"[\w-][\w.-]*")


def is_remote(folder: str | Path) -> bool:
    """Returns whether a folder is given as an address, as in s3://BUCKET/FOLDER.

    Args:
        folder: a path or an address.
    """
    return "://" in str(folder)


def local_copy(address: str) -> Path:
    """Copies token shards to the local cache; files that are there already are kept.

    Every file is compared with its recorded SHA-256 while it is copied, and appears once it is
    complete. Other processes that want the same copy wait. Shards that change at the address are
    another copy.

    Args:
        address: of a folder written by `tokenize`, which fsspec or one of its plugins opens
            (s3://, gs://, hf://, https://, memory:// ...).

    Returns:
        The local folder, in `nirvana.files.cache_folder()`.

    Raises:
        InputError: for an address that cannot be opened or read, that does not hold token shards,
            for files that differ from their checksums, and for a full disk.
    """
    address = address.rstrip("/")
    system, root = _open(address)
    text = _checked(f"{address}/meta.json", lambda: system.cat_file(f"{root}/meta.json"))
    try:
        meta = json.loads(text)
        sums = {**meta["sha256"], TOKENIZER_JSON: meta["tokenizer_sha256"]}
        names = [*meta["files"], *meta["sha256"]]
        plain = all(_PLAIN_NAME.fullmatch(name) for name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{address}/meta.json: not that of token shards: {error}") from None
    if not plain:
        raise InputError(f"{address}/meta.json: names files outside of its folder")
    key = hashlib.sha256(address.encode() + b"\0" + text).hexdigest()[:32]
    folder = cache_folder() / "shards" / key
    try:
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (folder / "meta.json").is_file():
                _copy_all(system, root, address, folder, sums)
                with atomic_file(folder / "meta.json") as file:
                    file.write_bytes(text)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder


def _copy_all(system: Any, root: str, address: str, folder: Path, sums: dict[str, str]) -> None:
    """Copies the files of `sums`, and what else belongs to the tokenizer."""

    def exists(name: str) -> bool:
        return bool(_checked(f"{address}/{name}", lambda: system.exists(f"{root}/{name}")))

    others = [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    others = [name for name in others if name not in sums and exists(name)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with (
        ProgressLines(*columns, TimeRemainingColumn()) as progress,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        task = progress.add_task(f"copying {address}", total=None)

        def copy(name: str) -> None:
            if not (folder / name).is_file():
                where = f"{root}/{name}", f"{address}/{name}"
                expected = sums.get(name)
                _copy(system, *where, folder / name, expected, lambda n: progress.advance(task, n))

        for _ in pool.map(copy, [*sums, *others]):
            pass
    remember_files(folder, sums)


def _copy(
    system: Any,
    path: str,
    address: str,
    target: Path,
    expected: str | None,
    advance: Callable[[int], None],
) -> None:
    """Copies one file, and compares its SHA-256 unless it is None."""
    hashed = hashlib.sha256()
    source = _checked(address, lambda: system.open(path, "rb"))
    with source, atomic_file(target) as file, open(file, "wb") as out:
        while block := _checked(address, lambda: source.read(BLOCK)):
            hashed.update(block)
            out.write(block)
            advance(len(block))
        if expected is not None and hashed.hexdigest() != expected:
            raise InputError(f"{address}: damaged: its SHA-256 is not the recorded")


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
    except (ImportError, ValueError) as error:  # a missing plugin, an unknown protocol
        raise InputError(f"{address}: cannot be opened: {_first_line(error)}") from None
    return system, path.rstrip("/")


def _checked(address: str, call: Callable[[], Any]) -> Any:
    """What a call of a file system returns. Plugins raise errors of their own kinds."""
    try:
        return call()
    except FileNotFoundError:
        raise InputError(f"{address}: not token shards: no such file") from None
    except Exception as error:
        raise InputError(f"{address}: cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
