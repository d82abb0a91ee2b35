"""Facts about whole scans: the columns they measured, their target, and their undersampling."""

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.io import Scan
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling, find_mask, is_undersampled


def sampled_columns(scan: Scan, mask: np.ndarray | Tensor | None = None) -> Tensor:
    """The columns that a scan measured.

    Args:
        scan: the scan.
        mask: bool `[W]`, in place of the scan's own mask.

    Returns:
        Bool `[W]` on the CPU: the mask's columns, without those that hold nothing but zeros.

    Raises:
        InputError: the mask has another width.
    """
    found = find_mask(scan.kspace)
    given = scan.mask if mask is None else mask
    if given is None:
        return found
    given = torch.as_tensor(given).bool().cpu()
    if given.shape != found.shape:
        raise InputError(
            f"{scan.name}: the mask is {tuple(given.shape)}; k-space has {len(found)} columns"
        )
    return found & given


def is_full(scan: Scan) -> bool:
    """Whether a scan is fully sampled; empty columns at its two sides are zero-padding."""
    return not is_undersampled(sampled_columns(scan))


def undersample_scan(scan: Scan, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
    """Keeps the columns of one seeded mask.

    Args:
        scan: fully sampled.
        sampling: kind of mask, acceleration, centre fraction.
        seed: of the mask.

    Returns:
        K-space complex64 `[slices, coils, H, W]`, zero where not sampled, and the mask, bool
        `[W]`, false in the columns that hold nothing anyway.

    Raises:
        InputError: the scan is undersampled already, or the mask is not possible.
    """
    if not is_full(scan):
        raise InputError(f"{scan.name} is undersampled already; a fully sampled scan is needed")
    mask = sampling.mask(scan.kspace.shape[-1], seed) & sampled_columns(scan)
    return torch.from_numpy(scan.kspace) * mask, mask


def target_of(scan: Scan) -> np.ndarray:
    """The image that a full scan is scored against, float32 `[slices, h, w]`: its own target, or
    the root sum of squares of its coil images."""
    if scan.target is not None:
        return scan.target
    return np.stack([rss(ifft2c(torch.from_numpy(part))).numpy() for part in scan.kspace])
