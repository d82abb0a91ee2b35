"""Draws the results page of the adaptation study from its rows.

python -m experiments.adapt.page [--results FILE] [--out FILE]
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adapt import prose
from experiments.adapt.data import BLOCK, HERE, RESULTS
from experiments.adapt.domains import SEEN, UNSEEN
from experiments.adapt.extra import LORA_RANK
from experiments.adapt.measure import change
from experiments.adapt.parts import EQUAL
from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import show_p, table
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.statistics import holm, t_interval, t_test

Nats = Mapping[str, Sequence[Sequence[float]]]
"""Domain -> nats of each document by block."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.page", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.results])
    rows = read_rows(options.results)
    if not rows:
        raise InputError(f"{options.results} has no rows: run experiments.adapt.study first")
    # The largest scale is the study; smaller ones are tests of the program.
    largest = max(
        rows, key=lambda row: (row["scale"]["documents"] or 10**9, row["scale"]["tokens"])
    )
    write_page(options.out, page([row for row in rows if row["scale"] == largest["scale"]]))


def page(rows: Sequence[Row]) -> str:
    """The whole page, from rows of one scale."""
    study = Study(rows)
    parts = [prose.HEAD.format(tokens=study.tokens)]
    if study.has("frozen"):
        parts += [_domains(study), _table(study), _by_domain(study), _positions(study)]
        parts += [_differences(study), _scale(study), _equal(study)]
    parts += [_lora(study), _recall(study), _long(study), _time(study), _settings(study)]
    return "\n".join(part for part in parts if part)


class Study:
    """The rows of a study, by what they are.

    Args:
        rows: of one scale.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.tokens: int = rows[0]["scale"]["tokens"]

    def part(self, part: str) -> list[Row]:
        """The rows of a part."""
        return [row for row in self.rows if row["part"] == part]

    def row(self, condition: str, model: str = "tiny") -> Row:
        """The row of a condition of the main table."""
        name = {"model": model, "condition": condition}
        return next(row for row in self.part("test") if row["name"] == name)

    def has(self, condition: str, model: str = "tiny") -> bool:
        """Whether a condition was measured."""
        name = {"model": model, "condition": condition}
        return any(row["name"] == name for row in self.part("test"))

    def conditions(self) -> list[str]:
        """The conditions of `tiny` that are compared with the frozen model, in their order."""
        names = [
            row["name"]["condition"] for row in self.part("test") if row["name"]["model"] == "tiny"
        ]
        known = [name for name in prose.CONDITIONS if name in names]
        return [*known, *(n for n in names if n.startswith("chunk"))]

    def changes(
        self, condition: str, domains: Sequence[str], part: str, model: str = "tiny"
    ) -> np.ndarray:
        """Change of each document's bits in percent, `[documents]`."""
        own: Nats = self.row(condition, model)["nats"]
        frozen: Nats = self.row("frozen", model)["nats"]
        found: list[float] = []
        for domain in domains:
            if domain in own:
                found += change(own[domain], frozen[domain][: len(own[domain])], part)
        return np.array(found)

    @property
    def reference(self) -> str:
        """The condition that is compared with the controls."""
        return "chosen"


def _show(values: np.ndarray, digits: int = 2) -> str:
    if len(values) < 2:
        return f"{values.mean():+.{digits}f}" if len(values) else "-"
    return t_interval(values).show(digits, sign=True)


def _domains(study: Study) -> str:
    frozen: Nats = study.row("frozen")["nats"]
    lines = []
    for domain in frozen:
        about, licence = "test file of the training text", "see tiny's card"
        if domain in UNSEEN:
            source = UNSEEN[domain]
            about, licence = f"{source.about} (`{source.package}`)", source.licence
        kind = "seen" if domain in SEEN else "unseen"
        lines.append([domain, kind, len(frozen[domain]), about, licence])
    return prose.DOMAINS + table(["domain", "kind", "documents", "what", "licence"], lines)


def _table(study: Study) -> str:
    head = [
        "condition",
        "what",
        "unseen, last quarter",
        "unseen, all",
        "seen, last quarter",
        "seen, all",
    ]
    lines = []
    for name in study.conditions():
        cells = [
            _show(study.changes(name, domains, part))
            for domains in ([*UNSEEN], SEEN)
            for part in ("last", "all")
        ]
        if name != "frozen":
            lines.append([f"`{name}`", prose.CONDITIONS.get(name, ""), *cells])
    return prose.TABLE + table(head, lines)


