"""Rows read together are what each says alone."""

import pytest
import torch

from nirvana.evaluate.batched import batches, read_rows
from nirvana.evaluate.perplexity import read_tokens


@pytest.mark.parametrize("fields", [{}, {"gate": "input"}, {"branches": "linear"}])
@pytest.mark.parametrize("batch_tokens", [1, 300, 10000])
def test_rows_together_are_rows_alone(small_model, fields, batch_tokens):
    model = small_model(**fields)
    rows = [torch.randint(61, (n,)).tolist() for n in (2, 150, 129, 130, 7, 300)]
    answers = read_rows(model, rows, batch_tokens)
    assert [len(costs) for costs, _ in answers] == [len(row) - 1 for row in rows]
    for row, (costs, hits) in zip(rows, answers, strict=True):
        expected, right = read_tokens(model, torch.tensor(row))
        torch.testing.assert_close(costs, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(hits, right)


def test_batches_hold_every_row_once_and_no_more_tokens_than_asked():
    lengths = [1, 128, 129, 2000, 5, 128, 256]
    found = list(batches(lengths, 512))
    assert sorted(i for _, group in found for i in group) == list(range(7))
    assert {length for length, _ in found} == {128, 256, 2048}
    for length, group in found:
        assert len(group) == 1 or length * len(group) <= 512
        assert all(lengths[i] <= length for i in group)
