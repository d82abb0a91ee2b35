"""Each setting of the simulator does what its description states, and nothing at 0."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nirvana.errors import InputError
from nirvana.mri.data.simulate import simulate, simulate_scan
from nirvana.mri.data.simulation.acquisition import PARTIAL, fold, window
from nirvana.mri.data.simulation.coils import coil_maps, loop_maps, measured_maps, resized
from nirvana.mri.data.simulation.config import PROPERTIES, REALISTIC, SHARES, Simulation
from nirvana.mri.data.simulation.flow import pulsate, vessels
from nirvana.mri.data.simulation.noise import coil_noise_factor, mix, prewhiten
from nirvana.mri.data.simulation.phase import image_phase, ramp
from nirvana.mri.data.simulation.scalp import add_scalp
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss

CPU = torch.device("cpu")
FLAT = Simulation(gamma=(1, 1), noise=(0, 0), phase=(0, 0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def discs(count: int = 8, size: tuple[int, int] = (64, 48)) -> torch.Tensor:
    rows = torch.linspace(-1, 1, size[0])[:, None]
    columns = torch.linspace(-1, 1, size[1])
    image = ((rows / 0.8) ** 2 + (columns / 0.7) ** 2 < 1) * 0.5
    image = image + ((rows - 0.2) ** 2 + (columns + 0.1) ** 2 < 0.08) * 0.4
    return image.float().expand(count, -1, -1)


def test_realistic_differs_in_every_property_and_plain_in_none():
    assert set(PROPERTIES) >= {"fine_phase", "loops", "noise_correlation", "wrap", "ramp"}
    plain = replace(REALISTIC, **{name: getattr(Simulation(), name) for name in PROPERTIES})
    assert plain == Simulation()


@pytest.mark.parametrize("name", [*SHARES, "ramp", "noise_spread", "fine_phase"])
def test_values_out_of_range_are_refused(name):
    wrong = (0.5, 0.1) if name == "fine_phase" else -0.1
    with pytest.raises(InputError, match=name):
        Simulation(**{name: wrong})


@pytest.mark.parametrize("volume", [False, True])
def test_a_realistic_scan_is_a_function_of_its_seed(volume):
    images = discs(3)
    found = [simulate(images, generator(seed), REALISTIC, volume=volume) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert all(each.isfinite().all() for each in found)
    assert found[0].shape == (3, REALISTIC.num_coils, 64, 48)


def phase_of(settings: Simulation, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return image_phase(images, generator(seed), settings)


def test_the_fine_phase_has_the_requested_deviation():
    found = phase_of(replace(FLAT, fine_phase=(0.1, 0.1)), discs(200))
    assert 0.08 < found.square().mean().sqrt() < 0.12


def test_the_realistic_residual_phase_is_that_of_measured_heads():
    """After a low-pass of 8 x 8 samples: mean absolute 0.05 to 0.12 rad, some above 0.5."""
    images = discs(120, (96, 96))
    phase = phase_of(replace(REALISTIC, ramp=0.0, phase=(0.2, 1.0)), images)
    k = fft2c(torch.polar(images, phase))
    low = torch.zeros(96, 96)
    low[32:64, 32:64] = 1
    smooth = ifft2c(k * low)
    residual = (torch.polar(images, phase) * smooth.conj()).angle().abs()[images > 0.2]
    assert 0.03 < residual.mean() < 0.14
    assert 0.0005 < (residual > 0.5).float().mean() < 0.06


def test_the_tissue_phase_follows_the_anatomy():
    """Its deviation in the object is the requested one, and it changes with the brightness."""
    images = discs(100)
    found = phase_of(replace(FLAT, tissue_phase=(0.2, 0.2)), images)
    inside = images > 0.1 * images.amax()
    deviation = torch.stack(
        [f[i].square().mean().sqrt() for f, i in zip(found, inside, strict=True)]
    )
    torch.testing.assert_close(deviation, torch.full_like(deviation, 0.2), rtol=1e-3, atol=1e-4)
    assert phase_of(replace(FLAT, tissue_phase=(0.2, 0.2)), torch.zeros(2, 16, 16)).isfinite().all()


def test_fat_turns_the_brightest_tissue_alone():
    images = torch.zeros(300, 8, 8)
    images[:, :4], images[:, 4:6] = 0.2, 1.0
    found = phase_of(replace(FLAT, fat=0.5), images)
    turned = found[:, 5, 0].abs() > 0.05
    assert 0.4 < turned.float().mean() < 0.58
    assert found[:, 0, 0].abs().max() < 0.1


def test_cavities_have_the_field_of_dipoles():
    found = phase_of(replace(FLAT, cavity_phase=(1.0, 1.0)), torch.ones(50, 64, 64))
    assert 0.02 < found.abs().mean() < 1
    assert found.abs().amax() > 0.3


@pytest.mark.parametrize("seed", range(4))
def test_a_ramp_moves_the_centre_of_k_space(seed):
    """By at most that many samples, along both sides."""
    shifted = torch.polar(torch.ones(1, 64, 48), ramp(1, (64, 48), generator(seed), FLAT, CPU))
    assert fft2c(shifted)[0].abs().argmax() == 32 * 48 + 24
    settings = replace(FLAT, ramp=3.0)
    peaks = []
    for number in range(30):
        phase = ramp(1, (64, 48), generator(100 * seed + number), settings, CPU)
        peak = int(fft2c(torch.polar(torch.ones(1, 64, 48), phase))[0].abs().argmax())
        peaks.append((abs(peak // 48 - 32), abs(peak % 48 - 24)))
    assert np.max(peaks) == 3
    assert np.max(peaks, 0).min() >= 2


def test_noise_of_coils_is_correlated_and_of_unequal_strength():
    settings = replace(FLAT, noise_spread=0.2, noise_correlation=0.2)
    factor = coil_noise_factor(400, 8, generator(), settings)
    covariance = factor @ factor.mH
    power = covariance.diagonal(dim1=1, dim2=2).real
    torch.testing.assert_close(power.mean(1), torch.ones(400), rtol=1e-4, atol=1e-4)
    assert 0.15 < power.sqrt().log().std(dim=1).mean() < 0.25
    deviation = power.sqrt()
    correlation = covariance / (deviation[:, :, None] * deviation[:, None])
    off = ~torch.eye(8, dtype=torch.bool)
    found = correlation[:, off].abs().square().mean().sqrt()
    assert 0.15 < found < 0.25
    white = coil_noise_factor(5, 8, generator(), FLAT)
    torch.testing.assert_close(white.abs(), torch.eye(8).expand(5, -1, -1))


def test_the_noise_has_its_covariance_and_prewhitening_makes_it_white():
    settings = replace(FLAT, noise_spread=0.3, noise_correlation=0.3, prewhitened=1.0)
    factor = coil_noise_factor(1, 4, generator(), settings)
    white = torch.randn(1, 4, 100, 100, dtype=torch.complex64, generator=generator(1))
    noise = mix(factor, white)
    flat = noise.flatten(2)[0]
    found = flat @ flat.mH / flat.shape[1]
    torch.testing.assert_close(found, (factor @ factor.mH)[0], atol=0.06, rtol=0.06)
    torch.testing.assert_close(
        prewhiten(noise, factor, generator(), settings), white, atol=1e-4, rtol=1e-3
    )
    kept = prewhiten(noise, factor, generator(), replace(settings, prewhitened=0.0))
    torch.testing.assert_close(kept, noise)


@pytest.mark.parametrize("loops", [0.0, 1.0])
@pytest.mark.parametrize("coils", [1, 4, 12, 32])
def test_any_number_of_smooth_coils(loops, coils):
    settings = replace(FLAT, loops=loops, birdcage=0.0)
    maps = coil_maps(2, coils, (48, 40), generator(), settings, CPU)
    assert maps.shape == (2, coils, 48, 40)
    torch.testing.assert_close(rss(maps), torch.ones(2, 48, 40))
    change = (maps[..., 1:] - maps[..., :-1]).abs().mean()
    assert change < 0.2 * maps.abs().mean()


def test_loops_see_what_is_near_them():
    maps = loop_maps(20, 8, (64, 64), generator(), FLAT, CPU).abs()
    rim = torch.cat([maps[..., 0, :], maps[..., -1, :], maps[..., 0], maps[..., -1]], dim=-1)
    assert (rim.amax(-1) > 2 * maps[..., 32, 32]).float().mean() > 0.9
    assert (
        maps.flatten(2).argmax(2)[:, None] != maps.flatten(2).argmax(2)[..., None]
    ).float().mean() > 0.8


def test_measured_arrays_give_half_of_the_coils():
    """Single coils where the array has enough of them, combinations otherwise."""
    array = loop_maps(1, 6, (32, 32), generator(9), FLAT, CPU)[0]
    marked = array.clone()
    marked[:] = torch.arange(1, 7)[:, None, None]
    found = measured_maps([marked], 30, 3, (32, 32), generator(), CPU)
    values = found.abs().amax((-2, -1))
    assert torch.allclose(values, values.round(), atol=1e-4)
    assert all(len(set(row.round().tolist())) == 3 for row in values)
    many = measured_maps([array], 2, 12, (40, 24), generator(), CPU)
    assert many.shape == (2, 12, 40, 24)
    assert many.isfinite().all()
    settings = replace(FLAT, birdcage=0.0)
    constant = [torch.ones(4, 8, 8, dtype=torch.complex64)]
    maps = coil_maps(200, 4, (8, 8), generator(), settings, CPU, constant)
    flat = (maps - maps[..., :1, :1]).abs().amax((1, 2, 3)) < 1e-3
    assert 0.4 < flat.float().mean() < 0.6


def test_maps_are_resized_smoothly():
    maps = loop_maps(1, 3, (32, 32), generator(), FLAT, CPU)
    again = resized(resized(maps, (96, 96)), (32, 32))
    torch.testing.assert_close(again, maps, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("wide", "width"), [(12, 8), (13, 8), (8, 8), (24, 8), (15, 9)])
def test_folding_is_a_wider_spacing_of_k_space(wide, width):
    """Every sample of the narrow field of view is one of the wide one where that is a multiple."""
    image = torch.randn(2, 5, wide, generator=generator())
    folded = fold(image, width)
    assert folded.shape == (2, 5, width)
    torch.testing.assert_close(folded.sum(-1), image.sum(-1))
    if wide % width == 0 and (wide // width) % 2 == 1:
        every = fft2c(image.to(torch.complex64)) * (wide / width) ** 0.5
        first = wide // 2 - (width // 2) * (wide // width)
        torch.testing.assert_close(
            fft2c(folded.to(torch.complex64)), every[..., first :: wide // width]
        )
    middle = torch.zeros(1, 1, wide)
    middle[..., wide // 2] = 1
    assert fold(middle, width)[0, 0].argmax() == width // 2


def windows(settings: Simulation, draws: int = 200) -> torch.Tensor:
    return window(draws, (40, 48), generator(), settings, CPU)[:, 0]


def test_partial_fourier_leaves_out_one_side():
    found = windows(replace(FLAT, partial_fourier=0.5))
    measured = found[:, 0] > 0
    partial = ~measured.all(1)
    assert 0.4 < partial.float().mean() < 0.6
    shares = set((measured[partial].float().mean(1) * 8).round().int().tolist())
    assert shares == {round(8 * share) for share in PARTIAL}
    both_ends = measured[partial][:, 0].int() + measured[partial][:, -1].int()
    assert (both_ends == 1).all()
    assert found[:, 20, 24].all()


def test_zero_padding_empties_both_ends():
    found = windows(replace(FLAT, zero_padding=1.0))
    for dim in (1, 2):
        filled = (found > 0).any(dim)
        assert filled.float().mean(1).min() > 0.68
        ends = filled[:, 1].int() + filled[:, -1].int()
        assert (ends != 1).all()
        assert (ends == 0).any()


def test_filters_fall_off_towards_the_corners():
    found = windows(replace(FLAT, kspace_filter=1.0))
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[:, 20, 24] > 0.99).all()
    assert (found[:, 0, 0] < found[:, 20, 24]).all()
    assert (found[:, 20, 24:].diff(dim=1) <= 1e-6).all()
    assert (windows(FLAT) == 1).all()


def test_vessels_are_bright_spots_that_ghost_along_the_columns():
    images = discs(300)
    found = vessels(images, generator(), replace(FLAT, vessels=2.0), 300)
    there = found.abs().amax((1, 2)) > 0.1
    assert 0.85 < there.float().mean() < 0.99
    assert (found.abs() > 0.1).float().mean() < 0.02
    steady = fft2c(found[:, None])
    moving = ifft2c(pulsate(steady, generator(), replace(FLAT, pulsation=0.5), 300))[:, 0] - found
    rows = found.abs().amax(2) > 1e-2  # pulsation moves nothing to other rows
    assert moving.abs().amax(2)[~rows].max() < 2e-2
    assert moving.abs().amax((1, 2))[there].mean() > 0.02


def test_a_rim_surrounds_the_object():
    images = discs(100)
    found = add_scalp(images, generator(), replace(FLAT, scalp=0.5), 100)
    added = (found - images).abs().amax((1, 2)) > 0.1
    assert 0.35 < added.float().mean() < 0.65
    brighter = (found - images)[added].mean(0)
    assert brighter[32, 24] < 1e-2
    assert brighter[images[0] == 0].max() > 0.1


@pytest.mark.parametrize("size", [(96, 96), (320, 168)])
def test_small_and_large_matrices(size):
    kspace = simulate(discs(1, size), generator(), REALISTIC, coils=4)
    assert kspace.shape == (1, 4, *size)
    assert kspace.isfinite().all()


def test_a_realistic_scan_is_scored_against_its_own_images():
    scan = simulate_scan(discs(2).numpy(), "disc", 1, REALISTIC)
    found = rss(ifft2c(torch.from_numpy(np.asarray(scan.kspace))))
    torch.testing.assert_close(found, torch.from_numpy(scan.target))
