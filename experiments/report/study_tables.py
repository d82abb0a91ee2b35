"""Tables of a full study: models, accelerations, wordings, controls, thresholds, real cases."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common.results import Row
from experiments.common.tables import table
from experiments.report.detection import large, show_people
from experiments.report.rows import READ, with_facts
from nirvana.mri.reports.grammar import NORMAL, Facts, parse, write
from nirvana.mri.reports.score import (
    FACTS,
    best_threshold,
    flat,
    majority,
    most_frequent,
    score,
)

Cells = dict[tuple[str, str, float, int], list[Row]]
LIMITS = (0.02, 0.015, 0.01, 0.005)  # of the validation's normals that may get a finding
BINS = ((4.0, 6.0), (6.0, 10.0), (10.0, 15.0), (15.0, 25.0), (25.0, 40.0))

MODELS = """
## Models, accelerations, wordings

Mean over people with its 95 % t interval. The encoder was trained for {see_steps:,} steps and the
way to the backbone for {tell_steps:,}, of {batch_size} slices with {coils} coils. Each model is one
training run, so the table does not compare ways of training.
"""
CONTROLS = """
{valid:.1%} of the free texts are valid reports of the grammar; the others count as normal.
"""
RULES = """
## Other limits for the threshold

The threshold has the best F1 of presence among those that give at most {hallucinated:.1%} of the
validation's normal slices a finding. A limit that is chosen by this table makes the test a
validation set. Lesions of 10 mm and more, 4x.
"""


def show(cells: Cells, study: dict[str, Any], validation: dict[str, Any]) -> str:
    """All tables of a finished study."""
    model = study["model"]
    parts = [MODELS.format(**study), readings(cells)]
    parts += ["\n## F1 of each fact, wording 0\n", facts_table(cells)]
    parts += ["\n## Controls, 4x\n", controls(cells, model)]
    parts += ["\n## Share of lesions found by size, contrast and acceleration\n"]
    parts += [curve(cells, model), RULES.format(**study)]
    parts += [rules(cells[model, "wording", 4.0, 0], validation)]
    return "".join(parts)


def figures(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Figures of `flat`, each the mean over people with its t interval."""
    found = []
    for person in sorted({row["subject"] for row in rows}):
        own = [row for row in rows if row["subject"] == person]
        found.append(flat(score([x["truth"] for x in own], [x[READ] for x in own])))
    return [show_people([each[name] for each in found]) for name in names]


def readings(cells: Cells) -> str:
    body = []
    for (model, kind, acceleration, wording), rows in sorted(cells.items()):
        if kind != "wording":
            continue
        some = figures(large(rows), ["f1.finding", "side_accuracy"])
        rates = figures(rows, ["f1.finding", "hallucination", "omission"])
        seen = f"{wording} ({'seen' if wording < 4 else 'unseen'})"
        body.append([model, f"{acceleration:g}x", seen, rates[0], *some, *rates[1:]])
    head = ["model", "acceleration", "wording", "presence F1", "presence F1, >= 10 mm"]
    return table([*head, "side, >= 10 mm", "false findings", "omission"], body)


def facts_table(cells: Cells) -> str:
    body = []
    for (model, kind, acceleration, wording), rows in sorted(cells.items()):
        if kind != "wording" or wording != 0:
            continue
        for label, kept in (("all", rows), (">= 10 mm", large(rows))):
            shown = figures(kept, [f"f1.{fact}" for fact in FACTS])
            body.append([model, f"{acceleration:g}x", label, *shown])
    return table(["model", "acceleration", "lesions", *FACTS], body)


