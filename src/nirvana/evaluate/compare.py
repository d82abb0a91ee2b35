"""Is one model better than another? A paired bootstrap over the documents that both have scored.

Documents are drawn with replacement and the same draw serves both models, so that what makes a
document hard for both cancels. Several sets together are drawn set by set (stratified); see
`nirvana.statistics`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import existing_file
from nirvana.statistics import RESAMPLES, ratio_interval

BITS_PER_BYTE = "bits per byte"


@dataclass(frozen=True)
class Scores:
    """What one model scored on one set: its figure is sum(values) / sum(weights)."""

    values: np.ndarray  # float64 [N]: bits of a document, or points of a question
    weights: np.ndarray  # float64 [N]: bytes of a document, or 1 for a question
    content: str  # identifies what was scored; equal for two models only if it was the same


@dataclass(frozen=True)
class Difference:
    """The figure of A, of B, and B - A with its interval."""

    a: float
    b: float
    difference: float
    low: float  # the 95 % interval of the difference, low to high
    high: float
    number: int  # of documents or questions

    def to_dict(self) -> dict[str, float | int]:
        """Plain figures."""
        return asdict(self)


def paired_bootstrap(
    pairs: Sequence[tuple[Scores, Scores]], resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """The difference of two models on one set, or on several together.

    Args:
        pairs: (A's, B's) scores of the same documents; one for every set.
        resamples: how often the documents are drawn.
        seed: of the draws.

    Raises:
        ValueError: for no pair, or scores of different lengths or weights.
    """
    if not pairs or any(
        len(a.values) == 0 or not np.array_equal(a.weights, b.weights) for a, b in pairs
    ):
        raise ValueError("a paired comparison needs the same documents on both sides, at least one")
    strata = [(b.values - a.values, a.weights) for a, b in pairs]
    interval = ratio_interval(strata, resamples=resamples, seed=seed)
    total = sum(a.weights.sum() for a, _ in pairs)
    figure_a = sum(a.values.sum() for a, _ in pairs) / total
    figure_b = sum(b.values.sum() for _, b in pairs) / total
    return Difference(
        float(figure_a),
        float(figure_b),
        float(figure_b - figure_a),
        interval.low,
        interval.high,
        sum(len(a.values) for a, _ in pairs),
    )


def read_results(path: str | Path) -> dict[tuple[str, str], Scores]:
    """("bits per byte" or the task's metric, name) -> scores, from the JSON of `nirvana eval`.

    Raises:
        InputError: for a file that is none, or has no scores of single documents.
    """
    path = existing_file(path)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        found = _scores(results)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: not what `nirvana eval --json` writes") from None
    if not found:
        raise InputError(f"{path}: holds no scores of single documents")
    return found


def compare(a: str | Path, b: str | Path) -> dict[str, dict[str, Difference]]:
    """Metric -> set -> difference between two results of `nirvana eval --json`.

    Sets that only one of the files has are left out. When both have several files of text, "total"
    is all of them.

    Raises:
        InputError: for a file that `read_results` refuses, no set in common, or a set of one name
            that holds other documents.
    """
    scores_a, scores_b = read_results(a), read_results(b)
    common = [key for key in scores_a if key in scores_b]
    if not common:
        names = ", ".join(sorted({name for _, name in scores_b}))
        raise InputError(f"{a} and {b} have nothing in common; {b} has {names}")
    differences: dict[str, dict[str, Difference]] = {}
    texts = []
    for metric, name in common:
        pair = scores_a[metric, name], scores_b[metric, name]
        if pair[0].content != pair[1].content or not np.array_equal(
            pair[0].weights, pair[1].weights
        ):
            raise InputError(f"{name} is not the same documents in {a} and {b}: score both anew")
        differences.setdefault(metric, {})[name] = paired_bootstrap([pair])
        if metric == BITS_PER_BYTE:
            texts.append(pair)
    if len(texts) > 1:
        differences[BITS_PER_BYTE]["total"] = paired_bootstrap(texts)
    return differences


def _scores(results: Mapping[str, Any]) -> dict[tuple[str, str], Scores]:
    found = {}
    for name, figures in results.get("files", {}).items():
        each = figures["each"]
        found[BITS_PER_BYTE, name] = _checked(each["bits"], each["bytes"], each["sha256"])
    for name, figures in results.get("tasks", {}).items():
        if "each" in figures:
            points = figures["each"]["points"]
            key = figures["each"]["metric"], name
            found[key] = _checked(points, [1] * len(points), figures["each"]["sha256"])
    return found


def _checked(values: Any, weights: Any, content: str) -> Scores:
    scores = Scores(np.asarray(values, float), np.asarray(weights, float), str(content))
    sound = scores.values.ndim == 1 and scores.values.shape == scores.weights.shape
    if not sound or not len(scores.values) or not np.isfinite(scores.values).all():
        raise ValueError("not scores")
    if not (scores.weights > 0).all():
        raise ValueError("not weights")
    return scores
