"""The paired bootstrap: its interval covers the truth as often as its level, and pairing helps."""

import json

import numpy as np
import pytest

from nirvana.errors import InputError
from nirvana.evaluate.compare import Scores, compare, paired_bootstrap


def scores(values, weights=None, content=""):
    values = np.asarray(values, float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, float)
    return Scores(values, weights, content)


def drawn(random, difference, number=60):
    """Documents of unequal difficulty and size; B needs `difference` bits a byte more."""
    sizes = random.integers(100, 1000, number).astype(float)
    a = sizes * random.normal(1.5, 0.5, number)
    return scores(a, sizes), scores(a + sizes * random.normal(difference, 0.05, number), sizes)


def test_interval_covers_a_known_difference():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = paired_bootstrap([drawn(random, 0.02)], 500, seed)
        assert found.low < found.high
        covered += found.low <= 0.02 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_pairing_sees_what_the_spread_of_documents_would_hide():
    """The gain is a hundredth of the spread between documents."""
    a, b = drawn(np.random.default_rng(1), -0.05)
    found = paired_bootstrap([(a, b)])
    assert found.high < 0
    shuffled = np.random.default_rng(2).permutation(len(b.values))
    rates = (b.values / b.weights)[shuffled] * b.weights
    unpaired = paired_bootstrap([(a, scores(rates, b.weights))])
    assert unpaired.low < 0 < unpaired.high


def test_laws():
    a, b = drawn(np.random.default_rng(3), 0.1)
    there, back = paired_bootstrap([(a, b)]), paired_bootstrap([(b, a)])
    assert there.difference == pytest.approx(b.values.sum() / b.weights.sum() - there.a)
    assert back.difference == pytest.approx(-there.difference)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    same = paired_bootstrap([(a, a)])
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    shifted = paired_bootstrap([(a, scores(a.values + 0.3 * a.weights, a.weights))])
    assert (shifted.low, shifted.high) == pytest.approx((0.3, 0.3))
    assert paired_bootstrap([(a, b)], seed=1).low != there.low


def test_sets_together_are_drawn_set_by_set():
    """Two sets that differ from each other but not within: no draw can change the total."""
    pairs = [(scores([1.0] * 9), scores([2.0] * 9)), (scores([1.0] * 3), scores([5.0] * 3))]
    found = paired_bootstrap(pairs)
    assert (found.difference, found.low, found.high) == pytest.approx((1.75, 1.75, 1.75))
    assert found.number == 12


def test_unequal_documents_are_refused():
    for pairs in ([], [(scores([1.0]), scores([1.0, 2.0]))], [(scores([]), scores([]))]):
        with pytest.raises(ValueError, match="same documents"):
            paired_bootstrap(pairs)


def results(path, bits, sha="x", points=(1, 0, 1), name="law"):
    each = {"bits": bits, "bytes": [8] * len(bits), "sha256": sha}
    tasks = {"mqar@64": {"each": {"metric": "acc", "points": list(points), "sha256": "t"}}}
    files = {name: {"each": each}, "biomed": {"each": {**each, "sha256": "y"}}}
    path.write_text(json.dumps({"files": files, "tasks": tasks}))
    return path


def test_results_of_files(tmp_path):
    a = results(tmp_path / "a.json", [8, 16, 8])
    b = results(tmp_path / "b.json", [16, 24, 16], points=(1, 1, 1))
    found = compare(a, b)
    assert list(found) == ["bits per byte", "acc"]
    assert list(found["bits per byte"]) == ["law", "biomed", "total"]
    for each in found["bits per byte"].values():
        assert (each.difference, each.low, each.high) == pytest.approx((1, 1, 1))
    assert found["acc"]["mqar@64"].difference == pytest.approx(1 / 3)
    assert found["bits per byte"]["total"].number == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[]", "not what"),
        ("{}", "holds no scores"),
        ('{"files": {"law": {"each": {"bits": [1], "bytes": [0], "sha256": ""}}}}', "not what"),
        ('{"files": {"law": {"each": {"bits": [1], "bytes": [8], "sha256": ""}}}}', "not the same"),
        ('{"files": {"b": {"each": {"bits": [1], "bytes": [8], "sha256": ""}}}}', "in common"),
    ],
)
def test_wrong_results(tmp_path, content, message):
    a = results(tmp_path / "a.json", [8, 16])
    b = tmp_path / "b.json"
    if content is not None:
        b.write_text(content)
    with pytest.raises(InputError, match=message):
        compare(a, b)
