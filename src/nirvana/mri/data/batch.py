"""Batches of undersampled slices, the same for every MRI training, and their random masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self, TypeVar

import torch
from torch import Generator, Tensor

from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling, calibration_columns
from nirvana.seeds import mixed_seed

T = TypeVar("T")

MASK_SEEDS = 256  # different masks of each kind and width


@dataclass(frozen=True)
class MriBatch:
    """Slices and the images that a codec should make of them.

    Attributes:
        kspace: complex64 `[B, coils, H, W]`, zero where not measured.
        mask: bool `[W]`, the measured columns of all slices, or `[B, W]`, those of each.
        calibration: bool of the same shape, the central block of the mask.
        target: float32 `[B, H, W]`, the root sum of squares of the fully sampled coil images.
        scale: float32 `[B]`, the brightness that a codec treats as 1; above 0.
        reports: one text for each slice; empty without reports.
    """

    kspace: Tensor
    mask: Tensor
    calibration: Tensor
    target: Tensor
    scale: Tensor
    reports: tuple[str, ...] = ()

    @classmethod
    def fully_sampled(cls, kspace: Tensor, **fields: object) -> Self:
        """Slices before any column is left out, of scale 1.

        Args:
            kspace: complex64 `[B, coils, H, W]`.
            **fields: further fields of the batch.
        """
        every = torch.ones(kspace.shape[-1], dtype=torch.bool, device=kspace.device)
        scale = torch.ones(len(kspace), device=kspace.device)
        return cls(kspace, every, every, rss(ifft2c(kspace)), scale, **fields)  # type: ignore[arg-type]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs of a codec: k-space, mask, calibration, scale."""
        return self.kspace, self.mask, self.calibration, self.scale

    def undersample(self, mask: Tensor, calibration: Tensor) -> Self:
        """The same scans with fewer columns, scaled by the brightest pixel of their zero-filled
        image. Columns that hold nothing but zeros do not count as measured.

        Args:
            mask: bool `[W]` or `[B, W]`, on any device.
            calibration: bool of the same shape, its central block.
        """
        mask, calibration = mask.to(self.kspace.device), calibration.to(self.kspace.device)
        filled = (self.kspace != 0).any(1).any(1)
        mask = mask & (filled if mask.ndim == 2 else filled.any(0))
        kspace = self.kspace * mask.view(-1, 1, 1, mask.shape[-1])
        scale = rss(ifft2c(kspace)).amax((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
        return replace(self, kspace=kspace, mask=mask, calibration=calibration, scale=scale)

    def brighten(self, generator: Generator) -> Self:
        """The same slices with scales raised by a random factor of 1 to 1.5 each: a slice is rarely
        the brightest of its volume, whose maximum is the scale in a reconstruction."""
        factor = 1 + 0.5 * torch.rand(len(self.kspace), generator=generator).to(self.scale)
        return replace(self, scale=self.scale * factor)

    def split(self, count: int) -> Iterator[Self]:
        """Batches of `count` slices each, the last one possibly of fewer; all share a mask `[W]`.

        Raises:
            ValueError: for a batch whose slices have masks of their own.
        """
        if self.mask.ndim != 1:
            raise ValueError("only a batch with one mask for all slices can be split")
        shared = ("mask", "calibration")
        for first in range(0, len(self.kspace), count):
            part = slice(first, first + count)
            yield replace(
                self, **{name: x[part] for name, x in vars(self).items() if name not in shared}
            )


def micro_batch_generator(seed: int, micro_batch: int) -> Generator:
    """The generator of everything random in one micro batch of a training; micro batches are
    numbered through all steps."""
    return Generator().manual_seed(mixed_seed(seed, micro_batch))


def choice(options: Sequence[T], generator: Generator) -> T:
    """One of the options, all equally probable."""
    return options[int(torch.randint(len(options), (), generator=generator).item())]


def draw_masks(
    samplings: Sequence[Sampling], count: int, width: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """A mask for each slice of a batch, of a sampling that is drawn uniformly.

    Returns:
        The masks and their central blocks, bool `[count, width]` each, on the CPU.
    """
    which = torch.randint(len(samplings), (count,), generator=generator).tolist()
    seeds = torch.randint(MASK_SEEDS, (count,), generator=generator).tolist()
    columns = [_columns(samplings[i], width, seed) for i, seed in zip(which, seeds, strict=True)]
    mask, calibration = torch.stack(columns, dim=1)
    return mask, calibration


@cache
def _columns(sampling: Sampling, width: int, seed: int) -> Tensor:
    """A mask and its central block, bool `[2, W]`; cached, because drawing one takes the host
    longer than everything else that it does for a slice."""
    mask = sampling.mask(width, seed)
    return torch.stack([mask, calibration_columns(mask)])
