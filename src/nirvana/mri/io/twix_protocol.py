"""What the protocol of Siemens raw data states: matrix, field of view, patient and sequence."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.header import MAX_TEXT, UID, EncodedSpace, Space
from nirvana.mri.io.lines import IMAGE
from nirvana.mri.io.scan import Study

PARTS = ("Config", "Dicom", "Meas", "MeasYaps")
MAX_PARTS, MAX_NAME = 64, 48
LONG_INDEX = re.compile(rb"\[\d{5,}\]")
CARTESIAN, THREE_DIMENSIONS = 1, 4
CALIBRATION_MODES = {2: "embedded", 4: "separate"}
SEXES = {1: "F", 2: "M", 3: "O"}


@dataclass(frozen=True)
class Protocol:
    """The protocol of a measurement.

    Attributes:
        space: matrix and field of view.
        study: patient, study and sequence, with the first of the echo times.
        echo_times: of all contrasts, ms.
    """

    space: EncodedSpace
    study: Study
    echo_times: tuple[float, ...]

    def study_of(self, contrast: int) -> Study:
        """The study with the echo time of a contrast."""
        known = contrast < len(self.echo_times)
        return replace(self.study, echo_time=self.echo_times[contrast]) if known else self.study


def parsed_header(header: bytes, path: Path) -> dict[str, Any]:
    """The parts of a measurement's header, each as twixtools parses it.

    Raises:
        InputError: a part does not fit into the header, or has a list of impossible length.
    """
    from twixtools.twixprot import parse_buffer

    if LONG_INDEX.search(header):  # twixtools would fill a list up to it
        raise InputError(f"{path}: its protocol has lists of impossible length")
    parts, position = {}, 8
    for _ in range(min(int.from_bytes(header[4:8], "little"), MAX_PARTS)):
        end = header.find(b"\0", position, position + MAX_NAME)
        length = int.from_bytes(header[end + 1 : end + 5], "little")
        if end < 0 or end + 5 + length > len(header):
            raise InputError(f"{path}: its protocol is damaged, its parts do not fit each other")
        name = header[position:end].decode("latin1")
        if name in PARTS:
            parts[name] = parse_buffer(header[end + 5 : end + 5 + length].decode("latin1"))
        position = end + 5 + length
    return parts


def protocol_of(header: Any, heads: np.ndarray, centers: np.ndarray, path: Path) -> Protocol:
    """The protocol of a measurement.

    The matrix follows from the lines, since the protocol has no single number for what phase
    resolution, oversampling and partial Fourier make of it.

    Args:
        header: of `parsed_header`.
        heads: `lines.HEAD` `[N]`.
        centers: int `[N, 2]`, number of the middle line and partition of each line.
        path: of the file.

    Raises:
        InputError: the trajectory is not Cartesian, or sizes are missing or impossible.
    """
    numbers = _Numbers(header.get("MeasYaps", {}))
    if numbers.whole("sKSpace.ucTrajectory", CARTESIAN) != CARTESIAN:
        raise InputError(f"{path}: its trajectory is not cartesian; only such can be used")
    image = heads["kind"] == IMAGE
    chosen = heads[image] if image.any() else heads
    line, partition = (centers[image] if image.any() else centers)[0].tolist()
    length = _extent(chosen["samples"], chosen["center"])
    width = _around(line, int(chosen["step_1"].max()))
    is_3d = numbers.whole("sKSpace.ucDimension", 2) == THREE_DIMENSIONS
    depth = _around(partition, int(chosen["step_2"].max())) if is_3d else 1
    slices = numbers.value("sSliceArray.asSlice.0")
    own = _Numbers(slices if isinstance(slices, dict) else {})
    base = numbers.whole("sKSpace.lBaseResolution", length)
    fov = own.positive("dReadoutFOV") or 1.0
    phase = (own.positive("dPhaseFOV") or fov) * (
        1 + (numbers.positive("sKSpace.dPhaseOversamplingForDialog") or 0.0)
    )
    thickness = (own.positive("dThickness") or 1.0) * (
        1 + (numbers.positive("sKSpace.dSliceOversamplingForDialog") or 0.0)
    )
    kept = min(max(base, 1), length)
    space = EncodedSpace(
        encoded=Space((length, width, depth), (fov * length / kept, phase, thickness)),
        recon=Space((kept, width, depth), (fov, phase, thickness)),
        center=line,
        center_2=partition,
        limits=(int(chosen["step_1"].min()), int(chosen["step_1"].max())),
        acceleration=(
            float(numbers.whole("sPat.lAccelFactPE", 1)),
            float(numbers.whole("sPat.lAccelFact3D", 1)),
        ),
        calibration_mode=CALIBRATION_MODES.get(numbers.whole("sPat.ucRefScanMode", 1)),
    )
    times = numbers.value("alTE")
    times = [_finite(time) for time in times] if isinstance(times, list) else []
    echoes = tuple(time / 1000 for time in times if time)
    return Protocol(space, _study(header, numbers, echoes), echoes)


def _extent(samples: np.ndarray, center: np.ndarray) -> int:
    """Number of samples of a readout whose echo is in the middle; an echo may lie early or late."""
    return int(2 * np.maximum(center, samples - center).max())


def _around(center: int, last: int) -> int:
    """Size of an axis with `center` in the middle that contains the steps 0 to `last`."""
    return 2 * max(center, last + 1 - center, 1)


def _finite(value: Any) -> float:
    """A positive finite number; 0 for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if 0 < number < math.inf else 0.0


