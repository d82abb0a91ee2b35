"""Masks of points: their number, their central block, and how far apart a lattice lies."""

import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.physics.pattern import central_block
from nirvana.mri.physics.point_masks import POINT_KINDS, PointSampling, lattice


@pytest.mark.parametrize("kind", POINT_KINDS)
@pytest.mark.parametrize("size", [(96, 80), (65, 128)])
@pytest.mark.parametrize("acceleration", [4.0, 8.0])
def test_a_mask_has_its_share_of_points_and_its_central_block(kind, size, acceleration):
    mask, centre = PointSampling(kind, acceleration).mask(size, seed=3)
    found = [PointSampling(kind, acceleration).mask(size, seed)[0] for seed in range(12)]
    assert torch.equal(mask, found[3])
    assert len({each.numpy().tobytes() for each in found}) >= 3
    assert mask.shape == size
    assert mask[centre].all()
    sides = [max(8, round(0.1 * side)) for side in size]
    rows, columns = central_block(mask.numpy(), size[0])
    assert centre.sum() == sides[0] * sides[1]
    assert centre[size[0] // 2, size[1] // 2]
    # The calibration of an inference finds this block, or a little more by chance.
    assert mask[rows, columns].all()
    assert mask[rows, columns].numel() >= centre.sum()
    if kind == "random":
        assert mask.sum() == round(size[0] * size[1] / acceleration)
    else:
        outside = mask[~centre].float().mean()
        assert abs(outside - 1 / acceleration) < 0.01


def test_random_points_are_denser_near_the_centre():
    mask, centre = PointSampling("random", 8.0).mask((128, 128), seed=0)
    near = torch.zeros_like(mask)
    near[40:88, 40:88] = True
    assert mask[near & ~centre].float().mean() > 3 * mask[~near].float().mean()


@pytest.mark.parametrize(("spacing", "square"), [(1, 1), (4, 4), (5, 5), (8, 8), (9, 9)])
def test_points_of_a_lattice_lie_as_far_apart_as_possible(spacing, square):
    points = lattice((40, 40), spacing, torch.Generator().manual_seed(1)).nonzero().float()
    distances = torch.cdist(points, points).square().round()
    distances.fill_diagonal_(torch.inf)
    assert distances.min() == square
    assert abs(len(points) - 1600 / spacing) < 40


@pytest.mark.parametrize(
    ("sampling", "size", "message"),
    [
        (PointSampling("spiral"), (64, 64), "points 'spiral' are unknown"),
        (PointSampling("random", 0.5), (64, 64), "acceleration 0.5 is not possible"),
        (PointSampling("random", 8.0), (16, 16), "fewer than the 8 x 8"),
        (PointSampling("lattice", 1.0), (4, 64), "fewer than the 8 x 8"),
    ],
)
def test_impossible_masks_are_refused(sampling, size, message):
    with pytest.raises(InputError, match=message):
        sampling.mask(size, 0)
