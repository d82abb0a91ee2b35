"""The goals of the study, and whether its rows meet them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.adapt import prose
from experiments.adapt.conditions import MOST_WORSE
from experiments.adapt.domains import SEEN, UNSEEN
from experiments.adapt.measure import change
from experiments.adapt.parts import EQUAL
from experiments.adapt.scores import Study, show
from experiments.common.tables import table
from nirvana.statistics import holm, t_interval, t_test

REFERENCE = "chosen"
"""The condition that is compared with the controls."""
CONTROLS = (
    "turned",
    "own domain",
    "other domain",
    "domain",
    "domain, adapted",
    "unigram cache",
    "cache mixture",
    "fast",
    "norm",
    "low_rank",
)
LORA = "LoRA"
ADAPTED, TRAINED = -15.0, -20.0  # percent, unseen domains, last quarter
MOST_NUMBERS = 4000
MOST_TIME = 3.5  # times a prefill, on an H200
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Comparison:
    """A condition or a model beside another one, document by document.

    Args:
        name: of the control or the other model.
        kind: what is compared, such as "unseen, last quarter".
        by_domain: the paired differences of the documents of each domain.
        p: of a t test over the documents, by Holm's method.
        seen: differences over all tokens of the documents of seen domains, where there are any.
    """

    name: str
    kind: str
    by_domain: Mapping[str, np.ndarray]
    p: float
    seen: Sequence[float] | np.ndarray = ()

    @property
    def values(self) -> np.ndarray:
        """The difference of every document."""
        return np.concatenate([*self.by_domain.values()])

    @property
    def means(self) -> list[float]:
        """The mean difference of every domain."""
        return [float(each.mean()) for each in self.by_domain.values()]


def goals(study: Study) -> str:
    """The first section: which goals are met, those that are not met first."""
    lines = []
    for name, goal in (("chosen", ADAPTED), ("trained", TRAINED), ("trained, start", TRAINED)):
        goal_text = prose.GOAL.format(goal=f"{goal:.0f}", condition=name)
        if not study.has(name):
            lines.append([goal_text, "-", "not measured"])
            continue
        found = _of_domains(study, name, [*UNSEEN], "last")
        values, means = np.concatenate([*found.values()]), [x.mean() for x in found.values()]
        numbers = study.row(name)["numbers"]
        figure = f"{show(values)} %, {numbers:,} numbers, {len(values)} documents"
        figure += f"; over {len(means)} domains {show(means)} %"
        verdict = _verdict(values, goal) if numbers <= MOST_NUMBERS else "missed: too many numbers"
        if verdict == "met" and _verdict(means, goal) != "met":
            verdict = "met over documents; over domains on average, not by the interval"
        lines.append([goal_text, figure, verdict])
    for name in ("chosen", "trained", "trained, start"):
        if study.has(name):
            lines.append(_seen(study, name))
    lines += [_cost(study), _controls(study)]
    lines.sort(key=lambda line: _order(line[-1]))
    return prose.GOALS + table(["goal", "measured", "verdict"], lines)


def _order(verdict: str) -> int:
    """Missed goals first, then those that are met in part, then the others."""
    return 0 if verdict.startswith("missed") else 2 if verdict == "met" else 1


def _of_domains(
    study: Study, name: str, domains: Sequence[str], part: str, beside: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The changes under a condition in each domain that has documents."""
    found = {domain: study.changes(name, [domain], part, beside=beside) for domain in domains}
    return {domain: values for domain, values in found.items() if len(values)}


def differences(study: Study) -> list[Comparison]:
    """The change under `REFERENCE` minus that under each control that was measured.

    Args:
        study: the rows.

    Returns:
        the differences in percentage points: of unseen domains in the last quarter, and of seen
        ones over all tokens.
    """
    if not study.has(REFERENCE):
        return []
    found = []
    for name in CONTROLS:
        if study.has(name):
            unseen = _beside(study, name, [*UNSEEN], "last")
            found.append((name, unseen, _beside(study, name, SEEN, "all")))
    found.append((LORA, _beside_lora(study, [*UNSEEN], "last"), _beside_lora(study, SEEN, "all")))
    found = [each for each in found if each[1]]
    if not found:
        return []
    p_values = holm([t_test(np.concatenate([*unseen.values()])) for _, unseen, _ in found])
    return [
        Comparison(
            name,
            "unseen, last quarter",
            unseen,
            float(p),
            [x for each in seen.values() for x in each],
        )
        for (name, unseen, seen), p in zip(found, p_values, strict=True)
    ]


def _beside(study: Study, name: str, domains: Sequence[str], part: str) -> dict[str, np.ndarray]:
    """The change under `REFERENCE` minus that under a control, of each domain's documents."""
    own = _of_domains(study, REFERENCE, domains, part, [name])
    its = _of_domains(study, name, domains, part, [REFERENCE])
    return {domain: own[domain] - its[domain] for domain in own}


