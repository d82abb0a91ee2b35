"""DICOM: a volume as a series of single-slice files."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.mri.io.geometry import LPS_TO_RAS, spacing_of
from nirvana.mri.io.scan import Scan

LARGEST = 2**16 - 1
# Right angles to within the precision of DICOM's decimal strings.
RIGHT_ANGLE = 1e-4


def write_dicom(folder: Path, volume: np.ndarray, scan: Scan, description: str) -> None:
    """Writes one file per slice into a folder that exists, `0001.dcm` and on.

    Pixels are 16 bits; pixel x RescaleSlope is the value, to half a step of the volume's maximum
    over 65535. Where the scan has an affine, each is an MR image with position, orientation and
    spacing in the patient; where it has none, or its rows and columns are not at right angles, a
    secondary capture, which has no position in the patient. The same volume of the same scan gets
    the same identifiers.

    Args:
        folder: written to.
        volume: real `[slices, H, W]`, on the grid of the scan's image; negative values become 0.
        scan: what it was reconstructed from.
        description: of the series, at most 64 characters.
    """
    from pydicom.uid import generate_uid

    volume = np.clip(np.asarray(volume, dtype=np.float64), 0, None)
    # The slope as it will be read: a decimal string holds 16 characters.
    slope = float(f"{volume.max() / LARGEST:.9e}") or 1.0
    pixels = np.rint(volume / slope).clip(0, LARGEST).astype("<u2")
    seed = [scan.name, description, str(volume.shape), sha256(pixels.tobytes()).hexdigest()]
    study, series, frame = (generate_uid(entropy_srcs=[*seed, kind]) for kind in ("y", "e", "f"))
    for number, picture in enumerate(pixels):
        image = _image(picture, slope, scan, description)
        image.StudyInstanceUID, image.SeriesInstanceUID = study, series
        image.file_meta.MediaStorageSOPInstanceUID = generate_uid(
            entropy_srcs=[*seed, f"i{number}"]
        )
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID
        image.InstanceNumber = number + 1
        if is_placed(scan):
            image.FrameOfReferenceUID = frame
        _place(image, scan, number)
        image.save_as(folder / f"{number + 1:04d}.dcm", enforce_file_format=True)


def is_placed(scan: Scan) -> bool:
    """Whether DICOM can express the positions of the scan's voxels."""
    if scan.affine is None:
        return False
    _, rows, columns = (scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)).T
    return bool(abs(rows @ columns) < RIGHT_ANGLE)


def _image(picture: np.ndarray, slope: float, scan: Scan, description: str) -> Any:
    """A slice without identifiers and position."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    kind = MRImageStorage if is_placed(scan) else SecondaryCaptureImageStorage
    meta.MediaStorageSOPClassUID = kind
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID = kind
    image.SpecificCharacterSet = "ISO_IR 192"
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.Modality = "MR"
    if is_placed(scan):
        # DICOM requires these; what the scan's file does not contain is empty or "research".
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "RM", "NONE", ""
        image.MRAcquisitionType, image.EchoTime, image.EchoTrainLength = "2D", None, None
        image.RepetitionTime = None
        image.PositionReferenceIndicator = ""
    else:
        image.ConversionType = "WSD"
    image.Manufacturer = "nirvana"
    image.PatientName, image.PatientID = "", scan.name[:64].replace("\\", "_")
    image.PatientBirthDate = image.PatientSex = image.StudyDate = image.StudyTime = ""
    image.ReferringPhysicianName = image.StudyID = image.AccessionNumber = ""
    image.SeriesNumber = 1
    image.SeriesDescription = description[:64]
    image.BurnedInAnnotation = "NO"
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = picture.shape
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 0
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = f"{slope:.9e}", "0", "US"
    image.WindowCenter = _decimal(slope * LARGEST / 2)
    image.WindowWidth = _decimal(slope * LARGEST)
    image.PixelData = picture.tobytes()
    return image


def _place(image: Any, scan: Scan, number: int) -> None:
    """Adds the spacing, the position and the orientation that are known."""
    spacing = scan.spacing if scan.affine is None else spacing_of(scan.affine)
    if spacing is not None:
        slices, rows, columns = spacing
        image.PixelSpacing = [_decimal(rows), _decimal(columns)]
        image.SliceThickness = image.SpacingBetweenSlices = _decimal(slices)
    if not is_placed(scan):
        return
    affine = LPS_TO_RAS @ scan.affine
    directions = affine[:3, [2, 1]] / np.linalg.norm(affine[:3, [2, 1]], axis=0)
    # First the direction in which columns count up, then that of rows.
    image.ImageOrientationPatient = [_decimal(value) for value in directions.T.ravel()]
    position = affine @ [number, 0, 0, 1]
    image.ImagePositionPatient = [_decimal(value) for value in position[:3]]


def _decimal(value: float) -> str:
    """At most 16 characters, as DICOM's decimal strings are."""
    text = f"{value:.10g}"
    return text if len(text) <= 16 else f"{value:.8e}"