@dataclass(frozen=True)
class _Numbers:
    """Values of a nested protocol by their path, "a.0.b"."""

    content: Any

    def value(self, path: str) -> Any:
        found = self.content
        for key in path.split("."):
            if isinstance(found, dict):
                found = found.get(key)
            elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            else:
                return None
        return found

    def positive(self, path: str) -> float | None:
        return _finite(self.value(path)) or None

    def whole(self, path: str, default: int) -> int:
        found = self.positive(path)
        return default if found is None else int(min(found, 2**20))


def _study(header: Any, numbers: _Numbers, echo_times: tuple[float, ...]) -> Study:
    parts = [_Numbers(header.get(name, {})) for name in ("Dicom", "Meas", "Config")]

    def words(*names: str) -> str | None:
        for part in parts:
            for name in names:
                found = part.value(name)
                if isinstance(found, str) and found.strip():
                    text = " ".join(found.split())[:MAX_TEXT]
                    return "".join(filter(str.isprintable, text)) or None
        return None

    def number(name: str) -> float | None:
        return next((found for part in parts if (found := part.positive(name))), None)

    frame = words("tFrameOfReference", "FrameOfReference") or ""
    birth = words("PatientBirthDay") or ""
    tesla, hertz = number("flMagneticFieldStrength"), number("lFrequency")
    repetition, flip = numbers.positive("alTR.0"), numbers.positive("adFlipAngleDegree.0")
    inversion = numbers.positive("alTI.0")
    return Study(
        patient_id=words("PatientID"),
        patient_name=words("tPatientName", "PatientName"),
        patient_sex=SEXES.get(int(number("lPatientSex") or 0)),
        patient_birth_date=birth if re.fullmatch("[0-9]{8}", birth) else None,
        patient_position=words("tPatientPosition", "PatientPosition"),
        study_description=words("tStudyDescription"),
        frame_uid=frame if UID.fullmatch(frame) and len(frame) <= 64 else None,
        protocol=words("tProtocolName", "ProtocolName"),
        sequence=words("SequenceString", "tSequenceString"),
        manufacturer=words("Manufacturer"),
        model=words("ManufacturersModelName"),
        institution=words("InstitutionName"),
        field_strength=tesla,
        resonance_frequency=None if hertz is None else hertz / 1e6,
        repetition_time=None if repetition is None else repetition / 1000,
        echo_time=echo_times[0] if echo_times else None,
        inversion_time=None if inversion is None else inversion / 1000,
        flip_angle=flip,
    )
