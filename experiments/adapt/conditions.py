"""Conditions under which documents are read, and the choice of their settings, for any model."""

from collections.abc import Callable, Sequence
from functools import cache
from statistics import mean
from typing import Any

from torch import Tensor

from experiments.adapt.context import Context, by_domain, is_seen, plain
from experiments.adapt.measure import FROZEN, block_nats, change, read, still, task_of
from experiments.common.results import Row
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.task import Task

FAST = 3.0  # step size of "fast" in those of "norm"
MOST_WORSE = 0.1  # percent that a seen domain may lose on validation documents


def grid(
    groups: tuple[str, ...], chunks: Sequence[int], sizes: Sequence[float]
) -> list[AdaptConfig]:
    """Settings with every length of a chunk and every step size, that of "norm"."""
    return [
        AdaptConfig(groups, chunk, lr={g: size * (FAST if g == "fast" else 1) for g in groups})
        for chunk in chunks
        for size in sizes
    ]


def choose(context: Context, model: str, kind: str, candidates: Sequence[AdaptConfig]) -> None:
    """Reads validation documents with each of some settings, and records the best: the lowest bits
    in the last quarter of domains that were not trained on, among those that lose at most
    `MOST_WORSE` in every domain that was."""
    names, _, rows = context.flat("valid")
    network = context.model(model)
    frozen = context.measure(
        "valid",
        {"model": model, "config": "frozen"},
        lambda: {"nats": block_nats(read(network, rows, FROZEN)[0])},
    )
    found = []
    for config in candidates:
        row = context.measure(
            "valid",
            {"model": model, "config": plain(config)},
            lambda config=config: {"nats": block_nats(read(network, rows, config)[0])},
        )
        if row is None or frozen is None:
            return
        last = by_domain(names, change(row["nats"], frozen["nats"], "last"))
        whole = by_domain(names, change(row["nats"], frozen["nats"], "all"))
        gain = mean(mean(each) for domain, each in last.items() if not is_seen(domain))
        increase = max((mean(each) for d, each in whole.items() if is_seen(d)), default=0.0)
        print(f"  {config.chunk} {config.lr}: {gain:+.2f} %, seen at worst {increase:+.2f} %")
        found.append((increase > MOST_WORSE, gain, increase, config))
    _, gain, increase, best = min(found, key=lambda each: each[:2])
    figures = {"figure": round(gain, 3), "worst": round(increase, 3)}
    name = {"model": model, "kind": kind}
    context.measure("select", name, lambda: {"config": plain(best), **figures})


def measure_condition(
    context: Context,
    names: list[str],
    rows: list[Tensor],
    condition: str,
    config: AdaptConfig,
    task: Task | None = None,
    model: str = "tiny",
) -> None:
    """Adds the row of a condition of the main table."""

    def compute() -> Row:
        scores, values = read(context.model(model), rows, config, task)
        found = {"config": plain(config), "nats": named_nats(names, scores)}
        return found | ({"numbers": values.shape[1]} if config.steps else {})

    context.measure("test", {"model": model, "condition": condition}, compute)


def named_nats(names: list[str], scores: list[Tensor]) -> dict[str, Any]:
    """Nats by block of each document, by domain."""
    return by_domain(names, block_nats(scores))


def swapped(
    context: Context,
    names: list[str],
    rows: list[Tensor],
    config: AdaptConfig,
    model: str = "tiny",
) -> None:
    """Task parameters of one document, fixed, on another one."""
    network = context.model(model)
    places = by_domain(names, range(len(names)))
    domains = [*places]
    half = len(domains) // 2

    def own(number: int) -> int:
        here = places[names[number]]
        return here[(here.index(number) + 1) % len(here)]

    def other(number: int) -> int:
        here = places[names[number]].index(number)
        there = places[domains[(domains.index(names[number]) + half) % len(domains)]]
        return there[here % len(there)]

    learned = cache(lambda: read(network, rows, config)[1])
    for name, place in (("own domain", own), ("other domain", other)):

        def compute(place: Callable[[int], int] = place) -> Row:
            numbers = [place(number) for number in range(len(rows))]
            task = task_of(network, config, learned()[numbers])
            return {"nats": named_nats(names, read(network, rows, still(config), task)[0])}

        context.measure("test", {"model": model, "condition": name}, compute)
