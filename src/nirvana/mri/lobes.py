"""Where in the brain a place is: a frame of the head, sides, and lobes.

Pictures are in radiological convention, as `io.read_volume` turns them: the first row is in front,
and the first column is on the patient's right. A side is always the patient's: the patient's left
is on the right of the picture.

A frame is the box of the brain in a volume. In it a place has three coordinates:

    u   -1 at the right border of the brain, 0 in its middle plane, +1 at the left border
    v   -1 at the back, +1 in front
    w   depth below the top of the brain, over the brain's length from front to back

The lobes are drawn by hand on these coordinates, with planes for the sulci that part them; they
follow the atlases' landmarks (central sulcus, Sylvian fissure, parieto-occipital sulcus) on a brain
of 138 x 176 mm and are no segmentation of the brain at hand: a place near a border may lie in the
neighbouring lobe.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nirvana.errors import InputError

LOBES = ("frontal", "parietal", "temporal", "occipital")
SIDES = ("right", "left")
LENGTH, WIDTH = 176.0, 138.0  # of the brain that the lobes were drawn on, mm
TOP, MIDDLE = 78.0, -16.0  # heights and places along the length of MNI space that are w = 0, v = 0
DEEP = 26.0  # half width of the deep nuclei and the insula, which belong to no lobe, mm
LOWEST = 0.56  # w of the lowest place that has a lobe; below lie the cerebellum and the brain stem


@dataclass(frozen=True)
class Frame:
    """The box of the brain in a volume `[slices, H, W]`, in voxels.

    Attributes:
        column, row: the middle of the brain.
        half_width, half_length: half of its extent along the columns and along the rows.
        top: slice of its highest point; slices count upwards.
        slices_per_length: slices that are as thick together as the brain is long.
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
    """The lobe at places of the frame: 0 for none, else 1 + the index in `LOBES`.

    Args:
        u, v, w: real, of shapes that broadcast.

    Returns: int64 of the common shape.
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
    """Where the brain is: what is as bright as the head's middle, hangs together there, and is
    parted from the scalp by the dark skull; or everything shown where the skull is stripped.

    Enough to place a frame and findings; not a segmentation to measure volumes with.

    Args:
        magnitude: real `[slices, H, W]`, slices from bottom to top, their first row in front.
        spacing: of slices, rows, columns in mm.
        stripped: the volume shows the brain alone.

    Returns: bool `[slices, H, W]`.

    Raises:
        InputError: when nothing like a brain is found.
    """
    shown = magnitude > 0.05 * magnitude.max()
    head = _filled(shown)
    if stripped:
        return head
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
    tissue &= distance(head, spacing) > 7.0  # the scalp's thickness
    parted = distance(tissue, spacing) > 3.0
    labels, count = (np.asarray(x) for x in ndimage.label(parted))  # type: ignore[union-attr]
    if typical == 0 or count == 0:
        raise InputError("no brain is found in the volume; give one of a head or a brain")
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    brain = distance(labels != largest, spacing) <= 6.0
    brain = distance(brain, spacing) > 1.5
    return _filled(brain)


def _filled(inside: np.ndarray) -> np.ndarray:
    """Without holes in any slice."""
    return np.stack([np.asarray(ndimage.binary_fill_holes(part)) for part in inside])


def distance(inside: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """How far every place inside is from the nearest one outside, mm; 0 outside."""
    return np.asarray(ndimage.distance_transform_edt(inside, sampling=spacing))


def frame_of(brain: np.ndarray, spacing: tuple[float, float, float]) -> Frame:
    """The frame of a brain mask `[slices, H, W]`; spacing as for `brain_mask`.

    Width and length are those of the upper 80 mm, where neither cerebellum nor face is.

    Raises:
        InputError: for an empty mask.
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
