"""How the Triton kernels of this folder are launched."""

from typing import Any

import torch

LEAST = 16
"""Rows and columns that a product in a kernel takes."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs `kernel` on the device of its first argument; what is not a tensor or a number is a
    constant of its compilation."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, which a kernel's ranges want, and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
