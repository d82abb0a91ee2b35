"""Time, memory and the machine they were measured on."""

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

WARM_UP = 3
"""Rounds before the first measured one, for compilation and autotuning."""

PACKAGES = ("torch", "triton", "transformers", "fla-core", "flash-linear-attention", "flash-qla")


class Cost(NamedTuple):
    """The cost of one call.

    Attributes:
        ms: milliseconds.
        peak_bytes: peak of allocated memory; None where the device does not count it.
    """

    ms: float
    peak_bytes: int | None


def measure_costs(
    runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Cost]:
    """Measures runs in turns, so that a disturbance affects all alike.

    Args:
        runs: functions by name.
        device: on which they run.
        rounds: measured calls of each.

    Returns:
        median time and peak memory by name.
    """
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[int]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times[name].append(milliseconds(run, device))
            if device.type == "cuda":
                peaks[name].append(torch.cuda.max_memory_allocated(device))
    return {name: Cost(median(times[name]), max(peaks[name], default=None)) for name in runs}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, in ms, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def clean_room() -> Iterator[None]:
    """Frees memory and compiled code before and after the block.

    Inside, too many recompilations are an error, not a silent fallback to eager code.
    """
    limits: dict[str, Any] = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    _sweep()
    try:
        with torch._dynamo.config.patch(limits | {"fail_on_recompile_limit_hit": True}):
            yield
    finally:
        _sweep()


def _sweep() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date, as plain data."""
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": name,
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def kernel_caches() -> dict[str, Path]:
    """The folders in which compiled kernels are kept from one process to the next, by compiler.

    A copy of them serves other machines with the same versions and kind of GPU.
    """
    folders = {"PyTorch": Path(cache_dir())}
    if find_spec("triton"):
        from triton import knobs

        folders["Triton"] = Path(knobs.cache.dir)
    if find_spec("tilelang"):
        folder = os.environ.get("TILELANG_CACHE_DIR")
        folders["TileLang"] = Path(folder) if folder else Path.home() / ".tilelang"
    return folders


def commit() -> str | None:
    """The commit that this file belongs to, if it lies in a git checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git here
        return None
    return done.stdout.strip() or None