def _by_domain(study: Study) -> str:
    names = [n for n in ("chosen", "trained", "trained, start") if study.has(n)]
    lines = []
    for domain in study.row("frozen")["nats"]:
        part = "all" if domain in SEEN else "last"
        cells = [_show(study.changes(name, [domain], part)) for name in names]
        lines.append([domain, "last quarter" if part == "last" else "all", *cells])
    return "\n## By domain\n\nChange in percent.\n" + table(["domain", "of", *names], lines)


def _positions(study: Study) -> str:
    blocks = study.tokens // BLOCK
    edges = [e for e in (0, 1, 2, 4, 8, 16) if e < blocks] + [blocks]
    names = [n for n in ("chosen", "trained", "cache mixture") if study.has(n)]
    lines = []
    for first, stop in pairwise(edges):
        cells = []
        for name in names:
            own, frozen = study.row(name)["nats"], study.row("frozen")["nats"]
            for domains in ([*UNSEEN], SEEN):
                found = [
                    100 * (sum(a[first:stop]) / sum(b[first:stop]) - 1)
                    for domain in domains
                    for a, b in zip(own.get(domain, []), frozen.get(domain, []), strict=True)
                ]
                cells.append(_show(np.array(found)))
        lines.append([f"{first * BLOCK:,} to {stop * BLOCK:,}", *cells])
    head = ["tokens", *(f"{name}, {kind}" for name in names for kind in ("unseen", "seen"))]
    return "\n## By position\n\nChange in percent.\n" + table(head, lines)


def _differences(study: Study) -> str:
    reference = study.reference
    controls = [name for name in prose.CONTROLS if study.has(name)]
    if not controls or not study.has(reference):
        return ""
    own = study.changes(reference, [*UNSEEN], "last")
    found = [own - study.changes(name, [*UNSEEN], "last") for name in controls]
    p_values = holm([t_test(each) for each in found])
    lines = [
        [f"`{name}`", prose.CONDITIONS[name], _show(each), show_p(p)]
        for name, each, p in zip(controls, found, p_values, strict=True)
    ]
    said = prose.DIFFERENCES.format(reference=reference, number=len(controls))
    return said + table(["control", "what", "difference", "p (Holm)"], lines)


def _bits_per_byte(nats: Nats, sizes: Nats, domain: str) -> float:
    pairs = zip(nats[domain], sizes[domain], strict=False)
    return float(np.mean([sum(n) / math.log(2) / sum(s[: len(n)]) for n, s in pairs]))


def _scale(study: Study) -> str:
    if not study.has("bytes"):
        return ""
    found = study.row("bytes")
    names = [n for n in ("frozen", "chosen", "trained", "3 steps", "cache mixture") if study.has(n)]
    lines = []
    for domain in found["bytes"]:
        cells = [
            f"{_bits_per_byte(study.row(n)['nats'], found['bytes'], domain):.3f}" for n in names
        ]
        for packer in ("xz", "ppmd"):
            sizes = zip(found["packed"][packer][domain], found["bytes"][domain], strict=True)
            cells.append(f"{np.mean([8 * p[1] / sum(s) for p, s in sizes]):.3f}")
        lines.append([domain, *cells])
    head = ["domain", *names, "xz", "PPMd"]
    return prose.SCALE.format(tokens=study.tokens) + table(head, lines)


def _equal(study: Study) -> str:
    lines = []
    for model in ("tiny", *EQUAL, "tiny-joint"):
        adapted = "trained" if model == "tiny-joint" else "norm"
        if not study.has(adapted, model):
            continue
        bits = "-"
        if study.has("bytes"):
            sizes = study.row("bytes")["bytes"]
            pairs = [
                [
                    _bits_per_byte(study.row(c, model)["nats"], sizes, d)
                    for d in UNSEEN
                    if d in sizes
                ]
                for c in ("frozen", adapted)
            ]
            bits = " to ".join(f"{np.mean(each):.3f}" for each in pairs)
        cells = [
            _show(study.changes(adapted, domains, part, model))
            for domains, part in (([*UNSEEN], "last"), ([*UNSEEN], "all"), (SEEN, "all"))
        ]
        lines.append([f"`{model}`", adapted, *cells, bits])
    if not lines:
        return ""
    head = [
        "model",
        "adapts",
        "unseen, last quarter",
        "unseen, all",
        "seen, all",
        "bits per byte, unseen",
    ]
    return prose.EQUAL.format(text="the text of `experiments.adapt.prepare`") + table(head, lines)


