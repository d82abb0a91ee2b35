"""Parts that several classical reconstructions share.

NumPy only: worker processes import this module and must start without torch.
"""

from typing import Any, Literal

import numpy as np

AXES = (-2, -1)


def zero_filled(kspace: Any, mask: Any) -> np.ndarray:
    """Root sum of squares of the coil images, with zeros where nothing was measured.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]` or `[H, W]`; what lies outside it is ignored.

    Returns:
        float32 `[slices, H, W]`.
    """
    kspace, mask = np.asarray(kspace), np.asarray(mask, dtype=bool)
    # Slice by slice: the coil images of a whole fastMRI volume would take gigabytes.
    slices = [np.linalg.norm(ifft2c(slice_ * mask), axis=0) for slice_ in kspace]
    return np.stack(slices).astype(np.float32)


def central_rows(block: np.ndarray, count: int) -> np.ndarray:
    """The `count` middle ones, or all, of the rows of a calibration block `[coils, h, w]`."""
    rows = min(count, block.shape[1])
    top = block.shape[1] // 2 - rows // 2
    return block[:, top : top + rows]


def padded(block: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """K-space `[coils, h, w]` zero-padded or cropped to `[coils, H, W]` about its origin."""
    out = np.zeros((len(block), *size), block.dtype)
    into, of = [], []
    for have, want in zip(block.shape[1:], size, strict=True):
        first = want // 2 - have // 2
        into.append(slice(max(first, 0), min(first + have, want)))
        of.append(slice(max(-first, 0), max(-first, 0) + into[-1].stop - into[-1].start))
    out[:, into[0], into[1]] = block[:, of[0], of[1]]
    return out


def fft2c(x: np.ndarray) -> np.ndarray:
    """The centred, orthonormal Fourier transform of the last two axes."""
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=AXES)


def ifft2c(x: np.ndarray, norm: Literal["ortho", "forward"] = "ortho") -> np.ndarray:
    """The inverse of `fft2c`; with norm "forward" that of a transform divided by its size."""
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.ifft2(shifted, norm=norm), axes=AXES)
