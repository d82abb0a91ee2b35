"""Where the origin of k-space lies in a file, and its way to the middle of the array."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import Kspace
from nirvana.mri.io.options import ReadOptions
from nirvana.mri.io.scan import check_size

MAX_SLICES = 32
"""Slices, evenly spaced, whose energy is looked at."""
CONCENTRATION = 2.0
"""Energy around a centre over the mean of the measured lines: 4 to 15 in fully sampled scans, 2.5
where most of the measured lines are around the centre, 1 in noise."""
CLEARLY = 4.0
"""Ratio of energies from which on something is taken to lie elsewhere than it should."""
WRAPPED = 0.05
"""Energy behind the end of an axis over that at the same distance on the origin's other side, from
which on the axis is taken to go on around its end, as that of an FFT's result does."""


@dataclass(frozen=True)
class Move:
    """The way of one axis of k-space into its place.

    Attributes:
        axis: of the array.
        origin: index of k-space's origin along it.
        size: of the axis.
        wraps: whether negative frequencies stand at the end of the axis, as in an FFT's result.
        new_size: with the zeros that are added where frequencies of one side were not measured.
    """

    axis: int
    origin: int
    size: int
    wraps: bool
    new_size: int

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The array with the origin in the middle of the axis."""
        if self.wraps:
            return np.roll(array, self.size // 2 - self.origin, axis=self.axis)
        shape = list(array.shape)
        shape[self.axis] = self.new_size
        result = np.zeros(shape, array.dtype)
        shift = self.new_size // 2 - self.origin
        first, stop = max(shift, 0), min(shift + self.size, self.new_size)
        index: list[slice] = [slice(None)] * array.ndim
        source = index.copy()
        index[self.axis], source[self.axis] = slice(first, stop), slice(first - shift, stop - shift)
        result[tuple(index)] = array[tuple(source)]
        return result

    def of_kspace(self, kspace: Kspace) -> Kspace:
        """K-space with the origin in the middle of the axis, slice by slice where it is read so."""
        if isinstance(kspace, np.ndarray):
            return self(kspace)
        return kspace.map(replace(self, axis=self.axis - 1))


def moves_to_middle(
    kspace: Kspace, options: ReadOptions, is_3d: bool, path: Path
) -> tuple[list[Move], tuple[str, ...]]:
    """The moves that bring the origin of k-space to the middle, and a remark about them.

    "auto" moves an axis only where the energy lies clearly elsewhere than around the middle. The
    energy of a single sample does not count, so that a spike is not taken for the origin.

    Args:
        kspace: complex `[slices, coils, H, W]`, in the axes of the file.
        options: see `ReadOptions`.
        is_3d: whether the first axis is a second phase encoding.
        path: of the file.

    Raises:
        InputError: the options give an origin outside of the array.
    """
    if options.centre == "middle":
        return [], ()
    profiles = _profiles(kspace, is_3d)
    origins = _origins(profiles, options, path)
    moves = [
        _move(axis, origin, profiles[axis], kspace) for axis, origin in sorted(origins.items())
    ]
    if not moves:
        return [], ()
    sizes = dict(enumerate(kspace.shape)) | {move.axis: move.new_size for move in moves}
    check_size(path, tuple(sizes.values()), 8)
    names = {0: "partition", 2: "row", 3: "column"}
    found = ", ".join(f"{names[move.axis]} {move.origin} of {move.size}" for move in moves)
    remark = f"the centre of k-space lies at {found} and was moved to the middle (--centre)"
    grown = [f"{m.new_size - m.size} {names[m.axis]}s" for m in moves if m.new_size > m.size]
    return moves, (remark + (f"; {' and '.join(grown)} of zeros were added" if grown else ""),)


def _profiles(kspace: Kspace, is_3d: bool) -> dict[int, np.ndarray]:
    """Axis -> energy `[size]` along it, NaN where nothing was measured.

    Each sample counts with the median over itself and its measured neighbours.
    """
    from scipy.ndimage import median_filter

    chosen = np.unique(np.linspace(0, len(kspace) - 1, min(len(kspace), MAX_SLICES)).astype(int))
    total = np.zeros(kspace.shape[-2:])
    for number in chosen:
        for coil in kspace[number]:
            total += np.square(np.abs(coil.astype(np.complex128)))
    rows, columns = (np.flatnonzero(np.any(total, axis=axis)) for axis in (1, 0))
    profiles = {axis: np.full(kspace.shape[axis], np.nan) for axis in (2, 3)}
    if rows.size:
        compact = median_filter(total[np.ix_(rows, columns)], size=3, mode="wrap")
        profiles[2][rows], profiles[3][columns] = compact.sum(axis=1), compact.sum(axis=0)
    if is_3d:
        energy = np.array([np.square(np.abs(part)).sum(dtype=np.float64) for part in kspace])
        profiles[0] = np.where(energy > 0, energy, np.nan)
    return profiles


def _origins(profiles: dict[int, np.ndarray], options: ReadOptions, path: Path) -> dict[int, int]:
    """Axis -> index of the origin, of the axes on which it is not in the middle."""
    if options.centre == "auto":
        found = {axis: _clear_peak(profile) for axis, profile in profiles.items()}
    elif options.centre == "corner":
        found = dict.fromkeys(profiles, 0)
    else:
        assert not isinstance(options.centre, str)
        found = dict(zip((2, 3), options.centre, strict=True))
        for axis, origin in found.items():
            if origin >= len(profiles[axis]):
                rows, columns = len(profiles[2]), len(profiles[3])
                raise InputError(
                    f"{path}: --centre {options.centre[0]},{options.centre[1]} lies outside of its "
                    f"{rows} rows and {columns} columns"
                )
    return {
        axis: origin
        for axis, origin in found.items()
        if origin is not None and origin != len(profiles[axis]) // 2
    }


def _clear_peak(profile: np.ndarray) -> int | None:
    """The index around which the energy is, if that is not the middle."""
    size, lines = len(profile), np.flatnonzero(np.isfinite(profile))
    energy = profile[lines]
    middle, half = size // 2, max(1, len(lines) // 32)
    if len(lines) < 4 * half + 2 or not energy.any():
        return None
    peak = int(lines[energy.argmax()])
    if abs(peak - middle) <= max(2, size // 16):
        return None

    def concentration(index: int) -> float:
        nearest = int(np.abs(lines - index).argmin())
        around = np.arange(nearest - half, nearest + half + 1) % len(lines)
        return float(energy[around].mean() / energy.mean())

    here, there = concentration(peak), concentration(middle)
    return peak if here >= CONCENTRATION and here >= CLEARLY * there else None


def _move(axis: int, origin: int, profile: np.ndarray, kspace: Kspace) -> Move:
    size = len(profile)
    near = min(origin, size - origin)
    if near <= max(2, size // 16) and _goes_on(profile, origin):
        return Move(axis, 0, size, True, size)
    if abs(origin - size // 2) <= 1:  # conventions of odd sizes differ by one
        return Move(axis, origin, size, True, size)
    used = _used(kspace, axis)
    shift = size // 2 - origin
    if used[0] + shift >= 0 and used[-1] + shift < size:
        return Move(axis, origin, size, False, size)
    return Move(axis, origin, size, False, 2 * max(origin, size - origin))


def _used(kspace: Kspace, axis: int) -> np.ndarray:
    """The places along an axis that hold anything but zero."""
    if axis == 0:
        return np.flatnonzero([np.any(part) for part in kspace])
    others = tuple(number for number in range(3) if number != axis - 1)
    return np.flatnonzero(np.any([np.any(part, axis=others) for part in kspace], axis=0))


def _goes_on(profile: np.ndarray, origin: int) -> bool:
    """Whether the energy goes on around the nearer end of an axis: whether the lines behind it hold
    as much as those as far from the origin on its other side."""
    size = len(profile)
    steps = np.arange(max(2, size // 32))
    behind = -1 - steps if origin < size // 2 else size + steps
    opposite = profile[(2 * origin - behind) % size]
    known = np.isfinite(opposite) & np.isfinite(profile[behind % size])
    if not known.any():
        return True
    return bool(profile[behind % size][known].sum() >= WRAPPED * opposite[known].sum())


def around_corner(kspace: Kspace) -> bool:
    """Whether the images lie around the corner of the field of view instead of its middle, as those
    of k-space made by an FFT without the shift of its input: along both axes the border is much
    brighter than the middle.

    Args:
        kspace: complex `[slices, coils, H, W]`, origin in the middle.
    """
    part = kspace[len(kspace) // 2].astype(np.complex128)
    images = np.fft.ifft2(np.fft.ifftshift(part, axes=(-2, -1)))
    energy = np.square(np.abs(np.fft.fftshift(images, axes=(-2, -1)))).sum(axis=0)
    return all(_brighter_border(energy.sum(axis=axis)) for axis in (0, 1))


def _brighter_border(profile: np.ndarray) -> bool:
    size, half = len(profile), max(1, len(profile) // 16)
    border = np.concatenate([profile[:half], profile[size - half :]]).mean()
    middle = profile[size // 2 - half : size // 2 + half].mean()
    return bool(border > CLEARLY * middle)


def to_middle_of_view(kspace: np.ndarray) -> np.ndarray:
    """The k-space of the images rolled from the corner of the field of view to its middle."""
    rows, columns = (
        np.exp(2j * np.pi * (np.arange(size) - size // 2) * (size // 2) / size)
        for size in kspace.shape[-2:]
    )
    return kspace * np.outer(rows, columns).astype(np.complex64)
