"""Writes RESULTS.md of the report study from its rows.

    python -m experiments.report.page
    python -m experiments.report.page --study OUT

Without options the page is about the packaged reporter, whose rows `experiments.report.packaged`
wrote, and quotes the earlier page of the full study. With the folder of a full study it shows that
study's rows instead of the quotations, and the reports of real cases in OUT/shown (see
`experiments.report.study_tables`).
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import table
from experiments.report import prose, study_tables
from experiments.report.detection import (
    FALSE,
    Detection,
    at_false,
    by_person,
    detect,
    large,
    show_people,
)
from experiments.report.packaged import NAME, RESULTS
from experiments.report.rows import READ
from experiments.report.study_tables import Cells
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.mri.reports.grammar import Facts
from nirvana.mri.reports.score import FACTS, best_threshold
from nirvana.statistics import t_interval

HERE = Path(__file__).parent
STUDY_FILES = ("rows", "shown", "study.json")
BINS = ((3.0, 6.0), (6.0, 10.0), (10.0, 15.0), (15.0, 25.0), (25.0, 50.0))
TARGETS = (("f1", 0.90, True), ("side", 0.95, True), ("false", 0.05, False))
COLUMNS = {
    "lesions": "lesions >= 10 mm",
    "normals": "normal",
    "auc": "AUC",
    "auc_all": "AUC, all sizes",
    "sensitivity": "sensitivity",
    "false": "false findings",
    "sensitivity_fixed": f"sensitivity at {FALSE:.0%} false findings",
    "f1": "presence F1",
    "side": "side right",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.report.page", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--study", type=Path, help="folder of a full study")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    given = parser.parse_args(arguments)
    studied = [] if given.study is None else [given.study / name for name in STUDY_FILES]
    check_outputs({"--out": given.out}, [given.results, *studied])
    if given.study is None:
        cells = load([given.results])
        rest = (HERE / "quoted.md").read_text(encoding="utf-8")
        text = page(cells, NAME) + "\n" + rest
    else:
        cells = load(sorted((given.study / "rows").glob("*.jsonl")))
        study = record(given.study / "study.json")
        validation = record(given.study / study["model"] / "validation.json")
        check(cells, study, validation)
        text = page(cells, study["model"]) + study_tables.show(cells, study, validation)
        text += study_tables.cases(given.study / "shown")
    write_page(given.out, text)


def load(files: Sequence[Path]) -> Cells:
    """(model, kind, acceleration, wording) -> rows, their facts as `Facts`.

    Raises:
        InputError: when there are none.
    """
    cells: Cells = defaultdict(list)
    for file in files:
        for row in read_rows(file):
            row["truth"] = Facts(**row["truth"])
            row[READ] = None if row[READ] is None else Facts(**row[READ])
            cells[row["model"], row["kind"], row["acceleration"], row["wording"]].append(row)
    if not cells:
        raise InputError("there are no rows; run experiments.report.packaged or .study first")
    return dict(cells)


def record(file: Path) -> dict[str, Any]:
    """What a full study wrote beside its rows.

    Raises:
        InputError: for a file that is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read: {error}; run experiments.report.study to its end"
        ) from error


def check(cells: Cells, study: dict[str, Any], validation: dict[str, Any]) -> None:
    """Raises an `InputError` for a study that is not finished, or rows of another threshold."""
    model = study["model"]
    needed = [(model, kind, 4.0, 0) for kind in ("wording", "one view", "free", "no image")]
    needed += [(model, "full image", 1.0, 0), ("zero-filled", "wording", 4.0, 0)]
    missing = [cell for cell in needed if cell not in cells]
    if missing:
        raise InputError(f"the study lacks {missing[0]}; run experiments.report.study to its end")
    likely = validation["finding"]["wording 0"]
    wanted = best_threshold(validation["present"], likely, study["hallucinated"])["threshold"]
    if any(row["threshold"] != wanted for row in cells[model, "wording", 4.0, 0]):
        raise InputError(
            f"rows were read with another threshold than {wanted}, that of study.json; "
            "remove them and run experiments.report.study again"
        )


