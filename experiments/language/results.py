"""The results' lines as sets of scores."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from arms import ARMS, DOMAINS, PEERS, SETTINGS
from bootstrap import Interval, Stratum, interval, minus

Line = dict[str, Any]
Take = Callable[[Line], Stratum]


class Results:
    """The runs of one budget.

    Attributes:
        budget: that of most lines; None without lines.
        lines: the runs that share it, one for each arm, seed and setting: the last.
        left_out: how many runs had another.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        budgets = [tuple(line["budget"].items()) for line in lines]
        common = Counter(budgets).most_common(1)
        self.budget = dict(common[0][0]) if common else None
        kept = {
            (line["arm"], line["setting"], line["seed"]): line
            for line in lines
            if line["budget"] == self.budget
        }
        self.lines = list(kept.values())
        self.left_out = sum(line["budget"] != self.budget for line in lines)
        self._all = lines

    def runs(self, arm: str, setting: str) -> list[Line]:
        """By seed."""
        found = [x for x in self.lines if (x["arm"], x["setting"]) == (arm, setting)]
        return sorted(found, key=lambda line: line["seed"])

    def arms(self, setting: str, among: Iterable[str] = ARMS) -> list[str]:
        """Those that have a run."""
        return [arm for arm in among if self.runs(arm, setting)]

    def benchmarked(self, setting: str) -> list[str]:
        """The arms that have been asked the benchmarks and recall tasks."""
        return [arm for arm in self.arms(setting) if self.runs(arm, setting)[0]["tasks"]]

    def timed(self, arm: str) -> list[Line]:
        """Runs that tell an arm's speed: of the same shapes, however long they trained; those that
        had the device to themselves, if there are any."""
        assert self.budget is not None
        shapes = ("size", "context_length", "rows")
        alike = [
            line
            for line in self._all
            if line["arm"] == arm
            and all(line["budget"][each] == self.budget[each] for each in shapes)
        ]
        return [line for line in alike if line["environment"]["beside"] == 1] or alike

    def missing(self) -> list[str]:
        """Peers in every setting and with three seeds; ablations with one seed in B."""
        wanted = [(a, s, seed) for a in PEERS for s in SETTINGS for seed in range(3)]
        wanted += [(a, "B", 0) for a in ARMS if a not in PEERS]
        have = {(x["arm"], x["setting"], x["seed"]) for x in self.lines}
        return [f"{a}/{s}/{seed}" for a, s, seed in wanted if (a, s, seed) not in have]

    def figure(self, arm: str, setting: str, takes: Sequence[Take]) -> Interval:
        """The mean of the figures on several sets, over all runs of an arm."""
        return interval([_stack(self.runs(arm, setting), take) for take in takes])

    def difference(
        self, arm: str, than: str, setting: str, takes: Sequence[Take]
    ) -> Interval | None:
        """The figure of `arm` minus that of `than`, over the seeds that both have; None without."""
        a, b = self.runs(arm, setting), self.runs(than, setting)
        seeds = {line["seed"] for line in a} & {line["seed"] for line in b}
        if not seeds:
            return None
        a, b = ([line for line in lines if line["seed"] in seeds] for lines in (a, b))
        return interval([minus(_stack(a, take), _stack(b, take)) for take in takes])


def domains_of(setting: str) -> dict[str, tuple[str, ...]]:
    """Kinds of domains: trained on, and not."""
    seen = SETTINGS[setting]
    unseen = tuple(domain for domain in DOMAINS if domain not in seen)
    return {"trained on": seen, **({"not trained on": unseen} if unseen else {})}


def text(domain: str, split: str = "test", ranges: slice | None = None) -> Take:
    """Bits and bytes of a domain's documents, in the trained length or in the ranges given."""

    def take(line: Line) -> Stratum:
        found = line["text"][split][domain]
        within = sum(edge <= line["budget"]["context_length"] for edge in line["edges"]) - 1
        bits, size = (
            np.array(found[key], float)[:, ranges or slice(within)].sum(1)
            for key in ("bits", "bytes")
        )
        return Stratum(bits[None], size)

    return take


def has_text(line: Line, domain: str, ranges: slice) -> bool:
    """Whether any document of the domain reaches these positions."""
    return bool(np.array(line["text"]["test"][domain]["bytes"])[:, ranges].sum())


def task(name: str) -> Take:
    """Points of a benchmark's questions."""

    def take(line: Line) -> Stratum:
        points = np.array([int(point) for point in line["tasks"][name]["points"]], float)
        return Stratum(points[None], np.ones(len(points)))

    return take


def recall(name: str, what: str) -> Take:
    """ "points" or "bits" of the problems of a recall task."""

    def take(line: Line) -> Stratum:
        values = np.array(line["recall"][name][what], float)
        return Stratum(values[None], np.ones(len(values)))

    return take


def probe(features: str) -> Take:
    """Right answers of the linear probe; a document's pieces are drawn together."""

    def take(line: Line) -> Stratum:
        owners, right = np.array(line["trigger"]["probe"][features], float).T
        known = np.unique(owners)
        hits = [right[owners == owner].sum() for owner in known]
        number = [(owners == owner).sum() for owner in known]
        return Stratum(np.array([hits], float), np.array(number, float))

    return take


def _stack(lines: Sequence[Line], take: Take) -> Stratum:
    each = [take(line) for line in lines]
    return Stratum(np.concatenate([x.values for x in each]), each[0].weights)
