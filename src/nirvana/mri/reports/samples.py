"""Training samples of a reporter: undersampled k-space of brain slices with simulated lesions, and
their reports."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nirvana.mri.anatomy.brain_slices import BrainSlices
from nirvana.mri.anatomy.lesions import (
    SEQUENCES,
    TYPES,
    Anatomy,
    Lesions,
    LesionSettings,
    draw_lesions,
    paint,
)
from nirvana.mri.anatomy.lobes import LOBES, SIDES
from nirvana.mri.data.batch import MriBatch
from nirvana.mri.data.simulate import simulate
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.physics.masks import Sampling, calibration_columns
from nirvana.mri.reports.grammar import NORMAL, Facts, rounded, write


@dataclass(frozen=True, kw_only=True)
class ReportBatch(MriBatch):
    """A batch under one mask, with the simulated lesions that its reports describe.

    Attributes:
        facts: of each slice; `reports` describes them, each in a wording drawn for it.
        size: float32 `[B]`, longest diameter of the largest lesion in mm before rounding, 0 without
            a lesion.
        contrast: float32 `[B]`, |contrast| of the lesions, 0 without one.
        index: int64 `[B]`, of the slices in their pool.
        coverage: float32 `[B, H, W]`, share of each pixel that lesions take, 0..1.
    """

    facts: list[Facts]
    size: Tensor
    contrast: Tensor
    index: Tensor
    coverage: Tensor


@dataclass(frozen=True)
class Scanner:
    """How slices are scanned and undersampled."""

    sampling: Sampling
    simulation: Simulation
    num_coils: int


def facts_of(anatomy: Anatomy, lesions: Lesions) -> list[Facts]:
    """The true facts of each slice."""
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
    slices: BrainSlices,
    count: int,
    generator: Generator,
    scanner: Scanner,
    lesions: LesionSettings,
    wordings: Sequence[int],
    vary: bool = True,
) -> ReportBatch:
    """`count` undersampled samples; arguments as of `simulate_report_batch`."""
    how = (scanner.simulation, scanner.num_coils, lesions, wordings, vary)
    batch = simulate_report_batch(slices, count, generator, *how)
    return undersample_alike(batch, scanner.sampling, generator)


def simulate_report_batch(
    slices: BrainSlices,
    count: int,
    generator: Generator,
    simulation: Simulation,
    num_coils: int,
    lesions: LesionSettings,
    wordings: Sequence[int],
    vary: bool = True,
) -> ReportBatch:
    """Fully sampled scans of random slices with random lesions.

    Args:
        slices: the pool; samples are made on its device.
        count: number of samples.
        generator: on the CPU; every random number comes from it.
        simulation: of the scans.
        num_coils: number of receive coils.
        lesions: how they are drawn.
        wordings: indices in `grammar.WORDINGS`; each report's is drawn from them.
        vary: see `BrainSlices.draw`.
    """
    anatomy, index = slices.draw(count, generator, vary)
    drawn = draw_lesions(anatomy, generator, lesions)
    facts = facts_of(anatomy, drawn)
    images, coverage = paint(anatomy, drawn)
    kspace = simulate(images, generator, simulation, num_coils)
    which = torch.randint(len(wordings), (count,), generator=generator).tolist()
    reports = tuple(write(one, wordings[w]) for one, w in zip(facts, which, strict=True))
    present = drawn.count > 0
    return ReportBatch.fully_sampled(
        kspace,
        reports=reports,
        facts=facts,
        size=drawn.size[:, 0] * present,
        contrast=drawn.contrast * present,
        index=index,
        coverage=coverage,
    )


def undersample_alike(batch: ReportBatch, sampling: Sampling, generator: Generator) -> ReportBatch:
    """The batch under one mask of a seed that is drawn for it."""
    seed = int(torch.randint(2**31, (), generator=generator).item())
    mask = sampling.mask(batch.kspace.shape[-1], seed)
    return batch.undersample(mask, calibration_columns(mask))
