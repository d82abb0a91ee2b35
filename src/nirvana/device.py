"""Which device to compute on, and what it offers."""

import sys
import warnings
from importlib.util import find_spec

import torch

from nirvana.errors import InputError

HAS_KERNELS = find_spec("fla") is not None and find_spec("triton") is not None
"""Whether the packages of the CUDA kernels are installed."""


def choose_device(name: str) -> torch.device:
    """Returns the device called `name`; warns about a GPU for which no kernels are installed.

    Args:
        name: "cpu", "cuda", "cuda:1" ...; "auto" is CUDA when there is a GPU, else the CPU.

    Returns:
        A device on which a tensor could be allocated.

    Raises:
        InputError: for a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here: {reason}") from None
    if device.type == "cuda" and not HAS_KERNELS:
        warnings.warn(
            "fla-core is not installed, so plain PyTorch computes on this GPU, many times slower "
            "than the kernels: pip install 'nirvana[cuda]'",
            stacklevel=2,
        )
    return device


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory so far, in bytes: of tensors on a GPU, of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
