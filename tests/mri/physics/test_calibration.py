"""The soft ESPIRiT: the maps of a scan from its middle."""

import pytest
import torch

from nirvana.mri.data.simulation.coils import coil_maps
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.physics.calibration import soft_espirit
from nirvana.mri.physics.fourier import fft2c

SIZE = (48, 40)


def scan(coils: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K-space, true maps and object of one slice."""
    generator = torch.Generator().manual_seed(seed)
    settings = Simulation(birdcage=1.0, coil_radius=(1.5, 1.5))
    maps = coil_maps(1, coils, SIZE, generator, settings, torch.device("cpu"))
    rows = torch.linspace(-1, 1, SIZE[0])[:, None]
    columns = torch.linspace(-1, 1, SIZE[1])
    image = (rows**2 + columns**2 < 0.7) * (1 + 0.3 * torch.cos(9 * rows + 4 * columns))
    return fft2c(maps * image), maps, image


def central(rows: int, columns: int) -> torch.Tensor:
    region = torch.zeros(1, *SIZE, dtype=torch.bool)
    top, left = SIZE[0] // 2 - rows // 2, SIZE[1] // 2 - columns // 2
    region[:, top : top + rows, left : left + columns] = True
    return region


def agreement(found: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """|<found, true>| in every pixel, 1 for equal maps up to a phase."""
    return (found.conj() * maps).sum(1).abs()


@pytest.mark.parametrize("coils", [2, 8, 20])
def test_the_maps_are_found(coils):
    kspace, maps, image = scan(coils)
    found, certainty = soft_espirit(kspace, central(24, 24))
    assert found.shape == (1, 1, coils, *SIZE)
    inside = image > 0
    assert agreement(found[:, 0], maps)[0, inside].mean() > 0.995
    assert agreement(found[:, 0], maps)[0, inside].min() > 0.9
    assert certainty[0, 0][inside].min() > 0.8
    assert certainty.max() < 1.01


def test_whole_columns_are_a_region_too():
    kspace, maps, image = scan(6)
    columns = (torch.arange(SIZE[1]) - SIZE[1] // 2).abs() < 6
    found, _ = soft_espirit(kspace * columns, columns[None, None])
    assert agreement(found[:, 0], maps)[0, image > 0].mean() > 0.99


def test_nothing_outside_of_the_region_counts_nor_does_the_scale():
    kspace, _, _ = scan(4)
    region = central(16, 16)
    first, _ = soft_espirit(kspace, region)
    other = torch.where(region[:, None], kspace, 7.0)
    torch.testing.assert_close(soft_espirit(other, region)[0], first)
    scaled = soft_espirit(1e5 * kspace, region)[0]
    torch.testing.assert_close(scaled, first, rtol=1e-3, atol=1e-3)


def test_a_second_set_vanishes_where_one_explains_all():
    kspace, _, _ = scan(8)
    found, _ = soft_espirit(kspace, central(24, 24), 2)
    first, second = torch.linalg.vector_norm(found, dim=2)[0]
    torch.testing.assert_close(first, torch.ones(SIZE), rtol=1e-3, atol=1e-3)
    assert second.mean() < 0.05


def test_two_sets_where_two_objects_overlap():
    kspace, maps, image = scan(8)
    other_kspace, other, _ = scan(8, seed=5)
    found, _ = soft_espirit(kspace + other_kspace, central(24, 24), 2)
    inside = (image > 0)[8:-8, 8:-8]
    for true in (maps, other):
        explained = (found.conj() * true[:, None]).sum(2).abs().square().sum(1).sqrt()
        assert explained[0, 8:-8, 8:-8][inside].mean() > 0.93
    inner = (found[:, 0].conj() * found[:, 1]).sum(1).abs()
    assert inner.max() < 1e-3


def test_an_empty_slice_has_finite_maps():
    found, certainty = soft_espirit(torch.zeros(1, 4, *SIZE, dtype=torch.complex64), central(8, 8))
    assert found.isfinite().all()
    assert certainty.isfinite().all()
