"""Where in a volume reports can be made, and where in a slice a finding is said to lie."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.lobes import LOBES, SIDES, Frame, brain_mask, frame_of, lobe_map
from nirvana.mri.report.grammar import Facts
from nirvana.mri.report.heads import DEEPEST, PIXEL, SHALLOWEST

CUT = 2000.0  # mm² of brain in the last slice, from which on the volume ends below the top of it


class Brain(NamedTuple):
    """What `find_brain` finds."""

    mask: np.ndarray  # bool [slices, H, W]
    frame: Frame


def find_brain(images: np.ndarray, spacing: float, stripped: bool) -> Brain | None:
    """Where the brain is in a volume's pictures.

    Args:
        images: real `[slices, H, W]` on the reports' grid, as `encode_scan` yields them.
        spacing: of slices, mm.
        stripped: the images show the brain alone.

    Returns: None where none is found.
    """
    try:
        mask = brain_mask(images, (spacing, PIXEL, PIXEL), stripped)
        return Brain(mask, frame_of(mask, (spacing, PIXEL, PIXEL)))
    except InputError:
        return None


def readable(brain: Brain | None, slices: int) -> list[int]:
    """The slices at heights at which reports were learned, from the deep nuclei to below the
    vertex: of others, the cerebellum's say, a reporter knows nothing.

    Returns: their indices, of `slices`; all where the heights cannot be told, as no brain was found
        or its top is not in the volume, and where none is at such a height.
    """
    every = list(range(slices))
    if brain is None or brain.mask[-1].sum() * PIXEL**2 > CUT:
        return every
    return [i for i in every if SHALLOWEST <= brain.frame.depth(i) <= DEEPEST] or every


def place(brain: Brain, slice_index: int, facts: Facts) -> np.ndarray | None:
    """Where the largest lesion is said to lie in a slice: bool `[H, W]` of its lobe on its side.

    Returns: None without a finding, or where the lobe map has no such lobe in this slice.
    """
    mask = brain.mask[slice_index]
    u, v = brain.frame.coordinates((mask.shape[0], mask.shape[1]))
    return within(u, v, torch.tensor(brain.frame.depth(slice_index)), mask, facts)


def within(u: Tensor, v: Tensor, w: Tensor, mask: np.ndarray, facts: Facts) -> np.ndarray | None:
    """What `place` returns, in any slice.

    Args:
        u, v, w: coordinates of its pixels, see `lobes`, of shapes that broadcast to `[H, W]`.
        mask: bool `[H, W]`, of the brain.
        facts: of the slice.
    """
    if facts.lobe is None or facts.side is None:
        return None
    lobes = lobe_map(u, v, w)
    inside = (lobes == 1 + LOBES.index(facts.lobe)) & ((u > 0) == bool(SIDES.index(facts.side)))
    marked = inside.numpy() & mask
    return marked if marked.any() else None
