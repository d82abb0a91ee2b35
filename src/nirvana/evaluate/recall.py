"""Problems whose answers stand in the context: how they are put and how they are scored.

The needle tests (`niah`) and associative recall (`mqar`) both make such problems. An answer counts
when every token of it is the model's likeliest one given all before it: exactly when greedy
decoding from there writes it. One forward pass says so, whatever the answer's length.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nirvana.evaluate.perplexity import PIECE_TOKENS, read_tokens


@dataclass(frozen=True)
class Problem:
    """A sequence of tokens with answers in it that its earlier tokens tell."""

    tokens: list[int]  # BOS first
    answers: list[tuple[int, int]]  # start and stop of each answer; start >= 1


@dataclass(frozen=True)
class Recall:
    """How many of its answers a model gave in each problem of a set."""

    points: list[float]  # share of a problem's answers that are right, 0 to 1
    sha256: str  # of the problems

    @property
    def accuracy(self) -> float:
        """Mean of the points, 0 to 1."""
        return float(np.mean(self.points))

    @property
    def error(self) -> float:
        """Standard error of `accuracy`; 0 for a single problem."""
        number = len(self.points)
        return float(np.std(self.points, ddof=1) / number**0.5) if number > 1 else 0.0


def answer(model: nn.Module, problem: Problem, piece: int = PIECE_TOKENS) -> float:
    """The share of a problem's answers that the model gives, 0 to 1.

    Args:
        model: a causal language model of transformers, in eval mode.
        problem: see `Problem`.
        piece: tokens read at a time; changes nothing but memory and rounding.
    """
    first = min(start for start, _ in problem.answers)
    _, hits = read_tokens(model, torch.tensor(problem.tokens), first, piece)
    right = [bool(hits[start - first : stop - first].all()) for start, stop in problem.answers]
    return sum(right) / len(right)


def answer_all(model: nn.Module, problems: Iterable[Problem], piece: int = PIECE_TOKENS) -> Recall:
    """The score of a set of problems, of which there must be one; see `answer`."""
    model.eval()
    points, digest = [], hashlib.sha256()
    for problem in problems:
        digest.update(repr((problem.tokens, problem.answers)).encode())
        points.append(answer(model, problem, piece))
    return Recall(points, digest.hexdigest())
