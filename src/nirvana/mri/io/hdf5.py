"""Reads HDF5 without trusting it: data must be stored in the file itself and fit into memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.arrays import KSPACE_NAMES, Variable
from nirvana.mri.io.scan import MAX_COMPRESSION, UNREADABLE, check_stored

MAX_DEPTH, MAX_VARIABLES = 3, 256


def dataset(group: Any, key: str, path: Path) -> Any:
    """The dataset `key` of an open file or group; None where there is none.

    Raises:
        InputError: it is no dataset, a link, spread over other files, or larger than the file
            could hold.
    """
    import h5py

    if key not in group.keys():  # noqa: SIM118 - `in group` follows links
        return None
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise InputError(f"{path}: '{key}' is a link; it must be a dataset of this file")
    found = group[key]
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{path}: '{key}' is a group; it must be a dataset")
    if found.is_virtual or found.external:
        raise InputError(f"{path}: '{key}' lies in other files; it must be stored in this one")
    if found.shape is None:
        raise InputError(f"{path}: '{key}' is empty")
    if not _is_consistent(found.id.get_type(), found.dtype):
        raise InputError(f"{path}: the type of '{key}' contradicts itself; it seems damaged")
    claimed = found.size * found.dtype.itemsize
    check_stored(path, claimed, compressed=found.chunks is not None)
    # Chunks that were never written take no room in the file and all of it in memory.
    if found.chunks is not None and claimed > MAX_COMPRESSION * max(1, found.id.get_storage_size()):
        raise InputError(f"{path}: most of '{key}' was never written; it seems damaged")
    _check_sequences(found, key, path)
    return found


def _is_consistent(stored: Any, dtype: np.dtype) -> bool:
    """Whether a stored type has the size of the one that numbers are read into, and its parts lie
    one behind the other: HDF5 writes over its memory where they do not."""
    from h5py import h5t

    kind = stored.get_class()
    if kind == h5t.VLEN:
        base = stored.get_super()
        return _is_consistent(base, base.dtype)
    if stored.get_size() != dtype.itemsize and kind != h5t.STRING:
        return False
    if kind == h5t.ARRAY:
        return _is_consistent(stored.get_super(), dtype.base)
    if kind in (h5t.FLOAT, h5t.INTEGER):
        return stored.get_offset() + stored.get_precision() <= 8 * stored.get_size()
    if kind != h5t.COMPOUND:
        return True
    end = 0
    for number in range(stored.get_nmembers()):
        member, offset = stored.get_member_type(number), stored.get_member_offset(number)
        is_complex = dtype.names is None  # h5py's own compound of two floats
        part = member.dtype if is_complex else dtype[stored.get_member_name(number).decode()]
        if offset < end or not _is_consistent(member, part):
            return False
        end = offset + member.get_size()
    return end <= stored.get_size()


def _check_sequences(found: Any, key: str, path: Path) -> None:
    """Refuses sequences of variable length that the file cannot hold.

    HDF5 allocates the length that is claimed, also where another field of the records is read, and
    loops for ever in a damaged heap. Compressed chunks are not looked into: they have checksums.
    """
    sequences = _sequence_fields(found)
    if sequences is None:
        return
    blocks: list[tuple[int, int]] = []
    if found.chunks is None:
        if found.id.get_offset() is not None:
            blocks.append((found.id.get_offset(), found.size * sequences.itemsize))
    elif found.compression is None and not found.shuffle:
        found.id.chunk_iter(lambda chunk: blocks.append((chunk.byte_offset, chunk.size)))
    most, base, heaps = path.stat().st_size, found.file.userblock_size, set()
    with open(path, "rb") as file:
        for offset, size in blocks:
            file.seek(offset)
            content = file.read(size // sequences.itemsize * sequences.itemsize)
            whole = content[: len(content) // sequences.itemsize * sequences.itemsize]
            values = np.frombuffer(whole, sequences)
            for name in sequences.names or ():
                if (values[name]["length"] > most).any():
                    raise InputError(f"{path}: '{key}' holds sequences longer than the file")
                used = values[name][values[name]["length"] > 0]
                heaps.update(np.unique(used["heap"]).tolist())
        if not all(_is_heap(file, base + heap, most) for heap in sorted(heaps)):
            raise InputError(f"{path}: '{key}' holds sequences that cannot be found; it is damaged")


def _sequence_fields(found: Any) -> np.dtype | None:
    """A dtype of a stored record whose fields are the lengths and heaps of its sequences; None
    without such."""
    from h5py import h5t

    stored = found.id.get_type()
    members = [(0, stored)]
    if stored.get_class() == h5t.COMPOUND:
        numbers = range(stored.get_nmembers())
        members = [(stored.get_member_offset(n), stored.get_member_type(n)) for n in numbers]
    # A sequence is stored as its length, 4 bytes, and the place of its content: the address of a
    # heap, and the content's number in it.
    offsets = [
        offset
        for offset, kind in members
        if kind.get_class() == h5t.VLEN
        or (kind.get_class() == h5t.STRING and kind.is_variable_str())
    ]
    if not offsets or found.file.id.get_create_plist().get_sizes()[0] != 8:
        return None
    place = np.dtype([("length", "<u4"), ("heap", "<u8"), ("number", "<u4")])
    return np.dtype(
        {
            "names": [f"sequence {offset}" for offset in offsets],
            "formats": [place] * len(offsets),
            "offsets": offsets,
            # h5py states the size of a pointer as that of a single string.
            "itemsize": max(stored.get_size(), place.itemsize),
        }
    )


def _is_heap(file: BinaryIO, address: int, most: int) -> bool:
    """Whether a heap lies in the file and its parts lie one behind the other: each has a number and
    a size, and the one of number 0 is what is free, with its head."""
    file.seek(min(address, most))
    head = file.read(16)
    size = int.from_bytes(head[8:], "little")
    if head[:4] != b"GCOL" or not 16 <= size <= most - address:
        return False
    position, end = address + 16, address + size
    while position + 16 <= end:
        file.seek(position)
        part = file.read(16)
        number, length = int.from_bytes(part[:2], "little"), int.from_bytes(part[8:], "little")
        if number == 0 and length < 16:
            return False
        position += length if number == 0 else 16 + length + -length % 8
    return position <= end


def variables_of(
    file: Any, path: Path, required: tuple[str, ...] = (), is_matlab: bool = False
) -> list[Variable]:
    """The datasets of numbers of an open file, in groups down to `MAX_DEPTH`, unread.

    Links are left out, unless one has the name of a k-space or is `required` to be a dataset where
    it is there.

    Args:
        file: the file.
        path: of the file.
        required: names at the top.
        is_matlab: whether axes come in MATLAB's order, which is the reverse.

    Raises:
        InputError: a name at the top is no dataset of this file.
    """
    for name in file.keys():  # noqa: SIM118 - `in file` follows links
        if name.lower() in (*KSPACE_NAMES, *required):
            dataset(file, name, path)
    found: list[Variable] = []
    _collect(file, path, "", is_matlab, found)
    return found


def _collect(group: Any, path: Path, prefix: str, is_matlab: bool, found: list[Variable]) -> None:
    import h5py

    for key in group:
        if len(found) >= MAX_VARIABLES or not isinstance(
            group.get(key, getlink=True), h5py.HardLink
        ):
            continue
        each = group[key]
        if (
            isinstance(each, h5py.Group)
            and prefix.count("/") < MAX_DEPTH
            and not key.startswith("#")
        ):
            _collect(each, path, f"{prefix}{key}/", is_matlab, found)
        if not isinstance(each, h5py.Dataset) or each.shape is None:
            continue
        shape = each.shape[::-1] if is_matlab else each.shape
        readers = _reader(group, key, path, is_matlab), _part_reader(group, key, path, is_matlab)
        found.append(Variable(prefix + key, shape, each.dtype, *readers))


def _reader(group: Any, key: str, path: Path, is_matlab: bool) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        values = dataset(group, key, path)[()]
        return values.T if is_matlab else values

    return read


def _part_reader(
    group: Any, key: str, path: Path, is_matlab: bool
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    place = group.name

    def read(index: tuple[slice, ...]) -> np.ndarray:
        with open_hdf5(path) as file:  # parts are read when the file has long been closed
            values = dataset(file[place], key, path)[index[::-1] if is_matlab else index]
        return values.T if is_matlab else values

    return read


def text(group: Any, key: str, path: Path) -> str | None:
    """A single string, scalar or `[1]`; None where there is none.

    Raises:
        InputError: it is anything else.
    """
    found = dataset(group, key, path)
    if found is None:
        return None
    if found.size != 1 or found.dtype.kind not in "OS":
        raise InputError(f"{path}: '{key}' is {found.dtype} {found.shape}; it must be one string")
    value = found[()] if found.shape == () else found[(0,) * found.ndim]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise InputError(f"{path}: '{key}' holds no text")
    return value


def open_hdf5(path: Path) -> Any:
    """An open file, read only."""
    import h5py

    try:
        return h5py.File(path, "r")
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error
