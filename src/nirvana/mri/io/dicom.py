"""DICOM: a volume as a series of single-slice files."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from math import pi
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from nirvana.mri.io.geometry import LPS_TO_RAS, spacing_of
from nirvana.mri.io.scan import Scan, in_file_axes

LARGEST = 2**16 - 1
# Of the pixels at most this share is shown white.
WHITE = 0.002
# Right angles to within the precision of DICOM's decimal strings.
RIGHT_ANGLE = 1e-4


@dataclass(frozen=True)
class Series:
    """The facts of a DICOM series that neither its pixels nor its scan contain.

    Attributes:
        description: at most 64 characters.
        identity: any text that every reconstruction of the same scan has in common, and none of
            another scan: the identifiers of study and frame of reference are derived from it where
            the scan's file states none.
        number: the series number within the study.
        created: local time of the reconstruction.
        part: what the pixels are.
    """

    description: str
    identity: str
    number: int
    created: datetime
    part: Literal["magnitude", "phase"] = "magnitude"


def write_dicom(folder: Path, volume: np.ndarray, scan: Scan, series: Series) -> None:
    """Writes one file per slice into a folder, `0001.dcm` and on.

    Pixels have 16 bits and are not rescaled, because viewers disagree about a rescaling of MR
    images and about windows narrower than 1 (PS3.3 C.11.2.1.2); the window, the same in all slices,
    counts pixel values. The image's own numbers are pixel x slope + intercept of the Real World
    Value Mapping (PS3.3 C.7.6.16.2.11), to half a step of the volume's maximum over 65535.

    Where the scan has an affine, each file is an MR image with position, orientation and spacing in
    the patient; where it has none, or its rows and columns are not at right angles, a secondary
    capture, which has no position in the patient.

    All reconstructions of a scan belong to one study and one frame of reference; the same volume of
    the same scan also gets the same identifiers of series and images.

    Args:
        folder: written to, and made if it is not there.
        volume: real `[slices, H, W]`, on the grid of the scan's image; magnitudes of 0 and above,
            or phases from -pi to pi. It is read slice by slice.
        scan: what it was reconstructed from.
        series: see `Series`.
    """
    from pydicom.uid import generate_uid

    folder.mkdir(exist_ok=True)
    volume, spacing, affine = in_file_axes(volume, scan)
    slope, intercept = _mapping(volume, series.part)

    def pixels_of(number: int) -> np.ndarray:
        values = np.asarray(volume[number], dtype=np.float64)
        return np.rint((values - intercept) / slope).clip(0, LARGEST).astype("<u2")

    window, digest = _survey(pixels_of, len(volume))
    if series.part == "phase":
        window = LARGEST
    study, frame = (generate_uid(entropy_srcs=[series.identity, kind]) for kind in ("y", "f"))
    study = _stated("UI", scan.study.study_uid) or study
    frame = _stated("UI", scan.study.frame_uid) or frame
    seed = [study, series.description, series.part, str(volume.shape), digest]
    series_uid = generate_uid(entropy_srcs=[*seed, "e"])
    if affine is not None:
        spacing = spacing_of(affine)
    for number in range(len(volume)):
        image = _image(scan, series, is_placed(affine))
        _set_pixels(image, pixels_of(number), window, slope, intercept)
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series_uid
        image.SOPInstanceUID = generate_uid(entropy_srcs=[*seed, f"i{number}"])
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        image.InstanceNumber = number + 1
        if spacing is not None:
            slices, rows, columns = spacing
            image.PixelSpacing = [_decimal(rows), _decimal(columns)]
            image.SliceThickness = image.SpacingBetweenSlices = _decimal(slices)
        if is_placed(affine):
            image.FrameOfReferenceUID = frame
            _place(image, affine, number)
        image.save_as(folder / f"{number + 1:04d}.dcm", enforce_file_format=True)


def is_placed(affine: np.ndarray | None) -> TypeGuard[np.ndarray]:
    """Whether DICOM can express the positions of an image's voxels."""
    if affine is None:
        return False
    _, rows, columns = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).T
    return bool(abs(rows @ columns) < RIGHT_ANGLE)


def _mapping(volume: np.ndarray, part: str) -> tuple[float, float]:
    """Slope and intercept from pixels to the volume's numbers."""
    if part == "phase":
        return 2 * pi / LARGEST, -pi
    peak = max(float(np.max(slice_)) for slice_ in volume)
    return (peak / LARGEST if peak > 0 else 1.0), 0.0


def _survey(pixels_of: Callable[[int], np.ndarray], slices: int) -> tuple[int, str]:
    """The pixel value that is shown white, and a digest of all pixels."""
    counts, digest = np.zeros(LARGEST + 1, np.int64), sha256()
    for number in range(slices):
        pixels = pixels_of(number)
        counts += np.bincount(pixels.ravel(), minlength=LARGEST + 1)
        digest.update(pixels.tobytes())
    brighter = counts.sum() - np.cumsum(counts)
    white = int(np.argmax(brighter <= WHITE * counts.sum()))
    # Of an image of few bright pixels all are shown.
    return white or LARGEST, digest.hexdigest()


