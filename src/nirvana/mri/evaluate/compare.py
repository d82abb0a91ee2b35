"""Compares methods on fully sampled scans: undersample, reconstruct, score, summarise."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nirvana.mri.data.scans import CoilOptions, Measurement, measure, target_of
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.io import Scan
from nirvana.mri.methods import Method, Progress, SliceCounter, SliceImage
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.physics.pattern import sampled_share
from nirvana.mri.readout import complete_readout
from nirvana.statistics import signed_rank_test

Row = dict[str, Any]

METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head", "nmse_head")


class Result(NamedTuple):
    """What a method made of a scan."""

    images: np.ndarray  # float32 [slices, H, W], magnitude
    seconds: float  # per slice
    combined: np.ndarray | None = None  # complex64 [slices, H, W], of one method only


def run_methods(
    measurement: Measurement,
    methods: Mapping[str, Method],
    progress: Progress | None = None,
    combined: str | None = None,
) -> dict[str, Result]:
    """Reconstructs a scan with each method.

    Args:
        measurement: the scan.
        methods: name -> method.
        progress: see `Progress`.
        combined: name of the method whose complex images are kept.
    """
    results, acquisition = {}, measurement.acquisition
    shape = (len(acquisition), *acquisition.size)
    for name, method in methods.items():
        counter = progress(name) if progress else None
        magnitudes = np.empty(shape, np.float32)
        complexes = np.empty(shape, np.complex64) if name == combined else None
        volume = measurement.volume_of(magnitudes)
        kept = None if complexes is None else measurement.volume_of(complexes)
        start = time.perf_counter()
        images = _counted(method(acquisition), counter)
        if measurement.readout is not None:
            images = complete_readout(images, acquisition, measurement.readout)
            magnitudes, complexes = volume, kept  # slices, in place of planes
        for number, image in enumerate(images):
            magnitudes[number] = image.magnitude
            if complexes is not None:
                complexes[number] = image.combined()
        seconds = (time.perf_counter() - start) / len(acquisition)
        results[name] = Result(volume, seconds, kept)
    return results


def _counted(images: Iterable[SliceImage], counter: SliceCounter | None) -> Iterator[SliceImage]:
    for image in images:
        yield image
        if counter is not None:
            counter(1)


def score_rows(target: np.ndarray, results: Mapping[str, Result], **facts: Any) -> list[Row]:
    """One row per method: `facts`, `method`, the scores of `metrics.score`, seconds per slice."""
    head = head_mask(target)
    # Where no head is found, only the whole volume is scored.
    inside = head if head.any() else None
    return [
        {
            **facts,
            "method": name,
            **score(target, result.images, inside),
            "seconds_per_slice": result.seconds,
        }
        for name, result in results.items()
    ]


def evaluate_volume(
    scan: Scan,
    methods: Mapping[str, Method],
    sampling: Sampling,
    seed: int,
    coils: CoilOptions | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Undersamples a full scan with one seeded mask and scores each method on it.

    Args:
        scan: fully sampled.
        methods: name -> method.
        sampling: kind of mask, acceleration, centre fraction.
        seed: of the mask.
        coils: how the coils are combined before every method, see `CoilOptions`.
        progress: see `Progress`.

    Returns:
        Rows of `volume`, `slices`, `coils`, `virtual_coils`, `seed`, `sampled` (share of k-space),
        `method`, the scores, `seconds_per_slice`.
    """
    full = measure(scan, coils)
    measurement = full.undersampled(sampling, seed)
    return score_rows(
        target_of(scan, full),
        run_methods(measurement, methods, progress),
        volume=scan.name,
        slices=scan.kspace.shape[0],
        coils=scan.kspace.shape[1],
        virtual_coils=measurement.acquisition.num_coils,
        seed=seed,
        sampled=sampled_share(measurement.acquisition.pattern),
    )


def summarise(rows: Sequence[Row], reference: str) -> list[Row]:
    """Mean and spread of every method over the volumes, and a paired test against `reference`.

    Args:
        rows: of `evaluate_volume`, for the same methods on each volume.
        reference: the method that the others are compared with.

    Returns:
        Per method: `method`, `volumes`, and for each metric `mean`, `std` (sample standard
        deviation, None for one volume) and `p`, the two-sided Wilcoxon signed-rank test of the
        paired differences from the reference (None for the reference itself, below two volumes,
        and where no difference is other than zero). With n volumes p cannot be below 2^(1 - n).
    """
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    summary = []
    for method, own in by_method.items():
        line: Row = {"method": method, "volumes": len(own)}
        for metric in METRICS:
            if any(metric not in row for row in rows):
                continue
            values = np.array([row[metric] for row in own])
            differences = values - np.array([row[metric] for row in by_method[reference]])
            line[metric] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(own) > 1 else None,
                "p": signed_rank_test(differences),
            }
        summary.append(line)
    return summary
