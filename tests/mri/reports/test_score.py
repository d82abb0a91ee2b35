"""Scores of reports: counted by hand, their limits, their intervals."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nirvana.mri.reports.grammar import NORMAL, SLOTS, VALUES, Facts, parse, write
from nirvana.mri.reports.score import FACTS, agree, auc, best_threshold, bootstrap, majority, score

MASS = Facts(True, 1, "mass", "left", "frontal", 12, "hyperintense")
reports = st.one_of(
    st.just(NORMAL),
    st.builds(
        Facts,
        finding=st.just(True),
        **{slot: st.sampled_from(list(VALUES[slot])) for slot in SLOTS},
    ),
)


def test_counted_by_hand():
    truth = [MASS, MASS, MASS, NORMAL, NORMAL]
    stated = [MASS, replace(MASS, side="right"), NORMAL, MASS, NORMAL]
    result = score(truth, stated)
    finding = result["facts"]["finding"]
    assert finding == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert result["facts"]["side"] == {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3}
    assert result["hallucination"] == 0.5
    assert result["omission"] == pytest.approx(1 / 3)
    assert result["side_accuracy"] == 0.5
    assert result["exact"] == 0.4
    assert (result["reports"], result["normals"]) == (5, 2)


def test_auc_counts_pairs():
    """Of the six pairs four are in order and one is a tie."""
    assert auc([0.9, 0.5, 0.2, 0.5, 0.1], [True, True, True, False, False]) == pytest.approx(
        4.5 / 6
    )
    assert math.isnan(auc([0.1, 0.2], [True, True]))


@given(st.lists(reports, min_size=1, max_size=12))
def test_the_truth_through_the_grammar_is_right_in_everything(truth):
    """The oracle: what is lost between facts and text would show here."""
    stated = [parse(write(facts, i % 6)) for i, facts in enumerate(truth)]
    result = score(truth, stated)
    assert result["exact"] == 1
    for figures in result["facts"].values():
        assert set(figures.values()) <= {1.0, None}
    assert result["hallucination"] in (0.0, None)
    assert result["omission"] in (0.0, None)


@given(st.lists(st.tuples(reports, reports), min_size=1, max_size=12))
def test_rates_stay_between_none_and_all(pairs):
    truth, stated = zip(*pairs, strict=True)
    result = score(truth, stated)
    for figures in result["facts"].values():
        assert all(value is None or 0 <= value <= 1 for value in figures.values())
    # No fact can be right more often than the finding it is about.
    present = result["facts"]["finding"]["recall"]
    for slot in SLOTS:
        recall = result["facts"][slot]["recall"]
        assert (recall is None) == (present is None)
        assert recall is None or recall <= present


@pytest.mark.parametrize(
    ("stated", "true", "right"),
    [(12, 12, True), (10, 12, True), (15, 12, True), (8, 12, False), (50, 40, True), (4, 6, True)],
)
def test_sizes_may_differ_by_a_step(stated, true, right):
    assert agree("size", stated, true) is right


def test_intervals_hold_the_figure_and_widen_with_groups():
    truth = [MASS if i % 2 else NORMAL for i in range(200)]
    # Two of ten subjects are all wrong: the subject, not the slice, is what varies.
    subjects = [i // 20 for i in range(200)]
    stated = [
        NORMAL if subject < 2 else facts for facts, subject in zip(truth, subjects, strict=True)
    ]
    omission = score(truth, stated)["omission"]
    single = bootstrap(truth, stated)["omission"]
    grouped = bootstrap(truth, stated, subjects)["omission"]
    assert single[0] < omission < single[1]
    assert grouped[0] <= omission <= grouped[1]
    assert grouped[1] - grouped[0] > 1.5 * (single[1] - single[0])
    assert bootstrap(truth, stated, seed=3) == bootstrap(truth, stated, seed=3)


def test_what_cannot_be_counted_is_left_out():
    result = score([NORMAL], [NORMAL])
    assert all(result["facts"][slot]["f1"] is None for slot in FACTS)
    assert result["hallucination"] == 0
    assert set(bootstrap([NORMAL], [NORMAL])) == {"exact", "hallucination"}
    with pytest.raises(ValueError, match="compared with"):
        score([NORMAL], [])
    with pytest.raises(ValueError, match="compared with"):
        score([], [])


def test_the_majority_report():
    other = replace(MASS, side="right", size=30)
    assert majority([MASS, MASS, other, NORMAL]) == MASS
    assert majority([MASS, NORMAL, NORMAL]) == NORMAL


def test_the_threshold_weighs_f1_against_false_findings():
    present = [True, True, True, True, False, False, False, False]
    likely = [0.9, 0.8, 0.6, 0.3, 0.7, 0.2, 0.1, 0.1]
    free = best_threshold(present, likely, 1.0)
    assert free == {"threshold": 0.3, "f1": pytest.approx(8 / 9), "hallucination": 0.25}
    strict = best_threshold(present, likely, 0.0)
    assert strict == {"threshold": 0.8, "f1": pytest.approx(2 / 3), "hallucination": 0.0}
    # Equal probabilities of all slices cannot keep to the limit: the highest one is returned.
    assert best_threshold(present, [0.5] * 8, 0.1)["threshold"] == 0.5


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=30), st.floats(0, 1)
)
def test_no_other_threshold_within_the_limit_is_better(slices, most):
    present, likely = zip(*slices, strict=True)
    chosen = best_threshold(present, likely, most)

    def judged(threshold):
        stated = [p >= threshold for p in likely]
        right = sum(s and t for s, t in zip(stated, present, strict=True))
        wrong = sum(stated) - right
        normals = len(present) - sum(present)
        return 2 * right / (right + wrong + sum(present)), wrong / max(normals, 1)

    f1, hallucination = judged(chosen["threshold"])
    assert (chosen["f1"], chosen["hallucination"]) == pytest.approx((f1, hallucination))
    within = [judged(t)[0] for t in likely if judged(t)[1] <= most]
    assert f1 == pytest.approx(max(within)) if within else chosen["threshold"] == max(likely)
