"""Writes RESULTS.md of the language study from its rows.

python -m experiments.language.page [--results FILE] [--out FILE]
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import table
from experiments.language import prose
from experiments.language.data import CANDIDATES, HERE, RESULTS
from experiments.language.figures import draw_gates
from experiments.language.probe import DOCUMENTS
from experiments.language.scores import (
    GREEK,
    Results,
    context_scores,
    domains_of,
    has_text,
    position_ranges,
    probe,
    recall,
    show_runs,
    text,
)
from experiments.language.variants import (
    ABLATIONS,
    DESCRIPTIONS,
    DOMAINS,
    REFERENCE,
    SETTINGS,
    VARIANTS,
)
from experiments.language.verdicts import show_tasks, show_verdicts
from nirvana.errors import script
from nirvana.files import check_outputs

DRAWN = (REFERENCE, "nirvana-memory")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.language.page", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--candidates", type=Path, default=CANDIDATES)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(arguments)
    images = options.out.parent / "images"
    read = [options.results, options.candidates]
    check_outputs({"--out": options.out, "images beside --out,": images}, read)
    results = Results(read_rows(options.results))
    write_page(options.out, page(results, read_rows(options.candidates), images))
    print(f"{len(results.rows)} runs, {len(results.missing())} missing")


def page(results: Results, candidates: Sequence[Row], images: Path) -> str:
    """The whole page; pictures are drawn into the folder `images`."""
    parts = [prose.HEAD]
    if results.rows:
        parts += [show_verdicts(results), _greek(results), _setup(results)]
        for setting in SETTINGS:
            if results.variants(setting):
                parts += [_texts(results, setting), _positions(results, setting)]
            if results.benchmarked(setting):
                parts += [_recall(results, setting), show_tasks(results, setting)]
        parts += [_ablations(results), _cost(results), _inside(results, images)]
    parts += [_packaged(candidates), _record(results)]
    return "\n".join(part for part in parts if part)


def _greek(results: Results) -> str:
    runs = results.runs(REFERENCE, "A")
    domain, place = GREEK
    scores = [context_scores(row, domain) for row in runs]
    if not scores or len(scores[0].values) <= place:
        return ""
    others = [context_scores(row, domain, greek=False).figure for row in runs]
    own = [each.values[place] / each.weights[place] for each in scores]
    section = prose.GREEK.format(bits=np.mean(own), others=np.mean(others))
    head = ["model"]
    for setting in SETTINGS:
        head += [f"{setting}, all pieces", f"{setting}, without Greek"]
    rows = []
    for variant in VARIANTS:
        cells = [
            show_runs(results.figures(variant, setting, [text(domain, greek=greek)]).values())
            for setting in SETTINGS
            for greek in (True, False)
        ]
        if results.runs(variant, "A"):
            rows.append([f"`{variant}`", *cells])
    return section + "\nBits per byte of the novels.\n" + table(head, rows)


def _setup(results: Results) -> str:
    first = next((x for x in results.rows if x["variant"] == REFERENCE), results.rows[0])
    budget = first["budget"]
    base = first["parameters"]
    section = prose.SETUP.format(
        **{key: budget[key] for key in ("size", "tokens", "rows", "lr", "warmup")},
        model=first["model"],
        steps=first["steps"],
        context=budget["context_length"],
    )
    rows = []
    for variant in VARIANTS:
        runs = [x for setting in SETTINGS for x in results.runs(variant, setting)]
        if runs:
            number, width = runs[0]["parameters"], runs[0]["model"]["intermediate_size"]
            counts = ", ".join(f"{s}: {len(results.runs(variant, s))}" for s in SETTINGS)
            about = [_describe(variant), f"{number:,}", f"{number / base - 1:+.1%}", width, counts]
            rows.append([f"`{variant}`", *about])
    head = ["model", "description", "parameters", f"vs {first['variant']}", "SwiGLU", "runs"]
    return section + table(head, rows)


def _describe(variant: str) -> str:
    settings = ", ".join(f"`{name} = {value}`" for name, value in VARIANTS[variant].items())
    return DESCRIPTIONS.get(variant, settings)


def _texts(results: Results, setting: str) -> str:
    """Bits per byte, and their differences from the reference, of variants of several runs."""
    variants = [v for v in results.variants(setting) if v not in _single(results, setting)]
    means = domains_of(setting)
    sets = [[text(domain)] for domain in DOMAINS]
    sets += [[text(domain) for domain in domains] for domains in means.values()]
    head = ["model", "runs", *DOMAINS, *(f"mean, {kind}" for kind in means)]
    rows, differences = [], []
    for variant in variants:
        cells = [show_runs(results.figures(variant, setting, x).values()) for x in sets]
        rows.append([f"`{variant}`", len(results.runs(variant, setting)), *cells])
        if variant != REFERENCE:
            found = [results.differences(variant, REFERENCE, setting, x) for x in sets]
            cells = [show_runs(each, 4, sign=True) for each in found]
            differences.append([f"`{variant}`", len(found[0]), *cells])
    section = f"\n## Setting {setting}: bits per byte\n" + table(head, rows)
    if differences:
        section += f"\nMinus `{REFERENCE}`, seed by seed, without correction (exploratory).\n"
        section += table(head, differences)
    return section


def _single(results: Results, setting: str) -> list[str]:
    """Ablations with one run, which have a table of their own."""
    found = results.variants(setting, ABLATIONS)
    return [variant for variant in found if len(results.runs(variant, setting)) == 1]


def _positions(results: Results, setting: str) -> str:
    first = results.rows[0]
    columns, head = [], ["model"]
    for ranges, start, stop in position_ranges(first):
        domains = [d for d in DOMAINS if has_text(first, d, ranges)]
        if domains:
            columns.append([text(domain, ranges=ranges) for domain in domains])
            longer = ", beyond the trained length" * (stop > first["budget"]["context_length"])
            fewer = "" if len(domains) == len(DOMAINS) else f", {len(domains)} domains"
            head.append(f"tokens {start:,} to {stop - 1:,}{longer}{fewer}")
    rows = [
        [
            f"`{variant}`",
            *(show_runs(results.figures(variant, setting, x).values()) for x in columns),
        ]
        for variant in results.variants(setting)
        if variant not in _single(results, setting)
    ]
    return prose.POSITIONS.format(setting=setting) + table(head, rows)


def _recall(results: Results, setting: str) -> str:
    variants = results.benchmarked(setting)
    names = list(results.runs(variants[0], setting)[0]["recall"])
    rows = []
    for name in names:
        found = [results.figures(v, setting, [recall(name, "bits")]).values() for v in variants]
        rows.append([name.replace("@", ", "), *(show_runs(each, 1) for each in found)])
    head = ["task, tokens", *(f"`{variant}`" for variant in variants)]
    return prose.RECALL.format(setting=setting) + table(head, rows)


def _ablations(results: Results) -> str:
    section = ""
    for setting in SETTINGS:
        kinds = domains_of(setting)
        rows = []
        for variant in _single(results, setting):
            cells = [
                results.differences(variant, REFERENCE, setting, [text(d, split) for d in domains])
                for split in ("valid", "test")
                for domains in kinds.values()
            ]
            if len(cells[0]):
                shown = [show_runs(each, 4, sign=True) for each in cells]
                rows.append([f"`{variant}`", _describe(variant), *shown])
        if rows:
            head = [f"{split}, {kind}" for split in ("valid", "test") for kind in kinds]
            section += f"\nSetting {setting}.\n" + table(["variant", "difference", *head], rows)
    return prose.ABLATIONS.format(reference=REFERENCE) + section if section else ""


def _cost(results: Results) -> str:
    rows = []
    for variant in VARIANTS:
        runs = results.timed(variant)
        if runs:
            rates, memory = ([x[key] for x in runs] for key in ("tokens_per_second", "memory_gib"))
            rows.append(
                [
                    f"`{variant}`",
                    len(runs),
                    f"{median(rates):,.0f} ({min(rates):,} to {max(rates):,})",
                    f"{median(memory):.1f} ({min(memory):.1f} to {max(memory):.1f})",
                    ", ".join(sorted({str(x["environment"]["beside"]) for x in runs})),
                    ", ".join(sorted({x["environment"]["device"] for x in runs})),
                ]
            )
    head = ["model", "runs", "tokens/s", "peak memory, GiB", "processes on the device", "device"]
    return prose.COST + table(head, rows)


def _packaged(candidates: Sequence[Row]) -> str:
    """Each candidate and the packaged model, single runs, domain by domain."""
    parts = [prose.CANDIDATES] if candidates else []
    for row in candidates:
        totals = {
            name: [sum(row["domains"][d][name]) / sum(row["domains"][d]["bytes"]) for d in DOMAINS]
            for name in ("packaged", "candidate")
        }
        rows = [
            [domain, f"{packaged:.3f}", f"{candidate:.3f}", f"{candidate - packaged:+.4f}"]
            for domain, packaged, candidate in zip(
                (*DOMAINS, "mean"),
                *([*figures, np.mean(figures)] for figures in totals.values()),
                strict=True,
            )
        ]
        recipe = ", ".join(f"`{name} = {value}`" for name, value in row["model"].items())
        tokens = f"{row['tokens'] / 1e6:.0f} M tokens"
        parts.append(f"\n{recipe}; {tokens}, seed {row['seed']}, commit {row['commit']}:\n")
        parts.append(table(["domain", "packaged", "candidate", "difference"], rows))
    return "".join(parts)


def _inside(results: Results, images: Path) -> str:
    section = "\n## Gates and fast parameters\n"
    rows = []
    for setting in SETTINGS:
        for variant in results.variants(setting):
            runs = [row for row in results.runs(variant, setting) if "trigger" in row]
            if not runs:
                continue
            cells = [
                show_runs(results.figures(variant, setting, [probe(name)]).values(), 2)
                for name in ("fast", "gates", "embedded")
            ]
            owners = [each[0] // DOCUMENTS for each in runs[0]["trigger"]["probe"]["fast"]]
            most = max(owners.count(domain) for domain in set(owners)) / len(owners)
            rows.append([f"`{variant}`", setting, len(runs), *cells, f"{most:.2f}"])
            if variant in DRAWN:
                name, title = f"{variant}-{setting}.png", f"{variant}, setting {setting}"
                draw_gates(runs[0]["trigger"], images / name, title)
                section += f"\n![{title}](images/{name})\n"
    if not rows:
        return section + "\nNo run with a Trigger yet.\n"
    head = ["model", "setting", "runs", "fast", "gates", "embedded", "constant"]
    return section + prose.INSIDE + table(head, rows)


def _record(results: Results) -> str:
    section = "\n## Record\n\n"
    if results.rows:
        environments = [row["environment"] for row in results.rows]
        for key in ("device", "commit", "python"):
            section += f"- {key}: {', '.join(sorted({str(each[key]) for each in environments}))}\n"
        versions = {f"{k} {v}" for each in environments for k, v in each["versions"].items() if v}
        section += f"- versions: {', '.join(sorted(versions))}\n"
        skipped = sum(row["skipped"] for row in results.rows)
        section += f"- steps skipped because loss or gradient was not finite: {skipped}\n"
        losses = [row["losses"][-1][1] for row in results.rows]
        last = [loss for loss in losses if loss is not None]
        section += f"- last training losses: {min(last):.3f} to {max(last):.3f} nats a token\n"
    if results.left_out:
        section += f"- runs of another budget, not shown: {results.left_out}\n"
    missing = results.missing()
    return section + f"- missing runs (model/setting/seed): {', '.join(missing) or 'none'}\n"


if __name__ == "__main__":
    script(main)
