"""Bits per byte: what the definition says, whatever the pieces."""

import json
import math

import pytest
import torch

from nirvana.errors import InputError
from nirvana.evaluate.perplexity import (
    Score,
    byte_entropy,
    score_documents,
    score_files,
    score_tokens,
)
from nirvana.train.tokenize import load_tokenizer, train_tokenizer

TEXTS = ["The cat sat on the mat.", "Zwölf <|eos|> 日本 " * 5, "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("The cat sat on the mat. " * 9)
    train_tokenizer([folder / "a.txt"], folder / "tokenizer", 280)
    return load_tokenizer(folder / "tokenizer")


@pytest.fixture
def model(small_model):
    return small_model(vocab_size=280)


def direct(model, tokens):
    """-ln p of every token but the first, from one forward pass."""
    with torch.no_grad():
        p = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    return torch.tensor([-float(p[t, token]) for t, token in enumerate(tokens[1:])]).double()


@pytest.mark.parametrize("piece", [1, 7, 12, 40, 41, 1000])
def test_pieces_are_the_whole(model, piece):
    """Beyond the window of 12, over its border, and with a last piece of one token."""
    tokens = torch.randint(280, (42,))
    costs = score_tokens(model, tokens, piece)
    assert costs.shape == (41,)
    assert torch.allclose(costs, direct(model, tokens), atol=1e-5)


def test_documents(model, tokenizer):
    scores = list(score_documents(model, tokenizer, TEXTS, piece=16))
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.eos_token_id not in ids
        costs = direct(model, torch.tensor([tokenizer.bos_token_id, *ids]))
        assert math.isclose(score.nats, float(costs.sum()), rel_tol=1e-5)
        assert (score.tokens, score.bytes, score.documents) == (len(ids), len(text.encode()), 1)
        expected = float(costs.sum()) / math.log(2) / len(text.encode())
        assert math.isclose(score.bits_per_byte, expected, rel_tol=1e-5)
        assert math.isclose(score.perplexity, float(costs.mean().exp()), rel_tol=1e-5)


def test_documents_do_not_know_of_each_other(model, tokenizer):
    forward = [score.nats for score in score_documents(model, tokenizer, TEXTS)]
    backward = [score.nats for score in score_documents(model, tokenizer, TEXTS[::-1])]
    assert forward == backward[::-1]


def test_a_model_that_knows_nothing(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    total = sum(score_documents(model, tokenizer, TEXTS), Score())
    assert math.isclose(total.perplexity, 280, rel_tol=1e-5)
    expected = total.tokens * math.log2(280) / total.bytes
    assert math.isclose(total.bits_per_byte, expected, rel_tol=1e-6)


def test_files(model, tokenizer, tmp_path):
    for name, texts in (("a.jsonl", TEXTS), ("b.jsonl", TEXTS[:1])):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / name).write_text("".join(lines))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    scores = score_files(model, tokenizer, [a, b])
    assert [score.documents for score in scores.values()] == [3, 1, 4]
    assert scores["total"] == scores[str(a)] + scores[str(b)]
    assert score_files(model, tokenizer, [a], limit=1)[str(a)] == scores[str(b)]
    with pytest.raises(InputError, match="no such file"):
        score_files(model, tokenizer, [a, tmp_path / "c.jsonl"])


def test_nothing_to_score(model, tokenizer):
    with pytest.raises(ValueError, match="empty document"):
        list(score_documents(model, tokenizer, [""]))
    empty = Score().to_dict()
    assert empty["bits_per_byte"] is None
    assert empty["perplexity"] is None


def test_byte_entropy_is_that_of_the_frequencies():
    expected = -(2 / 4 * math.log2(2 / 4) + 2 * 1 / 4 * math.log2(1 / 4))  # a a, then two bytes
    assert math.isclose(byte_entropy(["aa", "é"]), expected)
    assert byte_entropy(["aaaa"]) == 0.0
