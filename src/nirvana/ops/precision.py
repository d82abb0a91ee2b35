"""The dtypes that operations compute in, with and without autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Converts half precision to float32.

    Args:
        x: of any shape and floating dtype.

    Returns:
        x in float32, or in float64 if it was that.
    """
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Turns autocast off for a block; free where it is off already.

    Args:
        device: the device whose autocast is meant.

    Returns:
        a context manager.
    """
    if _autocasts(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_autocast(x: Tensor) -> Tensor:
    """Converts x to the dtype that autocast multiplies matrices in.

    Args:
        x: of any shape and floating dtype.

    Returns:
        x in autocast's dtype for its device, or x itself where autocast is off.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if _autocasts(kind) else x


def _autocasts(kind: str) -> bool:
    """Whether autocast is on for a kind of device; meta has none.

    PyTorch 2.11 cannot compile the function that answers which kinds have it.
    """
    return kind != "meta" and torch.is_autocast_enabled(kind)
