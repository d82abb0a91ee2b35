"""Reconstructions without a neural network: zero-filled, and ESPIRiT with SENSE or L1-wavelets.

NumPy only at the top: the worker processes import this file and should not wait for torch.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nirvana.errors import InputError

AXES = (-2, -1)
THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Wavelet:
    """Settings of `l1_wavelet`, tuned by hand on a few simulated slices of two training volumes and
    of nibabel's example4d, 8 coils, four-fold equispaced, noise 0.002 to 0.015.

    Attributes:
        noise_factor: weight of the L1 norm in standard deviations of the k-space noise.
        min_weight: least such weight, relative to the brightest voxel of the zero-filled volume.
        iterations: FISTA steps. Early stopping is part of the regularisation: running to
            convergence amplifies noise between aliases.
        wavelet: name of the wavelet, for PyWavelets.
        kernel: side of ESPIRiT's kernels in k-space samples.
        threshold: smallest singular value kept of the calibration matrix, relative to the
            largest.
        crop: sensitivities are zero where ESPIRiT's eigenvalue is below this: no coil saw
            anything there.
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
    """RSS of the inverse Fourier transform, zeros where nothing was measured.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]`; columns outside it are ignored.

    Returns:
        float32 `[slices, H, W]`.
    """
    kspace, mask = arrays(kspace, mask)
    # Slice by slice: the coil images of a whole fastMRI volume would take gigabytes.
    slices = [np.linalg.norm(_ifft2c(slice_ * mask), axis=0) for slice_ in kspace]
    return np.stack(slices).astype(np.float32)


