"""The Trigger of the whole sample: a frozen model that learns from the sample that it reads.

A sample is read in chunks of c tokens. With phi_0 the start of its task parameters:

    read     chunk i is predicted with phi_{i-1}: every token is scored before it teaches
    learn    phi_i = phi_{i-1} - lr d(gradient of the chunk's own cross-entropy, summed and over c)

The model's state goes on from chunk to chunk as the scoring forward left it, without gradients: the
memory is that of one chunk, whatever the length of the sample. Each row has task parameters of its
own, and those of a row do not depend on the other rows. Weights never change.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.adapt.chunk_graphs import ChunkReader, refusal
from nirvana.adapt.optimizer import TaskOptimizer
from nirvana.adapt.parameters import TaskHooks
from nirvana.adapt.state import CarriedCache, read_chunk
from nirvana.model.state import State
from nirvana.ops import at_least_float32

logger = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """One chunk of every row, and what it did to the task parameters.

    Attributes:
        start: index of the chunk's first predicted token; 1 for the first chunk.
        nll: `[B, c]`, -ln p of each token before it taught, 0 where a row has no token.
        scored: bool `[B, c]`, where a row has a token.
        before: `[rows, N]`, the task parameters that scored the chunk.
        gradient: `[rows, N]`, of the loss at `before`; zero without steps.
        after: `[rows, N]`, the task parameters that score the next chunk.
    """

    start: int
    nll: Tensor
    scored: Tensor
    before: Tensor
    gradient: Tensor
    after: Tensor


Observer = Callable[[Chunk], None]


def read_documents(
    model: PreTrainedModel,
    documents: Sequence[Tensor | Sequence[int]],
    optimizer: TaskOptimizer,
    observer: Observer | None = None,
) -> list[Tensor]:
    """Reads documents side by side and teaches the task parameters of an optimiser.

    Args:
        model: a causal language model of transformers, in eval mode.
        documents: tokens of each, int `[T]`, T differs and is at least 1; the first token is
            context only.
        optimizer: with one row of task parameters for each document, or one row for all of them,
            whose gradient is the mean over the documents.
        observer: called after each chunk.

    Returns:
        -ln p of each token of each document but its first, float64 `[T - 1]` on the CPU.

    Raises:
        ValueError: for a model in training mode or with compiled blocks.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before it adapts")
    chunk, device = optimizer.config.chunk, optimizer.values.device
    reason = refusal(model)
    if reason is not None:
        logger.debug("no CUDA graph reads the chunks: %s", reason)
    # Gradients are needed whatever the caller computes in.
    with torch.inference_mode(False), _frozen(model), TaskHooks(model, optimizer.layout) as hooks:
        tokens, lengths = _in_rows(documents, chunk, device)
        scores = [torch.zeros(len(tokens), 0, device=device)]
        learn = partial(_learn, model, hooks)
        read = ChunkReader(model, learn, optimizer, graphs=reason is None)
        for begin in range(0, tokens.shape[1] - 1, chunk):
            part = tokens[:, begin : begin + chunk + 1]
            places = torch.arange(begin + 1, begin + part.shape[1], device=device)
            scored = places < lengths[:, None]
            before = optimizer.values
            nll, gradient = read(part, scored)
            scores.append(nll)
            if observer is not None:
                observer(Chunk(begin + 1, nll, scored, before, gradient, optimizer.values))
    together = torch.cat(scores, 1).double().cpu()
    return [row[: len(document) - 1] for row, document in zip(together, documents, strict=True)]


def _learn(
    model: PreTrainedModel,
    hooks: TaskHooks,
    part: Tensor,
    scored: Tensor,
    optimizer: TaskOptimizer,
    state: State | CarriedCache | None,
) -> tuple[Tensor, Tensor, State | CarriedCache | None]:
    """Scores a chunk and takes the optimiser's steps on it.

    Args:
        part: `[B, c + 1]`, the chunk's tokens and the one before.
        scored: bool `[B, c]`.

    Returns:
        -ln p `[B, c]` and its gradient `[rows, N]`, both before the first step, and the state
        after the chunk.
    """
    rows, steps = scored.any(1), optimizer.config.steps
    shared = len(optimizer.values) == 1
    active = rows.any()[None] if shared else rows
    documents = rows.sum().clamp(min=1) if shared else 1
    kept = None
    for step in range(max(1, steps)):
        values = optimizer.values.detach().requires_grad_(steps > 0)
        hooks.set(values)
        with torch.set_grad_enabled(steps > 0):
            logits, after = read_chunk(model, part[:, :-1], state)
            nll = next_token_nll(logits, part[:, 1:]) * scored
            if steps > 0:
                loss = nll.sum() / (optimizer.config.chunk * documents)
                (gradient,) = torch.autograd.grad(loss, values)
                optimizer.step(gradient, active)
            else:
                gradient = torch.zeros_like(values)
        if step == 0:
            kept = nll.detach(), gradient, after
    assert kept is not None
    return kept


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of tokens.

    Args:
        logits: `[B, T, vocabulary]`, in which those of a token are at the place before it.
        targets: `[B, T]`, the tokens.

    Returns:
        `[B, T]`, float32 (float64 for float64).
    """
    logits = at_least_float32(logits).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def _in_rows(
    documents: Sequence[Tensor | Sequence[int]], chunk: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Documents as rows of whole chunks: tokens `[B, 1 + chunks * chunk]`, padded at the end, which
    a causal model does not attend to; and lengths `[B]`."""
    lengths = [len(document) for document in documents]
    if not lengths or min(lengths) < 1:
        raise ValueError("there must be documents, each of at least one token")
    width = 1 + -(-(max(lengths) - 1) // chunk) * chunk
    tokens = torch.zeros(len(documents), width, dtype=torch.long)
    for row, document in zip(tokens, documents, strict=True):
        row[: len(document)] = torch.as_tensor(document)
    return tokens.to(device), torch.tensor(lengths, device=device)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight requires gradients in the block: their activations would be saved for nothing."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
