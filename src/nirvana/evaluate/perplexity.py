"""How well a language model predicts text, in bits per byte.

Bits per byte = sum over a document's tokens of -log2 p(token | those before) / UTF-8 bytes of its
text. BOS stands in front, as in training; EOS is not scored, for it is no part of the text. Every
document starts with a fresh state. Unlike perplexity it compares across tokenizers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.text import kind_of, read_documents, text_encoder

PIECE_TOKENS = 2048  # read at a time; the state is carried from piece to piece


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


@torch.no_grad()
def score_tokens(model: nn.Module, tokens: Tensor, piece: int = PIECE_TOKENS) -> Tensor:
    """-ln p of each token of one document given all before it.

    The document is read in pieces whose state the model's cache carries, so that memory does not
    grow with the document's length beyond what the cache of the model needs.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokens: int64 [T], T >= 2; the first (BOS) is given and not scored.
        piece: tokens read at a time.

    Returns:
        float64 [T - 1] on the CPU.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    past = None
    costs = []
    for start in range(0, len(tokens) - 1, piece):
        stop = min(start + piece, len(tokens) - 1)
        output = model(input_ids=tokens[None, start:stop], past_key_values=past, use_cache=True)
        past = output.past_key_values
        targets = tokens[start + 1 : stop + 1]
        costs.append(F.cross_entropy(output.logits[0].float(), targets, reduction="none").cpu())
    return torch.cat(costs).double()


def score_documents(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    piece: int = PIECE_TOKENS,
) -> Iterator[Score]:
    """The score of each document, in order, as it comes.

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
    encode = text_encoder(tokenizer)
    model.eval()
    for text in documents:
        ids = encode([text])[0]
        if not ids:
            raise ValueError("an empty document has no bits per byte")
        costs = score_tokens(model, torch.tensor([tokenizer.bos_token_id, *ids]), piece)
        yield Score(float(costs.sum()), len(ids), len(text.encode("utf-8")), 1)


def score_files(
    model: nn.Module,
    tokenizer: Any,
    files: Iterable[str | Path],
    limit: int | None = None,
    progress: bool = False,
) -> dict[str, Score]:
    """The score of each text file under its path, and that of all together under "total".

    Args:
        model, tokenizer: see `score_documents`.
        files: see `nirvana.text.read_documents`; all are looked at before the first is scored.
        limit: documents of each file at most; None: all.
        progress: show a progress line on standard error.

    Raises:
        InputError: for a file that is missing, damaged, of unknown kind or without a document.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        kind_of(path)
        if next(read_documents(path), None) is None:
            raise InputError(f"{path}: holds no document")
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    scores: dict[str, Score] = {}
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        for path in paths:
            task = bar.add_task(str(path))
            total = Score()
            documents = islice(read_documents(path), limit)
            for score in score_documents(model, tokenizer, documents):
                total += score
                bar.update(task, description=f"{path}: {total.documents} documents")
            scores[str(path)] = total
    scores["total"] = sum(scores.values(), Score())
    return scores


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
