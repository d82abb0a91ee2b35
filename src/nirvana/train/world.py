"""The processes of one run, and what they tell one another.

Under torchrun (or anything else that sets RANK, WORLD_SIZE and LOCAL_RANK) a run has many; else it
is alone, and every method here costs nothing.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nirvana import ops
from nirvana.errors import InputError


@dataclass(frozen=True)
class World:
    """The place of this process among those of the run."""

    device: torch.device  # this process's own
    rank: int = 0
    size: int = 1
    # Gloo, on the host: for the loop's own words, and for checkpoints that another thread writes
    # meanwhile. Two groups, since messages of two threads in one would mix.
    control: Any = None
    background: Any = None

    @property
    def first(self) -> bool:
        """Whether this process speaks to the user and writes the run's files."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """The micro batches, of `total` in a step, that this process computes.

        Raises:
            InputError: when they cannot be shared out evenly.
        """
        if total % self.size:
            raise InputError(
                f"configuration: optim.accumulation = {total} must be a multiple of the "
                f"{self.size} processes, which share a step's micro batches out among them"
            )
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def worst(self, value: int) -> int:
        """The largest of all processes' numbers; the accelerator is not waited for."""
        if self.size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return int(number)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors, on the device."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def same(self, value: Any) -> Any:
        """The first process's value, a small plain object."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def join(device: str) -> Iterator[World]:
    """Joins the other processes of the run, if there are any, while the block runs.

    Args:
        device: as `choose_device` takes it; "auto" and "cuda" give each process of a machine a GPU
            of its own.

    Raises:
        InputError: for a device that this machine does not have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(choose_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{local}"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(
            chosen,
            dist.get_rank(),
            size,
            dist.new_group(backend="gloo"),
            dist.new_group(backend="gloo"),
        )
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA when there is one, else the CPU. Warns when it is a
    GPU for which no kernels are installed.

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
    if device.type == "cuda" and not ops.HAS_KERNELS:
        warnings.warn(
            "fla-core is not installed, so plain PyTorch computes on this GPU, many times slower "
            "than the kernels: pip install 'nirvana[cuda]'",
            stacklevel=2,
        )
    return device
