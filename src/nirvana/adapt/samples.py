"""The samples in a batch: padded rows, and several documents packed into one row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nirvana.model.masks import Borders, row_layout


@dataclass(frozen=True)
class Sample:
    """Where the tokens of one sample are in a batch.

    Attributes:
        row: of the batch.
        columns: `[tokens]`, the sample's columns in the order in which they are read.
    """

    row: int
    columns: Tensor


def split_samples(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Borders | None = None,
    seq_idx: Tensor | None = None,
) -> list[Sample]:
    """Finds the samples of a batch by the model's own rules, see docs/packing.md.

    Args:
        input_ids: `[B, T]`.
        attention_mask: see `nirvana.model.masks.row_layout`.
        position_ids: see there.
        cu_seqlens: see there.
        seq_idx: see there.

    Returns:
        the samples, row by row and in the order of a row; none is empty.

    Raises:
        ValueError: for masks and borders that `row_layout` rejects.
    """
    B, T = input_ids.shape
    device = input_ids.device
    borders = None if cu_seqlens is None else torch.as_tensor(cu_seqlens)
    layout = row_layout(
        attention_mask, position_ids, borders, seq_idx, B, T, 0, device, cached=False
    )
    columns = torch.arange(T, device=device).expand(B, T)
    columns = (columns if layout.order is None else layout.order).cpu()
    number = torch.zeros(B, T, dtype=torch.long)
    if layout.border is not None:
        number = layout.border.long().cumsum(1).cpu()
    real = torch.ones(B, T, dtype=torch.bool)
    if layout.numbers is not None:
        real = (layout.numbers != 0).cpu()
    found = []
    for row in range(B):
        for each in number[row].unique():
            inside = (number[row] == each) & real[row]
            if inside.any():
                found.append(Sample(row, columns[row, inside]))
    return found
