"""The optimiser step; metrics are summed on the device between two logs."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.device import peak_memory
from nirvana.seeds import mixed_seed
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.estimate import peak_flops
from nirvana.train.optim import Optimizer, learning_rate, step_if_finite
from nirvana.train.parallel import clip, reduce_gradients, synchronize_gradients
from nirvana.train.task import Task


class Trainer:
    """Updates the weights of a task's model.

    A step does not depend on the number of processes: micro batches are numbered over all of them,
    and the random generators are seeded for each micro batch by its number. Sums of floats still
    depend on their order. On the CPU a single process therefore sums the two halves of a step
    separately, as two processes would, and obtains bitwise the same weights.

    Args:
        task: model, data and loss.
        optim: settings of the optimiser.
        run: settings of the run.
        parameters: the trained ones by name.
        optimizer: over `parameters`.
        processes: the processes of the run.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        parameters: list[tuple[str, nn.Parameter]],
        optimizer: Optimizer,
        processes: ProcessContext,
    ) -> None:
        self.task, self.optim, self.run, self.processes = task, optim, run, processes
        self.parameters = [parameter for _, parameter in parameters]
        self.optimizer = optimizer
        self.micro_batches = processes.local_micro_batches(optim.accumulation)
        alone = processes.size == 1 and processes.device.type == "cpu"
        self.half = optim.accumulation // 2 if alone and optim.accumulation % 2 == 0 else 0
        self.zero = torch.zeros((), device=processes.device)
        self.skipped, self.in_row, self.most_in_row = self.zero, self.zero, self.zero
        self.peak_flops = processes.size * peak_flops(processes.device, run.precision)
        self._restart_sums()

    def autocast(self) -> torch.autocast:
        """Returns the autocast context that `run.precision` selects."""
        dtype = self.run.autocast_dtype(self.processes.device)
        # Gathered weights are freed after use; a cached cast of them would not be.
        return torch.autocast(
            self.processes.device.type,
            dtype,
            enabled=dtype is not None,
            cache_enabled=self.processes.size == 1,
        )

    def step(self, step: int, batches: list[Any]) -> None:
        """Performs one optimiser step; on CUDA it does not synchronise with the host, except for
        Muon.

        Args:
            step: number of the step, from 0.
            batches: this process's micro batches, in the order of `micro_batches`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.optim, self.run.steps)
        values = self._accumulate(step, batches)
        reduce_gradients(self.parameters, self.processes)
        summed = self.processes.all_reduce_sum(torch.stack(list(values.values())))
        values = dict(zip(values, summed.unbind(), strict=True))
        norm = clip(self.parameters, self.optim.clip)
        finite = values["loss"].isfinite() & norm.isfinite()
        step_if_finite(self.optimizer, finite)
        self.optimizer.zero_grad()
        self._count(finite, {**values, "gradient_norm": norm})

    def _accumulate(self, step: int, batches: list[Any]) -> dict[str, Tensor]:
        """Sums the gradients of this process's micro batches into the parameters; returns its part
        of the mean loss and of the task's scalars."""
        halves: list[dict[str, Tensor]] = [{}, {}]
        first_half: list[Tensor | None] = []
        for index, (micro, batch) in enumerate(zip(self.micro_batches, batches, strict=True)):
            if self.half and index == self.half:
                first_half = [parameter.grad for parameter in self.parameters]
                self.optimizer.zero_grad()
            synchronize_gradients(self.task.model, index == len(batches) - 1)
            seed_generators(self.run.seed, step, micro)
            with self.autocast():
                loss, scalars = self.task.loss(batch)
            (loss / self.optim.accumulation).backward()
            sums = halves[bool(self.half) and index >= self.half]
            for name, value in {"loss": loss.detach(), **scalars}.items():
                part = value.float() / self.optim.accumulation
                sums[name] = sums.get(name, self.zero) + part
        for parameter, first in zip(self.parameters, first_half, strict=False):
            if first is not None:
                parameter.grad = first if parameter.grad is None else first + parameter.grad
        first_sums, second_sums = halves
        return {name: v + second_sums.get(name, self.zero) for name, v in first_sums.items()}

    def _count(self, finite: Tensor, values: dict[str, Tensor]) -> None:
        bad = (~finite).float()
        self.skipped = self.skipped + bad
        self.in_row = (self.in_row + bad) * bad
        self.most_in_row = torch.maximum(self.most_in_row, self.in_row)
        self.num_finite = self.num_finite + 1 - bad
        for name, value in values.items():
            counted = torch.where(finite, value.float(), self.zero)
            self.sums[name] = self.sums.get(name, self.zero) + counted
        self.num_steps += 1

    def metrics(self, done: int) -> dict[str, Any]:
        """Computes means over the finite steps since the last call; synchronises the device.

        Args:
            done: steps done.

        Returns:
            The figures of one log line: loss, gradient norm and the task's scalars (None when no
            step was finite), learning rate, throughput, MFU, memory, skipped steps.
        """
        names = list(self.sums)
        counts = [self.num_finite, self.skipped, self.most_in_row]
        fetched = torch.stack([*counts, *self.sums.values()]).tolist()
        num_finite, skipped, most_in_row = fetched[:3]
        rate = self.num_steps / (time.perf_counter() - self.started)
        means = {
            n: v / num_finite if num_finite else None
            for n, v in zip(names, fetched[3:], strict=True)
        }
        flops = self.task.flops_per_step * rate
        line = {
            "step": done,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            f"{self.task.unit}_per_second": self.task.units_per_step * rate,
            **({"mfu": flops / self.peak_flops} if flops and self.peak_flops else {}),
            "memory_gib": peak_memory(self.processes.device) / 2**30,
            "skipped": int(skipped),
            "most_skipped_in_row": int(most_in_row),
        }
        self._restart_sums()
        return line

    def restart_clock(self) -> None:
        """Excludes the time since the last call of `metrics` from the throughput."""
        self.started = time.perf_counter()

    def _restart_sums(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_finite, self.num_steps = self.zero, 0
        self.restart_clock()


def seed_generators(*key: int) -> None:
    """Seeds torch's generators on every device.

    Args:
        key: numbers of which the seed is a function, each at least 0.
    """
    torch.manual_seed(mixed_seed(*key))