def page(cells: Cells, model: str) -> str:
    """What a model's rows at 4x show, person by person."""
    if (model, "wording", 4.0, 0) not in cells:
        raise InputError(f"there are no rows of {model} at 4x in wording 0")
    rows = cells[model, "wording", 4.0, 0]
    people = by_person(rows)
    prevalence = float(np.mean([row["truth"].finding for row in rows]))
    packaged = model == NAME  # what was checked elsewhere is about this reporter
    parts = [prose.HEAD.format(prevalence=prevalence), "\n## Verdicts\n"]
    parts += [prose.OUTSIDE] * packaged + [prose.TARGETS.format(verdict=verdict(people))]
    if packaged:
        parts.append(prose.DRAWS.format(samples=len(rows), threshold=rows[0]["threshold"]))
    parts += [targets(people)] + [prose.TRIGGER] * packaged
    parts += [prose.PEOPLE.format(false=FALSE), detections(people, rows)]
    if "sequence" in rows[0]:
        parts += [prose.SEQUENCES, by_sequence(rows)]
    parts += [prose.SIZES, by_size(rows), prose.SECONDARY, facts(rows)]
    return "".join(parts)


def met(value: float, limit: float, above: bool) -> bool:
    return value >= limit if above else value <= limit


def verdict(people: dict[str, Detection]) -> str:
    """Which targets are met on average, for how many people, and whether an interval shows it."""
    parts, shown = [], 0
    for name, limit, above in TARGETS:
        values = [getattr(each, name) for each in people.values()]
        kept = [value for value in values if np.isfinite(value)]
        if not kept:
            continue
        count = sum(met(value, limit, above) for value in kept)
        average = "met" if met(float(np.mean(kept)), limit, above) else "missed"
        parts.append(f"{COLUMNS[name]} {average} on average and for {count} of {len(kept)} people")
        if len(kept) > 1:
            low_high = _bounds(kept)
            shown += all(met(bound, limit, above) for bound in low_high)
    return (
        f"**Shown for {shown} of {len(parts)} targets**: only where the whole interval over people "
        f"meets the target is it shown for other people. In these samples: {'; '.join(parts)}."
    )


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    found = t_interval(values)
    return found.low, found.high


def targets(people: dict[str, Detection]) -> str:
    rows = []
    for name, limit, above in TARGETS:
        values = [getattr(each, name) for each in people.values()]
        cells = [f"{value:.3f}" for value in values]
        sign = ">=" if above else "<="
        rows.append([COLUMNS[name], f"{sign} {limit:.2f}", show_people(values), *cells])
    return table(["", "target", "mean over people (95 % t interval)", *people], rows)


def detections(people: dict[str, Detection], rows: Sequence[Row]) -> str:
    body = [[person, *_cells(each)] for person, each in people.items()]
    means = []
    for name in COLUMNS:
        values = [getattr(each, name) for each in people.values()]
        means.append(sum(values) if name in ("lesions", "normals") else show_people(values))
    body.append(["mean (t interval)", *means])
    return table(["person", *COLUMNS.values()], body)


def by_sequence(rows: Sequence[Row]) -> str:
    fixed, body = at_false(rows), []
    for sequence in sorted({row["sequence"] for row in rows}):
        own = [row for row in rows if row["sequence"] == sequence]
        count = len({row["subject"] for row in own})
        body.append([sequence, count, *_cells(detect(own, fixed))])
    return table(["contrast", "people", *COLUMNS.values()], body)


def _cells(found: Detection) -> list[str]:
    values = [getattr(found, name) for name in COLUMNS]
    return [str(x) if isinstance(x, int) else f"{x:.3f}" if np.isfinite(x) else "-" for x in values]


def by_size(rows: Sequence[Row]) -> str:
    body = []
    for low, high in BINS:
        own = [row for row in rows if row["truth"].finding and low <= row["size"] < high]
        share = f"{np.mean([row[READ].finding for row in own]):.2f}" if own else "-"
        body.append([f"{low:g} to {high:g} mm", len(own), share])
    return table(["longest diameter", "slices", "sensitivity"], body)


def facts(rows: Sequence[Row]) -> str:
    body = []
    for label, kept in (("all sizes", rows), (">= 10 mm", large(rows))):
        body.append([label, *study_tables.figures(kept, [f"f1.{fact}" for fact in FACTS])])
    return table(["lesions", *FACTS], body)


if __name__ == "__main__":
    script(main)
