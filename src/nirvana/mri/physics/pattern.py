"""Sampling patterns of measured k-space: their canonical forms, gaps, extent and central block.

A pattern is a bool array in one of four forms, all of which broadcast over coils:

    [W]             whole columns, the same in every slice
    [H, W]          points of both phase encodings, the same in every slice
    [slices, 1, W]  whole columns, for each slice
    [slices, H, W]  points, for each slice

The origin of k-space lies at `[H // 2, W // 2]`. NumPy only: worker processes of the classical
methods import this module and must start without torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import Kspace

# The share of a pattern's points that must hold something for it to be taken as complete: numbers
# of few bits are exactly zero by chance.
COMPLETE = 0.9


def slice_pattern(pattern: np.ndarray, index: int) -> np.ndarray:
    """The pattern of one slice, bool `[1, W]` of whole columns or `[H, W]` of points."""
    if pattern.ndim == 3:
        return pattern[index if len(pattern) > 1 else 0]
    return pattern[None] if pattern.ndim == 1 else pattern


def slice_patterns(pattern: np.ndarray) -> np.ndarray:
    """The patterns of all slices, bool `[slices or 1, H or 1, W]`."""
    return pattern if pattern.ndim == 3 else slice_pattern(pattern, 0)[None]


def sampled_share(pattern: np.ndarray) -> float:
    """Share of k-space that is sampled, 0..1."""
    return float(pattern.mean())


def checked_pattern(mask: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A mask that a user gives, as an array of one of the four forms.

    Args:
        mask: array or tensor of numbers or booleans.
        shape: of the k-space, `[slices, coils, H, W]`.
        name: of the scan, for the error.

    Raises:
        InputError: it has another shape.
    """
    pattern = np.asarray(mask)
    slices, _, height, width = shape
    if pattern.shape == (slices, width) and pattern.shape != (height, width):
        pattern = pattern[:, None]  # a pattern of columns for each slice
    allowed = ((width,), (height, width), (slices, 1, width), (slices, height, width))
    if pattern.shape not in allowed:
        raise InputError(
            f"{name}: the mask is {pattern.shape}; k-space of {slices} slices of {height} x {width}"
            f" takes [{width}], [{height}, {width}], [{slices}, {width}] or "
            f"[{slices}, {height}, {width}]"
        )
    return pattern.astype(bool)


def measured_points(kspace: Kspace) -> np.ndarray:
    """The points of each slice where any coil holds anything but zero, bool `[slices, H, W]`."""
    return np.stack([(np.asarray(part) != 0).any(axis=0) for part in kspace])


def find_pattern(points: np.ndarray, name: str) -> np.ndarray:
    """The pattern that measured points lie in, in its simplest form.

    Rows at the two ends of the readout may be empty (a late echo, zero-padding), and a tenth of
    the points may be zero by chance. Empty slices have any pattern.

    Args:
        points: bool `[slices, H, W]`.
        name: of the scan, for the error.

    Returns:
        Bool, one of the four forms.

    Raises:
        InputError: nothing was measured, or whole rows are missing between others: phase encoding
            must run along the last axis.
    """
    filled = _any(points, (1, 2))
    if not filled.any():
        raise InputError(f"{name}: its mask keeps no point of k-space that holds anything")
    union = _any(points, 0)
    slices = np.flatnonzero(filled)
    for index in slices:
        _require_rows(points[index], union, int(index), name)
    if all(_whole_columns(points[index]) for index in slices):
        columns = _any(points, 1)
        together = _any(columns, 0)
        if all(columns[index].sum() >= COMPLETE * together.sum() for index in slices):
            return together
        columns[~filled] = together
        return columns[:, None]
    if all(points[index].sum() >= COMPLETE * union.sum() for index in slices):
        return union
    return np.where(filled[:, None, None], points, union)


