"""What the study measures of a model: nats of documents by position, under a condition."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from experiments.adapt.data import BLOCK, Document
from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.task import Task

TOGETHER = {"cuda": 24576, "cpu": 1024}
"""Tokens of a chunk of all documents that are read side by side on a device."""
FROZEN = AdaptConfig(("norm",), chunk=BLOCK, steps=0)


def rows_of(documents: Sequence[Document], tokens: int) -> list[Tensor]:
    """The first `tokens` predicted tokens of documents, BOS in front."""
    return [torch.tensor(each.tokens[: tokens + 1]) for each in documents]


def read(
    model: Any, rows: Sequence[Tensor], config: AdaptConfig, task: Task | None = None
) -> tuple[list[Tensor], Tensor]:
    """Adapts to rows.

    Args:
        model: the model.
        rows: tokens of each document.
        config: the settings.
        task: the start: of one row, or one for each document.

    Returns:
        -ln p of each token but the first of each row, and the task parameters after the last
        chunk, `[documents, N]`.
    """
    scores: list[Tensor] = []
    values = []
    size = max(1, TOGETHER[model.device.type] // config.chunk)
    for first in range(0, len(rows), size):
        numbers = range(first, min(len(rows), first + size))
        start = task
        if task is not None and len(task) > 1:
            start = replace(task, values=task.values[list(numbers)])
        optimizer = start_optimizer(model, config, start, len(numbers))
        scores += read_documents(model, [rows[i] for i in numbers], optimizer)
        values.append(optimizer.values.detach())
    return scores, torch.cat(values)


def task_of(model: Any, config: AdaptConfig, values: Tensor) -> Task:
    """Task parameters as a task of the model."""
    return Task.of(model, start_optimizer(model, config).layout, values, config)


def still(config: AdaptConfig) -> AdaptConfig:
    """The same task parameters, without learning."""
    return replace(config, steps=0)


def block_nats(scores: Sequence[Tensor]) -> list[list[float]]:
    """Sums over blocks of `BLOCK` tokens of each document, rounded to a hundredth."""
    return [
        [round(float(part.sum()), 2) for part in nll[: len(nll) // BLOCK * BLOCK].split(BLOCK)]
        for nll in scores
    ]


def change(found: Sequence[Sequence[float]], frozen: Sequence[Sequence[float]], part: str) -> Any:
    """Relative change of each document's nats, in percent, `[documents]`.

    Args:
        found: nats by block.
        frozen: the same of the frozen model.
        part: "all", or "last" for the last quarter.

    Returns:
        a list.
    """
    changes = []
    for own, other in zip(found, frozen, strict=True):
        first = 0 if part == "all" else len(own) * 3 // 4
        changes.append(100 * (sum(own[first:]) / sum(other[first:]) - 1))
    return changes


def unigram_cache(tokens: Sequence[int], nll: Tensor, share: float) -> Tensor:
    """-ln of (1 - share) p + share count(token) / tokens so far, a cache of the document's words.

    Args:
        tokens: of the document, BOS first.
        nll: -ln p of each but the first.
        share: of the cache, 0..1.

    Returns:
        `[T - 1]`.
    """
    counts: dict[int, int] = {}
    cached = []
    for place, token in enumerate(tokens[1:]):
        cached.append(counts.get(token, 0) / max(1, place))
        counts[token] = counts.get(token, 0) + 1
    return -((1 - share) * (-nll).exp() + share * torch.tensor(cached, dtype=nll.dtype)).log()


def cache_mixture(tokens: Sequence[int], nll: Tensor, order: int = 4) -> Tensor:
    """-ln p of a mixture of the model with caches of the document: what followed the last 0 to
    `order` tokens there so far. The weights are learned online, a Bayesian mixture with a share of
    0.01 of every weight spread over all after each token (Herbster and Warmuth, 1998).

    Args:
        tokens: of the document, BOS first.
        nll: -ln p of each but the first.
        order: longest context of a cache.

    Returns:
        `[T - 1]`.
    """
    seen: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in range(order + 1)]
    weights = [1 / (order + 2)] * (order + 2)
    found = []
    for place in range(1, len(tokens)):
        token = tokens[place]
        own = math.exp(-float(nll[place - 1]))
        chances = [own]
        for length, table in enumerate(seen):
            context = tuple(tokens[max(0, place - length) : place])
            followed = table.get(context, {})
            total = sum(followed.values())
            # A cache that has not seen the context predicts what the model predicts.
            chances.append((followed.get(token, 0) + own) / (total + 1))
        mixed = sum(w * p for w, p in zip(weights, chances, strict=True))
        found.append(-math.log(mixed))
        weights = [w * p / mixed for w, p in zip(weights, chances, strict=True)]
        weights = [0.99 * w + 0.01 / len(weights) for w in weights]
        for length, table in enumerate(seen):
            context = tuple(tokens[max(0, place - length) : place])
            followed = table.setdefault(context, {})
            followed[token] = followed.get(token, 0) + 1
    return torch.tensor(found, dtype=nll.dtype)
