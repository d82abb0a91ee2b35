"""What the networks know of a scan as a whole: its mask and noise."""

import math

import torch
from torch import Tensor, nn

LEAST_NOISE = 1e-5  # relative to the image's brightness; k-space without noise has no logarithm
NUM_FEATURES = 5


class Conditioning(nn.Module):
    """Facts of a scan to a vector, by a small network: the noise level, the shares of measured and
    calibration samples, and how coherent the aliasing is.

    Args:
        dim: size of the vector.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.dim = dim

    def forward(self, kspace: Tensor, mask: Tensor, calibration: Tensor) -> Tensor:
        """The vector of each slice.

        Args:
            kspace: complex `[B, coils, H, W]`, of brightness 1, zero where not measured.
            mask: bool `[B or 1, H or 1, W]`.
            calibration: bool likewise, the samples that calibrate the coils.

        Returns:
            `[B, dim]`.
        """
        return nn.functional.silu(self.net(features(kspace, mask, calibration)))


@torch.no_grad()
def features(kspace: Tensor, mask: Tensor, calibration: Tensor) -> Tensor:
    """The facts, `[B, NUM_FEATURES]`; arguments as of `Conditioning.forward`."""
    batch = len(kspace)
    level = noise_level(kspace, mask).clamp(min=LEAST_NOISE).log10() + 3
    share = mask.flatten(1).float().mean(1)
    central = calibration.flatten(1).float().mean(1)
    spread = torch.fft.fft2(mask.float()).abs().flatten(1)
    peak = spread[:, 1:].amax(1) / spread[:, 0].clamp(min=1)
    coils = torch.full_like(level, math.log2(kspace.shape[1]) / 4)
    facts = [level, 4 * share, 8 * central, 2 * peak]
    return torch.stack([*(fact.expand(batch) for fact in facts), coils], dim=1)


def noise_level(kspace: Tensor, mask: Tensor) -> Tensor:
    """Standard deviation of the noise in the real (or imaginary) part of k-space, `[B]`.

    Estimated from the measured samples in the outer half of the columns: the lower quartile of the
    magnitude of complex noise is 0.759 standard deviations. Samples that are exactly zero are
    padding and do not count; 0 where there are no others.

    Args:
        kspace: complex `[B, coils, H, W]`, zero where not measured.
        mask: bool `[B or 1, H or 1, W]`.
    """
    width = kspace.shape[-1]
    distance = (torch.arange(width, device=kspace.device) - width // 2).abs()
    outer = distance >= width // 4
    magnitude = kspace.abs()
    counted = (magnitude > 0) & (mask & outer)[:, None]
    ordered = torch.where(counted, magnitude, torch.inf).flatten(1).sort(1).values
    count = counted.flatten(1).sum(1)
    quartile = ordered.gather(1, (count // 4)[:, None].clamp(max=ordered.shape[1] - 1))[:, 0]
    return torch.where(count > 0, quartile, 0.0) / math.sqrt(2 * math.log(4 / 3))
