"""Files that a page receives: their names and sizes, before a reader looks into them."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from nirvana.app.config import MIB
from nirvana.app.sessions import UPLOADS, Session
from nirvana.errors import InputError

NAME_BYTES = 200
PAIR = (".cfl", ".hdr")


def receive(session: Session, files: Sequence[str | Path], max_bytes: int) -> Path:
    """Takes uploaded files into a session's folder, in place of those before.

    Args:
        session: of the page.
        files: one, or the two of a BART pair, where the server put them.
        max_bytes: of all together.

    Returns:
        The file to read.

    Raises:
        InputError: there are others than these, a name is not possible, or they are too large.
    """
    paths = [Path(file) for file in files]
    names = [checked_name(path.name) for path in paths]
    suffixes = sorted(Path(name).suffix.lower() for name in names)
    stems = {Path(name).stem for name in names}
    if len(paths) != 1 and (suffixes != [*PAIR] or len(stems) != 1):
        raise InputError(
            f"{len(paths)} files were uploaded; give one, or BART's NAME.cfl with its NAME.hdr"
        )
    if any(path.is_symlink() or not path.is_file() for path in paths):
        raise InputError(f"{names[0]} was not received; upload it again")
    statuses = [path.stat() for path in paths]
    session.cached |= {path: each.st_ino for path, each in zip(paths, statuses, strict=True)}
    size = sum(each.st_size for each in statuses)
    if size > max_bytes:
        raise InputError(
            f"{names[0]} has {size / MIB:.1f} MiB; this page takes at most {max_bytes / MIB:g}"
        )
    session.scan = None
    session.results.clear()
    session.uploads += 1
    folder = session.new_folder(UPLOADS) / str(session.uploads)
    folder.mkdir()
    for path, name in zip(paths, names, strict=True):
        _link(path, folder / name)
    session.scan = folder / next((n for n in names if n.lower().endswith(PAIR[0])), names[0])
    return session.scan


def checked_name(name: str) -> str:
    """The name of an upload, if it is one of a file and nothing else.

    Raises:
        InputError: it has parts of a path, is hidden or too long, or holds control characters.
    """
    plain = PureWindowsPath(name).name == PurePosixPath(name).name == name
    if not (plain and name) or name.startswith(".") or not name.isprintable():
        raise InputError("the upload's name is no plain name of a file; rename it")
    if len(os.fsencode(name)) > NAME_BYTES:
        raise InputError(f"the upload's name has more than {NAME_BYTES} bytes; rename it")
    return name


def without_folders(message: str, session: Session) -> str:
    """A message to the page, in which uploads have their names without the server's folders."""
    for number in range(session.uploads + 1):
        message = message.replace(f"{session.folder / UPLOADS / str(number)}{os.sep}", "")
    return message.replace(f"{session.folder}{os.sep}", "")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
