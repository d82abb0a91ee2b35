"""Zero-filled and wavelet reconstruction."""

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.espirit import espirit_maps
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.coils import coil_maps
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.methods import classical_method
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import sampling_mask

SETTINGS = Simulation(noise=(0.004, 0.004))


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray):
    return simulate_scan(head_slices[1:3], "head", 0, SETTINGS)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return sampling_mask("equispaced", 128, 4, 0.08, seed=0).numpy()


def images(method, kspace: np.ndarray, mask: np.ndarray, workers: int = 1) -> np.ndarray:
    """The magnitude images of a method, `[slices, H, W]`."""
    by_slice = classical_method(lambda acquisition: method(acquisition, workers=workers))
    return np.stack([image.magnitude for image in by_slice(Acquisition(kspace, mask))])


@pytest.fixture(scope="module")
def wavelet(scan, mask: np.ndarray) -> np.ndarray:
    return images(l1_wavelet, scan.kspace * mask, mask)


def test_zero_filled_is_the_rss_of_what_was_measured(scan, mask: np.ndarray) -> None:
    kspace = torch.from_numpy(scan.kspace)
    expected = rss(ifft2c(kspace * torch.from_numpy(mask)))
    np.testing.assert_allclose(zero_filled(scan.kspace, mask), expected.numpy(), atol=1e-5)
    # Tensors are accepted, and columns outside the mask have no effect.
    tensors = zero_filled(kspace, torch.from_numpy(mask))
    np.testing.assert_array_equal(tensors, zero_filled(scan.kspace * mask, mask))


def test_wavelet_is_better_than_zero_filled(scan, mask: np.ndarray, wavelet: np.ndarray) -> None:
    before = score(scan.target, zero_filled(scan.kspace, mask))
    after = score(scan.target, wavelet)
    assert wavelet.dtype == np.float32
    assert after["psnr"] > before["psnr"] + 4
    assert after["ssim"] > before["ssim"] + 0.1


def test_sense_lies_between(scan, mask: np.ndarray, wavelet: np.ndarray) -> None:
    volume = images(sense, scan.kspace * mask, mask)
    empty, regularised = (
        score(scan.target, zero_filled(scan.kspace, mask)),
        score(scan.target, wavelet),
    )
    assert empty["psnr"] + 2 < score(scan.target, volume)["psnr"] < regularised["psnr"]
    # All of k-space, which needs no model, comes back as it was.
    full = np.ones_like(mask)
    whole = images(sense, scan.kspace, full)
    np.testing.assert_allclose(whole, scan.target, atol=1e-4)


def test_wavelet_in_processes_equals_wavelet_here(
    scan, mask: np.ndarray, wavelet: np.ndarray
) -> None:
    parallel = images(l1_wavelet, scan.kspace, mask, workers=2)
    np.testing.assert_allclose(parallel, wavelet, atol=1e-5 * wavelet.max())


def test_wavelet_is_equivariant_to_scale(scan, mask: np.ndarray) -> None:
    scaled = images(l1_wavelet, scan.kspace[:1] * 1e-4, mask)
    alone = images(l1_wavelet, scan.kspace[:1], mask)
    np.testing.assert_allclose(scaled * 1e4, alone, atol=1e-3 * alone.max())


def test_with_full_sampling_wavelet_returns_the_image(scan) -> None:
    image = images(l1_wavelet, scan.kspace[:1], np.ones(128, dtype=bool))
    np.testing.assert_allclose(image, scan.target[:1], atol=1e-5)


def test_wavelet_needs_calibration_columns(scan, mask: np.ndarray) -> None:
    without = mask & (np.arange(128) != 64)
    with pytest.raises(InputError, match="0 contiguous columns in the middle of k-space"):
        images(l1_wavelet, scan.kspace, without)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_few_calibration_columns_are_enough_to_run(scan, width: int) -> None:
    first = 64 - width // 2
    maps = espirit_maps(scan.kspace[0, :, :, first : first + width], (96, 128))
    norm = np.linalg.norm(maps, axis=0)
    assert (np.isclose(norm, 1, atol=1e-4) | (norm == 0)).all()


def test_espirit_finds_the_sensitivities(head_slices: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(1)
    true = coil_maps(1, 8, (96, 128), generator, Simulation(birdcage=1.0), torch.device("cpu"))[0]
    kspace = fft2c(true * torch.from_numpy(head_slices[1])).numpy()
    maps = espirit_maps(kspace[:, :, 52:76], (96, 128))
    inside = head_slices[1] > 0.3
    agreement = np.abs((maps.conj() * true.numpy()).sum(axis=0))[inside]
    assert np.median(agreement) > 0.998
    assert np.quantile(agreement, 0.05) > 0.98


def test_the_noise_level_is_found(mask: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    shape = (2, 4, 96, 128)
    noise = 0.3 * (generator.standard_normal(shape) + 1j * generator.standard_normal(shape))
    assert Acquisition(noise, mask).noise == pytest.approx(0.3, rel=0.05)
    points = generator.random((96, 128)) < 0.3
    assert Acquisition(noise, points).noise == pytest.approx(0.3, rel=0.05)
