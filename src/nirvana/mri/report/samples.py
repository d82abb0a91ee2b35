"""Samples of stage 1: undersampled k-space of a head with simulated lesions, and its report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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

PROMPT = "Report:"
IGNORE = -100
LENGTHS = 32  # text is padded to multiples of it: kernels are tuned, or compiled, for every length


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


def prompt_tokens(tokenizer: Any) -> list[int]:
    """What stands between the image and every report."""
    return tokenizer(PROMPT, add_special_tokens=False).input_ids


def report_tokens(tokenizer: Any, reports: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Prompt and reports as a model reads them, and what it is to predict.

    Returns: ids `[B, M]`, padded at the end, and labels `[B, M]`: the token after each place, the
        end of text after the last one, `IGNORE` where that is the prompt's or padding.
    """
    prompt = prompt_tokens(tokenizer)
    texts = tokenizer([" " + report for report in reports], add_special_tokens=False).input_ids
    longest = len(prompt) + max(len(ids) for ids in texts)
    longest += -longest % LENGTHS
    rows, labels = [], []
    for ids in texts:
        row = prompt + ids
        padding = longest - len(row)
        rows.append(row + [tokenizer.pad_token_id] * padding)
        wanted = [*ids, tokenizer.eos_token_id]
        labels.append([IGNORE] * (len(prompt) - 1) + wanted + [IGNORE] * padding)
    return torch.tensor(rows), torch.tensor(labels)
