"""Files that are either whole or absent, and never in the place of something that is read.

What is written gets the permissions that a plain `open` or `mkdir` would give it there. They are
read off a file and a folder that are made for this: the umask itself can only be read by setting
it, which other threads would notice, and a folder's default access list may overrule it.
"""

import codecs
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock, Timeout

from nirvana.errors import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system that has no locks answers to the request for one."""
HEAD_BYTES = 2**16
"""Bytes of an existing file from which its kind is read."""
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # which starts with that of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def check_outputs(
    outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None]
) -> None:
    """Refuses outputs that would replace an input or one another; a command's first check.

    Files are compared as the operating system knows them, so that another spelling, a symbolic
    link or a hard link makes no difference.

    Args:
        outputs: files and folders that will be written, by the name of the option or setting that
            gives them; None for one that is not given.
        inputs: files and folders that are read. What does not exist (the name of a packaged model,
            a data set of the hub) is passed over.

    Raises:
        InputError: for an output that is an input, lies in an input folder, or contains an input;
            and for two outputs of which one is or contains the other.
    """
    read = [(Path(path), _place(path)) for path in inputs if path is not None and _exists(path)]
    written: list[tuple[str, Path, tuple[Any, set[Any]]]] = []
    for name, path in outputs.items():
        if path is None:
            continue
        place, above = _place(path)
        for other, (input_place, input_above) in read:
            if place == input_place:
                problem = f"is the input {other}, which would be lost"
            elif input_place in above:
                problem = f"lies in the input {other}"
            elif place in input_above:
                problem = f"contains the input {other}, which would be lost"
            else:
                continue
            raise InputError(f"{name} {path} {problem}; give another place to write")
        for other_name, other, (other_place, other_above) in written:
            if place == other_place or other_place in above or place in other_above:
                raise InputError(
                    f"{name} {path} and {other_name} {other} overlap; give them separate places"
                )
        written.append((name, Path(path), (place, above)))


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block succeeds.

    When the block raises, the temporary file is removed and `path` stays as it was. Where `path` is
    a symbolic link, the file that it leads to is replaced, and the link stays.

    Raises:
        InputError: where no file can be made.
    """
    path = _resolved(writable_file(path))
    _make(path.parent, path)
    mode, _ = _default_modes(path.parent, path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield temporary
        _set_mode(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder; it becomes `path` when the block succeeds.

    An existing folder at `path` is replaced as a whole, and only then. Where `path` is a symbolic
    link, the folder that it leads to is replaced, and the link stays.

    Raises:
        InputError: where no folder can be made.
    """
    path = _resolved(path)
    _require_no_file(path)
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
    """Gives a finished folder its name, in place of a folder there; both lie in one folder."""
    _require_no_file(path)
    file_mode, folder_mode = _default_modes(path.parent, path)
    # mkdtemp and safetensors make what they write readable for the owner alone.
    for file in temporary.rglob("*"):
        if not file.is_symlink():
            _set_mode(file, folder_mode if file.is_dir() else file_mode)
            _flush(file)
    _set_mode(temporary, folder_mode)
    _flush(temporary)
    if path.exists():
        old = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old / "old")
        try:
            os.replace(temporary, path)
        except OSError:
            os.replace(old / "old", path)
            old.rmdir()
            raise
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    _flush(path.parent)


@contextmanager
def sole_use(folder: str | Path) -> Iterator[None]:
    """Keeps other processes that ask for the same out of a folder while the block runs; a process
    that is killed gives it back. A file system without locks lets everyone in.

    Raises:
        InputError: when another process has it, or it cannot be made.
    """
    folder = Path(folder)
    _make(folder, folder)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another process works there; wait or end it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{folder} cannot be locked: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def replaceable_folder(path: str | Path, results: Iterable[str]) -> Path:
    """The folder `path`, absolute, if `atomic_folder` may replace it.

    Args:
        results: names, or patterns with *, of what earlier results leave there.

    Raises:
        InputError: for a file, a folder that holds anything else, or a place without write access.
    """
    path, patterns = _resolved(path), list(results)
    _require_place(path)
    _require_no_file(path)
    names = sorted(file.name for file in path.iterdir()) if path.is_dir() else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)]
    if others:
        raise InputError(f"{path} holds {others[0]}; give a new or empty folder to write")
    return path


def existing_file(path: str | Path) -> Path:
    """The same path, if it is that of a regular file, which can be read more than once.

    Raises:
        InputError: there is none, it is a folder, a pipe or a device, or a link that leads nowhere
            or in a circle.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character, before Python 3.13
        if _is_link(path):
            message = f"{path} is a link that leads nowhere or in a circle; give a file"
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            message = f"{path}: no such file"
        else:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            message = f"{str(path)[:200]} cannot be opened: {reason}"
        raise InputError(message) from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; give a file")
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path} is a pipe or a device, which cannot be read twice; save it as a file"
        )
    return path


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def writable_file(path: str | Path) -> Path:
    """The same path, if a file may be written there: checked before the work that ends in it.

    Raises:
        InputError: for a folder, a device or another thing that is no regular file, the file that
            the program's own output goes to, or a place where nothing can be written.
    """
    path = Path(path)
    target = _resolved(path)
    if target.is_dir():
        raise InputError(f"{path} is a folder; give a file to write")
    if target.exists():
        # Files are replaced by renaming, which would put a regular file in a device's place.
        if not target.is_file():
            raise InputError(f"{path} is not a regular file; give a file to write")
        if any(os.path.samestat(target.stat(), stream) for stream in _standard_streams()):
            raise InputError(f"{path} takes the program's own output; give another file to write")
    _require_place(target, path)
    return path


