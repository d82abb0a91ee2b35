"""Problems whose answers occur earlier in the context, and their scores.

The needle tests (`niah`) and associative recall (`mqar`) generate such problems. An answer is right
when each of its tokens is the most likely one given all tokens before it: exactly when greedy
decoding produces it. One forward pass is enough to determine this.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import nn

from nirvana.evaluate.likelihood import PIECE_TOKENS, token_log_likelihoods


@dataclass(frozen=True)
class Problem:
    """A sequence of tokens with answers that follow from earlier tokens."""

    tokens: list[int]  # BOS first
    answers: list[tuple[int, int]]  # start and stop of each answer; start >= 1


@dataclass(frozen=True)
class Recall:
    """Scores of a model on a set of problems."""

    points: list[float]  # fraction of each problem's answers that are right, 0 to 1
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


def answer_all(
    model: nn.Module, problems: Iterable[Problem], piece: int = PIECE_TOKENS, batch_size: int = 1
) -> Recall:
    """Scores a set of problems.

    Args:
        model: a causal language model of transformers; put into eval mode.
        problems: at least one.
        piece: tokens read at a time; affects memory and rounding only.
        batch_size: problems read together, of those of up to `piece` tokens; affects memory and
            rounding only.

    Returns:
        The score of each problem, and a hash of the problems.
    """
    model.eval()
    points, digest = [], hashlib.sha256()
    left = iter(problems)
    while group := list(islice(left, batch_size)):
        rows = [problem.tokens for problem in group]
        firsts = [min(start for start, _ in problem.answers) for problem in group]
        found = token_log_likelihoods(model, rows, firsts, batch_size, piece=piece)
        for problem, first, (_, is_argmax) in zip(group, firsts, found, strict=True):
            digest.update(repr((problem.tokens, problem.answers)).encode())
            right = [bool(is_argmax[a - first : b - first].all()) for a, b in problem.answers]
            points.append(sum(right) / len(right))
    return Recall(points, digest.hexdigest())
