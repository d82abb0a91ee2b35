"""The step on a CPU computes the forward pass, and plain `generate` takes it where it may."""

import logging
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from nirvana.generate import graph_decoder
from nirvana.generate.cpu_parts import FEW, Product
from nirvana.generate.cpu_step import CpuStep
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.assets import load_language_model
from nirvana.model.trigger import without_trigger

NEW = 75
"""Tokens beyond a window, and beyond a block of the slots that attention reads."""
SETTINGS = [
    {},
    {"trigger_decay": 0.0},
    {"trigger_decay_learnable": True, "trigger_lr_learnable": True, "task_dim": 7, "bank_size": 5},
    {"interpolation": "independent", "trigger_gradient": "truncated", "intermediate_size": 41},
    {"window_output": "full", "conv_size": 2, "conv_silu": False, "head_dim": 4},
    {"sliding_window": 70},
    {"sliding_window": None},
]


def padded_on_the_left(tokens, lengths):
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lengths", [[9], [12, 12], [1, 31, 3]], ids=str)
def test_is_the_forward_pass(small_model, settings, lengths):
    model = small_model(**settings)
    tokens, mask = padded_on_the_left(torch.randint(1, 61, (len(lengths), max(lengths))), lengths)
    following = torch.randint(1, 61, (len(lengths), NEW))
    decoder = Decoder(model, max_length=120)
    logits = [decoder.prefill(tokens, mask)]
    logits += [decoder.step(token).clone() for token in following.split(1, dim=1)]
    assert isinstance(decoder.fused, CpuStep)
    for row, length in enumerate(lengths):
        text = torch.cat([tokens[row, -length:], following[row]])
        with torch.no_grad():
            expected = model(text[None]).logits[0, length - 1 :]
        torch.testing.assert_close(torch.stack(logits, 1)[row], expected)


@pytest.mark.parametrize("adds", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("texts", [1, FEW, FEW + 2])
def test_a_product_has_its_texts_as_rows(threads, texts, adds):
    x, weight, out = torch.randn(texts, 14)[:, :7], torch.randn(9, 7), torch.randn(texts, 12)
    before, used = out.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        product = Product(x, out[:, :9], adds)
        product.take(weight)
        product()
    finally:
        torch.set_num_threads(used)
    assert (product.columns is None) == (texts == 1 or (threads == 1 and texts > FEW))
    expected = x @ weight.T + (before[:, :9] if adds else 0)
    torch.testing.assert_close(out[:, :9], expected)
    torch.testing.assert_close(out[:, 9:], before[:, 9:], rtol=0, atol=0)


@pytest.mark.parametrize("context", [nullcontext, without_trigger], ids=["trigger", "without"])
def test_the_packaged_model_in_float32(context):
    model, _ = load_language_model("tiny", torch.device("cpu"))
    tokens = torch.randint(3, 8192, (2, 300), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model)
    with torch.no_grad(), context(*[model][: context is without_trigger]):
        expected = model(tokens).logits[:, 39:]
        logits = [decoder.prefill(tokens[:, :40])]
        logits += [decoder.step(token).clone() for token in tokens[:, 40:].split(1, dim=1)]
    error = (torch.stack(logits, 1) - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.fixture
def decoders(monkeypatch):
    """The decoders that plain `generate` makes."""
    made = []

    class Recorded(Decoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(graph_decoder, "Decoder", Recorded)
    return made


LIBRARY = [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}]


@pytest.mark.parametrize("how", LIBRARY, ids=str)
def test_plain_generate_takes_it(small_model, decoders, how):
    """Prompts of several lengths, one of which ends early."""
    model = small_model()
    tokens, mask = padded_on_the_left(torch.randint(1, 61, (3, 23)), [23, 9, 1])
    how = {"max_new_tokens": 20, "pad_token_id": 0, "attention_mask": mask, **how}
    for end in (None, 25):
        torch.manual_seed(1)
        cache = DynamicCache(config=model.config)
        expected = model.generate(tokens, past_key_values=cache, **how)
        assert not decoders
        torch.manual_seed(1)
        actual = model.generate(tokens, **how)
        assert isinstance(decoders.pop().fused, CpuStep)
        assert torch.equal(actual, expected)
        how["eos_token_id"] = int(expected[0, 25])
        assert end is None or actual.shape == expected.shape


def test_follows_weights_between_calls(small_model):
    model, tokens = small_model(), torch.randint(1, 61, (1, 12))
    decoder = Decoder(model)
    for _ in range(2):
        decoder.prefill(tokens)
        with torch.no_grad():
            expected = model(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1]
        torch.testing.assert_close(decoder.step(tokens[:, :1]), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)


def test_training_goes_on_after_a_generation(small_model):
    model, tokens = small_model().train(), torch.randint(1, 61, (1, 12))

    def gradients():
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    model.generate(tokens, max_new_tokens=5, pad_token_id=0)
    torch.testing.assert_close(gradients(), before, rtol=0, atol=0)


def jumping(tokens):
    return {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}


ELSEWHERE = {
    "returned": lambda tokens: {"return_dict_in_generate": True},
    "static": lambda tokens: {"cache_implementation": "static"},
    "in pieces": lambda tokens: {"prefill_chunk_size": 3},
    "no cache": lambda tokens: {"use_cache": False},
    "packed": jumping,
    "numbered": lambda tokens: {"seq_idx": torch.zeros_like(tokens)},
    "padded on the right": lambda tokens: {"attention_mask": torch.arange(8)[None] < 7},
}


@pytest.mark.parametrize("how", ELSEWHERE.values(), ids=list(ELSEWHERE))
def test_other_calls_use_the_librarys_cache(small_model, decoders, how):
    model, tokens = small_model(), torch.randint(1, 61, (1, 8))
    model.generate(tokens, max_new_tokens=1, pad_token_id=0, **how(tokens))
    assert not decoders


def hooked(model):
    model.model.norm.register_forward_hook(lambda *args: None)
    return model


OTHERS = {
    "hooks": ({}, hooked),
    "no window": ({"sliding_window": None}, lambda model: model),
    "num_sinks = 2": ({"num_sinks": 2}, lambda model: model),
    "float32 or float64": ({}, lambda model: model.bfloat16()),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_models_use_the_librarys_cache(small_model, decoders, caplog, reason):
    settings, change = OTHERS[reason]
    model, tokens = change(small_model(**settings)), torch.randint(1, 61, (1, 8))
    graph_decoder._log_refusal.cache_clear()
    with caplog.at_level(logging.INFO, logger="nirvana"):
        for _ in range(2):
            model.generate(tokens, max_new_tokens=2, pad_token_id=0)
    assert not decoders
    assert [reason in record.getMessage() for record in caplog.records] == [True]
