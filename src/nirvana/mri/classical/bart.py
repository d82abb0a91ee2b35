"""Reconstructions by BART, the Berkeley Advanced Reconstruction Toolbox (doi
10.5281/zenodo.592960), where its program is installed: `bart ecalib` (ESPIRiT) and `bart pics`,
slice by slice.

Sensitivities and solvers are independent of those of `sigpy`.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.classical.common import central_rows, fft2c, padded
from nirvana.mri.classical.peers import BartSettings, peers_for
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.io.bart import read_cfl, write_cfl

PROGRAM = "bart"


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
    acquisition: Acquisition, settings: BartSettings | Literal["l1", "l2"] = "l1"
) -> Iterator[np.ndarray]:
    """Parallel imaging with wavelets ("l1", FISTA) or a squared norm ("l2", conjugate gradients).

    As in `sigpy.l1_wavelet` the measured samples replace those of the k-space of the coil images.

    Args:
        acquisition: the measured k-space.
        settings: of BART's programs, or the norm, whose settings are those chosen for this
            acceleration.

    Yields:
        complex64 `[coils, H, W]` for each slice.

    Raises:
        InputError: BART is not installed or fails, or the coils cannot be calibrated.
    """
    found = program()
    acquisition.require_calibration()
    if isinstance(settings, str):
        settings = peers_for(acquisition.pattern).bart(settings)
    with TemporaryDirectory(prefix="nirvana-bart-") as folder:
        for index, kspace in enumerate(acquisition.slices()):
            calibration, mask = acquisition.calibration(index), acquisition.mask(index)
            if not kspace.any() or not calibration.any():
                yield kspace
                continue
            modelled = _pics(found, Path(folder), kspace, mask, calibration, settings)
            yield np.where(mask, kspace, modelled).astype(np.complex64)


def _pics(
    program: str,
    folder: Path,
    kspace: np.ndarray,
    mask: np.ndarray,
    calibration: np.ndarray,
    settings: BartSettings,
) -> np.ndarray:
    """K-space `[coils, H, W]` of BART's coil images for a slice of k-space `[coils, H, W]`."""
    # `bart pics` is correct for sides that are multiples of four. Unmeasured lines are added
    # outside of the measured ones to make them so: the field of view stays the same, pixels become
    # finer.
    coils, *sides = kspace.shape
    height, width = (side + -side % 4 for side in sides)
    pattern = padded(np.broadcast_to(mask, (1, *sides)), (height, width))
    names = ("kspace", "calibration", "pattern", "maps", "image")
    data = {name: folder / f"{name}.cfl" for name in names}
    files = {name: str(folder / name) for name in names}  # BART adds the suffixes
    middle = central_rows(calibration, settings.calibration_rows)
    write_cfl(data["kspace"], padded(kspace, (height, width)))
    write_cfl(data["calibration"], padded(middle, (height, width)))
    write_cfl(data["pattern"], pattern)
    # More than half of the samples must remain for the kernel to be shifted over.
    rows, columns = middle.shape[1:]
    sides_of_kernel = (min(settings.kernel, (n + 2) // 2) for n in (rows, columns))
    kernel = ":".join(str(side) for side in (*sides_of_kernel, 1))
    estimate = ["ecalib", *settings.ecalib, "-k", kernel, "-r", f"{rows}:{columns}:1"]
    _run(program, *estimate, files["calibration"], files["maps"])
    solve = ["pics", "-S", *settings.pics, "-p", files["pattern"]]
    _run(program, *solve, files["kspace"], files["maps"], files["image"])
    # Dimension 4 of BART's holds the sets of sensitivities, each with an image of its own.
    maps = read_cfl(data["maps"], (settings.maps, coils, height, width))
    images = read_cfl(data["image"], (settings.maps, 1, height, width))
    return padded(fft2c((maps * images).sum(0)), (sides[0], sides[1]))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise InputError(f"{PROGRAM} {command[1]} failed: {why}")
