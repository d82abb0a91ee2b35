"""Bits per byte: equal to the definition, whatever the pieces."""

import json
import math

import pytest
import torch

from nirvana.data.tokenizer import aligned_encoder, text_encoder
from nirvana.errors import InputError
from nirvana.evaluate.perplexity import (
    Score,
    by_position,
    byte_entropy,
    read_files,
    read_scores,
    score_documents,
    score_files,
)

TEXTS = ["The cat sat on the mat.", "Zwölf <|eos|> 日本 " * 5, "a"]


@pytest.fixture
def model(small_model):
    return small_model(vocab_size=280)


def direct(model, tokens):
    """-ln p of every token but the first, from one forward pass."""
    with torch.no_grad():
        p = model(tokens[None], use_cache=False).logits[0].float().log_softmax(-1)
    return torch.tensor([-float(p[t, token]) for t, token in enumerate(tokens[1:])]).double()


def test_positions_sum_to_the_whole(model, tokenizer):
    """The ranges sum to the document in nats, tokens and bytes, and each is reached once."""
    texts = [*TEXTS, "Zwölf 日本 and more of it. " * 40]
    for score in read_scores(model, tokenizer, texts):
        whole = sum(score.positions.values(), Score())
        assert math.isclose(whole.nats, score.total.nats, rel_tol=1e-9)
        assert (whole.tokens, whole.bytes) == (score.total.tokens, score.total.bytes)
        assert all(part.documents == 1 for part in score.positions.values())
        assert list(score.positions) == [0, 64, 128, 256, 512, 1024][: len(score.positions)]
    assert len(score.positions) == 6


def test_losses_by_position_count_every_token_once():
    nll = torch.zeros(200).double()
    nll[[63, 64, 130]] = torch.tensor([1.0, 2.0, 4.0]).double()
    scores = by_position(nll, range(200))
    assert {start: (s.nats, s.tokens) for start, s in scores.items()} == {
        0: (1.0, 64),
        64: (2.0, 64),
        128: (4.0, 72),
    }
    assert scores[64].bytes == sum(range(64, 128))


def test_bytes_of_tokens(tokenizer):
    encode, aligned = text_encoder(tokenizer), aligned_encoder(tokenizer)
    for text in [*TEXTS, "The cat sat. " * 900, "\n\n日\t🙂  x "]:
        ids, sizes = aligned(text)
        assert ids == encode([text])[0]
        assert sum(sizes) == len(text.encode())
    ids, sizes = aligned("The cat")
    assert sizes == [len(tokenizer.decode([token])) for token in ids]


def test_documents(model, tokenizer):
    scores = list(score_documents(model, tokenizer, TEXTS, piece=16))
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokenizer.eos_token_id not in ids
        nll = direct(model, torch.tensor([tokenizer.bos_token_id, *ids]))
        assert math.isclose(score.nats, float(nll.sum()), rel_tol=1e-5)
        assert (score.tokens, score.bytes, score.documents) == (len(ids), len(text.encode()), 1)
        expected = float(nll.sum()) / math.log(2) / len(text.encode())
        assert math.isclose(score.bits_per_byte, expected, rel_tol=1e-5)
        assert math.isclose(score.perplexity, float(nll.mean().exp()), rel_tol=1e-5)


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
    found = read_files(model, tokenizer, {"law": a, "novels": b})
    assert found["law"].total == scores[str(a)]
    assert found["law"].documents[:1] == found["novels"].documents
    assert found["law"].positions[0].documents == 3
    assert found["law"].sha256 != found["novels"].sha256
    same = read_files(model, tokenizer, {"x": a}, limit=1)["x"]
    assert same.sha256 == found["novels"].sha256
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
