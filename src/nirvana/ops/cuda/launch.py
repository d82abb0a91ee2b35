"""How the Triton kernels of this folder are launched."""

from typing import Any

import torch
from torch import Tensor

FLEXIBLE_LAYOUT = (torch.Tag.flexible_layout,)
"""Tag of operations that take strided slices of a larger product, so that none is copied."""
LEAST = 16
"""Smallest number of rows and of columns that `tl.dot` takes."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its first argument.

    Args:
        kernel: a function decorated with `triton.jit`.
        grid: programs along each axis.
        args: its tensors and numbers, in order.
        constants: its `tl.constexpr` arguments, and options of the launch (`num_warps`).
    """
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def blocks(count: int, size: int) -> int:
    """The number of blocks of `size` that hold `count` items: count / size, rounded up."""
    return -(-count // size)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, which `tl.arange` requires, and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def even_rows(x: Tensor) -> Tensor:
    """x `[B, T, D]` itself if its tokens have one stride and are contiguous each; else a copy."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even or (x.shape[0] == 1 and x.stride(2) == 1) else x.contiguous()
