"""Vessels: bright spots of their own phase, whose signal changes during the measurement."""

import math

import torch
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import uniform

MOST = 4  # vessels of an image


def vessels(images: Tensor, generator: Generator, settings: Simulation, draws: int) -> Tensor:
    """The complex image of vessels alone.

    Inflow makes them bright, and moving spins have a phase of their own: Gaussian spots of 0.7 to
    2.5 pixels, of 0.2 to 1.2 times the image's maximum and any phase. Each of `MOST` is there with
    probability `settings.vessels / MOST`.

    Args:
        images: magnitudes `[B, H, W]`.
        generator: on the CPU.
        settings: see `Simulation`.
        draws: B, or 1 for slices of one volume.

    Returns:
        complex64 `[B, H, W]`.
    """
    height, width = images.shape[-2:]
    shape, device = (draws, MOST, 1, 1), images.device
    row = uniform((0.15 * height, 0.85 * height), shape, generator).to(device)
    column = uniform((0.15 * width, 0.85 * width), shape, generator).to(device)
    radius = uniform((0.7, 2.5), shape, generator).to(device)
    strength = uniform((0.2, 1.2), shape, generator)
    strength = strength * (torch.rand(shape, generator=generator) < settings.vessels / MOST)
    phase = uniform((0.0, 2 * math.pi), shape, generator).to(device)
    down = torch.arange(height, device=device)[:, None] - row
    right = torch.arange(width, device=device) - column
    spots = torch.exp(-(down.square() + right.square()) / (2 * radius.square()))
    peak = images.amax((-2, -1), keepdim=True)
    return peak * torch.polar(spots * strength.to(device), phase.expand_as(spots)).sum(1)


def pulsate(kspace: Tensor, generator: Generator, settings: Simulation, draws: int) -> Tensor:
    """The k-space of vessels whose inflow changes from one column to the next, k (1 + e), which
    ghosts along the phase-encoding direction.

    Args:
        kspace: complex `[B, coils, H, W]` of the vessels alone.
        generator: on the CPU.
        settings: the standard deviation of e is drawn from 0 to `pulsation`.
        draws: B, or 1 for slices of one volume.
    """
    width = kspace.shape[-1]
    level = uniform((0.0, settings.pulsation), (draws, 1, 1, 1), generator)
    change = torch.randn(draws, 1, 1, width, dtype=torch.complex64, generator=generator)
    return kspace * (1 + level * change).to(kspace.device)
