"""Batches of undersampled slices, the same for every MRI training, and their random masks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Self, TypeVar

import torch
from torch import Generator, Tensor

from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling, calibration_columns
from nirvana.mri.physics.point_masks import PointSampling
from nirvana.seeds import mixed_seed

T = TypeVar("T")

MASK_SEEDS = 256  # different masks of columns, of each sampling and width
POINT_SEEDS = 32  # different masks of points, of each sampling and size: they take more memory


@dataclass(frozen=True)
class MriBatch:
    """Slices and the images that a codec should make of them.

    Attributes:
        kspace: complex64 `[B, coils, H, W]`, zero where not measured.
        mask: bool `[W]`, the measured columns of all slices, `[B, W]`, those of each, or
            `[B, H, W]`, points of each.
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
        """The same scans with fewer columns or points, scaled by the brightest pixel of their
        zero-filled image. Columns, or points, that hold nothing but zeros do not count as measured.

        Args:
            mask: bool `[W]`, `[B, W]` or `[B, H, W]`, on any device.
            calibration: bool of the same shape, its central block.
        """
        mask, calibration = mask.to(self.kspace.device), calibration.to(self.kspace.device)
        filled = (self.kspace != 0).any(1)
        if mask.ndim < 3:
            filled = filled.any(1)
        mask = mask & (filled if mask.ndim > 1 else filled.any(0))
        kspace = self.kspace * over_coils(mask)
        scale = rss(ifft2c(kspace)).amax((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
        return replace(self, kspace=kspace, mask=mask, calibration=calibration, scale=scale)

    def brighten(self, generator: Generator) -> Self:
        """The same slices with scales raised by a random factor of 1 to 1.5 each: a slice is rarely
        the brightest of its volume, whose maximum is the scale in a reconstruction."""
        factor = 1 + 0.5 * torch.rand(len(self.kspace), generator=generator).to(self.scale)
        return replace(self, scale=self.scale * factor)

    def hold_back(self, share: float, generator: Generator) -> "HeldBackBatch":
        """Measured columns, or points, outside of the central block, drawn at random, are taken
        from the input and become what a self-supervised loss compares.

        Args:
            share: of those outside of the block that is held back, 0..1.
            generator: on the CPU.

        Raises:
            ValueError: for a batch with one mask for all slices.
        """
        if self.mask.ndim == 1:
            raise ValueError("only a batch whose slices have masks of their own can hold back")
        drawn = torch.rand(self.mask.shape, generator=generator) < share
        held = self.mask & ~self.calibration & drawn.to(self.mask.device)
        kept = {field.name: getattr(self, field.name) for field in fields(MriBatch)}
        kept |= {"mask": self.mask & ~held, "kspace": self.kspace * ~over_coils(held)}
        return HeldBackBatch(**kept, held=held, held_kspace=self.kspace * over_coils(held))

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


@dataclass(frozen=True, kw_only=True)
class HeldBackBatch(MriBatch):
    """A batch whose input lacks some of the measured samples, for self-supervision.

    Attributes:
        held: bool of the shape of `mask`, the samples that the input lacks.
        held_kspace: complex64 `[B, coils, H, W]`, what was measured there, zero elsewhere.
    """

    held: Tensor
    held_kspace: Tensor


def over_coils(mask: Tensor) -> Tensor:
    """A mask of `MriBatch` in a shape that broadcasts over k-space `[B, coils, H, W]`."""
    return mask[:, None] if mask.ndim == 3 else mask.view(-1, 1, 1, mask.shape[-1])


def micro_batch_generator(seed: int, micro_batch: int) -> Generator:
    """The generator of everything random in one micro batch of a training; micro batches are
    numbered through all steps."""
    return Generator().manual_seed(mixed_seed(seed, micro_batch))


def choice(options: Sequence[T], generator: Generator) -> T:
    """One of the options, all equally probable."""
    return options[int(torch.randint(len(options), (), generator=generator).item())]


Samplings = Sequence[Sampling] | Sequence[PointSampling]
"""Of columns or of points: all masks of a batch have one shape."""


def draw_masks(
    samplings: Samplings, count: int, size: tuple[int, int], generator: Generator
) -> tuple[Tensor, Tensor]:
    """A mask for each slice of a batch, of a sampling that is drawn uniformly.

    Args:
        samplings: to draw from.
        count: number of masks.
        size: H and W of k-space.
        generator: on the CPU.

    Returns:
        The masks and their central blocks, bool `[count, W]` each, or `[count, H, W]` of points, on
        the CPU.
    """
    which = torch.randint(len(samplings), (count,), generator=generator).tolist()
    seeds = torch.randint(MASK_SEEDS, (count,), generator=generator).tolist()
    masks = []
    for index, seed in zip(which, seeds, strict=True):
        sampling = samplings[index]
        if isinstance(sampling, PointSampling):
            masks.append(_points(sampling, tuple(size), seed % POINT_SEEDS))
        else:
            masks.append(_columns(sampling, size[1], seed))
    mask, calibration = torch.stack(masks, dim=1)
    return mask, calibration


@cache
def _columns(sampling: Sampling, width: int, seed: int) -> Tensor:
    """A mask and its central block, bool `[2, W]`; cached, because drawing one takes the host
    longer than everything else that it does for a slice."""
    mask = sampling.mask(width, seed)
    return torch.stack([mask, calibration_columns(mask)])


@cache
def _points(sampling: PointSampling, size: tuple[int, int], seed: int) -> Tensor:
    """The same of points, bool `[2, H, W]`."""
    return torch.stack(sampling.mask(size, seed))
