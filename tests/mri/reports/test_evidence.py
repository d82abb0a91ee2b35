"""The evidence map of a reporter whose evidence is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nirvana.mri.model.layout import PATCH
from nirvana.mri.reports.evidence import evidence_map

SIZE = (4 * PATCH, 3 * PATCH)


class BrightestPatch:
    """Its log-odds of a finding are a weight times the brightest magnitude within one patch."""

    def __init__(self, row: int, column: int, weight: float, mirrored: bool) -> None:
        self.weight, self.mirrored = weight, mirrored
        rows = slice(row * PATCH, (row + 1) * PATCH)
        columns = slice(column * PATCH, (column + 1) * PATCH)
        self.model = SimpleNamespace(device="cpu", encoder=lambda image: image)
        self.inside = lambda images: images.norm(dim=1)[:, rows, columns].amax((1, 2))

    def findings(self, tokens: torch.Tensor) -> list[float]:
        if self.mirrored:
            both = self.inside(tokens[:, 0]) + self.inside(tokens[:, 1].flip(-1))
            return torch.sigmoid(self.weight * both / 2).tolist()
        return torch.sigmoid(self.weight * self.inside(tokens)).tolist()


def lesion(row: int, column: int) -> torch.Tensor:
    """A faint image with one bright spot in the middle of a patch."""
    image = torch.full((2, *SIZE), 0.1)
    middle = (row * PATCH + PATCH // 2, column * PATCH + PATCH // 2)
    image[:, middle[0] - 2 : middle[0] + 2, middle[1] - 2 : middle[1] + 2] = 1.0
    return image


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("weight", [2.0, -2.0])
def test_the_map_is_strongest_where_the_finding_is(weight, mirrored):
    reporter: Any = BrightestPatch(2, 0, weight, mirrored)
    counted = []
    found = evidence_map(reporter, lesion(2, 0), counted.append)
    assert found.shape == (4, 3)
    assert sum(counted) == 12
    assert np.unravel_index(np.abs(found).argmax(), found.shape) == (2, 0)
    assert np.sign(found[2, 0]) == np.sign(weight)
    # Faded at the weight's peak, about nothing of the spot is left.
    assert abs(found[2, 0]) > 0.7 * 2 * (2**0.5 - 0.1 * 2**0.5)
    assert np.abs(found[0]).max() < 1e-3  # far away


def test_an_empty_slice_has_no_evidence():
    reporter: Any = BrightestPatch(0, 0, 2.0, False)
    assert not evidence_map(reporter, torch.zeros(2, *SIZE)).any()
