"""Cascades on combined images: the solver, the start, the refined maps, what a scan acquired."""

from dataclasses import replace

import pytest
import torch

from nirvana.mri.data.simulation.acquisition import fold
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.model.conditioning import noise_level
from nirvana.mri.model.config import CodecConfig
from nirvana.mri.model.operator import MeasuredKspace, acquired, conjugate, expand, reduce, solve
from nirvana.mri.model.sense_cascade import MapRefinement
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss

CONFIG = CodecConfig(
    backbone="none",
    correction="none",
    maps="espirit",
    map_sets=2,
    map_features=(2, 2),
    data_consistency="conjugate_gradient",
    conditioning=4,
    cascade_features=(2, 2),
    image_cascades=2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=generator(seed))


def masks(height: int, width: int) -> dict[str, torch.Tensor]:
    columns = torch.rand(2, 1, width, generator=generator(1)) < 0.5
    points = torch.rand(2, height, width, generator=generator(2)) < 0.4
    return {"columns": columns, "points": points}


def dense(measured: MeasuredKspace, maps: torch.Tensor) -> torch.Tensor:
    """E as a matrix for each slice: its columns are the images of single pixels."""
    sets, _, height, width = maps.shape[1:]
    pixels = sets * height * width
    columns = []
    for pixel in range(pixels):
        unit = torch.zeros(pixels, dtype=maps.dtype)
        unit[pixel] = 1
        x = unit.view(1, sets, height, width).expand(len(maps), -1, -1, -1)
        columns.append((measured.mask * measured.kspace(expand(x, maps))).flatten(1))
    return torch.stack(columns, dim=2)


@pytest.mark.parametrize("kind", ["columns", "points"])
@pytest.mark.parametrize("sets", [1, 2])
def test_the_solver_finds_what_a_dense_solution_finds(kind, sets):
    height, width, coils = 4, 5, 3
    mask = masks(height, width)[kind]
    measured = MeasuredKspace.of(random(2, coils, height, width), mask)
    maps = random(2, sets, coils, height, width, seed=1)
    start = random(2, sets, height, width, seed=2)
    weight = torch.tensor([0.3, 0.05], dtype=torch.float64).view(2, 1, 1, 1)
    found = solve(measured, maps, weight, start, steps=80)
    matrix = dense(measured, maps)
    normal = matrix.mH @ matrix + weight.view(2, 1, 1) * torch.eye(matrix.shape[2])
    right = matrix.mH @ measured.y.flatten(1)[..., None]
    right = right + weight.view(2, 1, 1) * start.flatten(1)[..., None]
    expected = torch.linalg.solve(normal, right)[..., 0].view_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["columns", "points"])
def test_every_step_of_the_solver_lowers_its_objective(kind):
    mask = masks(8, 9)[kind]
    measured = MeasuredKspace.of(random(2, 4, 8, 9), mask)
    maps, start = random(2, 1, 4, 8, 9, seed=1), random(2, 1, 8, 9, seed=2)
    weight = torch.full((2, 1, 1, 1), 0.1, dtype=torch.float64)

    def objective(x: torch.Tensor) -> torch.Tensor:
        left = measured.mask * measured.kspace(expand(x, maps)) - measured.y
        distance = (x - start).abs().square().sum((1, 2, 3))
        return left.abs().square().sum((1, 2, 3)) + 0.1 * distance

    values = torch.stack([objective(solve(measured, maps, weight, start, n)) for n in range(6)])
    assert (values.diff(dim=0) < 0).all()


