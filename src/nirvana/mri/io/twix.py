"""Siemens raw data (twix, `.dat`) of VB and of VD, VE and XA, through twixtools.

twixtools trusts a file: a length of zero would make it loop for ever, a large one allocate without
bound. So the chain of blocks is followed here first, and refused where it leaves the file.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.assemble import scan_of_lines
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
from nirvana.mri.io.scan import UNREADABLE, Scan
from nirvana.mri.io.twix_protocol import Protocol, parsed_header, protocol_of

MAX_MEASUREMENTS, RAID_ENTRY, RAID_START = 64, 152, 8
MAX_HEADER = 64 * 2**20
# Bytes of a block's header and of a channel's; VB repeats the former for every channel.
VB_BLOCK, VD_BLOCK, VD_CHANNEL = 128, 192, 32
# Bits of a block's flags.
LAST, SYNCHRONISATION = 1 << 0, 1 << 5
NOISE_BIT, REVERSED_BIT, NAVIGATOR_BIT = 1 << 25, 1 << 24, 1 << 21
CALIBRATION_BIT, CALIBRATION_AND_IMAGING_BIT = 1 << 22, 1 << 23
AS_SAMPLED_BIT = 1 << 55
# Feedback, phase stabilisation, references of multi-band, dummies, monitoring, navigators.
ASIDE_BITS = sum(1 << bit for bit in (1, 2, 14, 15, 38, 39, 51, 53, 56, 60))
DMA_LENGTH = (1 << 25) - 1
COUNTERS = {
    "step_1": "Lin",
    "step_2": "Par",
    "slice": "Sli",
    "contrast": "Eco",
    "phase": "Phs",
    "repetition": "Rep",
    "set": "Set",
    "average": "Ave",
}


def read_twix(path: Path, options: ReadOptions) -> Scan:
    """The scan in a file of Siemens raw data; see `assemble.scan_of_lines`.

    Of several measurements, as the adjustments before a scan are, the one with the most lines of an
    image is read; noise lines may come from another one. Echo-planar lines that were sampled on the
    ramps of the gradient are interpolated to even distances, by twixtools.

    Raises:
        InputError: it is no such file, or its contents are no such scan.
    """
    found = _measurements(path)
    measurement, remarks = chosen_measurement([one for one, _ in found], options, path)
    protocol = next(protocol for one, protocol in found if one.name == measurement.name)
    contrast = options.select.get("contrast", 0)
    scan = scan_of_lines(
        *(measurement.lines, (protocol.space,), options, path, protocol.study_of(contrast)),
        is_siemens=True,
    )
    return replace(scan, remarks=(*remarks, *scan.remarks))


def twix_selections(path: Path, options: ReadOptions) -> list[dict[str, int]]:
    """The selections of all images in the chosen measurement; see `lines.selections`."""
    measurement, _ = chosen_measurement([one for one, _ in _measurements(path)], options, path)
    return selections(measurement.lines.heads, options, path)


def _measurements(path: Path) -> list[tuple[RawMeasurement, Protocol]]:
    """All measurements with lines, in the order of the file."""
    version, extents = _extents(path)
    headers = [_header(path, start, stop) for start, stop in extents]
    for (start, stop), header in zip(extents, headers, strict=True):
        _check_blocks(path, version, start + len(header), stop)
    from twixtools import read_twix as read_with_twixtools

    try:
        # twixtools prints what it doubts.
        with contextlib.redirect_stdout(io.StringIO()):
            content = read_with_twixtools(
                str(path),
                parse_prot=False,
                parse_pmu=False,
                parse_geometry=False,
                verbose=False,
                keep_syncdata=False,
            )
            found = [
                _measurement(each["mdb"], parsed_header(header, path), path)
                for each, header in zip(content, headers, strict=True)
                if each["mdb"]
            ]
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error
    if not found:
        raise InputError(f"{path} holds no measured lines")
    return found


def _extents(path: Path) -> tuple[str, list[tuple[int, int]]]:
    """Version, "VB" or "VD", and where each measurement begins and ends."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        first, count = np.frombuffer(file.read(8).ljust(8, b"\xff"), "<u4").tolist()
        if first >= 10000 or count > MAX_MEASUREMENTS:  # VB begins with the length of its header
            extents = [(0, size)]
            version = "VB"
        else:
            entries = file.read(count * RAID_ENTRY)
            version = "VD"
            if not count or len(entries) < count * RAID_ENTRY:
                raise InputError(f"{path} is no Siemens raw data: its list of measurements is cut")
            fields = np.frombuffer(entries, "<u4,<u4,<u8,<u8,S64,S64")
            starts, lengths = fields["f2"].tolist(), fields["f3"].tolist()
            # twixtools reads to the end of the file where a single length is missing.
            extents = [
                (start, start + length if length or count > 1 else size)
                for start, length in zip(starts, lengths, strict=True)
            ]
    if any(not 0 <= start < stop <= size for start, stop in extents):
        raise InputError(f"{path} is cut off, or no Siemens raw data: it has {size} bytes")
    return version, extents


