"""Where voxels lie, and what they weigh, from file to file."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana.mri.io import (
    Scan,
    read_affine,
    read_scan,
    read_spacing,
    read_volume,
    write_dicom,
    write_nifti,
    write_scan,
)
from nirvana.mri.io.geometry import shifted, spacing_of

SHAPE = (3, 9, 11)  # slices, rows, columns
IN_FOLDER = [HealthCheck.function_scoped_fixture]


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.roll(np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]), axis, (0, 1))
        turned = turned @ turn
    return turned


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Rotated, mirrored or not, any voxel size, far away or near."""
    angle = st.floats(-3.1, 3.1)
    zoom = st.floats(0.2, 8)
    affine = np.eye(4)
    affine[:3, :3] = rotation(draw(st.tuples(angle, angle, angle)))
    affine[:3, :3] *= [draw(zoom) * draw(st.sampled_from([-1, 1])), draw(zoom), draw(zoom)]
    affine[:3, 3] = draw(st.tuples(*[st.floats(-400, 400)] * 3))
    return affine


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def scan(affine: np.ndarray | None, spacing: tuple[float, float, float] | None = None) -> Scan:
    kspace = values((SHAPE[0], 1, *SHAPE[1:])).astype(np.complex64)
    return Scan(kspace, None, None, "head", spacing, affine=affine)


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where each voxel lies, `[voxels, 3]`, in C order."""
    index = np.stack([*np.indices(shape[:3]).reshape(3, -1), np.ones(np.prod(shape[:3]))])
    return (affine @ index)[:3].T


def by_place(where: np.ndarray, what: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by value, which no two voxels share."""
    order = np.argsort(what.ravel())
    return where[order], what.ravel()[order]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=IN_FOLDER)
@given(affine=affines())
def test_nifti_in_and_out_keeps_every_voxel_in_its_place(
    affine: np.ndarray, tmp_path: Path
) -> None:
    data = values((8, 9, 10))
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "in.nii")
    volume, grid = read_volume(tmp_path / "in.nii"), read_affine(tmp_path / "in.nii")
    assert grid is not None
    np.testing.assert_allclose(spacing_of(grid), read_spacing(tmp_path / "in.nii"), rtol=1e-5)
    given_places, given_values = by_place(places(affine, data.shape), data / data.max())
    found_places, found_values = by_place(places(grid, volume.shape), volume)
    np.testing.assert_allclose(found_places, given_places, atol=1e-3)
    np.testing.assert_allclose(found_values, given_values, rtol=1e-6)

    write_nifti(tmp_path / "out.nii.gz", volume, grid)
    written = nibabel.load(tmp_path / "out.nii.gz")
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "in.nii"))
    np.testing.assert_allclose(written.affine, canonical.affine, atol=1e-3)
    expected = np.asarray(canonical.dataobj) / data.max()
    np.testing.assert_allclose(written.dataobj, expected, rtol=1e-6)


def test_a_canonical_file_keeps_its_very_affine(tmp_path: Path) -> None:
    affine = np.array([[2, 0.1, 0, -90], [-0.1, 2, 0, -126], [0, 0, 3, -72], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(values((8, 9, 10)), affine), tmp_path / "in.nii.gz")
    volume = read_volume(tmp_path / "in.nii.gz")
    write_nifti(tmp_path / "out.nii", volume, read_affine(tmp_path / "in.nii.gz"))
    written = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "in.nii.gz").affine)
    assert written.shape == (8, 9, 10)


def test_nifti_without_orientation_claims_none(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii", values(), None, (5.0, 1.5, 0.5))
    image = nibabel.load(tmp_path / "a.nii")
    assert image.header.get_zooms() == (0.5, 1.5, 5.0)
    assert (image.get_sform(coded=True)[1], image.get_qform(coded=True)[1]) == (0, 0)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=IN_FOLDER)
@given(affine=affines(), peak=st.floats(1e-12, 1e12))
def test_dicom_keeps_place_and_scale(
    affine: np.ndarray, peak: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dicom")
    volume = values().astype(np.float64) * peak
    write_dicom(folder, volume, scan(affine), "test")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["0001.dcm", "0002.dcm", "0003.dcm"]
    images = [pydicom.dcmread(file) for file in files]
    for number, image in enumerate(images):
        found = image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept)
        np.testing.assert_allclose(found, volume[number], atol=volume.max() / 65535)
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


def test_dicom_claims_no_place_that_is_not_known(tmp_path: Path) -> None:
    write_dicom(tmp_path, values(), scan(None, (5.0, 1.5, 0.5)), "test")
    image = pydicom.dcmread(tmp_path / "0001.dcm")
    assert image.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert "ImagePositionPatient" not in image
    assert [float(x) for x in image.PixelSpacing] == [1.5, 0.5]
    assert float(image.SpacingBetweenSlices) == 5


def test_dicom_claims_no_place_for_a_sheared_grid(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.2
    write_dicom(tmp_path, values(), scan(affine), "test")
    assert "ImageOrientationPatient" not in pydicom.dcmread(tmp_path / "0001.dcm")


def test_the_same_volume_gets_the_same_identifiers(tmp_path: Path) -> None:
    series, other = [], values()
    other[-1, -1, -1] /= 2
    for name, given_values in [("a", values()), ("b", values()), ("c", other)]:
        (tmp_path / name).mkdir()
        write_dicom(tmp_path / name, given_values, scan(np.eye(4)), "test")
        series.append(pydicom.dcmread(tmp_path / name / "0002.dcm").SOPInstanceUID)
    assert series[0] == series[1] != series[2]


def test_an_empty_reconstruction_is_written_too(tmp_path: Path) -> None:
    write_dicom(tmp_path, np.zeros(SHAPE), scan(np.eye(4)), "test")
    assert not pydicom.dcmread(tmp_path / "0001.dcm").pixel_array.any()


def test_scans_carry_their_affine(tmp_path: Path) -> None:
    affine = np.diag([3.0, -2.0, 1.0, 1.0])
    write_scan(tmp_path / "s.h5", scan(affine))
    again = read_scan(tmp_path / "s.h5")
    np.testing.assert_array_equal(again.affine, affine)
    assert again.spacing == (3, 2, 1)


def test_spacing_is_read_from_the_header_of_fastmri(tmp_path: Path) -> None:
    write_scan(tmp_path / "s.h5", scan(None, (5.0, 1.5, 0.5)))
    header = read_scan(tmp_path / "s.h5").header
    write_scan(tmp_path / "t.h5", replace(scan(None), header=header))
    assert read_scan(tmp_path / "t.h5").spacing == pytest.approx((5.0, 1.5, 0.5))


def test_a_part_lies_where_it_lay_in_the_whole() -> None:
    affine = np.array([[1, 2, 0, 5], [0, 3, 1, 6], [2, 0, 4, 7], [0, 0, 0, 1.0]])
    part = shifted(affine, slices=2, rows=3, columns=4)
    np.testing.assert_array_equal(part @ [1, 1, 1, 1], affine @ [3, 4, 5, 1])
