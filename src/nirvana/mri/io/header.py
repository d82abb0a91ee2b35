"""The ISMRMRD header: XML with the encoded spaces, patient, study and sequence.

Only the fields that a Cartesian reconstruction and its outputs need are read. A header with a
document type is refused: ISMRMRD's has none, and one could define entities that expand without
bound.
"""

import math
import re
from dataclasses import dataclass
from xml.etree import ElementTree

from nirvana.mri.io.scan import Encoding, Study

MAX_CHARACTERS = 4 * 2**20
MAX_TEXT = 256
MAX_MATRIX = 2**40
UID = re.compile(r"[0-9]+(\.[0-9]+)+")
MODES = ("embedded", "interleaved", "separate", "external", "other")


@dataclass(frozen=True)
class Space:
    """Matrix and field of view, mm, along x (readout), y (phase encoding) and z."""

    matrix: tuple[int, int, int]
    fov: tuple[float, float, float]

    @property
    def voxel(self) -> tuple[float, float, float]:
        """Size of a voxel along x, y and z, mm."""
        x, y, z = (extent / number for extent, number in zip(self.fov, self.matrix, strict=True))
        return (x, y, z)


@dataclass(frozen=True)
class EncodedSpace:
    """One of a header's encodings.

    Attributes:
        encoded: the measured space.
        recon: the space of the scanner's reconstruction, without the readout's oversampling.
        trajectory: "cartesian" or another.
        center: number of the phase-encoding step in the middle of k-space; None where missing.
        center_2: the same of the second phase encoding.
        limits: first and last phase-encoding step, where stated.
        acceleration: of the two phase encodings by parallel imaging, where stated.
        calibration_mode: one of `MODES`, where stated.
    """

    encoded: Space
    recon: Space
    trajectory: str = "cartesian"
    center: int | None = None
    center_2: int | None = None
    limits: tuple[int, int] | None = None
    acceleration: tuple[float, float] | None = None
    calibration_mode: str | None = None

    def facts(self, num_samples: int | None = None, center_sample: int | None = None) -> Encoding:
        """What the header states, with two facts about a readout."""
        return Encoding(
            phase_limits=self.limits,
            phase_center=self.center,
            num_samples=num_samples,
            center_sample=center_sample,
            acceleration=self.acceleration,
            calibration_mode=self.calibration_mode,
        )


@dataclass(frozen=True)
class Header:
    """A header.

    Attributes:
        encodings: at least one.
        study: patient, study and sequence, with the first of the echo times.
        echo_times: of all contrasts, ms.
    """

    encodings: tuple[EncodedSpace, ...]
    study: Study
    echo_times: tuple[float, ...] = ()