def _image(scan: Scan, series: Series, placed: bool) -> Any:
    """A slice without pixels, identifiers and position."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SecondaryCaptureImageStorage

    from nirvana import __version__

    meta, study = FileMetaDataset(), scan.study
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    kind = MRImageStorage if placed else SecondaryCaptureImageStorage
    meta.MediaStorageSOPClassUID = kind
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID = kind
    image.SpecificCharacterSet = "ISO_IR 192"
    image.ImageType = ["DERIVED", "SECONDARY", "PHASE MAP" if series.part == "phase" else "OTHER"]
    image.Modality = "MR"
    image.ComplexImageComponent = series.part.upper()
    # DICOM requires most of these; what the scan's file does not state is empty.
    if placed:
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "RM", "NONE", ""
        image.MRAcquisitionType = scan.volume_encoding
        image.EchoTime, image.RepetitionTime = study.echo_time, study.repetition_time
        image.EchoTrainLength = None
        image.PositionReferenceIndicator = ""
        image.PatientPosition = _stated("CS", study.patient_position)
    else:
        image.ConversionType = "WSD"
        image.PatientOrientation = ""
    image.Laterality = ""
    image.Manufacturer = image.ManufacturerModelName = "nirvana"
    image.SoftwareVersions = __version__
    image.InstitutionName = _stated("LO", study.institution)
    image.ContentQualification = "RESEARCH"
    image.PatientName = _stated("PN", study.patient_name)
    image.PatientID = _stated("LO", study.patient_id) or _text(scan.name)
    image.PatientBirthDate = _stated("DA", study.patient_birth_date)
    image.PatientSex = _stated("CS", study.patient_sex)
    image.StudyDate = _stated("DA", study.study_date)
    image.StudyTime = _stated("TM", study.study_time)
    image.StudyID = _stated("SH", study.study_id)
    image.StudyDescription = _stated("LO", study.study_description)
    image.ProtocolName = _stated("LO", study.protocol)
    image.ReferringPhysicianName = image.AccessionNumber = ""
    image.SeriesNumber = series.number
    image.SeriesDescription = _text(series.description)
    date, time = series.created.strftime("%Y%m%d"), series.created.strftime("%H%M%S")
    image.SeriesDate = image.ContentDate = image.InstanceCreationDate = date
    image.SeriesTime = image.ContentTime = image.InstanceCreationTime = time
    image.BurnedInAnnotation, image.LossyImageCompression = "NO", "00"
    return image


def _set_pixels(image: Any, pixels: np.ndarray, white: int, slope: float, intercept: float) -> None:
    from pydicom.dataset import Dataset

    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = pixels.shape
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", "0", "US"
    # From 0 to `white` by the standard's equation, where a width of w spans w - 1 steps.
    image.WindowCenter, image.WindowWidth = str((white + 1) / 2), str(white + 1)
    image.PixelData = pixels.tobytes()
    units, mapping = Dataset(), Dataset()
    code, meaning = ("1", "no units") if intercept == 0 else ("rad", "radian")
    units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = code, "UCUM", meaning
    mapping.RealWorldValueFirstValueMapped = 0
    mapping.RealWorldValueLastValueMapped = LARGEST
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = slope, intercept
    mapping.LUTLabel, mapping.LUTExplanation = "IMAGE", "Numbers of the reconstruction"
    mapping.MeasurementUnitsCodeSequence = [units]
    image.RealWorldValueMappingSequence = [mapping]


def _place(image: Any, affine: np.ndarray, number: int) -> None:
    """Adds position and orientation in the patient."""
    affine = LPS_TO_RAS @ affine
    directions = affine[:3, [2, 1]] / np.linalg.norm(affine[:3, [2, 1]], axis=0)
    # First the direction in which columns count up, then that of rows.
    image.ImageOrientationPatient = [_decimal(value) for value in directions.T.ravel()]
    position = affine @ [number, 0, 0, 1]
    image.ImagePositionPatient = [_decimal(value) for value in position[:3]]


def _stated(kind: str, value: str | None) -> str:
    """What a file states, if DICOM can express it as a value of this kind, else nothing."""
    from pydicom.config import RAISE
    from pydicom.valuerep import validate_value

    if value is None or "\\" in value:
        return ""
    try:
        validate_value(kind, value, RAISE)
    except ValueError:
        return ""
    return value


def _text(text: str) -> str:
    """A text as DICOM's strings are: at most 64 characters, without the sign between values."""
    return text.replace("\\", "_")[:64]


def _decimal(value: float) -> str:
    """At most 16 characters, as DICOM's decimal strings are."""
    text = f"{value:.10g}"
    return text if len(text) <= 16 else f"{value:.8e}"
