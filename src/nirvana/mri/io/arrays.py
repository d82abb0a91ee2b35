"""K-space in files of arrays that do not state what their axes mean: HDF5, MATLAB, NumPy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.slice_array import Kspace, SliceArray, is_large
from nirvana.mri.io.arrange import arranged
from nirvana.mri.io.options import ReadOptions, left_out, suffix_of
from nirvana.mri.io.scan import MIN_SIDE, Scan, check_bytes, check_size, checked_kspace

REAL, IMAGINARY = ("real", "r", "re"), ("imag", "i", "im")
KSPACE_NAMES = ("kspace", "kspace_full", "kspace_sub", "ksp", "kdata")
AUXILIARY = ("mask", "noise", "noise_covariance", "calibration")
"""Names of arrays that are no image's k-space."""

AXES_C: dict[int, tuple[str, ...]] = {
    2: ("row", "column"),
    3: ("coil", "row", "column"),
    4: ("slice", "coil", "row", "column"),
    5: ("repetition", "slice", "coil", "row", "column"),
}
"""What axes mean by their number, where the first one is the slowest."""
AXES_FORTRAN = {
    2: ("row", "column"),
    3: ("row", "column", "coil"),
    4: ("row", "column", "coil", "slice"),
    5: ("row", "column", "coil", "slice", "repetition"),
}
"""The same where the first one is the fastest."""


