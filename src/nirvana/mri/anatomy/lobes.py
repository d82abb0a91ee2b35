"""Positions in the brain: a coordinate frame, sides, and lobes.

Images are in radiological convention, as `io.read_volume` returns them: the first row is anterior,
the first column is on the patient's right. A side is always the patient's: the patient's left is on
the right of the image.

A frame is the bounding box of the brain in a volume. It defines three coordinates:

    u   -1 at the right border of the brain, 0 in its middle plane, +1 at the left border
    v   -1 at the back, +1 in front
    w   depth below the top of the brain, over the brain's length from front to back

The lobes are defined by planes in these coordinates, which follow the atlases' landmarks (central
sulcus, Sylvian fissure, parieto-occipital sulcus) on a brain of 138 x 176 mm. They do not segment
the individual brain: a position near a border may lie in the neighbouring lobe.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nirvana.errors import InputError

LOBES = ("frontal", "parietal", "temporal", "occipital")
SIDES = ("right", "left")
LENGTH, WIDTH = 176.0, 138.0  # of the brain that the lobes are defined on, mm
TOP, MIDDLE = 78.0, -16.0  # z of w = 0 and y of v = 0 in MNI space, mm
DEEP = 26.0  # half width of the deep nuclei and the insula, which belong to no lobe, mm
LOWEST = 0.56  # w of the lowest position with a lobe, above the cerebellum and the brain stem


@dataclass(frozen=True)
class Frame:
    """The box of the brain in a volume `[slices, H, W]`, in voxels.

    Attributes:
        column: of the middle of the brain.
        row: likewise.
        half_width: half of its extent along a row.
        half_length: half of its extent along a column.
        top: index of the slice of its highest point; slices are numbered from bottom to top.
        slices_per_length: length of the brain over the spacing of the slices.
    """

    column: float
    row: float
    half_width: float
    half_length: float
    top: float
    slices_per_length: float

    def depth(self, slice_index: float) -> float:
        """w of a slice."""
        return (self.top - slice_index) / self.slices_per_length

    def coordinates(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """u `[1, W]` and v `[H, 1]` of the pixels of a slice."""
        rows, columns = torch.arange(size[0]), torch.arange(size[1])
        u = (columns - self.column) / self.half_width
        v = (self.row - rows) / self.half_length
        return u[None], v[:, None]


def lobe_map(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The lobe at positions of the frame.

    Args:
        u: real; all three broadcast.
        v: likewise.
        w: likewise.

    Returns:
        int64 of the common shape: 0 for no lobe, else 1 + the index in `LOBES`.
    """
    x = u.abs() * WIDTH / 2
    y = MIDDLE + v * LENGTH / 2
    z = TOP - w * LENGTH
    central = y + 5 + 0.45 * (z - 10)  # above 0 in front of the central sulcus
    sylvian = z + 15 - 0.6 * (15 - y)  # above 0 over the Sylvian fissure
    behind = y + 68 + 0.5 * (z - 25).clamp(min=0)  # below 0 behind the parieto-occipital sulcus
    lobe = torch.where(central > 0, 1, 2)
    lobe = torch.where((sylvian < 0) & (y < 22) & (x > 18), 3, lobe)
    lobe = torch.where(behind < 0, 4, lobe)
    deep = (x < DEEP) & (y > -42) & (y < 22) & (z < 20)
    inside = (u.abs() <= 1.05) & (v.abs() <= 1.05) & (w >= -0.03) & (w <= LOWEST)
    return torch.where(inside & ~deep, lobe, 0)


def brain_mask(
    magnitude: np.ndarray, spacing: tuple[float, float, float], stripped: bool = False
) -> np.ndarray:
    """A mask of the brain: the largest component as bright as the middle of the head that the dark
    skull separates from the scalp; or everything shown in a skull-stripped volume.

    It is accurate enough to place a frame and findings, not to measure volumes.

    Args:
        magnitude: real `[slices, H, W]`, slices from bottom to top, the first row anterior.
        spacing: of slices, rows, columns in mm.
        stripped: the volume shows the brain alone.

    Returns:
        Bool `[slices, H, W]`.

    Raises:
        InputError: no brain is found.
    """
    shown = magnitude > 0.05 * magnitude.max()
    subject = _filled(shown)
    if stripped:
        return subject
    slices, rows, columns = (np.flatnonzero(shown.any(axis)) for axis in ((1, 2), (0, 2), (0, 1)))
    middle = tuple(
        slice(int(low + share * (high - low)), int(low + (1 - share) * (high - low)) + 1)
        for low, high, share in (
            (slices[0] + (slices[-1] - slices[0]) // 2, slices[-1], 0.1),
            (rows[0], rows[-1], 0.3),
            (columns[0], columns[-1], 0.3),
        )
    )
    inner = magnitude[middle]
    typical = float(np.median(inner[inner > 0.02])) if (inner > 0.02).any() else 0.0
    tissue = (magnitude > 0.5 * typical) & (magnitude < 2.2 * typical)
    tissue &= distance(subject, spacing) > 7.0  # the scalp's thickness
    separated = distance(tissue, spacing) > 3.0
    labels, count = (np.asarray(x) for x in ndimage.label(separated))  # type: ignore[union-attr]
    if typical == 0 or count == 0:
        raise InputError("no brain is found in the volume; give one of a head or a brain")
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    brain = distance(labels != largest, spacing) <= 6.0
    brain = distance(brain, spacing) > 1.5
    return _filled(brain)


def _filled(inside: np.ndarray) -> np.ndarray:
    """The mask with the holes of every slice filled."""
    return np.stack([np.asarray(ndimage.binary_fill_holes(part)) for part in inside])


def distance(inside: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of every voxel inside to the nearest one outside, mm; 0 outside."""
    return np.asarray(ndimage.distance_transform_edt(inside, sampling=spacing))


def frame_of(brain: np.ndarray, spacing: tuple[float, float, float]) -> Frame:
    """The frame of a brain, whose width and length are those of its upper 80 mm, above cerebellum
    and face.

    Args:
        brain: bool `[slices, H, W]`, of `brain_mask`.
        spacing: of slices, rows, columns in mm.

    Raises:
        InputError: no slice shows more than 2 cm² of brain.
    """
    area = brain.sum(axis=(1, 2)) * spacing[1] * spacing[2]
    filled = np.flatnonzero(area > 200.0)  # mm²: a stray voxel is not the top of a brain
    if len(filled) == 0:
        raise InputError("no slice shows a brain larger than 2 cm²")
    top = int(filled[-1])
    upper = brain[max(0, top - round(80 / spacing[0])) : top + 1]
    rows, columns = np.flatnonzero(upper.any((0, 2))), np.flatnonzero(upper.any((0, 1)))
    length = (rows[-1] - rows[0] + 1) * spacing[1]
    return Frame(
        column=float(columns[0] + columns[-1]) / 2,
        row=float(rows[0] + rows[-1]) / 2,
        half_width=float(columns[-1] - columns[0] + 1) / 2,
        half_length=float(rows[-1] - rows[0] + 1) / 2,
        top=float(top),
        slices_per_length=float(length / spacing[0]),
    )
