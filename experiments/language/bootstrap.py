"""Figures of several runs with intervals: seeds and documents are drawn with replacement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Stratum:
    """What the runs of one arm scored on one set: figure = sum(values) / sum(weights)."""

    values: np.ndarray  # [seeds, documents]: bits of a document, or points of a question
    weights: np.ndarray  # [documents]: its bytes, or 1


@dataclass(frozen=True)
class Interval:
    """A figure, and the 2.5th and 97.5th percentile of its draws."""

    figure: float
    low: float
    high: float

    def show(self, digits: int = 3, sign: bool = False) -> str:
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.figure:{form}} ({self.low:{form}} to {self.high:{form}})"


def interval(strata: Sequence[Stratum], resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean over sets of the figure on each.

    In every draw one choice of seeds serves all sets, and each set draws its own documents. For a
    difference of two arms hand in the difference of their values: both are then drawn alike.

    Args:
        strata: at least one, with the same number of seeds.

    Raises:
        ValueError: for none, or sets of different numbers of seeds.
    """
    if len({each.values.shape[0] for each in strata}) != 1:
        raise ValueError("an interval needs sets that the same runs have scored")
    random = np.random.default_rng(seed)
    num_seeds = strata[0].values.shape[0]
    runs = random.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), resamples) / num_seeds
    draws = np.zeros(resamples)
    figure = 0.0
    for each in strata:
        number = each.values.shape[1]
        counts = random.multinomial(number, np.full(number, 1 / number), resamples)
        weight = counts @ each.weights
        # Only a set with hardly a document can be drawn without any weight.
        drawn = ((runs @ each.values) * counts).sum(1) / np.where(weight > 0, weight, np.nan)
        draws += drawn / len(strata)
        figure += each.values.mean(0).sum() / each.weights.sum() / len(strata)
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(float(figure), float(low), float(high))


def minus(a: Stratum, b: Stratum) -> Stratum:
    """What a scored beyond b on the same documents, seed by seed."""
    if not np.array_equal(a.weights, b.weights) or a.values.shape != b.values.shape:
        raise ValueError("only scores of the same documents can be compared")
    return Stratum(a.values - b.values, a.weights)
