"""GRAPPA, and every method on every form of sampling pattern."""

from dataclasses import replace

import numpy as np
import pytest

from helpers.small_codec import small_config
from nirvana.errors import InputError
from nirvana.mri.classical.bart import bart_pics
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.grappa import grappa
from nirvana.mri.classical.peers import GrappaSettings
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan
from nirvana.mri.methods import Method, classical_method, codec_method, fourier_method
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.masks import sampling_mask

from .test_bart import needs_bart


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray) -> Scan:
    settings = Simulation(noise=(0.002, 0.002))
    return simulate_scan(head_slices[1:3, :, ::2], "head", 0, settings)


MASK = sampling_mask("equispaced", 64, 3, 0.16, seed=0).numpy()


def images(method: Method, acquisition: Acquisition) -> np.ndarray:
    return np.stack([image.magnitude for image in method(acquisition)])


def psnr(scan: Scan, found: np.ndarray) -> float:
    assert scan.target is not None
    return score(scan.target, found)["psnr"]


def by_grappa(acquisition: Acquisition):
    return grappa(acquisition, workers=1)


def test_grappa_is_better_than_zero_filled(scan: Scan) -> None:
    found = images(classical_method(by_grappa), Acquisition(scan.kspace, MASK))
    assert psnr(scan, found) > psnr(scan, zero_filled(scan.kspace, MASK)) + 3


def test_measured_samples_stay_and_scale_does_not_matter(scan: Scan) -> None:
    acquisition = Acquisition(scan.kspace, MASK)
    small = grappa(replace(acquisition, kspace=1e-6 * scan.kspace), GrappaSettings(), workers=1)
    for filled, scaled, kspace in zip(
        grappa(acquisition, GrappaSettings(), workers=1), small, scan.kspace, strict=True
    ):
        assert np.array_equal(filled[..., MASK], kspace[..., MASK])
        assert filled[..., ~MASK].any()
        np.testing.assert_allclose(scaled * 1e6, filled, atol=1e-3 * np.abs(filled).max())


def test_an_empty_slice_stays_empty(scan: Scan) -> None:
    kspace = np.stack([scan.kspace[0], 0 * scan.kspace[0]])
    assert not images(classical_method(by_grappa), Acquisition(kspace, MASK))[1].any()


def _codec() -> Method:
    import torch

    torch.manual_seed(0)
    return codec_method(CodecModel(small_config("none"), None).eval(), 1)


METHODS = [
    pytest.param(fourier_method, id="zero-filled"),
    pytest.param(classical_method(lambda a: sense(a, workers=1)), id="sense"),
    pytest.param(classical_method(lambda a: l1_wavelet(a, workers=1)), id="l1-wavelet"),
    pytest.param(classical_method(by_grappa), id="grappa"),
    pytest.param(classical_method(bart_pics), id="bart", marks=needs_bart),
    pytest.param(_codec(), id="codec"),
]


@pytest.mark.parametrize("method", METHODS)
def test_points_of_whole_columns_are_columns(scan: Scan, method: Method) -> None:
    """Masks `[H, W]`, `[slices, 1, W]` and `[slices, H, W]` that are constant along H."""
    expected = images(method, Acquisition(scan.kspace, MASK))
    for shape in ((96, 64), (2, 1, 64), (2, 96, 64)):
        found = images(method, Acquisition(scan.kspace, np.broadcast_to(MASK, shape)))
        np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max())


@pytest.mark.parametrize("method", METHODS)
def test_slices_may_have_patterns_of_their_own(scan: Scan, method: Method) -> None:
    other = sampling_mask("random", 64, 3, 0.16, seed=1).numpy()
    both = images(method, Acquisition(scan.kspace, np.stack([MASK, other])[:, None]))
    for index, mask in enumerate((MASK, other)):
        # A codec and the wavelet's weight take the brightness of the whole scan.
        acquisition = Acquisition(scan.kspace[[index, index]], mask)
        vars(acquisition)["scale"] = Acquisition(
            scan.kspace, np.stack([MASK, other])[:, None]
        ).scale
        vars(acquisition)["noise"] = Acquisition(
            scan.kspace, np.stack([MASK, other])[:, None]
        ).noise
        alone = images(method, acquisition)[0]
        np.testing.assert_allclose(both[index], alone, atol=2e-3 * alone.max())


@pytest.mark.parametrize("method", METHODS[1:5])
def test_single_points_are_reconstructed(scan: Scan, method: Method) -> None:
    """Every second point along both axes, and a full middle."""
    points = np.zeros((96, 64), bool)
    points[::2, ::2] = points[36:60, 20:44] = True
    empty = psnr(scan, zero_filled(scan.kspace, points))
    assert psnr(scan, images(method, Acquisition(scan.kspace, points))) > empty + 3


@pytest.mark.parametrize("method", METHODS[1:])
def test_a_separate_scan_calibrates_and_leaves_no_sample(scan: Scan, method: Method) -> None:
    """Its contrast is another one and its scale a hundred times larger."""
    every_third = np.arange(64) % 3 == 1
    inverted = simulate_scan(1 - scan.target, "reference", 0, Simulation(noise=(0, 0)))  # type: ignore[operator]
    reference = 100 * inverted.kspace[:, :, 36:60, 20:44]
    acquisition = Acquisition(scan.kspace, every_third, reference=reference)
    found = images(method, acquisition)
    own = Acquisition(scan.kspace, every_third | (np.abs(np.arange(64) - 32) < 12))
    empty = psnr(scan, zero_filled(scan.kspace, every_third))
    if method is not METHODS[-1].values[0]:  # a codec of random weights
        assert psnr(scan, found) > empty + 2
        assert psnr(scan, found) < psnr(scan, images(method, own))
    assert found.max() < 2 * scan.target.max()  # type: ignore[union-attr]


@pytest.mark.parametrize("method", METHODS[1:])
def test_without_a_sampled_middle_there_is_one_clear_line(scan: Scan, method: Method) -> None:
    with pytest.raises(InputError, match="0 contiguous columns in the middle"):
        images(method, Acquisition(scan.kspace, np.arange(64) % 2 == 1))
