"""Draws the results page of the adaptation study from its rows.

python -m experiments.adapt.page [--results FILE] [--out FILE]
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adapt import prose
from experiments.adapt.conditions import MOST_WORSE
from experiments.adapt.data import BLOCK, HERE, RESULTS
from experiments.adapt.domains import SEEN, UNSEEN, VALIDATION
from experiments.adapt.extra import LORA_RANK
from experiments.adapt.measure import change
from experiments.adapt.parts import EQUAL
from experiments.adapt.scores import Nats, Study, largest, show
from experiments.adapt.verdicts import (
    REFERENCE,
    SIGNIFICANT,
    differences,
    goals,
    model_differences,
    quarters,
)
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
    on_gpu = [row["name"] for row in study.part("time") if row["name"]["device"] == "cuda"]
    there |= {key for name in on_gpu for key in ("cuda", f"{name['model']}, rows {name['rows']}")}
    there |= {f"model {row['name']['model']}" for row in study.part("test")}
    absent = [f"- {part}" for part, needed in prose.MISSING.items() if not {*needed} <= there]
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
        numbers = f"{row['numbers']:,}" if "numbers" in row else "-"
        lines.append([f"`{name}`", numbers, most, *cells])
    names = [name for name in study.conditions()[1:] if name in prose.CONDITIONS]
    legend = "".join(f"- `{name}`: {prose.CONDITIONS[name]}\n" for name in names)
    return prose.TABLE + "\n" + legend + table(head, lines)


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
    found = differences(study)
    if not found:
        return ""
    lines = [
        [f"`{x.name}`", len(x.values), show(x.values), show_p(x.p), show(x.means), show(x.seen)]
        for x in found
    ]
    section = prose.DIFFERENCES.format(reference=REFERENCE, number=len(lines))
    head = ["control", "documents", "unseen, last quarter", "p (Holm)", "over domains", "seen, all"]
    beaten = [each for each in found if each.p < SIGNIFICANT and each.values.mean() < 0]
    listed = {
        f"`{REFERENCE}` does not beat": [each for each in found if each not in beaten],
        "Ahead over documents, but the interval over domains includes zero": [
            each for each in beaten if not t_interval(each.means).excludes_zero
        ],
    }
    ends = [
        f"\n{text}: {', '.join(f'`{each.name}`' for each in names)}.\n"
        for text, names in listed.items()
        if names
    ]
    return section + table(head, lines) + "".join(ends)


def _scale(study: Study) -> str:
    if not study.has("bytes"):
        return ""
    found = study.row("bytes")
    names = [n for n in ("frozen", "chosen", "trained", "3 steps", "cache mixture") if study.has(n)]
    lines = []
    for domain, count in study.counts(names).items():
        count = min(count, len(found["bytes"][domain]))
        bits = [
            study.bits_per_byte(name, [domain], 0, study.count)[:count].mean() for name in names
        ]
        for packer in ("xz", "ppmd"):
            packed = found["packed"][packer][domain][:count]
            sizes = zip(packed, found["bytes"][domain][:count], strict=True)
            bits.append(np.mean([8 * p[1] / sum(s) for p, s in sizes]))
        lines.append([domain, count, *(f"{each:.3f}" for each in bits)])
    head = ["domain", "documents", *names, "xz", "PPMd"]
    return prose.SCALE.format(tokens=study.tokens) + table(head, lines)


def _equal(study: Study) -> str:
    if not any(study.has("norm", model) for model in EQUAL):
        return ""
    lines, levels = [], []
    for model in ("tiny", *EQUAL, "tiny-joint"):
        adapted = "trained" if model == "tiny-joint" else "norm"
        if not study.has(adapted, model):
            continue
        cells = [
            show(study.changes(adapted, domains, part, model))
            for domains in ([*UNSEEN], SEEN)
            for part in ("last", "all")
        ]
        lines.append([f"`{model}`", adapted, *cells])
        if study.has("bytes"):
            bits = [
                f"{study.bits_per_byte(condition, domains, *blocks, model).mean():.3f}"
                for domains in ([*UNSEEN], SEEN)
                for blocks in quarters(study).values()
                for condition in ("frozen", adapted)
            ]
            pairs = zip(bits[::2], bits[1::2], strict=True)
            levels.append([f"`{model}`", *map(" to ".join, pairs)])
    head = ["unseen, last quarter", "unseen, all", "seen, last quarter", "seen, all"]
    text = prose.EQUAL.format(text="the text of `experiments.adapt.prepare`")
    text += table(["model", "adapts", *head], lines)
    if levels:
        head = [f"{kind}, {quarter}" for kind in ("unseen", "seen") for quarter in quarters(study)]
        text += prose.LEVELS + table(["model", *head], levels)
    compared = model_differences(study)
    if compared:
        lines = [
            [f"`{x.name}`", x.kind, len(x.values), show(x.values, 3), show_p(x.p), show(x.means, 3)]
            for x in compared
        ]
        head = ["other model", "what", "documents", "difference", "p (Holm)", "over domains"]
        text += prose.MODELS.format(number=len(compared)) + table(head, lines)
    return text + _equal_steps(study)


def _equal_steps(study: Study) -> str:
    """The gain of every equal model by step size, on validation documents that were not seen."""
    gains: dict[float, dict[str, str]] = {}
    for model in EQUAL:
        frozen, rows = _valid_rows(study, model)
        if frozen is None:
            continue
        for row in rows:
            count = len(frozen["nats"]) // (len(SEEN) + len(VALIDATION))
            first = len(SEEN) * count
            found = change(row["nats"][first:], frozen["nats"][first:], "last")
            size = row["name"]["config"]["lr"]["norm"]
            gains.setdefault(size, {})[model] = f"{np.mean(found):+.2f}"
    lines = [[f"{size:g}", *(by.get(m, "-") for m in EQUAL)] for size, by in sorted(gains.items())]
    head = ["step size", *(f"`{model}`" for model in EQUAL)]
    return prose.EQUAL_STEPS + table(head, lines) if lines else ""


def _valid_rows(study: Study, model: str) -> tuple[Row | None, list[Row]]:
    """Rows of a model on validation documents: frozen, and under every setting. There is none of
    the frozen model if its domains do not have as many documents each."""
    rows = {
        json.dumps(row["name"]["config"]): row
        for row in study.part("valid")
        if row["name"]["model"] == model
    }
    frozen = rows.pop('"frozen"', None)
    if frozen is None or len(frozen["nats"]) % (len(SEEN) + len(VALIDATION)):
        return None, []
    return frozen, [row for row in rows.values() if len(row["nats"]) == len(frozen["nats"])]


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
    section = prose.LORA.format(
        rank=LORA_RANK, numbers=rows[0]["numbers"], count=len(rows[0]["nats"])
    )
    return section + table(["domain", "LoRA", "`chosen`", "`chosen` minus LoRA"], lines)


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
            [name["model"], name["device"], name["dtype"], name["rows"], f"{name['tokens']:,}"]
            + [name["chunk"]]
            + [f"{times[key]:.3f}" for key in ("prefill", "in chunks", "adapt")]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{row['peak'] / 2**30:.1f}" if row["peak"] else "-"]
        )
    head = ["model", "device", "dtype", "rows", "tokens", "chunk", "prefill", "in chunks", "adapt"]
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
    """Every setting that was tried on validation documents, by kind of domain."""
    domains = (*SEEN, *VALIDATION)
    lines, count = [], 0
    for model in ("tiny", *EQUAL):
        frozen, rows = _valid_rows(study, model)
        if frozen is None:
            continue
        count = len(frozen["nats"]) // len(domains)  # every domain has as many
        for row in rows:
            config = row["name"]["config"]
            cells = []
            for domain in (*VALIDATION, *SEEN):
                first = domains.index(domain) * count
                part = "all" if domain in SEEN else "last"
                own, base = (each["nats"][first : first + count] for each in (row, frozen))
                cells.append(f"{np.mean(change(own, base, part)):+.2f}")
            lines.append([f"`{model}`", config["chunk"], _step_sizes(config), *cells])
    if not lines:
        return ""
    head = ["model", "chunk", "step sizes", *VALIDATION, *SEEN]
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
