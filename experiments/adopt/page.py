"""Writes RESULTS.md of the study of adoption from its rows.

python -m experiments.adopt.page [--results FILE] [--adaptation FILE] [--out FILE]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.adopt import prose
from experiments.adopt.adaptation import ROWS
from experiments.adopt.adaptation_tables import adaptations
from experiments.adopt.measure import KINDS
from experiments.adopt.prepare import TEACHER
from experiments.adopt.prose import name_of
from experiments.adopt.scores import LONG, Study, mean, percent
from experiments.adopt.study import MILLIONS, RESULTS
from experiments.adopt.verdicts import MILLION, goals
from experiments.common.program import make_parser, write_page
from experiments.common.results import Row, read_rows
from experiments.common.tables import table
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.statistics import t_interval


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.adopt.page", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--adaptation", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS.with_name("RESULTS.md"))
    options = parser.parse_args(arguments)
    check_outputs({"--out": options.out}, [options.results, options.adaptation])
    rows = read_rows(options.results)
    if not rows:
        raise InputError(f"{options.results} has no rows: run experiments.adopt.study first")
    write_page(options.out, page(rows, read_rows(options.adaptation)))


def page(rows: Sequence[Row], adaptation: Sequence[Row]) -> str:
    """The whole page.

    Args:
        rows: of `experiments.adopt.study`, at least one.
        adaptation: of `experiments.adopt.adaptation`.
    """
    study = Study(rows)
    parts = [prose.HEAD, goals(study), _missing(study, adaptation), _models(study), _stages(study)]
    parts += [_bits(study), _niah(study), _generated(study), _tasks(study), _shares(study)]
    parts += [_generation(study, kind) for kind in prose.GENERATION]
    parts += [*adaptations(adaptation), _measured(study)]
    return "\n".join(part for part in parts if part)


def _missing(study: Study, adaptation: Sequence[Row]) -> str:
    """What the study measures and these rows do not have."""
    absent = [name for name in (TEACHER, "window") if study.find(name, 0) is None]
    absent = [f"`{name}`" for name in absent]
    for millions in MILLIONS:
        for branches in ("both", "linear"):
            if study.find(branches, millions * MILLION) is None:
                absent.append(f"`{branches}` after {millions} M tokens")
    parts = {"documents one by one": "documents", "problems one by one": "points"}
    parts |= {"tasks of the harness": "tasks"}
    for what, key in parts.items():
        without = [name_of(row) for row in study.rows.values() if not row.get(key)]
        absent += [f"{what}: {', '.join(without)}"] if without else []
    absent += [] if adaptation else ["the adaptation of an adopted model to samples"]
    if study.left_out:
        absent.append(f"with the settings of the others: {', '.join(study.left_out)}")
    return prose.MISSING + "\n" + "".join(f"- {each}\n" for each in absent) if absent else ""


def _models(study: Study) -> str:
    lines = []
    for row in study.rows.values():
        window = "-" if row["window"] is None else f"{row['window']} + {row['sinks']}"
        text = f"{sum(row['corpus'].values()) / MILLION:.1f} M" if row["tokens"] else "-"
        epochs = f"{row['epochs']:.2f}" if row["tokens"] else "-"
        lines.append([name_of(row), f"{row['parameters']:,}", window, text, epochs])
    head = ["model", "parameters", "window + sinks", "training text, tokens", "epochs"]
    return prose.MODELS + table(head, lines)


def _stages(study: Study) -> str:
    lines = []
    for row in study.rows.values():
        for each in row["stages"]:
            last = each["last"]
            tokens = each["rows"] * each["context"] * each["steps"]
            error = last.get("worst_layer", last.get("kl"))
            cells = [each["stage"], each["rows"], each["context"], f"{each['lr']:g}"]
            cells += [f"{each['steps']:,}", f"{tokens / MILLION:.2f} M"]
            cells += [_figure(last.get("loss"), "{:.4f}"), _figure(error, "{:.4f}")]
            cells += [_figure(last.get("tokens_per_second"), "{:,.0f}")]
            cells += [_figure(last.get("memory_gib"), "{:.1f}")]
            lines.append([name_of(row), *cells])
    head = ["model", "stage", "rows", "context", "learning rate", "steps", "tokens", "loss"]
    head += ["worst layer or KL", "tokens/s, last", "GiB"]
    return prose.STAGES + table(head, lines) if lines else ""


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _bits(study: Study) -> str:
    short = [domain for domain in study.domains if domain not in LONG]
    long = [domain for domain in study.domains if domain in LONG]
    columns = {"mean": study.domains} | ({"mean without novels": short} if long else {})
    lines = []
    for row in study.rows.values():
        bits = row["bits per byte"]
        cells = [f"{bits[domain]:.3f}" for domain in study.domains]
        for domains in columns.values():
            own = mean(bits[domain] for domain in domains)
            beside = ""
            if study.teacher is not None and row is not study.teacher:
                its = mean(study.teacher["bits per byte"][domain] for domain in domains)
                beside = f" ({percent(own, its):+.2f} %)"
            cells.append(f"{own:.3f}{beside}")
        lines.append([name_of(row), *cells, *_within(study, row)])
    text = prose.LONG.format(domains=", ".join(long)) if long else ""
    head = ["model", *study.domains, *columns, "within, mean", "within, documents"]
    first = next(iter(study.rows.values()))
    return prose.BITS.format(documents=first["settings"]["documents"], long=text) + table(
        head, lines
    )


def _within(study: Study, row: Row) -> list[str]:
    """The differences to the teacher over the documents within its length."""
    found = None if row is study.teacher else study.increase(row)
    if found is None or found.documents is None:
        return ["-", "-"]
    over = "-" if len(found.documents) < 2 else t_interval(found.documents).show(2, sign=True)
    return [f"{found.figure:+.2f}", f"{over}, {len(found.documents)} documents"]


def _problems(study: Study) -> int:
    return next(iter(study.rows.values()))["settings"]["problems"]


def _niah(study: Study) -> str:
    names = list(dict.fromkeys(name for row in study.rows.values() for name in row["niah"]))
    lengths = sorted({int(name.split()[-1]) for name in names})
    lines = [
        [name_of(row), f"S-NIAH {task}"]
        + [_figure(row["niah"].get(f"{task} at {length}"), "{:.2f}") for length in lengths]
        for row in study.rows.values()
        for task in (1, 2)
    ]
    head = ["model", "task", *(f"{length:,}" for length in lengths)]
    return prose.NIAH.format(problems=_problems(study)) + table(head, lines)


def _generated(study: Study) -> str:
    lines = []
    for row in study.rows.values():
        found = row["generated"]
        share = None if row is study.teacher else study.generated(row)
        beside = "-" if share is None else f"{100 * share.figure:.1f} %"
        if share is not None and share.interval is not None:
            low, high = 100 * share.interval.low, 100 * share.interval.high
            beside = f"{100 * share.figure:.1f} ({low:.1f} to {high:.1f}) %"
        cells = [f"{found[kind]:.2f}" for kind in KINDS]
        lines.append([name_of(row), *cells, f"{mean(found.values()):.3f}", beside])
    head = ["model", *KINDS, "mean", "of the teacher's"]
    return prose.GENERATED.format(problems=_problems(study)) + table(head, lines)


def _tasks(study: Study) -> str:
    rows = [row for row in study.rows.values() if row.get("tasks")]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    teacher = (study.teacher or {}).get("tasks", {})
    lines = []
    for row in rows:
        own = {name: _digits(each) for name, each in row["tasks"].items()}
        cells = []
        for name in names:
            cell = f"{own[name].mean():.3f}" if name in own else "-"
            if name in own and name in teacher and row is not study.teacher:
                differences = 100 * (own[name] - _digits(teacher[name]))
                if len(differences) > 1:
                    cell += f" ({t_interval(differences).show(1, sign=True)})"
            cells.append(cell)
        lines.append([name_of(row), *cells, f"{mean(each.mean() for each in own.values()):.3f}"])
    guesses = {name: each["chance"] for row in rows for name, each in row["tasks"].items()}
    cells = [f"{guesses[name]:.3f}" for name in names]
    lines.append(["a guess", *cells, f"{mean(guesses.values()):.3f}"])
    return prose.TASKS.format(problems=_problems(study)) + table(["model", *names, "mean"], lines)


def _digits(task: dict[str, Any]) -> np.ndarray:
    return np.array([*map(int, task["points"])], float)


def _shares(study: Study) -> str:
    lines = []
    for row in study.rows.values():
        shares = row.get("linear shares")
        if shares:
            ends = [f"{figure:.3f}" for figure in (mean(shares), min(shares), max(shares))]
            lines.append([name_of(row), *ends, " ".join(f"{each:.2f}" for each in shares)])
    head = ["model", "mean", "least", "most", "by layer"]
    return prose.SHARES + table(head, lines) if lines else ""


def _generation(study: Study, kind: str) -> str:
    """The table of one field of the rows, a key of `prose.GENERATION`."""
    rows = [row for row in study.rows.values() if row.get(kind)]
    lengths = [str(x) for x in sorted({int(x) for row in rows for x in row[kind]})]
    if not lengths:
        return ""
    times = {} if study.teacher is None else study.teacher.get(kind, {})
    last, lines = lengths[-1], []
    for row in rows:
        found = row[kind]
        cells = [
            f"{found[x]['ms']:.1f} ms, {found[x]['MiB']:,.0f} MiB" if x in found else "-"
            for x in lengths
        ]
        both = last in times and last in found
        factor = f"{times[last]['ms'] / found[last]['ms']:.2f}" if both else "-"
        lines.append([name_of(row), *cells, factor])
    head = ["model", *(f"{int(length):,}" for length in lengths), "times as fast"]
    return prose.GENERATION[kind] + table(head, lines)


def _measured(study: Study) -> str:
    lines = []
    for row in study.rows.values():
        about = row["environment"]
        seconds = ", ".join(f"{name} {each:.0f}" for name, each in row["seconds"].items())
        version = about["versions"]["torch"]
        cells = [about["device"], row["dtype"], version, about["commit"], seconds]
        lines.append([name_of(row), *cells])
    head = ["model", "device", "dtype", "torch", "commit", "seconds"]
    return prose.MEASURED + table(head, lines)


if __name__ == "__main__":
    script(main)
