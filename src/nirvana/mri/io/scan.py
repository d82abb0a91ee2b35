"""The scan that readers return, and the checks that every reader makes before it reads."""

import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import K, Kspace

Spacing = tuple[float, float, float]

MIN_SIDE, MAX_SIDE = 8, 8192
MAX_COILS, MAX_SLICES = 1024, 8192
MAX_BYTES: ContextVar[int] = ContextVar("MAX_BYTES", default=64 * 2**30)
"""Bytes of the largest array, and of the largest unpacked file, that are read; see `at_most`."""
# Deflate, the densest filter in use, stores at best 1032 bytes in one.
MAX_COMPRESSION = 1032

LARGEST = 1e15  # of k-space: sums of its squares must stay within float32

# What libraries raise on a damaged or mislabelled file.
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
    zlib.error,
)


@dataclass(frozen=True)
class Study:
    """What a file states about patient, study and sequence; None where it states nothing.

    Attributes:
        patient_id: identifier of the patient.
        patient_name: as the file writes it.
        patient_sex: "M", "F" or "O".
        patient_birth_date: YYYYMMDD.
        patient_position: DICOM's, e.g. "HFS", head first and supine.
        study_id: identifier of the study.
        study_uid: DICOM's StudyInstanceUID.
        study_date: YYYYMMDD.
        study_time: HHMMSS.
        study_description: of the study.
        series_uid: DICOM's SeriesInstanceUID of the measured series.
        series_number: of the measured series.
        series_date: YYYYMMDD.
        series_time: HHMMSS.
        series_description: of the measured series.
        frame_uid: DICOM's FrameOfReferenceUID.
        protocol: name of the measured protocol.
        sequence: name or type of the pulse sequence.
        manufacturer: of the scanner.
        model: of the scanner.
        institution: where the scanner stands.
        field_strength: tesla.
        resonance_frequency: of hydrogen, MHz.
        repetition_time: ms.
        echo_time: of the echo that was read, ms.
        inversion_time: ms.
        flip_angle: degrees.
    """

    patient_id: str | None = None
    patient_name: str | None = None
    patient_sex: str | None = None
    patient_birth_date: str | None = None
    patient_position: str | None = None
    study_id: str | None = None
    study_uid: str | None = None
    study_date: str | None = None
    study_time: str | None = None
    study_description: str | None = None
    series_uid: str | None = None
    series_number: int | None = None
    series_date: str | None = None
    series_time: str | None = None
    series_description: str | None = None
    frame_uid: str | None = None
    protocol: str | None = None
    sequence: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    institution: str | None = None
    field_strength: float | None = None
    resonance_frequency: float | None = None
    repetition_time: float | None = None
    echo_time: float | None = None
    inversion_time: float | None = None
    flip_angle: float | None = None


@dataclass(frozen=True)
class Encoding:
    """What a header states about the measured part of k-space, in the numbers of the file.

    Attributes:
        phase_limits: first and last number of the phase-encoding steps.
        phase_center: number of the step in the middle of k-space.
        num_samples: samples of a readout, with its oversampling.
        center_sample: number of the sample in the middle of k-space.
        acceleration: of the two phase encodings, by parallel imaging.
        calibration_mode: ISMRMRD's, e.g. "embedded" or "separate".
    """

    phase_limits: tuple[int, int] | None = None
    phase_center: int | None = None
    num_samples: int | None = None
    center_sample: int | None = None
    acceleration: tuple[float, float] | None = None
    calibration_mode: str | None = None


