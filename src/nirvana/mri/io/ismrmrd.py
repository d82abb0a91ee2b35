"""ISMRMRD's HDF5: groups with `xml`, the header, and `data`, one record per measured line."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.assemble import scan_of_lines
from nirvana.mri.io.hdf5 import dataset, open_hdf5, text
from nirvana.mri.io.header import Header, parse_header
from nirvana.mri.io.lines import (
    ASIDE,
    CALIBRATION,
    HEAD,
    IMAGE,
    NAVIGATOR,
    NOISE,
    RawLines,
    check_number,
    selections,
)
from nirvana.mri.io.measurements import RawMeasurement, chosen_measurement
from nirvana.mri.io.options import ReadOptions
from nirvana.mri.io.scan import Scan

LINES_AT_ONCE = 256
# Bits of a record's flags; the first ones mark lines outside of the image's k-space.
ASIDE_BITS = sum(1 << bit for bit in (18, 22, 23, 25, 26, 27, 28, 29, 30))
NOISE_BIT, NAVIGATOR_BIT, REVERSED_BIT = 1 << 18, 1 << 23, 1 << 21
CALIBRATION_BIT, CALIBRATION_AND_IMAGING_BIT = 1 << 19, 1 << 20
# Names in a record's head and in HEAD, and the kind of number that they are.
HEAD_FIELDS = {
    "number_of_samples": ("samples", "u"),
    "active_channels": ("coils", "u"),
    "discard_pre": ("discard_pre", "u"),
    "discard_post": ("discard_post", "u"),
    "center_sample": ("center", "u"),
    "encoding_space_ref": ("encoding", "u"),
    "position": ("position", "f"),
    "read_dir": ("read_dir", "f"),
    "phase_dir": ("phase_dir", "f"),
    "slice_dir": ("slice_dir", "f"),
}
INDEX_FIELDS = {
    "kspace_encode_step_1": "step_1",
    "kspace_encode_step_2": "step_2",
    **{name: name for name in ("slice", "contrast", "phase", "repetition", "set", "average")},
}


def groups_of(file: Any) -> dict[str, Any]:
    """The groups that hold `data` and `xml`, by name."""
    import h5py

    found = {}
    for key in file:
        if isinstance(file.get(key, getlink=True), h5py.HardLink):
            group = file[key]
            if isinstance(group, h5py.Group) and {"data", "xml"} <= set(group):
                found[key] = group
    return found


def read_ismrmrd(groups: dict[str, Any], path: Path, options: ReadOptions) -> Scan:
    """The scan in one of the ISMRMRD groups of a file; see `assemble.scan_of_lines`.

    Where the measurement itself has no noise lines, those of another one in the file are used.

    Raises:
        InputError: its contents are no such scan.
    """
    measurement, remarks = _measurement(groups, path, options)
    header, xml = _header(groups[measurement.name], path)
    vendor = (header.study.manufacturer or "").upper()
    scan = scan_of_lines(
        *(measurement.lines, header.encodings, options, path, header.study, xml),
        is_siemens=vendor.startswith("SIEMENS"),
    )
    contrast = options.select.get("contrast", 0)
    if contrast < len(header.echo_times):
        study = replace(scan.study, echo_time=header.echo_times[contrast])
        scan = replace(scan, study=study)
    return replace(scan, remarks=(*remarks, *scan.remarks))


def selections_in(groups: dict[str, Any], path: Path, options: ReadOptions) -> list[dict[str, int]]:
    """The selections of all images in the chosen measurement; see `lines.selections`."""
    measurement, _ = _measurement(groups, path, options)
    return selections(measurement.lines.heads, options, path)


def _measurement(
    groups: dict[str, Any], path: Path, options: ReadOptions
) -> tuple[RawMeasurement, tuple[str, ...]]:
    found = [RawMeasurement(name, _lines(group, path)) for name, group in groups.items()]
    return chosen_measurement(found, options, path)


def _header(group: Any, path: Path) -> tuple[Header, str]:
    xml = text(group, "xml", path) or ""
    try:
        return parse_header(xml), xml
    except ValueError as error:
        raise InputError(f"{path}: its ISMRMRD header cannot be used: {error}") from error


def _lines(group: Any, path: Path) -> RawLines:
    data = dataset(group, "data", path)
    found = _heads(data, path)
    heads = np.zeros(len(found), HEAD)
    heads["number"] = np.arange(len(found))
    for name, (own, _) in HEAD_FIELDS.items():
        heads[own] = found[name]
    for name, own in INDEX_FIELDS.items():
        heads[own] = found["idx"][name]
    flags = found["flags"].astype(np.uint64)

    def flagged(bits: int) -> np.ndarray:
        return (flags & np.uint64(bits)) != 0

    only_calibration = flagged(CALIBRATION_BIT) & ~flagged(CALIBRATION_AND_IMAGING_BIT)
    heads["kind"] = np.where(only_calibration, CALIBRATION, IMAGE)
    heads["kind"][flagged(ASIDE_BITS)] = ASIDE
    heads["kind"][flagged(NAVIGATOR_BIT) & ~flagged(ASIDE_BITS & ~NAVIGATOR_BIT)] = NAVIGATOR
    heads["kind"][flagged(NOISE_BIT)] = NOISE
    heads["reversed"] = flagged(REVERSED_BIT)
    place = group.name
    return RawLines(heads, lambda chosen: _read(path, place, chosen))


def _heads(data: Any, path: Path) -> np.ndarray:
    """The field `head` of all records, `[lines]`; every field that is used is checked."""
    names = data.dtype.names or ()
    head = data.dtype["head"].names or () if "head" in names else ()
    index = data.dtype["head"]["idx"].names or () if "idx" in head else ()
    missing = [name for name in ("flags", *HEAD_FIELDS) if name not in head]
    missing += [f"idx.{name}" for name in INDEX_FIELDS if name not in index]
    if missing or "data" not in names or data.ndim != 1:
        raise InputError(
            f"{path}: 'data' is no list of ISMRMRD's acquisitions"
            + (f"; its head lacks {missing[0]}" if missing else "")
        )
    kinds = {"flags": "u", **{name: kind for name, (_, kind) in HEAD_FIELDS.items()}}
    for name, kind in kinds.items():
        if data.dtype["head"][name].base.kind != kind:
            raise InputError(f"{path}: '{name}' of its acquisitions is no number as ISMRMRD's are")
    check_number(path, len(data))
    return data.fields("head")[()]


def _read(path: Path, group: str, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """The samples of records, complex64 `[coils, samples]` each, read in blocks. The file is opened
    for it: slices of a large scan are read when they are used."""
    with open_hdf5(path) as file:
        data = file[group]["data"]
        for start in range(0, len(chosen), LINES_AT_ONCE):
            part = chosen[start : start + LINES_AT_ONCE]
            first, last = int(part["number"][0]), int(part["number"][-1])
            # Unless reading from the first to the last of them would read many others.
            dense = last - first < 2 * LINES_AT_ONCE
            block = data.fields("data")[first : last + 1] if dense else None
            for head in part:
                number = int(head["number"])
                raw = data.fields("data")[number] if block is None else block[number - first]
                yield _samples(raw, head, path)


def _samples(raw: Any, head: np.ndarray, path: Path) -> np.ndarray:
    values = np.asarray(raw)
    coils, samples = int(head["coils"]), int(head["samples"])
    if values.dtype.kind != "f" or values.size != 2 * coils * samples:
        raise InputError(
            f"{path}: line {int(head['number'])} has {values.size} numbers of {values.dtype}; its "
            f"head requires {2 * coils * samples} real ones"
        )
    line = np.ascontiguousarray(values, dtype=np.float32).view(np.complex64)
    return line.reshape(coils, samples)
