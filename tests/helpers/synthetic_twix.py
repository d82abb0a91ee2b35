"""Writes Siemens raw data, block by block, by the format's definition."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

NOISE, REFLECT, PHASE_CORRECTION, CALIBRATION = 1 << 25, 1 << 24, 1 << 21, 1 << 22
CALIBRATION_AND_IMAGING, FEEDBACK, LAST = 1 << 23, 1 << 1, 1 << 0
COUNTERS = ("Lin", "Ave", "Sli", "Par", "Eco", "Phs", "Rep", "Set", "Seg")
# A slice whose normal is (0, 0, 1): no rotation.
UPRIGHT = (1.0, 0.0, 0.0, 0.0)

Block = tuple[np.ndarray, dict[str, Any]]


def protocol(base: int, lines: int, **changes: str) -> str:
    """The part of a protocol that lists its numbers."""
    values = {
        "sKSpace.lBaseResolution": str(base),
        "sKSpace.lPhaseEncodingLines": str(lines),
        "sKSpace.ucDimension": "2",
        "sKSpace.ucTrajectory": "1",
        "sSliceArray.asSlice[0].dThickness": "3.0",
        "sSliceArray.asSlice[0].dPhaseFOV": "160.0",
        "sSliceArray.asSlice[0].dReadoutFOV": "240.0",
        "sPat.lAccelFactPE": "1",
        "sPat.ucRefScanMode": "1",
        "alTR[0]": "500000",
        "alTE[0]": "4000",
        "alTE[1]": "9000",
        "adFlipAngleDegree[0]": "25.0",
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    text = "".join(f"{name}\t = \t{value}\n" for name, value in values.items())
    return f"### ASCCONV BEGIN ###\n{text}\n### ASCCONV END ###\n"


MEAS = (
    '<ParamString."tProtocolName"> { "head" }\n<ParamString."tPatientName"> { "Doe^Jo" }\n'
    '<ParamLong."lPatientSex"> { 1 }\n<ParamString."FrameOfReference"> { "1.2.3.4" }\n'
    '<ParamDouble."flMagneticFieldStrength"> { <Precision> 6 2.894 }\n'
)


def block(line: np.ndarray, flags: int = 0, **changes: Any) -> Block:
    """A readout `[channels, samples]` with its counters (`Lin=3`), `center` and `position`."""
    return line, {"flags": flags, **changes}


def measurement(blocks: list[Block], ascconv: str, version: str = "VD", meas: str = MEAS) -> bytes:
    """Header and blocks of one measurement."""
    # The header's length, above 10,000 in files of VB, distinguishes the versions.
    buffers = {"Meas": meas + " " * 12000 * (version == "VB"), "MeasYaps": ascconv}
    content = b"".join(
        name.encode() + b"\0" + struct.pack("<I", len(text)) + text.encode()
        for name, text in buffers.items()
    )
    header = struct.pack("<II", 8 + len(content), len(buffers)) + content
    body = b"".join(_block(*each, version) for each in blocks)
    return header + body + _block(np.zeros((0, 0)), {"flags": LAST}, version)


def _block(line: np.ndarray, facts: dict[str, Any], version: str) -> bytes:
    channels, samples = line.shape
    counters = [facts.get(name, 0) for name in COUNTERS] + [0] * 5
    center = facts.get("center", samples // 2)
    is_last = bool(facts["flags"] & LAST)
    per_channel = (32 if version == "VD" else 128) + 8 * samples
    length = 192 + 160 if is_last else channels * per_channel + (192 if version == "VD" else 0)
    start = struct.pack("<IiIII", length, 1, 1, 0, 0)
    start += bytes(20) if version == "VD" else b""
    start += struct.pack("<QHH14H", facts["flags"], samples, channels, *counters)
    start += struct.pack("<HHHHfI", *facts.get("cut", (0, 0)), center, 0, 0.0, 0)
    start += struct.pack("<HH", facts.get("center_line", 0), facts.get("center_partition", 0))
    place = struct.pack("<7f", *facts.get("position", (0, 0, 0)), *UPRIGHT)
    if version == "VD":
        head = start + place + bytes(2 * 24 + 2 * 4 + 8)
        assert len(head) == 192
        if is_last:
            return head + bytes(160)
        values = line.astype("<c8")
        return head + b"".join(bytes(32) + values[channel].tobytes() for channel in range(channels))
    head = start + bytes(8 + 8) + place + bytes(4)
    assert len(head) == 128
    if is_last:
        return head + bytes(length - 128)
    values = line.astype("<c8")
    return b"".join(head + values[channel].tobytes() for channel in range(channels))


def write(path: Path, measurements: list[bytes], version: str = "VD") -> Path:
    """A file of one measurement (VB), or of several ones."""
    if version == "VB":
        (content,) = measurements
        path.write_bytes(content)
        return path
    entries, body, start = b"", b"", 10240
    for number, content in enumerate(measurements):
        padded = content + bytes(-len(content) % 512)
        entries += struct.pack("<IIQQ64s64s", number, number, start, len(content), b"", b"")
        body += padded
        start += len(padded)
    header = struct.pack("<II", 0, len(measurements)) + entries
    path.write_bytes(header + bytes(10240 - len(header)) + body)
    return path