def _any(points: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    return np.asarray(points.any(axis=axis))


def _whole_columns(points: np.ndarray) -> bool:
    """Whether the points `[H, W]` of a slice fill whole columns, but for rows at the two ends."""
    rows, columns = _any(points, 1), _any(points, 0)
    return not has_gaps(rows) and points[rows][:, columns].mean() >= COMPLETE


def _require_rows(points: np.ndarray, union: np.ndarray, index: int, name: str) -> None:
    """Refuses a slice in which rows are missing as a whole and columns are not."""
    rows, columns = _any(points, 1), _any(union, 0)
    if has_gaps(rows) and not has_gaps(columns) and points[rows][:, columns].mean() >= COMPLETE:
        raise InputError(
            f"{name}: slice {index} lacks rows of k-space; phase encoding must run along the last "
            "axis, so that whole columns are measured or left out"
        )


def has_gaps(line: np.ndarray) -> bool:
    """Whether anything is missing between sampled places of a bool `[N]`, or nothing is sampled.

    Empty places at the two ends alone are zero-padding, which fully sampled scans have, too, or
    partial Fourier sampling, which `Extent` finds.
    """
    places = np.flatnonzero(line)
    return len(places) == 0 or int(places[-1] - places[0]) + 1 != len(places)


def pattern_has_gaps(pattern: np.ndarray) -> bool:
    """Whether points are missing between sampled ones, in any slice."""
    for part in slice_patterns(pattern):
        rows, columns = _any(part, 1), _any(part, 0)
        if has_gaps(rows) or has_gaps(columns) or not part[rows][:, columns].all():
            return True
    return False


@dataclass(frozen=True)
class Extent:
    """The measured part of k-space along its two axes, from its first to its last sample.

    Attributes:
        rows: first row, and the one after the last, along the readout H.
        columns: likewise along the phase encoding W.
        height: H.
        width: W.
        late_echo: the readout reaches clearly less far on one side of the origin.
        partial_fourier: so does the phase encoding.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    height: int
    width: int
    late_echo: bool
    partial_fourier: bool

    @property
    def is_partial(self) -> bool:
        """Whether one side of k-space is missing along any axis."""
        return self.late_echo or self.partial_fourier

    def remarks(self, rows: str = "rows") -> tuple[str, ...]:
        """What is missing, a sentence for each axis.

        Args:
            rows: what lies along H: "rows" of the readout, or "partitions" of a 3D scan.
        """
        found = []
        if self.partial_fourier:
            found.append(
                f"partial Fourier: columns {self.columns[0]} to {self.columns[1] - 1} of "
                f"{self.width} were measured; the missing side was completed by conjugate symmetry"
            )
        if self.late_echo:
            kind = "asymmetric echo" if rows == "rows" else "partial Fourier"
            found.append(
                f"{kind}: {rows} {self.rows[0]} to {self.rows[1] - 1} of {self.height} were "
                "measured; the missing side was completed by conjugate symmetry"
            )
        return tuple(found)


def find_extent(pattern: np.ndarray, energy: np.ndarray) -> Extent:
    """The extent of a scan.

    A side counts as missing along W where the pattern ends clearly nearer to the origin than on
    the other side: by more than 4 % of W, two samples, and three times the widest gap between
    sampled columns. Along H it counts as missing where rows hold less than a tenth of the energy
    of the rows opposite the origin: resampling along the readout leaves no exact zeros.

    Args:
        pattern: bool, one of the four forms.
        energy: float `[H]`, mean squared magnitude of the measured samples of each row.
    """
    by_slice = slice_patterns(pattern)
    columns = _any(by_slice, (0, 1))
    rows = _any(by_slice, (0, 2))
    height, width = len(energy), len(columns)
    filled = _energetic(energy) & (rows if len(rows) > 1 else True)
    return Extent(
        rows=_ends(filled),
        columns=_ends(columns),
        height=height,
        width=width,
        late_echo=is_one_sided(filled),
        partial_fourier=is_one_sided(columns),
    )


def _energetic(energy: np.ndarray) -> np.ndarray:
    """Rows that hold at least a tenth of the energy of their mirror images about `H // 2`."""
    mirrored = np.roll(energy[::-1], 1 - len(energy) % 2)
    if len(energy) % 2 == 0:
        mirrored[0] = mirrored[1]  # row -H/2 has no mirror image
    return (energy > 0.1 * mirrored) & (energy > 0)


def _ends(line: np.ndarray) -> tuple[int, int]:
    places = np.flatnonzero(line)
    return int(places[0]), int(places[-1]) + 1


def is_one_sided(line: np.ndarray) -> bool:
    """Whether a bool `[N]` ends clearly nearer to its middle on one side than on the other."""
    places = np.flatnonzero(line)
    middle = len(line) // 2
    missing = abs((middle - places[0]) - (places[-1] - middle))
    gap = int(np.diff(places).max()) if len(places) > 1 else 1
    return bool(missing > max(2, 0.04 * len(line), 3 * (gap - 1) + 1))


def central_width(line: np.ndarray) -> int:
    """Length of the fully sampled block in the middle of a bool `[N]`.

    The largest n for which the n places from `N // 2 - n // 2` on are all sampled; 0 when the
    middle one is not.
    """
    middle = len(line) // 2
    holes = np.flatnonzero(~line)
    left = middle - max((hole for hole in holes if hole <= middle), default=-1) - 1
    right = min((hole for hole in holes if hole >= middle), default=len(line)) - middle
    return 0 if right == 0 else int(min(2 * left + 1, 2 * right))


def central_block(pattern: np.ndarray, height: int) -> tuple[slice, slice]:
    """The largest fully sampled block around the origin: its rows and columns.

    Args:
        pattern: bool `[1, W]` or `[H, W]`, of one slice.
        height: H.
    """
    rows = len(pattern)
    if rows == 1:
        return _around(height, height), _around(pattern.shape[1], central_width(pattern[0]))
    counts = range(1, rows + 1)
    sizes = {n: central_width(np.asarray(pattern[_around(rows, n)].all(axis=0))) for n in counts}
    count = max(sizes, key=lambda n: (n * sizes[n], n))
    return _around(rows, count), _around(pattern.shape[1], sizes[count])


def _around(length: int, count: int) -> slice:
    """The `count` places around the middle of `length`."""
    first = length // 2 - count // 2
    return slice(first, first + count)
