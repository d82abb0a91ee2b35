"""Sensitivities of receive coils: birdcages, loops, random smooth maps, and measured ones."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.data.simulation.fields import Size, coordinates, smooth_field, uniform

LOOP_GRID = 32  # points along each side at which the fields of loops are computed
LOOP_PARTS = 12  # straight wires that make up a loop


def coil_maps(
    number: int,
    num_coils: int,
    size: Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
    arrays: Sequence[Tensor] = (),
) -> Tensor:
    """Coil sensitivities, complex64 `[number, num_coils, H, W]`.

    Each of the `number` sets is of loops with probability `settings.loops`, otherwise a birdcage
    with probability `settings.birdcage`, else random and smooth; with measured arrays each set is
    one of them half of the time. Scaled to sum_c |S_c|^2 = 1 in every pixel, except in
    `settings.shading` of the sets, where the mean of that sum over the field of view is 1.

    Args:
        number: of sets.
        num_coils: of each set.
        size: H and W.
        generator: on the CPU.
        settings: see `Simulation`.
        device: of the result.
        arrays: measured maps, complex `[coils, h, w]` each, see `measured_maps`.
    """
    kind = (number, num_coils, size, generator, settings, device)
    share = (number, 1, 1, 1)
    birdcage, maps = birdcage_maps(*kind), smooth_maps(*kind)
    picked = uniform((0.0, 1.0), share, generator) < settings.birdcage
    maps = torch.where(picked.to(device), birdcage, maps)
    if settings.loops:
        picked = torch.rand(share, generator=generator) < settings.loops
        maps = torch.where(picked.to(device), loop_maps(*kind), maps)
    if arrays:
        picked = torch.rand(share, generator=generator) < 0.5
        found = measured_maps(arrays, number, num_coils, size, generator, device)
        maps = torch.where(picked.to(device), found, maps)
    power = maps.abs().square().sum(dim=1, keepdim=True)
    if settings.shading:
        shaded = (torch.rand(share, generator=generator) < settings.shading).to(device)
        power = torch.where(shaded, power.mean(dim=(-2, -1), keepdim=True), power)
    return maps / power.clamp(min=1e-12).sqrt()


def birdcage_maps(
    number: int,
    num_coils: int,
    size: Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Fields of line conductors on an ellipse around the field of view, unscaled.

    S_c = g_c (dx + i dy) / (dx^2 + dy^2 + 0.1^2) with (dx, dy) the vector from conductor c to the
    pixel in half fields of view (of the longer side), g_c a random gain and phase. Radius along
    both axes, rotation, centre and the position of each conductor are random.

    Returns:
        complex64 `[number, num_coils, H, W]`.
    """
    per_set, per_coil = (number, 1), (number, num_coils)
    spacing = 2 * math.pi / num_coils
    rotation = uniform((0.0, 2 * math.pi), per_set, generator)
    jitter = uniform((-0.2 * spacing, 0.2 * spacing), per_coil, generator)
    angle = torch.arange(num_coils) * spacing + rotation + jitter
    offset = (-settings.coil_offset, settings.coil_offset)
    x = uniform(settings.coil_radius, per_set, generator) * angle.cos()
    x = x + uniform(offset, per_set, generator)
    y = uniform(settings.coil_radius, per_set, generator) * angle.sin()
    y = y + uniform(offset, per_set, generator)
    gain = torch.polar(uniform((0.7, 1.3), per_coil, generator), -angle)

    rows, columns = coordinates(size, device)
    dx, dy = torch.broadcast_tensors(
        columns - x.to(device)[..., None, None], rows - y.to(device)[..., None, None]
    )
    return gain.to(device)[..., None, None] * torch.complex(dx, dy) / (dx**2 + dy**2 + 0.01)


