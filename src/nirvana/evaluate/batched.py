"""Many short texts at once: what `read_tokens` says of one, without a cache, in batches.

Rows are padded behind their end, which a causal model cannot see, so no mask is needed. Lengths are
rounded up to powers of two and every batch has the same number of tokens: on a GPU the kernels meet
a handful of shapes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST = 128  # tokens that a row is padded to at least
HEAD_TOKENS = 8192  # tokens whose logits exist at a time


@torch.no_grad()
def read_rows(
    model: Any, rows: Sequence[Sequence[int]], batch_tokens: int = 65536
) -> list[tuple[Tensor, Tensor]]:
    """What a model says of each row's tokens, each before it has read it.

    Args:
        model: a causal language model of transformers, in eval mode.
        rows: tokens of each text, two or more; the first is given and never asked for.
        batch_tokens: tokens read at once; a longer row is read alone.

    Returns:
        for each row, in order: -ln p of each token but the first given all before it, float64
        [T - 1], and whether it is the likeliest token, bool [T - 1]; on the CPU.
    """
    answers: dict[int, tuple[Tensor, Tensor]] = {}
    for length, group in batches([len(row) - 1 for row in rows], batch_tokens):
        tokens = torch.zeros(len(group), length + 1, dtype=torch.int64)
        for place, i in enumerate(group):
            tokens[place, : len(rows[i])] = torch.as_tensor(rows[i])
        if model.device.type == "cuda":  # the last batch in the shape of the others
            tokens = F.pad(tokens, (0, 0, 0, max(1, batch_tokens // length) - len(group)))
        costs, hits = _read(model, tokens.to(model.device))
        for place, i in enumerate(group):
            kept = slice(len(rows[i]) - 1)
            answers[i] = costs[place, kept].double(), hits[place, kept]
    return [answers[i] for i in range(len(rows))]


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Padded length, a power of two, and which rows, of each batch; short rows come first.

    Args:
        lengths: of the rows, at least 1.
        batch_tokens: padded tokens of a batch at most, but one row at least.
    """
    padded = [max(SHORTEST, 1 << (length - 1).bit_length()) for length in lengths]
    for size in sorted(set(padded)):
        members = [i for i, each in enumerate(padded) if each == size]
        rows = max(1, batch_tokens // size)
        for first in range(0, len(members), rows):
            yield size, members[first : first + rows]


def _read(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Costs, float32, and hits of `[B, T]` tokens but the first, `[B, T - 1]` on the CPU."""
    trunk, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    h = trunk(input_ids=tokens[:, :-1].contiguous(), use_cache=False).last_hidden_state
    targets = tokens[:, 1:].flatten()
    costs, hits = [], []
    for part, asked in zip(
        h.flatten(0, 1).split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True
    ):
        logits = head(part).float()
        costs.append(F.cross_entropy(logits, asked, reduction="none"))
        hits.append(logits.argmax(-1) == asked)
    shape = (tokens.shape[0], -1)
    return torch.cat(costs).view(shape).cpu(), torch.cat(hits).view(shape).cpu()
