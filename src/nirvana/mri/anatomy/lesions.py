"""Simulated lesions of the brain, painted into magnitude slices before they are scanned.

A lesion is an ellipsoid with a wavy outline. Its share in a pixel is the share of the pixel's
volume, over the whole thickness of the slice, that lies inside (partial volume):

    rho    = |A (x - centre)| / r(angle)    A scales the semi-axes a, b to 1
    r      = 1 + sum_k e_k cos(k angle + phase_k), k = 2, 3, 4
    height = c sqrt(1 - rho^2)              half of the chord through the slices, at rho < 1
    share  = |[-height, height] n [s - t/2, s + t/2]| / t      s offset, t thickness of the slice

averaged over 3 x 3 positions in the pixel. The image becomes

    x <- x + share * (target - x),   target = tissue * (1 + contrast * profile + texture)

with the slice's median brain as `tissue`. `TYPES` holds each type's contrast in each sequence and
whether it has a core of fluid; frequencies, sizes and numbers are those of fastMRI+.

Everything is computed for a whole batch at once on the images' device, with random numbers from a
generator on the CPU.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.mri.anatomy.lobes import lobe_map

SEQUENCES = ("T1", "T2", "FLAIR")
SIGNALS = ("hypointense", "hyperintense", "mixed-intensity")
MAX_COUNT = 5
SUBPIXELS = 3
CANDIDATES = 16
SMALLEST = 3.0  # mm, the smallest lesion that is drawn


@dataclass(frozen=True)
class LesionType:
    """One kind of finding.

    Attributes:
        name: in reports.
        slices: number of slices of fastMRI+ that show it, its frequency.
        size: mean and standard deviation of the logarithm of its longest diameter in mm.
        limits: the smallest and the largest diameter drawn, mm.
        elongation: mean of the logarithm of longest over shortest diameter.
        counts: slices with 1, 2, 3, 4, and 5 or more of them.
        fluid: it has a core of fluid, with a rim of tissue; on FLAIR that is dark within bright.
        texture: standard deviation of its texture over the tissue's brightness.
        ragged: size e of the waves of its outline.
        depth: how far from the brain's border its centre is at least, mm: what belongs to white
            matter lies below the cortex.
    """

    name: str
    slices: int
    size: tuple[float, float]
    limits: tuple[float, float]
    elongation: float
    counts: tuple[int, int, int, int, int]
    fluid: bool
    texture: float
    ragged: float
    depth: float

    def signal(self, sequence: str) -> str:
        """Its signal relative to normal brain: dark on T1, bright on T2, and on FLAIR bright or,
        around fluid, of mixed intensity."""
        if sequence == "T1":
            return SIGNALS[0]
        return SIGNALS[2] if self.fluid and sequence == "FLAIR" else SIGNALS[1]


# Counted from fastMRI+ (Zhao et al., Scientific Data 2022, doi 10.1038/s41597-022-01255-z;
# brain.csv of microsoft/fastmri-plus, MIT): 8,213 boxes over 1,001 brain scans of 320 x 320
# pixels. Sizes are the boxes' longer sides at a nominal 220 mm field of view, which the file does
# not state. The limits are ours: about the 5 % and 95 % quantiles, and what fits a hemisphere.
TYPES = (
    LesionType(
        "white matter lesion",
        slices=729,
        size=(2.294, 0.864),
        limits=(3.0, 25.0),
        elongation=0.426,
        counts=(341, 164, 78, 54, 92),
        fluid=False,
        texture=0.03,
        ragged=0.06,
        depth=8.0,
    ),
    LesionType(
        "mass",
        slices=260,
        size=(3.070, 0.680),
        limits=(7.0, 50.0),
        elongation=0.219,
        counts=(181, 51, 17, 9, 2),
        fluid=False,
        texture=0.18,
        ragged=0.12,
        depth=4.0,
    ),
    LesionType(
        "encephalomalacia",
        slices=115,
        size=(3.503, 0.639),
        limits=(12.0, 50.0),
        elongation=0.388,
        counts=(82, 23, 7, 3, 0),
        fluid=True,
        texture=0.05,
        ragged=0.15,
        depth=3.0,
    ),
    LesionType(
        "lacunar infarct",
        slices=88,
        size=(2.277, 0.534),
        limits=(4.0, 20.0),
        elongation=0.477,
        counts=(69, 14, 4, 1, 0),
        fluid=True,
        texture=0.03,
        ragged=0.03,
        depth=10.0,
    ),
)
NORMAL_SHARE = 371 / 1001  # scans labelled "Normal for age"


@dataclass(frozen=True)
class LesionSettings:
    """The distribution of lesions; frequencies, sizes and numbers default to fastMRI+'s.

    Attributes:
        normal_share: probability of a slice without any lesion.
        weights: of the types, in the order of `TYPES`.
        contrast: range of |contrast| over the tissue's brightness, uniform.
        thickness: range of the slice's thickness in mm.
        size: range of the longest diameter in mm, uniform in its logarithm, in place of the types'.
    """

    normal_share: float = NORMAL_SHARE
    weights: tuple[float, ...] = field(
        default_factory=lambda: tuple(float(kind.slices) for kind in TYPES)
    )
    contrast: tuple[float, float] = (0.4, 1.0)
    thickness: tuple[float, float] = (3.0, 5.0)
    size: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.normal_share <= 1:
            raise InputError(f"normal_share = {self.normal_share} must be from 0 to 1")
        if len(self.weights) != len(TYPES) or min(self.weights) < 0 or sum(self.weights) == 0:
            raise InputError(f"weights = {self.weights} must be {len(TYPES)} numbers, not all 0")
        for name in ("contrast", "thickness", "size"):
            limits = getattr(self, name)
            if limits is not None and not 0 < limits[0] <= limits[1]:
                raise InputError(f"{name} = {limits} is no range above 0")


@dataclass(frozen=True)
class Anatomy:
    """Slices `[B, H, W]` with the anatomy that the placement of lesions needs.

    Attributes:
        images: magnitude.
        depth: distance to the nearest border of the brain in mm, 0 outside the brain.
        u: coordinate of each pixel in the brain's frame, see `lobes`.
        v: likewise.
        w: likewise.
        sequence: `[B]`, index in `SEQUENCES`.
        width: `[B]`, half the brain's width in mm, the unit of u.
        pixel: side of a pixel in mm.
    """

    images: Tensor
    depth: Tensor
    u: Tensor
    v: Tensor
    w: Tensor
    sequence: Tensor
    width: Tensor
    pixel: float


@dataclass(frozen=True)
class Lesions:
    """Lesions of a batch; the first of a slice is its largest.

    Attributes:
        present: bool `[B, L]`.
        kind: `[B]`, index in `TYPES`; all lesions of a slice are of one type.
        row: `[B, L]`, of the centres in pixels.
        column: likewise.
        size: `[B, L]`, longest diameter within the slice's middle plane in mm.
        elongation: `[B, L]`, longest over shortest diameter.
        angle: `[B, L]`, of the longest diameter to the columns, in radians.
        waves: `[B, L, 3, 2]`, size and phase of the outline's waves k = 2, 3, 4.
        offset: `[B, L]`, of the slice's middle from the centre, in semi-axes c, -1..1.
        thickness: `[B]`, of the slice in mm.
        contrast: `[B]`, |contrast| over the tissue's brightness.
        texture: `[B, H, W]`, smooth, standard deviation 1.
        lobe: `[B]`, index in `LOBES`, of the largest lesion.
        side: `[B]`, index in `SIDES`, of the largest lesion.
    """

    present: Tensor
    kind: Tensor
    row: Tensor
    column: Tensor
    size: Tensor
    elongation: Tensor
    angle: Tensor
    waves: Tensor
    offset: Tensor
    thickness: Tensor
    contrast: Tensor
    texture: Tensor
    lobe: Tensor
    side: Tensor

    @property
    def count(self) -> Tensor:
        """`[B]`, lesions of each slice."""
        return self.present.sum(1)


def draw_lesions(
    anatomy: Anatomy, generator: Generator, settings: LesionSettings | None = None
) -> Lesions:
    """Draws lesions for every slice of a batch.

    The largest lesion is placed first. Every lobe and side that the slice shows is equally
    probable, then every position in it that is tissue (no fluid), deep enough for the type, at
    least a third of the diameter from the brain's border and half of it from the middle plane. A
    lesion too large for the slice is shrunk. The others have up to three quarters of its diameter
    and keep a distance to those before them; a lesion without a position is left out.

    Args:
        anatomy: of the slices.
        generator: on the CPU.
        settings: the distribution; the defaults of `LesionSettings` when None.
    """
    settings = settings or LesionSettings()
    B, H, W = anatomy.images.shape
    device = anatomy.images.device
    L = MAX_COUNT

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(device)

    weights = torch.tensor(settings.weights, dtype=torch.float32)
    kind = torch.multinomial(weights, B, replacement=True, generator=generator)
    counts = torch.tensor([each.counts for each in TYPES], dtype=torch.float32)[kind]
    wanted = 1 + torch.multinomial(counts, 1, generator=generator)[:, 0]
    wanted = torch.where(torch.rand(B, generator=generator) < settings.normal_share, 0, wanted).to(
        device
    )
    first = _first_size(kind, generator, settings).to(device)
    kind = kind.to(device)

    room = _room(anatomy, _of(kind, "depth"))
    size = first.minimum(3 * room.amax((1, 2)))
    smaller = size[:, None] * (0.3 + 0.45 * uniform(B, L - 1))
    size = torch.cat([size[:, None], smaller.clamp(min=SMALLEST)], dim=1)
    lobes = lobe_map(anatomy.u, anatomy.v, anatomy.w)
    cell = torch.where(lobes > 0, 2 * lobes - 1 + (anatomy.u > 0).long(), 0)
    present, row, column = _positions(cell, room, size, wanted, uniform, anatomy.pixel)

    elongation = _of(kind, "elongation")[:, None] * 2 * uniform(B, L)
    ragged = _of(kind, "ragged")[:, None, None] * (0.5 + uniform(B, L, 3))
    waves = torch.stack([ragged, 2 * math.pi * uniform(B, L, 3)], dim=-1)
    index = (row[:, 0].long(), column[:, 0].long())
    chosen = cell[torch.arange(B, device=device), *index]
    low, high = settings.contrast
    thin, thick = settings.thickness
    return Lesions(
        present=present,
        kind=kind,
        row=row,
        column=column,
        size=size,
        elongation=elongation.exp().clamp(max=3.0),
        angle=math.pi * uniform(B, L),
        waves=waves,
        offset=1.2 * uniform(B, L) - 0.6,
        thickness=thin + (thick - thin) * uniform(B),
        contrast=low + (high - low) * uniform(B),
        texture=_texture(B, (H, W), anatomy.pixel, generator, device),
        lobe=(chosen - 1).clamp(min=0) // 2,
        side=(chosen - 1).clamp(min=0) % 2,
    )


def paint(anatomy: Anatomy, lesions: Lesions) -> tuple[Tensor, Tensor]:
    """Paints lesions into slices.

    Args:
        anatomy: of the slices.
        lesions: of `draw_lesions`.

    Returns:
        The images and the share of each pixel that lesions take, 0..1, both float32 `[B, H, W]`.
        Slices without lesions are unchanged.
    """
    images, coverage = anatomy.images.flatten(), torch.zeros_like(anatomy.images).flatten()
    if lesions.present.any():
        pixels, change, share = _changes(anatomy, lesions)
        # Lesions of a slice do not overlap, so their changes can be added.
        images = images.index_add(0, pixels, change)
        coverage = coverage.index_add(0, pixels, share)
    return images.view_as(anatomy.images), coverage.view_as(anatomy.images)


def _changes(anatomy: Anatomy, lesions: Lesions) -> tuple[Tensor, Tensor, Tensor]:
    """The changed pixels: their indices into all slices, their changes, and their shares."""
    slices, numbers = lesions.present.nonzero(as_tuple=True)  # of the N lesions of the batch
    rows, columns = _window(anatomy, lesions, slices, numbers)
    share, core = _shares(anatomy, lesions, slices, numbers, rows, columns)
    here = (slices[:, None, None], rows, columns)
    share = share * (anatomy.depth[here] > 0)
    kind, flair = lesions.kind[slices], (anatomy.sequence == 2)[slices]
    fluid = _of(kind, "fluid")[:, None, None]
    # T1: tissue loses signal, fluid most. T2, FLAIR: it gains; FLAIR suppresses fluid.
    t1 = (anatomy.sequence == 0)[slices, None, None]
    gain = torch.where(t1, -0.75 - 0.25 * fluid, 1.0) - 1.9 * core * fluid * flair[:, None, None]
    texture = _of(kind, "texture")[:, None, None] * lesions.texture[here]
    contrast = lesions.contrast[slices, None, None]
    target = tissue(anatomy.images, anatomy.depth > 0)[slices] * (
        1 + contrast * gain + texture
    ).clamp(min=0.03)
    change = share * (target - anatomy.images[here])
    H, W = anatomy.images.shape[1:]
    pixels = (slices[:, None, None] * H + rows) * W + columns
    return pixels.flatten(), change.flatten(), share.flatten()


def _window(
    anatomy: Anatomy, lesions: Lesions, slices: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows `[N, h, 1]` and columns `[N, 1, w]` around each of N lesions, wide enough for all."""
    longest = _semi_axis(lesions)[slices, numbers]
    outline = 1 + lesions.waves[slices, numbers, :, 0].sum(1)
    reach = math.ceil((longest * outline).amax().item() / anatomy.pixel) + 1

    def around(centre: Tensor, side: int) -> Tensor:
        length = min(2 * reach + 1, side)
        first = (centre[slices, numbers].round().long() - reach).clamp(0, side - length)
        return first[:, None] + torch.arange(length, device=first.device)

    H, W = anatomy.images.shape[1:]
    return around(lesions.row, H)[:, :, None], around(lesions.column, W)[:, None]


