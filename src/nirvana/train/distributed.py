"""The processes of one run and the communication between them.

Under torchrun (or any launcher that sets RANK, WORLD_SIZE and LOCAL_RANK) a run has several
processes. In a single process every collective returns its argument at once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nirvana.device import choose_device
from nirvana.errors import InputError


@dataclass(frozen=True)
class ProcessContext:
    """This process and its place among those of the run.

    The methods are collectives: all processes call them together.
    """

    device: torch.device  # this process's own
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    # Gloo groups on the host: `control` for the loop's own messages, `background` for checkpoints
    # that another thread writes at the same time. In one group their messages would mix.
    control: Any = None
    background: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints messages and writes the run's files."""
        return self.rank == 0

    def local_micro_batches(self, total: int) -> range:
        """Selects the micro batches that this process computes.

        Args:
            total: micro batches of a step, in all processes together.

        Returns:
            Their numbers, equally many in every process.

        Raises:
            InputError: when `total` is not a multiple of the number of processes.
        """
        if total % self.size:
            raise InputError(
                f"configuration: optim.accumulation = {total} must be a multiple of the "
                f"{self.size} processes, among which the micro batches of a step are divided"
            )
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def all_reduce_max(self, value: int) -> int:
        """Returns the largest number of all processes, without synchronising the accelerator.

        Args:
            value: this process's number.
        """
        if self.size == 1:
            return value
        number = torch.tensor(value)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return int(number)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the tensors of all processes, on the device.

        Args:
            tensor: this process's tensor, of the same shape in all of them.
        """
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """Returns the main process's object in every process.

        Args:
            value: a small picklable object; only the main process's counts.
        """
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Waits until every process has called it."""
        if self.size > 1:
            dist.barrier(group=self.control)


@contextmanager
def init_distributed(device: str) -> Iterator[ProcessContext]:
    """Connects the processes of the run, if there are several, for the duration of the block.

    Args:
        device: see `choose_device`; with "auto" and "cuda" each process of a machine gets a GPU of
            its own.

    Yields:
        The context of this process.

    Raises:
        InputError: for a device that this machine does not have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ProcessContext(choose_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{local}"
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessContext(
            chosen,
            dist.get_rank(),
            size,
            local,
            dist.new_group(backend="gloo"),
            dist.new_group(backend="gloo"),
        )
    finally:
        dist.destroy_process_group()
