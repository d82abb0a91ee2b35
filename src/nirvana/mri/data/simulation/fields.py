"""Random numbers and smooth random fields.

Every random number comes from the caller's generator on the CPU, so that a seed gives the same
scan on every device. Only what has a number for each pixel is drawn on the images' device, from a
seed that the generator gives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Range

Size = tuple[int, int] | torch.Size


def uniform(limits: Range, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Uniform numbers of this shape, on the CPU."""
    low, high = limits
    return low + (high - low) * torch.rand(shape, generator=generator)


def log_uniform(limits: Range, number: int, generator: Generator) -> Tensor:
    """`[number, 1, 1]`, uniform in the logarithm; 0 where both limits are 0."""
    if limits == (0, 0):
        return torch.zeros(number, 1, 1)
    low, high = (math.log(limit) for limit in limits)
    return uniform((low, high), (number, 1, 1), generator).exp()


def chosen(share: float, number: int, generator: Generator) -> Tensor:
    """Bool `[number, 1, 1]`, true with probability `share`, on the CPU."""
    return torch.rand((number, 1, 1), generator=generator) < share


def pixel_noise(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    """White Gaussian noise on `device`, determined there by the state of `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator).item())
    return torch.randn(shape, generator=Generator(device).manual_seed(seed), device=device)


def smooth_field(
    shape: tuple[int, ...], size: Size, grid: int, generator: Generator, device: torch.device
) -> Tensor:
    """Normal numbers on a `grid` x `grid` lattice, bicubic in between: `[*shape, H, W]`."""
    points = torch.randn(math.prod(shape), 1, grid, grid, generator=generator).to(device)
    field = F.interpolate(points, size=tuple(size), mode="bicubic", align_corners=True)
    return field.reshape(*shape, *size)


def coordinates(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows `[H, 1]` and columns `[W]` of the pixels' centres, in half fields of view of the longer
    side, 0 in the middle."""
    height, width = size
    half = max(height, width) / 2
    rows = (torch.arange(height, device=device) - (height - 1) / 2) / half
    columns = (torch.arange(width, device=device) - (width - 1) / 2) / half
    return rows[:, None], columns
