"""Bits per byte of a frozen model that adapts to each document while it reads it."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from nirvana.adapt import AdaptConfig, Task, adapt_documents
from nirvana.adapt.trace import DocumentTrace, trace_documents
from nirvana.evaluate.perplexity import DocumentScore, document_score, encoded

SORTED_BATCHES = 4  # batches' worth of documents that are sorted by length, so that few are padded


def read_adapted_scores(
    model: Any,
    tokenizer: Any,
    documents: Iterable[str],
    config: AdaptConfig,
    task: Task | None = None,
    batch_size: int = 8,
    observe: Callable[[DocumentTrace], None] | None = None,
) -> Iterator[DocumentScore]:
    """Scores documents, each token before it teaches, and each document by task parameters of its
    own.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: see `nirvana.evaluate.perplexity.read_scores`.
        documents: see there.
        config: the settings of the adaptation.
        task: the start of the task parameters; None: zero.
        batch_size: documents read side by side; affects speed, memory and rounding only.
        observe: receives the trace of each document, in order; reading then takes several times as
            long.

    Yields:
        The score of each document, in order.

    Raises:
        InputError: see `nirvana.adapt.adapt`.
        ValueError: see `nirvana.evaluate.perplexity.read_scores`.
    """
    model.eval()
    remaining = iter(encoded(tokenizer, documents))
    while group := list(islice(remaining, SORTED_BATCHES * batch_size)):
        order = sorted(range(len(group)), key=lambda i: len(group[i].tokens))
        found: dict[int, tuple[Tensor, DocumentTrace | None]] = {}
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            rows = [group[i].tokens for i in members]
            traces: list[DocumentTrace | None] = [None] * len(rows)
            if observe is None:
                scores, _ = adapt_documents(model, rows, config, task)
            else:
                scores, traces[:] = trace_documents(model, rows, config, task)
            found |= zip(members, zip(scores, traces, strict=True), strict=True)
        for number, document in enumerate(group):
            nll, trace = found[number]
            if observe is not None and trace is not None:
                observe(trace)
            yield document_score(document, nll)
