"""The program that torchrun starts for `benchmarks/scaling.py`: trainings that measure themselves.

    torchrun benchmarks/measured.py PLAN.json

PLAN.json is a list of `Measurement`s, made one after another by the package's own loop. Every
process writes what it saw into `Measurement.result(rank)`.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nirvana.device import peak_memory
from nirvana.errors import InputError
from nirvana.train.checkpoint import folder_of
from nirvana.train.config import LanguageConfig
from nirvana.train.language import LanguageTask, train

PATIENCE = 600.0  # seconds in which a checkpoint must have reached the disk
ERROR = "error.txt"  # beside the plan: what was wrong with the input


@dataclass(frozen=True)
class Measurement:
    """One training: what it computes, and which of its steps are looked at."""

    name: str
    config: str
    arguments: list[str]
    out: str  # run.out
    stop: int  # it ends before this step, without a checkpoint and without a model
    resume: bool = False
    saved: int | None = None  # the step whose checkpoint is waited for before going on
    profiled: int | None = None  # from this step to the end the profiler runs; None: never

    def result(self, rank: int) -> Path:
        """The file of one process's findings."""
        return Path(f"{self.out}-{self.name}-{rank}.json")


class EnoughError(Exception):
    """All processes have seen what they were to see."""


class MeasuredTask(LanguageTask):
    """Language training that keeps the loss of every micro batch and the time of every step.

    A step begins when the loop fetches its first micro batch. On a GPU its time is taken by the
    GPU, between events that the host does not wait for.
    """

    def __init__(self, measurement: Measurement, config: LanguageConfig, device: torch.device):
        super().__init__(config, device)
        self.measurement = measurement
        self.losses: dict[int, list[Tensor]] = {}
        self.marks: dict[int, Any] = {}
        self.profiler: profile | None = None
        self.memory = 0

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """See `LanguageTask.batch`.

        Raises:
            EnoughError: at the step that is not to be done any more.
        """
        if step not in self.losses:
            self._begin(step)
        return super().batch(step, micro)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `LanguageTask.loss`."""
        loss, others = super().loss(batch)
        self.losses[max(self.losses)].append(loss.detach())
        return loss, others

    def _begin(self, step: int) -> None:
        plan = self.measurement
        if step == plan.saved and not plan.resume:
            # What writes it in the background is no part of a step.
            wait_for(folder_of(plan.out, step))
        self.marks[step] = self._now()
        if step == plan.stop:
            self._write()
            raise EnoughError
        if step == plan.profiled:
            self._synchronize()
            self.memory = peak_memory(self.device)
            on_cuda = self.device.type == "cuda"
            activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
            self.profiler = profile(activities=[activity])
            self.profiler.start()
        self.losses[step] = []

    def _write(self) -> None:
        self._synchronize()
        plan, first = self.measurement, min(self.losses)
        rank = int(os.environ.get("RANK", "0"))
        found = {
            "first": first,
            "losses": [torch.stack(losses).tolist() for losses in self.losses.values()],
            "seconds": [
                self._between(self.marks[step], self.marks[step + 1]) for step in self.losses
            ],
            "tokens_per_step": self.units_per_step,
            "memory_gib": (self.memory or peak_memory(self.device)) / 2**30,
            "device": name_of(self.device),
        }
        if self.profiler is not None:
            self.profiler.stop()
            trace = plan.result(rank).with_suffix(".trace")
            self.profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            trace.unlink()
            found["kernels"] = summarize_kernels(events, plan.stop - (plan.profiled or 0))
        # Plain JSON, since a loss may be NaN.
        plan.result(rank).write_text(json.dumps(found), encoding="utf-8")

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) / 1000 if self.device.type == "cuda" else b - a

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summarize_kernels(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any] | None:
    """What a GPU did in some steps, from the events of a Chrome trace; None without any kernel.

    Returns:
        "step_ms": from the first kernel's begin to the last one's end, a step; as shares of it,
        "communication": kernels of NCCL, waiting for other processes included;
        "exposed": that part of it in which no other kernel ran; "idle": no kernel at all;
        "compute_ms": at least one other kernel ran, a step;
        "nccl_ms": milliseconds of each kernel of NCCL a step.
    """
    both: list[list[tuple[float, float]]] = [[], []]
    nccl_ms: dict[str, float] = {}
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        begin, duration, name = float(event["ts"]), float(event["dur"]), event["name"]
        is_nccl = name.startswith("nccl")
        both[is_nccl].append((begin, begin + duration))
        if is_nccl:
            name = name.partition("(")[0]
            nccl_ms[name] = nccl_ms.get(name, 0.0) + duration / 1000 / steps
    compute, communication = both
    everything = compute + communication
    if not everything:
        return None
    whole = max(end for _, end in everything) - min(begin for begin, _ in everything)
    busy, computing = covered(everything), covered(compute)
    return {
        "step_ms": whole / 1000 / steps,
        "communication": covered(communication) / whole,
        "exposed": (busy - computing) / whole,
        "idle": (whole - busy) / whole,
        "compute_ms": computing / 1000 / steps,
        "nccl_ms": nccl_ms,
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of a union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def wait_for(folder: Path) -> None:
    """Waits until another thread or process has published a folder."""
    deadline = time.monotonic() + PATIENCE
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder} is not there after {PATIENCE:.0f} seconds")
        time.sleep(0.1)


def name_of(device: torch.device) -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measure(plan: Measurement) -> None:
    """Makes one training, and leaves nothing of it on the device."""
    make_task: Callable[..., LanguageTask] = partial(MeasuredTask, plan)
    try:
        train(plan.config, plan.arguments, plan.resume, make_task=make_task)
    except EnoughError:
        pass
    else:
        raise RuntimeError(f"{plan.name}: stopped from outside before its last step")
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    try:
        for each in json.loads(path.read_text(encoding="utf-8")):
            measure(Measurement(**each))
    except InputError as error:
        # torchrun's own report would bury it.
        path.with_name(ERROR).write_text(str(error), encoding="utf-8")
        sys.exit(2)
