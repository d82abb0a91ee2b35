"""Reconstructions by BART, the Berkeley Advanced Reconstruction Toolbox (doi
10.5281/zenodo.592960), where its program is installed: `bart ecalib` (ESPIRiT) and `bart pics`,
slice by slice.

Sensitivities and solvers are independent of those of `sigpy`.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.classical.common import arrays, fft2c, with_measured
from nirvana.mri.io.bart import read_cfl, write_cfl

PROGRAM = "bart"
KERNEL = 6  # side of ESPIRiT's kernels, BART's own default
ROWS = 24  # of the calibration region at most, BART's own default
# Tuned at 4x on two slices of each of three training volumes of the study (experiments/mri), with 8
# simulated coils. BART scales the data before the weights (-r) apply; few steps (-i) are part of
# the regularisation.
CALIBRATION = ("-m", "1", "-t", "0.02", "-c", "0.5")
SETTINGS = {"l1": ("-l1", "-r", "0.006", "-i", "30"), "l2": ("-l2", "-r", "0.01", "-i", "15")}


def program() -> str:
    """Path of BART's program.

    Raises:
        InputError: it is not installed.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise InputError(
            f"the program {PROGRAM!r} of the BART toolbox is not on the PATH; install it "
            "(https://mrirecon.github.io/bart) or compare without it"
        )
    return found


def bart_pics(
    kspace: Any,
    mask: Any,
    calibration_width: int,
    norm: Literal["l1", "l2"] = "l1",
    *,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Parallel imaging with wavelets ("l1", FISTA) or a squared norm ("l2", conjugate gradients).

    As in `sigpy.l1_wavelet` the measured columns replace those of the k-space of the coil images,
    which are combined by root sum of squares.

    Args:
        kspace: complex `[slices, coils, H, W]`, array or CPU tensor.
        mask: bool `[W]`.
        calibration_width: fully sampled columns in the middle, `masks.calibration_width(mask)`.
        norm: the regularisation.
        progress: called with the number of slices just done.

    Returns:
        float32 `[slices, H, W]`.

    Raises:
        InputError: BART is not installed, fails, or there are fewer than two calibration columns.
    """
    found = program()
    kspace, mask = arrays(kspace, mask)
    if calibration_width < 2:
        raise InputError(
            "BART estimates coil sensitivities from sampled columns in the middle of k-space, and "
            f"this mask has {calibration_width} there; it takes 2 or more"
        )
    volume = []
    with TemporaryDirectory(prefix="nirvana-bart-") as folder:
        for measured in np.where(mask, kspace, 0):
            if measured.any():
                modelled = _pics(found, Path(folder), measured, mask, calibration_width, norm)
                volume.append(with_measured(measured, mask, modelled))
            else:
                volume.append(np.zeros(measured.shape[1:], dtype=np.float32))
            if progress is not None:
                progress(1)
    return np.stack(volume).astype(np.float32)


def _pics(
    program: str, folder: Path, kspace: np.ndarray, mask: np.ndarray, width: int, norm: str
) -> np.ndarray:
    """K-space `[coils, H, W]` of BART's coil images for a slice of k-space `[coils, H, W]`."""
    # `bart pics` is correct for sides that are multiples of four. Unmeasured lines are added
    # outside of the measured ones to make them so: the field of view stays the same, pixels become
    # finer.
    sides = kspace.shape[1:]
    before = [(side + -side % 4) // 2 - side // 2 for side in sides]
    padding = [(b, -side % 4 - b) for b, side in zip(before, sides, strict=True)]
    padded = np.pad(kspace, [(0, 0), *padding])
    pattern = np.pad(np.broadcast_to(mask, (1, *sides)), [(0, 0), *padding])
    coils, height, columns = padded.shape
    names = ("kspace", "pattern", "maps", "image")
    data = {name: folder / f"{name}.cfl" for name in names}
    files = {name: str(folder / name) for name in names}  # BART adds the suffixes
    write_cfl(data["kspace"], padded)
    write_cfl(data["pattern"], pattern)
    # More than half of the columns must remain for the kernel to be shifted over.
    kernel = f"{min(KERNEL, height)}:{min(KERNEL, (width + 2) // 2)}:1"
    region = f"{min(ROWS, height)}:{width}:1"
    calibration = ["ecalib", *CALIBRATION, "-k", kernel, "-r", region]
    _run(program, *calibration, files["kspace"], files["maps"])
    solve = ["pics", "-S", *SETTINGS[norm], "-p", files["pattern"]]
    _run(program, *solve, files["kspace"], files["maps"], files["image"])
    maps = read_cfl(data["maps"], (coils, height, columns))
    found = fft2c(maps * read_cfl(data["image"], (1, height, columns)))
    inside = (slice(b, b + side) for b, side in zip(before, sides, strict=True))
    return found[:, *inside]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise InputError(f"{PROGRAM} {command[1]} failed: {why}")
