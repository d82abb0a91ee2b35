"""How the Triton kernels of this folder are launched."""

from typing import Any

import torch
import triton
from triton import knobs
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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


@triton.jit
def before(EARLY: tl.constexpr):
    """Lets the next kernel start, and waits for the one before: what a kernel does before it reads
    what others wrote. Weights may be read earlier."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


def launch_early(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`launch` of a kernel that calls `before`: on Hopper and later it starts while the kernel
    before it in its stream still runs, which hides what a launch costs.

    Args:
        kernel: as of `launch`, with a constant EARLY.
        grid: programs along each axis.
        args: its tensors and numbers, in order.
        constants: its `tl.constexpr` arguments but EARLY, and options of the launch.
    """
    if knobs.runtime.interpret or torch.cuda.get_device_capability(args[0].device)[0] < 9:
        launch(kernel, grid, *args, EARLY=False, **constants)
    else:
        launch(kernel, grid, *args, EARLY=True, launch_pdl=True, **constants)


def blocks(count: int, size: int) -> int:
    """The number of blocks of `size` that hold `count` items: count / size, rounded up."""
    return -(-count // size)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, which `tl.arange` requires, and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())