def controls(cells: Cells, model: str) -> str:
    main = cells[model, "wording", 4.0, 0]
    truth = [row["truth"] for row in main]
    most = majority(truth)
    frequent = most_frequent([facts for facts in truth if facts.finding])
    shifted = [row[READ] for row in main[len(main) // 2 :] + main[: len(main) // 2]]
    free = cells[model, "free", 4.0, 0]
    rows: list[tuple[str, Sequence[Row]]] = [
        (model, main),
        ("the same, without the mirror image", cells[model, "one view", 4.0, 0]),
        ("the same, free text", free),
        ("the same, fully sampled scan (ground truth)", cells[model, "full image", 1.0, 0]),
        ("trained on the zero-filled image", cells["zero-filled", "wording", 4.0, 0]),
        ("no image", cells[model, "no image", 4.0, 0]),
        ("reports of other slices (shuffled)", with_facts(main, shifted)),
        ("majority report", with_facts(main, [most] * len(main))),
        ("most frequent finding, always", with_facts(main, [frequent] * len(main))),
        ("oracle: the true facts through the grammar", with_facts(main, oracle(truth))),
    ]
    names = ["f1.finding", "side_accuracy", "exact", "hallucination", "omission"]
    body = [[label, *figures(chosen, names)] for label, chosen in rows]
    valid = sum(row["valid"] for row in free) / len(free)
    head = ["", "presence F1", "side accuracy", "exact", "false findings", "omission"]
    return table(head, body) + CONTROLS.format(valid=valid)


def oracle(truth: Sequence[Facts]) -> list[Facts]:
    return [parse(write(facts, number % 6)) for number, facts in enumerate(truth)]


def curve(cells: Cells, model: str) -> str:
    parts = []
    for (name, kind, acceleration, _), rows in sorted(cells.items()):
        if name != model or kind != "curve":
            continue
        contrasts = sorted({row["contrast"] for row in rows})
        sampled = "Fully sampled" if acceleration == 1 else f"{acceleration:g}x"
        body = []
        for low, high in BINS:
            columns = []
            for contrast in contrasts:
                found = [
                    row["finding"] >= row["threshold"]
                    for row in rows
                    if row["contrast"] == contrast
                    and row["truth"].finding
                    and low <= row["size"] < high
                ]
                share = f"{sum(found) / len(found):.2f}" if found else "-"
                columns.append(f"{share} ({len(found)})")
            body.append([f"{low:g} to {high:g}", *columns])
        head = ["size, mm", *(f"contrast {contrast:g}" for contrast in contrasts)]
        parts.append(f"\n{sampled}:\n" + table(head, body))
    return "".join(parts)


def rules(main: Sequence[Row], validation: dict[str, Any]) -> str:
    """What other limits to the choice of the threshold would have given."""
    rows, present = large(main), validation["present"]
    findings = [row["truth"] for row in rows if row["truth"].finding]
    something = most_frequent(findings) if findings else NORMAL
    body = []
    for limit in LIMITS:
        chosen = best_threshold(present, validation["finding"]["wording 0"], limit)
        reported = [something if row["finding"] >= chosen["threshold"] else NORMAL for row in rows]
        body.append(
            [
                f"{limit:.1%}",
                f"{chosen['threshold']:.4f}",
                f"{chosen['f1']:.3f}",
                f"{chosen['hallucination']:.3f}",
                *figures(with_facts(rows, reported), ["f1.finding", "hallucination"]),
            ]
        )
    head = ["limit on validation normals", "threshold", "validation: F1", "false findings"]
    return table([*head, "test: presence F1", "false findings"], body)


def cases(folder: Path) -> str:
    """Reports of real scans, which are shown and not scored."""
    body = []
    for case in sorted(folder.glob("*/report.json")):
        report = json.loads(case.read_text(encoding="utf-8"))
        found = [each for each in report["slices"] if each["facts"]["finding"]]
        sides = Counter(each["facts"]["side"] for each in found)
        listed = ", ".join(f"{count} {side}" for side, count in sides.most_common())
        number = report["panel"]["slice"]
        shown = next(each for each in report["slices"] if each["slice"] == number)
        likely = ", ".join(f"{name} {p:.0%}" for name, p in shown["probability"].items())
        cells = [f"`{case.parent.name}`", len(report["slices"])]
        cells += [f"{len(found)} ({listed or 'none'})", f"{number}: {shown['text']} ({likely})"]
        body.append(cells)
    if not body:
        return ""
    about = (folder / "about.md").read_text(encoding="utf-8").rstrip("\n")
    head = ["scan", "slices read", "with a finding", "slice with the most probable finding"]
    return f"\n## Real cases, shown and not scored\n\n{about}\n" + table(head, body)
