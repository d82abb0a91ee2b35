"""What a scanner does to k-space beside adding noise: the field of view, filters, empty borders."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import Size, chosen, uniform

PARTIAL = (5 / 8, 6 / 8, 7 / 8)  # shares of the columns that partial Fourier acquisitions measure
LEAST_ACQUIRED = 0.7  # share of columns or rows that zero-padding leaves


def fold(images: Tensor, width: int) -> Tensor:
    """Images `[..., H, W']` whose sides fold over into a field of view of `width` columns, as
    k-space of wider spacing shows them: `[..., H, width]`."""
    wide = images.shape[-1]
    # The middles lie on each other: pixel i is in column i - wide // 2 + width // 2, modulo width.
    before = (width // 2 - wide // 2) % width
    after = -(before + wide) % width
    return F.pad(images, (before, after)).unflatten(-1, (-1, width)).sum(-2)


def window(
    draws: int, size: Size, generator: Generator, settings: Simulation, device: torch.device
) -> Tensor:
    """Weights of k-space, `[draws, 1, H, W]`, the centre at `[H // 2, W // 2]`.

    - Vendor filters, in `kspace_filter` of the scans: a Fermi window 1 / (1 + exp((r - a) / b)) of
      the distance r from the centre, 1 at the ends of the axes, or of each axis.
    - Zero-padding, in `zero_padding`: columns and rows beyond a random distance are empty.
    - Partial Fourier, in `partial_fourier`: a share of `PARTIAL` of the columns is measured.
    """
    height, width = size
    rows = (torch.arange(height, device=device) - height // 2)[:, None] / (height / 2)
    columns = (torch.arange(width, device=device) - width // 2) / (width / 2)
    shape = (draws, 1, 1)
    radius = uniform((0.75, 1.1), shape, generator).to(device)
    softness = uniform((0.02, 0.12), shape, generator).to(device)
    separable = chosen(0.5, draws, generator).to(device)
    filtered = chosen(settings.kspace_filter, draws, generator).to(device)
    padded = chosen(settings.zero_padding, draws, generator).to(device)
    kept = uniform((LEAST_ACQUIRED, 1.0), (2, *shape), generator).to(device)
    partial = chosen(settings.partial_fourier, draws, generator).to(device)
    which = torch.randint(len(PARTIAL), shape, generator=generator)
    measured = torch.tensor(PARTIAL)[which].to(device)
    sign = torch.where(chosen(0.5, draws, generator), 1.0, -1.0).to(device)

    round_distance = (rows.square() + columns.square()).sqrt()
    square_distance = torch.maximum(rows.abs(), columns.abs())
    distance = torch.where(separable, square_distance, round_distance)
    weight = torch.where(filtered, torch.sigmoid((radius - distance) / softness), 1.0)
    outside = padded & ((rows.abs() > kept[0]) | (columns.abs() > kept[1]))
    missing = partial & (sign * columns > 2 * measured - 1)
    return torch.where(outside | missing, 0.0, weight)[:, None]
