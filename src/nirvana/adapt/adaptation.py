"""Adapts a frozen model to the samples of a batch, or to documents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.adapt.chunks import Observer, read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.optimizer import TaskOptimizer
from nirvana.adapt.parameters import task_layout
from nirvana.adapt.samples import Sample, split_samples
from nirvana.adapt.task import Task
from nirvana.model.masks import Borders


@dataclass(frozen=True)
class Adaptation:
    """A batch of samples, read and learned.

    Attributes:
        nll: `[B, T]`, float64, -ln p of each token given those before it in its sample, in nats,
            scored before it taught; 0 at the first token of a sample and at padding.
        samples: where each sample is in the batch.
        task: the task parameters after the last chunk, one row for each sample.
    """

    nll: Tensor
    samples: list[Sample]
    task: Task


def adapt(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Borders | None = None,
    seq_idx: Tensor | None = None,
    config: AdaptConfig | None = None,
    task: Task | None = None,
) -> Adaptation:
    """Adapts a frozen model to every sample of a batch.

        sample = adapt(model, tokens)
        with sample.task.applied(model):
            model.generate(tokens)

    Padded rows and packed documents are taken apart first: each document has task parameters of its
    own.

    Args:
        model: a causal language model of transformers, in eval mode; it stays as it is. Models of
            other architectures have the group "norm", and "low_rank" if their MLP is like Llama's.
        input_ids: `[B, T]`; a sample's first token (BOS) is not predicted.
        attention_mask: see `nirvana.model.masks.row_layout`.
        position_ids: see there.
        cu_seqlens: see there.
        seq_idx: see there.
        config: the settings; None: `AdaptConfig()`, with the groups that the model has.
        task: the start of the task parameters, of one row; None: zero.

    Returns:
        the scores, and the task parameters of each sample.

    Raises:
        InputError: for groups that the model does not have, and a task of another model.
        ValueError: for a model in training mode or with compiled blocks, and masks and borders
            that `row_layout` rejects.
    """
    samples = split_samples(input_ids, attention_mask, position_ids, cu_seqlens, seq_idx)
    rows = [input_ids[each.row].cpu()[each.columns] for each in samples]
    scores, learned = adapt_documents(model, rows, config or default_config(model), task)
    nll = torch.zeros(input_ids.shape, dtype=torch.float64)
    for each, score in zip(samples, scores, strict=True):
        nll[each.row, each.columns[1:]] = score
    return Adaptation(nll, samples, learned)


def default_config(model: PreTrainedModel) -> AdaptConfig:
    """The settings for any model.

    Args:
        model: a causal language model of transformers.

    Returns:
        `AdaptConfig()`, without "fast" for a model that has no Trigger.
    """
    config = AdaptConfig()
    if getattr(model.config, "has_trigger", False):
        return config
    return replace(config, parameters=tuple(g for g in config.parameters if g != "fast"))


def adapt_documents(
    model: PreTrainedModel,
    documents: Sequence[Tensor | Sequence[int]],
    config: AdaptConfig,
    task: Task | None = None,
    observer: Observer | None = None,
) -> tuple[list[Tensor], Task]:
    """Adapts a frozen model to documents, each with task parameters of its own.

    Args:
        model: see `adapt`.
        documents: see `nirvana.adapt.chunks.read_documents`.
        config: the settings.
        task: the start of the task parameters, of one row; None: zero.
        observer: called after each chunk.

    Returns:
        -ln p of each token of each document but its first, float64 `[T - 1]` on the CPU; and the
        task parameters after the last chunk, one row for each document.

    Raises:
        InputError: see `adapt`.
        ValueError: see `adapt`.
    """
    optimizer = start_optimizer(model, config, task, len(documents))
    scores = read_documents(model, documents, optimizer, observer)
    return scores, Task.of(model, optimizer.layout, optimizer.values, config)


def start_optimizer(
    model: PreTrainedModel, config: AdaptConfig, task: Task | None = None, rows: int = 1
) -> TaskOptimizer:
    """An optimiser whose task parameters are at their start.

    Args:
        model: the model.
        config: the settings.
        task: the start, of one row, or of `rows`; None: zero.
        rows: of task parameters.

    Returns:
        the optimiser.

    Raises:
        InputError: for groups that the model does not have, and a task of another model or with
            other task parameters.
    """
    layout = task_layout(model, config)
    weight = next(model.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.inference_mode(False):
        start = torch.zeros(rows, sum(layout.sizes), dtype=dtype, device=weight.device)
        if task is not None:
            task.require(model)
            start = start + task.values_for(layout).to(start)
        return TaskOptimizer(layout, config, start)
