"""Writes docs/evidence-language.md from the runs that there are.

python experiments/language/report.py [--results FILE] [--out FILE]
"""

import argparse
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import wording
from arms import ABLATIONS, ARMS, DESCRIPTIONS, DOMAINS, REFERENCE, SETTINGS
from bootstrap import RESAMPLES, Interval, Stratum, interval, minus
from common import CANDIDATES, RESULTS, read_results
from figures import draw_gates
from probe import DOCUMENTS
from results import Results, domains_of, has_text, probe, recall, task, text

from nirvana.errors import script
from nirvana.files import atomic_file, check_outputs

OUT = Path(__file__).parents[2] / "docs/evidence-language.md"
WITHOUT = "hybrid-input"  # the nearest model without Trigger


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the study's tables.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--candidates", type=Path, default=CANDIDATES)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    images = options.out.parent / "images"
    read = [options.results, options.candidates]
    check_outputs({"--out": options.out, "images beside --out,": images}, read)
    results = Results(read_results(options.results))
    candidates = read_results(options.candidates)
    written = document(results, candidates, images)
    with atomic_file(options.out) as file:
        file.write_text(written, encoding="utf-8")
    print(f"{options.out}: {len(results.lines)} runs, {len(results.missing())} missing")


def document(results: Results, candidates: Sequence[dict[str, Any]], images: Path) -> str:
    """The whole page; figures are drawn into the folder `images`."""
    parts = [wording.HEAD.format(resamples=RESAMPLES)]
    if results.lines:
        parts += [_setup(results), _verdict(results)]
        for setting in SETTINGS:
            if results.arms(setting):
                parts += [_texts(results, setting), _positions(results, setting)]
            if results.benchmarked(setting):
                parts += [_recall(results, setting), _tasks(results, setting)]
        parts += [_ablations(results), _cost(results), _inside(results, images)]
    parts += [_packaged(candidates), _missing(results)]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _setup(results: Results) -> str:
    first = next((x for x in results.lines if x["arm"] == REFERENCE), results.lines[0])
    budget = first["budget"]
    base = first["parameters"]
    said = wording.SETUP.format(
        **{key: budget[key] for key in ("size", "tokens", "rows", "lr", "warmup")},
        model=first["model"],
        steps=first["steps"],
        context=budget["context_length"],
    )
    rows = []
    for arm in ARMS:
        runs = [x for setting in SETTINGS for x in results.runs(arm, setting)]
        if runs:
            settings = ", ".join(f"{s}: {len(results.runs(arm, s))}" for s in SETTINGS)
            difference = f"{runs[0]['parameters'] / base - 1:+.1%}"
            width = runs[0]["model"]["intermediate_size"]
            what = DESCRIPTIONS.get(arm) or _settings(arm)
            rows.append(
                [f"`{arm}`", what, f"{runs[0]['parameters']:,}", difference, width, settings]
            )
    head = ["arm", "what", "parameters", f"than {first['arm']}", "SwiGLU", "runs"]
    return said + _table(head, rows)


def _settings(arm: str) -> str:
    return ", ".join(f"`{name} = {value}`" for name, value in ABLATIONS[arm].items())


def _verdict(results: Results) -> str:
    """What the intervals say of the Trigger, in words."""
    lines = ["\n## Does the Trigger help?\n"]
    for setting in SETTINGS:
        for kind, domains in domains_of(setting).items():
            for arm in results.arms(setting):
                few = arm != REFERENCE and len(results.runs(arm, setting)) < 3
                if few or ARMS[arm].keys() & {"gate", "branches"}:
                    continue  # seeds tell nothing of it, or it has no Trigger
                for than in (WITHOUT, "hybrid-constant", "gated-deltanet", "transformer"):
                    found = results.difference(arm, than, setting, [text(d) for d in domains])
                    if found is not None:
                        lines.append(
                            f"- {setting}, domains {kind}: `{arm}` minus `{than}` is "
                            f"{found.show(4, sign=True)} bits per byte: {_says(found)}."
                        )
    if len(lines) == 1:
        lines.append(f"Nothing to compare yet: no seed has both `{REFERENCE}` and a peer.")
    return "\n".join(lines) + "\n"


def _says(found: Interval) -> str:
    if found.high < 0:
        return "better"
    return "worse" if found.low > 0 else "no difference that the interval shows"


