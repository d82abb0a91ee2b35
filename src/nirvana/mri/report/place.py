"""Where in a volume reports can be made, and where in a slice a finding is said to lie."""

import numpy as np
import torch

from nirvana.errors import InputError
from nirvana.mri.lobes import LOBES, SIDES, Frame, brain_mask, frame_of, lobe_map
from nirvana.mri.report.grammar import Facts
from nirvana.mri.report.heads import DEEPEST, PIXEL, SHALLOWEST

CUT = 2000.0  # mm² of brain in the last slice, from which on the volume ends below the top of it


def readable(images: np.ndarray, spacing: float, stripped: bool) -> list[int]:
    """The slices at heights at which reports were learned, from the deep nuclei to below the
    vertex: of others, the cerebellum's say, a reporter knows nothing.

    Args:
        images: real `[slices, H, W]` on the reports' grid, as `encode_scan` yields them.
        spacing: of slices, mm.
        stripped: the images show the brain alone.

    Returns: their indices; all where the heights cannot be told, as no brain is found or its top
        is not in the volume, and where none is at such a height.
    """
    every = list(range(len(images)))
    found = frame(images, spacing, stripped)
    if found is None:
        return every
    brain, box = found
    if brain[-1].sum() * PIXEL**2 > CUT:
        return every
    return [i for i in every if SHALLOWEST <= box.depth(i) <= DEEPEST] or every


def place(
    images: np.ndarray, slice_index: int, spacing: float, facts: Facts, stripped: bool
) -> np.ndarray | None:
    """Where the largest lesion is said to lie: bool `[H, W]` of its lobe on its side.

    Args:
        images, spacing, stripped: as of `readable`.
        slice_index: of the slice.
        facts: of the slice.

    Returns: None without a finding, where no brain is found, or where the lobe map has no such lobe
        in this slice.
    """
    found = frame(images, spacing, stripped)
    if found is None or facts.lobe is None or facts.side is None:
        return None
    brain, box = found
    u, v = box.coordinates(images.shape[1:])
    lobes = lobe_map(u, v, torch.tensor(box.depth(slice_index)))
    inside = (lobes == 1 + LOBES.index(facts.lobe)) & ((u > 0) == bool(SIDES.index(facts.side)))
    marked = inside.numpy() & brain[slice_index]
    return marked if marked.any() else None


def frame(images: np.ndarray, spacing: float, stripped: bool) -> tuple[np.ndarray, Frame] | None:
    """The brain's mask and box; None where none is found."""
    try:
        brain = brain_mask(images, (spacing, PIXEL, PIXEL), stripped)
        return brain, frame_of(brain, (spacing, PIXEL, PIXEL))
    except InputError:
        return None