def parse_header(text: str) -> Header:
    """Reads a header. A matrix size that is not whole, as some vendors write it, is rounded.

    Raises:
        ValueError: it is no such XML, or a field is missing or impossible.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is {len(text)} characters long, more than {MAX_CHARACTERS}")
    if "<!DOCTYPE" in text:
        raise ValueError("it defines a document type, which no ISMRMRD header does")
    try:
        root = ElementTree.fromstring(text.strip("\0 \n\r\t"))
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    encodings = tuple(_encoding(each) for each in root.findall("{*}encoding"))
    if not encodings:
        raise ValueError("it has no 'encoding'")
    times = [_positive(each.text) for each in root.findall(_path("sequenceParameters/TE"))]
    return Header(encodings, _study(root), tuple(time for time in times if time is not None))


def _path(name: str) -> str:
    """A path in which every element may have any namespace."""
    return "/".join("{*}" + part for part in name.split("/"))


def _encoding(encoding: ElementTree.Element) -> EncodedSpace:
    def whole(name: str) -> int | None:
        found = encoding.findtext(_path(name))
        return None if found is None else int(found)

    step = "encodingLimits/kspace_encoding_step_{}/{}"
    first, last = whole(step.format(1, "minimum")), whole(step.format(1, "maximum"))
    factors = [
        _number(encoding, f"parallelImaging/accelerationFactor/kspace_encoding_step_{axis}")
        for axis in (1, 2)
    ]
    mode = (encoding.findtext(_path("parallelImaging/calibrationMode")) or "").strip().lower()
    return EncodedSpace(
        encoded=_space(encoding, "encodedSpace"),
        recon=_space(encoding, "reconSpace"),
        trajectory=(encoding.findtext(_path("trajectory")) or "").strip().lower(),
        center=whole(step.format(1, "center")),
        center_2=whole(step.format(2, "center")),
        limits=None if first is None or last is None else (first, last),
        acceleration=None if factors[0] is None else (factors[0], factors[1] or 1.0),
        calibration_mode=mode if mode in MODES else None,
    )


def _space(encoding: ElementTree.Element, name: str) -> Space:
    def numbers(kind: str) -> list[float]:
        found = [encoding.findtext(_path(f"{name}/{kind}/{axis}")) for axis in "xyz"]
        if None in found:
            raise ValueError(f"its {name} has no {kind} of x, y and z")
        return [float(text) for text in found if text is not None]

    sizes, (width, height, depth) = numbers("matrixSize"), numbers("fieldOfView_mm")
    # Written so that NaN fails, too.
    if not (
        all(0.5 <= size < MAX_MATRIX for size in sizes)
        and all(0 < side < 1e5 for side in (width, height, depth))
    ):
        raise ValueError(f"its {name} has an impossible matrix or field of view")
    x, y, z = (math.floor(size + 0.5) for size in sizes)
    return Space((x, y, z), (width, height, depth))


def _study(root: ElementTree.Element) -> Study:
    def words(name: str) -> str | None:
        found = " ".join((root.findtext(_path(name)) or "").split())[:MAX_TEXT]
        return "".join(filter(str.isprintable, found)) or None

    def digits(name: str, count: int) -> str | None:
        """A date or time: its digits, without fractions of a second."""
        found = re.sub(r"[-:]", "", (words(name) or "").partition(".")[0])
        return found if found.isdecimal() and len(found) == count else None

    def uid(name: str) -> str | None:
        found = words(name) or ""
        return found if UID.fullmatch(found) and len(found) <= 64 else None

    study, series, system, sequence = (
        *("studyInformation/", "measurementInformation/"),
        *("acquisitionSystemInformation/", "sequenceParameters/"),
    )
    number = words(series + "initialSeriesNumber") or ""
    sex = words("subjectInformation/patientGender")
    hertz = _number(root, "experimentalConditions/H1resonanceFrequency_Hz")
    return Study(
        patient_id=words("subjectInformation/patientID"),
        patient_name=words("subjectInformation/patientName"),
        patient_sex=sex if sex in ("M", "F", "O") else None,
        patient_birth_date=digits("subjectInformation/patientBirthdate", 8),
        patient_position=words(series + "patientPosition"),
        study_id=words(study + "studyID"),
        study_uid=uid(study + "studyInstanceUID"),
        study_date=digits(study + "studyDate", 8),
        study_time=digits(study + "studyTime", 6),
        study_description=words(study + "studyDescription"),
        series_uid=uid(series + "seriesInstanceUIDRoot"),
        series_number=int(number) if number.isdecimal() and len(number) < 9 else None,
        series_date=digits(series + "seriesDate", 8),
        series_time=digits(series + "seriesTime", 6),
        series_description=words(series + "seriesDescription"),
        frame_uid=uid(series + "frameOfReferenceUID"),
        protocol=words(series + "protocolName"),
        sequence=words(sequence + "sequence_type"),
        manufacturer=words(system + "systemVendor"),
        model=words(system + "systemModel"),
        institution=words(system + "institutionName"),
        field_strength=_number(root, system + "systemFieldStrength_T"),
        resonance_frequency=None if hertz is None else hertz / 1e6,
        repetition_time=_number(root, sequence + "TR"),
        echo_time=_number(root, sequence + "TE"),
        inversion_time=_number(root, sequence + "TI"),
        flip_angle=_number(root, sequence + "flipAngle_deg"),
    )


def _number(element: ElementTree.Element, name: str) -> float | None:
    return _positive(element.findtext(_path(name)))


def _positive(text: str | None) -> float | None:
    """A positive finite number; None where there is none."""
    try:
        found = float(text or "")
    except ValueError:
        return None
    return found if 0 < found < math.inf else None
