"""The plan of a language model's training: what it needs, without writing a file."""

import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nirvana.config import load_config
from nirvana.model.state import State
from nirvana.train.accelerators import known_accelerator
from nirvana.train.config import LanguageConfig
from nirvana.train.distributed import ProcessContext, init_distributed
from nirvana.train.estimate import memory_bytes, peak_flops, warn_of_repetition
from nirvana.train.float8 import no_float8, require_float8
from nirvana.train.language import LanguageTask
from nirvana.train.parallel import shard_size

ASSUMED_MFU = 0.4  # for the estimate of a run's duration


def estimate(
    config_path: str | Path,
    overrides: list[str] | None = None,
    processes: int | None = None,
    device_name: str | None = None,
) -> dict[str, Any]:
    """Checks a configuration and its data and prints what the training needs; writes no file.

    It warns about data that are read too often, and about a device with too little memory.

    Args:
        config_path: see `nirvana.train.language.train`.
        overrides: see `nirvana.train.language.train`.
        processes: number of processes to plan for; None: those that run this.
        device_name: each one's accelerator, see `find_accelerator`; None: this machine's device.

    Returns:
        The printed figures by name.

    Raises:
        InputError: as `nirvana.train.language.train`, except that checksums are not compared; for
            numbers of processes that the settings do not support, and for unknown accelerators.
    """
    config = load_config(LanguageConfig, config_path, overrides)
    if device_name is not None:
        accelerator = known_accelerator(device_name)
        planned = ProcessContext(torch.device("meta"), size=processes or 1)
        peak = 0.0 if config.run.precision == "float32" else accelerator.flops
        if config.run.precision == "fp8" and not accelerator.float8:
            raise no_float8(device_name)
        return _estimate(config, planned, peak, accelerator.memory)
    with init_distributed(config.run.device) as context:
        if config.run.precision == "fp8":
            require_float8(context.device)
        peak = peak_flops(context.device, config.run.precision)
        memory = None
        if context.device.type == "cuda":
            memory = torch.cuda.get_device_properties(context.device).total_memory
        planned = ProcessContext(context.device, context.rank, processes or context.size)
        return _estimate(config, planned, peak, memory)


def _estimate(
    config: LanguageConfig, planned: ProcessContext, peak: float, memory: int | None
) -> dict[str, Any]:
    """The figures for planned processes, each on a device of `peak` FLOP/s (0: unknown) and
    `memory` bytes (None: unknown)."""
    planned.local_micro_batches(config.optim.accumulation)
    parts = shard_size(config.parallel, planned.size)
    task = LanguageTask(config, torch.device("meta"))
    if config.run.initial:
        task.initialize(config.run.initial)
    data, model, steps = config.data, task.model, config.run.steps
    count = sum(p.numel() for p in model.parameters())
    matrices = task.matrices() if config.optim.name == "muon" else set()
    rows = memory_bytes(
        model,
        task.architecture,
        data.batch_size * data.context_length,
        parts,
        config.parallel.recompute,
        sum(p.numel() for name, p in model.named_parameters() if name in matrices),
    )
    if planned.size > 1 and not config.parallel.reshard:
        rows["gathered weights"] = count * (4.0 if config.run.precision == "float32" else 2.0)
    corpus = sum(shards.num_tokens for shards in task.sources.values())
    figures: dict[str, Any] = {
        "parameters": count,
        "tokens per step": task.units_per_step,
        "steps": steps,
        "tokens of the run": task.units_per_step * steps,
        "tokens of the data": corpus,
        "epochs": task.units_per_step * steps / corpus,
        "FLOP per token": task.flops_per_step / task.units_per_step,
        "processes": planned.size,
        "state per device, GiB": rows["state"] / 2**30,
        "activations per device, GiB, about": rows["activations"] / 2**30,
        "state of a text that is read, bf16, MiB": _read_bytes(task) / 2**20,
    }
    if "gathered weights" in rows:
        figures["gathered weights per device, GiB"] = rows["gathered weights"] / 2**30
    epochs = task.loader.epochs(steps)
    if len(epochs) > 1:
        figures |= {f"epochs of {name}": value for name, value in epochs.items()}
    if peak:
        seconds = task.flops_per_step / (ASSUMED_MFU * peak * planned.size)
        figures[f"seconds per step, at {ASSUMED_MFU:.0%} MFU"] = seconds
        figures[f"days of the run, at {ASSUMED_MFU:.0%} MFU"] = seconds * steps / 86400
    if planned.is_main:
        table = Table("", "", show_header=False)
        for name, value in figures.items():
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
        Console().print(table)
        warn_of_repetition(task.loader, steps)
        needed = sum(rows.values())
        if memory is not None and needed > memory:
            warnings.warn(
                f"a device would need about {needed / 2**30:.0f} GiB and has {memory / 2**30:.0f}: "
                "lower data.batch_size, set parallel.recompute = 1, or use more processes",
                stacklevel=2,
            )
    return figures


def _read_bytes(task: LanguageTask) -> int:
    """Bytes of the state of one text of `data.context_length` tokens: what generation keeps."""
    T = task.config.data.context_length
    return State.start(task.architecture, 1, "meta", torch.bfloat16, room=T).num_bytes()
