"""Chunks of tokens: how many there are, also while `torch.export` traces, and their samples."""

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether `torch.export` traces the program. PyTorch 2.11 answers that with yes in every
    `torch.compile`, too, and cannot trace the question, so what its compiler traces is no export
    here, nor is a strict one."""
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def chunk_count(T: int, c: int) -> int:
    """The number of chunks of c tokens that T tokens are padded to. In an export it is one more,
    and so never one, which PyTorch's tracer would take for a fixed size."""
    return (T - 1) // c + (2 if is_exporting() else 1)


def is_one(T: int) -> bool:
    """T == 1, without a guard on a length that is dynamic in an export."""
    return isinstance(T, int) and T == 1


def pad_segments(segments: Tensor, c: int) -> Tensor:
    """Padding belongs to the last sample, so that the final state is that sample's."""
    T = segments.shape[1]
    padding = chunk_count(T, c) * c - T
    return torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1)
