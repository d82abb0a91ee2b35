"""Intervals cover as often as they promise, corrections only raise p, and bootstraps agree."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from nirvana.statistics import (
    cluster_totals,
    differences,
    holm,
    means_by,
    ratio_interval,
    resampled_totals,
    signed_rank_test,
    t_interval,
    t_test,
)

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def test_three_runs_need_a_t_interval():
    """Of normal runs the t interval covers the mean in 95 %, the percentile bootstrap in 73 %."""
    random = np.random.default_rng(0)
    runs = random.normal(2.0, 0.3, (4000, 3))
    covered = [found.low <= 2 <= found.high for found in map(t_interval, runs)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)
    bootstrapped = [ratio_interval([(x, np.ones(3))], resamples=400) for x in runs[:1000]]
    covered = [found.low <= 2 <= found.high for found in bootstrapped]
    assert np.mean(covered) == pytest.approx(0.73, abs=0.05)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
def test_the_t_interval_and_the_t_test_agree(values):
    values = np.round(values, 3)
    found = t_interval(values)
    assert found.low <= found.figure <= found.high
    if np.ptp(values) > 0 and abs(min(abs(found.low), abs(found.high))) > 1e-6:
        assert found.excludes_zero == (t_test(values) < 0.05)


def test_one_run_has_no_interval():
    for values in ([], [1.0], [1.0, np.nan]):
        with pytest.raises(ValueError, match="two finite values"):
            t_interval(values)
    assert t_test([0.0, 0.0]) == 1
    assert t_test([2.0, 2.0]) == 0


def test_five_people_cannot_reach_five_percent():
    random = np.random.default_rng(0)
    assert signed_rank_test([3.0, 1.0, 2.0, 5.0, 4.0]) == 0.0625
    assert signed_rank_test([1.0, 1.0, 1.0, 2.0, 3.0]) == 0.0625  # ties, too, are counted exactly
    for number in range(2, 10):
        found = signed_rank_test(random.normal(size=number) + 0.5)
        assert found is not None
        assert 2 ** (1 - number) <= found <= 1
    assert signed_rank_test([1.0]) is None
    assert signed_rank_test([0.0, 0.0]) is None
    assert signed_rank_test([np.inf, 1.0]) is None


@given(probabilities)
def test_holm_is_monotone_and_never_below_the_raw_p(values):
    raw, corrected = np.array(values), holm(values)
    assert (corrected >= raw).all()
    assert (corrected <= 1).all()
    order = np.argsort(raw, kind="stable")
    assert all(a <= b for a, b in pairwise(corrected[order]))
    # Between no correction (or the weaker control of the false discovery rate) and Bonferroni's.
    assert (corrected <= np.minimum(raw * len(raw), 1) + 1e-12).all()
    assert (corrected >= false_discovery_control(raw) - 1e-12).all()


@given(probabilities, st.randoms(use_true_random=False))
def test_holm_does_not_depend_on_the_order(values, random):
    places = list(range(len(values)))
    random.shuffle(places)
    shuffled = holm([values[place] for place in places])
    assert shuffled.tolist() == holm(values)[places].tolist()


def test_holm_of_known_values():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        holm([0.5, 1.5])


def test_holm_keeps_the_chance_of_any_false_rejection():
    random = np.random.default_rng(0)
    rejected = [(holm(random.uniform(size=20)) < 0.05).any() for _ in range(4000)]
    assert np.mean(rejected) == pytest.approx(0.05, abs=0.012)


def test_clusters_of_one_are_the_plain_bootstrap():
    table = np.random.default_rng(0).normal(size=(30, 2))
    clusters = cluster_totals(table, range(30))
    assert np.array_equal(clusters, table)
    plain, whole = (resampled_totals(x, 200, np.random.default_rng(1)) for x in (table, clusters))
    assert np.array_equal(plain, whole)
    # Ten equal rows of a person carry no more information than one of them.
    person = np.repeat(table, 10, axis=0)
    grouped = cluster_totals(person, np.repeat(range(30), 10))
    wide, narrow = (
        resampled_totals(x, 2000, np.random.default_rng(1))[:, 0].std() for x in (grouped, person)
    )
    assert wide / narrow == pytest.approx(10**0.5, rel=0.1)


def test_draws_do_not_depend_on_the_chunks(monkeypatch):
    table = np.random.default_rng(0).normal(size=(7, 3))
    whole = resampled_totals(table, 50, np.random.default_rng(1))
    monkeypatch.setattr("nirvana.statistics.CHUNK", 14)
    assert np.allclose(resampled_totals(table, 50, np.random.default_rng(1)), whole)


def test_strata_are_drawn_by_themselves():
    """Sets that differ from each other but not within: no draw changes the figure."""
    strata = [(np.full(9, 2.0), np.ones(9)), (np.full(3, 5.0), np.ones(3))]
    found = ratio_interval(strata)
    assert (found.figure, found.low, found.high) == pytest.approx((2.75, 2.75, 2.75))
    with pytest.raises(ValueError, match="as many values as weights"):
        ratio_interval([])
    with pytest.raises(ValueError, match="as many values as weights"):
        ratio_interval([(np.ones(3), np.ones(2))])


def test_a_bootstrap_of_many_documents_is_as_wide_as_the_error_of_their_mean():
    values = np.random.default_rng(0).normal(size=400)
    found = ratio_interval([(values, np.ones(400))], resamples=4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.06)
    assert found.low < values.mean() < found.high


def test_figures_of_units():
    means = means_by(["a", "b", "a"], [1.0, 5.0, 3.0])
    assert means == {"a": 2.0, "b": 5.0}
    assert differences(means, {"b": 1.0, "c": 0.0}).tolist() == [4.0]
    assert t_interval([1.0, 3.0]).show(1, sign=True) == "+2.0 (-10.7 to +14.7)"