def l1_wavelet(
    kspace: Any,
    mask: Any,
    calibration_width: int,
    settings: Wavelet | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """ESPIRiT sensitivities S, then compressed sensing with sigpy, slice by slice:

        x = argmin 1/2 || M F S x - y ||^2 + weight || wavelet(x) ||_1

    and from x the coil images S x, with the measured columns of their k-space put back, combined
    by root sum of squares. The result is therefore on the scale of an RSS image, and a rescaled
    k-space gives the same image, rescaled.

    Slices run in worker processes of one thread each, started by "spawn": a script that calls
    this needs the usual `if __name__ == "__main__":`, or `workers=1`, which starts none.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]`.
        calibration_width: fully sampled columns in the middle, `physics.calibration_width(mask)`.
        settings: see `Wavelet`.
        workers: processes; at most, and by default, one for each core.
        progress: called with the number of slices just done.

    Returns:
        float32 `[slices, H, W]`.

    Raises:
        InputError: there is no calibration column.
    """
    return _by_slices(_wavelet_image, kspace, mask, calibration_width, settings, workers, progress)


def sense(
    kspace: Any,
    mask: Any,
    calibration_width: int,
    settings: Wavelet | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """As `l1_wavelet`, with a squared norm instead (SENSE, Pruessmann et al., 2001), by conjugate
    gradients: x = argmin 1/2 || M F S x - y ||^2 + weight / 2 || x ||^2."""
    return _by_slices(_sense_image, kspace, mask, calibration_width, settings, workers, progress)


def _by_slices(
    image_of: Callable[..., np.ndarray],
    kspace: Any,
    mask: Any,
    calibration_width: int,
    settings: Wavelet | None,
    workers: int | None,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    settings = settings or Wavelet()
    kspace, mask = arrays(kspace, mask)
    if calibration_width < 1:
        raise InputError(
            "this reconstruction estimates coil sensitivities from sampled columns in "
            "the middle of k-space, and this mask has none there"
        )
    scale = float(zero_filled(kspace, mask).max())
    if not scale > 0:
        return np.zeros((len(kspace), *kspace.shape[-2:]), dtype=np.float32)
    weight = max(settings.noise_factor * noise_level(kspace, mask) / scale, settings.min_weight)
    tasks = [
        (
            image_of,
            np.where(mask, slice_, 0) / np.float32(scale),
            mask,
            calibration_width,
            weight,
            settings,
        )
        for slice_ in kspace
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, cores or 1, len(tasks))
    volume = []
    with _mapper(workers) as apply:
        for image in apply(_reconstruct_slice, tasks):
            volume.append(image * scale)
            if progress is not None:
                progress(1)
    return np.stack(volume).astype(np.float32)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Any]]:
    """`map`, over processes if there are several; each of them with one thread."""
    if workers == 1:
        yield map
        return
    before = {key: os.environ.get(key) for key in THREAD_SETTINGS}
    # The numerical libraries read these when they are loaded, so they must stand in the
    # environment that the workers inherit.
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield pool.map
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _reconstruct_slice(
    task: tuple[Callable[..., np.ndarray], np.ndarray, np.ndarray, int, float, Wavelet],
) -> np.ndarray:
    """One slice, `[coils, H, W]` -> `[H, W]`; sampled columns as measured, the others modelled."""
    image_of, kspace, mask, calibration_width, weight, settings = task
    if not kspace.any():
        return np.zeros(kspace.shape[1:], dtype=np.float32)
    maps = espirit_maps(kspace, calibration_width, settings)
    weights = np.broadcast_to(mask, kspace.shape[1:]).astype(np.float32)
    image = image_of(kspace, maps, weights, weight, settings)
    return with_measured(kspace, mask, fft2c(maps * image))


def with_measured(kspace: np.ndarray, mask: np.ndarray, modelled: np.ndarray) -> np.ndarray:
    """Root sum of squares `[H, W]` of a modelled k-space `[coils, H, W]` with the measured columns
    put back."""
    return np.linalg.norm(_ifft2c(np.where(mask, kspace, modelled)), axis=0)


def _wavelet_image(
    kspace: np.ndarray, maps: np.ndarray, weights: np.ndarray, weight: float, settings: Wavelet
) -> np.ndarray:
    from sigpy.mri.app import L1WaveletRecon

    # The sensitivities have unit norm, so the operator's norm is at most 1 and so may the step be.
    app: Any = L1WaveletRecon(
        kspace,
        maps,
        weight,
        weights=weights,
        wave_name=settings.wavelet,
        max_iter=settings.iterations,
        alpha=1,
        show_pbar=False,
    )
    return app.run()


def _sense_image(
    kspace: np.ndarray, maps: np.ndarray, weights: np.ndarray, _weight: float, settings: Wavelet
) -> np.ndarray:
    from sigpy.mri.app import SenseRecon

    options: Any = {"lamda": settings.sense_weight, "max_iter": settings.sense_iterations}
    app: Any = SenseRecon(kspace, maps, weights=weights, show_pbar=False, **options)
    return app.run()


def espirit_maps(
    kspace: np.ndarray, calibration_width: int, settings: Wavelet | None = None
) -> np.ndarray:
    """Coil sensitivities from the middle of k-space (ESPIRiT, Uecker et al. 2014, one set).

    With P the projection on the leading singular space of the calibration patches, and R its sums
    along equal displacements, the sensitivities in pixel r are the leading eigenvector of
    sum_d R[:, :, d] exp(2 pi i d r / N) / kernel size. sigpy's own version wants a calibration
    region that is as high as it is wide; here all rows of the sampled columns may serve, which
    at 8 to 10 columns is worth more than a decibel.

    Args:
        kspace: complex `[coils, H, W]`.
        calibration_width: number of sampled columns in the middle.
        settings: see `Wavelet`.

    Returns:
        complex64 `[coils, H, W]`, of unit norm over the coils or zero. Their common phase is that
        of the coils' first principal component, so that the image's stays smooth.
    """
    settings = settings or Wavelet()
    coils, height, width = kspace.shape
    rows = min(settings.calibration_rows, height)
    top, left = height // 2 - rows // 2, width // 2 - calibration_width // 2
    middle = kspace[:, top : top + rows, left : left + calibration_width]
    # At least about half of the columns must be left for the kernel to move over.
    kernel = (min(settings.kernel, rows), min(settings.kernel, (calibration_width + 2) // 2))
    projection = _patch_projection(middle, kernel, settings.threshold)
    sums = np.zeros((coils, coils, 2 * kernel[0] - 1, 2 * kernel[1] - 1), dtype=np.complex64)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            down, right = kernel[0] - 1 - i, kernel[1] - 1 - j
            block = projection[..., i, j].transpose(0, 3, 1, 2)
            sums[..., down : down + kernel[0], right : right + kernel[1]] += block
    padded = np.zeros((coils, coils, height, width), dtype=np.complex64)
    above, before = height // 2 - kernel[0] + 1, width // 2 - kernel[1] + 1
    padded[..., above : above + sums.shape[2], before : before + sums.shape[3]] = sums
    gram = _ifft2c(padded, norm="forward").transpose(2, 3, 0, 1) / np.prod(kernel)
    values, vectors = np.linalg.eigh(gram)
    maps, certainty = vectors[..., -1], values[..., -1]
    component = np.linalg.eigh(np.einsum("chw,dhw->cd", middle, middle.conj()))[1][:, -1]
    maps = maps * np.exp(-1j * np.angle(maps @ component.conj()))[..., None]
    return np.where(certainty > settings.crop, maps.transpose(2, 0, 1), 0).astype(np.complex64)


def _patch_projection(middle: np.ndarray, kernel: tuple[int, int], threshold: float) -> np.ndarray:
    """Projection on the patches' signal space, `[coils, k, l, coils, k, l]`."""
    windows = np.lib.stride_tricks.sliding_window_view(middle, kernel, axis=AXES)
    size = len(middle) * kernel[0] * kernel[1]
    patches = windows.transpose(0, 3, 4, 1, 2).reshape(size, -1)
    values, vectors = np.linalg.eigh(patches @ patches.conj().T)
    # The eigenvalues are the squares of the singular values.
    signal = vectors[:, values > threshold**2 * values[-1]]
    return (signal @ signal.conj().T).reshape(len(middle), *kernel, len(middle), *kernel)


def noise_level(kspace: np.ndarray, mask: np.ndarray) -> float:
    """Standard deviation of the noise in the real (or imaginary) part of k-space.

    From the measured samples farthest from the middle (the outer eighth of the rows, in the outer
    half of the sampled columns), where there is least signal: the lower quartile of their
    magnitude is 0.759 standard deviations. 0 where k-space was padded with zeros.

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
    """K-space as complex64 `[slices, coils, H, W]` and mask as bool `[W]`."""
    kspace = np.asarray(kspace, dtype=np.complex64)
    mask = np.asarray(mask, dtype=bool)
    if kspace.ndim != 4 or mask.shape != kspace.shape[-1:]:
        raise ValueError(
            f"k-space {kspace.shape} and mask {mask.shape} must be [slices, coils, H, W] and [W]"
        )
    return kspace, mask


def fft2c(x: np.ndarray) -> np.ndarray:
    """The centred, orthonormal transform of the last two axes."""
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.fft2(shifted, norm="ortho"), axes=AXES)


def _ifft2c(x: np.ndarray, norm: Literal["ortho", "forward"] = "ortho") -> np.ndarray:
    shifted = np.fft.ifftshift(x, axes=AXES)
    return np.fft.fftshift(np.fft.ifft2(shifted, norm=norm), axes=AXES)
