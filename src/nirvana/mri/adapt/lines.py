"""Measured samples in parts: those that a network sees, and those that it must predict."""

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.physics.pattern import central_block

LEAST_LINES = 4
"""Lines, or points, outside of the middle that an adaptation needs."""


def outside_of_middle(measured: np.ndarray, height: int) -> np.ndarray:
    """The measured samples but for the block that calibrates the coils.

    Args:
        measured: bool `[1, W]`, columns, or `[H, W]`, points.
        height: H.

    Returns:
        bool of the same shape.
    """
    rows, columns = central_block(measured, height)
    outside = measured.copy()
    outside[rows if len(measured) > 1 else slice(None), columns] = False
    return outside


def parts(chosen: np.ndarray, count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Samples in parts that are alike: all have equally many near the origin and far from it.

    Of every `count` samples that follow each other in their distance from the origin, each part
    draws one.

    Args:
        chosen: bool `[1, W]`, columns, or `[H, W]`, points.
        count: of the parts.
        generator: of the draw.

    Returns:
        bool of the same shape, disjoint, together `chosen`; none is empty.
    """
    places = np.flatnonzero(chosen)
    places = places[np.argsort(distance(chosen.shape).flat[places], kind="stable")]
    found = [np.zeros(chosen.shape, dtype=bool) for _ in range(min(count, len(places)))]
    for first in range(0, len(places), max(len(found), 1)):
        block = places[first : first + len(found)]
        for part, place in zip(generator.permutation(len(found)), block, strict=False):
            found[part].flat[place] = True
    return found


def distance(shape: tuple[int, ...]) -> np.ndarray:
    """Distances `[1 or H, W]` from the origin; half a period is 0.5 along both axes."""
    rows, columns = ((np.arange(n) - n // 2) / n for n in shape)
    return np.hypot(rows[:, None], columns)


def acquired(measured: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns from the first to the last measured one; what lies beyond was not
    acquired. The argument is as of `outside_of_middle`."""
    rows, columns = (np.flatnonzero(measured.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def stands_for(hidden: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """How many unseen samples each hidden one represents: those whose distance from the origin is
    nearer to its own than to that of any other, shared among all of the same distance.

    Where the lines are denser near the origin, as in variable-density sampling, most of what is
    missing lies far from it, and most of what can be hidden does not.

    Args:
        hidden: bool `[1 or H, W]`, measured samples that are predicted.
        unseen: bool likewise, all that the network does not see, `hidden` among them.

    Returns:
        float32 likewise, zero outside of `hidden`; their sum is the number of unseen samples.
    """
    far = np.rint(max(hidden.shape) * distance(hidden.shape)).astype(int)
    rings, count = np.unique(far[hidden], return_counts=True)
    cells = np.searchsorted((rings[1:] + rings[:-1]) / 2, far)
    share = np.bincount(cells[unseen], minlength=len(rings)) / count
    return np.where(hidden, share[cells], 0).astype(np.float32)


def require_lines(measured: np.ndarray, height: int, folds: int, name: str) -> None:
    """Checks that enough samples can be held back.

    Args:
        measured: bool `[1, W]` or `[H, W]`.
        height: H.
        folds: into which they are split.
        name: of the scan, for the error.

    Raises:
        InputError: there are fewer than `LEAST_LINES`, or than folds, outside of the middle.
    """
    least = max(LEAST_LINES, folds)
    count = int(outside_of_middle(measured, height).sum())
    if count < least:
        what = "columns" if len(measured) == 1 else "points"
        raise InputError(
            f"{name}: {count} {what} outside of the middle were measured; an adaptation to the "
            f"scan needs at least {least} to hold some back"
        )


def weights(kspace: np.ndarray, measured: np.ndarray, noise: float, power: float) -> np.ndarray:
    """1 / (energy + noise)^power of every sample, so that neither the strong samples near the
    middle nor the noise far from it decide alone.

    Args:
        kspace: complex `[coils, H, W]`, zero where not measured.
        measured: bool `[1, W]` or `[H, W]`.
        noise: standard deviation in the real part.
        power: 0 for equal weights, 1 for relative differences.

    Returns:
        float32 `[H, W]`. The energy is the mean over coils and measured samples at the same
        distance from the origin.
    """
    height, width = kspace.shape[-2:]
    there = np.broadcast_to(measured, (height, width))
    ring = np.rint(64 * distance((height, width))).astype(int)
    energy = np.square(np.abs(kspace)).mean(axis=0)
    total = np.bincount(ring[there], energy[there], ring.max() + 1)
    count = np.bincount(ring[there], minlength=ring.max() + 1)
    mean = total / np.maximum(count, 1)
    floor = max(2 * noise**2, 1e-9 * float(mean.max()), np.finfo(np.float32).tiny)
    return ((mean + floor) ** -power)[ring].astype(np.float32)
