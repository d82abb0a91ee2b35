"""Samples of stage 1: undersampled k-space of a head with simulated lesions, and its report."""

from collections.abc import Sequence
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
    anatomy, index = heads.draw(count, generator, vary)
    drawn = draw_lesions(anatomy, generator, lesions)
    facts = facts_of(anatomy, drawn)
    images, coverage = paint(anatomy, drawn)
    kspace = simulate(images, generator, scanner.simulation, scanner.num_coils)
    which = torch.randint(len(wordings), (count,), generator=generator).tolist()
    reports = [write(one, wordings[w]) for one, w in zip(facts, which, strict=True)]
    present = drawn.count > 0
    seed = int(torch.randint(2**31, (), generator=generator).item())
    full = ReportBatch(
        kspace=kspace,
        mask=torch.ones(kspace.shape[-1], dtype=torch.bool, device=kspace.device),
        calibration=torch.ones(kspace.shape[-1], dtype=torch.bool, device=kspace.device),
        target=rss(ifft2c(kspace)),
        scale=torch.ones(count, device=kspace.device),
        facts=facts,
        reports=reports,
        size=drawn.size[:, 0] * present,
        contrast=drawn.contrast * present,
        index=index,
        coverage=coverage,
    )
    return undersampled(full, scanner.sampling.mask(kspace.shape[-1], seed))


def undersampled(batch: ReportBatch, mask: Tensor) -> ReportBatch:
    """The same scans of fewer columns, bool `[W]`; scaled by the brightest zero-filled pixel."""
    device = batch.kspace.device
    kspace = batch.kspace * mask.to(device)
    return replace(
        batch,
        kspace=kspace,
        mask=mask.to(device),
        calibration=calibration_columns(mask).to(device),
        scale=rss(ifft2c(kspace)).amax((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny),
    )
