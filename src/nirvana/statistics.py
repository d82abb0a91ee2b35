"""Intervals and tests for every comparison in the package, the studies and the benchmarks.

The unit of a test is what was drawn at random: a training run for a claim about a method, a person
for a claim about people, a document for a claim about text.

- `t_interval`, `t_test`: few independent units, such as three training runs or five people. A
  percentile bootstrap of three values covers their mean in 73 % of cases, not in 95 %.
- `signed_rank_test`: an exact test by unit that needs no normal distribution.
- `holm`: corrects the p values of several comparisons.
- `resampled_totals`, `ratio_interval`: bootstraps over many units (documents, slices). A paired
  bootstrap resamples the differences of two models on the same units; a stratified one resamples
  every set by itself; a cluster bootstrap resamples whole clusters (`cluster_totals`).

Sources: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (percentile
interval); Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # random indices drawn at a time, 32 MiB


@dataclass(frozen=True)
class Interval:
    """A figure with the bounds of its interval."""

    figure: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def show(self, digits: int = 3, sign: bool = False) -> str:
        """The figure with its bounds in parentheses, such as "+0.12 (-0.30 to +0.54)"."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.figure:{form}} ({self.low:{form}} to {self.high:{form}})"


def t_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Mean and Student t interval of independent values, such as one figure for each run.

    Args:
        values: finite `[N]`, N of at least 2. For a comparison, the paired differences.
        level: probability that the interval covers the mean if the values are normal.

    Raises:
        ValueError: for fewer than two values, or values that are not finite.
    """
    from scipy.stats import t

    values = _finite(values)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def t_test(values: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of a one-sample t test of mean zero; 1 if all values are 0, 0 if they are all
    equal to another number.

    Args:
        values: as for `t_interval`.
    """
    from scipy.stats import ttest_1samp

    values = _finite(values)
    if np.ptp(values) == 0:
        return float(values[0] == 0)
    found: Any = ttest_1samp(values, 0.0)
    return float(found.pvalue)


def signed_rank_test(differences: Sequence[float] | np.ndarray) -> float | None:
    """Two-sided p of the Wilcoxon signed-rank test of paired differences, exact for small samples.

    With n units p is at least 2^(1 - n): 0.0625 for five people.

    Args:
        differences: `[N]`, one for each independent unit.

    Returns:
        p in 0..1; None for fewer than two differences, if one is not finite, or if all are 0.
    """
    from scipy.stats import wilcoxon

    values = np.asarray(differences, float)
    if len(values) < 2 or not np.isfinite(values).all() or not values.any():
        return None
    found: Any = wilcoxon(values)  # method "auto" is exact wherever that takes no time
    return float(found.pvalue)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values corrected for their number by Holm's step-down procedure.

    Args:
        p_values: in 0..1, `[N]`, all comparisons of one family.

    Returns:
        float64 `[N]` in the given order, each at least the raw one and at most 1. Rejecting those
        below a level keeps the chance of any false rejection below that level.

    Raises:
        ValueError: for a value outside 0..1.
    """
    values = np.asarray(p_values, float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p values must be in 0..1, not {values}")
    order = np.argsort(values, kind="stable")
    steps = values[order] * (len(values) - np.arange(len(values)))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def means_by(groups: Sequence[Hashable], values: Sequence[float]) -> dict[Any, float]:
    """Group -> mean of its values, such as one figure for each person from several scans."""
    found: dict[Any, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        found.setdefault(group, []).append(value)
    return {group: float(np.mean(own)) for group, own in found.items()}


def differences(a: Mapping[Any, float], b: Mapping[Any, float]) -> np.ndarray:
    """a - b for the units that both have, float64 `[N]`, in a's order."""
    return np.array([a[unit] - b[unit] for unit in a if unit in b], float)


def cluster_totals(table: np.ndarray, clusters: Sequence[Any]) -> np.ndarray:
    """The rows of a table summed by cluster, so that a bootstrap draws whole clusters.

    Args:
        table: `[N, columns]`.
        clusters: label of each row, `[N]`.

    Returns:
        float64 `[clusters, columns]`, in the order of the sorted labels.
    """
    labels, places = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.zeros((len(labels), table.shape[1]))
    np.add.at(totals, places, table)
    return totals


def resampled_totals(table: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Column sums of rows that are drawn with replacement, as many as there are.

    Args:
        table: float `[units, columns]`, at least one unit.
        resamples: number of draws.
        random: generator, which moves on: several sets are drawn one after another.

    Returns:
        float64 `[resamples, columns]`.
    """
    number = len(table)
    table = np.asarray(table, float)
    totals = np.empty((resamples, table.shape[1]))
    step = max(1, CHUNK // number)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = random.integers(number, size=(size, number))
        drawn += number * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
        totals[start : start + size] = counts @ table
    return totals


def ratio_interval(
    strata: Sequence[tuple[np.ndarray, np.ndarray]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """sum(values) / sum(weights) over all units, such as bits per byte, with a bootstrap interval.

    Every stratum is resampled by itself. For the difference of two models pass the differences of
    their values: both are then drawn alike, and what makes a document hard for both cancels.

    Args:
        strata: (values `[N]`, weights `[N]`) of each set.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The figure with the percentile interval of level 0.95.

    Raises:
        ValueError: for no stratum, an empty one, or lengths that differ.
    """
    if not strata or any(len(x) == 0 or np.shape(x) != np.shape(w) for x, w in strata):
        raise ValueError("a bootstrap needs as many values as weights in every set, at least one")
    random = np.random.default_rng(seed)
    tables = [np.stack([values, weights], axis=1) for values, weights in strata]
    value, weight = np.sum([table.sum(0) for table in tables], axis=0)
    draws = np.zeros((resamples, 2))
    for table in tables:
        draws += resampled_totals(table, resamples, random)
    # Of a few units those without any weight may be drawn alone; such a draw has no ratio.
    drawn = np.where(draws[:, 1] > 0, draws[:, 1], np.nan)
    low, high = percentiles(draws[:, 0] / drawn)
    return Interval(float(value / weight), low, high)


def percentiles(draws: Sequence[float] | np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of bootstrap draws; NaN draws are left out."""
    low, high = np.nanpercentile(draws, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, float)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"at least two finite values are needed, not {array}")
    return array
