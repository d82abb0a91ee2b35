"""What packed attention tells cuDNN about documents, on any device."""

import torch

from nirvana.ops.attention import _places


def test_places_of_documents(device):
    borders = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    places = _places(borders, 5)
    assert places.lengths.tolist() == [3, 1, 6, 0, 0]
    assert places.of_row(20).tolist() == [0, 60, 80, 200, 200, 200]
    assert _places(borders, 5) is places
    borders[1] = 2
    assert _places(borders, 5).lengths.tolist() == [2, 2, 6, 0, 0]
