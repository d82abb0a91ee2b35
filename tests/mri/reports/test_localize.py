"""Which slices of a volume a reporter can read."""

import numpy as np
import pytest

from nirvana.mri.anatomy.brain_slices import DEEPEST, GRID, PIXEL, SHALLOWEST
from nirvana.mri.reports.localize import find_brain, readable_slices

SPACING = 3.0
LENGTH = 160.0  # mm, of the brain below


def brain(bottom: float = -60.0, top: float = 70.0) -> np.ndarray:
    """A stripped brain of 160 x 130 x 120 mm between two heights from its middle, mm."""
    z = np.arange(bottom, top, SPACING)[:, None, None]
    y = (np.arange(GRID[0])[:, None] - GRID[0] / 2) * PIXEL
    x = (np.arange(GRID[1]) - GRID[1] / 2) * PIXEL
    return ((x / 65) ** 2 + (y / (LENGTH / 2)) ** 2 + (z / 60) ** 2 < 1).astype(np.float32)


def test_the_heights_that_were_learned_are_read() -> None:
    images = brain()
    read = readable_slices(find_brain(images, SPACING, stripped=True), len(images))
    heights = np.array(read) * SPACING - 60
    assert np.array_equal(np.diff(read), np.ones(len(read) - 1))
    assert heights[0] == pytest.approx(60 - DEEPEST * LENGTH, abs=2 * SPACING)
    assert heights[-1] == pytest.approx(60 - SHALLOWEST * LENGTH, abs=2 * SPACING)


@pytest.mark.parametrize(
    "images",
    [brain(top=40.0), brain()[-5:], np.zeros((5, *GRID), np.float32)],
    ids=["top cut off", "none at such a height", "no brain"],
)
def test_all_are_read_where_heights_are_unknown(images: np.ndarray) -> None:
    found = find_brain(images, SPACING, stripped=True)
    assert readable_slices(found, len(images)) == list(range(len(images)))
