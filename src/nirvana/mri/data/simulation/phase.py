"""The phase of an image: smooth, fine, and following the anatomy."""

import math

import torch
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import OFF, Simulation
from nirvana.mri.data.simulation.fields import (
    Size,
    chosen,
    coordinates,
    pixel_noise,
    smooth_field,
    uniform,
)

FINE_GRIDS = (8, 16, 32, 64)  # control points along each side
CAVITIES = 3  # air cavities of an image
CURVE = 6  # control points of the susceptibility as a function of brightness
FAT_EDGE = 0.06  # width of the transition from water to fat, of the largest brightness


def image_phase(
    images: Tensor, generator: Generator, settings: Simulation, *, volume: bool = False
) -> Tensor:
    """The phase of images, the sum of all that `settings` has of it.

    Args:
        images: magnitudes `[B, H, W]`.
        generator: on the CPU.
        settings: see `Simulation`.
        volume: the images are slices of one volume, which share whatever is random.

    Returns:
        Radians, `[B, H, W]`.
    """
    draws, size, device = 1 if volume else len(images), images.shape[-2:], images.device
    total = smooth_phase(draws, size, generator, settings, device)
    if settings.fine_phase != OFF:
        total = total + fine_phase(draws, size, generator, settings, device)
    if settings.cavity_phase != OFF:
        total = total + cavity_phase(draws, size, generator, settings, device)
    if settings.ramp:
        total = total + ramp(draws, size, generator, settings, device)
    relative = images / images.amax((-2, -1), keepdim=True).clamp(min=1e-6)
    if settings.tissue_phase != OFF:
        total = total + tissue_phase(relative, draws, generator, settings)
    if settings.fat:
        total = total + fat_phase(relative, draws, generator, settings)
    return total.expand_as(images)


def smooth_phase(
    number: int, size: Size, generator: Generator, settings: Simulation, device: torch.device
) -> Tensor:
    """Inhomogeneity of the main field and phase of the transmit field: smooth random phase
    `[number, H, W]` in radians, its peak drawn from `settings.phase`."""
    field = smooth_field((number,), size, settings.phase_grid, generator, device)
    field = field / field.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    return field * uniform(settings.phase, (number, 1, 1), generator).to(device)


def fine_phase(
    number: int, size: Size, generator: Generator, settings: Simulation, device: torch.device
) -> Tensor:
    """What remains of the phase of measured heads after low-pass filtering: eddy currents, residual
    motion, field inhomogeneity on small scales. Fields of `FINE_GRIDS` control points and of pixel
    scale in random proportion, `[number, H, W]` in radians."""
    weights = torch.rand((number, len(FINE_GRIDS) + 1), generator=generator).square()
    weights = weights / weights.norm(dim=1, keepdim=True)
    weights = weights * uniform(settings.fine_phase, (number, 1), generator)
    parts = [smooth_field((number,), size, grid, generator, device) for grid in FINE_GRIDS]
    parts.append(pixel_noise((number, *size), generator, device))
    weighted = zip(weights.to(device).T[..., None, None], parts, strict=True)
    return sum((weight * part for weight, part in weighted), torch.zeros((), device=device))


def cavity_phase(
    number: int, size: Size, generator: Generator, settings: Simulation, device: torch.device
) -> Tensor:
    """Off-resonance around air cavities, `[number, H, W]` in radians.

    Outside of an air-filled sphere of radius a the field is that of a dipole, of which a slice
    through its middle shows cos(2 angle) (a / r)^2 in leading order; inside it is smoothed,
    2 u^2 / (1 + u^4) with u = r / a. The peak is drawn from `settings.cavity_phase`.
    """
    shape = (number, CAVITIES, 1, 1)
    rows, columns = coordinates(size, device)
    place = uniform((-0.7, 0.7), (2, *shape), generator).to(device)
    radius = uniform((0.04, 0.2), shape, generator).to(device)
    axis = uniform((0.0, 2 * math.pi), shape, generator).to(device)
    peak = uniform(settings.cavity_phase, shape, generator) * torch.randn(
        shape, generator=generator
    )
    down, right = rows - place[0], columns - place[1]
    square = (down.square() + right.square()) / radius.square()
    angle = torch.atan2(down, right) - axis
    field = torch.cos(2 * angle) * 2 * square / (1 + square.square())
    return (peak.to(device) / CAVITIES * field).sum(1)


