"""K-space that stays in its file: each slice is read when it is used."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

IN_MEMORY = 2**30
"""Bytes of k-space up to which a reader holds all of it in memory."""


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether complex64 k-space of this shape stays in its file."""
    return 8 * math.prod(shape) > IN_MEMORY and shape[0] > 1


class SliceArray:
    """Complex64 `[slices, coils, H, W]` of which each slice is read when it is used.

    Like an array it has a shape, a length, and items and iteration along the first axis. A part of
    its slices is another one; `numpy.asarray` reads all of them.

    Args:
        read: takes the index of a slice and returns it, complex64 `[coils, H, W]`.
        shape: of the whole.
        indices: of the slices that this array has; None takes all.
    """

    dtype = np.dtype(np.complex64)
    ndim = 4

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        shape: tuple[int, ...],
        indices: Sequence[int] | None = None,
    ) -> None:
        self._read = read
        self._indices = range(shape[0]) if indices is None else indices
        self.shape = (len(self._indices), *shape[1:])

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._read(index) for index in self._indices)

    def __getitem__(self, index: Any) -> Any:
        """A slice for a number, all chosen ones for an array of numbers, else a `SliceArray`."""
        if isinstance(index, slice):
            return SliceArray(self._read, self.shape, self._indices[index])
        if isinstance(index, np.ndarray):
            return np.stack([self[int(each)] for each in index])
        return self._read(self._indices[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.stack(list(self))
        return values if dtype is None else values.astype(dtype)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "SliceArray":
        """The same with a function applied to each slice `[coils, H, W]`, of which it changes
        neither the number of coils nor, from slice to slice, the size."""

        def read(index: int) -> np.ndarray:
            return np.ascontiguousarray(function(self._read(index)), dtype=np.complex64)

        shape = read(self._indices[0]).shape
        return SliceArray(read, (self.shape[0], *shape), self._indices)


Kspace = np.ndarray | SliceArray
"""Complex `[slices, coils, H, W]`."""
K = TypeVar("K", bound=Kspace)


def map_slices(kspace: K, function: Callable[[np.ndarray], np.ndarray]) -> K:
    """A function of the last three axes, applied to all of an array or to each slice as it is read.

    Args:
        kspace: array of any number of axes, or `SliceArray`.
        function: of an array, on its last axes alone.
    """
    mapped: Any = kspace.map(function) if isinstance(kspace, SliceArray) else function(kspace)
    return mapped
