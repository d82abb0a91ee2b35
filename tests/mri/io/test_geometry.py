"""Where voxels lie, and what they weigh, from file to file."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from helpers.geometry import affines, by_place, places
from nirvana.mri.io import (
    Scan,
    in_file_axes,
    read_affine,
    read_scan,
    read_spacing,
    read_volume,
    write_nifti,
    write_scan,
)
from nirvana.mri.io.geometry import shifted, spacing_of

SHAPE = (3, 9, 11)  # slices, rows, columns
IN_FOLDER = [HealthCheck.function_scoped_fixture]


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def scan(affine: np.ndarray | None, spacing: tuple[float, float, float] | None = None) -> Scan:
    kspace = values((SHAPE[0], 1, *SHAPE[1:])).astype(np.complex64)
    return Scan(kspace, None, None, "head", spacing, affine=affine)


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


def test_nifti_without_orientation_stays_without(tmp_path: Path) -> None:
    data = values((8, 9, 10))
    image = nibabel.Nifti1Image(data, None)
    image.header.set_zooms((0.5, 1.5, 5.0))
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    assert read_affine(tmp_path / "in.nii") is None
    assert read_spacing(tmp_path / "in.nii") == (5.0, 1.5, 0.5)
    write_nifti(tmp_path / "out.nii", volume, None, (5.0, 1.5, 0.5))
    written = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_allclose(written.dataobj, data / data.max(), rtol=1e-6)
    assert written.header.get_zooms() == (0.5, 1.5, 5.0)
    assert (written.header["sform_code"], written.header["qform_code"]) == (0, 0)


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


def test_images_turn_back_to_the_axes_of_their_file() -> None:
    affine = np.array([[0, 2, 0.1, 5], [0, 0.1, 3, 6], [4, 0, 0, 7], [0, 0, 0, 1.0]])
    volume = values()
    given = scan(affine, (4.0, 2.0, 3.0))
    same, spacing, grid = in_file_axes(volume, given)
    assert same is volume
    assert (spacing, grid) == (given.spacing, given.affine)
    turned, spacing, grid = in_file_axes(volume, replace(given, phase_encode="rows"))
    assert turned.shape == (3, 11, 9)
    assert spacing == (4.0, 3.0, 2.0)
    assert grid is not None
    found_places, found_values = by_place(places(grid, turned.shape), turned)
    given_places, given_values = by_place(places(affine, SHAPE), volume)
    np.testing.assert_allclose(found_places, given_places)
    np.testing.assert_array_equal(found_values, given_values)
    assert in_file_axes(volume, replace(scan(None), phase_encode="rows"))[1:] == (None, None)