def ramp(
    number: int, size: Size, generator: Generator, settings: Simulation, device: torch.device
) -> Tensor:
    """The linear phase of a k-space whose centre lies up to `settings.ramp` samples beside the
    middle along each side, `[number, H, W]` in radians: shifted echoes, linear eddy currents."""
    limits = (-settings.ramp, settings.ramp)
    shift = 2 * math.pi * uniform(limits, (2, number, 1, 1), generator).to(device)
    rows = torch.arange(size[0], device=device)[:, None] / size[0] - 0.5
    columns = torch.arange(size[1], device=device) / size[1] - 0.5
    return shift[0] * rows + shift[1] * columns


def tissue_phase(
    relative: Tensor, number: int, generator: Generator, settings: Simulation
) -> Tensor:
    """Phase by the susceptibility and chemical shift of tissues, `[B, H, W]` in radians.

    The susceptibility chi is a random piecewise linear function of the brightness, and its field is
    F^-1 (1/3 - (k.b)^2 / |k|^2) F chi (Salomir et al., Concepts in Magnetic Resonance 19B, 2003)
    with b the direction of the main field, any within or across the slice.

    Args:
        relative: brightness, `[B, H, W]` in 0..1.
        number: how many draws, B or 1.
        generator: on the CPU.
        settings: the root mean square in the object is drawn from `tissue_phase`.
    """
    device = relative.device
    curve = torch.randn(number, CURVE, generator=generator).to(device)
    direction = torch.randn(number, 3, 1, 1, generator=generator).to(device)
    wanted = uniform(settings.tissue_phase, (number, 1, 1), generator).to(device)
    position = relative.clamp(0, 1) * (CURVE - 1)
    lower = position.floor().clamp(max=CURVE - 2)
    curves = curve.expand(len(relative), -1)
    index = lower.long().flatten(1)
    left = curves.gather(1, index).view_as(relative)
    right = curves.gather(1, index + 1).view_as(relative)
    chi = torch.lerp(left, right, position - lower)
    direction = direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    rows = torch.fft.fftfreq(relative.shape[-2], device=device)[:, None]
    columns = torch.fft.rfftfreq(relative.shape[-1], device=device)
    along = (rows * direction[:, 0] + columns * direction[:, 1]).square()
    dipole = 1 / 3 - along / (rows.square() + columns.square()).clamp(min=1e-9)
    field = torch.fft.irfft2(dipole * torch.fft.rfft2(chi), s=relative.shape[-2:])
    inside = (relative > 0.1).float()
    count = inside.sum((-2, -1), keepdim=True).clamp(min=1)
    field = field - (field * inside).sum((-2, -1), keepdim=True) / count
    strength = ((field.square() * inside).sum((-2, -1), keepdim=True) / count).sqrt()
    return field * wanted / strength.clamp(min=1e-6)


def fat_phase(relative: Tensor, number: int, generator: Generator, settings: Simulation) -> Tensor:
    """The chemical shift of fat, which is the brightest tissue of most sequences: everything above
    a random brightness is turned by one random angle (3.4 ppm times the echo time), in
    `settings.fat` of the images. Arguments as of `tissue_phase`; `[B, H, W]` in radians."""
    level = uniform((0.45, 0.85), (number, 1, 1), generator).to(relative)
    angle = uniform((-math.pi, math.pi), (number, 1, 1), generator)
    angle = angle * chosen(settings.fat, number, generator)
    return angle.to(relative) * torch.sigmoid((relative - level) / FAT_EDGE)
