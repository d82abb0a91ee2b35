"""The image that comes with k-space: whether it is its image, and on which scale."""

from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import Kspace

SAME_SCALE = 0.02
"""Deviation from 1 of the ratio of two scales that is not corrected: targets that were filtered or
rounded differ by less."""
SAME_SCALE_UNDERSAMPLED = 0.2
"""The same where only the middle of k-space can be compared."""
DIFFERENT, DIFFERENT_UNDERSAMPLED = 0.25, 0.5
"""Share of the energy of the k-space's images that the target lacks, from which on it is another
image."""
MIN_BLOCK = 8
"""Lines in the middle of undersampled k-space that a comparison needs."""
MAX_SLICES = 3


def matched(
    target: np.ndarray, kspace: Kspace, mask: np.ndarray | None, path: Path
) -> tuple[np.ndarray | None, list[str]]:
    """The target on the scale of the k-space, and a remark where that is not the file's.

    Root-sum-of-squares images of a few slices, of the fully sampled middle of undersampled k-space
    alone, are compared with the target.

    Args:
        target: real `[slices, h, w]`.
        kspace: complex `[slices, coils, H, W]`, origin in the middle.
        mask: of `Scan`.
        path: of the file.

    Returns:
        The target, float32, multiplied by one number if the scales differ; None if it is not an
        image of this k-space.

    Raises:
        InputError: its shape does not fit the k-space.
    """
    slices, _, height, width = kspace.shape
    fits = target.ndim == 3 and len(target) == slices and 0 not in target.shape
    if not fits or target.shape[1] > height or target.shape[2] > width:
        raise InputError(
            f"{path}: the target has shape {target.shape}; for this k-space it must be "
            f"[{slices}, h <= {height}, w <= {width}]"
        )
    target = np.asarray(target, dtype=np.float32)
    chosen = np.argsort(target.reshape(slices, -1).max(axis=1), kind="stable")[-MAX_SLICES:]
    used = np.any(kspace[chosen], axis=(0, 1))
    if mask is not None:
        used = used & (np.all(mask[chosen], axis=0) if mask.ndim == 3 else mask)
    window, is_full = _middle_window(used)
    if window is None:
        return target, []
    ours = _images(kspace[chosen] * window, target.shape[-2:])
    theirs = target[chosen].astype(np.float64)
    if not is_full:
        theirs = _smoothed(theirs, window, (height, width))
    if not ours.any() or not theirs.any():
        return target, []
    scale = float((ours * theirs).sum() / (theirs**2).sum())
    left = float(((ours - scale * theirs) ** 2).sum() / (ours**2).sum())
    if left > (DIFFERENT if is_full else DIFFERENT_UNDERSAMPLED):
        return None, [
            f"the target is not used: {left:.0%} of the energy of the k-space's images is not in it"
        ]
    tolerance = SAME_SCALE if is_full else SAME_SCALE_UNDERSAMPLED
    if abs(scale - 1) <= tolerance:
        return target, []
    how = "" if is_full else ", by the middle of k-space,"
    remark = f"the target has another scale{how} and was multiplied by {scale:.4g}"
    return (target * np.float32(scale)).astype(np.float32), [remark]


def _middle_window(used: np.ndarray) -> tuple[np.ndarray | None, bool]:
    """A window `[H, W]` on the block in the middle without gaps, None where that is too small, and
    whether the block is all that was measured."""
    blocks = [_block(np.any(used, axis=axis)) for axis in (1, 0)]
    if all(full for _, full in blocks):
        return np.ones(used.shape), True
    if min(half for half, full in blocks if not full) < MIN_BLOCK // 2:
        return None, False
    sides = []
    for (half, full), size in zip(blocks, used.shape, strict=True):
        side = np.full(size, float(full))
        if not full:  # smooth, so that both images ring equally little
            side[size // 2 - half : size // 2 + half] = np.hanning(2 * half + 2)[1:-1]
        sides.append(side)
    return np.outer(*sides), False


def _block(used: np.ndarray) -> tuple[int, bool]:
    """Half of the width of the block of used lines about the middle, and whether no other line is
    used; equally many unused lines at both ends alone are zero-padding."""
    middle, places = len(used) // 2, np.flatnonzero(used)
    holes = np.flatnonzero(~used)
    below = int(holes[holes <= middle].max(initial=-1)) + 1
    above = int(holes[holes >= middle].min(initial=len(used)))
    half = max(min(middle - below, above - middle), 0)
    even = abs(int(places[0]) - (len(used) - 1 - int(places[-1]))) <= 2
    return half, even and len(places) == places[-1] - places[0] + 1


def _images(kspace: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Root-sum-of-squares images, cropped to the middle `size`."""
    shifted = np.fft.ifftshift(kspace, axes=(-2, -1))
    images = np.fft.fftshift(np.fft.ifft2(shifted, norm="ortho"), axes=(-2, -1))
    combined = np.sqrt(np.square(np.abs(images)).sum(axis=1))
    top, left = ((have - want) // 2 for have, want in zip(combined.shape[-2:], size, strict=True))
    return combined[:, top : top + size[0], left : left + size[1]]


def _smoothed(target: np.ndarray, window: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A target as an image of the same window of k-space shows it."""
    padded = np.zeros((len(target), *size))
    rows, columns = target.shape[-2:]
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    padded[:, top : top + rows, left : left + columns] = target
    spectrum = np.fft.fft2(np.fft.ifftshift(padded, axes=(-2, -1)))
    spectrum *= np.fft.ifftshift(window)
    images = np.abs(np.fft.fftshift(np.fft.ifft2(spectrum), axes=(-2, -1)))
    return images[:, top : top + rows, left : left + columns]
