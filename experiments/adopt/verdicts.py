"""The goals of the study, and whether its rows meet them."""

from experiments.adopt import prose
from experiments.adopt.scores import Study
from experiments.common.results import Row
from experiments.common.tables import table
from nirvana.statistics import t_interval

MILLION = 10**6
MORE_BITS = {50: 3.0, 200: 1.5}
"""Millions of tokens -> percent of bits per byte above the teacher's, at most."""
GENERATED = 0.95  # of the teacher's score on generated tasks, at least
GENERATED_AT = 50  # millions of tokens
STEADY = 1.0  # percent by which memory may differ between lengths
PIECE = 2048  # tokens of a prompt that generation reads at once
LONGEST = 65536
FASTER = 5.0
NOT_MEASURED = "not measured"


def goals(study: Study) -> str:
    """The first section: every goal with its figure, those that are missed first."""
    lines = [_bits(study, millions, limit) for millions, limit in MORE_BITS.items()]
    lines.append(_generated(study))
    distilled = study.distilled("both")
    row = distilled[-1] if distilled else None
    lines += [_recall(study, row), _memory(row), _speed(study, row)]
    lines.sort(key=lambda line: _order(line[-1]))
    return prose.GOALS + table(["goal", "measured", "verdict"], lines)


def _order(verdict: str) -> int:
    """Missed goals first, then those that are met in part or not measured, then the others."""
    return 0 if verdict.startswith("missed") else 2 if verdict == "met" else 1


def _bits(study: Study, millions: int, limit: float) -> list[str]:
    goal = prose.BITS_GOAL.format(millions=millions, limit=limit)
    row = study.find("both", millions * MILLION)
    found = None if row is None else study.increase(row)
    if found is None:
        return [goal, "-", NOT_MEASURED]
    if found.documents is None or len(found.documents) < 2:
        figure = f"{found.figure:+.2f} %, documents of any length in {', '.join(found.bits)}"
        verdict = "met on average, no interval" if found.figure <= limit else "missed"
        return [goal, figure, verdict]
    interval = t_interval(found.documents)
    figure = f"{found.figure:+.2f} %; over {len(found.documents)} documents "
    figure += f"{interval.show(2, sign=True)} %"
    if len(found.bits) > 1:
        figure += f"; over {len(found.bits)} domains {t_interval(found.domains).show(2, True)} %"
    if found.figure > limit:
        return [goal, figure, "missed"]
    met = interval.high <= limit
    return [goal, figure, "met" if met else "met on average, not by the interval over documents"]


def _generated(study: Study) -> list[str]:
    goal = prose.GENERATED_GOAL.format(millions=GENERATED_AT, share=GENERATED)
    row = study.find("both", GENERATED_AT * MILLION)
    found = None if row is None else study.generated(row)
    if found is None:
        return [goal, "-", NOT_MEASURED]
    if found.interval is None:
        verdict = "met on average, no interval" if found.figure >= GENERATED else "missed"
        return [goal, f"{100 * found.figure:.1f} %", verdict]
    low, high = 100 * found.interval.low, 100 * found.interval.high
    figure = f"{100 * found.figure:.1f} ({low:.1f} to {high:.1f}) %"
    if found.figure < GENERATED:
        return [goal, figure, "missed"]
    met = found.interval.low >= GENERATED
    return [goal, figure, "met" if met else "met on average, not by the interval"]


def _recall(study: Study, row: Row | None) -> list[str]:
    length = 2 * (study.positions or 8192)
    goal = prose.RECALL_GOAL.format(length=length)
    window = study.find("window", 0)
    found = None if row is None or window is None else study.recall(row, window, length)
    if row is None or found is None:
        return [goal, "-", NOT_MEASURED]
    figure = f"{prose.name_of(row)}: {found.own:.3f}, the teacher with the window {found.other:.3f}"
    if found.paired is not None and len(found.paired) > 1:
        interval = t_interval(found.paired)
        figure += f"; difference {interval.show(3, sign=True)}, {len(found.paired)} problems"
        if interval.low > 0:
            return [goal, figure, "met"]
    return [goal, figure, "met on average only" if found.own > found.other else "missed"]


def _memory(row: Row | None) -> list[str]:
    goal = prose.MEMORY_GOAL.format(limit=STEADY)
    found = {} if row is None else row["generation"]
    sizes = {int(length): each["MiB"] for length, each in found.items() if int(length) > PIECE}
    if row is None or len(sizes) < 2 or not min(sizes.values()):
        return [goal, "-", NOT_MEASURED]
    spread = 100 * (max(sizes.values()) / min(sizes.values()) - 1)
    figure = f"{prose.name_of(row)}: {min(sizes.values()):,.0f} to {max(sizes.values()):,.0f} MiB"
    figure += f" from {min(sizes):,} to {max(sizes):,} tokens"
    return [goal, figure, "met" if spread <= STEADY else "missed"]


def _speed(study: Study, row: Row | None) -> list[str]:
    goal = prose.SPEED_GOAL.format(length=LONGEST, factor=FASTER)
    at = [] if row is None or study.teacher is None else [study.teacher, row]
    # Without graphs the launches of the kernels take the time of both, whatever the length.
    times = [x.get("graph generation", {}).get(str(LONGEST), {}).get("ms") for x in at]
    if row is None or not times or None in times:
        return [goal, "-", NOT_MEASURED]
    factor = times[0] / times[1]
    figure = f"{prose.name_of(row)}: {times[1]:.1f} ms a token, the teacher {times[0]:.1f} ms: "
    return [goal, f"{figure}{factor:.2f} times", "met" if factor >= FASTER else "missed"]
