"""Compares methods on fully sampled scans: undersample, reconstruct, score, summarise."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from nirvana.mri.data.scans import target_of, undersample_scan
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.io import Scan
from nirvana.mri.physics.masks import Sampling
from nirvana.statistics import signed_rank_test

Method = Callable[[Tensor, Tensor], Any]
Row = dict[str, Any]

METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head", "nmse_head")


def run_methods(
    kspace: Tensor, mask: Tensor, methods: Mapping[str, Method]
) -> dict[str, tuple[np.ndarray, float]]:
    """Reconstructs one undersampled volume with each method.

    Args:
        kspace: complex64 `[slices, coils, H, W]`.
        mask: bool `[W]`.
        methods: name -> function of (kspace, mask) that returns `[slices, H, W]`.

    Returns:
        Name -> (float32 `[slices, H, W]`, seconds per slice).
    """
    results = {}
    for name, method in methods.items():
        start = time.perf_counter()
        volume = np.asarray(method(kspace, mask), dtype=np.float32)
        results[name] = (volume, (time.perf_counter() - start) / len(kspace))
    return results


def score_rows(
    target: np.ndarray, results: Mapping[str, tuple[np.ndarray, float]], **facts: Any
) -> list[Row]:
    """One row per method: `facts`, `method`, the scores of `metrics.score`, seconds per slice."""
    head = head_mask(target)
    # Where no head is found, only the whole volume is scored.
    inside = head if head.any() else None
    return [
        {
            **facts,
            "method": name,
            **score(target, volume, inside),
            "seconds_per_slice": seconds,
        }
        for name, (volume, seconds) in results.items()
    ]


def evaluate_volume(
    scan: Scan, methods: Mapping[str, Method], sampling: Sampling, seed: int
) -> list[Row]:
    """Undersamples a full scan with one seeded mask and scores each method on it.

    Args:
        scan: fully sampled.
        methods: name -> function of (kspace complex64 `[slices, coils, H, W]`, mask bool `[W]`).
        sampling: kind of mask, acceleration, centre fraction.
        seed: of the mask.

    Returns:
        Rows of `volume`, `slices`, `coils`, `seed`, `sampled` (share of columns), `method`, the
        scores, `seconds_per_slice`.
    """
    kspace, mask = undersample_scan(scan, sampling, seed)
    return score_rows(
        target_of(scan),
        run_methods(kspace, mask, methods),
        volume=scan.name,
        slices=kspace.shape[0],
        coils=kspace.shape[1],
        seed=seed,
        sampled=float(mask.float().mean()),
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


def finite(value: Any) -> Any:
    """The same data with None for infinite numbers (the PSNR of equal images), fit for JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
