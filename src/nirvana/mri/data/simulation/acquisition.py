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
    rows = (torch.arange(height) - height // 2).float() / (height / 2)
    columns = (torch.arange(width) - width // 2).float() / (width / 2)
    rows, columns = rows[:, None], columns[None]
    radius = uniform((0.75, 1.1), (draws, 1, 1), generator)
    softness = uniform((0.02, 0.12), (draws, 1, 1), generator)
    separable = chosen(0.5, draws, generator)
    distance = (rows.square() + columns.square()).sqrt()
    distance = torch.where(separable, torch.maximum(rows.abs(), columns.abs()), distance)
    weight = torch.sigmoid((radius - distance) / softness)
    weight = torch.where(chosen(settings.kspace_filter, draws, generator), weight, 1.0)
    padded = chosen(settings.zero_padding, draws, generator)
    kept = uniform((LEAST_ACQUIRED, 1.0), (2, draws, 1, 1), generator)
    outside = (rows.abs() > kept[0]) | (columns.abs() > kept[1])
    weight = torch.where(padded & outside, 0.0, weight)
    partial = chosen(settings.partial_fourier, draws, generator)
    which = torch.randint(len(PARTIAL), (draws, 1, 1), generator=generator)
    measured = torch.tensor(PARTIAL)[which]
    sign = torch.where(chosen(0.5, draws, generator), 1.0, -1.0)
    missing = sign * columns > 2 * measured - 1
    return torch.where(partial & missing, 0.0, weight)[:, None].to(device)
