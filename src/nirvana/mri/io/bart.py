"""BART's pairs of files: `NAME.hdr`, text with 16 dimensions, and `NAME.cfl`, the numbers.

The numbers are little-endian complex64, the first dimension the fastest (Fortran's order).
"""

from itertools import pairwise
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.scan import Scan, check_size, checked_kspace, existing

SUFFIXES = (".cfl", ".hdr")
COIL, SLICE = 3, 13
NAMES = {4: "sensitivity maps", 5: "echoes", 10: "time frames", 14: "averages"}
MAX_HEADER = 2**16


def read_bart(path: Path) -> Scan:
    """Reads k-space from a pair of files, either of which may be named.

    Two of the first three dimensions (readout and the phase-encoding ones) are H and W, in this
    order; dimension 3 is coils, dimension 13 slices. All others must be 1.

    Raises:
        InputError: one of the two is missing, or they are no such scan.
    """
    header, data = existing(path.with_suffix(".hdr")), existing(path.with_suffix(".cfl"))
    dims = _dimensions(header)
    spatial = [size for size in dims[:3] if size > 1]
    if len(spatial) != 2:
        raise InputError(
            f"{header}: its first three dimensions are {dims[:3]}; two of them must be above 1 "
            "(three are a 3D scan: transform one of them first)"
        )
    for number, size in enumerate(dims):
        if number > COIL and number != SLICE and size != 1:
            meaning = NAMES.get(number, "values")
            raise InputError(f"{header}: dimension {number} has {size} {meaning}; it must be 1")
    shape = (dims[SLICE], dims[COIL], *spatial)
    check_size(header, shape, 8)
    expected, found = 8 * int(np.prod(shape, dtype=object)), data.stat().st_size
    if found != expected:
        raise InputError(f"{data} has {found} bytes; its header requires {expected}")
    try:
        values = read_cfl(data, shape)
    except (OSError, ValueError) as error:
        raise InputError(f"{data} cannot be read: {error}") from error
    kspace = np.ascontiguousarray(values, dtype=np.complex64)
    return Scan(checked_kspace(data, kspace), mask=None, target=None, name=data.stem)


def read_cfl(data: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a `.cfl` as complex64 `[..., H, W]`, of this shape."""
    *others, height, width = shape
    # The last of the dimensions that vary is the first one here.
    return np.fromfile(data, dtype="<c8").reshape(*others, width, height).swapaxes(-1, -2)


def write_cfl(data: Path, values: np.ndarray) -> None:
    """A `.cfl` and its `.hdr` of `[coils, H, W]`, in BART's order H, W, 1, coils."""
    coils, height, width = values.shape
    header = f"# Dimensions\n{height} {width} 1 {coils}\n"
    data.with_suffix(".hdr").write_text(header, encoding="ascii")
    np.ascontiguousarray(values.swapaxes(1, 2), dtype="<c8").tofile(data)


def _dimensions(header: Path) -> list[int]:
    """All 16 dimensions; those that the file leaves out are 1."""
    try:
        with open(header, "rb") as handle:
            lines = handle.read(MAX_HEADER).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{header} is no header of BART's: {error}") from error
    titled = (after for before, after in pairwise(lines) if before.strip() == "# Dimensions")
    words = next(titled, "").split()
    if not words or len(words) > 16 or not all(w.isdecimal() and len(w) < 16 for w in words):
        raise InputError(
            f"{header} is no header of BART's; after a line '# Dimensions' it must give up to 16 "
            "whole numbers"
        )
    return [int(word) for word in words] + [1] * (16 - len(words))
