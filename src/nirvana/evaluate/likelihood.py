"""The log-likelihood of every token of a sequence given the tokens before it.

Every figure of a language model starts here: bits per byte, the answers of benchmark tasks, and
recall. Each token is scored before the model reads it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.model.cache import CACHE_FIELD

PIECE_TOKENS = 2048  # longer sequences are read in pieces; the cache carries the state
BATCH_TOKENS = 2**16
SHORTEST = 128  # padded length of a row on CUDA, at least
HEAD_TOKENS = 8192  # tokens whose logits exist at a time


class TokenLikelihoods(NamedTuple):
    """Scores of the tokens of one row, from `start` on; both tensors on the CPU."""

    nll: Tensor  # float64 [T - start], -ln p of each token given all before it, in nats
    is_argmax: Tensor  # bool [T - start], whether the token is the most likely one


@torch.no_grad()
def token_log_likelihoods(
    model: Any,
    rows: Sequence[Sequence[int] | Tensor],
    starts: Sequence[int] | None = None,
    batch_size: int = 1,
    batch_tokens: int = BATCH_TOKENS,
    piece: int = PIECE_TOKENS,
) -> list[TokenLikelihoods]:
    """Scores the tokens of each row, each given all tokens before it.

    With `batch_size` 1, and for rows of more than `piece` tokens, a row is read alone, piece by
    piece: the model's cache carries the state, so that memory does not grow with the row beyond
    what the cache needs. Shorter rows are read in batches, padded at the end; a causal model does
    not attend to what follows a token, so no mask is needed. How rows are batched and cut changes
    the results by rounding only.

    Args:
        model: a causal language model of transformers, in eval mode.
        rows: T >= 2 tokens of each row, T differs; the first one is context only.
        starts: first scored token of each row, 1 to T - 1; None: 1 for all.
        batch_size: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding included, unless it has a single row.
        piece: tokens read at a time, at least 1.

    Returns:
        The scores of each row, in the order of `rows`.
    """
    starts = [1] * len(rows) if starts is None else starts
    batched = [i for i, row in enumerate(rows) if batch_size > 1 and len(row) - 1 <= piece]
    on_cuda = next(model.parameters()).device.type == "cuda"
    found: dict[int, TokenLikelihoods] = {}
    lengths = [len(rows[i]) - 1 for i in batched]
    for length, members in batches(lengths, batch_size, batch_tokens, bucketed=on_cuda):
        batch = [batched[each] for each in members]
        # On CUDA the last batch of a length gets the shape of the others.
        padded_rows = min(batch_size, max(1, batch_tokens // length)) if on_cuda else len(batch)
        scores = _score_batch(
            model, [rows[i] for i in batch], [starts[i] for i in batch], length, padded_rows
        )
        found.update(zip(batch, scores, strict=True))
    for i, row in enumerate(rows):
        if i not in found:
            found[i] = _score_in_pieces(model, torch.as_tensor(row), starts[i], piece)
    return [found[i] for i in range(len(rows))]


def batches(
    lengths: Sequence[int], batch_size: int, batch_tokens: int, bucketed: bool
) -> Iterator[tuple[int, list[int]]]:
    """Groups rows of similar length, short rows first.

    Args:
        lengths: of the rows, at least 1.
        batch_size: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding included, unless it has a single row.
        bucketed: whether lengths are padded to powers of two, at least `SHORTEST`, so that kernels
            are compiled for a few shapes only; else to the longest row of the batch.

    Yields:
        Padded length and the indices of the rows of each batch.
    """
    padded = [
        max(SHORTEST, 1 << (length - 1).bit_length()) if bucketed else length for length in lengths
    ]
    batch: list[int] = []
    for i in sorted(range(len(padded)), key=padded.__getitem__):
        full = len(batch) == batch_size or padded[i] * (len(batch) + 1) > batch_tokens
        if batch and (full or (bucketed and padded[i] != padded[batch[0]])):
            yield padded[batch[-1]], batch
            batch = []
        batch.append(i)
    if batch:
        yield padded[batch[-1]], batch


def _score_batch(
    model: Any,
    rows: Sequence[Sequence[int] | Tensor],
    starts: Sequence[int],
    length: int,
    padded_rows: int,
) -> list[TokenLikelihoods]:
    """Scores rows of at most `length` + 1 tokens in one forward pass without a cache."""
    device = next(model.parameters()).device
    tokens = torch.zeros(padded_rows, length + 1, dtype=torch.int64)
    scored = torch.zeros(padded_rows, length, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, : len(row)] = torch.as_tensor(row)
        scored[i, start - 1 : len(row) - 1] = True
    places = scored.flatten().nonzero()[:, 0]
    targets = tokens[:, 1:].flatten()[places].to(device)
    trunk, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    inputs = tokens[:, :-1].contiguous().to(device)
    h = trunk(input_ids=inputs, use_cache=False).last_hidden_state
    h = h.flatten(0, 1)[places.to(device)]
    nll, is_argmax = [], []
    for part, labels in zip(h.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = head(part).float()
        nll.append(F.cross_entropy(logits, labels, reduction="none"))
        is_argmax.append(logits.argmax(-1) == labels)
    counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    nll_of_rows = torch.cat(nll).cpu().double().split(counts)
    is_argmax_of_rows = torch.cat(is_argmax).cpu().split(counts)
    return [
        TokenLikelihoods(*scores) for scores in zip(nll_of_rows, is_argmax_of_rows, strict=True)
    ]


def _score_in_pieces(model: Any, tokens: Tensor, start: int, piece: int) -> TokenLikelihoods:
    """Scores tokens [T] of one row from `start` on, `piece` tokens at a time."""
    tokens = tokens.to(next(model.parameters()).device)
    cache = None
    nll, is_argmax = [], []
    for begin in range(0, len(tokens) - 1, piece):
        stop = min(begin + piece, len(tokens) - 1)
        num_scored = min(stop + 1 - start, stop - begin)
        output = model(
            input_ids=tokens[None, begin:stop],
            use_cache=True,
            logits_to_keep=max(num_scored, 1),
            **{CACHE_FIELD: cache},
        )
        cache = output[CACHE_FIELD]
        if num_scored > 0:
            logits = output.logits[0, -num_scored:].float()
            labels = tokens[stop + 1 - num_scored : stop + 1]
            nll.append(F.cross_entropy(logits, labels, reduction="none").cpu())
            is_argmax.append((logits.argmax(-1) == labels).cpu())
    return TokenLikelihoods(torch.cat(nll).double(), torch.cat(is_argmax))
