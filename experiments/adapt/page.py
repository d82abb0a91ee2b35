"""Draws the results page of the adaptation study from its rows.

python -m experiments.adapt.page [--results FILE] [--out FILE]
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adapt import prose
from experiments.adapt.data import BLOCK, HERE, RESULTS
from experiments.adapt.domains import SEEN, UNSEEN, VALIDATION
from experiments.adapt.extra import LORA_RANK
from experiments.adapt.measure import change
from experiments.adapt.parts import EQUAL, MOST_WORSE
from experiments.adapt.scores import Nats, Study, largest, show
from experiments.adapt.verdicts import REFERENCE, differences, goals
from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import show_p, table
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.statistics import t_interval


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adapt.page", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.results])
    rows = read_rows(options.results)
    if not rows:
        raise InputError(f"{options.results} has no rows: run experiments.adapt.study first")
    write_page(options.out, page(largest(rows)))


def page(rows: Sequence[Row]) -> str:
    """The whole page, from the rows that `largest` returns."""
    study = Study(rows)
    parts = [prose.HEAD.format(tokens=study.tokens)]
    if study.has("frozen"):
        parts += [goals(study), _missing(study), _domains(study)]
    if study.has("frozen") and study.has("chosen"):
        parts += [_table(study), _by_domain(study), _positions(study), _differences(study)]
        parts += [_scale(study), _equal(study)]
    parts += [_lora(study), _recall(study), _long(study), _time(study), _settings(study)]
    parts += [_validation(study), _devices(study)]
    return "\n".join(part for part in parts if part)


def _missing(study: Study) -> str:
    """What the study measures and these rows do not have."""
    there = {row["part"] for row in study.rows}
    there |= {row["name"]["condition"] for row in study.part("test")}
    there |= {row["name"]["device"] for row in study.part("time")}
    there |= {f"model {row['name']['model']}" for row in study.part("test")}
    absent = [f"- {said}" for said, needed in prose.MISSING.items() if not {*needed} <= there]
    return prose.ABSENT + "\n" + "\n".join(absent) + "\n" if absent else ""


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
        "numbers",
        "documents",
        "unseen, last quarter",
        "unseen, all",
        "seen, last quarter",
        "seen, all",
    ]
    lines = []
    for name in study.conditions()[1:]:  # the first is the frozen model
        cells = [
            show(study.changes(name, domains, part))
            for domains in ([*UNSEEN], SEEN)
            for part in ("last", "all")
        ]
        row = study.row(name)
        most = max(map(len, row["nats"].values()))
        about = [prose.CONDITIONS.get(name, ""), row.get("numbers", "-"), most]
        lines.append([f"`{name}`", *about, *cells])
    return prose.TABLE + table(head, lines)


def _by_domain(study: Study) -> str:
    names = [n for n in ("chosen", "trained", "trained, start") if study.has(n)]
    lines = []
    for domain in study.row("frozen")["nats"]:
        part = "all" if domain in SEEN else "last"
        cells = [show(study.changes(name, [domain], part)) for name in names]
        lines.append([domain, "last quarter" if part == "last" else "all", *cells])
    return "\n## By domain\n\nChange in percent.\n" + table(["domain", "of", *names], lines)


def _positions(study: Study) -> str:
    blocks = study.tokens // BLOCK
    edges = [e for e in (0, 1, 2, 4, 8, 12) if e < blocks] + [blocks]
    names = [n for n in ("chosen", "trained", "cache mixture") if study.has(n)]
    lines = []
    for first, stop in pairwise(edges):
        cells = []
        for name in names:
            for domains in ([*UNSEEN], SEEN):
                cells.append(show(study.blocks(name, domains, first, stop)))
        lines.append([f"{first * BLOCK:,} to {stop * BLOCK:,}", *cells])
    head = ["tokens", *(f"{name}, {kind}" for name in names for kind in ("unseen", "seen"))]
    return "\n## By position\n\nChange in percent.\n" + table(head, lines)


def _differences(study: Study) -> str:
    lines = [
        [f"`{name}`", prose.CONDITIONS[name], len(values), show(values), show_p(p)]
        for name, values, p in differences(study)
    ]
    if not lines:
        return ""
    said = prose.DIFFERENCES.format(reference=REFERENCE, number=len(lines))
    return said + table(["control", "what", "documents", "difference", "p (Holm)"], lines)


def _bits_per_byte(nats: Nats, sizes: Nats, domain: str, count: int | None = None) -> float:
    pairs = zip(nats[domain][:count], sizes[domain], strict=False)
    return float(np.mean([sum(n) / math.log(2) / sum(s[: len(n)]) for n, s in pairs]))


def _scale(study: Study) -> str:
    if not study.has("bytes"):
        return ""
    found = study.row("bytes")
    names = [n for n in ("frozen", "chosen", "trained", "3 steps", "cache mixture") if study.has(n)]
    lines = []
    for domain, count in study.counts(names).items():
        count = min(count, len(found["bytes"][domain]))
        cells = [
            f"{_bits_per_byte(study.row(n)['nats'], found['bytes'], domain, count):.3f}"
            for n in names
        ]
        for packer in ("xz", "ppmd"):
            packed = found["packed"][packer][domain][:count]
            sizes = zip(packed, found["bytes"][domain][:count], strict=True)
            cells.append(f"{np.mean([8 * p[1] / sum(s) for p, s in sizes]):.3f}")
        lines.append([domain, count, *cells])
    head = ["domain", "documents", *names, "xz", "PPMd"]
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
            show(study.changes(adapted, domains, part, model))
            for domains, part in (([*UNSEEN], "last"), ([*UNSEEN], "all"), (SEEN, "all"))
        ]
        lines.append([f"`{model}`", adapted, *cells, bits])
    if not any(study.has("norm", model) for model in EQUAL):
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
        lines.append([domain, *map(show, found), show(found[1] - found[0])])
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
            cells += [show(np.array(found)), len(found)]
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
        ratios = [row["ratios"][key] for key in ("prefill", "in chunks")]
        lines.append(
            [name["model"], name["device"], name["rows"], f"{name['tokens']:,}", name["chunk"]]
            + [f"{times[key]:.3f}" for key in ("prefill", "in chunks", "adapt")]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{row['peak'] / 2**30:.1f}" if row["peak"] else "-"]
        )
    head = ["model", "device", "rows", "tokens", "chunk", "prefill", "in chunks", "adapt"]
    head += ["adapt / prefill", "adapt / in chunks", "GiB"]
    return prose.TIME + table(head, lines)


def _settings(study: Study) -> str:
    lines = []
    for part in ("select", "steps"):
        for row in study.part(part):
            config = row.get("config", {})
            shown = _step_sizes(config) or f"{row.get('share', row.get('size', ''))}"
            name = row["name"]
            figures = [f"{row['figure']:+.2f}", "-"] if part == "select" else ["-", "-"]
            if "worst" in row:
                figures[1] = f"{row['worst']:+.2f}"
            lines.append([name["model"], name["kind"], config.get("chunk", "-"), shown, *figures])
    if not lines:
        return ""
    head = ["model", "settings", "chunk", "step sizes", "unseen, last quarter", "worst seen, all"]
    return prose.SETTINGS.format(limit=MOST_WORSE) + table(head, lines)


def _step_sizes(config: Mapping[str, Any]) -> str:
    """The step sizes of each group, the smallest and the largest where they differ."""
    sizes: dict[str, list[float]] = {}
    for name, size in config.get("lr", {}).items():
        sizes.setdefault(name.partition("/")[0], []).append(size)
    return ", ".join(
        f"{group} {' to '.join(f'{size:g}' for size in sorted({min(x), max(x)}))}"
        for group, x in sizes.items()
    )


def _validation(study: Study) -> str:
    """Every setting that was tried for `tiny` on validation documents, by kind of domain."""
    rows = {
        json.dumps(row["name"]["config"]): row
        for row in study.part("valid")
        if row["name"]["model"] == "tiny"
    }
    frozen = rows.pop('"frozen"', None)
    domains = (*SEEN, *VALIDATION)
    if frozen is None or len(frozen["nats"]) % len(domains):
        return ""
    count = len(frozen["nats"]) // len(domains)  # every domain has as many
    lines = []
    for row in rows.values():
        if len(row["nats"]) != len(frozen["nats"]):
            continue
        config = row["name"]["config"]
        cells = []
        for domain in (*VALIDATION, *SEEN):
            first = domains.index(domain) * count
            part = "all" if domain in SEEN else "last"
            own, base = (each["nats"][first : first + count] for each in (row, frozen))
            cells.append(show(np.array(change(own, base, part))))
        lines.append([config["chunk"], _step_sizes(config), *cells])
    head = ["chunk", "step sizes", *VALIDATION, *SEEN]
    return prose.VALIDATION.format(count=count) + table(head, lines)


def _devices(study: Study) -> str:
    """On what each part was measured."""
    found: dict[tuple[str, str, str], int] = {}
    for row in study.rows:
        about = row["environment"]
        key = (row["part"], about["device"], about["versions"]["torch"])
        found[key] = found.get(key, 0) + 1
    lines = [[f"`{part}`", device, torch, rows] for (part, device, torch), rows in found.items()]
    return prose.DEVICES + table(["part", "device", "torch", "rows"], lines)


if __name__ == "__main__":
    script(main)
