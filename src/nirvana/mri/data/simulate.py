"""Multi-coil k-space from magnitude images.

The simulation applies, in this order:

    anatomy      a bright rim around the object                            `simulation.scalp`
    contrast     x <- x^gamma
    phase        x <- x exp(i phi)                                        `simulation.phase`
    coils        x_c = S_c x                                              `simulation.coils`
    field        objects that exceed the field of view fold over          `simulation.acquisition`
    acquisition  y_c = F x_c, centred and orthonormal (`fourier.fft2c`)
    flow         y_c <- y_c + F S_c v (1 + e), vessels v that pulsate      `simulation.flow`
    noise        y_c <- y_c + n_c, Gaussian; prewhitening                  `simulation.noise`
    scanner      y_c <- w y_c: filters, zero-padding, partial Fourier      `simulation.acquisition`

Each of these is a setting of `simulation.config.Simulation`. Motion, relaxation and distortion by
field inhomogeneity during the readout are not simulated. Changes of the anatomy, such as lesions,
are made in the magnitude image before `simulate` is called.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from nirvana.mri.data.simulation.acquisition import fold, window
from nirvana.mri.data.simulation.coils import coil_maps
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import log_uniform, pixel_noise
from nirvana.mri.data.simulation.flow import pulsate, vessels
from nirvana.mri.data.simulation.noise import coil_noise_factor, mix, prewhiten
from nirvana.mri.data.simulation.phase import image_phase
from nirvana.mri.data.simulation.scalp import add_scalp
from nirvana.mri.io import Scan
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss


def simulate(
    images: Tensor,
    generator: Generator,
    settings: Simulation | None = None,
    coils: int | None = None,
    *,
    volume: bool = False,
    width: int | None = None,
    arrays: Sequence[Tensor] = (),
) -> Tensor:
    """Fully sampled k-space of magnitude images; see the module.

    Args:
        images: real `[B, H, W']` in 0..1.
        generator: on the CPU; the same state gives the same k-space.
        settings: ranges to draw from; the defaults of `Simulation` when None.
        coils: number of coils instead of `settings.num_coils`.
        volume: the images are slices of one volume: contrast, phase, coils and noise level are
            drawn once for all of them, and the noise itself for each.
        width: columns W of the field of view, into which a wider image folds over; W' when None.
        arrays: measured coil sensitivities, see `coils.coil_maps`.

    Returns:
        complex64 `[B, coils, H, W]` on the device of `images`.
    """
    settings = settings or Simulation()
    num_coils = settings.num_coils if coils is None else coils
    draws = 1 if volume else len(images)
    images, device = images.float(), images.device
    if settings.scalp:
        images = add_scalp(images, generator, settings, draws)
    contrasted = images.clamp(min=0) ** log_uniform(settings.gamma, draws, generator).to(device)
    phase = image_phase(contrasted, generator, settings, volume=volume)
    sensitivities = coil_maps(
        draws, num_coils, images.shape[-2:], generator, settings, device, arrays
    )
    width = images.shape[-1] if width is None else width

    def scanned(image: Tensor) -> Tensor:
        return fft2c(fold(sensitivities * image[:, None], width))

    kspace = scanned(torch.polar(contrasted, phase))
    if settings.vessels:
        flowing = scanned(vessels(contrasted, generator, settings, draws))
        kspace = kspace + pulsate(flowing, generator, settings, draws)
    level = log_uniform(settings.noise, draws, generator).to(device)
    peak = contrasted.amax() if volume else contrasted.amax(dim=(-2, -1), keepdim=True)
    noise = pixel_noise((*kspace.shape, 2), generator, device)
    noise = (level * peak)[..., None] * torch.view_as_complex(noise)
    if settings.noise_spread or settings.noise_correlation:
        factor = coil_noise_factor(draws, num_coils, generator, settings)
        kspace = kspace + mix(factor.to(device), noise)
        kspace = prewhiten(kspace, factor, generator, settings)
    else:
        kspace = kspace + noise
    if settings.kspace_filter or settings.zero_padding or settings.partial_fourier:
        kspace = kspace * window(draws, kspace.shape[-2:], generator, settings, device)
    return kspace


def simulate_scan(
    magnitude: np.ndarray,
    name: str,
    seed: int,
    settings: Simulation | None = None,
    spacing: tuple[float, float, float] | None = None,
) -> Scan:
    """A fully sampled scan of one magnitude volume.

    Args:
        magnitude: real `[slices, H, W]` in 0..1.
        name: of the scan.
        seed: of every random number.
        settings: see `Simulation`.
        spacing: of slices, rows, columns in mm.

    Returns:
        A scan whose target is the root sum of squares of its own, noisy, coil images, as in
        fastMRI.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(np.ascontiguousarray(magnitude, dtype=np.float32))
    kspace = simulate(images, generator, settings, volume=True)
    return Scan(
        kspace=kspace.numpy(),
        mask=None,
        target=rss(ifft2c(kspace)).numpy(),
        name=name,
        spacing=spacing,
    )
