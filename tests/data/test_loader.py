"""The loader: rows follow from the seed and the step, and nothing leaks between documents."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana.data.loader import IGNORE, PERIOD, PackedLoader, ReadAhead
from nirvana.errors import InputError

EOS = 1


def test_a_batch_depends_on_seed_and_step_alone(make_shards):
    sources = {"a": make_shards([5, 9, 30]), "b": make_shards([7] * 9, first=500)}

    def loader(seed):
        return PackedLoader(sources, 16, 3, seed, parts=2)

    ordered = [loader(1).batch(step, part) for step in range(6) for part in range(2)]
    one = loader(1)
    for step, part in ((5, 1), (0, 0), (3, 1), (10**9, 0), (2, 0)):
        again = one.batch(step, part)
        if step < 6:
            first = ordered[2 * step + part]
            assert all(torch.equal(again[name], first[name]) for name in first)
    others = [loader(2).batch(step)["input_ids"] for step in range(6)]
    assert any(
        not torch.equal(a["input_ids"], b) for a, b in zip(ordered[::2], others, strict=True)
    )
    # One step of two parts is one step of a double batch.
    double = PackedLoader(sources, 16, 6, 1).batch(2)
    both = torch.cat([ordered[4]["input_ids"], ordered[5]["input_ids"]])
    assert torch.equal(double["input_ids"], both)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    T=st.integers(1, 25),
    seed=st.integers(0, 10**9),
)
def test_rows_are_those_of_a_slow_twin(make_shards, lengths, T, seed):
    shards = make_shards(lengths)
    num_rows = -(-sum(lengths) // T)
    loader = PackedLoader({"a": shards}, T, num_rows, seed)
    for epoch in range(2):
        plan = loader._epoch(0, epoch)
        assert sorted(plan.order) == list(range(len(lengths)))
        assert sorted(plan.rows) == list(range(num_rows))
        expected = slow_rows([shards.document(i) for i in plan.order], T)
        batch = loader.batch(epoch)
        for i, row in enumerate(plan.rows):
            for name, values in expected[row].items():
                assert batch[name][i].tolist() == values


def slow_rows(documents, T):
    """Token by token: (token, the one after it in its document, whether a document begins)."""
    stream = [
        (int(token), int(document[i + 1]) if i + 1 < len(document) else IGNORE, i == 0)
        for document in documents
        for i, token in enumerate(document)
    ]
    rows = []
    for begin in range(0, len(stream), T):
        stretch = stream[begin : begin + T]
        padding = T - len(stretch)
        positions = []
        for _, _, begins in stretch:
            positions.append(0 if begins or not positions else positions[-1] + 1)
        rows.append(
            {
                "input_ids": [token for token, _, _ in stretch] + [EOS] * padding,
                "labels": [after for _, after, _ in stretch] + [IGNORE] * padding,
                "position_ids": positions + list(range(padding)),
            }
        )
    return rows


def test_every_target_is_learned_once_per_epoch(make_shards):
    """Rows cut documents, but no target of a document is lost at a cut."""
    shards = make_shards([50, 3, 2, 17, 90])
    batch = PackedLoader({"a": shards}, 8, -(-162 // 8), 0).batch(0)
    labels = batch["labels"].numpy()
    targets = np.concatenate([shards.document(i)[1:] for i in range(len(shards))])
    assert np.array_equal(np.sort(labels[labels != IGNORE]), np.sort(targets))
    inputs = batch["input_ids"].numpy()[labels != IGNORE]
    follows = dict(zip(inputs, labels[labels != IGNORE], strict=True))
    document = shards.document(4)
    assert all(follows[a] == b for a, b in pairwise(document[1:]))


def test_epochs_differ(make_shards):
    loader = PackedLoader({"a": make_shards([8] * 30)}, 16, 15, 0)
    first, second = (loader.batch(step)["input_ids"] for step in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten().sort()[0], second.flatten().sort()[0])


def test_mixing(make_shards):
    a, b = make_shards([10] * 6), make_shards([10] * 9, first=1000)
    c = make_shards([10], first=2000)
    sources = {"a": a, "b": b, "c": c}

    def share(loader):
        ids = loader.batch(0)["input_ids"][:, 1]
        return [float(((ids >= low) & (ids < low + 900)).float().mean()) for low in (2, 1000, 2000)]

    weights = {"a": 3.0, "b": 1.0, "c": 0.0}
    assert share(PackedLoader(sources, 10, PERIOD, 0, weights)) == [0.75, 0.25, 0.0]
    natural = share(PackedLoader(sources, 10, PERIOD, 0))
    assert np.allclose(natural, [6 / 16, 9 / 16, 1 / 16], atol=1 / PERIOD)
    # Evenly mixed: no stretch of 16 rows strays far from 12 and 4.
    ids = PackedLoader(sources, 10, PERIOD, 0, weights).batch(0)["input_ids"][:, 1]
    counts = (ids < 1000).float().view(-1, 16).sum(1)
    assert counts.min() >= 10
    assert counts.max() <= 14


def test_sources_of_two_tokenizers_are_refused(make_shards):
    a, b = make_shards([10]), make_shards([10])
    b.tokenizer_sha256 = "other"
    with pytest.raises(InputError, match="different tokenizers"):
        PackedLoader({"a": a, "b": b}, 8, 1, 0)


def test_without_reset_a_row_is_one_sample(make_shards):
    sources = {"a": make_shards([5, 9, 30])}
    reset, through = (PackedLoader(sources, 16, 2, 0, reset=r).batch(1) for r in (True, False))
    assert (through["position_ids"] == torch.arange(16)).all()
    assert (reset["position_ids"] == 0).sum() > 2
    for name in ("input_ids", "labels"):
        assert torch.equal(reset[name], through[name])


def test_reading_ahead_changes_no_batch(make_shards):
    loader = PackedLoader({"a": make_shards([5, 9, 30])}, 8, 1, 0, parts=4)
    ahead = ReadAhead(loader.batch, 3)
    for step, part in [(0, 1), (0, 3), (1, 1), (1, 3), (2, 1), (9, 0), (3, 1)]:
        found, expected = ahead.get(step, part), loader.batch(step, part)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_equal_positions_mean_equal_data(make_shards):
    a, b = make_shards([5, 9, 30]), make_shards([5, 9, 31])

    def position(shards, step=3, seed=0, **more):
        return PackedLoader({"a": shards}, 8, 2, seed, **more).position(step)

    assert position(a) == position(a)
    assert position(a)["next_row"] == position(a, step=1, parts=3)["next_row"] == 6
    others = [position(b), position(a, 4), position(a, seed=1), position(a, reset=False)]
    assert position(a) not in others


@pytest.mark.parametrize("what", ["vanished", "cut"])
def test_a_shard_that_changes_under_way_is_named(make_shards, what):
    shards = make_shards([5, 9, 30])
    file = shards.folder / "tokens-00000.bin"
    if what == "vanished":
        file.unlink()
    else:
        shards.document(0)
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match=r"tokens-00000\.bin: (can no longer be read|was cut)"):
        shards.document(2)
