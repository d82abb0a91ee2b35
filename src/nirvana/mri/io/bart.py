"""BART's pairs of files: `NAME.hdr`, text with 16 dimensions, and `NAME.cfl`, the numbers.

The numbers are little-endian complex64, the first dimension the fastest (Fortran's order).
"""

import math
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.files import existing_file
from nirvana.mri.data.slice_array import SliceArray, is_large
from nirvana.mri.io.arrange import arranged
from nirvana.mri.io.options import ReadOptions, left_out, suffix_of
from nirvana.mri.io.scan import Scan, check_size, checked_kspace

SUFFIXES = (".cfl", ".hdr")
COIL, SLICE = 3, 13
# Other dimensions that may be above 1, by the counters that choose one of their numbers.
COUNTERS = {"contrast": 5, "phase": 10, "set": 11, "repetition": 12, "average": 14}
NAMES = {4: "sensitivity maps", 6: "coefficients", 7: "coefficients", 8: "coefficients"}
MAX_HEADER = 2**16
MAX_IMAGES = 2**16


def read_bart(path: Path, options: ReadOptions) -> Scan:
    """Reads k-space from a pair of files, either of which may be named.

    Two of the first three dimensions (readout and the phase-encoding ones) are H and W, in this
    order; if all three are above 1, the third one is a second phase encoding. Dimension 3 is
    coils, 13 slices, and of 5 (echoes), 10 (time), 11, 12 and 14 (averages) one number is read. All
    others must be 1.

    Raises:
        InputError: one of the two is missing, or they are no such scan.
    """
    header, data = existing_file(path.with_suffix(".hdr")), existing_file(path.with_suffix(".cfl"))
    dims = _dimensions(header)
    counters, remarks = _selected(dims, options, header)
    spatial = [size for size in dims[:3] if size > 1]
    is_3d = len(spatial) == 3
    if len(spatial) < 2 or (is_3d and dims[SLICE] > 1):
        raise InputError(
            f"{header}: its first three dimensions are {dims[:3]}, its slices {dims[SLICE]}; "
            "two of the three must be above 1, or all three with one slice"
        )
    shape = (dims[2] if is_3d else dims[SLICE], dims[COIL], *spatial[:2])
    stays = is_large(shape) and not is_3d
    check_size(header, shape, 8, in_memory=not stays)
    expected, found = 8 * math.prod(dims), data.stat().st_size
    if found != expected:
        raise InputError(f"{data} has {found} bytes; its header requires {expected}")

    def read(slices: slice) -> np.ndarray:
        """Complex64 `[slices, coils, H, W]`, or `[dimension 2, coils, H, W]`."""
        chosen = {**counters, SLICE: slices}
        # The dimensions of the file in reverse, since its first one is the fastest.
        index = tuple(chosen.get(n, 0) for n in range(15, COIL, -1))
        try:
            values = np.memmap(data, "<c8", "r", shape=tuple(dims[::-1]))[index]
        except (OSError, ValueError) as error:
            raise InputError(f"{data} cannot be read: {error}") from error
        # [slices, coils, dimension 2, 1, 0], of which in 2D one is 1.
        values = (
            values[0].transpose(1, 0, 3, 2)
            if is_3d
            else values.reshape(*values.shape[:2], *spatial[::-1]).swapaxes(2, 3)
        )
        return np.array(values, dtype=np.complex64, order="C")

    kspace = (
        read(slice(None)) if not stays else SliceArray(lambda n: read(slice(n, n + 1))[0], shape)
    )
    scan = Scan(
        kspace=checked_kspace(data, kspace),
        mask=None,
        target=None,
        name=data.stem + suffix_of(options),
        remarks=remarks,
        volume_encoding="3D" if is_3d else "2D",
    )
    return arranged(scan, options, data, None, None)


def bart_selections(path: Path, options: ReadOptions) -> list[dict[str, int]]:
    """A selection for each image in a file that the options leave open."""
    dims = _dimensions(existing_file(path.with_suffix(".hdr")))
    several = [
        (name, range(dims[number]))
        for name, number in COUNTERS.items()
        if dims[number] > 1 and name not in options.select
    ]
    names = [name for name, _ in several]
    if math.prod(len(numbers) for _, numbers in several) > MAX_IMAGES:
        raise InputError(f"{path} holds more than {MAX_IMAGES} images; choose some by --select")
    return [
        {**options.select, **dict(zip(names, numbers, strict=True))}
        for numbers in product(*(numbers for _, numbers in several))
    ]


def _selected(
    dims: list[int], options: ReadOptions, header: Path
) -> tuple[dict[int, int], tuple[str, ...]]:
    """Dimension -> the number of it that is read, and remarks about what is left out."""
    unknown = set(options.select) - {"slice", *COUNTERS}
    if unknown:
        raise InputError(f"{header} has no {min(unknown)}s; --select cannot choose one")
    for number, size in enumerate(dims):
        if number > COIL and number not in (SLICE, *COUNTERS.values()) and size != 1:
            meaning = NAMES.get(number, "values")
            raise InputError(f"{header}: dimension {number} has {size} {meaning}; it must be 1")
    chosen, remarks = {}, []
    for name, number in COUNTERS.items():
        chosen[number] = options.select.get(name, 0)
        if chosen[number] >= max(dims[number], 1):
            raise InputError(f"{header}: --select {name} may be 0 to {dims[number] - 1}")
        if dims[number] > 1:
            remarks.append(left_out(name, chosen[number], list(range(dims[number]))))
    return chosen, tuple(remarks)


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


def write_bart(data: Path, volume: np.ndarray) -> None:
    """Writes an image volume as a `.cfl` and its `.hdr`, slice by slice.

    Args:
        data: the `.cfl`.
        volume: real or complex `[slices, H, W]`; dimensions 0, 1 and 13 of the file are H, W and
            the slices.
    """
    slices, height, width = volume.shape
    dims = [height, width, *[1] * 11, slices, 1, 1]
    header = f"# Dimensions\n{' '.join(map(str, dims))}\n"
    data.with_suffix(".hdr").write_text(header, encoding="ascii")
    with open(data, "wb") as file:
        for picture in volume:
            file.write(np.ascontiguousarray(picture.T, dtype="<c8").tobytes())


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
