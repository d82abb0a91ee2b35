"""Zero-filled and wavelet reconstruction."""

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.classical.common import noise_level, zero_filled
from nirvana.mri.classical.espirit import espirit_maps
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.coils import coil_maps
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import calibration_width, sampling_mask

SETTINGS = Simulation(noise=(0.004, 0.004))


@pytest.fixture(scope="module")
def scan(head_slices: np.ndarray):
    return simulate_scan(head_slices[1:3], "head", 0, SETTINGS)


@pytest.fixture(scope="module")
def mask() -> np.ndarray:
    return sampling_mask("equispaced", 128, 4, 0.08, seed=0).numpy()


@pytest.fixture(scope="module")
def wavelet(scan, mask: np.ndarray) -> np.ndarray:
    return l1_wavelet(scan.kspace * mask, mask, calibration_width(mask), workers=1)


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
    volume = sense(scan.kspace * mask, mask, calibration_width(mask), workers=1)
    empty, regularised = (
        score(scan.target, zero_filled(scan.kspace, mask)),
        score(scan.target, wavelet),
    )
    assert empty["psnr"] + 2 < score(scan.target, volume)["psnr"] < regularised["psnr"]
    # All of k-space, which needs no model, comes back as it was.
    full = np.ones_like(mask)
    whole = sense(scan.kspace, full, calibration_width(full), workers=1)
    np.testing.assert_allclose(whole, scan.target, atol=1e-4)


def test_wavelet_in_processes_equals_wavelet_here(
    scan, mask: np.ndarray, wavelet: np.ndarray
) -> None:
    done: list[int] = []
    parallel = l1_wavelet(
        scan.kspace,
        torch.from_numpy(mask),
        calibration_width(mask),
        workers=2,
        progress=done.append,
    )
    np.testing.assert_allclose(parallel, wavelet, atol=1e-5 * wavelet.max())
    assert done == [1, 1]


def test_wavelet_is_equivariant_to_scale(scan, mask: np.ndarray, wavelet: np.ndarray) -> None:
    scaled = l1_wavelet(scan.kspace[:1] * 1e-4, mask, calibration_width(mask), workers=1)
    alone = l1_wavelet(scan.kspace[:1], mask, calibration_width(mask), workers=1)
    np.testing.assert_allclose(scaled * 1e4, alone, atol=1e-3 * alone.max())


def test_with_full_sampling_wavelet_returns_the_image(scan) -> None:
    everything = np.ones(128, dtype=bool)
    image = l1_wavelet(scan.kspace[:1], everything, 128, workers=1)
    np.testing.assert_allclose(image, scan.target[:1], atol=1e-5)


def test_wavelet_needs_calibration_columns(scan, mask: np.ndarray) -> None:
    with pytest.raises(InputError, match="middle of k-space"):
        l1_wavelet(scan.kspace, mask, 0, workers=1)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_few_calibration_columns_are_enough_to_run(scan, width: int) -> None:
    maps = espirit_maps(scan.kspace[0], width)
    norm = np.linalg.norm(maps, axis=0)
    assert (np.isclose(norm, 1, atol=1e-4) | (norm == 0)).all()


def test_espirit_finds_the_sensitivities(head_slices: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(1)
    true = coil_maps(1, 8, (96, 128), generator, Simulation(birdcage=1.0), torch.device("cpu"))[0]
    kspace = fft2c(true * torch.from_numpy(head_slices[1])).numpy()
    maps = espirit_maps(kspace, 24)
    inside = head_slices[1] > 0.3
    agreement = np.abs((maps.conj() * true.numpy()).sum(axis=0))[inside]
    assert np.median(agreement) > 0.998
    assert np.quantile(agreement, 0.05) > 0.98


def test_the_noise_level_is_found(mask: np.ndarray) -> None:
    generator = np.random.default_rng(0)
    shape = (2, 4, 96, 128)
    noise = 0.3 * (generator.standard_normal(shape) + 1j * generator.standard_normal(shape))
    assert noise_level(noise * mask, mask) == pytest.approx(0.3, rel=0.05)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="slices, coils"):
        zero_filled(np.zeros((4, 16, 16), np.complex64), np.ones(16, bool))
