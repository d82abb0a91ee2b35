"""Batches: one mask for all slices or one for each, parts, scales."""

import pytest
import torch

from nirvana.mri.data.batch import MriBatch, draw_masks
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling, calibration_columns
from nirvana.mri.physics.point_masks import PointSampling


@pytest.fixture
def full() -> MriBatch:
    kspace = torch.randn(4, 2, 24, 32, dtype=torch.complex64)
    return MriBatch.fully_sampled(kspace, reports=("a", "b", "c", "d"))


def test_a_shared_mask_is_a_mask_of_every_slice(full: MriBatch) -> None:
    mask = Sampling("random", 2.0, 0.2).mask(32, seed=1)
    calibration = calibration_columns(mask)
    shared = full.undersample(mask, calibration)
    separate = full.undersample(mask.expand(4, 32), calibration.expand(4, 32))
    assert torch.equal(shared.kspace, full.kspace * mask)
    assert torch.equal(shared.kspace, separate.kspace)
    assert torch.equal(shared.scale, separate.scale)
    assert torch.equal(shared.scale, rss(ifft2c(shared.kspace)).amax((1, 2)))
    assert torch.equal(shared.target, rss(ifft2c(full.kspace)))


def test_an_empty_slice_has_a_scale_above_zero(full: MriBatch) -> None:
    empty = MriBatch.fully_sampled(torch.zeros_like(full.kspace))
    masks = draw_masks([Sampling("random", 2, 0.2)], 4, (24, 32), torch.Generator().manual_seed(0))
    assert (empty.undersample(*masks).scale > 0).all()


def test_scales_are_raised_by_up_to_a_half(full: MriBatch) -> None:
    factors = torch.cat(
        [full.brighten(torch.Generator().manual_seed(seed)).scale for seed in range(50)]
    )
    assert 1 <= factors.min() < 1.05
    assert 1.45 < factors.max() <= 1.5


def test_parts_join_to_the_batch(full: MriBatch) -> None:
    parts = list(full.split(3))
    assert [len(part.kspace) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part.target for part in parts]), full.target)
    assert sum((part.reports for part in parts), ()) == full.reports
    assert all(torch.equal(part.mask, full.mask) for part in parts)
    masks = draw_masks([Sampling()], 4, (24, 32), torch.Generator().manual_seed(0))
    separate = full.undersample(*masks)
    with pytest.raises(ValueError, match="only a batch with one mask"):
        next(separate.split(3))


def test_masks_of_points_are_kept_by_slice(full: MriBatch) -> None:
    masks = draw_masks(
        [PointSampling("random", 2.0)], 4, (24, 32), torch.Generator().manual_seed(0)
    )
    assert all(mask.shape == (4, 24, 32) for mask in masks)
    assert len({mask.numpy().tobytes() for mask in masks[0]}) > 1
    batch = full.undersample(*masks)
    assert torch.equal(batch.kspace, full.kspace * masks[0][:, None])
    assert torch.equal(batch.mask, masks[0])
    padded = MriBatch.fully_sampled(full.kspace * (torch.arange(24)[:, None] > 3))
    assert not padded.undersample(*masks).mask[:, :4].any()


@pytest.mark.parametrize("sampling", [Sampling(), PointSampling("random", 2.0)])
def test_held_back_samples_and_the_input_are_the_measured(full: MriBatch, sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = full.undersample(*draw_masks([sampling], 4, (24, 32), generator))
    batch = whole.hold_back(0.4, generator)
    assert torch.equal(batch.kspace + batch.held_kspace, whole.kspace)
    assert torch.equal(batch.mask | batch.held, whole.mask)
    assert not (batch.mask & batch.held).any()
    assert not (batch.held & batch.calibration).any()
    assert batch.held.flatten(1).any(1).all()
    assert torch.equal(batch.inputs[0], batch.kspace)
    assert torch.equal(batch.target, whole.target)
    with pytest.raises(ValueError, match="masks of their own"):
        full.hold_back(0.4, generator)


def test_about_the_given_share_is_held_back() -> None:
    full = MriBatch.fully_sampled(torch.randn(8, 1, 24, 256, dtype=torch.complex64))
    generator = torch.Generator().manual_seed(0)
    whole = full.undersample(*draw_masks([Sampling()], 8, (24, 256), generator))
    held = whole.hold_back(0.3, generator).held
    share = held.sum() / (whole.mask & ~whole.calibration).sum()
    assert 0.2 < share < 0.4
