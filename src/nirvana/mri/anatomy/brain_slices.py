"""Brain slices on one grid with the anatomy that simulated lesions need: a pool to sample from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Generator, Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_file
from nirvana.mri.anatomy.augment import draw_warp, per_slice, vary_contrast
from nirvana.mri.anatomy.lesions import SEQUENCES, Anatomy
from nirvana.mri.anatomy.lobes import brain_mask, distance, frame_of
from nirvana.mri.io import read_affine, read_spacing, read_volume
from nirvana.mri.io.scan import UNREADABLE

GRID = (192, 160)  # pixels
PIXEL = 1.2  # mm
SLAB = 3.0  # mm of the volume that are averaged to a slice
SHALLOWEST, DEEPEST = 0.12, 0.45  # w of the first and the last slice (see `lobes`)
STEP = 0.012  # w between slices
MIDDLE = 0.4  # w of the axis about which a volume is pitched
LESION_AREA = 20.0  # mm²: slices that show more of a known lesion are left out
FRAME = 6  # numbers of a slice's frame
COLUMNS = ("images", "depth", "frame", "sequence", "subject")


@dataclass(frozen=True)
class BrainSlices:
    """Slices of any number of volumes, `[S, H, W]` of one grid and pixel size.

    Attributes:
        images: uint8, 255 is the volume's brightest voxel.
        depth: uint8, distance to the border of the brain in mm, 0 outside.
        frame: float32 `[S, 6]`: column, row, half width and half length of the brain in pixels, the
            slice's w (see `lobes`), and its pitch in radians (see `slices_of`).
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

    def to(self, device: str | torch.device) -> "BrainSlices":
        """The same on another device."""
        return BrainSlices(*(getattr(self, name).to(device) for name in COLUMNS), names=self.names)

    def of_subjects(self, names: Sequence[str]) -> "BrainSlices":
        """The slices of some subjects.

        Raises:
            InputError: there are no slices of a subject.
        """
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise InputError(
                f"no slices of {', '.join(unknown)}; there are {', '.join(self.names)}"
            )
        wanted = torch.tensor([name in names for name in self.names], device=self.subject.device)
        kept = wanted[self.subject]
        return BrainSlices(*(getattr(self, name)[kept] for name in COLUMNS), names=self.names)

    def draw(self, count: int, generator: Generator, vary: bool = True) -> tuple[Anatomy, Tensor]:
        """Random slices, every subject equally often.

        Args:
            count: number of slices.
            generator: on the CPU.
            vary: deform the slices (`augment.draw_warp`) and change their contrast
                (`augment.vary_contrast`). Both precede the lesions, whose sides and signals are
                therefore those of the varied slice.

        Returns:
            The slices' anatomy, and their indices, int64 `[count]` on the CPU.
        """
        per_subject = torch.bincount(self.subject, minlength=len(self.names)).cpu()
        weight = 1.0 / per_subject[self.subject.cpu()].float()
        index = torch.multinomial(weight, count, replacement=True, generator=generator)
        return self.views(index, generator, vary), index

    def views(self, index: Tensor, generator: Generator, vary: bool = True) -> Anatomy:
        """The anatomy of the slices `index`, int64 `[B]`; arguments as of `draw`."""
        index = index.to(self.images.device)
        H, W = self.images.shape[1:]
        warp = draw_warp(len(index), (H, W), PIXEL, generator, self.images.device, vary)
        view = warp.sample(torch.stack([self.images[index], self.depth[index]], dim=1).float())
        frame = self.frame[index]
        u = (warp.column - per_slice(frame[:, 0])) / per_slice(frame[:, 2]) * per_slice(warp.flip)
        v = (per_slice(frame[:, 1]) - warp.row) / per_slice(frame[:, 3])
        v, w = upright(v, per_slice(frame[:, 4]), per_slice(frame[:, 5]))
        images, sequence = view[:, 0] / 255, self.sequence[index]
        if vary:
            images, sequence = vary_contrast(images, view[:, 1] > 0, sequence, generator)
        return Anatomy(
            images=images,
            depth=view[:, 1] * per_slice(warp.scale),
            u=u,
            v=v,
            w=w,
            sequence=sequence,
            width=frame[:, 2] * warp.scale / warp.stretch * PIXEL,
            pixel=PIXEL,
        )


