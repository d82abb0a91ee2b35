"""Random changes of slices before they are scanned: of their geometry, and of their contrast.

Two trainings draw two kinds of geometry. `draw_affines` gives affine maps between grids of any
sizes, for slices without further data (`data.slices`); `draw_warp` gives affine maps with smooth
bends on one grid in mm, for slices whose coordinates in the brain must follow
(`anatomy.brain_slices`). `vary_contrast` changes the brightness of the latter.

Every random number comes from the caller's generator on the CPU.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from nirvana.mri.anatomy.lesions import SEQUENCES, tissue

# Largest displacement in mm, and control points along rows and columns, of each smooth bend.
BENDS = ((10.0, (5, 4)), (3.0, (12, 10)))
SHADE, SHADE_GRID = 0.3, (4, 3)  # largest |ln factor| of the smooth shading, and control points
CURVE, CURVE_PARTS = 0.5, 5  # standard deviation of ln slope of a brightness curve, linear pieces
STRIPPED = 0.2  # share of slices that keep the brain alone
BLUR = 1.0  # largest standard deviation of the blur, pixels
STAND_INS = (0.1, 0.1)  # shares of T1 slices that are turned into a stand-in for T2, and for FLAIR
# Brightness relative to the brain's median on T1 and on FLAIR: fluid dark, grey matter above white,
# fat bright. A T1 has fluid at 0.3, grey matter at 0.8 and white matter at 1.15.
FLAIR_OF_T1 = ((0.0, 0.4, 0.8, 1.15, 1.45, 2.5), (0.0, 0.25, 1.12, 0.88, 0.9, 2.0))


def draw_affines(
    sides: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    generator: Generator,
    fill: tuple[float, float] = (0.75, 1.15),
) -> Tensor:
    """Random affine views: rotated up to 15 degrees, scaled so that the slice's longer side fills
    a share of the field of view, stretched up to 10 %, shifted up to 8 % and mirrored half of the
    time.

    Args:
        sides: float32 `[B, 2]`, height and width of each slice within its grid, pixels.
        grid: H and W of the grid that the slices are centred in.
        size: H and W of the views.
        generator: on the CPU.
        fill: range of that share.

    Returns:
        float32 `[B, 2, 3]`, from the coordinates of a view, -1..1, to those of the grid, as
        `torch.nn.functional.affine_grid` takes them.
    """
    u = torch.rand(6, len(sides), generator=generator)
    angle = (2 * u[0] - 1) * torch.pi / 12
    filled, stretch = fill[0] + (fill[1] - fill[0]) * u[1], 0.9 + 0.2 * u[2]
    # Pixels of the slice per pixel of the view, the same along both axes.
    zoom = (sides / torch.tensor(size)).amax(1) / filled
    flip = torch.where(u[3] < 0.5, -1.0, 1.0)
    across, along = size[1] * zoom * flip / stretch, size[0] * zoom * stretch
    to_pixels = torch.diag_embed(torch.stack([across, along], dim=1))
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    to_grid = torch.tensor([1 / grid[1], 1 / grid[0]])
    linear = to_grid[:, None] * (turn.view(-1, 2, 2) @ to_pixels)
    shift = 0.16 * (u[4:].T - 0.5) * sides.flip(1) * to_grid
    return torch.cat([linear, shift[:, :, None]], dim=2)


@dataclass(frozen=True)
class Warp:
    """Random deformations of slices on their own grid.

    Attributes:
        column, row: `[B, H, W]`, the place in the slice that a pixel of the view is read from,
            pixels.
        flip: `[B]`, -1 for a mirrored view, else 1.
        scale: `[B]`, sizes in the view over sizes in the slice.
        stretch: `[B]`, factor along the rows' direction, and its inverse along the columns'.
    """

    column: Tensor
    row: Tensor
    flip: Tensor
    scale: Tensor
    stretch: Tensor

    def sample(self, slices: Tensor) -> Tensor:
        """Views `[B, C, H, W]` of slices `[B, C, H, W]`, bilinear, 0 outside."""
        H, W = slices.shape[-2:]
        grid = torch.stack([(2 * self.column + 1) / W - 1, (2 * self.row + 1) / H - 1], dim=-1)
        return F.grid_sample(slices, grid, align_corners=False, padding_mode="zeros")


def draw_warp(
    count: int,
    size: tuple[int, int],
    pixel: float,
    generator: Generator,
    device: torch.device,
    vary: bool = True,
) -> Warp:
    """Random deformations: rotated up to 15 degrees, scaled by 0.85 to 1.15, stretched up to 8 %,
    shifted up to 5 mm, bent smoothly by up to 13 mm (`BENDS`) and mirrored half of the time.

    Args:
        count: number of slices B.
        size: H and W.
        pixel: side of a pixel in mm.
        generator: on the CPU.
        device: of the result.
        vary: False gives the identity.
    """
    H, W = size
    r = 2 * torch.rand(count, 6, generator=generator) - 1
    r = (r if vary else torch.zeros_like(r)).to(device)
    bend = torch.zeros(count, 2, H, W, device=device)
    for most, points in BENDS if vary else ():
        shifts = most / pixel * (2 * torch.rand(count, 2, *points, generator=generator) - 1)
        bend += F.interpolate(shifts.to(device), (H, W), mode="bicubic", align_corners=True)
    angle, scale, stretch = r[:, 0] * torch.pi / 12, 1 + 0.15 * r[:, 1], 1 + 0.08 * r[:, 2]
    flip = torch.where(r[:, 3] < 0, -1.0, 1.0)
    # From the middle of the view, in pixels, to the middle of the slice.
    row, column = torch.meshgrid(
        torch.arange(H, device=device) - (H - 1) / 2,
        torch.arange(W, device=device) - (W - 1) / 2,
        indexing="ij",
    )
    y = (row[None] - per_slice(r[:, 4] * 5 / pixel)) / per_slice(scale * stretch)
    x = (column[None] - per_slice(r[:, 5] * 5 / pixel)) / per_slice(scale / stretch)
    cosine, sine = per_slice(angle.cos()), per_slice(angle.sin())
    return Warp(
        column=(x * cosine - y * sine) * per_slice(flip) + (W - 1) / 2 + bend[:, 0],
        row=x * sine + y * cosine + (H - 1) / 2 + bend[:, 1],
        flip=flip,
        scale=scale,
        stretch=stretch,
    )


def per_slice(x: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1]`, to broadcast over images `[B, H, W]`."""
    return x[:, None, None]


