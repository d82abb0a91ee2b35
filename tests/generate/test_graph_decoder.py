"""`Decoder`: token by token it is the forward pass, and `generate` takes it as a cache."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from nirvana.generate import graph_decoder
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.trigger import without_trigger

NEW = 20


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(graph_decoder, "PREFILL_CHUNK", 10)


def tokens_of(B, T):
    return torch.randint(1, 61, (B, T))


VARIANTS = [{}, {"rope_theta": 100.0}, {"sliding_window": None}, {"trigger_decay": 0.0}]


@pytest.mark.parametrize("length", [1, 9, 10, 12, 25, 41])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_is_the_forward_pass(small_model, settings, length):
    model = small_model(**settings)
    tokens = tokens_of(2, length + NEW)
    with torch.no_grad():
        expected = model(tokens).logits[:, length - 1 :]
    decoder = Decoder(model, max_length=100)
    logits = [decoder.prefill(tokens[:, :length])]
    logits += [decoder.step(tokens[:, t : t + 1]).clone() for t in range(length, length + NEW)]
    torch.testing.assert_close(torch.stack(logits, 1), expected)
    assert decoder.get_seq_length() == length + NEW


def test_forgets_one_text_at_the_next(small_model):
    model = small_model()
    first, second = tokens_of(2, 30), tokens_of(2, 17)
    used = Decoder(model)
    used.prefill(first)
    used.step(first[:, :1])
    fresh = Decoder(model)
    torch.testing.assert_close(used.prefill(second), fresh.prefill(second))
    torch.testing.assert_close(used.step(second[:, :1]), fresh.step(second[:, :1]))
    one = tokens_of(1, 5)  # another number of rows
    torch.testing.assert_close(used.prefill(one), Decoder(model).prefill(one))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_generate_takes_it_as_a_cache(small_model, settings):
    model = small_model(**settings)
    tokens = tokens_of(2, 23)
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    cache = DynamicCache(config=model.config)
    expected = model.generate(tokens, past_key_values=cache, **how)
    decoder = Decoder(model, max_length=100)
    assert torch.equal(model.generate(tokens, past_key_values=decoder, **how), expected)


def padded_on_the_left(tokens, lengths):
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("settings", [*VARIANTS, {"num_sinks": 2, "rope_theta": 100.0}], ids=str)
def test_each_prompt_is_read_as_if_alone(small_model, settings):
    """Lengths on both sides of the pieces' borders, of the window, and of one token."""
    model, lengths = small_model(**settings), [41, 3, 1, 17, 40]
    tokens, mask = padded_on_the_left(tokens_of(5, 41), lengths)
    following = tokens_of(5, NEW)
    together = Decoder(model, max_length=100)
    logits = [together.prefill(tokens, mask)]
    logits += [together.step(token).clone() for token in following.split(1, dim=1)]
    for row, length in enumerate(lengths):
        text = torch.cat([tokens[row, -length:], following[row]])
        with torch.no_grad():
            expected = model(text[None]).logits[0, length - 1 :]
        torch.testing.assert_close(torch.stack(logits, 1)[row], expected)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_generate_with_prompts_of_several_lengths(small_model, how):
    """One of them ends early."""
    model = small_model()
    tokens, mask = padded_on_the_left(tokens_of(3, 23), [23, 9, 1])
    how = {"max_new_tokens": NEW, "pad_token_id": 0, "attention_mask": mask, **how}
    how["do_sample"] = "num_return_sequences" in how
    torch.manual_seed(1)
    free = model.generate(tokens, **how)
    how["eos_token_id"] = int(free[0, 25])
    torch.manual_seed(1)
    cache = DynamicCache(config=model.config)
    expected = model.generate(tokens, past_key_values=cache, **how)
    torch.manual_seed(1)
    assert torch.equal(model.generate(tokens, past_key_values=Decoder(model), **how), expected)


def test_a_smaller_length_takes_less_memory(small_model):
    model, tokens = small_model(sliding_window=64), tokens_of(2, 12)
    short, whole = Decoder(model, max_length=20), Decoder(model)
    for _ in range(2):  # a second text is read in the same memory
        torch.testing.assert_close(short.prefill(tokens), whole.prefill(tokens))
        for token in tokens_of(2, 8).split(1, dim=1):
            torch.testing.assert_close(short.step(token), whole.step(token))
    assert short.states[-1].keys.shape[2] == 20
    assert whole.states[-1].keys.shape[2] == 64


def test_reads_weights_that_changed(small_model):
    model = small_model()
    tokens = tokens_of(1, 12)
    decoder = Decoder(model)
    before = decoder.prefill(tokens)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert not torch.allclose(decoder.prefill(tokens), before)


def test_follows_triggers_that_are_switched(small_model):
    model, tokens = small_model(), tokens_of(1, 14)
    used = Decoder(model)
    for switched in (nullcontext(), without_trigger(model), nullcontext()):
        with switched:
            fresh = Decoder(model)
            used.prefill(tokens), fresh.prefill(tokens)
            torch.testing.assert_close(used.step(tokens[:, :1]), fresh.step(tokens[:, :1]))


def test_what_it_cannot_do_is_refused(small_model):
    model = small_model()
    tokens = tokens_of(2, 8)
    mask = torch.ones_like(tokens)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        model(tokens, attention_mask=mask, past_key_values=Decoder(model))
    with pytest.raises(ValueError, match="padded on the left"):
        model(tokens, attention_mask=0 * mask, past_key_values=Decoder(model))
    with pytest.raises(ValueError, match=r"\[2, 7\], the prompts \[2, 8\]"):
        model(tokens, attention_mask=mask[:, 1:], past_key_values=Decoder(model))
    with pytest.raises(ValueError, match="reads input_ids"):
        model(inputs_embeds=model.model.embed_tokens(tokens), past_key_values=Decoder(model))
    with pytest.raises(ValueError, match="cannot forget"):
        Decoder(model).crop(3)
    unlimited = small_model(sliding_window=None)
    with pytest.raises(ValueError, match="needs max_length"):
        Decoder(unlimited)
    with pytest.raises(ValueError, match="max_length above 8"):
        Decoder(unlimited, max_length=8).prefill(tokens)
    used = Decoder(model)
    used.prefill(tokens)
    longer = torch.cat([torch.ones_like(tokens), mask], 1)
    with pytest.raises(ValueError, match="without padding"):
        model(tokens, attention_mask=longer, past_key_values=used)
    with pytest.raises(ValueError, match="one sample a row"):
        model(tokens, cu_seqlens=torch.tensor([0, 8, 16]), past_key_values=Decoder(model))
    with pytest.raises(ValueError, match="not a loss"):
        model(tokens, labels=tokens, past_key_values=Decoder(model))
    with pytest.raises(ValueError, match="one token for 2 rows"):
        used.step(tokens[:1, :1])
    with pytest.raises(ValueError, match="a text that was read"):
        Decoder(model).step(tokens[:, :1])
    with pytest.raises(ValueError, match="needs a new token"):
        used.read(tokens[:, :0])
    for limited in (unlimited, model):
        full = Decoder(limited, max_length=9)
        full.prefill(tokens)
        full.step(tokens[:, :1])
        with pytest.raises(ValueError, match="max_length = 9"):
            full.step(tokens[:, :1])