def slices_of(
    path: str | Path,
    sequence: str,
    subject: str,
    stripped: bool = False,
    lesions: str | Path | None = None,
    without: Sequence[tuple[float, float]] = (),
    pitch: float = 0.0,
    above: float = 0.0,
) -> BrainSlices:
    """The slices of a volume that can carry simulated lesions.

    Args:
        path: NIfTI volume.
        sequence: one of `SEQUENCES`.
        subject: name of the person.
        stripped: the volume shows the brain alone.
        lesions: mask of known lesions on the same grid; slices that show them are left out.
        without: further ranges of height that are left out, in mm along the scanner's third axis
            by the volume's affine, measured in the middle of the brain.
        pitch: degrees by which the volume is rotated before it is cut into slices, the front down
            for positive values; not together with `without`.
        above: mm of the brain that the volume lacks above its last slice with brain.

    Raises:
        InputError: the sequence is unknown, or a file cannot be used.
    """
    if sequence not in SEQUENCES:
        raise InputError(f"sequence {sequence!r} must be one of {', '.join(SEQUENCES)}")
    spacing, affine = read_spacing(path), read_affine(path)
    if spacing is None or affine is None:
        raise InputError(f"{path} does not state its spacing; give a NIfTI volume")
    if pitch and without:
        raise InputError(f"{path}: heights to leave out are only defined without a pitch")
    volume = read_volume(path)
    known = np.zeros_like(volume) if lesions is None else read_volume(lesions)
    if known.shape != volume.shape:
        raise InputError(f"{lesions} is not on the grid of {path}")
    if pitch:
        volume, known = (pitched(x, spacing, pitch) for x in (volume, known))
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
    return BrainSlices(
        images=torch.from_numpy(np.stack(images) * 255).round().clamp(0, 255).byte(),
        depth=torch.from_numpy(np.stack(depths)).round().clamp(0, 255).byte(),
        frame=torch.tensor(frames, dtype=torch.float32),
        sequence=torch.full((count,), SEQUENCES.index(sequence)),
        subject=torch.zeros(count, dtype=torch.int64),
        names=(subject,),
    )


def upright(v: Tensor, w: Tensor, pitch: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates v and w (see `lobes`) of a pitched brain in the frame of the upright brain, in
    which the lobes are defined.

    Args:
        v: real, in the frame of the pitched brain.
        w: likewise; all three broadcast.
        pitch: radians, the front down for positive values.

    Returns:
        v and w in the frame of the upright brain.
    """
    front, up = v / 2, MIDDLE - w  # from the brain's middle, in lengths of the brain
    cosine, sine = pitch.cos(), pitch.sin()
    return 2 * (front * cosine - up * sine), MIDDLE - (up * cosine + front * sine)


def pitched(volume: np.ndarray, spacing: tuple[float, float, float], pitch: float) -> np.ndarray:
    """A volume rotated about the left-right axis through its middle, 0 outside.

    Args:
        volume: real `[slices, H, W]`, slices from bottom to top, rows from front to back.
        spacing: of slices, rows and columns, mm.
        pitch: degrees, the front down for positive values.

    Returns:
        float32 of the same shape.
    """
    cosine, sine = math.cos(math.radians(pitch)), math.sin(math.radians(pitch))
    up, back = spacing[0], spacing[1]
    # From a voxel of the rotated volume to its place in the given one.
    turn = np.array([[cosine, -sine * back / up], [sine * up / back, cosine]])
    middle = (np.array(volume.shape[:2]) - 1) / 2
    matrix = np.eye(3)
    offset: Any = np.zeros(3)
    matrix[:2, :2], offset[:2] = turn, middle - turn @ middle
    return ndimage.affine_transform(volume.astype(np.float32), matrix, offset, order=1)


def join_brain_slices(parts: Sequence[BrainSlices]) -> BrainSlices:
    """All slices of several pools; a subject may occur in more than one."""
    names = tuple(sorted({name for part in parts for name in part.names}))
    subject = [
        torch.tensor([names.index(name) for name in part.names])[part.subject] for part in parts
    ]
    return BrainSlices(
        *(torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS[:-1]),
        subject=torch.cat(subject),
        names=names,
    )


def save_brain_slices(path: str | Path, slices: BrainSlices) -> None:
    """Writes a compressed `.npz`, atomically."""
    arrays: dict[str, Any] = {name: getattr(slices, name).cpu().numpy() for name in COLUMNS}
    with atomic_file(path) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, names=np.array(slices.names), **arrays)


def load_brain_slices(path: str | Path) -> BrainSlices:
    """Reads a file that `save_brain_slices` wrote; nothing in it is unpickled.

    Raises:
        InputError: the file is missing or has another form.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(str(name) for name in file["names"])
            columns = [torch.from_numpy(file[name]) for name in COLUMNS]
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as brain slices: {error}") from error
    slices = BrainSlices(*columns, names=names)
    if slices.frame.shape != (len(slices), FRAME):
        raise InputError(
            f"{path} has frames of {slices.frame.shape[-1]} numbers, not {FRAME}; make it anew"
        )
    return slices


def _on_grid(
    image: np.ndarray, zoom: tuple[float, float], column: float, row: float
) -> tuple[np.ndarray, float, float]:
    """A slice resampled to `GRID` with its brain in the middle, and the column and row of that
    middle."""
    # Blurred to the new pixel first, so that finer detail does not alias.
    sigma = [max(0.0, 0.5 * (1 / z - 1)) for z in zoom]
    smooth = ndimage.gaussian_filter(image.astype(np.float32), sigma)
    middle = ((GRID[0] - 1) / 2, (GRID[1] - 1) / 2)
    offset: Any = [row - middle[0] / zoom[0], column - middle[1] / zoom[1]]
    scale = np.array([1 / zoom[0], 1 / zoom[1]])
    aligned = ndimage.affine_transform(smooth, scale, offset, output_shape=GRID, order=1)
    return aligned, middle[1], middle[0]