def _texts(results: Results, setting: str) -> str:
    arms = results.arms(setting)
    means = domains_of(setting)
    head = ["arm", "seeds", *DOMAINS, *(f"mean, {kind}" for kind in means)]
    sets = [[text(domain)] for domain in DOMAINS]
    sets += [[text(domain) for domain in domains] for domains in means.values()]
    rows = [
        [
            f"`{arm}`",
            len(results.runs(arm, setting)),
            *(results.figure(arm, setting, takes).show() for takes in sets),
        ]
        for arm in arms
    ]
    said = f"\n## Setting {setting}: bits per byte\n" + _table(head, rows)
    differences = []
    for arm in arms:
        found = [results.difference(arm, REFERENCE, setting, takes) for takes in sets]
        if arm != REFERENCE and found[0] is not None:
            differences.append(
                [f"`{arm}`", *(each.show(4, sign=True) for each in found if each is not None)]
            )
    if differences:
        head = ["arm", *DOMAINS, *(f"mean, {kind}" for kind in means)]
        said += f"\nMinus `{REFERENCE}`, seed by seed; below zero the arm is better.\n"
        said += _table(head, differences)
    return said


def _positions(results: Results, setting: str) -> str:
    first = results.lines[0]
    context, edges = first["budget"]["context_length"], first["edges"]
    columns, head = [], ["arm"]
    for place, (start, stop) in enumerate(pairwise(edges)):
        ranges = slice(place, place + 1)
        domains = [d for d in DOMAINS if has_text(first, d, ranges)]
        if domains:
            columns.append([text(domain, ranges=ranges) for domain in domains])
            beyond = ", longer than trained" if stop > context else ""
            short = "" if len(domains) == len(DOMAINS) else f", {len(domains)} domains"
            head.append(f"tokens {start:,} to {stop - 1:,}{beyond}{short}")
    rows = [
        [f"`{arm}`", *(results.figure(arm, setting, takes).show() for takes in columns)]
        for arm in results.arms(setting)
    ]
    return wording.POSITIONS.format(setting=setting) + _table(head, rows)


def _recall(results: Results, setting: str) -> str:
    arms = results.benchmarked(setting)
    names = list(results.runs(arms[0], setting)[0]["recall"])
    said = wording.RECALL.format(setting=setting)
    for what, digits in (("points", 2), ("bits", 1)):
        found = {
            name: [results.figure(arm, setting, [recall(name, what)]) for arm in arms]
            for name in names
        }
        rows = [
            [name.replace("@", ", "), *(each.show(digits) for each in figures)]
            for name, figures in found.items()
        ]
        if what == "bits":
            said += wording.BITS
        else:
            most = max(each.high for figures in found.values() for each in figures)
            if most < wording.NEXT_TO_NONE:
                said += wording.NO_RECALL.format(most=most)
                continue
        said += _table(["task, tokens", *(f"`{arm}`" for arm in arms)], rows)
    return said


def _tasks(results: Results, setting: str) -> str:
    arms = results.benchmarked(setting)
    names = results.runs(arms[0], setting)[0]["tasks"]
    rows = []
    above = 0
    for name, about in names.items():
        found = [results.figure(arm, setting, [task(name)]) for arm in arms]
        above += sum(each.low > about["chance"] > 0 for each in found)
        chance = f"{about['chance']:.3f}" if about["chance"] else "none"
        rows.append([name, chance, *(each.show(3) for each in found)])
    compared = len(arms) * sum(about["chance"] > 0 for about in names.values())
    said = wording.TASKS.format(setting=setting, above=above, compared=compared)
    return said + _table(["set", "chance", *(f"`{arm}`" for arm in arms)], rows)


def _ablations(results: Results) -> str:
    said = wording.ABLATIONS.format(reference=REFERENCE)
    for setting in SETTINGS:
        arms = results.arms(setting, [*ABLATIONS, WITHOUT, "nirvana-memory"])
        kinds = domains_of(setting)
        rows = []
        for arm in arms:
            cells = [
                results.difference(arm, REFERENCE, setting, [text(d, split) for d in domains])
                for split in ("valid", "test")
                for domains in kinds.values()
            ]
            if cells[0] is not None:
                what = DESCRIPTIONS.get(arm) or _settings(arm)
                rows.append([f"`{arm}`", what, *(x.show(4, sign=True) for x in cells if x)])
        if rows:
            head = [f"{split}, {kind}" for split in ("valid", "test") for kind in kinds]
            said += f"\nSetting {setting}.\n" + _table(["arm", "what", *head], rows)
    return said


