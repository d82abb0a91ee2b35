"""Log-likelihoods of tokens: the same in pieces, in batches and in one forward pass."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana.evaluate.likelihood import batches, token_log_likelihoods


def direct(model, tokens):
    """-ln p of every token but the first, and the most likely tokens, from one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor(tokens)[None], use_cache=False).logits[0, :-1].float()
    nll = -logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    return nll.double(), logits.argmax(-1)


@pytest.mark.parametrize("piece", [1, 7, 12, 40, 41, 1000])
def test_pieces_are_the_whole(small_model, piece):
    """Beyond the window of 12, over its border, and with a last piece of one token."""
    model = small_model()
    tokens = torch.randint(61, (42,)).tolist()
    ((nll, _),) = token_log_likelihoods(model, [tokens], piece=piece)
    assert nll.shape == (41,)
    assert torch.allclose(nll, direct(model, tokens)[0], atol=1e-5)


def test_other_models_are_read_in_pieces_too():
    """Models of the library name their cache otherwise than its newest outputs."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    tokens = torch.randint(61, (42,)).tolist()
    ((nll, _),) = token_log_likelihoods(model, [tokens], piece=7)
    assert torch.allclose(nll, direct(model, tokens)[0], atol=1e-5)


@pytest.mark.parametrize("start", [1, 7, 8, 41])
@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_scores_from_the_middle_on(small_model, start, piece, batch_size):
    model = small_model()
    tokens = torch.randint(61, (42,)).tolist()
    tokens[20] = int(direct(model, tokens)[1][19])  # at least one token is the most likely one
    expected, best = direct(model, tokens)
    rows, starts = [tokens, tokens[:9], tokens], [start, 3, 1]
    scores = token_log_likelihoods(model, rows, starts, batch_size, piece=piece)
    assert [len(nll) for nll, _ in scores] == [42 - start, 6, 41]
    nll, is_argmax = scores[0]
    assert torch.allclose(nll, expected[start - 1 :], atol=1e-5)
    assert torch.equal(is_argmax, (best == torch.tensor(tokens)[1:])[start - 1 :])
    assert start > 20 or is_argmax[20 - start]


@pytest.mark.parametrize("fields", [{}, {"gate": "input"}, {"branches": "linear"}])
@pytest.mark.parametrize("batch_tokens", [1, 300, 10000])
@pytest.mark.parametrize("piece", [100, 2048])
def test_rows_in_batches_are_rows_alone(small_model, fields, batch_tokens, piece):
    model = small_model(**fields)
    rows = [torch.randint(61, (n,)).tolist() for n in (2, 150, 129, 130, 7, 300)]
    together = token_log_likelihoods(
        model, rows, batch_size=len(rows), batch_tokens=batch_tokens, piece=piece
    )
    assert [len(nll) for nll, _ in together] == [len(row) - 1 for row in rows]
    for batched, alone in zip(together, token_log_likelihoods(model, rows), strict=True):
        torch.testing.assert_close(batched.nll, alone.nll, rtol=1e-5, atol=1e-6)
        assert torch.equal(batched.is_argmax, alone.is_argmax)


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("batch_size", [2, 100])
def test_batches_hold_every_row_once_and_keep_their_limits(bucketed, batch_size):
    lengths = [1, 128, 129, 2000, 5, 128, 256]
    found = list(batches(lengths, batch_size, 512, bucketed))
    assert sorted(i for _, batch in found for i in batch) == list(range(7))
    for length, batch in found:
        assert len(batch) <= batch_size
        assert len(batch) == 1 or length * len(batch) <= 512
        assert all(lengths[i] <= length for i in batch)
        assert bucketed or length == max(lengths[i] for i in batch)
    if bucketed:
        assert {length for length, _ in found} == {128, 256, 2048}
    elif batch_size == 100:
        assert [sorted(lengths[i] for i in batch) for _, batch in found] == [
            [1, 5, 128, 128],
            [129, 256],
            [2000],
        ]
