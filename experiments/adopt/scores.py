"""The rows of the study of adoption, and what they show of a model beside its teacher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.adopt.prepare import TEACHER
from experiments.common.results import Row
from nirvana.statistics import Interval, ratio_interval

LONG = ("novels",)
"""Domains whose documents are all longer than the teacher's 8,192 positions."""
SAME = ("domains", "documents", "problems")
"""Settings that rows must share to be compared."""


class Study:
    """The rows that are compared with each other: the last one of each model that was measured with
    the settings of the last row of the teacher.

    Attributes:
        rows: by the name of the model, in the order in which they were measured.
        teacher: its row; None where it was not measured.
        left_out: names of the models whose rows have other settings.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        teachers = [row for row in rows if row["branches"] == TEACHER]
        self.teacher = teachers[-1] if teachers else None
        like = self.teacher or rows[-1]
        alike = [row for row in rows if _settings(row) == _settings(like)]
        self.rows = {row["model"]: row for row in alike}
        self.left_out = sorted({row["model"] for row in rows if _settings(row) != _settings(like)})

    @property
    def domains(self) -> list[str]:
        """Those that all rows have."""
        first, *others = (row["bits per byte"] for row in self.rows.values())
        return [domain for domain in first if all(domain in each for each in others)]

    @property
    def positions(self) -> int | None:
        """The teacher's length, where its row has it."""
        return None if self.teacher is None else self.teacher.get("positions")

    def find(self, branches: str, tokens: int) -> Row | None:
        """The row of a model after some tokens of distillation."""
        for row in self.rows.values():
            if (row["branches"], row["tokens"]) == (branches, tokens):
                return row
        return None

    def distilled(self, branches: str) -> list[Row]:
        """The rows of distilled models, smallest budget first."""
        found = [row for row in self.rows.values() if row["branches"] == branches and row["tokens"]]
        return sorted(found, key=lambda row: row["tokens"])

    def increase(self, row: Row) -> "Increase | None":
        """How many more bits a model needs than the teacher; None without a teacher.

        Where both rows have their documents, only those count that are within the teacher's length;
        else all documents of the domains that are not in `LONG`.
        """
        if self.teacher is None:
            return None
        own, its = row["bits per byte"], self.teacher["bits per byte"]
        if self.positions is None or not all("documents" in each for each in (row, self.teacher)):
            pairs = {x: (own[x], its[x]) for x in self.domains if x not in LONG}
            return Increase(pairs, None)
        pairs, documents = {}, []
        for domain in self.domains:
            both = zip(row["documents"][domain], self.teacher["documents"][domain], strict=True)
            # BOS takes a position, too.
            within = [(a, b) for a, b in both if b[0] < self.positions]
            if within:
                size = sum(b[2] for _, b in within)
                pairs[domain] = tuple(sum(x[i][1] for x in within) / size for i in (0, 1))
                documents += [percent(a[1], b[1]) for a, b in within]
        return Increase(pairs, np.array(documents)) if pairs else None

    def generated(self, row: Row) -> "Share | None":
        """The mean over generated tasks as a share of the teacher's."""
        if self.teacher is None:
            return None
        own, its = (mean(each["generated"].values()) for each in (row, self.teacher))
        if not its:
            return None
        return Share(own / its, self._generated_interval(row))

    def _generated_interval(self, row: Row) -> Interval | None:
        points = [_points(each, "generated") for each in (row, self.teacher)]
        if not all(points):
            return None
        own, its = points
        return ratio_interval([(own[kind], its[kind]) for kind in own])

    def recall(self, row: Row, other: Row, length: int) -> "Difference | None":
        """S-NIAH at a length: a model's mean over tasks beside that of another one."""
        names = [name for name in row["niah"] if name.endswith(f" at {length}")]
        if not names or not all(name in other["niah"] for name in names):
            return None
        own, its = (mean(each["niah"][name] for name in names) for each in (row, other))
        points = [_points(each, "niah") for each in (row, other)]
        paired = None
        if all(points):
            paired = np.concatenate([points[0][name] - points[1][name] for name in names])
        return Difference(own, its, paired)


@dataclass(frozen=True)
class Increase:
    """Bits of a model beside the teacher's.

    Attributes:
        bits: domain -> bits per byte of the model and of the teacher.
        documents: percent by which each document's bits differ, `[documents]`; None: unknown.
    """

    bits: dict[str, tuple[float, ...]]
    documents: np.ndarray | None

    @property
    def figure(self) -> float:
        """Percent by which the means over domains differ."""
        own, its = (mean(each[i] for each in self.bits.values()) for i in (0, 1))
        return percent(own, its)

    @property
    def domains(self) -> np.ndarray:
        """Percent of every domain."""
        return np.array([percent(own, its) for own, its in self.bits.values()])


@dataclass(frozen=True)
class Share:
    """A score as a share of the teacher's, with a bootstrap interval over the problems, if they are
    known one by one."""

    figure: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """Two accuracies, and the differences of the problems, if they are known one by one."""

    own: float
    other: float
    paired: np.ndarray | None


def percent(own: float, other: float) -> float:
    """By how many percent a figure exceeds another one."""
    return 100 * (own / other - 1)


def mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def _settings(row: Row) -> list[object]:
    return [row["settings"][name] for name in SAME]


def _points(row: Row | None, part: str) -> dict[str, np.ndarray]:
    """Name -> points of each problem; empty where a row has shares alone."""
    found = (row or {}).get("points", {}).get(part, {})
    return {name: np.array([*map(int, digits)], float) for name, digits in found.items()}
