"""Reads HDF5 without trusting it: data must be stored in the file itself and fit into memory."""

from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.mri.io.scan import MAX_COMPRESSION, UNREADABLE, check_stored


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
    claimed = found.size * found.dtype.itemsize
    check_stored(path, claimed, compressed=found.chunks is not None)
    # Chunks that were never written take no room in the file and all of it in memory.
    if found.chunks is not None and claimed > MAX_COMPRESSION * max(1, found.id.get_storage_size()):
        raise InputError(f"{path}: most of '{key}' was never written; it seems damaged")
    return found


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
