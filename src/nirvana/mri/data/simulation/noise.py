"""Noise of receive coils: of unequal strength, correlated, and prewhitened."""

import torch
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import chosen


def coil_noise_factor(
    draws: int, num_coils: int, generator: Generator, settings: Simulation
) -> Tensor:
    """Square roots L of noise covariances L L^H of the coils, whose mean diagonal is 1.

    L L^H is A A^H with A = I + a G and G complex Gaussian, scaled to diagonals of log-normal noise
    levels.

    Args:
        draws: number of covariances.
        num_coils: number of coils.
        generator: on the CPU.
        settings: `noise_spread` and `noise_correlation`.

    Returns:
        complex64 `[draws, coils, coils]`, lower triangular, on the CPU.
    """
    mixing = torch.randn(draws, num_coils, num_coils, dtype=torch.complex64, generator=generator)
    mixing = mixing / num_coils**0.5
    # To first order in a, off-diagonal elements of A A^H have root mean square a sqrt(2 / coils).
    mixing = settings.noise_correlation * (num_coils / 2) ** 0.5 * mixing
    mixing = torch.eye(num_coils) + mixing
    covariance = mixing @ mixing.mH
    level = covariance.diagonal(dim1=-2, dim2=-1).real.sqrt()
    spread = settings.noise_spread * torch.randn(draws, num_coils, generator=generator)
    wanted = spread.exp()
    wanted = wanted / wanted.square().mean(1, keepdim=True).sqrt()
    scale = (wanted / level)[..., None].to(covariance.dtype)
    return torch.linalg.cholesky(scale * covariance * scale.mT)


def prewhiten(kspace: Tensor, factor: Tensor, generator: Generator, settings: Simulation) -> Tensor:
    """Combines coils to white noise of unit strength, L^-1 y, in `settings.prewhitened` of the
    scans.

    Args:
        kspace: complex `[B, coils, H, W]`.
        factor: of `coil_noise_factor`, `[draws, coils, coils]`, draws = B or 1.
        generator: on the CPU.
        settings: see `Simulation`.
    """
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    whitened = chosen(settings.prewhitened, len(factor), generator)
    applied = torch.where(whitened, inverse, identity).to(kspace.device)
    return mix(applied, kspace)


def mix(matrix: Tensor, kspace: Tensor) -> Tensor:
    """Linear combinations of coils: `[draws, coils, coils]` times `[B, coils, H, W]`."""
    return (matrix @ kspace.flatten(2)).view_as(kspace)
