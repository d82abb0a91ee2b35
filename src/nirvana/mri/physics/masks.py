"""Sampling masks of whole columns, drawn for Cartesian acquisitions, and their central block.

K-space is complex, `[..., coils, H, W]`: H is the readout direction, W the phase-encoding one. The
centre of k-space lies at `[H // 2, W // 2]`. Patterns of measured scans, which may also be of
single points, are in `pattern`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.physics.pattern import central_width

MaskKind = Literal["equispaced", "random"]
MASK_KINDS: tuple[MaskKind, ...] = ("equispaced", "random")
MIN_WIDTH = 8


@dataclass(frozen=True)
class Sampling:
    """The undersampling of a fully sampled scan; see `sampling_mask` for the fields."""

    kind: MaskKind = "equispaced"
    acceleration: float = 4.0
    center_fraction: float = 0.08

    def mask(self, width: int, seed: int) -> Tensor:
        """The bool mask `[width]` for this seed."""
        return sampling_mask(self.kind, width, self.acceleration, self.center_fraction, seed)


def sampling_mask(
    kind: MaskKind, width: int, acceleration: float, center_fraction: float, seed: int
) -> Tensor:
    """The columns of an accelerated scan, equal to fastMRI's for the same seed.

    `round(width * center_fraction)` central columns are always sampled. "equispaced" adds columns
    at a spacing that gives `width / acceleration` columns in total (fastMRI's
    EquispacedMaskFractionFunc), "random" draws each other column with the probability that gives
    the same number in expectation (RandomMaskFunc). Rounding and order of the random draws are
    fastMRI's, including the last column, which "equispaced" reaches by rounding only. An
    acceleration of 1 is full sampling.

    Args:
        kind: "equispaced" or "random".
        width: number of columns, at least 8.
        acceleration: full width over sampled columns, at least 1.
        center_fraction: share of central columns, at least one column and less than
            `1 / acceleration`.
        seed: 0 .. 2^32 - 1.

    Returns:
        Bool `[width]` on the CPU.

    Raises:
        InputError: an argument is out of its range.
    """
    num_center = _checked_center(kind, width, acceleration, center_fraction, seed)
    if acceleration == 1:
        return torch.ones(width, dtype=torch.bool)
    # fastMRI uses this generator, and first draws one of its accelerations, of which there is one.
    generator = np.random.RandomState(seed)
    generator.randint(1)
    sampled = np.zeros(width, dtype=bool)
    if kind == "random":
        probability = (width / acceleration - num_center) / (width - num_center)
        sampled |= generator.uniform(size=width) < probability
    else:
        spacing = acceleration * (num_center - width) / (num_center * acceleration - width)
        offset = generator.randint(0, high=round(spacing))
        sampled[np.around(np.arange(offset, width - 1, spacing)).astype(int)] = True
    first = (width - num_center + 1) // 2
    sampled[first : first + num_center] = True
    return torch.from_numpy(sampled)


def _checked_center(
    kind: str, width: int, acceleration: float, center_fraction: float, seed: int
) -> int:
    """Number of central columns; checks every argument of `sampling_mask`."""
    if kind not in MASK_KINDS:
        raise InputError(f"mask '{kind}' is unknown; choose one of {', '.join(MASK_KINDS)}")
    if width < MIN_WIDTH:
        raise InputError(f"a width of {width} columns is too small to undersample; at least 8")
    if not 1 <= acceleration < float("inf"):
        raise InputError(f"acceleration {acceleration:g} is not possible; give 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"mask seed {seed} is out of range; give 0 to {2**32 - 1}")
    if not 0 < center_fraction <= 1:
        raise InputError(f"center fraction {center_fraction:g} is not between 0 and 1")
    num_center = round(width * center_fraction)
    if num_center < 1:
        raise InputError(
            f"center fraction {center_fraction:g} gives no central column at width {width}; "
            f"give at least {1 / width:.3f}"
        )
    if acceleration > 1 and num_center * acceleration >= width:
        raise InputError(
            f"center fraction {center_fraction:g} alone fills the 1/{acceleration:g} of {width} "
            f"columns that may be sampled; give less than {1 / acceleration:.3f}"
        )
    return num_center


def calibration_columns(mask: Tensor) -> Tensor:
    """The fully sampled block of columns in the middle of a mask `[W]`, see
    `pattern.central_width`: bool `[W]` on the CPU."""
    width, middle = central_width(mask.cpu().numpy()), len(mask) // 2
    columns = torch.arange(len(mask))
    return (columns >= middle - width // 2) & (columns < middle - width // 2 + width)


def find_mask(kspace: Tensor | np.ndarray) -> Tensor:
    """Columns of k-space `[..., coils, H, W]` that hold anything but zeros: bool `[W]`, CPU."""
    measured = torch.as_tensor(kspace) != 0
    return measured.reshape(-1, measured.shape[-1]).any(dim=0).cpu()