def smooth_maps(
    number: int,
    num_coils: int,
    size: Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Random smooth sensitivities S_c = exp(a_c + i phi_c), unscaled.

    Their logarithms a_c, phi_c are smooth fields, so no map has a zero, around which its phase
    would not be smooth.

    Returns:
        complex64 `[number, num_coils, H, W]`.
    """
    shape = (number, num_coils)
    attenuation = smooth_field(shape, size, settings.coil_grid, generator, device)
    phase = smooth_field(shape, size, settings.coil_grid, generator, device)
    return torch.polar(torch.exp(attenuation), phase)


def loop_maps(
    number: int,
    num_coils: int,
    size: Size,
    generator: Generator,
    settings: Simulation,
    device: torch.device,
) -> Tensor:
    """Fields of circular loops on a helmet around the field of view, unscaled.

    By reciprocity S_c = B_1 - i B_2 with B the field of a unit current in the loop, by the law of
    Biot and Savart a sum over its parts of dl x d / |d|^3, and 1, 2 two axes across the main field,
    which may lie across the slice (axial) or in it (sagittal, coronal). Loops lie in one row for
    each six coils, one above the other, face the middle and have a random size and place.

    Returns:
        complex64 `[number, num_coils, H, W]`.
    """
    per_set, per_coil = (number, 1), (number, num_coils)
    rings = max(1, round(num_coils / 6))
    each = math.ceil(num_coils / rings)
    index = torch.arange(num_coils)
    turn = 2 * math.pi / each
    angle = index % each * turn + (index // each) * turn / 2
    angle = angle + uniform((0.0, 2 * math.pi), per_set, generator)
    angle = angle + uniform((-0.15 * turn, 0.15 * turn), per_coil, generator)
    height = (index // each - (rings - 1) / 2) * 0.7 + uniform((-0.4, 0.4), per_set, generator)
    narrow, wide = (uniform((1.0, 1.35), per_set, generator) for _ in range(2))
    offset = uniform((-0.15, 0.15), (2, *per_set), generator)
    radius = uniform((0.3, 0.55), per_set, generator) * uniform((0.9, 1.1), per_coil, generator)
    gain = torch.polar(
        uniform((0.7, 1.3), per_coil, generator), uniform((0.0, 2 * math.pi), per_coil, generator)
    )
    middle = torch.stack(
        [
            narrow * angle.cos() + offset[0],
            wide * angle.sin() + offset[1],
            height.expand(per_coil),
        ],
        dim=-1,
    ).to(device)
    tangent = torch.stack([-angle.sin(), angle.cos(), torch.zeros_like(angle)], dim=-1).to(device)
    up = torch.tensor([0.0, 0.0, 1.0], device=device)
    around = torch.arange(LOOP_PARTS + 1, device=device) * (2 * math.pi / LOOP_PARTS)
    wire = around.cos()[:, None] * tangent[..., None, :] + around.sin()[:, None] * up
    wire = middle[..., None, :] + radius.to(device)[..., None, None] * wire
    parts, places = wire.diff(dim=-2), (wire[..., 1:, :] + wire[..., :-1, :]) / 2

    rows, columns = coordinates((LOOP_GRID, LOOP_GRID), device)
    longest = max(size)
    y, x = torch.broadcast_tensors(rows * size[0] / longest, columns * size[1] / longest)
    points = torch.stack([x, y, torch.zeros_like(x)], dim=-1).flatten(0, 1)
    field = torch.zeros(number, num_coils, len(points), 3, device=device)
    for part in range(LOOP_PARTS):  # all parts together would take gigabytes
        distance = points - places[..., part, None, :]
        cross = torch.linalg.cross(parts[..., part, None, :].expand_as(distance), distance)
        field += cross / (distance.square().sum(-1, keepdim=True) + 0.01) ** 1.5
    # The main field lies along z (axial slices), or along the slice's rows' direction.
    axial = torch.complex(field[..., 0], -field[..., 1])
    upright = torch.complex(field[..., 0], -field[..., 2])
    picked = torch.rand((number, 1, 1), generator=generator) < 0.6
    maps = gain.to(device)[..., None] * torch.where(picked.to(device), axial, upright)
    return resized(maps.unflatten(-1, (LOOP_GRID, LOOP_GRID)), size)


def measured_maps(
    arrays: Sequence[Tensor],
    number: int,
    num_coils: int,
    size: Size,
    generator: Generator,
    device: torch.device,
) -> Tensor:
    """Random views of measured arrays: rotated by any angle, mirrored, scaled by 0.8 to 1.3, and
    random coils of it, or random combinations where it has fewer than `num_coils`.

    Args:
        arrays: complex `[coils, h, w]` each, smooth, the field of view of one head.
        number: of sets.
        num_coils: of each set.
        size: H and W.
        generator: on the CPU.
        device: of the result.

    Returns:
        complex64 `[number, num_coils, H, W]`, unscaled.
    """
    sets = []
    for _ in range(number):
        array = arrays[int(torch.randint(len(arrays), (), generator=generator))].to(device)
        order = torch.randperm(len(array), generator=generator)[:num_coils]
        picked = array[order.to(device)]
        if len(array) < num_coils:
            weights = torch.randn(num_coils, len(array), dtype=torch.complex64, generator=generator)
            picked = torch.einsum("nc,chw->nhw", weights.to(device), array)
        angle, scale, flip = torch.rand(3, generator=generator).tolist()
        angle, scale = 2 * math.pi * angle, 0.8 + 0.5 * scale
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        mirrored = 1.0 if flip < 0.5 else -1.0
        theta = torch.tensor([[[mirrored * cosine, -sine, 0.0], [mirrored * sine, cosine, 0.0]]])
        grid = F.affine_grid(theta.to(device), [1, 1, LOOP_GRID, LOOP_GRID], align_corners=False)
        channels = torch.cat([picked.real, picked.imag])[None]
        view = F.grid_sample(channels, grid, align_corners=False, padding_mode="border")[0]
        sets.append(torch.complex(*view.chunk(2)))
    return resized(torch.stack(sets), size)


def resized(maps: Tensor, size: Size) -> Tensor:
    """Smooth complex maps `[B, coils, h, w]` on another grid, bicubic: `[B, coils, H, W]`."""

    def interpolated(part: Tensor) -> Tensor:
        return F.interpolate(part, size=tuple(size), mode="bicubic", align_corners=True)

    return torch.complex(interpolated(maps.real), interpolated(maps.imag))