def _header(path: Path, start: int, stop: int) -> bytes:
    """The header of a measurement, which begins with its own length."""
    with open(path, "rb") as file:
        file.seek(start)
        length = int(np.frombuffer(file.read(4).ljust(4, b"\0"), "<u4")[0])
        if not 8 <= length <= min(MAX_HEADER, stop - start):
            raise InputError(_damaged(path))
        file.seek(start)
        return file.read(length)


def _damaged(path: Path) -> str:
    """The refusal of a file whose parts do not fit each other."""
    return f"{path} cannot be read as Siemens raw data, it seems damaged or cut off"


def _check_blocks(path: Path, version: str, position: int, stop: int) -> None:
    """Follows the blocks of a measurement to its last one, reading nothing but their headers."""
    flags_at = 20 if version == "VB" else 40
    block, channel = (0, VB_BLOCK) if version == "VB" else (VD_BLOCK, VD_CHANNEL)
    with open(path, "rb") as file:
        count = 0
        while position + VB_BLOCK < stop:
            file.seek(position)
            head = file.read(flags_at + 12)
            if len(head) < flags_at + 12:
                raise InputError(_damaged(path))
            flags = int.from_bytes(head[flags_at : flags_at + 8], "little")
            samples, channels = np.frombuffer(head[flags_at + 8 :], "<u2").tolist()
            if flags & (LAST | SYNCHRONISATION):
                size = int.from_bytes(head[:4], "little") & DMA_LENGTH
            else:
                size = block + channels * (channel + 8 * samples)
            if flags & LAST:
                return
            count += 1
            if size < VB_BLOCK or position + size > stop:
                raise InputError(_damaged(path))
            check_number(path, count)
            position += size


def _measurement(blocks: Any, header: Any, path: Path) -> tuple[RawMeasurement, Protocol]:
    """Lines and protocol of a measurement that twixtools has read."""
    heads = np.zeros(len(blocks), HEAD)
    for number, block in enumerate(blocks):
        head, fields = heads[number], block.mdh
        head["number"] = number
        for own, name in COUNTERS.items():
            head[own] = getattr(fields.Counter, name)
        head["samples"], head["coils"] = fields.SamplesInScan, fields.UsedChannels
        head["center"] = fields.CenterCol
        head["discard_pre"], head["discard_post"] = fields.CutOff.Pre, fields.CutOff.Post
        head["kind"] = _kind(int(fields.EvalInfoMask))
        head["reversed"] = bool(int(fields.EvalInfoMask) & REVERSED_BIT)
        place = fields.SliceData.SlicePos
        head["position"] = place.Sag, place.Cor, place.Tra
        head["slice_dir"] = _normal(fields.SliceData.Quaternion)
    centers = [(block.mdh.CenterLin, block.mdh.CenterPar) for block in blocks]
    protocol = protocol_of(header, heads, np.array(centers), path)
    name = protocol.study.protocol or "measurement"
    trajectory = _ramp_trajectory(header, heads)

    def read(chosen: np.ndarray) -> Iterator[np.ndarray]:
        with open(path, "rb") as file:
            for head in chosen:
                yield _samples(blocks[int(head["number"])], file, trajectory)

    return RawMeasurement(name, RawLines(heads, read)), protocol


def _kind(flags: int) -> int:
    if flags & NOISE_BIT:
        return NOISE
    if flags & NAVIGATOR_BIT:  # those of echo-planar lines are feedback, too
        return ASIDE if flags & CALIBRATION_BIT else NAVIGATOR
    if flags & ASIDE_BITS:
        return ASIDE
    if flags & CALIBRATION_BIT and not flags & CALIBRATION_AND_IMAGING_BIT:
        return CALIBRATION
    return IMAGE


def _normal(quaternion: np.ndarray) -> tuple[float, float, float]:
    """The slice's normal, the third column of the rotation; its sign is unverified."""
    a, b, c, d = (float(value) for value in quaternion)
    return (2 * (b * d + a * c), 2 * (c * d - a * b), 1 - 2 * (b * b + c * c))


def _ramp_trajectory(header: Any, heads: np.ndarray) -> np.ndarray | None:
    """Where samples lie that were taken on the ramps of the gradient; None where all are even."""
    from twixtools.recon_helpers import calc_regrid_traj

    image = heads[heads["kind"] == IMAGE]
    return calc_regrid_traj(header, int(image["samples"][0])) if len(image) else None


def _samples(block: Any, file: BinaryIO, trajectory: np.ndarray | None) -> np.ndarray:
    from twixtools.recon_helpers import perform_regrid

    block.fid = file  # twixtools would open the file anew for each line
    values = block.data
    flags, samples = int(block.mdh.EvalInfoMask), block.mdh.SamplesInScan
    if trajectory is None or len(trajectory) != samples or flags & (NOISE_BIT | AS_SAMPLED_BIT):
        return values
    regridded = perform_regrid(values, trajectory, block.mdh.ReadOutOffcentre)
    return regridded.astype(np.complex64)
