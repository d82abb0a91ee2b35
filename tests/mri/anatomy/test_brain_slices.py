"""Slices of volumes that can carry lesions: which are left out, and where the others lie."""

import math

import nibabel
import numpy as np
import pytest
import torch

from nirvana import InputError
from nirvana.mri.anatomy.brain_slices import GRID, PIXEL, slices_of


def brain(path, bottom, thickness, count, cut):
    """A stripped brain of 160 x 130 x 120 mm around the origin whose brightness encodes the height,
    100 of it up to 200 mm; what lies above `cut` mm is missing."""
    x, y = (np.arange(-n, n + 1, 2.0) for n in (80, 100))
    z = bottom + thickness * np.arange(count)
    inside = (x[:, None, None] / 65) ** 2 + (y[:, None] / 80) ** 2 + (z / 60) ** 2 < 1
    data = np.where(inside & (z < cut), 100 + z, 0).astype(np.float32)
    data[0, 0, 0] = 200.0  # the brightest: read volumes are divided by it
    affine = np.diag([2.0, 2.0, thickness, 1.0])
    affine[:3, 3] = (x[0], y[0], bottom)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


@pytest.fixture
def volumes(tmp_path):
    """One head in two sequences, of other slices and another frame: the second misses its top."""
    first = brain(tmp_path / "first.nii.gz", -69.0, 3.0, 47, 100.0)
    return first, brain(tmp_path / "second.nii.gz", -80.0, 2.0, 75, 45.0)


def heights(slices):
    """mm, of each slice."""
    tissue = torch.where(slices.depth > 6, slices.images.float(), torch.nan)
    return tissue.flatten(1).nanmedian(1).values / 255 * 200 - 100


def test_the_same_height_is_left_out_of_every_sequence(volumes):
    for path in volumes:
        whole = heights(slices_of(path, "T1", "a", stripped=True))
        assert whole.min() < 0 < 20 < whole.max()
        kept = heights(slices_of(path, "T1", "a", stripped=True, without=[(0.0, 20.0)]))
        left_out = (kept > 1.5) & (kept < 18.5)  # a brightness is rounded by 0.8 mm
        assert not left_out.any()
        expected = whole[(whole < -1.5) | (whole > 21.5)]
        assert torch.isin(expected, kept).all()


def test_slices_lie_on_the_grid_with_the_brain_in_the_middle(volumes):
    slices = slices_of(volumes[0], "FLAIR", "a", stripped=True)
    assert slices.images.shape[1:] == GRID
    column, row, half_width, half_length, w, _ = slices.frame.unbind(1)
    assert torch.allclose(column, torch.full_like(column, (GRID[1] - 1) / 2))
    assert torch.allclose(row, torch.full_like(row, (GRID[0] - 1) / 2))
    assert ((half_width * PIXEL - 65).abs() < 3).all()
    assert ((half_length * PIXEL - 80).abs() < 3).all()
    # w counts from the top, in lengths of the brain, and so do heights.
    assert torch.allclose(heights(slices), 60 - 160 * w, atol=4.0)


def test_marked_slices_are_left_out(volumes, tmp_path):
    image = nibabel.load(volumes[0])
    marked = np.zeros(image.shape, dtype=np.uint8)
    marked[35:45, 45:55, 25] = 1  # at 6 mm
    nibabel.save(nibabel.Nifti1Image(marked, image.affine), tmp_path / "mask.nii.gz")
    whole = slices_of(volumes[0], "T1", "a", stripped=True)
    kept = slices_of(volumes[0], "T1", "a", stripped=True, lesions=tmp_path / "mask.nii.gz")
    gone = heights(whole)[~torch.isin(heights(whole), heights(kept))]
    assert len(gone) > 0
    assert ((gone - 6).abs() < 1.5).all()


@pytest.mark.parametrize("pitch", [-12.0, 8.0])
def test_a_head_that_nods_is_cut_at_an_angle(volumes, pitch):
    """With its front down, a slice shows there what was higher."""
    slices = slices_of(volumes[0], "T1", "a", stripped=True, pitch=pitch)
    middle = GRID[1] // 2
    rows, checked = round(30 / PIXEL), 0
    for image, frame in zip(slices.images, slices.frame, strict=True):
        row = round(frame[1].item())
        front, back = (image[row + step, middle].item() / 255 * 200 for step in (-rows, rows))
        if min(front, back) > 50:  # within the brain
            assert front - back == pytest.approx(60 * math.sin(math.radians(pitch)), abs=3)
            checked += 1
    assert checked > 5
    # The lobes are those of the unpitched brain, where brightness encodes the height.
    view = slices.views(torch.arange(len(slices)), torch.Generator(), vary=False)
    inside = view.depth > 8
    error = (60 - (200 * view.images - 100)) / 160 - view.w
    assert error[inside].abs().mean() < 0.02
    assert (view.w.amax((1, 2)) - view.w.amin((1, 2))).min() > 0.1
    # It is turned, not bent: as long and as wide as it was, but for the tilt of the ellipsoid.
    assert ((slices.frame[:, 2] * PIXEL - 65).abs() < 3).all()


def test_a_volume_without_the_top_of_the_brain(volumes):
    """The second volume ends 17 mm below the first one's top; with that given, depths agree."""
    whole = slices_of(volumes[0], "T1", "a", stripped=True)
    cut = slices_of(volumes[1], "T1", "a", stripped=True, above=17.0)
    step = torch.cdist(heights(cut)[:, None], heights(whole)[:, None]).min(1)
    same = step.values < 1.5
    assert same.sum() > 10
    depths = whole.frame[step.indices, 4]
    assert (cut.frame[same, 4] - depths[same]).abs().max() < 0.04  # 6 mm


def test_heights_of_a_head_that_nods_are_refused(volumes):
    with pytest.raises(InputError, match="only defined without a pitch"):
        slices_of(volumes[0], "T1", "a", stripped=True, without=[(0.0, 1.0)], pitch=5.0)


def test_a_volume_without_a_slice_left_is_refused(volumes):
    with pytest.raises(InputError, match=r"first.nii.gz has no slice without a known lesion"):
        slices_of(volumes[0], "T1", "a", stripped=True, without=[(-200.0, 200.0)])
