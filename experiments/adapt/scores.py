"""The rows of the study as changes of bits, document by document."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.adapt.context import size_of
from experiments.adapt.data import BLOCK
from experiments.adapt.measure import change
from experiments.adapt.prose import CONDITIONS
from experiments.common.results import Row
from nirvana.statistics import t_interval

Nats = Mapping[str, Sequence[Sequence[float]]]
"""Domain -> nats of each document by block."""


def largest(rows: Sequence[Row]) -> list[Row]:
    """Of each measurement the row with the most documents.

    The documents of a domain have a fixed order, of which `--documents` takes the first, so rows of
    different numbers are compared on those that both have. Rows of other data, or of fewer tokens
    than the longest, are tests of the program.

    Args:
        rows: of a file of results, at least one.

    Returns:
        the rows that the page is drawn from.
    """
    most = max(rows, key=lambda row: (row["scale"]["tokens"], size_of(row)))["scale"]
    found: dict[str, Row] = {}
    for row in rows:
        if any(row["scale"][key] != most[key] for key in ("data", "tokens")):
            continue
        key = json.dumps([row["part"], row["name"]], sort_keys=True)
        if key not in found or size_of(row) > size_of(found[key]):
            found[key] = row
    return [*found.values()]


class Study:
    """The rows of a study, by what they are.

    Args:
        rows: those of `largest`.
        model: that the methods are about where they are given no other.
    """

    def __init__(self, rows: Sequence[Row], model: str = "tiny"):
        self.rows, self.model = rows, model
        self.tokens: int = rows[0]["scale"]["tokens"]
        self.count = self.tokens // BLOCK

    def part(self, part: str) -> list[Row]:
        """The rows of a part."""
        return [row for row in self.rows if row["part"] == part]

    def row(self, condition: str, model: str | None = None) -> Row:
        """The row of a condition of the main table."""
        name = {"model": model or self.model, "condition": condition}
        return next(row for row in self.part("test") if row["name"] == name)

    def has(self, condition: str, model: str | None = None) -> bool:
        """Whether a condition was measured."""
        name = {"model": model or self.model, "condition": condition}
        return any(row["name"] == name for row in self.part("test"))

    def conditions(self) -> list[str]:
        """The conditions of the model in the order of the table."""
        own = [row["name"] for row in self.part("test") if row["name"]["model"] == self.model]
        names = [name["condition"] for name in own]
        known = [name for name in CONDITIONS if name in names]
        chunks = [name for name in names if name.startswith("chunk")]
        return [*known, *sorted(chunks, key=lambda name: int(name.split()[1]))]

    def counts(self, conditions: Sequence[str], model: str | None = None) -> dict[str, int]:
        """The documents of each domain that all of some conditions have."""
        found = [self.row(name, model)["nats"] for name in conditions]
        return {
            domain: min(len(nats[domain]) for nats in found)
            for domain in found[0]
            if all(domain in nats for nats in found)
        }

    def changes(
        self,
        condition: str,
        domains: Sequence[str],
        part: str,
        model: str | None = None,
        beside: Sequence[str] = (),
    ) -> np.ndarray:
        """Change of each document's bits against the frozen model.

        Args:
            condition: of the main table.
            domains: whose documents.
            part: "all", or "last" for the last quarter.
            model: that was measured.
            beside: conditions that must have the documents as well.

        Returns:
            percent, `[documents]`.
        """
        own: Nats = self.row(condition, model)["nats"]
        frozen: Nats = self.row("frozen", model)["nats"]
        counts = self.counts([condition, "frozen", *beside], model)
        found: list[float] = []
        for domain in domains:
            count = counts.get(domain, 0)
            if count:
                found += change(own[domain][:count], frozen[domain][:count], part)
        return np.array(found)

    def blocks(
        self,
        condition: str,
        domains: Sequence[str],
        first: int,
        stop: int,
        model: str | None = None,
    ) -> np.ndarray:
        """Change of each document's bits against the frozen model in some blocks, in percent."""
        own: Nats = self.row(condition, model)["nats"]
        frozen: Nats = self.row("frozen", model)["nats"]
        counts = self.counts([condition, "frozen"], model)
        pairs = [
            (a[first:stop], b[first:stop])
            for domain in domains
            for a, b in zip(
                own.get(domain, [])[: counts.get(domain, 0)],
                frozen.get(domain, [])[: counts.get(domain, 0)],
                strict=True,
            )
        ]
        return np.array([100 * (sum(a) / sum(b) - 1) for a, b in pairs])

    def bits_per_byte(
        self,
        condition: str,
        domains: Sequence[str],
        first: int,
        stop: int,
        model: str | None = None,
    ) -> np.ndarray:
        """Bits of each document for each of its bytes, of the documents whose bytes are known.

        Args:
            condition: of the main table.
            domains: whose documents.
            first: block that is counted first.
            stop: block before which the count ends.
            model: that was measured.

        Returns:
            `[documents]`.
        """
        nats: Nats = self.row(condition, model)["nats"]
        sizes: Nats = self.row("bytes")["bytes"]
        pairs = [
            (own[first:stop], size[first:stop])
            for domain in domains
            for own, size in zip(nats.get(domain, []), sizes.get(domain, []), strict=False)
        ]
        return np.array([sum(own) / math.log(2) / sum(size) for own, size in pairs])


def show(values: Any, digits: int = 2) -> str:
    """Mean and t interval of changes, or what there is of it."""
    if len(values) < 2:
        return f"{values[0]:+.{digits}f}" if len(values) else "-"
    return t_interval(values).show(digits, sign=True)