def _cost(results: Results) -> str:
    rows = []
    for arm in ARMS:
        runs = results.timed(arm)
        if runs:
            rates, memory = ([x[key] for x in runs] for key in ("tokens_per_second", "memory_gib"))
            rows.append(
                [
                    f"`{arm}`",
                    len(runs),
                    f"{median(rates):,.0f} ({min(rates):,} to {max(rates):,})",
                    f"{median(memory):.1f} ({min(memory):.1f} to {max(memory):.1f})",
                    ", ".join(sorted({str(x["environment"]["beside"]) for x in runs})),
                    ", ".join(sorted({x["environment"]["device"] for x in runs})),
                ]
            )
    head = ["arm", "runs", "tokens/s", "peak memory, GiB", "processes on the device", "device"]
    return wording.COST + _table(head, rows)


def _packaged(candidates: Sequence[dict[str, Any]]) -> str:
    """Each candidate beside the packaged model, document by document."""
    parts = [wording.CANDIDATES] if candidates else []
    for line in candidates:
        sets: dict[str, list[tuple[Stratum, Stratum]]] = {}
        for domain in DOMAINS:
            found = line["domains"][domain]
            weights = np.array(found["bytes"], float)
            candidate, packaged = (
                Stratum(np.array([found[name]]), weights) for name in ("candidate", "packaged")
            )
            sets[domain] = [(candidate, packaged)]
        sets["mean"] = [pair for pairs in sets.values() for pair in pairs]
        rows = []
        for domain, pairs in sets.items():
            candidate, packaged = (interval(part).show() for part in zip(*pairs, strict=True))
            difference = interval([minus(*pair) for pair in pairs]).show(4, sign=True)
            rows.append([domain, packaged, candidate, difference])
        recipe = ", ".join(f"`{name} = {value}`" for name, value in line["model"].items())
        tokens = f"{line['tokens'] / 1e6:.0f} M tokens"
        parts.append(f"\n{recipe}; {tokens}, seed {line['seed']}, commit {line['commit']}:\n")
        parts.append(_table(["domain", "packaged", "candidate", "difference"], rows))
    return "".join(parts)


def _inside(results: Results, images: Path) -> str:
    said = "\n## What gates and fast parameters do\n"
    rows = []
    for setting in SETTINGS:
        for arm in results.arms(setting):
            runs = [line for line in results.runs(arm, setting) if "trigger" in line]
            if not runs:
                continue
            cells = [
                results.figure(arm, setting, [probe(name)]).show(2)
                for name in ("fast", "gates", "embedded")
            ]
            owners = [each[0] // DOCUMENTS for each in runs[0]["trigger"]["probe"]["fast"]]
            most = max(owners.count(domain) for domain in set(owners)) / len(owners)
            rows.append([f"`{arm}`", setting, len(runs), *cells, f"{most:.2f}"])
            if arm in (REFERENCE, "nirvana-memory"):
                name = f"evidence-{arm}-{setting}.png"
                draw_gates(runs[0]["trigger"], images / name, f"{arm}, setting {setting}")
                said += f"\n![{arm}, setting {setting}](images/{name})\n"
    if not rows:
        return said + "\nNo run with a Trigger yet.\n"
    said += wording.INSIDE
    head = ["arm", "setting", "seeds"]
    return said + _table([*head, "fast", "gates", "embedded", "always one"], rows)


def _missing(results: Results) -> str:
    said = "\n## Record\n\n"
    if results.lines:
        environments = [line["environment"] for line in results.lines]
        for key in ("device", "commit", "python"):
            values = sorted({str(each[key]) for each in environments})
            said += f"- {key}: {', '.join(values)}\n"
        versions = sorted(
            {f"{k} {v}" for each in environments for k, v in each["versions"].items() if v}
        )
        said += f"- versions: {', '.join(versions)}\n"
        skipped = sum(line["skipped"] for line in results.lines)
        said += f"- steps left out because the loss or gradient was not finite: {skipped}\n"
        last = [
            line["losses"][-1][1] for line in results.lines if line["losses"][-1][1] is not None
        ]
        said += f"- last training losses: {np.min(last):.3f} to {np.max(last):.3f} nats a token\n"
    if results.left_out:
        said += f"- runs of another budget, not shown: {results.left_out}\n"
    missing = results.missing()
    said += f"- missing runs (arm/setting/seed): {', '.join(missing) or 'none'}\n"
    return said


if __name__ == "__main__":
    script(main)
