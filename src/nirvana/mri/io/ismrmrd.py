"""ISMRMRD's HDF5: a group with `xml`, the header, and `data`, one record per measured line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.geometry import LPS_TO_RAS, is_affine, spacing_of
from nirvana.mri.io.hdf5 import dataset, text
from nirvana.mri.io.header import Header, parse_header
from nirvana.mri.io.scan import Scan, Spacing, check_size, checked_kspace

MAX_LINES = 2**22
LINES_AT_ONCE = 256
# Bits of a record's flags that mark lines outside of the image's k-space.
ASIDE = sum(1 << bit for bit in (18, 22, 23, 25, 26, 27, 28, 29, 30))
CALIBRATION, CALIBRATION_AND_IMAGING, REVERSED = 1 << 19, 1 << 20, 1 << 21
COUNTERS = ("contrast", "phase", "repetition", "set")
HEAD_FIELDS = {
    "flags": "u",
    "number_of_samples": "u",
    "active_channels": "u",
    "discard_pre": "u",
    "discard_post": "u",
    "center_sample": "u",
    "position": "f",
    "read_dir": "f",
    "phase_dir": "f",
    "slice_dir": "f",
}
INDEX_FIELDS = ("kspace_encode_step_1", "kspace_encode_step_2", "slice", *COUNTERS)


def group_of(file: Any) -> Any:
    """The first group that holds `data` and `xml`; None where there is none."""
    import h5py

    for key in file:
        link = file.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            continue
        group = file[key]
        if isinstance(group, h5py.Group) and {"data", "xml"} <= set(group):
            return group
    return None


@dataclass(frozen=True)
class _Lines:
    """The lines of the image, in the order of the file.

    Attributes:
        number: int `[N]`, of the record in the file, ascending.
        slice: int `[N]`, index of the slice.
        column: int `[N]`, index of the column of k-space.
        heads: `[N]`, the field `head` of the records.
    """

    number: np.ndarray
    slice: np.ndarray
    column: np.ndarray
    heads: np.ndarray

    def where(self, chosen: np.ndarray) -> "_Lines":
        return _Lines(
            self.number[chosen], self.slice[chosen], self.column[chosen], self.heads[chosen]
        )


def scan_of(group: Any, path: Path) -> Scan:
    """The scan in an ISMRMRD group: 2D, Cartesian, multi-slice.

    Repeated lines are averaged. Of several contrasts, phases, repetitions or sets the first is
    read. Lines measured for calibration only are used in columns without other lines. The readout's
    oversampling is removed, so H is the header's reconstructed matrix where that is smaller; W is
    the encoded matrix. Slices are in the order of their positions where the records contain these.

    Raises:
        InputError: its contents are no such scan.
    """
    header, xml = _header(group, path)
    data = dataset(group, "data", path)
    heads = _heads(data, path)
    lines = _imaging(heads, header, path)
    coils = int(lines.heads["active_channels"][0])
    if (lines.heads["active_channels"] != coils).any():
        raise InputError(f"{path}: its lines have different numbers of coils; they must agree")
    slices = int(lines.slice.max()) + 1
    length, columns = header.encoded.matrix[:2]
    check_size(path, (slices, coils, length, columns), 8)
    kspace = _filled(data, lines, (slices, coils, length, columns), path)
    kspace = _without_oversampling(kspace, header)
    affine = _affine(lines, header, kspace.shape)
    rows, column, thickness = header.encoded.voxel
    spacing: Spacing = (thickness, rows, column) if affine is None else spacing_of(affine)
    return Scan(
        kspace=checked_kspace(path, kspace, "its k-space"),
        mask=None,
        target=None,
        name=path.stem,
        spacing=spacing,
        header=xml,
        affine=affine,
    )


def _header(group: Any, path: Path) -> tuple[Header, str]:
    xml = text(group, "xml", path) or ""
    try:
        header = parse_header(xml)
    except ValueError as error:
        raise InputError(f"{path}: its ISMRMRD header cannot be used: {error}") from error
    if header.trajectory != "cartesian":
        raise InputError(
            f"{path}: its trajectory is '{header.trajectory}'; only cartesian ones can be used"
        )
    if header.encoded.matrix[2] != 1:
        raise InputError(
            f"{path} is a 3D scan ({header.encoded.matrix[2]} partitions); it must be 2D"
        )
    return header, xml


def _heads(data: Any, path: Path) -> np.ndarray:
    """The field `head` of all records, `[lines]`; every field that is used is checked."""
    names = data.dtype.names or ()
    head = data.dtype["head"].names or () if "head" in names else ()
    index = data.dtype["head"]["idx"].names or () if "idx" in head else ()
    missing = [name for name in HEAD_FIELDS if name not in head]
    missing += [f"idx.{name}" for name in INDEX_FIELDS if name not in index]
    if missing or "data" not in names or data.ndim != 1:
        raise InputError(
            f"{path}: 'data' is no list of ISMRMRD's acquisitions"
            + (f"; its head lacks {missing[0]}" if missing else "")
        )
    for name, kind in HEAD_FIELDS.items():
        if data.dtype["head"][name].base.kind != kind:
            raise InputError(f"{path}: '{name}' of its acquisitions is no number as ISMRMRD's are")
    if not 1 <= len(data) <= MAX_LINES:
        raise InputError(f"{path} claims {len(data)} lines; possible are 1 to {MAX_LINES}")
    return data.fields("head")[()]


def _imaging(heads: np.ndarray, header: Header, path: Path) -> _Lines:
    index, flags = heads["idx"], heads["flags"].astype(np.uint64)
    keep = (flags & np.uint64(ASIDE)) == 0
    for counter in COUNTERS:
        if keep.any():
            keep &= index[counter] == index[counter][keep].min()
    if not keep.any():
        raise InputError(f"{path} holds no line of an image, only noise or navigators")
    if (flags[keep] & np.uint64(REVERSED)).any():
        raise InputError(
            f"{path} holds lines read backwards (echo-planar); they need a phase correction first"
        )
    if index["kspace_encode_step_2"][keep].any():
        raise InputError(f"{path} encodes a second phase direction; it must be 2D")
    columns = header.encoded.matrix[1]
    center = columns // 2 if header.center is None else header.center
    place = index["kspace_encode_step_1"].astype(np.int64) - center + columns // 2
    outside = keep & ((place < 0) | (place >= columns))
    if outside.any():
        raise InputError(
            f"{path}: line {int(np.flatnonzero(outside)[0])} lies outside its encoded matrix of "
            f"{columns} columns"
        )
    number = np.flatnonzero(keep)
    return _Lines(number, _slice_places(index, heads, keep), place[keep], heads[keep])


def _slice_places(index: np.ndarray, heads: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Index of each line's slice, int `[N]`: by position along the normal, or by the slice's number
    where positions are missing.

    Slices are often measured and numbered in another order than that of their positions.
    """
    numbers, first, place = np.unique(index["slice"][keep], return_index=True, return_inverse=True)
    along = _depth(heads[keep][first])
    if len(numbers) == 1 or not np.isfinite(along).all() or len(np.unique(along)) < len(along):
        return place
    # The end with the lowest number remains the first.
    order = np.argsort(along if along[-1] > along[0] else -along, kind="stable")
    return np.argsort(order)[place]


