"""Scores of reports against the truth, fact by fact, with bootstrap intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import mannwhitneyu

from nirvana.mri.reports.grammar import NORMAL, SLOTS, Facts
from nirvana.statistics import cluster_totals, percentiles, resampled_totals

FACTS = ("finding", *SLOTS)


def agree(slot: str, stated: Any, true: Any) -> bool:
    """Whether a stated fact is right; sizes may differ by 2 mm or a quarter, a step of `SIZES`."""
    if slot == "size":
        return abs(stated - true) <= max(2.0, 0.25 * true)
    return stated == true


def score(truth: Sequence[Facts], stated: Sequence[Facts]) -> dict[str, Any]:
    """Rates over reports.

    A report with a finding makes one statement for each of `FACTS`, a normal one makes none.
    Precision is the share of statements that are true, recall the share of true statements that are
    made.

    Args:
        truth: the true facts of each slice.
        stated: the facts that its report states.

    Returns:
        `facts`: fact -> precision, recall, f1 (None where the denominator is 0); `hallucination`:
        share of normal slices with a reported finding; `omission`: share of findings that are not
        reported; `side_accuracy`: share of right sides where a finding is true and reported;
        `exact`: share of reports that are right in every fact; `reports`, `normals`: numbers of
        reports and of normal slices.

    Raises:
        ValueError: the sequences are empty or of different lengths.
    """
    table = outcomes(truth, stated)
    return _rates(table.sum(0), len(truth))


def auc(scores: Sequence[float], present: Sequence[bool]) -> float:
    """Area under the receiver operating characteristic: the probability that a slice with a finding
    has a higher score than one without, ties counting half.

    Args:
        scores: one for each slice.
        present: whether there is a finding in each slice.

    Returns:
        0..1, NaN without slices of both kinds.
    """
    values, true = np.asarray(scores), np.asarray(present, dtype=bool)
    if true.all() or not true.any():
        return float("nan")
    found: Any = mannwhitneyu(values[true], values[~true])
    return float(found.statistic) / float(true.sum() * (~true).sum())


def best_threshold(
    present: Sequence[bool], finding: Sequence[float], most: float
) -> dict[str, float]:
    """The threshold on the probability of a finding with the best F1 of presence among those that
    give at most a share of `most` of the normal slices a finding. The candidates are the slices'
    own probabilities; the highest is taken where none is allowed.

    Args:
        present: whether there is a finding in each slice.
        finding: the model's probability of it.
        most: share of the normal slices, 0..1.

    Returns:
        `threshold`, and the `f1` and `hallucination` that it has on these slices.
    """
    true, likely = np.asarray(present, dtype=bool), np.asarray(finding, dtype=float)
    candidates = np.unique(likely)
    stated = likely >= candidates[:, None]
    right, wrong = (stated & true).sum(1), (stated & ~true).sum(1)
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
    stated: Sequence[Facts],
    groups: Sequence[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the rates of `score`, by resampling.

    Args:
        truth: as of `score`.
        stated: as of `score`.
        groups: of each report, such as its subject; groups are drawn as a whole. None draws single
            reports.
        draws: number of resamples.
        seed: of the resampling.

    Returns:
        Names as of `flat` -> (low, high); a rate that is undefined in most resamples is left out.
    """
    table = outcomes(truth, stated)
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


def outcomes(truth: Sequence[Facts], stated: Sequence[Facts]) -> np.ndarray:
    """0/1 `[reports, columns]`: for each of `FACTS` whether it is stated, true, and right; then
    normal, hallucinated, omitted, exact, and both with a finding."""
    if len(truth) != len(stated) or not truth:
        raise ValueError(f"{len(stated)} reports cannot be compared with {len(truth)} truths")
    rows = []
    for true, claimed in zip(truth, stated, strict=True):
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
        made, expected, right = total[3 * number : 3 * number + 3]
        facts[slot] = {
            "precision": _share(right, made),
            "recall": _share(right, expected),
            "f1": _share(2 * right, made + expected),
        }
    normal, hallucinated, omitted, exact, both = total[3 * len(FACTS) :]
    findings = total[1]
    right_side = total[3 * FACTS.index("side") + 2]
    return {
        "facts": facts,
        "hallucination": _share(hallucinated, normal),
        "omission": _share(omitted, findings),
        "side_accuracy": _share(right_side, both),
        "exact": _share(exact, reports),
        "reports": int(reports),
        "normals": int(normal),
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def flat(rates: dict[str, Any]) -> dict[str, float | None]:
    """The rates of `score` by flat names: `f1.FACT`, `hallucination`, `omission`, `side_accuracy`,
    `exact`."""
    found = {f"f1.{slot}": rates["facts"][slot]["f1"] for slot in FACTS}
    names = ("hallucination", "omission", "side_accuracy", "exact")
    return found | {name: rates[name] for name in names}


def majority(reports: Sequence[Facts]) -> Facts:
    """The constant control: the most frequent value of every fact among reports with a finding, or
    a normal report where most are normal."""
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
