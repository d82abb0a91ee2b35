"""Bits per byte and perplexity of a language model on text.

Bits per byte = sum over a document's tokens of -log2 p(token | tokens before it) / UTF-8 bytes of
its text. Unlike perplexity it compares across tokenizers. A document starts with BOS and a fresh
state, as in training; EOS is not scored, since it is not part of the text. Every token is scored
before the model reads it, so that a model that adapts to a document is never scored on what it has
adapted to.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nirvana.data.documents import kind_of, read_documents
from nirvana.data.tokenizer import aligned_encoder
from nirvana.errors import InputError
from nirvana.evaluate.likelihood import PIECE_TOKENS, token_log_likelihoods
from nirvana.progress import ProgressLines

FIRST_RANGE = 64  # tokens of the first range of positions


@dataclass(frozen=True)
class Score:
    """Score of a set of documents; scores of disjoint sets add up."""

    nats: float = 0.0  # sum of -ln p over the tokens
    tokens: int = 0  # tokens that were predicted
    bytes: int = 0  # UTF-8 bytes of the text
    documents: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, at least 0; NaN without text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Perplexity per token, at least 1; infinite on overflow, NaN without tokens."""
        if not self.tokens:
            return math.nan
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns the figures as plain data; None for figures that are not finite."""
        figures = {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}
        return {
            **{name: value if math.isfinite(value) else None for name, value in figures.items()},
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


@dataclass(frozen=True)
class DocumentScore:
    """One document's score, as a whole and by position."""

    total: Score
    positions: dict[int, Score]  # first token of a range -> score, see `by_position`


@dataclass
class FileScore:
    """The scores of a file's documents, in their order."""

    documents: list[Score] = field(default_factory=list)
    positions: dict[int, Score] = field(
        default_factory=dict
    )  # `documents` counts those that reach it
    sha256: str = ""  # of the texts; scores are compared only if it is equal

    @property
    def total(self) -> Score:
        """Score of all documents together."""
        return sum(self.documents, Score())


def by_position(nll: Tensor, sizes: Sequence[int]) -> dict[int, Score]:
    """Splits one document's score into ranges of tokens: 0 to 63, 64 to 127, 128 to 255 ...

    Args:
        nll: -ln p of each token, [T], in nats.
        sizes: bytes of each token, T numbers.

    Returns:
        First token -> score, for each range that the document reaches.
    """
    scores = {}
    start, stop = 0, FIRST_RANGE
    while start < len(nll):
        part = nll[start:stop]
        scores[start] = Score(float(part.sum()), len(part), sum(sizes[start:stop]), 1)
        start, stop = stop, 2 * stop
    return scores


def read_scores(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    piece: int = PIECE_TOKENS,
) -> Iterator[DocumentScore]:
    """Scores documents one by one, each as a whole and by position.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: its fast transformers tokenizer, with a BOS token. Text that spells a special
            token is scored as plain text.
        documents: texts; none empty.
        piece: tokens read at a time; affects memory and rounding only.

    Yields:
        The score of each document, in order.

    Raises:
        ValueError: for an empty document or a tokenizer without BOS.
    """
    model.eval()
    for document in encoded(tokenizer, documents):
        ((nll, _),) = token_log_likelihoods(model, [document.tokens], piece=piece)
        yield document_score(document, nll)


@dataclass(frozen=True)
class EncodedDocument:
    """A document as tokens."""

    tokens: list[int]  # BOS first
    sizes: list[int]  # bytes of each token but BOS


