"""How well a finding is detected, by person: AUC, and sensitivity at fixed false findings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.common.results import Row
from experiments.report.rows import READ
from nirvana.mri.reports.score import auc
from nirvana.statistics import t_interval

LARGE = 10.0  # mm
FALSE = 0.05  # share of normal slices that may get a finding, for a fixed comparison


@dataclass(frozen=True)
class Detection:
    """Figures of one set of rows; NaN where there is nothing to divide by."""

    lesions: int  # slices with a lesion of `LARGE` or more
    normals: int
    auc: float  # slices with lesions of `LARGE` or more against normal ones
    auc_all: float  # slices with lesions of any size against normal ones
    sensitivity: float  # of lesions of `LARGE` or more, at the threshold read with
    false: float  # share of normal slices with a finding, at that threshold
    sensitivity_fixed: float  # of lesions of `LARGE` or more, at the threshold of `at_false`
    false_fixed: float
    f1: float  # of presence, at the threshold read with; depends on the share of lesions
    side: float  # share of right sides among the lesions of `LARGE` or more that were found


def person_of(row: Row) -> str:
    return row["subject"].rpartition("/")[2]


def large(rows: Sequence[Row]) -> list[Row]:
    """Normal slices, and those whose largest lesion has 10 mm or more."""
    return [row for row in rows if not row["truth"].finding or row["size"] >= LARGE]


def at_false(rows: Sequence[Row], most: float = FALSE) -> float:
    """The lowest threshold at which at most a share `most` of the normal slices gets a finding."""
    normal = np.sort([row["finding"] for row in rows if not row["truth"].finding])[::-1]
    allowed = int(most * len(normal))
    return float(np.nextafter(normal[allowed], 2)) if allowed < len(normal) else 0.0


def detect(rows: Sequence[Row], fixed: float) -> Detection:
    """The figures of some rows.

    Args:
        rows: with "truth" and `READ` as `Facts`, "finding" as its probability, "threshold".
        fixed: threshold of the comparison at fixed false findings, see `at_false`.
    """
    normal = [row for row in rows if not row["truth"].finding]
    lesions = [row for row in large(rows) if row["truth"].finding]
    found = [row for row in lesions if row[READ].finding]
    hallucinated = sum(row[READ].finding for row in normal)

    def area(kept: Sequence[Row]) -> float:
        return auc([row["finding"] for row in kept], [row["truth"].finding for row in kept])

    return Detection(
        lesions=len(lesions),
        normals=len(normal),
        auc=area(large(rows)),
        auc_all=area(rows),
        sensitivity=_share(lesions, lambda row: row[READ].finding),
        false=_share(normal, lambda row: row[READ].finding),
        sensitivity_fixed=_share(lesions, lambda row: row["finding"] >= fixed),
        false_fixed=_share(normal, lambda row: row["finding"] >= fixed),
        f1=2 * len(found) / max(len(found) + hallucinated + len(lesions), 1),
        side=_share(found, lambda row: row[READ].side == row["truth"].side),
    )


def by_person(rows: Sequence[Row]) -> dict[str, Detection]:
    """Person -> figures; the fixed false findings are counted over all people together."""
    fixed = at_false(rows)
    people = sorted({person_of(row) for row in rows})
    return {
        person: detect([row for row in rows if person_of(row) == person], fixed)
        for person in people
    }


def show_people(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean over people with its 95 % t interval; of one person the figure alone."""
    kept = [value for value in values if value is not None and np.isfinite(value)]
    if not kept:
        return "-"
    return f"{kept[0]:.{digits}f}" if len(kept) == 1 else t_interval(kept).show(digits)


def _share(rows: Sequence[Row], right: Callable[[Row], bool]) -> float:
    return sum(map(right, rows)) / len(rows) if rows else float("nan")
