"""The questions of the language study, and what its runs answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.common.tables import show_p, table
from experiments.language import prose
from experiments.language.scores import (
    Results,
    domains_of,
    points_of_questions,
    probe,
    recall,
    text,
)
from experiments.language.variants import REFERENCE, SETTINGS
from nirvana.statistics import holm, t_interval, t_test

LEVEL = 0.05
TRIGGERED = ("nirvana", "nirvana-memory", "bank-8")


@dataclass(frozen=True)
class Question:
    """A question, and the pairs of models (first minus second) that are compared to answer it."""

    title: str
    pairs: tuple[tuple[str, str], ...]


QUESTIONS = (
    Question(
        "Does the Trigger lower bits per byte?",
        tuple(
            (own, than)
            for own in TRIGGERED
            for than in ("hybrid-input", "hybrid-constant", "gated-deltanet")
        ),
    ),
    Question(
        "Is Nirvana better than a Transformer of its size, trained alike?",
        tuple((own, than) for own in TRIGGERED for than in ("transformer", "transformer-window")),
    ),
    Question(
        "Do the second branch and its gate lower bits per byte?",
        (("hybrid-constant", "gated-deltanet"), ("hybrid-input", "hybrid-constant")),
    ),
    Question(
        "Do a smaller bank or a memory of the Trigger's gradient lower bits per byte?",
        (("bank-8", "nirvana"), ("nirvana-memory", "nirvana")),
    ),
)


@dataclass(frozen=True)
class Comparison:
    """Differences of one pair on one kind of text, by seed."""

    pair: tuple[str, str]
    kind: str
    differences: np.ndarray
    p: float
    corrected: float = 1.0  # p after Holm's correction within its question


def compare(results: Results, question: Question) -> list[Comparison]:
    """All comparisons of a question that have at least two runs, corrected together."""
    found = []
    for pair in question.pairs:
        for kind, setting, domains in _kinds():
            values = results.differences(*pair, setting, [text(d) for d in domains])
            if len(values) > 1:
                found.append(Comparison(pair, kind, values, t_test(values)))
    corrected = holm([each.p for each in found])
    return [
        Comparison(each.pair, each.kind, each.differences, each.p, float(p))
        for each, p in zip(found, corrected, strict=True)
    ]


def conclude(comparisons: Sequence[Comparison]) -> str:
    """One sentence on what the comparisons of a question show."""
    intervals = [t_interval(each.differences) for each in comparisons]
    number = len(comparisons)
    excluding = sum(each.excludes_zero for each in intervals)
    shown = [each for each in comparisons if each.corrected < LEVEL]
    if not excluding:
        return (
            f"**Not shown.** None of {number} t intervals excludes zero "
            f"(smallest p {show_p(min(each.p for each in comparisons))}, before correction)."
        )
    lower = sum(each.differences.mean() < 0 for each in comparisons)
    direction = f"{lower} of {number} differences are below zero"
    raw = f"{excluding} of {number} t intervals exclude zero"
    if not shown:
        smallest = show_p(min(each.corrected for each in comparisons))
        return (
            f"**Not shown after correction.** {direction} and {raw}, but the smallest p after "
            f"Holm's correction is {smallest}."
        )
    listed = ", ".join(f"`{a}` minus `{b}` ({each.kind})" for each in shown for a, b in [each.pair])
    return f"**Shown for {len(shown)} of {number}**: {listed}. {direction}; {raw}."


def show_verdicts(results: Results) -> str:
    """A verdict and its table for every question."""
    section = prose.VERDICTS
    for question in QUESTIONS:
        comparisons = compare(results, question)
        section += f"\n### {question.title}\n"
        if not comparisons:
            section += "\nNothing to compare: no pair has two runs of the same seeds.\n"
            continue
        section += f"\n{conclude(comparisons)} {len(comparisons)} comparisons.\n"
        section += _show_comparisons(results, question, comparisons)
    return (
        section
        + _verdict_of_recall(results)
        + _verdict_of_tasks(results)
        + _verdict_of_probe(results)
    )


def _kinds() -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, setting, domains) of every kind of text."""
    return [
        (f"{setting}, {kind}", setting, domains)
        for setting in SETTINGS
        for kind, domains in domains_of(setting).items()
    ]


def _show_comparisons(
    results: Results, question: Question, comparisons: Sequence[Comparison]
) -> str:
    by_place = {(each.pair, each.kind): each for each in comparisons}
    head = ["difference (95 % t interval; p, p by Holm)"]
    for kind, _, domains in _kinds():
        head += [kind, f"{kind}, without Greek"] if "novels" in domains else [kind]
    rows = []
    for pair in question.pairs:
        cells = [f"`{pair[0]}` minus `{pair[1]}`"]
        for kind, setting, domains in _kinds():
            found = by_place.get((pair, kind))
            if found is None:
                cells += ["-"] * (2 if "novels" in domains else 1)
                continue
            shown = t_interval(found.differences).show(4, sign=True)
            cells.append(f"{shown}; {show_p(found.p)}, {show_p(found.corrected)}")
            if "novels" in domains:
                takes = [text(domain, greek=False) for domain in domains]
                rest = results.differences(*pair, setting, takes)
                cells.append(t_interval(rest).show(4, sign=True))
        rows.append(cells)
    return table(head, rows)


