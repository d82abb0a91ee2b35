"""Files compressed by gzip, unpacked into a folder that is removed after reading."""

import gzip
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nirvana.errors import InputError
from nirvana.mri.io.scan import MAX_BYTES, UNREADABLE

BLOCK = 2**20


@contextmanager
def unpacked(path: Path, others: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The path of a file without compression: its own, or that of a copy if it ends in .gz.

    Errors about the copy name the file.

    Args:
        path: of the file.
        others: files that are read along with it, compressed or not, copied beside the copy.

    Raises:
        InputError: it cannot be unpacked, or is larger than what is read of any file.
    """
    if path.suffix.lower() != ".gz":
        yield path
        return
    with TemporaryDirectory(prefix="nirvana-") as folder:
        copy = Path(folder) / path.name[:-3]
        _unpack(path, copy)
        for other in others:
            if other.suffix.lower() == ".gz":
                _unpack(other, Path(folder) / other.name[:-3])
            else:
                shutil.copy(other, folder)
        try:
            yield copy
        except InputError as error:
            message = str(error).replace(f"{folder}/", f"{path.parent}/")
            raise InputError(message.replace(str(path)[:-3], str(path))) from error


def _unpack(path: Path, copy: Path) -> None:
    size = 0
    try:
        with gzip.open(path, "rb") as source, open(copy, "wb") as target:
            while block := source.read(BLOCK):
                size += len(block)
                if size > MAX_BYTES.get():
                    most = MAX_BYTES.get() / 2**30
                    raise InputError(f"{path} unpacks to more than {most:.3g} GiB")
                target.write(block)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be unpacked, it seems damaged: {error}") from error
