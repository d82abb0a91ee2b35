"""One optimiser step after another, and sums that stay on the device between reports."""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.seeds import mixed_seed
from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.estimate import peak_flops
from nirvana.train.optim import learning_rate
from nirvana.train.parallel import clip, reduce_gradients, synchronize_gradients
from nirvana.train.task import Task
from nirvana.train.world import World


class Trainer:
    """Updates the weights of a task's model.

    A step is the same whatever number of processes share it: its micro batches are numbered through
    all of them, and the random generators are seeded anew for each by its number. Sums of floats
    depend on their order, though. On the CPU a process alone adds up the two halves of a step on
    their own, as two processes would: there the weights are the same to the bit.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        run: RunConfig,
        parameters: list[tuple[str, nn.Parameter]],
        optimizer: torch.optim.AdamW,
        world: World,
    ) -> None:
        self.task, self.optim, self.run, self.world = task, optim, run, world
        self.parameters = [parameter for _, parameter in parameters]
        self.optimizer = optimizer
        self.mine = world.share(optim.accumulation)
        alone = world.size == 1 and world.device.type == "cpu"
        self.half = optim.accumulation // 2 if alone and optim.accumulation % 2 == 0 else 0
        self.zero = torch.zeros((), device=world.device)
        self.skipped, self.in_row, self.most_in_row = self.zero, self.zero, self.zero
        self.peak_flops = world.size * peak_flops(world.device, run.precision)
        self._restart_sums()

    def autocast(self) -> torch.autocast:
        """The arithmetic that `run.precision` asks for."""
        dtype = self.run.autocast_dtype(self.world.device)
        # Weights that other processes hold parts of are freed after use; a kept cast would not be.
        return torch.autocast(
            self.world.device.type,
            dtype,
            enabled=dtype is not None,
            cache_enabled=self.world.size == 1,
        )

    def step(self, step: int, batches: list[Any]) -> None:
        """Update number `step`, from 0, from this process's micro batches; on CUDA the host
        waits for nothing."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.optim, self.run.steps)
        values = self._accumulate(step, batches)
        reduce_gradients(self.parameters, self.world)
        summed = self.world.sum(torch.stack(list(values.values())))
        values = dict(zip(values, summed.unbind(), strict=True))
        norm = clip(self.parameters, self.optim.clip)
        finite = values["loss"].isfinite() & norm.isfinite()
        if self.optimizer.defaults["fused"]:
            # It leaves the step out, moments and counts too, where this is one.
            setattr(self.optimizer, "found_inf", (~finite).float())  # noqa: B010  (undeclared there)
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._count(finite, {**values, "gradient_norm": norm})

    def _accumulate(self, step: int, batches: list[Any]) -> dict[str, Tensor]:
        """Leaves the sum of the gradients in the parameters; returns this process's share of the
        mean loss and of the task's scalars."""
        halves: list[dict[str, Tensor]] = [{}, {}]
        kept: list[Tensor | None] = []
        for index, (micro, batch) in enumerate(zip(self.mine, batches, strict=True)):
            if self.half and index == self.half:
                kept = [parameter.grad for parameter in self.parameters]
                self.optimizer.zero_grad()
            synchronize_gradients(self.task.model, index == len(batches) - 1)
            seed_generators(self.run.seed, step, micro)
            with self.autocast():
                loss, others = self.task.loss(batch)
            (loss / self.optim.accumulation).backward()
            sums = halves[bool(self.half) and index >= self.half]
            for name, value in {"loss": loss.detach(), **others}.items():
                part = value.float() / self.optim.accumulation
                sums[name] = sums.get(name, self.zero) + part
        for parameter, first in zip(self.parameters, kept, strict=False):
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
            kept = torch.where(finite, value.float(), self.zero)
            self.sums[name] = self.sums.get(name, self.zero) + kept
        self.num_steps += 1

    def report(self, done: int) -> dict[str, Any]:
        """Means over the finite steps since the last report; this waits for the device."""
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
            "memory_gib": peak_memory(self.world.device) / 2**30,
            "skipped": int(skipped),
            "most_skipped_in_row": int(most_in_row),
        }
        self._restart_sums()
        return line

    def restart_clock(self) -> None:
        """Leaves the time since the last report out of the throughput."""
        self.started = time.perf_counter()

    def _restart_sums(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_finite, self.num_steps = self.zero, 0
        self.restart_clock()


def seed_generators(*key: int) -> None:
    """Seeds torch's generators, on every device, with a function of some whole numbers."""
    torch.manual_seed(mixed_seed(*key))


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors took on a GPU, or this process took on the CPU, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on other systems
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
