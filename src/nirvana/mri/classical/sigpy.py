"""Reconstructions by sigpy with sensitivities of ESPIRiT: SENSE and L1-wavelet.

Only NumPy is imported at the top: worker processes import this module and must start without
torch.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.classical.common import (
    ClassicalSettings,
    arrays,
    fft2c,
    noise_level,
    with_measured,
    zero_filled,
)
from nirvana.mri.classical.espirit import espirit_maps

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def l1_wavelet(
    kspace: Any,
    mask: Any,
    calibration_width: int,
    settings: ClassicalSettings | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """ESPIRiT sensitivities S, then compressed sensing with sigpy, slice by slice:

        x = argmin 1/2 || M F S x - y ||^2 + weight || wavelet(x) ||_1

    The measured columns replace those of the k-space of the coil images S x, which are combined by
    root sum of squares. The result is therefore on the scale of a root-sum-of-squares image, and a
    rescaled k-space gives the same image, rescaled.

    Slices run in worker processes of one thread each, started by "spawn": a script that calls
    this needs the usual `if __name__ == "__main__":`, or `workers=1`, which starts none.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]`.
        calibration_width: fully sampled columns in the middle, `masks.calibration_width(mask)`.
        settings: see `ClassicalSettings`.
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
    settings: ClassicalSettings | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """SENSE (Pruessmann et al., 2001) by conjugate gradients, slice by slice:

        x = argmin 1/2 || M F S x - y ||^2 + weight / 2 || x ||^2

    Everything else, arguments, result and errors, is as of `l1_wavelet`.
    """
    return _by_slices(_sense_image, kspace, mask, calibration_width, settings, workers, progress)


def _by_slices(
    image_of: Callable[..., np.ndarray],
    kspace: Any,
    mask: Any,
    calibration_width: int,
    settings: ClassicalSettings | None,
    workers: int | None,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    settings = settings or ClassicalSettings()
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
    """`map`, in this process or over several worker processes of one thread each."""
    if workers == 1:
        yield map
        return
    before = {key: os.environ.get(key) for key in THREAD_SETTINGS}
    # The numerical libraries read these when they are loaded, so they must be set in the
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
    task: tuple[Callable[..., np.ndarray], np.ndarray, np.ndarray, int, float, ClassicalSettings],
) -> np.ndarray:
    """One slice, `[coils, H, W]` -> `[H, W]`; sampled columns as measured, the others modelled."""
    image_of, kspace, mask, calibration_width, weight, settings = task
    if not kspace.any():
        return np.zeros(kspace.shape[1:], dtype=np.float32)
    maps = espirit_maps(kspace, calibration_width, settings)
    weights = np.broadcast_to(mask, kspace.shape[1:]).astype(np.float32)
    image = image_of(kspace, maps, weights, weight, settings)
    return with_measured(kspace, mask, fft2c(maps * image))


def _wavelet_image(
    kspace: np.ndarray,
    maps: np.ndarray,
    weights: np.ndarray,
    weight: float,
    settings: ClassicalSettings,
) -> np.ndarray:
    from sigpy.mri.app import L1WaveletRecon

    # The sensitivities have unit norm, so the operator's norm is at most 1 and a step of 1 is safe.
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
    kspace: np.ndarray,
    maps: np.ndarray,
    weights: np.ndarray,
    _weight: float,
    settings: ClassicalSettings,
) -> np.ndarray:
    from sigpy.mri.app import SenseRecon

    options: Any = {"lamda": settings.sense_weight, "max_iter": settings.sense_iterations}
    app: Any = SenseRecon(kspace, maps, weights=weights, show_pbar=False, **options)
    return app.run()
