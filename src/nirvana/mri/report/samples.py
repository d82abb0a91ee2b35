"""Samples of stage 1: undersampled k-space of a head with simulated lesions, and its report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from nirvana.mri.lesions import (
    SEQUENCES,
    TYPES,
    Anatomy,
    Lesions,
    LesionSettings,
    draw_lesions,
    paint,
)
from nirvana.mri.lobes import LOBES, SIDES
from nirvana.mri.physics import Sampling, calibration_columns, ifft2c, rss
from nirvana.mri.report.grammar import NORMAL, Facts, rounded, write
from nirvana.mri.report.heads import Heads
from nirvana.mri.simulate import Simulation, simulate

ONE = ("mask", "calibration")  # of a batch, which has one for all slices


@dataclass(frozen=True)
class ReportBatch:
    """Undersampled slices and what is to be said about them.

    Attributes:
        kspace: complex64 `[B, coils, H, W]`, zero where not measured.
        mask: bool `[W]`, one for the batch.
        calibration: bool `[W]`, its central block.
        target: `[B, H, W]`, RSS of the fully sampled k-space.
        scale: `[B]`, what brightness 1 is.
        facts: of each slice.
        reports: texts, each in a wording drawn for it.
        size: `[B]`, longest diameter of the largest lesion in mm before rounding, 0 without one.
        contrast: `[B]`, |contrast| of the lesions, 0 without one.
        index: `[B]`, of the slices in the pool.
        coverage: `[B, H, W]`, share of each pixel that a lesion takes.
    """

    kspace: Tensor
    mask: Tensor
    calibration: Tensor
    target: Tensor
    scale: Tensor
    facts: list[Facts]
    reports: list[str]
    size: Tensor
    contrast: Tensor
    index: Tensor
    coverage: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a codec reads: k-space, mask, calibration, scale."""
        return self.kspace, self.mask, self.calibration, self.scale

    def split(self, count: int) -> Iterator["ReportBatch"]:
        """Batches of `count` of its slices."""
        for first in range(0, len(self.kspace), count):
            part = slice(first, first + count)
            of_slices = {name: value[part] for name, value in vars(self).items() if name not in ONE}
            yield replace(self, **of_slices)


@dataclass(frozen=True)
class Scanner:
    """How slices are scanned and undersampled; see `Simulation` and `Sampling`."""

    sampling: Sampling
    simulation: Simulation
    num_coils: int


def facts_of(anatomy: Anatomy, lesions: Lesions) -> list[Facts]:
    """What is true of each slice."""
    columns = (
        lesions.count,
        lesions.kind,
        lesions.side,
        lesions.lobe,
        lesions.size[:, 0],
        anatomy.sequence,
    )
    found = []
    for count, kind, side, lobe, size, sequence in zip(*(c.tolist() for c in columns), strict=True):
        if count == 0:
            found.append(NORMAL)
            continue
        name, signal = TYPES[kind].name, TYPES[kind].signal(SEQUENCES[sequence])
        found.append(Facts(True, count, name, SIDES[side], LOBES[lobe], rounded(size), signal))
    return found


def report_batch(
    heads: Heads,
    count: int,
    generator: Generator,
    scanner: Scanner,
    lesions: LesionSettings,
    wordings: Sequence[int],
    vary: bool = True,
) -> ReportBatch:
    """`count` samples on the device of `heads`; every random number comes from `generator`."""
    how = (scanner.simulation, scanner.num_coils, lesions, wordings, vary)
    whole = scanned(heads, count, generator, *how)
    return undersampled(whole, scanner.sampling, generator)


def scanned(
    heads: Heads,
    count: int,
    generator: Generator,
    simulation: Simulation,
    num_coils: int,
    lesions: LesionSettings,
    wordings: Sequence[int],
    vary: bool = True,
) -> ReportBatch:
    """`report_batch` before anything is left out, and before it is scaled."""
    anatomy, index = heads.draw(count, generator, vary)
    drawn = draw_lesions(anatomy, generator, lesions)
    facts = facts_of(anatomy, drawn)
    images, coverage = paint(anatomy, drawn)
    kspace = simulate(images, generator, simulation, num_coils)
    which = torch.randint(len(wordings), (count,), generator=generator).tolist()
    reports = [write(one, wordings[w]) for one, w in zip(facts, which, strict=True)]
    present = drawn.count > 0
    every = torch.ones(kspace.shape[-1], dtype=torch.bool, device=kspace.device)
    return ReportBatch(
        kspace=kspace,
        mask=every,
        calibration=every,
        target=rss(ifft2c(kspace)),
        scale=torch.ones(count, device=kspace.device),
        facts=facts,
        reports=reports,
        size=drawn.size[:, 0] * present,
        contrast=drawn.contrast * present,
        index=index,
        coverage=coverage,
    )


def undersampled(batch: ReportBatch, sampling: Sampling, generator: Generator) -> ReportBatch:
    """The same scans of fewer columns; scaled by the brightest zero-filled pixel."""
    device = batch.kspace.device
    seed = int(torch.randint(2**31, (), generator=generator).item())
    mask = sampling.mask(batch.kspace.shape[-1], seed)
    kspace = batch.kspace * mask.to(device)
    return replace(
        batch,
        kspace=kspace,
        mask=mask.to(device),
        calibration=calibration_columns(mask).to(device),
        scale=rss(ifft2c(kspace)).amax((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny),
    )