def encoded(tokenizer: Any, documents: Iterable[str]) -> Iterator[EncodedDocument]:
    """Encodes documents as they are scored.

    Args:
        tokenizer: see `read_scores`.
        documents: see `read_scores`.

    Yields:
        Each document, in order.

    Raises:
        ValueError: see `read_scores`.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token, with which every document must start")
    encode = aligned_encoder(tokenizer)
    for text in documents:
        ids, sizes = encode(text)
        if not ids:
            raise ValueError("an empty document has no bits per byte")
        yield EncodedDocument([tokenizer.bos_token_id, *ids], sizes)


def document_score(document: EncodedDocument, nll: Tensor) -> DocumentScore:
    """The score of a document.

    Args:
        document: the document.
        nll: -ln p of each of its tokens but BOS, in nats.

    Returns:
        its score as a whole and by position.
    """
    total = Score(float(nll.sum()), len(nll), sum(document.sizes), 1)
    return DocumentScore(total, by_position(nll, document.sizes))


def score_documents(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    piece: int = PIECE_TOKENS,
) -> Iterator[Score]:
    """Scores documents one by one, each as a whole.

    Args:
        model: see `read_scores`.
        tokenizer: see `read_scores`.
        documents: see `read_scores`.
        piece: see `read_scores`.

    Yields:
        The score of each document, in order.
    """
    for score in read_scores(model, tokenizer, documents, piece):
        yield score.total


Reader = Callable[[Any, Any, Iterable[str]], Iterator[DocumentScore]]
"""Yields the scores of documents for a model and its tokenizer."""


def read_files(
    model: nn.Module,
    tokenizer: Any,
    files: Mapping[str, str | Path],
    limit: int | None = None,
    progress: bool = False,
    reader: Reader = read_scores,
) -> dict[str, FileScore]:
    """Scores text files.

    Args:
        model: see `read_scores`.
        tokenizer: see `read_scores`.
        files: name -> file, see `nirvana.data.documents.read_documents`; all are checked before the
            first is scored.
        limit: documents of each file at most; None: all.
        progress: whether to show a progress line on standard error.
        reader: scores documents as `read_scores` does.

    Returns:
        Name -> score of the file.

    Raises:
        InputError: for a file that is missing, damaged, of unknown kind or without a document.
    """
    for path in files.values():
        kind_of(path)
        if next(read_documents(path), None) is None:
            raise InputError(f"{path}: holds no document")
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    scores: dict[str, FileScore] = {}
    with ProgressLines(*columns, disable=not progress) as bar:
        for name, path in files.items():
            task = bar.add_task(name)
            found = scores[name] = FileScore()
            digest = hashlib.sha256()
            documents = _digested(islice(read_documents(path), limit), digest)
            for score in reader(model, tokenizer, documents):
                found.documents.append(score.total)
                for start, part in score.positions.items():
                    found.positions[start] = found.positions.get(start, Score()) + part
                bar.update(task, description=f"{name}: {len(found.documents)} documents")
            found.sha256 = digest.hexdigest()
    return scores


def score_files(
    model: nn.Module, tokenizer: Any, files: Iterable[str | Path], limit: int | None = None
) -> dict[str, Score]:
    """Scores text files, each as a whole and all together.

    Args:
        model: see `read_scores`.
        tokenizer: see `read_scores`.
        files: paths.
        limit: documents of each file at most; None: all.

    Returns:
        Path -> score, and the score of all files under "total".

    Raises:
        InputError: see `read_files`.
    """
    found = read_files(model, tokenizer, {str(file): file for file in files}, limit)
    scores = {name: score.total for name, score in found.items()}
    return {**scores, "total": sum(scores.values(), Score())}


def _digested(documents: Iterable[str], digest: Any) -> Iterator[str]:
    """Yields the documents unchanged and adds their lengths and bytes to a hash."""
    for text in documents:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little") + content)
        yield text


def byte_entropy(documents: Iterable[str]) -> float:
    """Computes the entropy of the byte frequencies of some texts.

    This is a lower bound on the bits per byte of any unigram model of bytes on these texts.

    Args:
        documents: texts, not all empty.

    Returns:
        Bits per byte, 0 to 8.
    """
    counts = np.zeros(256, dtype=np.int64)
    for text in documents:
        counts += np.bincount(np.frombuffer(text.encode("utf-8"), dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