def _depth(heads: np.ndarray) -> np.ndarray:
    """Position along the first slice's normal, mm, `[N]`."""
    return heads["position"].astype(np.float64) @ heads["slice_dir"][0].astype(np.float64)


def _filled(data: Any, lines: _Lines, shape: tuple[int, ...], path: Path) -> np.ndarray:
    """The k-space, complex64 `[slices, coils, H, W]`, zero where nothing was measured."""
    kspace = np.zeros(shape, np.complex64)
    flags = lines.heads["flags"].astype(np.uint64)
    calibration = (flags & np.uint64(CALIBRATION | CALIBRATION_AND_IMAGING)) == CALIBRATION
    count = np.zeros((shape[0], shape[3]), np.int64)
    np.add.at(count, (lines.slice[~calibration], lines.column[~calibration]), 1)
    used = lines.where(~calibration | (count[lines.slice, lines.column] == 0))
    times = np.zeros_like(count)
    np.add.at(times, (used.slice, used.column), 1)
    for start in range(0, len(used.number), LINES_AT_ONCE):
        numbers = used.number[start : start + LINES_AT_ONCE]
        first = int(numbers[0])
        block = data.fields("data")[first : int(numbers[-1]) + 1] if _dense(numbers) else None
        for i, number in enumerate(numbers, start):
            raw = data.fields("data")[int(number)] if block is None else block[number - first]
            place = (used.slice[i], slice(None), slice(None), used.column[i])
            kspace[place] += _line(raw, used.heads[i], int(number), shape, path)
    kspace /= np.maximum(times, 1)[:, None, None, :]
    return kspace


