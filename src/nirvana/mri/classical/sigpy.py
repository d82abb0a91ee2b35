"""Reconstructions by sigpy with sensitivities of ESPIRiT: SENSE and L1-wavelet.

Only NumPy is imported at the top: worker processes import this module and must start without
torch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from nirvana.mri.classical.common import fft2c
from nirvana.mri.classical.espirit import espirit_maps
from nirvana.mri.classical.peers import (
    EspiritSettings,
    SenseSettings,
    WaveletSettings,
    peers_for,
)
from nirvana.mri.classical.workers import map_slices
from nirvana.mri.data.acquisition import Acquisition

ImageOf = Callable[..., np.ndarray]
Task = tuple[ImageOf, np.ndarray, np.ndarray, np.ndarray, EspiritSettings]


def l1_wavelet(
    acquisition: Acquisition,
    settings: WaveletSettings | None = None,
    *,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """ESPIRiT sensitivities S, then compressed sensing with sigpy, slice by slice:

        x = argmin 1/2 || M F S x - y ||^2 + weight || wavelet(x) ||_1

    The result is the k-space of the coil images S x with the measured samples put back. Its root
    sum of squares is therefore on the scale of that of the measurement, and a rescaled k-space
    gives the same image, rescaled.

    Args:
        acquisition: the measured k-space.
        settings: see `WaveletSettings`; None takes those chosen for this acceleration.
        workers: see `workers.map_slices`.

    Yields:
        complex64 `[coils, H, W]` for each slice.

    Raises:
        InputError: the coils cannot be calibrated.
    """
    acquisition.require_calibration()
    settings = settings or peers_for(acquisition.pattern).l1_wavelet
    noise = acquisition.noise / acquisition.scale
    weight = max(settings.noise_factor * noise, settings.min_weight)
    yield from _by_slices(partial(_wavelet_image, weight), acquisition, settings, workers)


def sense(
    acquisition: Acquisition,
    settings: SenseSettings | None = None,
    *,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """SENSE (Pruessmann et al., 2001) by conjugate gradients, slice by slice:

        x = argmin 1/2 || M F S x - y ||^2 + weight / 2 || x ||^2

    Everything else, arguments, results and errors, is as of `l1_wavelet`, with `SenseSettings`.
    """
    acquisition.require_calibration()
    settings = settings or peers_for(acquisition.pattern).sense
    yield from _by_slices(_sense_image, acquisition, settings, workers)


def _by_slices(
    image_of: ImageOf,
    acquisition: Acquisition,
    settings: EspiritSettings,
    workers: int | None,
) -> Iterator[np.ndarray]:
    scale = acquisition.scale

    def tasks() -> Iterator[Task]:
        for index, kspace in enumerate(acquisition.slices()):
            calibration = acquisition.calibration(index)
            mask = acquisition.mask(index)
            yield image_of, kspace / np.float32(scale), mask, calibration, settings

    for modelled in map_slices(_reconstruct_slice, tasks(), len(acquisition), workers):
        yield modelled * np.float32(scale)


def _reconstruct_slice(task: Task) -> np.ndarray:
    """One slice, `[coils, H, W]`; samples as measured, the others modelled."""
    image_of, kspace, mask, calibration, settings = task
    if not kspace.any() or not calibration.any():
        return kspace
    maps = espirit_maps(calibration, kspace.shape[1:], settings)
    weights = np.broadcast_to(mask, kspace.shape[1:]).astype(np.float32)
    image = image_of(kspace, maps, weights, settings)
    return np.where(mask, kspace, fft2c(maps * image)).astype(np.complex64)


def _wavelet_image(
    weight: float,
    kspace: np.ndarray,
    maps: np.ndarray,
    weights: np.ndarray,
    settings: WaveletSettings,
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
    kspace: np.ndarray, maps: np.ndarray, weights: np.ndarray, settings: SenseSettings
) -> np.ndarray:
    from sigpy.mri.app import SenseRecon

    options: Any = {"lamda": settings.weight, "max_iter": settings.iterations}
    app: Any = SenseRecon(kspace, maps, weights=weights, show_pbar=False, **options)
    return app.run()