@dataclass(frozen=True)
class Variable:
    """A named array in a file.

    Attributes:
        name: in the file.
        shape: as the file's own program sees it.
        dtype: of the stored numbers.
        read: returns the numbers, of this shape; raises an `InputError` where they cannot be read.
        read_part: takes a slice of every axis and returns the numbers there, whenever it is called;
            None where parts cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_part: Callable[[tuple[slice, ...]], np.ndarray] | None = None


@dataclass(frozen=True)
class ArrayFile:
    """A file of named arrays.

    Attributes:
        path: of the file.
        variables: all of its arrays of numbers.
        order: whether the first axis is the slowest ("C") or the fastest one ("F", MATLAB).
        usual_axes: number of axes -> their meaning, where a format defines it.
    """

    path: Path
    variables: list[Variable]
    order: Literal["C", "F"] = "C"
    usual_axes: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def complex_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...] | None:
    """The shape of an array as complex numbers; None where it holds none.

    These may be complex, compounds of real and imaginary parts, or real numbers whose last or, of
    four axes and more, first axis has these two.
    """
    if dtype.kind == "c" or _parts(dtype) is not None:
        return shape
    if dtype.kind not in "iuf":
        return None
    if len(shape) > 2 and shape[-1] == 2:
        return shape[:-1]
    if len(shape) > 3 and shape[0] == 2:
        return shape[1:]
    return None


def _parts(dtype: np.dtype) -> tuple[str, str] | None:
    """The two fields of a compound of real and imaginary parts."""
    names = dtype.names or ()
    if len(names) != 2 or any(dtype[name].kind not in "iuf" for name in names):
        return None
    real, imaginary = names
    matches = real.lower() in REAL and imaginary.lower() in IMAGINARY
    return (real, imaginary) if matches else None


def to_complex(values: np.ndarray) -> np.ndarray:
    """The complex64 numbers of an array, in any of the forms of `complex_shape`."""
    parts = _parts(values.dtype)
    with np.errstate(over="ignore"):  # infinite values are refused where k-space is checked
        if values.dtype.kind == "c":
            return values.astype(np.complex64)
        if parts is not None:
            real, imaginary = (values[name] for name in parts)
        elif values.shape[-1] == 2:
            real, imaginary = values[..., 0], values[..., 1]
        else:
            real, imaginary = values[0], values[1]
        result = np.empty(real.shape, np.complex64)
        result.real, result.imag = real, imaginary
    return result


def read_arrays(file: ArrayFile, options: ReadOptions, name: str) -> Scan:
    """The scan in a file of named arrays, whose k-space has the origin where the file has it.

    Arrays `mask`, `noise` `[coils, samples]`, `noise_covariance` `[coils, coils]` and `calibration`
    (axes as of k-space) are read where they are there.

    Args:
        file: the file.
        options: see `ReadOptions`.
        name: of the scan.

    Raises:
        InputError: there is no such scan.
    """
    kspace = read_kspace(file, options)
    scan = Scan(kspace.values, None, None, name + suffix_of(options), remarks=kspace.remarks)
    return arranged(kspace.completed(scan), options, file.path, kspace.mask(), None)


@dataclass(frozen=True)
class ArrayKspace:
    """K-space of a file of arrays, and the arrays beside it.

    Attributes:
        values: complex64 `[slices, coils, rows, columns]`, or `[partitions, ...]`.
        axes: meaning of the axes in the file.
        others: the other arrays of the file, by name in lower case.
        path: of the file.
        remarks: how it was read.
    """

    values: Kspace
    axes: tuple[str, ...]
    others: dict[str, Variable]
    path: Path
    remarks: tuple[str, ...]

    def mask(self) -> np.ndarray | None:
        """The mask, bool, with the axes of `arrange.matched_mask`.

        Raises:
            InputError: it is not of numbers, or holds NaN or infinite values.
        """
        found = self.others.get("mask")
        if found is None:
            return None
        if found.dtype.kind not in "biuf":
            raise InputError(
                f"{self.path}: 'mask' is {found.dtype}; it must be numbers or booleans"
            )
        check_bytes(self.path, found.shape, found.dtype.itemsize)
        mask = found.read()
        if not np.isfinite(mask).all():
            raise InputError(f"{self.path}: 'mask' holds NaN or infinite values")
        order = [axis for axis in self.axes if axis not in ("repetition", "coil")]
        if mask.ndim == len(order):
            outer = [axis for axis in ("slice", "partition") if axis in order]
            mask = mask.transpose([order.index(axis) for axis in (*outer, "row", "column")])
        return mask != 0

    def completed(self, scan: Scan) -> Scan:
        """The scan with noise, covariance and calibration, in the axes of the file.

        Raises:
            InputError: one of them does not fit the k-space.
        """
        noise, covariance, calibration = (
            self._complex(name) for name in ("noise", "noise_covariance", "calibration")
        )
        coils = self.values.shape[1]
        if noise is not None and (noise.ndim != 2 or len(noise) != coils):
            raise InputError(
                f"{self.path}: 'noise' has shape {noise.shape}; it must be [{coils}, samples]"
            )
        if covariance is not None and covariance.shape != (coils, coils):
            raise InputError(
                f"{self.path}: 'noise_covariance' has shape {covariance.shape}; it must be "
                f"[{coils}, {coils}]"
            )
        if calibration is not None:
            if calibration.ndim != len(self.axes):
                raise InputError(
                    f"{self.path}: 'calibration' has shape {calibration.shape}; its axes must be "
                    f"those of k-space, {', '.join(self.axes)}"
                )
            calibration = _ordered(calibration, self.axes, 0)
            if calibration.shape[1] != coils or len(calibration) not in (1, len(self.values)):
                raise InputError(
                    f"{self.path}: 'calibration' is of {len(calibration)} slices and "
                    f"{calibration.shape[1]} coils; k-space is of {len(self.values)} and {coils}"
                )
            if "partition" not in self.axes:
                calibration = np.broadcast_to(
                    calibration, (len(self.values), *calibration.shape[1:])
                ).copy()
        return replace(
            scan,
            noise=noise,
            noise_covariance=None if covariance is None else covariance.astype(np.complex128),
            calibration=calibration,
            volume_encoding="3D" if "partition" in self.axes else "2D",
        )

    def _complex(self, name: str) -> np.ndarray | None:
        found = self.others.get(name)
        if found is None:
            return None
        if complex_shape(found.shape, found.dtype) is None:
            raise InputError(f"{self.path}: '{name}' is {found.dtype}; it must be complex")
        check_bytes(self.path, found.shape, found.dtype.itemsize)
        return checked_kspace(self.path, to_complex(found.read()), f"'{name}'")


def read_kspace(file: ArrayFile, options: ReadOptions) -> ArrayKspace:
    """K-space of a file of arrays; see `read_arrays`.

    Raises:
        InputError: there is none.
    """
    chosen = choose_variable(file, options)
    shape, axes = _meaning(chosen, file, options)
    sizes = dict(zip(axes, shape, strict=True))
    for counter in set(options.select) - {"repetition", "slice"}:
        raise InputError(f"{file.path} has no {counter}s; --select {counter} cannot be used")
    outer = sizes.get("slice", 1) * sizes.get("partition", 1)
    full = (outer, sizes.get("coil", 1), sizes["row"], sizes["column"])
    stays = is_large(full) and chosen.read_part is not None and "partition" not in axes
    check_size(file.path, full, 8, in_memory=not stays)
    check_bytes(file.path, shape, 8, in_memory=not stays)
    repetition = options.select.get("repetition", 0)
    _check_selected("repetition", repetition, sizes.get("repetition", 1), file.path)
    _check_selected("slice", options.select.get("slice", 0), sizes.get("slice", 1), file.path)
    if stays:
        values = SliceArray(_slice_reader(chosen, axes, repetition), full)
    else:
        values = np.ascontiguousarray(_ordered(to_complex(chosen.read()), axes, repetition))
    if "slice" in options.select and "slice" in axes:
        values = values[options.select["slice"] :][:1]
    remarks = []
    if options.axes is None and len(shape) not in file.usual_axes:
        remarks.append(f"axes of '{chosen.name}' {shape} are read as {', '.join(axes)} (--axes)")
    if sizes.get("repetition", 1) > 1:
        remarks.append(left_out("repetition", repetition, list(range(sizes["repetition"]))))
    others = {one.name.lower(): one for one in file.variables if one is not chosen}
    kspace = checked_kspace(file.path, values, f"'{chosen.name}'")
    return ArrayKspace(kspace, axes, others, file.path, tuple(remarks))


def _slice_reader(
    variable: Variable, axes: tuple[str, ...], repetition: int
) -> Callable[[int], np.ndarray]:
    """The function that reads one slice, complex64 `[coils, rows, columns]`."""
    read_part = variable.read_part
    assert read_part is not None
    extra = len(variable.shape) - len(axes)  # of real and imaginary parts
    first = (
        extra
        if extra and complex_shape(variable.shape, variable.dtype) == variable.shape[1:]
        else 0
    )

    def read(number: int) -> np.ndarray:
        chosen = {
            "slice": slice(number, number + 1),
            "repetition": slice(repetition, repetition + 1),
        }
        index = [chosen.get(axis, slice(None)) for axis in axes]
        parts = [slice(None)] * extra
        index = [*parts, *index] if first else [*index, *parts]
        values = to_complex(read_part(tuple(index)))
        return np.ascontiguousarray(_ordered(values, axes, 0)[0])

    return read


def array_selections(file: ArrayFile, options: ReadOptions) -> list[dict[str, int]]:
    """A selection for each image in a file that the options leave open."""
    shape, axes = _meaning(choose_variable(file, options), file, options)
    count = dict(zip(axes, shape, strict=True)).get("repetition", 1)
    if count == 1 or "repetition" in options.select:
        return [dict(options.select)]
    return [{**options.select, "repetition": number} for number in range(count)]


def choose_variable(file: ArrayFile, options: ReadOptions) -> Variable:
    """The array that is k-space: the one that the options name, the one of a usual name, or the
    only one whose shape and numbers it could be.

    Raises:
        InputError: there is none, or more than one.
    """
    variables, path = file.variables, file.path
    listed = ", ".join(f"{one.name} {one.shape}" for one in variables[:12]) or "nothing"
    if options.variable is not None:
        named = [one for one in variables if one.name == options.variable]
        if not named:
            raise InputError(f"{path} has no array {options.variable!r}; it holds {listed}")
        return named[0]
    for name in KSPACE_NAMES:
        for one in variables:
            if one.name.lower() == name:
                return one
    possible = [one for one in variables if one.name.lower() not in AUXILIARY and _fits(one)]
    if len(possible) == 1:
        return possible[0]
    if possible:
        raise InputError(f"{path} holds {listed}; choose k-space by --variable NAME")
    raise InputError(
        f"{path} has no array that could be k-space, complex with 2 to 5 axes; it holds {listed}"
    )


def _fits(variable: Variable) -> bool:
    shape = complex_shape(variable.shape, variable.dtype)
    if shape is None or not 2 <= len(shape) <= 5:
        return False
    return sum(size >= MIN_SIDE for size in shape) >= 2


def _meaning(
    chosen: Variable, file: ArrayFile, options: ReadOptions
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Shape of an array as complex numbers, and what each axis is, a word of `options.AXES`.

    Unless the format or the options define the axes, rows and columns are the last two or the first
    two: those of which the smaller one is larger, and those that are usual for the order of the
    file if this does not decide.
    """
    shape = complex_shape(chosen.shape, chosen.dtype)
    if shape is None:
        raise InputError(f"{file.path}: '{chosen.name}' is {chosen.dtype}; it must be complex")
    if options.axes is not None:
        if len(options.axes) != len(shape):
            raise InputError(
                f"{file.path}: --axes names {len(options.axes)} axes, and '{chosen.name}' has "
                f"shape {shape}"
            )
        return shape, options.axes
    if len(shape) in file.usual_axes:
        return shape, file.usual_axes[len(shape)]
    if len(shape) not in AXES_C:
        raise InputError(
            f"{file.path}: '{chosen.name}' has shape {shape}; name its axes by --axes, at most one "
            "each of repetition, slice, partition, coil, row and column"
        )
    last, first = min(shape[-2:]), min(shape[:2])
    trailing = last > first if last != first else file.order == "C"
    return shape, (AXES_C if trailing else AXES_FORTRAN)[len(shape)]


def _ordered(values: np.ndarray, axes: tuple[str, ...], repetition: int) -> np.ndarray:
    """`[slices or partitions, coils, rows, columns]` of an array with these axes."""
    if "repetition" in axes:
        axis = axes.index("repetition")
        values = values.take(min(repetition, values.shape[axis] - 1), axis=axis)
        axes = axes[:axis] + axes[axis + 1 :]
    order = [axis for axis in ("slice", "partition", "coil", "row", "column") if axis in axes]
    values = values.transpose([axes.index(axis) for axis in order])
    if "coil" not in axes:
        values = np.expand_dims(values, -3)
    return values if values.ndim == 4 else values[None]


def _check_selected(counter: str, chosen: int, count: int, path: Path) -> None:
    if chosen >= count:
        raise InputError(
            f"{path} has no {counter} {chosen}; --select {counter} may be 0 to {count - 1}"
        )
