"""MATLAB's files of versions 5 to 7; version 7.3 is HDF5.

The format is a list of elements, each a type, a size and as many bytes, padded to eight; the
element of an array contains others: flags, dimensions, name, real part and, where the flags state
so, imaginary part. From version 7 on an array is one compressed element that holds its element.
(MATLAB, "MAT-File Format", The MathWorks.)
"""

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.arrays import ArrayFile, Variable
from nirvana.mri.io.scan import MAX_COMPRESSION, UNREADABLE, check_bytes

START = 128
"""Bytes before the first element."""
HEAD = 2**12
"""Bytes of an array's element that hold flags, dimensions and name."""
MATRIX, COMPRESSED = 14, 15
COMPLEX = 1 << 11
# Types of elements, and classes of arrays of numbers.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = dict(
    zip(range(6, 16), ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"), strict=True)
)
Order = Literal["<", ">"]
MAX_DIMENSIONS, MAX_VARIABLES = 32, 4096


def matlab_file(path: Path) -> ArrayFile:
    """The arrays of numbers in a `.mat` file, unread; others are left out.

    Raises:
        InputError: it is no such file, or an array claims more than is stored.
    """
    variables: list[Variable] = []
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            mark = file.read(START)[-2:]
            if mark not in (b"IM", b"MI"):
                raise InputError(f"{path} is no MATLAB file of version 5 or later")
            order: Order = "<" if mark == b"IM" else ">"
            position = START
            while position < size and len(variables) < MAX_VARIABLES:
                file.seek(position)
                kind, length = struct.unpack(f"{order}II", file.read(8).ljust(8, b"\0"))
                if position + 8 + length > size:
                    raise InputError(f"{path} is cut off or damaged: an array ends behind its end")
                element = _Element(path, position + 8, length, kind == COMPRESSED, order)
                if kind in (MATRIX, COMPRESSED):
                    variables += element.variables()
                position += 8 + length
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no readable MATLAB file: {error}") from error
    return ArrayFile(path, variables, "F")


@dataclass(frozen=True)
class _Element:
    """An array's element in a file.

    Attributes:
        path: of the file.
        start: of its content.
        length: of its content as stored.
        is_compressed: whether the content is compressed.
        order: of bytes, "<" or ">".
    """

    path: Path
    start: int
    length: int
    is_compressed: bool
    order: Order

    def variables(self) -> list[Variable]:
        """The array, unread, if it is one of numbers."""
        head = _Parts(self._content(HEAD), self.order)
        (flags, _), dims = head.numbers()[:2].tolist(), head.numbers().tolist()
        name = head.bytes().decode("latin1")
        if flags & 0xFF not in CLASSES or not 2 <= len(dims) <= MAX_DIMENSIONS or min(dims) < 0:
            return []
        available = self.length * (MAX_COMPRESSION if self.is_compressed else 1)
        if math.prod(dims) > available:  # a number takes a byte at least
            raise InputError(f"{self.path}: '{name}' claims more than the file can hold")
        is_complex = bool(flags & COMPLEX)
        dtype = np.dtype(np.complex64 if is_complex else CLASSES[flags & 0xFF])
        return [Variable(name, tuple(dims), dtype, self._reader(name, dims, dtype))]

    def _reader(self, name: str, dims: list[int], dtype: np.dtype) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            check_bytes(self.path, tuple(dims), 16)
            try:
                parts = _Parts(self._content(HEAD + 16 * math.prod(dims)), self.order)
                for _ in range(3):
                    parts.bytes()
                with np.errstate(over="ignore"):  # what is infinite is refused by the caller
                    values = parts.numbers().astype(dtype)
                    if dtype.kind == "c":
                        values.imag = parts.numbers()
                return values.reshape(dims, order="F")
            except UNREADABLE as error:
                raise InputError(f"{self.path}: '{name}' cannot be read: {error}") from error

        return read

    def _content(self, most: int) -> bytes:
        """What follows the element's type and size, at most so many bytes."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            if not self.is_compressed:
                return file.read(min(self.length, most))
            return zlib.decompressobj().decompress(file.read(self.length), most)[8:]


class _Parts:
    """The elements within the content of an array's element, one after the other."""

    def __init__(self, content: bytes, order: Order):
        self.content, self.position = memoryview(content), 0
        self.order: Order = order

    def numbers(self) -> np.ndarray:
        """The next element's numbers."""
        kind, content = self._next()
        if kind not in TYPES:
            raise ValueError(f"an element has the unknown type {kind}")
        dtype = np.dtype(TYPES[kind]).newbyteorder(self.order)
        return np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)

    def bytes(self) -> bytes:
        """The next element's bytes."""
        return bytes(self._next()[1])

    def _next(self) -> tuple[int, memoryview]:
        start = self.content[self.position : self.position + 8]
        kind, length = struct.unpack(f"{self.order}II", start)
        if kind >> 16:  # a small element: type, size and content in eight bytes
            kind, length = kind & 0xFFFF, kind >> 16
            self.position += 8
            return kind, start[4 : 4 + length]
        first = self.position + 8
        self.position = first + length + -length % 8
        return kind, self.content[first : first + length]