def writable_json(path: str | Path) -> Path:
    """The same path, if `write_json` may write there.

    Raises:
        InputError: as `writable_file`, and for an existing file that does not begin as those do
            that `write_json` writes: it is not replaced.
    """
    begins = (b"{", b"[", b"{}", b"[]")
    return replaceable_file(path, lambda head: head[:4].split(b"\n")[0].strip() in begins)


def replaceable_file(
    path: str | Path, recognised: Callable[[bytes], bool], kind: str = "results"
) -> Path:
    """The same path, if a file may be written there, and one that is there is of the same kind.

    Args:
        path: of the file.
        recognised: whether a file that begins with these bytes is of the kind; not called for an
            empty one, which may be replaced.
        kind: for the message.

    Raises:
        InputError: as `writable_file`, and for an existing file of another kind.
    """
    path = writable_file(path)
    if path.exists():
        try:
            with open(path, "rb") as handle:
                head = handle.read(HEAD_BYTES)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if head and not recognised(head):
            raise InputError(f"{path} holds something else than {kind}; give another file")
    return path


def _resolved(path: str | Path) -> Path:
    """The absolute path without symbolic links."""
    try:
        resolved = Path(os.path.realpath(path))
    except OSError as error:
        raise InputError(f"{path} cannot be resolved: {error}") from None
    # `Path.resolve` raises for links in a circle before Python 3.13 alone.
    if any(part.is_symlink() for part in (resolved, *resolved.parents)):
        raise InputError(f"{path} cannot be resolved: its symbolic links form a circle")
    return resolved


def _place(path: str | Path) -> tuple[Any, set[Any]]:
    """What identifies a path, and the same of all folders above it, both as the path is spelled and
    as its links lead."""
    target = _resolved(path)
    spelled = Path(os.path.abspath(path))
    return _identity(target), {_identity(each) for each in (*target.parents, *spelled.parents)}


def _identity(path: Path) -> Any:
    """Equal for two paths of one file or folder."""
    try:
        status = path.stat()
    except OSError:
        return os.path.normcase(path)
    return status.st_dev, status.st_ino


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _standard_streams() -> Iterator[os.stat_result]:
    """Standard output and standard error, where they are open."""
    for descriptor in (1, 2):
        with suppress(OSError):
            yield os.fstat(descriptor)


def _require_no_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder to write")


def _require_place(path: Path, given: Path | None = None) -> None:
    """Refuses a path of which no folder above it can be written to; `given` names it."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(
            f"{given or path} cannot be written: {above} is no folder that can be written to"
        )


def _make(folder: Path, wanted: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{wanted} cannot be written: {error.strerror}") from error


def _default_modes(folder: Path, wanted: Path) -> tuple[int, int]:
    """The permissions that a new file and a new folder get in `folder`."""
    made = folder / f".{secrets.token_hex(8)}.partial"
    try:
        made.mkdir()
        try:
            with open(made / "file", "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            return mode, stat.S_IMODE(made.stat().st_mode)
        finally:
            shutil.rmtree(made)
    except OSError as error:
        raise InputError(f"{wanted} cannot be written: {error.strerror}") from error


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def cache_folder() -> Path:
    """The folder of what can be made again: `NIRVANA_CACHE`, else `nirvana` in the user's cache."""
    given = os.environ.get("NIRVANA_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nirvana"


def sha256(path: str | Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_utf16(start: bytes, where: str | Path) -> None:
    """Refuses text in UTF-16 or UTF-32, as programs of Windows write, with how to convert it.

    Args:
        start: of the bytes of the text.
        where: the text is, with which the error begins.

    Raises:
        InputError: it starts with a byte order mark, or every other byte is zero.
    """
    for mark, name in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise InputError(
                f"{where}: {name} by its byte order mark, must be UTF-8: convert it, "
                f"as `iconv -f {name} -t UTF-8` does"
            )
    pairs = start[: len(start) // 2 * 2]
    for zeros, other, name in ((pairs[1::2], pairs[::2], "LE"), (pairs[::2], pairs[1::2], "BE")):
        if len(zeros) > 1 and not any(zeros) and all(other):
            raise InputError(
                f"{where}: UTF-16 by its zero bytes, must be UTF-8: convert it, "
                f"as `iconv -f UTF-16{name} -t UTF-8` does"
            )


def decode_utf8(data: bytes, where: str | Path) -> str:
    """The text of UTF-8 bytes, without the byte order mark that some editors put in front.

    Args:
        data: all of its bytes.
        where: the text is, with which an error begins.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    refuse_utf16(data[:64], where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error}") from None


def finite(value: Any) -> Any:
    """The same data with None for numbers that are not finite, fit for JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush(path: Path) -> None:
    """Forces a file's content, or a folder's names, to the disk, so that no rename outruns it."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
