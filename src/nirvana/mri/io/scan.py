"""The scan that readers return, and the checks that every reader makes before it reads."""

import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nirvana.errors import InputError

Spacing = tuple[float, float, float]

MIN_SIDE, MAX_SIDE = 8, 8192
MAX_COILS, MAX_SLICES = 1024, 8192
MAX_BYTES = 64 * 2**30
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
class Scan:
    """One multi-coil Cartesian scan.

    Attributes:
        kspace: complex64 `[slices, coils, H, W]`, W the phase-encoding direction.
        mask: bool `[W]` that came with the file, or None.
        target: float32 `[slices, h, w]` magnitude (root sum of squares), h <= H, w <= W, or None.
        name: of the scan.
        spacing: of slices, rows, columns in mm, where known.
        header: the ISMRMRD header as text, where there is one.
        affine: float64 `[4, 4]`, index (slice, row, column) of the `[slices, H, W]` image to
            mm to the patient's right, front and top (RAS+), where known.
    """

    kspace: np.ndarray
    mask: np.ndarray | None
    target: np.ndarray | None
    name: str
    spacing: Spacing | None = None
    header: str | None = None
    affine: np.ndarray | None = None


def existing(path: str | Path) -> Path:
    """The path of a file.

    Raises:
        InputError: it is missing, no file, or a link that leads nowhere or in a circle.
    """
    path = Path(path)
    try:
        found, file = path.exists(), path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened: {error}") from error
    if not found and path.is_symlink():
        raise InputError(f"{path} is a link that leads nowhere or in a circle; give a file")
    if not found:
        raise InputError(f"{path} does not exist")
    if not file:
        raise InputError(f"{path} is not a file")
    return path


def check_size(path: Path, shape: tuple[int, ...], item_bytes: int) -> None:
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
    size = slices * coils * height * width * item_bytes
    most = min(MAX_BYTES, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if size > most:
        raise InputError(
            f"{path} claims {size / 2**30:.0f} GiB of data; at most {most / 2**30:.0f} GiB are read"
        )


def check_stored(path: Path, claimed: int, compressed: bool) -> None:
    """Refuses a file too small to hold the `claimed` bytes of its header."""
    stored = path.stat().st_size
    if claimed > stored * (MAX_COMPRESSION if compressed else 1):
        raise InputError(
            f"{path} claims {claimed} bytes of data and cannot hold them in its {stored}; it seems "
            "damaged or cut off"
        )


def checked_kspace(path: Path, kspace: np.ndarray, name: str = "k-space") -> np.ndarray:
    """The same k-space, if all of it is finite and any of it is not zero."""
    if not np.isfinite(kspace).all():
        raise InputError(f"{path}: {name} holds NaN or infinite values")
    if not kspace.any():
        raise InputError(f"{path}: {name} is zero everywhere")
    largest = max(float(np.abs(part(kspace)).max()) for part in (np.real, np.imag))
    if largest > LARGEST:
        raise InputError(
            f"{path}: {name} reaches {largest:.0e}, whose square is beyond float32; scale it down"
        )
    return kspace
