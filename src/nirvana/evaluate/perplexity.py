"""How well a language model predicts text, in bits per byte.

Bits per byte = sum over a document's tokens of -log2 p(token | those before) / UTF-8 bytes of its
text. BOS stands in front, as in training; EOS is not scored, for it is no part of the text. Every
document starts with a fresh state. Unlike perplexity it compares across tokenizers. Every token is
scored before it is read, so that what adapts to a document never saw what it is scored on.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.progress import ProgressLines
from nirvana.text import aligned_encoder, kind_of, read_documents

PIECE_TOKENS = 2048  # read at a time; the state is carried from piece to piece
FIRST_RANGE = 64  # tokens of the first range of positions


@dataclass(frozen=True)
class Score:
    """What a set of documents costs; scores of disjoint sets add up."""

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
        """At least 0; NaN for no text."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Per token of this model's tokenizer, at least 1; infinite when beyond a float."""
        if not self.tokens:
            return math.nan
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain figures; None where there is no finite one."""
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
    positions: dict[int, Score]  # first token of a range -> its score, see `by_position`


@dataclass
class FileScore:
    """The scores of a file's documents, in their order."""

    documents: list[Score] = field(default_factory=list)
    positions: dict[int, Score] = field(default_factory=dict)  # documents: those that reach it
    sha256: str = ""  # of the texts, so that only scores of the same texts are compared

    @property
    def total(self) -> Score:
        """All documents together."""
        return sum(self.documents, Score())


@torch.no_grad()
def read_tokens(
    model: nn.Module, tokens: Tensor, start: int = 1, piece: int = PIECE_TOKENS
) -> tuple[Tensor, Tensor]:
    """What a model says of a document's tokens, each before it has read it.

    The document is read in pieces whose state the model's cache carries, so that memory does not
    grow with the document's length beyond what the cache of the model needs.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokens: int64 [T], T >= 2; the first is given and never asked for.
        start: the first token that is asked for, 1 to T - 1.
        piece: tokens read at a time.

    Returns:
        -ln p of each token from `start` on, given all before it, float64 [T - start], and whether
        it is the likeliest token, bool [T - start]; on the CPU.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    past = None
    costs, hits = [], []
    for begin in range(0, len(tokens) - 1, piece):
        stop = min(begin + piece, len(tokens) - 1)
        asked = min(stop + 1 - start, stop - begin)
        output = model(
            input_ids=tokens[None, begin:stop],
            cache=past,
            use_cache=True,
            logits_to_keep=max(asked, 1),
        )
        past = output.cache
        if asked > 0:
            logits = output.logits[0, -asked:].float()
            targets = tokens[stop + 1 - asked : stop + 1]
            costs.append(F.cross_entropy(logits, targets, reduction="none").cpu())
            hits.append((logits.argmax(-1) == targets).cpu())
    return torch.cat(costs).double(), torch.cat(hits)


def score_tokens(model: nn.Module, tokens: Tensor, piece: int = PIECE_TOKENS) -> Tensor:
    """-ln p of each token of one document but the first, float64 [T - 1]; see `read_tokens`."""
    return read_tokens(model, tokens, piece=piece)[0]


def by_position(costs: Tensor, sizes: Sequence[int]) -> dict[int, Score]:
    """One document's score in ranges of tokens that double: 0 to 63, 64 to 127, 128 to 255 ...

    Args:
        costs: -ln p of each token, [T].
        sizes: bytes of each token, T numbers.

    Returns:
        the first token of each range that the document reaches, and the score there.
    """
    scores = {}
    start, stop = 0, FIRST_RANGE
    while start < len(costs):
        part = costs[start:stop]
        scores[start] = Score(float(part.sum()), len(part), sum(sizes[start:stop]), 1)
        start, stop = stop, 2 * stop
    return scores


def read_scores(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    piece: int = PIECE_TOKENS,
) -> Iterator[DocumentScore]:
    """The score of each document as a whole and by position, in order, as it comes.

    Args:
        model: a causal language model of transformers; put into eval mode.
        tokenizer: its fast transformers tokenizer, with a BOS token. Text that spells a special
            token is scored as text.
        documents: texts; none empty.
        piece: tokens read at a time; changes nothing but memory and rounding.

    Raises:
        ValueError: for an empty document or a tokenizer without BOS.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no BOS token, with which every document must begin")
    encode = aligned_encoder(tokenizer)
    model.eval()
    for text in documents:
        ids, sizes = encode(text)
        if not ids:
            raise ValueError("an empty document has no bits per byte")
        costs = score_tokens(model, torch.tensor([tokenizer.bos_token_id, *ids]), piece)
        total = Score(float(costs.sum()), len(ids), len(text.encode("utf-8")), 1)
        yield DocumentScore(total, by_position(costs, sizes))


def score_documents(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    piece: int = PIECE_TOKENS,
) -> Iterator[Score]:
    """The score of each document, in order, as it comes; see `read_scores`."""
    for score in read_scores(model, tokenizer, documents, piece):
        yield score.total


def read_files(
    model: nn.Module,
    tokenizer: Any,
    files: Mapping[str, str | Path],
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, FileScore]:
    """The scores of text files, under the names that they are given.

    Args:
        model, tokenizer: see `read_scores`.
        files: name -> file, see `nirvana.text.read_documents`; all are looked at before the first
            is scored.
        limit: documents of each file at most; None: all.
        progress: show a progress line on standard error.

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
            for score in read_scores(model, tokenizer, documents):
                found.documents.append(score.total)
                for start, part in score.positions.items():
                    found.positions[start] = found.positions.get(start, Score()) + part
                bar.update(task, description=f"{name}: {len(found.documents)} documents")
            found.sha256 = digest.hexdigest()
    return scores


def score_files(
    model: nn.Module, tokenizer: Any, files: Iterable[str | Path], limit: int | None = None
) -> dict[str, Score]:
    """The score of each text file under its path, and that of all together under "total"; see
    `read_files`.
    """
    found = read_files(model, tokenizer, {str(file): file for file in files}, limit)
    scores = {name: score.total for name, score in found.items()}
    return {**scores, "total": sum(scores.values(), Score())}


def _digested(documents: Iterable[str], digest: Any) -> Iterator[str]:
    """The documents as they are, their lengths and bytes written to a hash on their way."""
    for text in documents:
        content = text.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little") + content)
        yield text


def byte_entropy(documents: Iterable[str]) -> float:
    """Bits per byte of the best model of single bytes for these texts: their own frequencies'
    entropy, which no byte unigram model, whatever it was trained on, can go below.

    Args:
        documents: texts, not all empty.
    """
    counts = np.zeros(256, dtype=np.int64)
    for text in documents:
        counts += np.bincount(np.frombuffer(text.encode("utf-8"), dtype=np.uint8), minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
