"""DICOM files as viewers and converters read them."""

import shutil
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_windowing

from helpers.geometry import affines, by_place, places, rotation
from nirvana.mri.io import Scan, Series, Study, in_file_axes, write_dicom, write_nifti

SHAPE = (3, 9, 11)  # slices, rows, columns
SERIES = Series("test", identity="a scan", number=7, created=datetime(2026, 11, 29, 12, 30))
SCALES = (1e-6, 1e-4, 1.0, 1e3, 1e6)


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Every voxel has a value of its own, further from the next than 16 bits resolve."""
    order = np.random.default_rng(0).permutation(np.prod(shape))
    return ((order + 1) / len(order)).reshape(shape).astype(np.float32)


def scan(affine: np.ndarray | None, spacing: tuple[float, float, float] | None = None) -> Scan:
    kspace = values((SHAPE[0], 1, *SHAPE[1:])).astype(np.complex64)
    return Scan(kspace, None, None, "head", spacing, affine=affine)


def numbers(image: pydicom.Dataset) -> np.ndarray:
    """The reconstruction's own numbers."""
    (mapping,) = image.RealWorldValueMappingSequence
    return image.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(affine=affines(), peak=st.floats(1e-12, 1e12))
def test_place_and_scale_are_kept(
    affine: np.ndarray, peak: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dicom")
    volume = values().astype(np.float64) * peak
    write_dicom(folder, volume, scan(affine), SERIES)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm", "0003.dcm"]
    images = [pydicom.dcmread(file) for file in files]
    for number, image in enumerate(images):
        np.testing.assert_allclose(numbers(image), volume[number], atol=volume.max() / 65535)
        # The standard's equation C.7.6.2.1-1.
        right, down = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        rows, columns = (float(x) for x in image.PixelSpacing)
        for row, column in [(0, 0), (8, 0), (0, 10), (4, 7)]:
            place = np.array(image.ImagePositionPatient, float)
            place = place + right * columns * column + down * rows * row
            expected = (affine @ [number, row, column, 1])[:3] * [-1, -1, 1]
            np.testing.assert_allclose(place, expected, atol=1e-3)
    assert len({image.SOPInstanceUID for image in images}) == 3
    assert len({image.SeriesInstanceUID for image in images}) == 1
    assert images[0].SOPClassUID == pydicom.uid.MRImageStorage


def head(shape: tuple[int, ...] = (4, 40, 48)) -> np.ndarray:
    """A dark picture with a few bright pixels, as those of vessels or artefacts are."""
    slices, rows, columns = np.mgrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    volume = np.clip(1 - rows**2 - columns**2 - 0.2 * slices**2, 0, None)
    volume[1, 20, 20:22] = 30
    return volume


def greys(image: pydicom.Dataset) -> np.ndarray:
    """The window applied by pydicom, 0..1."""
    raw = apply_modality_lut(image.pixel_array, image)
    return apply_windowing(raw, image) / 65535


def check_picture(shown: np.ndarray, volume: np.ndarray) -> None:
    """All but the few bright pixels are shown in proportion, with many grey levels."""
    white = np.quantile(volume, 0.99)
    assert len(np.unique(shown)) > 100
    inside = volume < white
    expected = volume / volume[inside].max() * shown[inside].max()
    np.testing.assert_allclose(shown[inside], expected[inside], atol=0.01)
    assert shown[inside].max() > 0.8
    assert shown.min() == 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("known", [True, False])
def test_pydicom_shows_the_picture(scale: float, known: bool, tmp_path: Path) -> None:
    volume = head() * scale
    write_dicom(tmp_path, volume, scan(np.eye(4) if known else None), SERIES)
    images = [pydicom.dcmread(file) for file in sorted(tmp_path.iterdir())]
    check_picture(np.stack([greys(image) for image in images]), volume)
    for image in images:
        assert float(image.WindowWidth) >= 1  # PS3.3 C.11.2.1.2
        assert (image.RescaleSlope, image.RescaleIntercept) == (1, 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("known", [True, False])
def test_dcmtk_shows_the_picture(scale: float, known: bool, tmp_path: Path) -> None:
    program = shutil.which("dcm2pnm")
    if program is None:
        pytest.skip("needs DCMTK's dcm2pnm")
    volume = head() * scale
    write_dicom(tmp_path, volume, scan(np.eye(4) if known else None), SERIES)
    shown = []
    for file in sorted(tmp_path.glob("*.dcm")):
        picture = file.with_suffix(".png")
        command = [program, "+Wi", "1", "+on", str(file), str(picture)]
        subprocess.run(command, check=True, capture_output=True)
        shown.append(np.asarray(Image.open(picture)) / 255)
    check_picture(np.stack(shown), volume)


def converted(folder: Path, out: Path) -> nibabel.Nifti1Image:
    """The volume that dcm2niix makes of a folder."""
    program = pytest.importorskip("dcm2niix").bin
    out.mkdir()
    done = subprocess.run([program, "-f", "x", "-o", str(out), str(folder)], capture_output=True)
    (file,) = out.glob("*.nii")
    assert done.returncode == 0
    return nibabel.load(file)


@pytest.mark.parametrize("part", ["magnitude", "phase"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("angles", [(0, 0, 0), (0.2, -0.4, 0.1), (1.5, 0.1, -2.0), (3.0, 1.0, 0.5)])
def test_dcm2niix_and_nifti_agree(
    angles: tuple[float, float, float], turned: bool, part: str, tmp_path: Path
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * [3, 0.9, 1.1]
    affine[:3, 3] = [20, -30, 15]
    given_scan = replace(scan(affine), phase_encode="rows" if turned else "columns")
    volume = values() * 1e-5 if part == "magnitude" else values() * 6 - 3
    write_dicom(folder := tmp_path / "dicom", volume, given_scan, replace(SERIES, part=part))
    in_axes, spacing, grid = in_file_axes(volume, given_scan)
    write_nifti(tmp_path / "own.nii.gz", in_axes, grid, spacing)
    own, theirs = nibabel.load(tmp_path / "own.nii.gz"), converted(folder, tmp_path / "theirs")
    (mapping,) = pydicom.dcmread(folder / "0001.dcm").RealWorldValueMappingSequence
    scaled = np.asarray(theirs.dataobj) * mapping.RealWorldValueSlope
    scaled = scaled + mapping.RealWorldValueIntercept
    expected = by_place(places(own.affine, own.shape), np.asarray(own.dataobj))
    found = by_place(places(theirs.affine, theirs.shape), scaled)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-3)
    span = volume.max() if part == "magnitude" else 2 * np.pi
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5 * span)


def test_dcm2niix_finds_no_orientation_where_there_is_none(tmp_path: Path) -> None:
    write_dicom(folder := tmp_path / "dicom", values(), scan(None, (5.0, 1.5, 0.5)), SERIES)
    write_nifti(tmp_path / "own.nii", values(), None, (5.0, 1.5, 0.5))
    own, theirs = nibabel.load(tmp_path / "own.nii"), converted(folder, tmp_path / "theirs")
    assert (theirs.header["sform_code"], theirs.header["qform_code"]) == (0, 0)
    np.testing.assert_allclose(theirs.header.get_zooms(), (0.5, 1.5, 5.0))
    scaled = np.asarray(theirs.dataobj) / 65535 * values().max()
    np.testing.assert_allclose(scaled, own.dataobj, atol=1e-5)


def test_no_place_is_claimed_that_is_not_known(tmp_path: Path) -> None:
    write_dicom(tmp_path, values(), scan(None, (5.0, 1.5, 0.5)), SERIES)
    image = pydicom.dcmread(tmp_path / "0001.dcm")
    assert image.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"):
        assert name not in image
    assert not image.PatientOrientation
    assert not image.Laterality
    assert [float(x) for x in image.PixelSpacing] == [1.5, 0.5]
    assert float(image.SpacingBetweenSlices) == 5


def test_no_place_is_claimed_for_a_sheared_grid(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.2
    write_dicom(tmp_path, values(), scan(affine), SERIES)
    assert "ImageOrientationPatient" not in pydicom.dcmread(tmp_path / "0001.dcm")


def written(folder: Path, volume: np.ndarray, scan: Scan, series: Series) -> pydicom.Dataset:
    """The second image of a series."""
    write_dicom(folder, volume, scan, series)
    return pydicom.dcmread(folder / "0002.dcm")


def test_reconstructions_of_a_scan_are_one_study(tmp_path: Path) -> None:
    other = values()
    other[-1, -1, -1] /= 2
    later = replace(SERIES, created=datetime(2027, 1, 1), number=9)
    one = written(tmp_path / "one", values(), scan(np.eye(4)), SERIES)
    again = written(tmp_path / "again", values(), scan(np.eye(4)), later)
    second = written(tmp_path / "second", other, scan(np.eye(4)), later)
    phase = written(tmp_path / "phase", values(), scan(np.eye(4)), replace(SERIES, part="phase"))
    elsewhere = replace(SERIES, identity="another scan")
    stranger = written(tmp_path / "stranger", values(), scan(np.eye(4)), elsewhere)
    for image in (again, second, phase):
        assert image.StudyInstanceUID == one.StudyInstanceUID
        assert image.FrameOfReferenceUID == one.FrameOfReferenceUID
    assert again.SOPInstanceUID == one.SOPInstanceUID
    assert len({each.SeriesInstanceUID for each in (one, second, phase, stranger)}) == 4
    assert stranger.StudyInstanceUID != one.StudyInstanceUID
    assert stranger.FrameOfReferenceUID != one.FrameOfReferenceUID
    assert (one.SeriesNumber, again.SeriesNumber) == (7, 9)
    assert (one.SeriesDate, one.SeriesTime) == ("20261129", "123000")
    assert one.StudyDate == ""


def test_what_the_file_states_is_kept(tmp_path: Path) -> None:
    stated = Study(
        patient_id="P7",
        patient_name="Nobody^Anna",
        patient_birth_date="19700101",
        patient_sex="F",
        patient_position="HFS",
        study_uid="1.2.3.4",
        frame_uid="1.2.3.5",
        study_date="20200229",
        study_time="101112",
        study_id="17",
        protocol="t2 tse",
        echo_time=96.0,
        repetition_time=5000.0,
    )
    image = written(tmp_path, values(), replace(scan(np.eye(4)), study=stated), SERIES)
    assert (image.PatientID, image.PatientName) == ("P7", "Nobody^Anna")
    assert (image.PatientBirthDate, image.PatientSex) == ("19700101", "F")
    assert (image.PatientPosition, image.StudyID) == ("HFS", "17")
    assert (image.StudyInstanceUID, image.FrameOfReferenceUID) == ("1.2.3.4", "1.2.3.5")
    assert (image.StudyDate, image.StudyTime) == ("20200229", "101112")
    assert (image.EchoTime, image.RepetitionTime, image.ProtocolName) == (96, 5000, "t2 tse")


def test_what_dicom_cannot_express_is_left_out(tmp_path: Path) -> None:
    wrong = Study(
        patient_id="x" * 65,
        patient_name="a\\b",
        patient_birth_date="1970-01-01",
        patient_sex="woman",
        study_uid="1.2.x",
        study_date="yesterday",
        study_time="noon",
        study_id="12345678901234567",
    )
    image = written(tmp_path, values(), replace(scan(np.eye(4)), study=wrong), SERIES)
    assert image.PatientID == "head"
    assert image.StudyInstanceUID.is_valid
    for name in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
        assert not image[name].value
    assert not image.StudyID


def test_an_empty_reconstruction_is_written_too(tmp_path: Path) -> None:
    write_dicom(tmp_path, np.zeros(SHAPE), scan(np.eye(4)), SERIES)
    assert not pydicom.dcmread(tmp_path / "0001.dcm").pixel_array.any()
