"""Multi-coil k-space from magnitude images.

The simulation applies, in this order:

    contrast     x <- x^gamma
    phase        x <- x exp(i phi), phi smooth
    coils        x_c = S_c x, S_c of a birdcage or random and smooth
    acquisition  y_c = F x_c, centred and orthonormal (`fourier.fft2c`)
    noise        y_c <- y_c + n, n complex white Gaussian

Motion, field inhomogeneity within the readout, relaxation, three-dimensional coils and correlated
noise are not simulated. Changes of the anatomy, such as lesions, are made in the magnitude image
before `simulate` is called.

Every random number comes from the caller's generator on the CPU, so that a seed gives the same
contrast, phase and coils on every device. Only the noise, by far the most numbers, is drawn on the
images' device, from a seed that the generator gives.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.io import Scan
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.sense import CartesianSense

Range = tuple[float, float]


@dataclass(frozen=True)
class Simulation:
    """Settings of the simulator; a value is drawn from every range for each image or volume.

    Attributes:
        num_coils: number of receive coils.
        gamma: exponent of the contrast change, drawn log-uniformly; 1 is no change.
        phase: peak of the smooth phase, in radians.
        phase_grid: control points of the smooth phase along each side; more are rougher.
        birdcage: probability of birdcage coils; the others are random and smooth.
        coil_radius: distance of the birdcage from its centre, in half fields of view.
        coil_offset: largest displacement of the birdcage's centre, in half fields of view.
        coil_grid: control points of the random smooth coils along each side.
        normalise_coils: scale the coils to sum_c |S_c|^2 = 1, so that the root sum of squares
            of the noise-free scan is the image; otherwise it is shaded as in an uncorrected scan.
        noise: standard deviation of the noise in the real and in the imaginary part, relative
            to the image's (or volume's) maximum; drawn log-uniformly, (0, 0) for none.
    """

    num_coils: int = 8
    gamma: Range = (0.7, 1.4)
    phase: Range = (0.2, 2.0)
    phase_grid: int = 4
    birdcage: float = 0.7
    coil_radius: Range = (1.2, 1.8)
    coil_offset: float = 0.2
    coil_grid: int = 4
    normalise_coils: bool = True
    noise: Range = (0.002, 0.02)

    def __post_init__(self) -> None:
        if not 1 <= self.num_coils <= 256:
            raise InputError(f"{self.num_coils} coils cannot be simulated; give 1 to 256")
        if not 0 <= self.noise[0] <= self.noise[1] < 1 or (self.noise[0] == 0 < self.noise[1]):
            raise InputError(
                f"noise {self.noise} is not a range of relative standard deviations; give "
                "0 < low <= high < 1, or 0 and 0 for none"
            )
        if not 0 < self.gamma[0] <= self.gamma[1]:
            raise InputError(f"gamma {self.gamma} is not a range; give 0 < low <= high")
        if self.phase_grid < 2 or self.coil_grid < 2:
            raise InputError("phase_grid and coil_grid need at least 2 control points")


def simulate(
    images: Tensor,
    generator: Generator,
    settings: Simulation | None = None,
    coils: int | None = None,
    *,
    volume: bool = False,
) -> Tensor:
    """Fully sampled k-space of magnitude images; see the module.

    Args:
        images: real `[B, H, W]` in 0..1.
        generator: on the CPU; the same state gives the same k-space.
        settings: ranges to draw from; the defaults of `Simulation` when None.
        coils: number of coils instead of `settings.num_coils`.
        volume: the images are slices of one volume: contrast, phase, coils and noise level are
            drawn once for all of them, and the noise itself for each.

    Returns:
        complex64 `[B, coils, H, W]` on the device of `images`.
    """
    settings = settings or Simulation()
    num_coils = settings.num_coils if coils is None else coils
    draws = 1 if volume else len(images)
    images = images.float()
    contrasted = images.clamp(min=0) ** _log_uniform(settings.gamma, draws, generator).to(images)
    phase = smooth_phase(draws, images.shape[-2:], generator, settings, images.device)
    sensitivities = coil_maps(
        draws, num_coils, images.shape[-2:], generator, settings, images.device
    )
    image = torch.polar(contrasted, phase.expand_as(contrasted))
    kspace = CartesianSense(sensitivities).forward(image)
    level = _log_uniform(settings.noise, draws, generator).to(images)
    peak = contrasted.amax() if volume else contrasted.amax(dim=(-2, -1), keepdim=True)
    noise = _noise((*kspace.shape, 2), generator, images.device)
    return kspace + (level * peak)[..., None] * torch.view_as_complex(noise)


def _noise(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    """White Gaussian noise on `device`, determined there by the state of `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator).item())
    return torch.randn(shape, generator=Generator(device).manual_seed(seed), device=device)


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


def smooth_phase(
    number: int,
    size: tuple[int, int] | torch.Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Smooth random phase `[number, H, W]` in radians, its peak drawn from `settings.phase`."""
    field = _smooth_field((number,), size, settings.phase_grid, generator, device)
    field = field / field.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    return field * _uniform(settings.phase, (number, 1, 1), generator).to(device)


def coil_maps(
    number: int,
    num_coils: int,
    size: tuple[int, int] | torch.Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Coil sensitivities, complex64 `[number, num_coils, H, W]`.

    Each of the `number` sets is a birdcage with probability `settings.birdcage`, else random and
    smooth. With `settings.normalise_coils` sum_c |S_c|^2 = 1 in every pixel, otherwise the mean
    of that sum over the field of view is 1.
    """
    birdcage = birdcage_maps(number, num_coils, size, generator, settings, device)
    smooth = smooth_maps(number, num_coils, size, generator, settings, device)
    chosen = _uniform((0.0, 1.0), (number, 1, 1, 1), generator) < settings.birdcage
    maps = torch.where(chosen.to(device), birdcage, smooth)
    power = (maps.abs() ** 2).sum(dim=1, keepdim=True)
    if not settings.normalise_coils:
        power = power.mean(dim=(-2, -1), keepdim=True)
    return maps / power.clamp(min=1e-12).sqrt()


def birdcage_maps(
    number: int,
    num_coils: int,
    size: tuple[int, int] | torch.Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Fields of line conductors on an ellipse around the field of view, unscaled.

    S_c = g_c (dx + i dy) / (dx^2 + dy^2 + 0.1^2) with (dx, dy) the vector from conductor c to the
    pixel in half fields of view (of the longer side), g_c a random gain and phase. Radius along
    both axes, rotation, centre and the position of each conductor are random.

    Returns:
        complex64 `[number, num_coils, H, W]`.
    """
    per_set, per_coil = (number, 1), (number, num_coils)
    spacing = 2 * math.pi / num_coils
    rotation = _uniform((0.0, 2 * math.pi), per_set, generator)
    jitter = _uniform((-0.2 * spacing, 0.2 * spacing), per_coil, generator)
    angle = torch.arange(num_coils) * spacing + rotation + jitter
    offset = (-settings.coil_offset, settings.coil_offset)
    x = _uniform(settings.coil_radius, per_set, generator) * angle.cos()
    x = x + _uniform(offset, per_set, generator)
    y = _uniform(settings.coil_radius, per_set, generator) * angle.sin()
    y = y + _uniform(offset, per_set, generator)
    gain = torch.polar(_uniform((0.7, 1.3), per_coil, generator), -angle)

    height, width = size
    half = max(height, width) / 2
    rows = (torch.arange(height, device=device) - (height - 1) / 2) / half
    columns = (torch.arange(width, device=device) - (width - 1) / 2) / half
    dx, dy = torch.broadcast_tensors(
        columns - x.to(device)[..., None, None], rows[:, None] - y.to(device)[..., None, None]
    )
    return gain.to(device)[..., None, None] * torch.complex(dx, dy) / (dx**2 + dy**2 + 0.01)


def smooth_maps(
    number: int,
    num_coils: int,
    size: tuple[int, int] | torch.Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Random smooth sensitivities S_c = exp(a_c + i phi_c), unscaled.

    Their logarithms a_c, phi_c are smooth fields, so no map has a zero, around which its phase
    would not be smooth.

    Returns:
        complex64 `[number, num_coils, H, W]`.
    """
    shape = (number, num_coils)
    attenuation = _smooth_field(shape, size, settings.coil_grid, generator, device)
    phase = _smooth_field(shape, size, settings.coil_grid, generator, device)
    return torch.polar(torch.exp(attenuation), phase)


def _smooth_field(
    shape: tuple[int, ...],
    size: tuple[int, int] | torch.Size,
    grid: int,
    generator: Generator,
    device: torch.device,
) -> Tensor:
    """Normal numbers on a `grid` x `grid` lattice, bicubic in between: `[*shape, H, W]`."""
    points = torch.randn(math.prod(shape), 1, grid, grid, generator=generator).to(device)
    field = F.interpolate(points, size=tuple(size), mode="bicubic", align_corners=True)
    return field.reshape(*shape, *size)


def _uniform(limits: Range, shape: tuple[int, ...], generator: Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(shape, generator=generator)


def _log_uniform(limits: Range, number: int, generator: Generator) -> Tensor:
    """`[number, 1, 1]`, uniform in the logarithm; 0 where both limits are 0."""
    if limits == (0, 0):
        return torch.zeros(number, 1, 1)
    low, high = (math.log(limit) for limit in limits)
    return _uniform((low, high), (number, 1, 1), generator).exp()
