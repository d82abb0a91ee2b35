"""The files of a reconstruction: HDF5, NIfTI, DICOM and BART's, in the axes of the scan's file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.bart import write_bart
from nirvana.mri.io.dicom import Series, write_dicom
from nirvana.mri.io.fastmri import write_reconstruction
from nirvana.mri.io.scan import Scan, in_file_axes
from nirvana.mri.io.volume import write_nifti

FORMATS = ("hdf5", "nifti", "dicom", "cfl", "png")
RESULT_FILES = (
    "dicom",
    "dicom_phase",
    "metrics.json",
    "panel.png",
    "reconstruction.cfl",
    "reconstruction.h5",
    "reconstruction.hdr",
    "reconstruction.nii.gz",
    "reconstruction_phase.nii.gz",
)
BLOCKS, BLOCK = 64, 2**18  # number and bytes of the parts of a file that identify it


@dataclass(frozen=True)
class OutputOptions:
    """What is written of a reconstruction.

    Attributes:
        formats: some of `FORMATS`.
        complex_images: whether complex images or phases are written, too.
    """

    formats: tuple[str, ...] = ("hdf5", "nifti", "dicom", "png")
    complex_images: bool = False


def parse_formats(text: str) -> tuple[str, ...]:
    """`OutputOptions.formats` of an option's text, names between commas.

    Raises:
        InputError: a name is none of `FORMATS`, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in FORMATS]
    if wrong or not names:
        found = f"names {wrong[0]}" if wrong else "names none"
        raise InputError(f"--formats {found}; give some of {','.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


@dataclass(frozen=True)
class Reconstruction:
    """The images of a scan that are written.

    Attributes:
        scan: that was reconstructed.
        mask: bool, broadcastable to `[slices, H, W]`, the samples that were used.
        magnitude: float32 `[slices, H, W]`.
        combined: complex64 `[slices, H, W]`, or None.
        method: whose images they are.
        settings: all that determined them besides the scan.
    """

    scan: Scan
    mask: np.ndarray
    magnitude: np.ndarray
    combined: np.ndarray | None
    method: str
    settings: Mapping[str, Any]


def write_images(
    folder: Path, found: Reconstruction, files: Sequence[Path], options: OutputOptions
) -> None:
    """Writes the images in every format but the picture, in the axes of the scan's file.

    Args:
        folder: which exists, written to.
        found: the images.
        files: that hold the scan; they identify the study.
        options: what is written; complex images need `found.combined`.
    """
    scan, formats = found.scan, options.formats
    combined = found.combined if options.complex_images else None
    phase = None if combined is None else np.angle(combined)
    if "hdf5" in formats:
        about = {"method": found.method, "source": files[0].name}
        about |= {key: str(value) for key, value in found.settings.items() if key == "codec"}
        file = folder / "reconstruction.h5"
        write_reconstruction(file, found.magnitude, scan, found.mask, combined, **about)
    if "nifti" in formats:
        for name, image in (("reconstruction", found.magnitude), ("reconstruction_phase", phase)):
            if image is not None:
                turned, spacing, affine = in_file_axes(image, scan)
                write_nifti(folder / f"{name}.nii.gz", turned, affine, spacing)
    if "cfl" in formats:
        image = found.magnitude if combined is None else combined
        write_bart(folder / "reconstruction.cfl", in_file_axes(image, scan)[0])
    if "dicom" in formats:
        series = _series(found, files)
        write_dicom(folder / "dicom", found.magnitude, scan, series)
        if phase is not None:
            name, number = f"phase, {series.description}", series.number + 1
            series = replace(series, description=name, number=number, part="phase")
            write_dicom(folder / "dicom_phase", phase, scan, series)


def _series(found: Reconstruction, files: Sequence[Path]) -> Series:
    """The DICOM series of a reconstruction. Its number is that of the measured series and four
    digits that follow from the settings, so that other settings give another one."""
    settings = json.dumps(dict(found.settings), sort_keys=True, default=str)
    choice = int(sha256(settings.encode()).hexdigest(), 16) % 4999
    name = " ".join([found.method, str(found.settings.get("codec", ""))]).strip()
    return Series(
        description=f"{name}, {found.mask.mean():.1%} sampled",
        identity=identity_of(files),
        number=10000 * ((found.scan.study.series_number or 0) % 10000) + 1 + 2 * choice,
        created=datetime.now(),
    )


def identity_of(files: Iterable[Path]) -> str:
    """A digest by which a scan is recognised under any name: of the sizes of its files and of
    parts that are evenly spread over each, whose noise no two scans have in common."""
    digest = sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with open(file, "rb") as handle:
            for number in range(BLOCKS):
                handle.seek(number * max(size - BLOCK, 0) // (BLOCKS - 1))
                digest.update(handle.read(BLOCK))
                if size <= BLOCK:
                    break
    return digest.hexdigest()
