"""The goals of the study, and whether its rows meet them."""

from collections.abc import Sequence

import numpy as np

from experiments.adapt import prose
from experiments.adapt.domains import SEEN, UNSEEN
from experiments.adapt.parts import EQUAL, MOST_WORSE
from experiments.adapt.scores import Study, show
from experiments.common.tables import table
from nirvana.statistics import holm, t_interval, t_test

REFERENCE = "chosen"
"""The condition that is compared with the controls."""
CONTROLS = ("turned", "own domain", "other domain", "unigram cache", "cache mixture", "fast")
ADAPTED, TRAINED = -15.0, -20.0  # percent, unseen domains, last quarter
MOST_NUMBERS = 4000
MOST_TIME = 3.5  # times a prefill, on an H200
SIGNIFICANT = 0.05


def goals(study: Study) -> str:
    """The first section: which goals are met."""
    lines = []
    for name, goal in (("chosen", ADAPTED), ("trained", TRAINED), ("trained, start", TRAINED)):
        said = prose.GOAL.format(goal=f"{goal:.0f}", condition=name)
        if not study.has(name):
            lines.append([said, "-", "not measured"])
            continue
        values = study.changes(name, [*UNSEEN], "last")
        numbers = study.row(name)["numbers"]
        figure = f"{show(values)} %, {numbers:,} numbers, {len(values)} documents"
        verdict = _verdict(values, goal) if numbers <= MOST_NUMBERS else "missed: too many numbers"
        lines.append([said, figure, verdict])
    for name in ("chosen", "trained", "trained, start"):
        if study.has(name):
            lines.append(_seen(study, name))
    lines += [_cost(study), _controls(study)]
    return prose.GOALS + table(["goal", "measured", "verdict"], lines)


def differences(study: Study) -> list[tuple[str, np.ndarray, float]]:
    """The change under `REFERENCE` minus that under each control that was measured.

    Args:
        study: the rows.

    Returns:
        of each control its name, the differences over the documents of the unseen domains, last
        quarter, in percentage points, and p by Holm's method.
    """
    if not study.has(REFERENCE):
        return []
    names = [name for name in CONTROLS if study.has(name)]
    found = [
        study.changes(REFERENCE, [*UNSEEN], "last", beside=[name])
        - study.changes(name, [*UNSEEN], "last", beside=[REFERENCE])
        for name in names
    ]
    p_values = holm([t_test(each) for each in found]) if found else []
    return [*zip(names, found, map(float, p_values), strict=True)]


def _verdict(values: Sequence[float] | np.ndarray, limit: float) -> str:
    """Whether a mean is at most a limit, and its interval."""
    if np.mean(values) > limit:
        return "missed"
    return "met" if t_interval(values).high <= limit else "met on average, not by the interval"


def _seen(study: Study, name: str) -> list[str]:
    found = {
        domain: study.changes(name, [domain], "all")
        for domain in SEEN
        if domain in study.row("frozen")["nats"]
    }
    worst = max(found, key=lambda domain: found[domain].mean())
    return [
        prose.SEEN_GOAL.format(limit=MOST_WORSE, condition=name),
        f"worst: {worst}, {show(found[worst])} %",
        _verdict(found[worst], MOST_WORSE),
    ]


def _cost(study: Study) -> list[str]:
    said = prose.COST_GOAL.format(limit=MOST_TIME)
    rows = [row for row in study.part("time") if row["name"]["model"] == "tiny"]
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        ratios = [
            row["ratios"]["prefill"] for row in rows if row["name"].get("device", "cuda") == device
        ]
        if not ratios:
            continue
        figure = f"{min(ratios):.1f} to {max(ratios):.1f} times on a {name}"
        verdict = "met" if max(ratios) <= MOST_TIME else "not met at every length of a chunk"
        return [said, figure, verdict if device == "cuda" else "not measured on an H200"]
    return [said, "-", "not measured"]


def _controls(study: Study) -> list[str]:
    ahead, behind, unclear = [], [], []
    for name, values, p in differences(study):
        group = unclear if p >= SIGNIFICANT else ahead if values.mean() < 0 else behind
        group.append(f"`{name}`")
    absent = [f"`{name}`" for name in CONTROLS if not study.has(name)]
    absent += [f"`{model}`" for model in EQUAL if not study.has("norm", model)]
    said = {"ahead of": ahead, "behind": behind, "no difference shown to": unclear}
    figure = "; ".join(f"{key} {', '.join(names)}" for key, names in said.items() if names)
    verdicts = ["missed"] if behind or unclear else [] if absent else ["met"]
    verdicts += [f"not measured: {', '.join(absent)}"] if absent else []
    return [prose.CONTROL_GOAL, figure or "-", "; ".join(verdicts)]