def vary_contrast(
    images: Tensor, brain: Tensor, sequence: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Slices in more contrasts than few subjects have: each goes through a rising brightness curve,
    a smooth shading and a blur; shares of the T1 slices become stand-ins for T2 and FLAIR, and some
    slices keep the brain alone.

    Args:
        images: float32 `[B, H, W]` in 0..1.
        brain: bool, of the same shape.
        sequence: int64 `[B]`, index in `SEQUENCES`.
        generator: on the CPU.

    Returns:
        Images, at least 0, of the same shape, and their sequences.
    """
    B, H, W = images.shape
    chosen = torch.rand(B, generator=generator).to(images.device)
    shade = (2 * torch.rand(B, 1, *SHADE_GRID, generator=generator) - 1).to(images)
    shade = F.interpolate(SHADE * shade, size=(H, W), mode="bicubic", align_corners=True)[:, 0]
    slopes = (CURVE * torch.randn(B, CURVE_PARTS, generator=generator)).exp().to(images)
    stripped = (torch.rand(B, generator=generator) < STRIPPED).to(images.device)
    deviation = BLUR * torch.rand(B, generator=generator).to(images)

    t1 = sequence == SEQUENCES.index("T1")
    to_t2 = t1 & (chosen < STAND_INS[0])
    to_flair = t1 & ~to_t2 & (chosen < sum(STAND_INS))
    top = per_slice((images * brain).amax((1, 2))).clamp(min=1 / 255)
    inside = images > 0.1 * top
    t2 = torch.where(inside, (1.05 * top - images).clamp(min=0.03), images)
    images = torch.where(per_slice(to_t2), t2, images)
    images = torch.where(per_slice(to_flair), _flair_from_t1(images, brain), images)
    top = per_slice((images * brain).amax((1, 2))).clamp(min=1 / 255)
    images = top * _curved(images / top, slopes)
    images = torch.where(per_slice(stripped) & ~brain, 0.0, images)
    sequence = torch.where(to_t2, SEQUENCES.index("T2"), sequence)
    sequence = torch.where(to_flair, SEQUENCES.index("FLAIR"), sequence)
    return blur(images * shade.exp(), deviation).clamp(min=0.0), sequence


def _flair_from_t1(images: Tensor, brain: Tensor) -> Tensor:
    """T1 slices in the contrast of FLAIR, by the piecewise linear curve `FLAIR_OF_T1`."""
    before, after = (torch.tensor(values, device=images.device) for values in FLAIR_OF_T1)
    median = tissue(images, brain)
    relative = images / median
    part = torch.bucketize(relative, before[1:-1])
    slope = after.diff() / before.diff()
    return median * (after[part] + slope[part] * (relative - before[part]))


def _curved(relative: Tensor, slopes: Tensor) -> Tensor:
    """Brightness `[B, H, W]` through a piecewise linear curve from 0 to 1 with slopes proportional
    to `[B, parts]`; values above 1 stay."""
    parts = slopes.shape[1]
    steps = slopes / slopes.sum(1, keepdim=True)
    ends = steps.cumsum(1)
    part = (relative * parts).long().clamp(0, parts - 1)
    step, end = (x.gather(1, part.flatten(1)).view_as(relative) for x in (steps, ends))
    curved = end + step * (relative * parts - part - 1)
    return torch.where(relative > 1, relative, curved)


def blur(images: Tensor, deviation: Tensor) -> Tensor:
    """Images `[B, H, W]`, each blurred by a Gaussian of standard deviation `[B]`, in pixels."""
    H, W = images.shape[-2:]
    rows = torch.fft.fftfreq(H, device=images.device)[:, None]
    columns = torch.fft.rfftfreq(W, device=images.device)
    passed = torch.exp(-2 * (torch.pi * per_slice(deviation)) ** 2 * (rows**2 + columns**2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * passed, s=(H, W))
