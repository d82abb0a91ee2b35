"""Methods compared on fully sampled scans: undersample, reconstruct, score, tabulate."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.io import Scan
from nirvana.mri.metrics import head_mask, score
from nirvana.mri.physics import Sampling, find_mask, ifft2c, is_undersampled, rss
from nirvana.statistics import signed_rank_test

Method = Callable[[Tensor, Tensor], Any]
Row = dict[str, Any]

METRICS = ("ssim", "psnr", "nmse", "ssim_head", "psnr_head", "nmse_head")
FORMATS = {
    "ssim": "{:.4f}",
    "psnr": "{:.2f}",
    "nmse": "{:.4f}",
    "ssim_head": "{:.4f}",
    "psnr_head": "{:.2f}",
    "nmse_head": "{:.4f}",
    "seconds_per_slice": "{:.3f}",
}


def sampled_columns(scan: Scan) -> Tensor:
    """The columns that a scan measured, bool `[W]`: its mask's, without those that are empty."""
    found = find_mask(scan.kspace)
    return found if scan.mask is None else found & torch.from_numpy(scan.mask)


def is_full(scan: Scan) -> bool:
    """Whether a scan is fully sampled (zero-padding at its sides aside)."""
    return not is_undersampled(sampled_columns(scan))


def undersample(scan: Scan, sampling: Sampling, seed: int) -> tuple[Tensor, Tensor]:
    """Keeps the columns of one seeded mask.

    Args:
        scan: fully sampled.
        sampling: kind of mask, acceleration, centre fraction.
        seed: of the mask.

    Returns:
        k-space complex64 `[slices, coils, H, W]`, zero where not sampled, and the mask, bool
        `[W]`, false in the columns that hold nothing anyway.

    Raises:
        InputError: the scan is undersampled already, or the mask is not possible.
    """
    if not is_full(scan):
        raise InputError(f"{scan.name} is undersampled already; a fully sampled scan is needed")
    mask = sampling.mask(scan.kspace.shape[-1], seed) & sampled_columns(scan)
    return torch.from_numpy(scan.kspace) * mask, mask


def target_of(scan: Scan) -> np.ndarray:
    """The image that a full scan is scored against, float32 `[slices, h, w]`: its own, or RSS."""
    if scan.target is not None:
        return scan.target
    return np.stack([rss(ifft2c(torch.from_numpy(part))).numpy() for part in scan.kspace])


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
    # Without a head to be seen, what is inside it cannot be scored; the whole volume can.
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
    kspace, mask = undersample(scan, sampling, seed)
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


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows of `evaluate_volume`, to print."""
    shown = [key for key in FORMATS if all(key in row for row in rows)]
    several = len({row["volume"] for row in rows}) > 1
    sized = any(row.get("parameters") is not None for row in rows)
    table = Table(box=SIMPLE_HEAD)
    if several:
        table.add_column("volume", overflow="fold")
    table.add_column("method", no_wrap=True)
    if sized:
        table.add_column("parameters", justify="right", no_wrap=True)
    for key in shown:
        # Names of volumes give way on a narrow terminal, numbers do not.
        longest = max(len(FORMATS[key].format(row[key])) for row in rows)
        table.add_column(_heading(key), justify="right", min_width=longest)
    for row in rows:
        cells = ([row["volume"]] if several else []) + [row["method"]]
        if sized:
            number = row.get("parameters")
            cells.append("" if number is None else f"{number / 1e6:.2f} M")
        table.add_row(*cells, *(FORMATS[key].format(row[key]) for key in shown))
    return table


def summary_table(summary: Sequence[Row]) -> Table:
    """The lines of `summarise`, to print: mean, ± spread, p against the reference."""
    metrics = [metric for metric in METRICS if all(metric in line for line in summary)]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for metric in metrics:
        table.add_column(_heading(metric), justify="right")
    for line in summary:
        table.add_row(line["method"], *(_cell(line[metric], metric) for metric in metrics))
    return table


def _cell(figures: Row, metric: str) -> str:
    text = FORMATS[metric].format(figures["mean"])
    if figures["std"] is not None:
        text += "\n± " + FORMATS[metric].format(figures["std"])
    return text if figures["p"] is None else f"{text}\np = {figures['p']:.3g}"


def _heading(key: str) -> str:
    name, _, where = key.partition("_")
    if key == "seconds_per_slice":
        return "s / slice"
    unit = " dB" if name == "psnr" else ""
    return f"{name.upper()}{unit}" + (f"\n{where}" if where else "")


def finite(value: Any) -> Any:
    """The same data with None for infinite numbers (the PSNR of equal images), fit for JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