def _verdict_of_recall(results: Results) -> str:
    title = "\n### Can these models recall what they have read?\n"
    best = 0.0
    for setting in SETTINGS:
        for variant in results.benchmarked(setting):
            for row in results.runs(variant, setting):
                best = max([best, *(recall(name, "points")(row).figure for name in row["recall"])])
    if not any(results.benchmarked(setting) for setting in SETTINGS):
        return title + "\nNo run was scored on the recall tasks.\n"
    if best < prose.NEXT_TO_NONE:
        verdict = f"**No.** No run has more than {best:.1%} of the answers right in any task"
    else:
        verdict = f"**Partly.** The best run has {best:.1%} of the answers right in its best task"
    return (
        title + f"\n{verdict}. The bits of an answer are below; they rank nothing at this size.\n"
    )


def _verdict_of_tasks(results: Results) -> str:
    title = "\n### Do these models answer benchmarks better than chance?\n"
    tests = [each for setting in SETTINGS for each in _task_tests(results, setting)]
    if not tests:
        return title + "\nNo run was scored on the benchmarks.\n"
    names = sorted({name for _, name, gain, p in tests if gain > 0 and p < LEVEL})
    above = sum(gain > 0 and p < LEVEL for _, _, gain, p in tests)
    below = sum(gain < 0 and p < LEVEL for _, _, gain, p in tests)
    verdict = (
        f"**Hardly.** {above} of {len(tests)} accuracies lie above chance, {below} below (t tests "
        "over questions, each with its mean points over runs; corrected by Holm in each setting)"
    )
    if names:
        verdict += f"; those above are on {', '.join(names)}"
    return title + (
        f"\n{verdict}. On several sets all models have the same accuracy to three digits, which a "
        "constant answer would have, too.\n"
    )


def _task_tests(results: Results, setting: str) -> list[tuple[str, str, float, float]]:
    """(variant, set, accuracy above chance, p by Holm within the setting), of sets with choices."""
    found = []
    for variant in results.benchmarked(setting):
        runs = results.runs(variant, setting)
        for name, about in runs[0]["tasks"].items():
            if about["chance"] > 0:
                gains = points_of_questions(runs, name) - about["chance"]
                p = t_test(gains) if len(gains) > 1 else 1.0
                found.append((variant, name, float(gains.mean()), p))
    corrected = holm([p for *_, p in found])
    return [
        (variant, name, gain, float(p))
        for (variant, name, gain, _), p in zip(found, corrected, strict=True)
    ]


def show_tasks(results: Results, setting: str) -> str:
    """Accuracies of every benchmark; those above chance after correction are bold."""
    variants = results.benchmarked(setting)
    tests = {(v, name): (gain, p) for v, name, gain, p in _task_tests(results, setting)}
    above = {key for key, (gain, p) in tests.items() if gain > 0 and p < LEVEL}
    rows = []
    for name, about in results.runs(variants[0], setting)[0]["tasks"].items():
        cells = []
        for variant in variants:
            mean = points_of_questions(results.runs(variant, setting), name).mean()
            cells.append(f"**{mean:.3f}**" if (variant, name) in above else f"{mean:.3f}")
        chance = f"{about['chance']:.3f}" if about["chance"] else "none"
        rows.append([name, len(about["points"]), chance, *cells])
    section = prose.TASKS.format(setting=setting)
    section += (
        f"\nBold: above chance after Holm's correction of {len(tests)} tests over questions.\n"
    )
    return section + table(["set", "questions", "chance", *(f"`{v}`" for v in variants)], rows)


def _verdict_of_probe(results: Results) -> str:
    title = "\n### Do the fast parameters hold the domain?\n"
    parts = []
    for setting in SETTINGS:
        if not any("trigger" in row for row in results.runs(REFERENCE, setting)):
            continue
        fast, embedded = (
            results.figures(REFERENCE, setting, [probe(name)]) for name in ("fast", "embedded")
        )
        gaps = [fast[seed] - embedded[seed] for seed in fast]
        if len(gaps) > 1:
            shown = t_interval(gaps).show(3, sign=True)
            mean = np.mean([*fast.values()])
            parts.append(f"setting {setting}: {mean:.2f}, minus embeddings {shown}")
    if not parts:
        return title + "\nNo two runs with a Trigger.\n"
    return title + (
        "\n**Yes, but no better than a bag of words.** Accuracy of a linear probe on "
        f"`{REFERENCE}` ({'; '.join(parts)}). Whatever the fast parameters hold of the domain, the "
        "mean token embedding holds, too.\n"
    )