def test_reduction_is_the_adjoint_of_expansion():
    maps, x, images = random(2, 2, 3, 4, 5), random(2, 2, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    left = (expand(x, maps).conj() * images).sum()
    right = (x.conj() * reduce(images, conjugate(maps))).sum()
    torch.testing.assert_close(left, right)


def test_points_and_columns_are_the_same_scan_in_two_layouts():
    kspace = random(2, 3, 6, 8)
    mask = masks(6, 8)["columns"]
    columns = MeasuredKspace.of(kspace, mask)
    points = MeasuredKspace.of(kspace, mask.expand(-1, 6, -1))
    expected = ifft2c(kspace * mask[:, None])
    for measured in (columns, points):
        images = measured.from_middle(measured.images(measured.y))
        torch.testing.assert_close(images, expected)
        torch.testing.assert_close(measured.kspace(measured.images(measured.y)), measured.y)


def coil_scan(coils: int = 6, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """K-space `[1, coils, H, W]` of a disc, and its root sum of squares."""
    rows = torch.linspace(-1, 1, size)[:, None]
    columns = torch.linspace(-1, 1, size)
    disc = ((rows / 0.8) ** 2 + (columns / 0.7) ** 2 < 1) * (0.6 + 0.4 * torch.cos(5 * rows))
    angle = 2 * torch.pi * torch.arange(coils)[:, None, None] / coils
    near = 1.5 - rows * angle.sin() - columns * angle.cos()
    images = disc * torch.polar(1 / near, 0.5 * near + angle)
    return fft2c(images)[None].to(torch.complex64), rss(images)[None]


def undersampled(size: int) -> torch.Tensor:
    columns = torch.arange(size)
    return (columns % 2 == 0) | ((columns - size // 2).abs() < 5)


def test_a_new_codec_gives_the_sense_image():
    """Its U-Nets start at zero, so nothing is worse than SENSE, which is far better than zeros."""
    kspace, target = coil_scan()
    mask = undersampled(32)
    image = CodecModel(CONFIG, None).eval().reconstruct(kspace * mask, mask)
    zero_filled = rss(ifft2c(kspace * mask))
    error = [(each - target).square().mean().sqrt() for each in (image, zero_filled)]
    assert error[0] < 0.15 * error[1]


def test_a_scan_of_points_is_solved_too():
    kspace, target = coil_scan()
    points = torch.rand(32, 32, generator=generator(4)) < 0.5
    points[11:21, 11:21] = True
    image = CodecModel(CONFIG, None).eval().reconstruct(kspace * points, points)
    zero_filled = rss(ifft2c(kspace * points))
    error = [(each - target).square().mean().sqrt() for each in (image, zero_filled)]
    assert error[0] < 0.4 * error[1]


def test_two_sets_explain_an_object_that_folds_over():
    """Where two places of an object lie on each other, one set of maps cannot explain all coils."""
    coils, size = 8, 48
    rows, columns = torch.linspace(-1, 1, size)[:, None], torch.linspace(-1.5, 1.5, 72)
    disc = ((rows / 0.8) ** 2 + (columns / 1.2) ** 2 < 1) * (0.6 + 0.4 * torch.cos(5 * rows))
    angle = 2 * torch.pi * torch.arange(coils)[:, None, None] / coils
    near = 2 - rows * angle.sin() - columns * angle.cos()
    wide = disc * torch.polar(1 / near, 0.5 * near + angle)
    images = torch.complex(fold(wide.real, size), fold(wide.imag, size))
    kspace, target = fft2c(images)[None], rss(images)[None]
    mask = undersampled(size) | ((torch.arange(size) - size // 2).abs() < 10)
    errors = []
    for sets in (1, 2):
        model = CodecModel(replace(CONFIG, map_sets=sets), None).eval()
        image = model.reconstruct(kspace * mask, mask)
        errors.append((image - target).square().mean())
    assert errors[1] < 0.2 * errors[0]


def test_refined_maps_keep_their_norm_and_gradients_stay_finite():
    kspace, _ = coil_scan()
    measured = MeasuredKspace.of(kspace, undersampled(32)[None, None])
    net = MapRefinement((2, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2, generator=generator(3))
    maps = random(1, 2, 6, 32, 32).to(torch.complex64)
    maps[..., :10] = 0  # no sensitivity there
    x = random(1, 2, 32, 32, seed=1).to(torch.complex64).requires_grad_()
    refined = net(maps, x, measured)
    norms = [torch.linalg.vector_norm(each, dim=2) for each in (refined, maps)]
    torch.testing.assert_close(norms[0], norms[1], atol=1e-6, rtol=1e-4)
    assert (refined - maps).abs().max() > 1e-3
    refined.abs().square().sum().backward()
    assert x.grad is not None
    assert all(p.grad.isfinite().all() for p in (x, *net.parameters()))


def test_named_parameters_can_be_trained_through_the_forward():
    """What adapts to a scan selects parameters by name: the loss on held lines reaches them."""
    kspace, _ = coil_scan()
    mask = undersampled(32)
    held = mask & (torch.arange(32) % 6 == 0) & ((torch.arange(32) - 16).abs() > 5)
    model = CodecModel(CONFIG, None).eval()
    chosen = {
        n: p for n, p in model.named_parameters() if n.endswith(("log_weight", "write.weight"))
    }
    scale = torch.ones(1)
    image = model(kspace * (mask & ~held), mask & ~held, mask & ~held, scale).image
    found = torch.autograd.grad(image.square().sum(), list(chosen.values()))
    assert len(chosen) >= 4
    assert all(g.isfinite().all() for g in found)
    assert any(g.abs().max() > 0 for g in found)


@pytest.mark.parametrize(
    ("sampled", "expected"),
    [
        ("..x.x.x...", "xxxxxxxxxx"),  # twice the gap beyond the ends
        ("...xxx....", "...xxx...."),  # zero-padding
        ("..........", ".........."),
        ("x........x", "xxxxxxxxxx"),
        ("......x.x.x.....", "..xxxxxxxxxxxxx."),
    ],
)
def test_the_acquired_part_of_an_axis(sampled, expected):
    line = torch.tensor([[c == "x" for c in sampled]])
    assert "".join("x" if v else "." for v in acquired(line)[0].tolist()) == expected


def test_zero_padding_stays_empty():
    kspace, _ = coil_scan()
    inside = torch.zeros(32, dtype=torch.bool)
    inside[6:26] = True
    padded = kspace * inside * inside[:, None]
    columns = inside & undersampled(32)
    image = CodecModel(replace(CONFIG, map_sets=1), None).eval()
    scale = torch.ones(1)
    y, mask = padded * columns, columns[None]
    encoding = image.encode_kspace(y, mask, mask, scale)
    coils = encoding.iterate.measured.from_middle(image._coil_images(encoding, None))
    found = fft2c(coils).abs().amax((0, 1))
    assert found[~inside].max() < 1e-5
    assert found[:, [0, 1, 30, 31]].max() < 1e-5  # twice the gap beyond the last sampled columns
    assert found[inside][:, inside & ~columns].max() > 1e-3


@pytest.mark.parametrize("level", [0.01, 0.1])
def test_the_noise_level_is_found(level):
    noise = level * torch.randn(3, 4, 48, 64, dtype=torch.complex64, generator=generator()) * 2**0.5
    noise[..., 28:36] += 50
    noise[:, :, :8] = 0  # zero-padding does not count
    mask = torch.rand(1, 1, 64, generator=generator(1)) < 0.5
    found = noise_level(noise * mask, mask)
    assert torch.allclose(found, torch.full((3,), level), rtol=0.06)
    assert noise_level(torch.zeros_like(noise), mask).tolist() == [0, 0, 0]
