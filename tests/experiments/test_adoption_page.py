"""What the page of the study of adoption concludes from rows."""

import pytest

from experiments.adopt import page, verdicts
from experiments.adopt.measure import KINDS
from experiments.adopt.scores import Study

LENGTHS = ("1024", "4096", "65536")


def row(branches, tokens=0, documents=(), right=(5, 5, 5, 5), needles=0, ms=60.0, **more):
    """A row of a model with documents of (tokens, bits), ten problems of each kind, and as many
    needles found at the greatest length as given."""
    bits = {domain: [[n, b, 1000] for n, b in found] for domain, found in dict(documents).items()}
    generated = {k: "1" * n + "0" * (10 - n) for k, n in zip(KINDS, right, strict=True)}
    niah = {f"{task} at 16384": "1" * needles + "0" * (10 - needles) for task in (1, 2)}
    shares = ({k: v.count("1") / 10 for k, v in x.items()} for x in (generated, niah))
    found = {
        "model": f"{branches}, {tokens:,} tokens" if tokens else branches,
        "branches": branches,
        "tokens": tokens,
        "stages": [],
        "parameters": 10,
        "window": 512,
        "sinks": 4,
        "positions": 8192 if branches == "teacher" else None,
        "corpus": {"law": 10**6},
        "epochs": tokens / 10**6,
        "settings": {"domains": [*bits], "documents": 16, "problems": 10},
        "dtype": "bfloat16",
        "documents": bits,
        "bits per byte": {x: sum(b for _, b, _ in d) / (1000 * len(d)) for x, d in bits.items()},
        "points": {"generated": generated, "niah": niah},
        "generation": {length: {"ms": ms, "MiB": 400.0} for length in LENGTHS},
        "graph generation": {length: {"ms": ms, "MiB": 400.0} for length in LENGTHS},
        "seconds": {},
        "environment": {"device": "H", "versions": {"torch": "2"}, "commit": "c"},
    }
    found["generated"], found["niah"] = shares
    return found | more


SHORT = [(100, 800.0), (200, 900.0), (300, 1000.0)]
TEACHER = row("teacher", documents={"law": [*SHORT, (9000, 4000.0)], "general": SHORT})


def scaled(factor, tokens=50 * 10**6, branches="both", **more):
    """A model whose documents need `factor` times the bits within the teacher's length, and half of
    the teacher's bits beyond."""
    near = [
        (n, b * factor * wobble) for (n, b), wobble in zip(SHORT, (1, 1.001, 0.999), strict=True)
    ]
    documents = {"law": [*near, (9000, 2000.0)], "general": near}
    return row(branches, tokens, documents, **more)


def verdict(rows, start):
    lines = verdicts.goals(Study(rows)).splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {start}")]
    return line


@pytest.mark.parametrize(
    ("factor", "end"),
    [(1.02, "| met |"), (1.0299, "| met on average, not by the interval over documents |")],
)
def test_bits_are_compared_within_the_length_of_the_teacher(factor, end):
    found = verdict([TEACHER, scaled(factor)], "50 M tokens: at most 3 %")
    assert found.endswith(end)
    assert f"{100 * factor - 100:+.2f}"[:4] in found
    assert "over 6 documents" in found


def test_more_bits_are_a_missed_goal():
    # All documents together need fewer bits than the teacher, who fails beyond its length.
    missed = scaled(1.04)
    assert missed["bits per byte"]["law"] < TEACHER["bits per byte"]["law"]
    assert verdict([TEACHER, missed], "50 M tokens: at most 3 %").endswith("| missed |")
    assert verdict([TEACHER, missed], "200 M tokens").endswith("| not measured |")


def test_rows_without_documents_are_compared_on_the_shorter_domains():
    rows = [
        {**row("teacher"), "bits per byte": {"law": 1.0, "novels": 2.0}},
        {**row("both", 50 * 10**6), "bits per byte": {"law": 1.01, "novels": 1.0}},
    ]
    for each in rows:
        del each["documents"], each["positions"]
    found = verdict(rows, "50 M tokens: at most 3 %")
    assert "+1.00 %, documents of any length in law" in found
    assert found.endswith("| met on average, no interval |")


@pytest.mark.parametrize(
    ("right", "end"),
    [
        ((5, 5, 5, 5), "| met |"),
        ((5, 5, 5, 4), "not by the interval |"),
        ((5, 5, 4, 4), "missed |"),
    ],
)
def test_generated_tasks_are_a_share_of_the_score_of_the_teacher(right, end):
    found = verdict([TEACHER, scaled(1.0, right=right)], "50 M tokens: at least 95%")
    assert f"{sum(right) / 0.2:.1f} (" in found
    assert found.endswith(end)


def test_needles_memory_and_speed_are_those_of_the_largest_budget():
    window = scaled(1.0, 0, "window", needles=1)
    small = scaled(1.0, 10**7, needles=9)
    large = scaled(1.0, needles=1, ms=10.0)
    rows = [TEACHER, window, large, small]
    assert verdict(rows, "S-NIAH").endswith("| missed |")
    assert verdict(rows, "a token after").endswith("6.00 times | met |")
    assert verdict(rows, "memory").endswith("| met |")
    better = [TEACHER, window, scaled(1.0, needles=8)]
    assert verdict(better, "S-NIAH").endswith("20 problems | met |")
    assert verdict(better, "a token after").endswith("1.00 times | missed |")
    grown = {"4096": {"ms": 1, "MiB": 400.0}, "65536": {"ms": 1, "MiB": 410.0}}
    assert verdict([TEACHER, scaled(1.0, generation=grown)], "memory").endswith("| missed |")


def test_rows_of_other_settings_are_left_out_and_named():
    other = scaled(1.0)
    other["settings"] = {**other["settings"], "problems": 50}
    found = Study([TEACHER, other])
    assert [*found.rows] == ["teacher"]
    written = page.page([TEACHER, other], [])
    assert "- with the settings of the others: both, 50,000,000 tokens\n" in written


def test_the_page_has_tasks_beside_the_teacher():
    tasks = [{"piqa": {"points": digits, "chance": 0.5}} for digits in ("1101", "1001")]
    rows = [{**TEACHER, "tasks": tasks[0]}, scaled(1.0, tasks=tasks[1])]
    written = page.page(rows, [])
    assert "| `teacher` | 0.750 | 0.750 |" in written
    assert "| `both`, 50 M tokens | 0.500 (-25.0 (" in written
    assert "| a guess | 0.500 | 0.500 |" in written
