"""Parts that several classical reconstructions share.

NumPy only: worker processes import this module and must start without torch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

AXES = (-2, -1)


@dataclass(frozen=True)
class ClassicalSettings:
    """Settings of `sigpy.l1_wavelet` and `sigpy.sense`, tuned by hand on a few simulated slices of
    two training volumes and of nibabel's example4d (8 coils, four-fold equispaced, noise 0.002 to
    0.015).

    Attributes:
        noise_factor: weight of the L1 norm in standard deviations of the k-space noise.
        min_weight: least such weight, relative to the brightest voxel of the zero-filled volume.
        iterations: FISTA steps. Early stopping is part of the regularisation: running to
            convergence amplifies noise between aliases.
        wavelet: name of the wavelet, for PyWavelets.
        kernel: side of ESPIRiT's kernels in k-space samples.
        threshold: smallest singular value kept of the calibration matrix, relative to the
            largest.
        crop: sensitivities are zero where ESPIRiT's eigenvalue is below this, because no coil has
            signal there.
        calibration_rows: number of k-space rows of the calibration region.
        sense_weight: of the squared norm in `sense`.
        sense_iterations: conjugate-gradient steps of `sense`.
    """

    noise_factor: float = 0.15
    min_weight: float = 1.5e-4
    iterations: int = 80
    wavelet: str = "db4"
    kernel: int = 6
    threshold: float = 0.02
    crop: float = 0.5
    calibration_rows: int = 24
    sense_weight: float = 1e-2
    sense_iterations: int = 15


def zero_filled(kspace: Any, mask: Any) -> np.ndarray:
    """Root sum of squares of the coil images, with zeros where nothing was measured.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]`; columns outside it are ignored.

    Returns:
        float32 `[slices, H, W]`.
    """
    kspace, mask = arrays(kspace, mask)
    # Slice by slice: the coil images of a whole fastMRI volume would take gigabytes.
    slices = [np.linalg.norm(ifft2c(slice_ * mask), axis=0) for slice_ in kspace]
    return np.stack(slices).astype(np.float32)


def with_measured(kspace: np.ndarray, mask: np.ndarray, modelled: np.ndarray) -> np.ndarray:
    """The image of a modelled k-space with data consistency.

    Args:
        kspace: complex `[coils, H, W]`, measured.
        mask: bool `[W]`, its columns.
        modelled: complex `[coils, H, W]`.

    Returns:
        Real `[H, W]`, root sum of squares.
    """
    return np.linalg.norm(ifft2c(np.where(mask, kspace, modelled)), axis=0)


def noise_level(kspace: np.ndarray, mask: np.ndarray) -> float:
    """Standard deviation of the noise in the real (or imaginary) part of k-space.

    Estimated from the measured samples with the least signal, farthest from the middle (the outer
    eighth of the rows, in the outer half of the sampled columns): the lower quartile of the
    magnitude of complex noise is 0.759 standard deviations. 0 where k-space was zero-padded.

    Args:
        kspace: complex `[slices, coils, H, W]`.
        mask: bool `[W]`.
    """
    height, width = kspace.shape[-2:]
    columns = np.flatnonzero(mask)
    distance = np.abs(columns - width // 2)
    outer = columns[distance >= np.median(distance)]
    edge = max(height // 16, 1)
    rows = np.r_[:edge, height - edge : height]
    samples = np.abs(kspace[:, :, rows][..., outer])
    return float(np.quantile(samples, 0.25) / np.sqrt(2 * np.log(4 / 3)))


def arrays(kspace: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """K-space as complex64 `[slices, coils, H, W]` and mask as bool `[W]`.

    Raises:
        ValueError: the shapes differ from these.
    """
    kspace = np.asarray(kspace, dtype=np.complex64)
    mask = np.asarray(mask, dtype=bool)
    if kspace.ndim != 4 or mask.shape != kspace.shape[-1:]:
        raise ValueError(
            f"k-space {kspace.shape} and mask {mask.shape} must be [slices, coils, H, W] and [W]"
        )
    return kspace, mask


def fft2c(x: np.ndarray) -> np.ndarray:
    """The centred, orthonormal Fourier transform of the last two axes."""
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=AXES)


def ifft2c(x: np.ndarray, norm: Literal["ortho", "forward"] = "ortho") -> np.ndarray:
    """The inverse of `fft2c`; with norm "forward" that of a transform divided by its size."""
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.ifft2(shifted, norm=norm), axes=AXES)