def _dense(numbers: np.ndarray) -> bool:
    """Whether reading from the first to the last of them reads few other records."""
    return int(numbers[-1] - numbers[0]) < 2 * LINES_AT_ONCE


def _line(
    raw: Any, head: np.ndarray, number: int, shape: tuple[int, ...], path: Path
) -> np.ndarray:
    """One line at its place along the readout, complex64 `[coils, H]`."""
    coils, length, samples = shape[1], shape[2], int(head["number_of_samples"])
    values = np.asarray(raw)
    if values.dtype.kind != "f" or values.size != 2 * coils * samples:
        raise InputError(
            f"{path}: line {number} has {values.size} numbers of {values.dtype}; its head requires "
            f"{2 * coils * samples} real ones"
        )
    line = np.ascontiguousarray(values, dtype=np.float32).view(np.complex64)
    line = line.reshape(coils, samples)
    before, after = int(head["discard_pre"]), samples - int(head["discard_post"])
    begin = length // 2 - int(head["center_sample"]) + before
    if not (before < after and begin >= 0 and begin + after - before <= length):
        raise InputError(
            f"{path}: line {number} of {samples} samples around sample "
            f"{int(head['center_sample'])} does not fit the encoded matrix of {length}"
        )
    placed = np.zeros((coils, length), np.complex64)
    placed[:, begin : begin + after - before] = line[:, before:after]
    return placed


def _without_oversampling(kspace: np.ndarray, header: Header) -> np.ndarray:
    """Crops the image along the oversampled readout to the header's reconstructed field of view."""
    length = kspace.shape[2]
    kept = round(length * header.recon.fov[0] / header.encoded.fov[0])
    if not 8 <= kept < length:
        return kspace
    first = length // 2 - kept // 2
    cut = np.empty((*kspace.shape[:2], kept, kspace.shape[3]), np.complex64)
    for number, part in enumerate(kspace):  # slice by slice: the transform is in double precision
        image = np.fft.fftshift(
            np.fft.ifft(np.fft.ifftshift(part, axes=1), axis=1, norm="ortho"), axes=1
        )[:, first : first + kept]
        cut[number] = np.fft.fftshift(
            np.fft.fft(np.fft.ifftshift(image, axes=1), axis=1, norm="ortho"), axes=1
        )
    # Unmeasured columns must stay exactly zero, because the mask is found by them.
    return cut * kspace.any(axis=2, keepdims=True)


def _affine(lines: _Lines, header: Header, shape: tuple[int, ...]) -> np.ndarray | None:
    """The affine of the volume; None where the records contain none, or the slices are not parallel
    and evenly spaced."""
    slices, _, rows, columns = shape
    places, first = np.unique(lines.slice, return_index=True)
    heads = lines.heads[first]
    positions = heads["position"].astype(np.float64)
    directions = [heads[name].astype(np.float64) for name in ("read_dir", "phase_dir", "slice_dir")]
    if len(places) != slices or any(np.ptp(each, axis=0).max() > 1e-3 for each in directions):
        return None
    read, phase, normal = (each[0] for each in directions)
    row, column, thickness = header.encoded.voxel
    step = normal * thickness
    if slices > 1:
        step = (positions[-1] - positions[0]) / (slices - 1)
        even = positions[0] + np.arange(slices)[:, None] * step
        if np.abs(positions - even).max() > 0.01 * np.linalg.norm(step):
            return None
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = step, read * row, phase * column
    affine[:3, 3] = positions[0] - affine[:3, 1] * (rows // 2) - affine[:3, 2] * (columns // 2)
    affine = LPS_TO_RAS @ affine
    return affine if is_affine(affine) else None
