"""K-space in NumPy's files: one array in `.npy`, named ones in `.npz`. Nothing is unpickled."""

import gzip
import io
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.arrays import ArrayFile, Variable, complex_shape
from nirvana.mri.io.scan import MAX_COMPRESSION, UNREADABLE, check_stored

NPY = (".npy", ".npy.gz")
MAX_HEADER = 2**14


def is_complex_npy(path: Path) -> bool:
    """Whether a `.npy` file, as it is or compressed, holds k-space rather than magnitudes.

    Real numbers of three axes are a magnitude volume; a file that cannot be read counts as one.
    """
    try:
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as file:
            shape, dtype, _ = _header(file)
    except UNREADABLE:
        return False
    found = complex_shape(shape, dtype)
    return found is not None and (dtype.kind not in "iuf" or len(shape) > 3)


def open_npy(path: Path) -> np.ndarray:
    """The array in a `.npy` file, mapped from it.

    Raises:
        InputError: it is no such file, or holds objects or less than it claims.
    """
    try:
        with open(path, "rb") as file:
            _header(file)
        # Refuses pickled objects, archives, and headers that claim more than the file holds.
        return np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as an array of numbers: {error}") from error


def npy_file(path: Path) -> ArrayFile:
    """The array in a `.npy` file, unread; see `open_npy`."""
    array = open_npy(path)
    shape, dtype = array.shape, array.dtype

    def read_part(index: tuple[slice, ...]) -> np.ndarray:
        # A mapping of its own each time: pages of one that is kept would fill the memory.
        return np.array(open_npy(path)[index])

    variable = Variable("array", shape, dtype, lambda: np.array(open_npy(path)), read_part)
    return ArrayFile(path, [variable])


def npz_file(path: Path) -> ArrayFile:
    """The arrays in a `.npz` archive, unread; objects are left out.

    Raises:
        InputError: it is no such archive, or an array claims more than is stored.
    """
    variables = []
    try:
        with zipfile.ZipFile(path) as archive:
            members = [each for each in archive.infolist() if each.filename.endswith(".npy")]
            for member in members:
                with archive.open(member) as file:
                    shape, dtype, _ = _header(file)
                if dtype.hasobject:
                    continue
                claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
                check_stored(path, claimed, compressed=member.compress_type != 0)
                if claimed > MAX_COMPRESSION * max(1, member.compress_size):
                    raise InputError(f"{path}: '{member.filename}' claims more than is stored")
                name = member.filename.removesuffix(".npy")
                variables.append(Variable(name, shape, dtype, _reader(path, member.filename)))
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable .npz archive: {error}") from error
    return ArrayFile(path, variables)


def _header(file: IO[bytes] | Any) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype and order of an array, without its numbers."""
    start = io.BytesIO(file.read(MAX_HEADER))  # NumPy would allocate whatever length is claimed
    version = np.lib.format.read_magic(start)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(start)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(start)
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"its shape is {shape}")
    return shape, dtype, fortran


def _reader(path: Path, member: str) -> Any:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except UNREADABLE as error:
            raise InputError(f"{path}: '{member}' cannot be read: {error}") from error

    return read
