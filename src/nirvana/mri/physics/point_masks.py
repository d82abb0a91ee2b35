"""Sampling masks of single points, of scans with two phase-encoding directions.

In a slice across the readout of a 3D scan both axes of k-space are phase encodings, so that points
may be left out, and aliases fall in two directions. The centre lies at `[H // 2, W // 2]`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nirvana.errors import InputError

PointKind = Literal["lattice", "random"]
POINT_KINDS: tuple[PointKind, ...] = ("lattice", "random")
CENTRE = 0.1  # sides of the central block, relative to those of k-space
LEAST_CENTRE = 8  # points along each side of it
DENSITY_RADIUS = 0.25  # of random points, in half sides: where the density has fallen to a half


@dataclass(frozen=True)
class PointSampling:
    """Points of k-space, and a central block of a tenth of each side, at least 8 x 8.

    - "lattice": a regular lattice of one point in R, R the rounded acceleration, at a random place,
      whose lines are shifted against each other so that its points lie as far apart as possible
      (2D CAIPIRINHA, Breuer et al., Magnetic Resonance in Medicine 55, 2006). The block is added.
    - "random": one point in `acceleration`, the block included, drawn without replacement with a
      density that falls with the distance r from the centre as 1 / (1 + (r / r0)^2).

    Attributes:
        kind: of the pattern.
        acceleration: all points over sampled points, at least 1.
    """

    kind: PointKind = "random"
    acceleration: float = 4.0

    def mask(self, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        """The mask for this seed and its central block.

        Args:
            size: H and W of k-space, at least 8 each.
            seed: of the random numbers.

        Returns:
            Bool `[H, W]` each, on the CPU.

        Raises:
            InputError: the kind is unknown, or the block alone has more points than the
                acceleration leaves.
        """
        height, width = size
        total = round(height * width / self._checked_acceleration())
        centre = torch.zeros(size, dtype=torch.bool)
        rows, columns = (max(LEAST_CENTRE, round(CENTRE * side)) for side in size)
        top, left = height // 2 - rows // 2, width // 2 - columns // 2
        centre[top : top + rows, left : left + columns] = True
        if min(size) < LEAST_CENTRE or rows * columns > total:
            raise InputError(
                f"{self.acceleration:g}-fold sampling of points leaves {total} of {height} x "
                f"{width}, fewer than the {rows} x {columns} of the central block"
            )
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "lattice":
            return lattice(size, round(self.acceleration), generator) | centre, centre
        y = (torch.arange(height)[:, None] - height // 2) / (height / 2)
        x = (torch.arange(width) - width // 2) / (width / 2)
        density = 1 / (1 + (x.square() + y.square()) / DENSITY_RADIUS**2)
        # The largest sums of log density and Gumbel noise are a draw without replacement.
        gumbel = -torch.empty(size).exponential_(generator=generator).log()
        keys = (density.log() + gumbel).masked_fill(centre, math.inf).flatten()
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[keys.topk(total).indices] = True
        return mask.view(size), centre

    def _checked_acceleration(self) -> float:
        if self.kind not in POINT_KINDS:
            raise InputError(
                f"points '{self.kind}' are unknown; choose one of {', '.join(POINT_KINDS)}"
            )
        if not 1 <= self.acceleration < math.inf:
            raise InputError(f"acceleration {self.acceleration:g} is not possible; give 1 or more")
        return self.acceleration


def lattice(size: tuple[int, int], spacing: int, generator: torch.Generator) -> Tensor:
    """Every `spacing`-th point of each row, shifted from row to row: bool `[H, W]`.

    Of all shifts the one is taken whose points lie farthest apart, to either side at random.
    """

    def least_distance(shift: int) -> int:
        """Squared distance between the nearest points, the same in all of the lattice."""
        steps = [(row, (row * shift) % spacing) for row in range(spacing + 1)]
        pairs = [(row, min(column, spacing - column)) for row, column in steps if row]
        return min([spacing**2, *(row**2 + column**2 for row, column in pairs)])

    shift = max(range(spacing), key=least_distance)
    offset, sign = torch.randint(spacing, (2,), generator=generator).tolist()
    shift = shift if sign % 2 else -shift
    rows, columns = torch.arange(size[0])[:, None], torch.arange(size[1])
    return (columns - shift * rows) % spacing == offset
