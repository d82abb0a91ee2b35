"""What the simulator promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.data.simulate import simulate, simulate_scan
from nirvana.mri.data.simulation.coils import coil_maps
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.physics.fourier import ifft2c, rss

CLEAN = Simulation(gamma=(1, 1), noise=(0, 0))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images(head_slices: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(head_slices)


@pytest.mark.parametrize("birdcage", [0.0, 1.0])
@pytest.mark.parametrize("coils", [1, 4, 15])
def test_without_noise_the_rss_image_is_the_image(
    images: torch.Tensor, coils: int, birdcage: float
) -> None:
    kspace = simulate(images, _generator(), replace(CLEAN, birdcage=birdcage), coils)
    assert kspace.dtype == torch.complex64
    assert kspace.shape == (len(images), coils, *images.shape[1:])
    torch.testing.assert_close(rss(ifft2c(kspace)), images, atol=1e-5, rtol=0)


def test_raw_coils_shade_the_image(images: torch.Tensor) -> None:
    kspace = simulate(images, _generator(), replace(CLEAN, shading=1.0))
    shading = rss(ifft2c(kspace))[images > 0.2] / images[images > 0.2]
    assert shading.std() > 0.02


@pytest.mark.parametrize("volume", [False, True])
def test_a_seed_determines_everything(images: torch.Tensor, volume: bool) -> None:
    first, again, other = (simulate(images, _generator(seed), volume=volume) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_volume_shares_its_coils_and_phase(images: torch.Tensor) -> None:
    same = images[:1].expand(3, -1, -1)
    together = simulate(same, _generator(), CLEAN, volume=True)
    slices = simulate(same, _generator(), CLEAN)
    torch.testing.assert_close(together[0], together[2])
    assert not torch.allclose(slices[0], slices[2])
    noisy = simulate(same, _generator(), replace(CLEAN, noise=(0.01, 0.01)), volume=True)
    assert not torch.allclose(noisy[0], noisy[2])


def test_noise_has_the_requested_standard_deviation(images: torch.Tensor) -> None:
    bright = images * torch.tensor([1.0, 0.5, 0.5, 0.5])[:, None, None]
    noisy = replace(CLEAN, noise=(0.05, 0.05))
    for volume in (False, True):
        # The noise is drawn last, so the same seed gives the same scan without it.
        noise = simulate(bright, _generator(), noisy, volume=volume) - simulate(
            bright, _generator(), CLEAN, volume=volume
        )
        peaks = bright.amax() if volume else bright.amax(dim=(1, 2))
        expected = (0.05 * peaks).expand(len(bright))
        torch.testing.assert_close(noise.real.std(dim=(1, 2, 3)), expected, rtol=0.02, atol=0)
        torch.testing.assert_close(noise.imag.std(dim=(1, 2, 3)), expected, rtol=0.02, atol=0)


def test_gamma_changes_the_contrast(images: torch.Tensor) -> None:
    kspace = simulate(images, _generator(), replace(CLEAN, gamma=(1.3, 1.3)))
    torch.testing.assert_close(rss(ifft2c(kspace)), images**1.3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("birdcage", [0.0, 1.0])
def test_coils_are_smooth_and_differ(birdcage: float) -> None:
    maps = coil_maps(
        6, 8, (128, 96), _generator(), replace(CLEAN, birdcage=birdcage), torch.device("cpu")
    )
    # Away from the corners, where a conductor may lie, neighbours differ by a few percent.
    inner = maps[..., 24:-24, 16:-16]
    assert (inner.diff(dim=-1).abs().amax(dim=1) < 0.2).all()
    assert (inner.diff(dim=-2).abs().amax(dim=1) < 0.2).all()
    overlap = (maps[:, 0].conj() * maps[:, 1]).abs().mean(dim=(-2, -1))
    norms = (maps[:, :2].abs() ** 2).mean(dim=(-2, -1)).prod(dim=1).sqrt()
    assert (overlap <= norms * 1.0001).all()
    assert not torch.allclose(maps[0], maps[1], atol=0.1)


def test_a_simulated_scan_is_scored_against_its_own_rss(head_slices: np.ndarray) -> None:
    scan = simulate_scan(head_slices, "head", seed=3, spacing=(3.0, 2.0, 2.0))
    assert scan.target is not None
    torch.testing.assert_close(
        rss(ifft2c(torch.from_numpy(scan.kspace))), torch.from_numpy(scan.target)
    )
    assert (scan.name, scan.spacing, scan.mask) == ("head", (3.0, 2.0, 2.0), None)


@pytest.mark.parametrize(
    "wrong",
    [{"num_coils": 0}, {"noise": (0.1, 0.01)}, {"noise": (0.0, 0.1)}, {"gamma": (0.0, 1.0)}],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Simulation(**wrong)
