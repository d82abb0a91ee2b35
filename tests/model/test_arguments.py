"""Arguments of a forward: none is swallowed, and the library's own are taken."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.utils.generic import TransformersKwargs, find_labels

from nirvana.model.arguments import WITHOUT_EFFECT
from nirvana.model.nirvana import NirvanaForCausalLM, NirvanaModel

TOKENS = torch.arange(1, 41)[None] % 61


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("cu_seqlen", "cu_seqlens"),
        ("cu_seqlens_q", "cu_seq_lens_q"),
        ("document_ids", "seq_idx"),
        ("seq_ids", "seq_idx"),
        ("attn_mask", "attention_mask"),
        ("past_key_value", "past_key_values"),
        ("skip_logit", "skip_logits"),
    ],
)
def test_an_unknown_argument_is_refused_with_the_closest(small_model, wrong, meant):
    with pytest.raises(TypeError, match=f"unexpected argument '{wrong}': did you mean '{meant}'"):
        small_model()(TOKENS, **{wrong: None})


def test_the_trunk_refuses_too(small_model):
    with pytest.raises(TypeError, match=r"NirvanaModel\.forward.. got .* 'xyzzy'$"):
        small_model().model(TOKENS, xyzzy=1)


@torch.no_grad()
def test_all_arguments_that_the_library_lists_are_taken(small_model):
    model = small_model()
    expected = model(TOKENS).logits
    for name in TransformersKwargs.__optional_keys__:
        assert torch.equal(model(TOKENS, **{name: None}).logits, expected), name
    for name in WITHOUT_EFFECT:
        assert torch.equal(model(TOKENS, **{name: 1}).logits, expected), name


def test_a_bidirectional_forward_is_refused(small_model):
    with pytest.raises(ValueError, match="is_causal = False is impossible"):
        small_model()(TOKENS, is_causal=False)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_two_names(small_model, name):
    model = small_model()
    expected = model(TOKENS).logits
    first = model(TOKENS[:, :20], use_cache=True)
    assert first.cache is first.past_key_values
    second = model(TOKENS[:, 20:], **{name: first.cache})
    torch.testing.assert_close(second.logits, expected[:, 20:])
    assert second.cache is first.cache
    with pytest.raises(ValueError, match="two names of one argument"):
        model(TOKENS, cache=first.cache, past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_a_cache_without_configuration_gets_the_models_layers(small_model):
    for variant in ({}, {"branches": "linear"}, {"branches": "window", "sliding_window": None}):
        model, cache = small_model(**variant), DynamicCache()
        parts = [model(piece, cache=cache).logits for piece in TOKENS.split([25, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS).logits)
        assert cache.get_seq_length() == 40


@torch.no_grad()
def test_caches_of_other_make_are_refused(small_model):
    model = small_model()
    legacy = ((torch.zeros(1, 3, 4, 16),) * 2,) * 4
    with pytest.raises(TypeError, match="must be a Cache of transformers, not tuple"):
        model(TOKENS, cache=legacy)
    other = DynamicCache(config=small_model(num_hidden_layers=6).config)
    with pytest.raises(ValueError, match="has 6 layers, the model 4"):
        model(TOKENS, cache=other)
    keys_alone = DynamicCache(config=LlamaConfig(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"layer 0 of the cache .* no recurrent state"):
        model(TOKENS, cache=keys_alone)
    cache = model(TOKENS, use_cache=True).cache
    with pytest.raises(ValueError, match="the cache holds 1 rows, the batch has 3"):
        model(TOKENS[:, :1].expand(3, -1), cache=cache)
    cache.reorder_cache(torch.zeros(3, dtype=torch.long))
    assert model(TOKENS[:, :1].expand(3, -1), cache=cache).logits.shape[0] == 3


@torch.no_grad()
@pytest.mark.parametrize("window", [12, None])
def test_a_static_cache_that_is_too_short_is_refused(small_model, window):
    model = small_model(sliding_window=window)
    cache = StaticCache(config=model.config, max_cache_len=8)
    first = model(TOKENS[:, :8], cache=cache).logits  # all that there is room for
    torch.testing.assert_close(first, model(TOKENS[:, :8]).logits)
    with pytest.raises(ValueError, match=r"room for 8 tokens, not for 8 \+ 1"):
        model(TOKENS[:, 8:9], cache=cache)
    if window is not None:  # a cache of the window's length is full and goes on
        cache = StaticCache(config=model.config, max_cache_len=12)
        parts = [model(piece, cache=cache).logits for piece in TOKENS.split([10, 20, 10], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS).logits)


@torch.no_grad()
def test_no_token_at_all(small_model):
    model = small_model()
    cache = model(TOKENS, use_cache=True).cache
    for given in ({}, {"cache": cache}, {"attention_mask": torch.ones(1, 0)}):
        assert model(TOKENS[:, :0], **given).logits.shape == (1, 0, 61)
    assert cache.get_seq_length(2) == 40


class _Doubled(nn.Linear):
    """A head of one's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def _replaced(model):
    head = _Doubled(48, 61, bias=False).double()
    head.weight = model.lm_head.weight
    model.lm_head = head


def _with_bias(model):
    head = nn.Linear(48, 61).double()
    model.lm_head = head


def _hooked(model):
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: 3 * output)


def _parametrised(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(1.5)


@pytest.mark.parametrize("change", [None, _replaced, _with_bias, _hooked, _parametrised])
def test_skip_logits_computes_the_head_that_is_there(small_model, change):
    model = small_model(tie_word_embeddings=False)
    if change is not None:
        change(model)

    def loss_and_gradients(**settings):
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS, **settings).loss
        loss.backward()
        return loss.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters()}

    torch.testing.assert_close(loss_and_gradients(skip_logits=True), loss_and_gradients())
    assert model(TOKENS, labels=TOKENS, skip_logits=True).logits is None


@pytest.mark.parametrize("target", ["lm_head", "saved"])
def test_skip_logits_sees_an_adapter_of_the_head(small_model, target):
    from peft import LoraConfig, get_peft_model

    how = (
        {"target_modules": ["lm_head"]}
        if target == "lm_head"
        else {"target_modules": ["in_proj"], "modules_to_save": ["lm_head"]}
    )
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **how)
    model = get_peft_model(small_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.3)

    def loss_and_gradients(**settings):
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS, **settings).loss
        loss.backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        return loss.detach().float(), trained

    skipped, plain = loss_and_gradients(skip_logits=True), loss_and_gradients()
    torch.testing.assert_close(skipped, plain)
    assert any(gradient.any() for gradient in plain[1].values())


def test_signatures_name_what_generation_looks_for():
    """`generate` refuses arguments that no signature names, PEFT looks its cache up there."""
    from inspect import signature

    for forward in (NirvanaForCausalLM.forward, NirvanaModel.forward):
        assert {"cache", "past_key_values", "attention_mask"} <= signature(
            forward
        ).parameters.keys()


def test_the_trainer_finds_one_kind_of_labels(small_model):
    """It evaluates the loss only of batches that hold all labels in the signature."""
    assert find_labels(NirvanaForCausalLM) == ["labels"]
    model = small_model()
    shifted = torch.cat([TOKENS[:, 1:], torch.full((1, 1), -100)], dim=1)
    expected = model(TOKENS, labels=TOKENS).loss
    for settings in ({}, {"skip_logits": True}):
        loss = model(TOKENS, shift_labels=shifted, **settings).loss
        torch.testing.assert_close(loss.float(), expected.float())
