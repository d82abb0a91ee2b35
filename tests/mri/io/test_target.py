"""Targets are compared with the images of their k-space, and on its scale."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from helpers.phantom import combined, head
from nirvana.errors import InputError
from nirvana.mri.io import Scan, read_scan
from nirvana.mri.physics.masks import sampling_mask

H, W = 80, 96


@pytest.fixture(scope="module")
def kspace() -> np.ndarray:
    return head(3, 4, H, W)


def read(folder: Path, kspace: np.ndarray, **targets: np.ndarray) -> Scan:
    with h5py.File(folder / "s.h5", "w") as file:
        file["kspace"] = kspace
        for name, values in targets.items():
            file[f"reconstruction_{name}"] = values
    return read_scan(folder / "s.h5")


@pytest.mark.parametrize("scale", [1e-6, 0.5, 1.1, 3.0, 1e6])
def test_another_scale_is_stated_and_undone(
    scale: float, kspace: np.ndarray, tmp_path: Path
) -> None:
    images = combined(kspace)[:, 8:72, 8:88]
    scan = read(tmp_path, kspace, rss=(scale * images).astype(np.float32))
    np.testing.assert_allclose(scan.target, images, rtol=1e-5)
    assert scan.remarks == (f"the target has another scale and was multiplied by {1 / scale:.4g}",)


def test_the_same_scale_is_left_alone(kspace: np.ndarray, tmp_path: Path) -> None:
    images = combined(kspace).astype(np.float32)
    scan = read(tmp_path, kspace, rss=images)
    np.testing.assert_array_equal(scan.target, images)
    assert not scan.remarks


@pytest.mark.parametrize("kind", ["equispaced", "random"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_scale_of_undersampled_scans(
    kind: str, scale: float, kspace: np.ndarray, tmp_path: Path
) -> None:
    """The middle of k-space shows the scale within a few hundredths."""
    mask = sampling_mask(kind, W, 4, 0.16, seed=0).numpy()  # type: ignore[arg-type]
    images = combined(kspace)
    scan = read(tmp_path, kspace * mask, rss=(scale * images).astype(np.float32))
    assert scan.target is not None
    ratio = scan.target / images.astype(np.float32)
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-4)
    if scale == 1:
        np.testing.assert_array_equal(scan.target, images.astype(np.float32))
        assert not scan.remarks
    else:
        assert abs(ratio.mean() - 1) < 0.1
        assert "by the middle of k-space" in scan.remarks[0]


def test_another_image_is_not_used(kspace: np.ndarray, tmp_path: Path) -> None:
    other = np.random.default_rng(0).random((3, H, W)).astype(np.float32)
    scan = read(tmp_path, kspace, rss=other)
    assert scan.target is None
    assert "the target is not used" in scan.remarks[0]


def test_single_coil_scans_have_their_own_target(kspace: np.ndarray, tmp_path: Path) -> None:
    """fastMRI's single-coil files have both targets; the root sum of squares is of all coils."""
    single = kspace[:, 0]
    images = combined(kspace[:, :1]).astype(np.float32)
    scan = read(tmp_path, single, esc=images, rss=combined(kspace).astype(np.float32))
    np.testing.assert_array_equal(scan.target, images)
    assert not scan.remarks
    many = read(tmp_path, kspace, esc=images, rss=combined(kspace).astype(np.float32))
    np.testing.assert_array_equal(many.target, combined(kspace).astype(np.float32))


def test_targets_that_do_not_fit_are_refused(kspace: np.ndarray, tmp_path: Path) -> None:
    for wrong in (np.ones((2, H, W)), np.ones((3, H + 2, W)), np.ones((H, W))):
        with pytest.raises(InputError, match="the target has shape"):
            read(tmp_path, kspace, rss=wrong)
