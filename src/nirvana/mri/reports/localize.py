"""Which slices of a volume can be reported, and which region of a slice a report names."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.anatomy.brain_slices import DEEPEST, PIXEL, SHALLOWEST
from nirvana.mri.anatomy.lobes import LOBES, SIDES, Frame, brain_mask, frame_of, lobe_map
from nirvana.mri.reports.grammar import Facts

CUT = 2000.0  # mm² of brain in the last slice from which on the top of the brain is cut off


class Brain(NamedTuple):
    """A brain in a volume."""

    mask: np.ndarray  # bool [slices, H, W]
    frame: Frame


def find_brain(images: np.ndarray, spacing: float, stripped: bool) -> Brain | None:
    """Finds the brain in a volume.

    Args:
        images: real `[slices, *GRID]`, as `encode_scan` yields them.
        spacing: of slices, mm.
        stripped: the images show the brain alone.

    Returns:
        The brain, or None where none is found.
    """
    try:
        mask = brain_mask(images, (spacing, PIXEL, PIXEL), stripped)
        return Brain(mask, frame_of(mask, (spacing, PIXEL, PIXEL)))
    except InputError:
        return None


def readable_slices(brain: Brain | None, slices: int) -> list[int]:
    """The slices at the heights that reporters are trained on, from the deep nuclei to below the
    vertex.

    Args:
        brain: of `find_brain`.
        slices: number of slices.

    Returns:
        Indices of slices. All of them where the heights are unknown, because no brain was found or
        its top is not in the volume, and where no slice has such a height.
    """
    every = list(range(slices))
    if brain is None or brain.mask[-1].sum() * PIXEL**2 > CUT:
        return every
    return [i for i in every if SHALLOWEST <= brain.frame.depth(i) <= DEEPEST] or every


def lobe_region(brain: Brain, slice_index: int, facts: Facts) -> np.ndarray | None:
    """The region of a slice that a report names: the lobe of the largest lesion, on its side.

    Args:
        brain: of `find_brain`.
        slice_index: of the slice.
        facts: of the report.

    Returns:
        Bool `[H, W]`; None without a finding, or where this slice has no such lobe.
    """
    mask = brain.mask[slice_index]
    u, v = brain.frame.coordinates((mask.shape[0], mask.shape[1]))
    return region_in(u, v, torch.tensor(brain.frame.depth(slice_index)), mask, facts)


def region_in(u: Tensor, v: Tensor, w: Tensor, mask: np.ndarray, facts: Facts) -> np.ndarray | None:
    """`lobe_region` for a slice of given coordinates.

    Args:
        u: real, of a shape that broadcasts to `[H, W]`; see `lobes` for all three coordinates.
        v: likewise.
        w: likewise.
        mask: bool `[H, W]`, of the brain.
        facts: of the report.
    """
    if facts.lobe is None or facts.side is None:
        return None
    lobes = lobe_map(u, v, w)
    inside = (lobes == 1 + LOBES.index(facts.lobe)) & ((u > 0) == bool(SIDES.index(facts.side)))
    marked = inside.numpy() & mask
    return marked if marked.any() else None
