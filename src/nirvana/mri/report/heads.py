"""Slices of heads on one grid, with what lesions need to know of them: a pool to sample from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_file
from nirvana.mri.io import read_affine, read_spacing, read_volume
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.lesions import SEQUENCES, Anatomy, tissue
from nirvana.mri.lobes import brain_mask, distance, frame_of

GRID = (192, 160)  # pixels
PIXEL = 1.2  # mm
SLAB = 3.0  # mm of the volume that a slice is the mean of
SHALLOWEST, DEEPEST = 0.12, 0.45  # w of the slices
STEP = 0.012  # between them, w
MIDDLE = 0.4  # w of the brain's middle, about which a head nods
LESION_AREA = 20.0  # mm² of a known lesion from which on a slice is no background
BENDS = ((10.0, (5, 4)), (3.0, (12, 10)))  # mm, and the points between which slices are bent
SHADE, SHADE_GRID = 0.3, (4, 3)  # largest logarithm of the smooth shading, and its points
CURVE, CURVE_PARTS = 0.5, 5  # spread of the logarithm of the slopes of a curve of brightness
STRIPPED = 0.2  # share of slices of which the brain alone is shown
BLUR = 1.0  # largest standard deviation of the blur, pixels
STAND_INS = (0.1, 0.1)  # share of T1 slices that become what a T2, and what a FLAIR looks like
# Brightness over the brain's median on T1 and on FLAIR: fluid dark, grey matter above white, fat
# bright. A T1 has fluid at 0.3, grey matter at 0.8 and white at 1.15.
FLAIR_OF_T1 = ((0.0, 0.4, 0.8, 1.15, 1.45, 2.5), (0.0, 0.25, 1.12, 0.88, 0.9, 2.0))
FRAME = 6  # numbers of a slice's frame
COLUMNS = ("images", "depth", "frame", "sequence", "subject")


@dataclass(frozen=True)
class Heads:
    """Slices of any number of volumes, `[S, H, W]` of one grid and pixel size.

    Attributes:
        images: uint8, 255 is the volume's brightest voxel.
        depth: uint8, way to the border of the brain in mm, 0 outside.
        frame: float32 `[S, 6]`: column, row, half width and half length of the brain in pixels, the
            slice's w (see `lobes`), and the pitch of the head, radians (see `slices_of`).
        sequence: int64 `[S]`, index in `SEQUENCES`.
        subject: int64 `[S]`, index in `names`.
        names: of the subjects.
    """

    images: Tensor
    depth: Tensor
    frame: Tensor
    sequence: Tensor
    subject: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str | torch.device) -> "Heads":
        """The same on another device."""
        return Heads(*(getattr(self, name).to(device) for name in COLUMNS), names=self.names)

    def of_subjects(self, names: Sequence[str]) -> "Heads":
        """The slices of some subjects.

        Raises:
            InputError: for a subject that is not there.
        """
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise InputError(
                f"no slices of {', '.join(unknown)}; there are {', '.join(self.names)}"
            )
        wanted = torch.tensor([name in names for name in self.names], device=self.subject.device)
        kept = wanted[self.subject]
        return Heads(*(getattr(self, name)[kept] for name in COLUMNS), names=self.names)

    def draw(self, count: int, generator: Generator, vary: bool = True) -> tuple[Anatomy, Tensor]:
        """Random slices, every subject as often as any other.

        Each is turned up to 15 degrees, scaled by 0.85 to 1.15, stretched up to 8 %, moved up to
        5 mm, bent smoothly by some 10 mm and mirrored half of the time; it is shaded and blurred,
        and some T1 become a stand-in for T2 or FLAIR (`varied`); unless `vary` is off. All of that
        comes before lesions do, so sides and signals are true.

        Returns: the slices' anatomy, and their indices `[count]`.
        """
        per_subject = torch.bincount(self.subject, minlength=len(self.names)).cpu()
        weight = 1.0 / per_subject[self.subject.cpu()].float()
        index = torch.multinomial(weight, count, replacement=True, generator=generator)
        return self.views(index, generator, vary), index

    def views(self, index: Tensor, generator: Generator, vary: bool = True) -> Anatomy:
        """Slices `index`, `[B]`, as `draw` returns them."""
        B, device = len(index), self.images.device
        index = index.to(device)
        H, W = self.images.shape[1:]
        r = 2 * torch.rand(B, 6, generator=generator) - 1
        r = (r if vary else torch.zeros_like(r)).to(device)
        bend = torch.zeros(B, 2, H, W, device=device)
        for most, points in BENDS if vary else ():
            moved = most / PIXEL * (2 * torch.rand(B, 2, *points, generator=generator) - 1)
            bend += F.interpolate(moved.to(device), (H, W), mode="bicubic", align_corners=True)
        angle, scale, stretch = r[:, 0] * torch.pi / 12, 1 + 0.15 * r[:, 1], 1 + 0.08 * r[:, 2]
        flip = torch.where(r[:, 3] < 0, -1.0, 1.0)
        # Of a pixel of the view from the middle, in pixels, to the slice's, likewise.
        row, column = torch.meshgrid(
            torch.arange(H, device=device) - (H - 1) / 2,
            torch.arange(W, device=device) - (W - 1) / 2,
            indexing="ij",
        )
        y = (row[None] - _each(r[:, 4] * 5 / PIXEL)) / _each(scale * stretch)
        x = (column[None] - _each(r[:, 5] * 5 / PIXEL)) / _each(scale / stretch)
        cosine, sine = _each(angle.cos()), _each(angle.sin())
        source_x = (x * cosine - y * sine) * _each(flip) + (W - 1) / 2 + bend[:, 0]
        source_y = x * sine + y * cosine + (H - 1) / 2 + bend[:, 1]
        grid = torch.stack([(2 * source_x + 1) / W - 1, (2 * source_y + 1) / H - 1], dim=-1)
        both = torch.stack([self.images[index], self.depth[index]], dim=1).float()
        view = F.grid_sample(both, grid, align_corners=False, padding_mode="zeros")
        frame = self.frame[index]
        u = (source_x - _each(frame[:, 0])) / _each(frame[:, 2]) * _each(flip)
        v = (_each(frame[:, 1]) - source_y) / _each(frame[:, 3])
        v, w = upright(v, _each(frame[:, 4]), _each(frame[:, 5]))
        images, sequence = view[:, 0] / 255, self.sequence[index]
        if vary:
            images, sequence = varied(images, view[:, 1] > 0, sequence, generator)
        return Anatomy(
            images=images,
            depth=view[:, 1] * _each(scale),
            u=u,
            v=v,
            w=w,
            sequence=sequence,
            width=frame[:, 2] * scale / stretch * PIXEL,
            pixel=PIXEL,
        )


def varied(
    images: Tensor, brain: Tensor, sequence: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Slices in other contrasts than those that few heads have: the brightness of each is bent by a
    rising curve, shaded smoothly and blurred, shares of the T1 are turned into what a T2 and what a
    FLAIR looks like, and of some the brain alone is kept.

    Args:
        images: `[B, H, W]` in 0..1.
        brain: bool, of the same shape.
        sequence: `[B]`, index in `SEQUENCES`.
        generator: of the random numbers.

    Returns: images and their sequences.
    """
    B, H, W = images.shape
    chosen = torch.rand(B, generator=generator).to(images.device)
    shade = (2 * torch.rand(B, 1, *SHADE_GRID, generator=generator) - 1).to(images)
    shade = F.interpolate(SHADE * shade, size=(H, W), mode="bicubic", align_corners=True)[:, 0]
    slopes = (CURVE * torch.randn(B, CURVE_PARTS, generator=generator)).exp().to(images)
    stripped = (torch.rand(B, generator=generator) < STRIPPED).to(images.device)
    blur = BLUR * torch.rand(B, generator=generator).to(images)

    t1 = sequence == SEQUENCES.index("T1")
    to_t2 = t1 & (chosen < STAND_INS[0])
    to_flair = t1 & ~to_t2 & (chosen < sum(STAND_INS))
    top = _each((images * brain).amax((1, 2))).clamp(min=1 / 255)
    inside = images > 0.1 * top
    t2 = torch.where(inside, (1.05 * top - images).clamp(min=0.03), images)
    images = torch.where(_each(to_t2), t2, images)
    images = torch.where(_each(to_flair), _flair_of(images, brain), images)
    top = _each((images * brain).amax((1, 2))).clamp(min=1 / 255)
    images = top * _bent(images / top, slopes)
    images = torch.where(_each(stripped) & ~brain, 0.0, images)
    sequence = torch.where(to_t2, SEQUENCES.index("T2"), sequence)
    sequence = torch.where(to_flair, SEQUENCES.index("FLAIR"), sequence)
    return blurred(images * shade.exp(), blur).clamp(min=0.0), sequence