def _beside_lora(study: Study, domains: Sequence[str], part: str) -> dict[str, np.ndarray]:
    """The same beside LoRA, whose rows are of one domain each."""
    found = {}
    for row in study.part("lora"):
        domain = row["name"]["domain"]
        own, frozen = (study.row(name)["nats"].get(domain, []) for name in (REFERENCE, "frozen"))
        count = min(map(len, (own, frozen, row["nats"])))
        if domain in domains and count:
            changes = [
                np.array(change(nats[:count], frozen[:count], part)) for nats in (own, row["nats"])
            ]
            found[domain] = changes[0] - changes[1]
    return found


def quarters(study: Study) -> dict[str, tuple[int, int]]:
    """The second quarter, which is within the context that the equal models were trained at, and
    the last one, which is not: their names and blocks."""
    ends = {"second quarter": (study.count // 4, study.count // 2)}
    return ends | {"last quarter": (study.count * 3 // 4, study.count)}


def model_differences(study: Study) -> list[Comparison]:
    """The adapted model `nirvana` minus the other equal models, each adapted: the change of unseen
    domains in percentage points, and bits per byte."""
    first, *others = EQUAL
    others = [other for other in others if study.has("norm", other)]
    if not others or not study.has("norm", first) or not study.has("bytes"):
        return []
    found: list[tuple[str, str, dict[str, np.ndarray]]] = []
    for other in others:
        for quarter, (start, stop) in quarters(study).items():
            for what in ("change, unseen", "bits per byte, unseen", "bits per byte, seen"):
                figures = study.blocks if what.startswith("change") else study.bits_per_byte
                by_domain = {}
                for domain in UNSEEN if what.endswith("unseen") else SEEN:
                    own = figures("norm", [domain], start, stop, first)
                    its = figures("norm", [domain], start, stop, other)
                    count = min(len(own), len(its))
                    if count:
                        by_domain[domain] = own[:count] - its[:count]
                found.append((other, f"{what}, {quarter}", by_domain))
    p_values = holm([t_test(np.concatenate([*each.values()])) for _, _, each in found])
    return [
        Comparison(name, kind, by_domain, float(p))
        for (name, kind, by_domain), p in zip(found, p_values, strict=True)
    ]


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
    worst_domain = max(found, key=lambda domain: found[domain].mean())
    high = max(found, key=lambda domain: t_interval(found[domain]).high)
    figure = f"worst: {worst_domain}, {show(found[worst_domain])} %"
    if high != worst_domain:
        figure += f"; interval that reaches furthest: {high}, {show(found[high])} %"
    verdict = _verdict(found[worst_domain], MOST_WORSE)
    if verdict == "met":
        verdict = _verdict(found[high], MOST_WORSE)
    return [prose.SEEN_GOAL.format(limit=MOST_WORSE, condition=name), figure, verdict]


def _cost(study: Study) -> list[str]:
    goal = prose.COST_GOAL.format(limit=MOST_TIME)
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        ratios: dict[str, list[float]] = {}
        for row in study.part("time"):
            about = row["name"]
            if about["device"] == device:
                of = f"`{about['model']}`, {about['dtype']}, batch of {about['rows']}"
                ratios.setdefault(of, []).append(row["ratios"]["prefill"])
        if not ratios:
            continue
        figure = "; ".join(f"{of}: {min(x):.1f} to {max(x):.1f} times" for of, x in ratios.items())
        found = [ratio for group in ratios.values() for ratio in group]
        verdict = "missed everywhere"
        if min(found) <= MOST_TIME:
            verdict = "met" if max(found) <= MOST_TIME else "met by some, see Time"
        return [goal, f"on a {name}, {figure}", verdict if device == "cuda" else "no H200"]
    return [goal, "-", "not measured"]


def _controls(study: Study) -> list[str]:
    ahead, behind, unclear = [], [], []
    models = [x for x in model_differences(study) if x.kind == "change, unseen, last quarter"]
    for each in (*differences(study), *models):
        mean = each.values.mean()
        group = unclear if each.p >= SIGNIFICANT else ahead if mean < 0 else behind
        group.append(f"`{each.name}`" + (f" (`{EQUAL[0]}` is)" if each in models else ""))
    absent = [f"`{name}`" for name in CONTROLS if not study.has(name)]
    absent += [] if study.part("lora") else [f"`{LORA}`"]
    absent += [f"`{model}`" for model in EQUAL if not study.has("norm", model)]
    groups = {"ahead of": ahead, "behind": behind, "no difference shown to": unclear}
    figure = "; ".join(f"{key} {', '.join(names)}" for key, names in groups.items() if names)
    verdicts = ["missed"] if behind or unclear else [] if absent else ["met"]
    verdicts += [f"not measured: {', '.join(absent)}"] if absent else []
    return [prose.CONTROL_GOAL, figure or "-", "; ".join(verdicts)]