@dataclass(frozen=True)
class Scan:
    """One multi-coil Cartesian scan.

    All arrays are on one grid: H is the readout direction and W the phase-encoding one. Where the
    phase encoding runs along the rows of the file, the reader has swapped the two axes in all of
    them, in `spacing` and in `affine`; `in_file_axes` turns an image back.

    Attributes:
        kspace: complex64 `[slices, coils, H, W]`, origin at `[H // 2, W // 2]`. Of a 3D scan
            `[partitions, coils, H, W]`, origin at partition `partitions // 2`. Readers return 2D
            k-space above `slice_array.IN_MEMORY` as a `SliceArray`, all other as an array.
        mask: bool `[W]`, `[H, W]` or, where slices differ, `[slices, 1, W]` or `[slices, H, W]`,
            that came with the file, or None.
        target: float32 `[slices, h, w]` magnitude, h <= H, w <= W, or None. It is on the scale of
            the root sum of squares of the k-space's own images.
        name: of the scan.
        spacing: of slices, rows, columns in mm, where known.
        header: the ISMRMRD header as text, where there is one.
        affine: float64 `[4, 4]`, index (slice, row, column) of the `[slices, H, W]` image to
            mm to the patient's right, front and top (RAS+). None where the orientation is unknown:
            nothing may then be claimed about left and right.
        noise: complex64 `[coils, samples]`, readouts without a signal, or None.
        noise_covariance: complex128 `[coils, coils]`, given by the file, or None.
        calibration: complex64 `[slices, coils, h, w]`, lines of a separate reference scan of the
            same field of view, origin at `[h // 2, w // 2]`, zero where not measured, or None. Its
            contrast may differ from the image's, so no line of it belongs into `kspace`.
        remarks: findings of the reader that a user must know, a sentence each.
        volume_encoding: "3D" where the first axis of `kspace` is a second phase encoding.
        phase_encode: along what the phase encoding runs in the file.
        study: patient, study and sequence.
        encoding: the measured part of k-space, as the header states it.
    """

    kspace: Kspace
    mask: np.ndarray | None
    target: np.ndarray | None
    name: str
    spacing: Spacing | None = None
    header: str | None = None
    affine: np.ndarray | None = None
    noise: np.ndarray | None = None
    noise_covariance: np.ndarray | None = None
    calibration: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    volume_encoding: Literal["2D", "3D"] = "2D"
    phase_encode: Literal["columns", "rows"] = "columns"
    study: Study = Study()
    encoding: Encoding = Encoding()


def in_file_axes(
    volume: np.ndarray, scan: Scan
) -> tuple[np.ndarray, Spacing | None, np.ndarray | None]:
    """An image of a scan in the axes of the file that the scan came from.

    Every writer calls it, so that rows and columns of an output are those of the input.

    Args:
        volume: `[slices, H, W]` on the grid of the scan's image, or a part of it.
        scan: what it is an image of.

    Returns:
        The volume, its spacing and its affine (see `Scan`), with rows and columns swapped where
        the phase encoding runs along the rows of the file.
    """
    spacing, affine = scan.spacing, scan.affine
    if scan.phase_encode == "columns":
        return volume, spacing, affine
    if spacing is not None:
        spacing = (spacing[0], spacing[2], spacing[1])
    if affine is not None:
        affine = affine[:, [0, 2, 1, 3]]
    return volume.swapaxes(-2, -1), spacing, affine


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Readers refuse larger arrays and unpacked files in the block, in this thread.

    Args:
        size: bytes.
    """
    token = MAX_BYTES.set(size)
    try:
        yield
    finally:
        MAX_BYTES.reset(token)


def check_size(path: Path, shape: tuple[int, ...], item_bytes: int, in_memory: bool = True) -> None:
    """Refuses a `[slices, coils, H, W]` that cannot be a scan, before any of it is read."""
    slices, coils, height, width = shape
    if not (1 <= slices <= MAX_SLICES and 1 <= coils <= MAX_COILS):
        raise InputError(
            f"{path} claims {slices} slices of {coils} coils; possible are 1 to {MAX_SLICES} and "
            f"1 to {MAX_COILS}"
        )
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise InputError(
            f"{path} claims slices of {height} x {width}; possible are {MIN_SIDE} to {MAX_SIDE} "
            "along each side"
        )
    check_bytes(path, shape, item_bytes, in_memory)


def check_bytes(
    path: Path, shape: tuple[int, ...], item_bytes: int, in_memory: bool = True
) -> None:
    """Refuses an array that is larger than what is read of any file, or than the memory."""
    size = math.prod(shape) * item_bytes
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(MAX_BYTES.get(), memory) if in_memory else MAX_BYTES.get()
    if size > most:
        raise InputError(
            f"{path} claims {size / 2**30:.3g} GiB of data; at most {most / 2**30:.3g} GiB are read"
        )


def check_stored(path: Path, claimed: int, compressed: bool) -> None:
    """Refuses a file too small to hold the `claimed` bytes of its header."""
    stored = path.stat().st_size
    if claimed > stored * (MAX_COMPRESSION if compressed else 1):
        raise InputError(
            f"{path} claims {claimed} bytes of data and cannot hold them in its {stored}; it seems "
            "damaged or cut off"
        )


def checked_kspace(path: Path, kspace: K, name: str = "k-space") -> K:
    """The same k-space, if all of it is finite and any of it is not zero. It is looked at part by
    part along its first axis."""
    largest = 0.0
    for part in kspace:
        if not np.isfinite(part).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values")
        largest = max(largest, *(float(np.abs(axis(part)).max()) for axis in (np.real, np.imag)))
    if largest == 0:
        raise InputError(f"{path}: {name} is zero everywhere")
    if largest > LARGEST:
        raise InputError(
            f"{path}: {name} reaches {largest:.0e}, whose square is beyond float32; scale it down"
        )
    return kspace
