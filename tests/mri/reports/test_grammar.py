"""The grammar: facts to text and back, and reports that were changed."""

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nirvana import InputError
from nirvana.mri.reports.grammar import (
    NORMAL,
    SIZES,
    SLOTS,
    VALUES,
    WORDINGS,
    Facts,
    parse,
    parse_wording,
    pieces,
    rounded,
    write,
)

findings = st.builds(
    Facts,
    finding=st.just(True),
    **{slot: st.sampled_from(list(VALUES[slot])) for slot in SLOTS},
)
wordings = st.integers(0, len(WORDINGS) - 1)


@given(st.one_of(findings, st.just(NORMAL)), wordings)
def test_every_report_is_read_back_exactly(facts, wording):
    text = write(facts, wording)
    assert parse_wording(text) == (facts, wording)
    assert "".join(part for _, part in pieces(facts, wording)) == text


@given(findings, wordings, st.sampled_from(SLOTS), st.data())
def test_each_changed_fact_is_caught(facts, wording, slot, data):
    """The text that differs in one fact is read as facts that differ in that one alone."""
    others = [value for value in VALUES[slot] if value != getattr(facts, slot)]
    changed = replace(facts, **{slot: data.draw(st.sampled_from(others))})
    text = write(changed, wording)
    assert text != write(facts, wording)
    read = parse(text)
    different = [f.name for f in fields(Facts) if getattr(read, f.name) != getattr(facts, f.name)]
    assert different == [slot]


@given(findings, wordings)
def test_an_unknown_side_is_neither(facts, wording):
    unknown = replace(facts, side=None)
    text = write(unknown, wording)
    assert parse_wording(text) == (unknown, wording)
    assert text == re.sub(r"\b(left|right)\b", "left or right", write(facts, wording))


@given(findings, wordings)
def test_a_finding_taken_away_is_caught(facts, wording):
    assert parse(write(NORMAL, wording)) == NORMAL != parse(write(facts, wording))


@given(findings, wordings, st.data())
def test_a_damaged_report_is_refused_or_states_other_facts(facts, wording, data):
    """A word taken out or put twice never passes for the report it was."""
    words = write(facts, wording).split(" ")
    at = data.draw(st.integers(0, len(words) - 1))
    damaged = words[:at] + data.draw(st.sampled_from([[], [words[at]] * 2])) + words[at + 1 :]
    try:
        read = parse(" ".join(damaged))
    except InputError:
        return
    assert read != facts


@pytest.mark.parametrize(
    "text",
    [
        "",
        "One hyperintense mass in the left frontal lobe, measuring 012 mm.",
        "One hyperintense mass in the left frontal lobe, measuring 201 mm.",
        "One hyperintense masses in the left frontal lobe, measuring 12 mm.",
        "Two hyperintense mass in the left frontal lobe, measuring 12 mm.",
        "One hyperintense mass in the left cerebellar lobe, measuring 12 mm.",
        "one hyperintense mass in the left frontal lobe, measuring 12 mm.",
        "Six hyperintense masses, the largest in the left frontal lobe, measuring 12 mm.",
        "Impression: one masses of the left frontal lobe (12 mm, hyperintense).",
        "Focal lesions: two. Type: mass. Side: left. Lobe: frontal. Size: 12 mm. "
        "Signal: hyperintense.",
        " No focal lesion.",
        "No focal lesion. No focal lesion.",
    ],
)
def test_what_no_wording_makes_is_refused(text):
    with pytest.raises(InputError, match="not a report"):
        parse(text)


def test_every_wording_states_every_fact_once_and_the_number_first():
    facts = Facts(True, 1, "mass", "left", "frontal", 12, "hyperintense")
    for one in (facts, replace(facts, count=3)):
        for wording in range(len(WORDINGS)):
            slots = [slot for slot, _ in pieces(one, wording) if slot is not None]
            assert slots[0] == "count"
            assert sorted(slots) == sorted(SLOTS)
    texts = [write(f, w) for f in (facts, NORMAL) for w in range(len(WORDINGS))]
    assert len(set(texts)) == len(texts)
    assert not any(re.search(r"[{}]", text) for text in texts)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 0},
        {"count": 6},
        {"count": True},
        {"type": "tumour"},
        {"side": "both"},
        {"lobe": None},
        {"size": 0},
        {"size": 12.5},
        {"signal": "bright"},
    ],
)
def test_facts_that_cannot_be_are_refused(changes):
    facts = Facts(True, 1, "mass", "left", "frontal", 12, "hyperintense")
    with pytest.raises(InputError, match=next(iter(changes))):
        replace(facts, **changes)


def test_a_normal_report_has_no_other_facts():
    with pytest.raises(InputError, match="without a finding"):
        Facts(False, side="left")
    with pytest.raises(InputError, match="wording 6"):
        write(NORMAL, 6)


def test_sizes_are_rounded_by_ratio():
    assert [rounded(size) for size in SIZES] == list(SIZES)
    assert rounded(1.0) == 3
    assert rounded(11.1) == 12
    assert rounded(10.9) == 10
    assert rounded(44.0) == 40
    assert rounded(90.0) == 50
