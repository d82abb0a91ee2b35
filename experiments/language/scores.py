"""The study's rows as scores: figures of single runs, and their means and differences over runs."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from experiments.common.results import Row
from experiments.language.variants import DOMAINS, PEERS, SETTINGS, VARIANTS
from nirvana.statistics import t_interval

# The ten novels are pieces of one book. This piece opens with a Greek inscription, which the
# tokenizer spells byte by byte; within the trained length it takes 11.8 bits per byte.
GREEK = ("novels", 1)


@dataclass(frozen=True)
class Scores:
    """What one run scored on one set."""

    values: np.ndarray  # float64 [N]: bits of a document, or points of a question
    weights: np.ndarray  # float64 [N]: bytes of a document, or 1

    @property
    def figure(self) -> float:
        return float(self.values.sum() / self.weights.sum())


Take = Callable[[Row], Scores]


class Results:
    """The runs of one budget.

    Attributes:
        budget: that of most rows; None without rows.
        rows: the runs that share it, the last one of each variant, seed and setting.
        left_out: number of runs with another budget.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        budgets = [tuple(row["budget"].items()) for row in rows]
        common = Counter(budgets).most_common(1)
        self.budget = dict(common[0][0]) if common else None
        kept = {
            (row["variant"], row["setting"], row["seed"]): row
            for row in rows
            if row["budget"] == self.budget
        }
        self.rows = list(kept.values())
        self.left_out = sum(row["budget"] != self.budget for row in rows)
        self._all = rows

    def runs(self, variant: str, setting: str) -> list[Row]:
        """By seed."""
        found = [x for x in self.rows if (x["variant"], x["setting"]) == (variant, setting)]
        return sorted(found, key=lambda row: row["seed"])

    def variants(self, setting: str, among: Iterable[str] = VARIANTS) -> list[str]:
        """Those that have a run."""
        return [variant for variant in among if self.runs(variant, setting)]

    def benchmarked(self, setting: str) -> list[str]:
        """The variants that were scored on benchmarks and recall tasks."""
        return [each for each in self.variants(setting) if self.runs(each, setting)[0]["tasks"]]

    def timed(self, variant: str) -> list[Row]:
        """The runs whose speed describes a variant: those of equal shapes, however long they
        trained, and of these the ones alone on their device if there are any."""
        assert self.budget is not None
        shapes = ("size", "context_length", "rows")
        alike = [
            row
            for row in self._all
            if row["variant"] == variant
            and all(row["budget"][each] == self.budget[each] for each in shapes)
        ]
        return [row for row in alike if row["environment"]["beside"] == 1] or alike

    def missing(self) -> list[str]:
        """Peers in every setting with three seeds, and ablations with one seed in B."""
        wanted = [(v, s, seed) for v in PEERS for s in SETTINGS for seed in range(3)]
        wanted += [(v, "B", 0) for v in VARIANTS if v not in PEERS]
        have = {(x["variant"], x["setting"], x["seed"]) for x in self.rows}
        return [f"{v}/{s}/{seed}" for v, s, seed in wanted if (v, s, seed) not in have]

    def figures(self, variant: str, setting: str, takes: Sequence[Take]) -> dict[int, float]:
        """Seed -> mean over sets of the run's figure on each."""
        return {row["seed"]: mean_figure(row, takes) for row in self.runs(variant, setting)}

    def differences(
        self, variant: str, than: str, setting: str, takes: Sequence[Take]
    ) -> np.ndarray:
        """Figures of `variant` minus those of `than`, one for each seed that both have."""
        own, other = (self.figures(each, setting, takes) for each in (variant, than))
        return np.array([own[seed] - other[seed] for seed in own if seed in other])


def mean_figure(row: Row, takes: Sequence[Take]) -> float:
    return float(np.mean([take(row).figure for take in takes]))


def show_runs(values: Iterable[float], digits: int = 3, sign: bool = False) -> str:
    """The mean over runs with its t interval; of a single run the figure alone."""
    values = list(values)
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{'+' if sign else ''}.{digits}f}"
    return t_interval(values).show(digits, sign)


def domains_of(setting: str) -> dict[str, tuple[str, ...]]:
    """Kinds of domains: trained on, and not."""
    seen = SETTINGS[setting]
    unseen = tuple(domain for domain in DOMAINS if domain not in seen)
    return {"trained on": seen, **({"not trained on": unseen} if unseen else {})}


def context_scores(
    row: Row,
    domain: str,
    split: str = "test",
    ranges: slice | None = None,
    greek: bool = True,
) -> Scores:
    """Bits and bytes of a domain's documents.

    Args:
        row: of a run.
        domain: one of `DOMAINS`.
        split: "test" or "valid".
        ranges: ranges of positions; those within the trained length if None.
        greek: whether the piece `GREEK` is included.
    """
    found = row["text"][split][domain]
    within = sum(edge <= row["budget"]["context_length"] for edge in row["edges"]) - 1
    bits, size = (
        np.array(found[key], float)[:, ranges or slice(within)].sum(1) for key in ("bits", "bytes")
    )
    kept = np.ones(len(bits), bool)
    if not greek and split == "test" and domain == GREEK[0]:
        kept[GREEK[1] : GREEK[1] + 1] = False
    return Scores(bits[kept], size[kept])


def text(domain: str, split: str = "test", ranges: slice | None = None, greek: bool = True) -> Take:
    """See `context_scores`."""
    return lambda row: context_scores(row, domain, split, ranges, greek)


def position_ranges(row: Row) -> list[tuple[slice, int, int]]:
    """Ranges of positions as (slice of `context_scores`, first token, token behind the last)."""
    return [(slice(i, i + 1), *ends) for i, ends in enumerate(pairwise(row["edges"]))]


def has_text(row: Row, domain: str, ranges: slice) -> bool:
    """Whether any document of the domain reaches these positions."""
    return bool(np.array(row["text"]["test"][domain]["bytes"])[:, ranges].sum())


def task(name: str) -> Take:
    """Points of a benchmark's questions."""

    def take(row: Row) -> Scores:
        points = np.array([int(point) for point in row["tasks"][name]["points"]], float)
        return Scores(points, np.ones(len(points)))

    return take


def recall(name: str, what: str) -> Take:
    """ "points" or "bits" of the problems of a recall task."""

    def take(row: Row) -> Scores:
        values = np.array(row["recall"][name][what], float)
        return Scores(values, np.ones(len(values)))

    return take


def probe(features: str) -> Take:
    """Right answers of the linear probe, one for each piece of text."""

    def take(row: Row) -> Scores:
        right = np.array(row["trigger"]["probe"][features], float)[:, 1]
        return Scores(right, np.ones(len(right)))

    return take


def points_of_questions(runs: Sequence[Row], name: str) -> np.ndarray:
    """Mean points of each question of a benchmark over runs, float64 `[N]`."""
    take = task(name)
    return np.mean([take(row).values for row in runs], axis=0)
