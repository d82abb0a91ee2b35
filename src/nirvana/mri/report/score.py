"""Scores of reports against the truth, fact by fact, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from nirvana.mri.report.grammar import NORMAL, SLOTS, Facts
from nirvana.statistics import cluster_totals, percentiles, resampled_totals

FACTS = ("finding", *SLOTS)


def agree(slot: str, said: Any, true: Any) -> bool:
    """Whether a fact is right; sizes may differ by 2 mm or a quarter, the step of the scale."""
    if slot == "size":
        return abs(said - true) <= max(2.0, 0.25 * true)
    return said == true


def score(truth: Sequence[Facts], said: Sequence[Facts]) -> dict[str, Any]:
    """Counts over reports of which `truth[i]` is what `said[i]` should say.

    A report with a finding makes one statement for each of `FACTS`, a normal one none. Precision is
    the share of statements made that are true, recall the share of true ones that are made.

    Returns: `facts`: fact -> precision, recall, f1 (None where there is nothing to divide by);
        `hallucination`: share of normal slices that get a finding; `omission`: share of findings
        that get none; `side_accuracy`: share of right sides where a finding is and is said;
        `exact`: share of reports that are right in every fact; `reports`, `normals`.

    Raises:
        ValueError: for sequences of different lengths, or empty ones.
    """
    table = outcomes(truth, said)
    return _rates(table.sum(0), len(truth))


def auc(scores: Sequence[float], present: Sequence[bool]) -> float:
    """Area under the receiver's curve: the probability that a slice with a finding has a higher
    score than one without, ties counting half. NaN without slices of both kinds."""
    values, true = np.asarray(scores), np.asarray(present, dtype=bool)
    if true.all() or not true.any():
        return float("nan")
    found: Any = mannwhitneyu(values[true], values[~true])
    return float(found.statistic) / float(true.sum() * (~true).sum())


def best_threshold(
    present: Sequence[bool], finding: Sequence[float], most: float
) -> dict[str, float]:
    """The probability of a finding from which on one is reported: of those that the slices have,
    the one with the best F1 of presence among those by which at most a share of `most` of the
    normal slices gets a finding; the highest where none is so.

    Args:
        present: whether there is a finding, of each slice.
        finding: its probability, by the model.
        most: in 0..1.

    Returns: `threshold`, and of these slices `f1` and `hallucination`.
    """
    true, likely = np.asarray(present, dtype=bool), np.asarray(finding, dtype=float)
    candidates = np.unique(likely)
    said = likely >= candidates[:, None]
    right, wrong = (said & true).sum(1), (said & ~true).sum(1)
    f1 = 2 * right / np.maximum(right + wrong + true.sum(), 1)
    hallucination = wrong / max((~true).sum(), 1)
    allowed = np.where(hallucination <= most, f1, -1.0)
    best = int(allowed.argmax()) if (allowed >= 0).any() else len(candidates) - 1
    return {
        "threshold": float(candidates[best]),
        "f1": float(f1[best]),
        "hallucination": float(hallucination[best]),
    }


def bootstrap(
    truth: Sequence[Facts],
    said: Sequence[Facts],
    groups: Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of what `score` tells, by resampling.

    Args:
        groups: what is drawn as a whole, such as the subject; single reports when None.
        draws: number of resamples.
        seed: of the resampling.

    Returns: names as of `flat` -> (low, high); a figure that most resamples cannot have is left
        out.
    """
    table = outcomes(truth, said)
    table = np.concatenate([table, np.ones((len(table), 1))], axis=1)
    units = table if groups is None else cluster_totals(table, groups)
    totals = resampled_totals(units, draws, np.random.default_rng(seed))
    samples = [flat(_rates(row[:-1], row[-1])) for row in totals]
    intervals = {}
    for name in samples[0]:
        values = [x for x in (sample[name] for sample in samples) if x is not None]
        if len(values) > draws / 2:
            intervals[name] = percentiles(values)
    return intervals


def outcomes(truth: Sequence[Facts], said: Sequence[Facts]) -> np.ndarray:
    """0/1 `[reports, columns]`: for each of `FACTS` stated, asked and right; then normal,
    hallucinated, omitted, exact, both with a finding."""
    if len(truth) != len(said) or not truth:
        raise ValueError(f"{len(said)} reports cannot be held against {len(truth)} truths")
    rows = []
    for true, claimed in zip(truth, said, strict=True):
        row: list[bool] = []
        for slot in FACTS:
            right = true.finding and claimed.finding
            right = right and agree(slot, getattr(claimed, slot), getattr(true, slot))
            row += [claimed.finding, true.finding, right]
        row += [
            not true.finding,
            claimed.finding and not true.finding,
            true.finding and not claimed.finding,
            true == claimed,
            true.finding and claimed.finding,
        ]
        rows.append(row)
    return np.array(rows, dtype=float)


def _rates(total: np.ndarray, reports: float) -> dict[str, Any]:
    facts = {}
    for number, slot in enumerate(FACTS):
        stated, asked, right = total[3 * number : 3 * number + 3]
        facts[slot] = {
            "precision": _share(right, stated),
            "recall": _share(right, asked),
            "f1": _share(2 * right, stated + asked),
        }
    normal, hallucinated, omitted, exact, both = total[3 * len(FACTS) :]
    asked = total[1]
    right_side = total[3 * FACTS.index("side") + 2]
    return {
        "facts": facts,
        "hallucination": _share(hallucinated, normal),
        "omission": _share(omitted, asked),
        "side_accuracy": _share(right_side, both),
        "exact": _share(exact, reports),
        "reports": int(reports),
        "normals": int(normal),
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def flat(rates: dict[str, Any]) -> dict[str, float | None]:
    """Of what `score` returns: `f1.FACT`, `hallucination`, `omission`, `side_accuracy`, `exact`."""
    found = {f"f1.{slot}": rates["facts"][slot]["f1"] for slot in FACTS}
    names = ("hallucination", "omission", "side_accuracy", "exact")
    return found | {name: rates[name] for name in names}


def majority(reports: Sequence[Facts]) -> Facts:
    """The control that sees nothing: the most frequent report of those with a finding, fact by
    fact, or a normal one where most are normal."""
    found = [facts for facts in reports if facts.finding]
    if 2 * len(found) < len(reports):
        return NORMAL
    return most_frequent(found)


def most_frequent(found: Sequence[Facts]) -> Facts:
    """The most frequent value of every fact among reports with a finding."""

    def mode(slot: str) -> Any:
        values = [getattr(facts, slot) for facts in found]
        return max(sorted(set(values)), key=values.count)

    return Facts(finding=True, **{slot: mode(slot) for slot in SLOTS})