def _flair_of(images: Tensor, brain: Tensor) -> Tensor:
    """What T1 slices would look like as FLAIR, by `FLAIR_OF_T1`."""
    before, after = (torch.tensor(values, device=images.device) for values in FLAIR_OF_T1)
    median = tissue(images, brain)
    relative = images / median
    part = torch.bucketize(relative, before[1:-1])
    slope = after.diff() / before.diff()
    return median * (after[part] + slope[part] * (relative - before[part]))


def _bent(relative: Tensor, slopes: Tensor) -> Tensor:
    """Brightness `[B, H, W]` through a curve of straight parts with these slopes, `[B, parts]`: 0
    and 1 stay, and so does what is above."""
    parts = slopes.shape[1]
    steps = slopes / slopes.sum(1, keepdim=True)
    ends = steps.cumsum(1)
    part = (relative * parts).long().clamp(0, parts - 1)
    step, end = (x.gather(1, part.flatten(1)).view_as(relative) for x in (steps, ends))
    bent = end + step * (relative * parts - part - 1)
    return torch.where(relative > 1, relative, bent)


def blurred(images: Tensor, deviation: Tensor) -> Tensor:
    """Each of `[B, H, W]` blurred by a Gaussian of its own standard deviation, `[B]`, pixels."""
    H, W = images.shape[-2:]
    rows = torch.fft.fftfreq(H, device=images.device)[:, None]
    columns = torch.fft.rfftfreq(W, device=images.device)
    passed = torch.exp(-2 * (torch.pi * _each(deviation)) ** 2 * (rows**2 + columns**2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * passed, s=(H, W))


def slices_of(
    path: str | Path,
    sequence: str,
    subject: str,
    stripped: bool = False,
    lesions: str | Path | None = None,
    without: Sequence[tuple[float, float]] = (),
    pitch: float = 0.0,
    above: float = 0.0,
) -> Heads:
    """The slices of a volume that can carry simulated lesions.

    Args:
        path: NIfTI volume.
        sequence: one of `SEQUENCES`.
        subject: whose it is.
        stripped: the volume shows the brain alone.
        lesions: mask of known lesions on the same grid; slices that show them are left out.
        without: ranges of height that are left out, too: of the scanner's third axis in mm, in the
            middle of the brain, as the volume's affine says.
        pitch: degrees by which the head nods (front down above 0) before it is cut into slices, for
            others than its own; not together with `without`.
        above: mm of the brain that the volume does not show, above its last slice with brain.

    Raises:
        InputError: for an unknown sequence or a file that cannot be used.
    """
    if sequence not in SEQUENCES:
        raise InputError(f"sequence {sequence!r} must be one of {', '.join(SEQUENCES)}")
    spacing, affine = read_spacing(path), read_affine(path)
    if spacing is None or affine is None:
        raise InputError(f"{path} does not tell its spacing; give a NIfTI volume")
    if pitch and without:
        raise InputError(f"{path}: heights to leave out are those of a head that does not nod")
    volume = read_volume(path)
    known = np.zeros_like(volume) if lesions is None else read_volume(lesions)
    if known.shape != volume.shape:
        raise InputError(f"{lesions} is not on the grid of {path}")
    if pitch:
        volume, known = (nodded(x, spacing, pitch) for x in (volume, known))
    known = known > 0.5
    brain = brain_mask(volume, spacing, stripped)
    frame = frame_of(brain, spacing)
    frame = replace(frame, top=frame.top + above / spacing[0])
    half = max(0, round((SLAB / spacing[0] - 1) / 2))
    images, depths, frames = [], [], []
    zoom = (spacing[1] / PIXEL, spacing[2] / PIXEL)
    for w in np.arange(SHALLOWEST, DEEPEST + STEP / 2, STEP):
        middle = round(frame.top - w * frame.slices_per_length)
        low, high = max(0, middle - half), min(len(volume), middle + half + 1)
        if low >= high or known[low:high].any(0).sum() * spacing[1] * spacing[2] > LESION_AREA:
            continue
        height = (affine @ (middle, frame.row, frame.column, 1))[2]
        if any(bottom <= height <= top for bottom, top in without):
            continue
        inside, column, row = _on_grid(brain[low:high].mean(0), zoom, frame.column, frame.row)
        images.append(_on_grid(volume[low:high].mean(0), zoom, frame.column, frame.row)[0])
        depths.append(distance(inside > 0.5, (PIXEL, PIXEL)))
        halves = frame.half_width * zoom[1], frame.half_length * zoom[0]
        frames.append([column, row, *halves, w, math.radians(pitch)])
    if not images:
        raise InputError(f"{path} has no slice without a known lesion")
    count = len(images)
    return Heads(
        images=torch.from_numpy(np.stack(images) * 255).round().clamp(0, 255).byte(),
        depth=torch.from_numpy(np.stack(depths)).round().clamp(0, 255).byte(),
        frame=torch.tensor(frames, dtype=torch.float32),
        sequence=torch.full((count,), SEQUENCES.index(sequence)),
        subject=torch.zeros(count, dtype=torch.int64),
        names=(subject,),
    )


def upright(v: Tensor, w: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates v and w (see `lobes`) that places of a nodding head have in an upright one,
    on which the lobes are drawn; all broadcast.

    Args:
        v, w: in the frame of the nodding head.
        pitch: radians, the front down above 0.
    """
    front, up = v / 2, MIDDLE - w  # from the brain's middle, in lengths of the brain
    cosine, sine = pitch.cos(), pitch.sin()
    return 2 * (front * cosine - up * sine), MIDDLE - (up * cosine + front * sine)


def nodded(volume: np.ndarray, spacing: tuple[float, float, float], pitch: float) -> np.ndarray:
    """A volume `[slices, H, W]`, from bottom to top and from front to back, turned about the axis
    from left to right through its middle by `pitch` degrees, the front down; outside of it is 0.

    Args:
        spacing: of slices, rows and columns, mm.

    Returns: float32 of the same shape.
    """
    cosine, sine = math.cos(math.radians(pitch)), math.sin(math.radians(pitch))
    up, back = spacing[0], spacing[1]
    # Of a place in the turned volume to the one that it came from, in voxels.
    turn = np.array([[cosine, -sine * back / up], [sine * up / back, cosine]])
    middle = (np.array(volume.shape[:2]) - 1) / 2
    matrix = np.eye(3)
    offset: Any = np.zeros(3)
    matrix[:2, :2], offset[:2] = turn, middle - turn @ middle
    return ndimage.affine_transform(volume.astype(np.float32), matrix, offset, order=1)


def join_heads(parts: Sequence[Heads]) -> Heads:
    """Many as one; a subject may come in several."""
    names = tuple(sorted({name for part in parts for name in part.names}))
    subject = [
        torch.tensor([names.index(name) for name in part.names])[part.subject] for part in parts
    ]
    return Heads(
        *(torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS[:-1]),
        subject=torch.cat(subject),
        names=names,
    )


def save_heads(path: str | Path, heads: Heads) -> None:
    """Writes a compressed `.npz`, atomically."""
    arrays: dict[str, Any] = {name: getattr(heads, name).cpu().numpy() for name in COLUMNS}
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, names=np.array(heads.names), **arrays)


def load_heads(path: str | Path) -> Heads:
    """What `save_heads` wrote.

    Raises:
        InputError: for a file that is missing or no such file; nothing is unpickled from it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(str(name) for name in file["names"])
            columns = [torch.from_numpy(file[name]) for name in COLUMNS]
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as slices of heads: {error}") from error
    heads = Heads(*columns, names=names)
    if heads.frame.shape != (len(heads), FRAME):
        raise InputError(
            f"{path} has frames of {heads.frame.shape[-1]} numbers, not {FRAME}; make it anew"
        )
    return heads


def _each(x: Tensor) -> Tensor:
    return x[:, None, None]


def _on_grid(
    image: np.ndarray, zoom: tuple[float, float], column: float, row: float
) -> tuple[np.ndarray, float, float]:
    """A slice resampled to `GRID`, its brain in the middle; and where the brain's middle came."""
    # Blurred to the new pixel first, so that finer detail does not alias.
    sigma = [max(0.0, 0.5 * (1 / z - 1)) for z in zoom]
    smooth = ndimage.gaussian_filter(image.astype(np.float32), sigma)
    middle = ((GRID[0] - 1) / 2, (GRID[1] - 1) / 2)
    offset: Any = [row - middle[0] / zoom[0], column - middle[1] / zoom[1]]
    scale = np.array([1 / zoom[0], 1 / zoom[1]])
    moved = ndimage.affine_transform(smooth, scale, offset, output_shape=GRID, order=1)
    return moved, middle[1], middle[0]
