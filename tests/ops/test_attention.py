"""The offsets of packed documents that cuDNN reads, on any device."""

import torch

from nirvana.ops.cuda.attention import _offsets


def test_offsets_of_documents(device):
    borders = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    offsets = _offsets(borders, 5)
    assert offsets.lengths.tolist() == [3, 1, 6, 0, 0]
    assert offsets.of_row(20).tolist() == [0, 60, 80, 200, 200, 200]
    assert _offsets(borders, 5) is offsets
    borders[1] = 2
    assert _offsets(borders, 5).lengths.tolist() == [2, 2, 6, 0, 0]