def _semi_axis(lesions: Lesions) -> Tensor:
    """The longest semi-axis a, mm, `[B, L]`. `Lesions.size` is the diameter of the section by the
    slice's middle plane, at `offset` of the semi-axis c."""
    return lesions.size / 2 / (1 - lesions.offset**2).sqrt()


def _shares(
    anatomy: Anatomy,
    lesions: Lesions,
    slices: Tensor,
    numbers: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> tuple[Tensor, Tensor]:
    """The shares of N lesions in their windows by the module's formula, and those of their cores,
    which have 0.6 of their diameters; each `[N, h, w]`."""
    pixel = anatomy.pixel

    def of(x: Tensor) -> Tensor:
        return x[slices, numbers, None, None]

    a = of(_semi_axis(lesions))
    b = a / of(lesions.elongation)
    c = (a * b).sqrt()
    middle, half = of(lesions.offset) * c, lesions.thickness[slices, None, None] / 2
    cosine, sine = of(lesions.angle).cos(), of(lesions.angle).sin()
    waves = lesions.waves[slices, numbers]
    share = core = torch.zeros((), device=rows.device)
    steps = ((torch.arange(SUBPIXELS) + 0.5) / SUBPIXELS - 0.5).tolist()
    for dy in steps:
        y = (rows + dy - of(lesions.row)) * pixel
        for dx in steps:
            x = (columns + dx - of(lesions.column)) * pixel
            along, across = (x * cosine + y * sine) / a, (y * cosine - x * sine) / b
            angle = torch.atan2(across, along)
            outline = torch.ones_like(angle)
            for k in range(3):
                strength, phase = waves[:, k, 0, None, None], waves[:, k, 1, None, None]
                outline = outline + strength * torch.cos((k + 2) * angle + phase)
            rho = (along**2 + across**2) / outline**2
            height = c * (1 - rho).clamp(min=0).sqrt()
            share = share + _overlap(height, middle, half)
            inner = 0.6 * c * (1 - rho / 0.36).clamp(min=0).sqrt()
            core = core + _overlap(inner, middle * 0.6, half)
    return share / SUBPIXELS**2, core / SUBPIXELS**2


def _overlap(height: Tensor, middle: Tensor, half: Tensor) -> Tensor:
    """|[-height, height] n [middle - half, middle + half]| / (2 half)"""
    top = torch.minimum(height, middle + half)
    bottom = torch.maximum(-height, middle - half)
    return (top - bottom).clamp(min=0) / (2 * half)


def _first_size(kind: Tensor, generator: Generator, settings: LesionSettings) -> Tensor:
    """Longest diameters in mm, `[B]`: log-normal between the type's limits, or log-uniform in
    `settings.size`."""
    uniform = torch.rand(len(kind), generator=generator)
    if settings.size is not None:
        smallest, largest = settings.size
        return smallest * (largest / smallest) ** uniform
    mean, deviation = (torch.tensor([each.size[i] for each in TYPES])[kind] for i in (0, 1))
    low, high = (torch.tensor([math.log(each.limits[i]) for each in TYPES])[kind] for i in (0, 1))
    normal = torch.distributions.Normal(0.0, 1.0)
    below, above = normal.cdf((low - mean) / deviation), normal.cdf((high - mean) / deviation)
    return (mean + deviation * normal.icdf(below + (above - below) * uniform)).exp()


def _room(anatomy: Anatomy, deep: Tensor) -> Tensor:
    """Distance to the brain's border and middle plane, mm, `[B, H, W]`; 0 where there is no tissue
    or no lobe, or where the border is closer than `deep`, `[B]`."""
    relative = anatomy.images / tissue(anatomy.images, anatomy.depth > 0)
    # Fluid is dark on T1 and FLAIR and bright on T2.
    solid = torch.where(
        anatomy.sequence[:, None, None] == 1,
        (relative < 1.5) & (relative > 0.4),
        (relative > 0.65) & (relative < 1.7),
    )
    lobes = lobe_map(anatomy.u, anatomy.v, anatomy.w)
    # Two thirds, so that no more than a sliver of a lesion crosses the middle plane.
    from_middle = anatomy.u.abs() * anatomy.width[:, None, None] * 2 / 3
    room = torch.minimum(anatomy.depth, from_middle)
    allowed = solid & (lobes > 0) & (anatomy.depth >= deep[:, None, None])
    return torch.where(allowed, room, 0.0)


def tissue(images: Tensor, brain: Tensor) -> Tensor:
    """The median brightness of the brain in each slice, `[B, 1, 1]`, above 0; brain: bool
    `[B, H, W]`."""
    inside = torch.where(brain, images, torch.nan).flatten(1)
    return inside.nanmedian(dim=1).values.nan_to_num(1.0).clamp(min=1e-6)[:, None, None]


def _positions(
    cell: Tensor, room: Tensor, size: Tensor, wanted: Tensor, uniform, pixel: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which lesions have a position, and its row and column; each `[B, L]`."""
    B, H, W = room.shape
    L = size.shape[1]
    cell = cell.flatten(1)
    narrow = cell.to(torch.uint8)
    present = torch.zeros(B, L, dtype=torch.bool, device=room.device)
    row = torch.zeros(B, L, device=room.device)
    column = torch.zeros(B, L, device=room.device)
    for number in range(L):
        free = room.flatten(1) >= (size[:, number, None] / 3 - 1e-4).clamp(min=SMALLEST / 2)
        # Every lobe and side equally often, however large.
        area = torch.stack([(free & (narrow == c)).sum(1) for c in range(9)], dim=1).float()
        weight = (free / area.gather(1, cell).clamp(min=1)).double().cumsum(1)
        u = uniform(B, CANDIDATES).double() * weight[:, -1:]
        index = torch.searchsorted(weight, u, right=True).clamp(max=H * W - 1)
        rows, columns = index // W, index % W
        ok = (weight[:, -1:] > 0).expand(B, CANDIDATES)
        if number:
            gap = torch.hypot(
                rows[:, :, None] - row[:, None, :number],
                columns[:, :, None] - column[:, None, :number],
            )
            needed = 0.55 * (size[:, number, None] + size[:, :number]) + 3.0
            far = gap * pixel > needed[:, None]
            ok = ok & (far | ~present[:, None, :number]).all(2)
        best = ok.int().argmax(1, keepdim=True)
        present[:, number] = ok.gather(1, best)[:, 0] & (wanted > number)
        row[:, number] = rows.gather(1, best)[:, 0].float()
        column[:, number] = columns.gather(1, best)[:, 0].float()
    return present, row, column


def _texture(
    number: int, size: tuple[int, int], pixel: float, generator: Generator, device: torch.device
) -> Tensor:
    """Smooth noise `[number, H, W]` of standard deviation about 1, with grains of 4 mm."""
    grid = [max(2, round(side * pixel / 4)) for side in size]
    points = torch.randn(number, 1, *grid, generator=generator).to(device)
    return 1.4 * F.interpolate(points, size=size, mode="bicubic", align_corners=False)[:, 0]


def _of(kind: Tensor, name: str) -> Tensor:
    """A number of `TYPES` for each of `kind`."""
    return torch.tensor([float(getattr(each, name)) for each in TYPES], device=kind.device)[kind]
