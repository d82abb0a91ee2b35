"""Bits per byte of a frozen model that adapts to each document while it reads it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor

from nirvana.adapt.adaptation import adapt_documents, start_optimizer
from nirvana.adapt.chunks import read_documents as read_batch
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.task import Task
from nirvana.adapt.trace import DocumentTrace, trace_documents
from nirvana.data.documents import kind_of, read_documents
from nirvana.errors import InputError
from nirvana.evaluate.perplexity import DocumentScore, Score, document_score, encoded
from nirvana.progress import ProgressLines

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


def learn_domain(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | Path],
    config: AdaptConfig,
    task: Task | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> tuple[Task, tuple[Score, Score]]:
    """Learns one set of task parameters from all documents of some files.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: see `nirvana.evaluate.perplexity.read_scores`.
        files: see `nirvana.data.documents.read_documents`; all are checked before the first is
            read.
        config: the settings of the adaptation.
        task: the start of the task parameters; None: zero.
        limit: documents of each file at most; None: all.
        batch_size: documents read side by side, whose gradients are averaged.

    Returns:
        the task, of one row; and the scores of the first and the second half of the documents,
        each token before it taught.

    Raises:
        InputError: for a file that is missing, damaged, of unknown kind or without a document; see
            also `nirvana.adapt.adapt`.
    """
    for path in files:
        kind_of(path)
        if next(read_documents(path), None) is None:
            raise InputError(f"{path}: holds no document")
    model.eval()
    optimizer = start_optimizer(model, config, task)
    texts = (text for path in files for text in islice(read_documents(path), limit))
    remaining, scores = encoded(tokenizer, texts), []
    with ProgressLines(TextColumn("{task.description}"), TimeElapsedColumn()) as bar:
        line = bar.add_task("reading")
        while batch := list(islice(remaining, batch_size)):
            nll = read_batch(model, [each.tokens for each in batch], optimizer)
            scores += [document_score(*each).total for each in zip(batch, nll, strict=True)]
            bar.update(line, description=f"reading: {len(scores)} documents")
    middle = len(scores) // 2
    halves = sum(scores[:middle], Score()), sum(scores[middle:], Score())
    total = halves[0] + halves[1]
    about = {"files": [Path(file).name for file in files]}
    about |= {"documents": total.documents, "tokens": total.tokens}
    return Task.of(model, optimizer.layout, optimizer.values, config, **about), halves
