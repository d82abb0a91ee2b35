"""Learns the step sizes of an adaptation, and its start, from what they do to the next chunks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import Chunk, read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.task import Task


def learn_step_sizes(
    model: PreTrainedModel,
    batches: Iterable[Sequence[Tensor | Sequence[int]]],
    config: AdaptConfig,
    rate: float = 0.05,
    start_rate: float = 0.0,
    log_progress: Callable[[int, float], None] | None = None,
) -> tuple[AdaptConfig, Task]:
    """Learns one step size for each tensor of task parameters, with the weights frozen.

    The outer loss is what adaptation is for, the -ln p of every chunk before it teaches. With
    phi_i = start - lr (d_1 + ... + d_i) and directions d that are taken as constants (first order),
    and g_i the gradient of chunk i's loss at phi_{i-1}, which the adaptation computes anyway,

        d loss / d log lr = sum_i g_i (phi_{i-1} - start)         summed over a tensor and all rows
        d loss / d start  = sum_i g_i

    Adam descends on log lr, so that a step size keeps its sign, and on the start.

    Args:
        model: a causal language model of transformers, in eval mode.
        batches: documents to adapt to side by side; after each batch the step sizes change.
        config: the settings, with the first step sizes; none is 0.
        rate: step size of Adam on log lr.
        start_rate: the same on the start; with 0 the start stays zero.
        log_progress: called after each batch with its number and its mean -ln p.

    Returns:
        the settings with a step size for each tensor, and the start as a task.

    Raises:
        InputError: see `nirvana.adapt.adapt`.
        ValueError: for a step size of 0; see also `nirvana.adapt.adapt`.
    """
    layout = start_optimizer(model, config).layout
    sizes = torch.tensor([config.step_size(name) for name in layout.names])
    if not sizes.all():
        raise ValueError("a step size of 0 has no logarithm: leave its group out")
    log_sizes, signs = sizes.abs().log(), sizes.sign()
    start = torch.zeros(1, sum(layout.sizes))
    outer = torch.optim.Adam(
        [{"params": [log_sizes], "lr": rate}, {"params": [start], "lr": start_rate}]
    )
    for number, documents in enumerate(batches):
        named = dict(zip(layout.names, (signs * log_sizes.exp()).tolist(), strict=True))
        config = replace(config, lr=named)
        task = Task.of(model, layout, start, config)
        optimizer = start_optimizer(model, config, task, len(documents))
        of_sizes, of_start = torch.zeros_like(log_sizes), torch.zeros_like(start)

        def note(chunk: Chunk, of_sizes: Tensor = of_sizes, of_start: Tensor = of_start) -> None:
            parts = layout.split(chunk.gradient * (chunk.before - start.to(chunk.before)))
            of_sizes += torch.stack([part.sum() for part in parts]).to(of_sizes)
            of_start += chunk.gradient.sum(0, keepdim=True).to(of_start)

        scores = torch.cat(read_documents(model, documents, optimizer, note))
        log_sizes.grad, start.grad = of_sizes, of_start
        outer.step()
        if log_progress is not None:
            log_progress(number, float(scores.mean()))
    named = dict(zip(layout.names, (signs * log_sizes.exp()).tolist(), strict=True))
    named = {name: float(f"{size:.4g}") for name, size in named.items()}
    config = replace(config, lr=named)
    return config, Task.of(model, layout, start, config)