def _lora(study: Study) -> str:
    rows = study.part("lora")
    if not rows or not study.has("chosen"):
        return ""
    lines = []
    for row in rows:
        domain, count = row["name"]["domain"], len(row["nats"])
        frozen = study.row("frozen")["nats"][domain][:count]
        own = study.row("chosen")["nats"][domain][:count]
        found = [np.array(change(nats, frozen, "last")) for nats in (row["nats"], own)]
        lines.append([domain, *map(_show, found), _show(found[1] - found[0])])
    said = prose.LORA.format(rank=LORA_RANK, numbers=rows[0]["numbers"], count=len(rows[0]["nats"]))
    return said + table(["domain", "LoRA", "`chosen`", "`chosen` minus LoRA"], lines)


def _recall(study: Study) -> str:
    rows = study.part("recall")
    if not rows:
        return ""
    tasks = list(dict.fromkeys(row["name"]["task"] for row in rows))
    conditions = list(dict.fromkeys(row["name"]["condition"] for row in rows))
    bits = {(row["name"]["task"], row["name"]["condition"]): row["bits"] for row in rows}
    lines = []
    for name in tasks:
        lines.append(
            [name]
            + [t_interval(bits[name, c]).show(2) if (name, c) in bits else "-" for c in conditions]
        )
    return prose.RECALL.format(chance=13.0) + table(["task", *conditions], lines)


def _long(study: Study) -> str:
    rows = {row["name"]["condition"]: row["nats"] for row in study.part("long")}
    if "frozen" not in rows:
        return ""
    most = max(len(each) for documents in rows["frozen"].values() for each in documents)
    edges = [4, 8, 16, 32, 64, 128]
    edges = [0, *(edge for edge in edges if edge < most), most]
    names = [name for name in rows if name != "frozen"]
    lines = []
    for first, stop in pairwise(edges):
        cells: list[Any] = []
        for name in names:
            found = [
                100 * (sum(a[first:stop]) / sum(b[first:stop]) - 1)
                for domain, documents in rows["frozen"].items()
                for a, b in zip(rows[name][domain], documents, strict=True)
                if len(b) >= stop or (len(b) > first and stop == most)
            ]
            cells += [_show(np.array(found)), len(found)]
        lines.append([f"{first * BLOCK:,} to {stop * BLOCK:,}", *cells])
    head = ["tokens"]
    for name in names:
        head += [name, "documents"]
    count = sum(map(len, rows["frozen"].values()))
    return prose.LONG.format(more=2 * study.tokens, count=count) + table(head, lines)


def _time(study: Study) -> str:
    rows = study.part("time")
    if not rows:
        return ""
    lines = []
    for row in rows:
        name, times = row["name"], row["times"]
        ratios = [times["adapt"] / times[key] for key in ("prefill", "in chunks")]
        lines.append(
            [name["model"], name["rows"], f"{name['tokens']:,}", name["chunk"]]
            + [f"{times[key]:.3f}" for key in ("prefill", "in chunks", "adapt")]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{row['peak'] / 2**30:.1f}"]
        )
    head = ["model", "rows", "tokens", "chunk", "prefill", "in chunks", "adapt"]
    head += ["adapt / prefill", "adapt / in chunks", "GiB"]
    return prose.TIME + table(head, lines)


def _settings(study: Study) -> str:
    lines = []
    for part in ("select", "steps"):
        for row in study.part(part):
            config = row.get("config", {})
            sizes = {}
            for name, size in config.get("lr", {}).items():
                sizes.setdefault(name.partition("/")[0], []).append(size)
            shown = ", ".join(f"{g} {min(x):g} to {max(x):g}" for g, x in sizes.items())
            shown = shown or f"{row.get('share', row.get('size', ''))}"
            name = row["name"]
            lines.append([name["model"], name["kind"], config.get("chunk", "-"), shown])
    if not lines:
        return ""
    head = ["model", "settings", "chunk", "step sizes"]
    return "\n## Settings, chosen on validation documents\n" + table(head, lines)


if __name__ == "__main__":
    script(main)
