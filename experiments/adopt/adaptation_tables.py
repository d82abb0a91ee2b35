"""The tables of the adaptation of adopted models to samples."""

import math
from collections.abc import Sequence

import numpy as np

from experiments.adapt.domains import SEEN, UNSEEN
from experiments.adapt.scores import Study, largest, show
from experiments.adopt import prose
from experiments.common.results import Row
from experiments.common.tables import table

GROUPS = {"unseen": tuple(UNSEEN), "distilled on": SEEN}
CHOSEN = ("chosen", "norm")


def adaptations(rows: Sequence[Row]) -> list[str]:
    """A section for each model, in the order of the rows.

    Args:
        rows: of `experiments.adopt.adaptation`.
    """
    models = list(dict.fromkeys(row["name"]["model"] for row in rows))
    sections = []
    for model in models:
        own = [row for row in rows if row["name"]["model"] == model]
        sections.append(_section(Study(largest(own), model)))
    return sections


def _section(study: Study) -> str:
    documents = study.rows[0]["scale"]["documents"]
    text = prose.ADAPTATION.format(name=study.model, documents=documents, tokens=study.tokens)
    text += _settings(study)
    if not (study.has("frozen") and study.has("bytes")):
        return text + "\nNot measured yet: test documents.\n"
    conditions = [name for name in prose.CONDITIONS if study.has(name)]
    absent = [f"`{name}`" for name in prose.CONDITIONS if name not in conditions]
    if study.has("chosen") and _groups(study, "chosen") == ["norm"]:
        absent = [name for name in absent if name != "`norm`"]
    text += f"\nNot measured yet: {', '.join(absent)}.\n" if absent else ""
    legend = {**prose.CONDITIONS}
    if study.has("chosen") and _groups(study, "chosen") == ["norm"]:
        legend["chosen"] = prose.LINEAR_CHOSEN
    text += "\n" + "".join(f"- `{name}`: {legend[name]}\n" for name in conditions)
    return text + _conditions(study, conditions) + _domains(study, conditions)


def _groups(study: Study, condition: str) -> list[str]:
    return study.row(condition)["config"]["parameters"]


def _settings(study: Study) -> str:
    lines = []
    for row in study.part("select"):
        config = row["config"]
        size = config["lr"]["norm"]
        tried = [
            other["name"]["config"]
            for other in study.part("valid")
            if other["name"]["config"] != "frozen"
            and other["name"]["config"]["parameters"] == config["parameters"]
        ]
        sizes = sorted({each["lr"]["norm"] for each in tried})
        chunks = sorted({each["chunk"] for each in tried})
        edges = [
            f"the {end} {what} tried"
            for what, value, values in (
                ("step size", size, sizes),
                ("chunk", config["chunk"], chunks),
            )
            for end, edge in (("least", values[0]), ("greatest", values[-1]))
            if len(values) > 1 and value == edge
        ]
        shown = ", ".join(f"{name} {each:g}" for name, each in config["lr"].items())
        gains = [f"{row['figure']:+.2f}", f"{row['worst']:+.2f}"]
        kind = f"`{row['name']['kind']}`"
        lines.append([kind, config["chunk"], shown, *gains, "; ".join(edges) or "-"])
    head = ["settings", "chunk", "step sizes", "validation: unseen, last quarter"]
    head += ["worst distilled domain, all", "note"]
    return table(head, lines) if lines else "\nNot measured yet: the choice of settings.\n"


def _conditions(study: Study, conditions: Sequence[str]) -> str:
    """Changes over the documents of both kinds of domains, and over the domains."""
    lines = []
    for name in conditions:
        for kind, domains in GROUPS.items():
            by_domain = [study.changes(name, [domain], "last") for domain in domains]
            means = [each.mean() for each in by_domain if len(each)]
            numbers = study.row(name).get("numbers")
            cells = [show(study.changes(name, domains, part)) for part in ("last", "all")]
            shown = "-" if numbers is None else f"{numbers:,}"
            lines.append([f"`{name}`", shown, kind, sum(map(len, by_domain)), *cells, show(means)])
    head = ["condition", "numbers", "domains", "documents", "last quarter", "all"]
    return table([*head, "last quarter, over domains"], lines)


def _domains(study: Study, conditions: Sequence[str]) -> str:
    """Bits per byte and changes of each domain."""
    lines = []
    adapted = [name for name in CHOSEN if name in conditions]
    for kind, domains in GROUPS.items():
        for domain in domains:
            count = study.counts(["frozen", *conditions]).get(domain)
            if not count:
                continue
            bits = {
                part: " to ".join(
                    f"{_bits(study, name, domain, part, count):.3f}"
                    for name in ("frozen", *adapted[:1])
                )
                for part in ("last", "all")
            }
            cells = [show(study.changes(name, [domain], "last")) for name in conditions]
            whole = [show(study.changes(name, [domain], "all")) for name in adapted[:1]]
            lines.append([domain, kind, count, bits["last"], bits["all"], *cells, *whole])
    head = ["domain", "kind", "documents", "bits per byte, last quarter", "bits per byte, all"]
    head += [f"`{name}`, last quarter" for name in conditions]
    head += [f"`{name}`, all" for name in adapted[:1]]
    return table(head, lines)


def _bits(study: Study, condition: str, domain: str, part: str, count: int) -> float:
    """Bits per byte, mean over a domain's first documents, of the whole or the last quarter."""
    nats = study.row(condition)["nats"][domain][:count]
    sizes = study.row("bytes")["bytes"][domain][:count]
    found = []
    for own, size in zip(nats, sizes, strict=True):
        first = 0 if part == "all" else len(own) * 3 // 4
        found.append(sum(own[first:]) / math.log(2) / sum(size[first:]))
    return float(np.mean(found))
