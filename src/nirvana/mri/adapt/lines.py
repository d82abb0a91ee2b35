"""Measured samples in three parts: the network's input, what it must predict, when to stop."""

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.physics.pattern import central_block

LEAST_LINES = 4
"""Lines, or points, outside of the middle that an adaptation needs."""


def held_back(
    measured: np.ndarray, height: int, share: float, generator: np.random.Generator
) -> np.ndarray:
    """Some of the measured samples outside of the calibrated middle, drawn at random.

    Args:
        measured: bool `[1, W]`, columns, or `[H, W]`, points.
        height: H.
        share: of the samples outside of the middle, 0..1; at least one is drawn.
        generator: of the draw.

    Returns:
        bool of the same shape, within `measured`.
    """
    outside = np.flatnonzero(outside_of_middle(measured, height))
    count = min(max(round(share * len(outside)), 1), len(outside))
    found = np.zeros(measured.shape, dtype=bool)
    found.flat[generator.choice(outside, count, replace=False)] = True
    return found


def outside_of_middle(measured: np.ndarray, height: int) -> np.ndarray:
    """The measured samples but for the block that calibrates the coils; arguments as of
    `held_back`."""
    rows, columns = central_block(measured, height)
    outside = measured.copy()
    outside[rows if len(measured) > 1 else slice(None), columns] = False
    return outside


def require_lines(measured: np.ndarray, height: int, name: str) -> None:
    """Checks that enough samples can be held back.

    Args:
        measured: bool `[1, W]` or `[H, W]`.
        height: H.
        name: of the scan, for the error.

    Raises:
        InputError: there are fewer than `LEAST_LINES` outside of the middle.
    """
    count = int(outside_of_middle(measured, height).sum())
    if count < LEAST_LINES:
        what = "columns" if len(measured) == 1 else "points"
        raise InputError(
            f"{name}: {count} {what} outside of the middle were measured; an adaptation to the "
            f"scan needs at least {LEAST_LINES} to hold some back"
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
    rows = (np.arange(height) - height // 2) / height
    columns = (np.arange(width) - width // 2) / width
    ring = np.rint(64 * np.hypot(rows[:, None], columns)).astype(int)
    energy = np.square(np.abs(kspace)).mean(axis=0)
    total = np.bincount(ring[there], energy[there], ring.max() + 1)
    count = np.bincount(ring[there], minlength=ring.max() + 1)
    mean = total / np.maximum(count, 1)
    floor = max(2 * noise**2, 1e-9 * float(mean.max()), np.finfo(np.float32).tiny)
    return ((mean + floor) ** -power)[ring].astype(np.float32)
