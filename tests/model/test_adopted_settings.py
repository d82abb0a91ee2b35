"""The settings that an adopted Transformer needs: what each of them means."""

import logging

import pytest
import torch
from transformers import LlamaConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from helpers.adopted_settings import ADOPTED, LLAMA3
from nirvana import InputError, NirvanaConfig, NirvanaForCausalLM, preset
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.attention import Rotary, rotate
from nirvana.model.state import State
from nirvana.model.updater import ALIGNED, aligned_linear
from nirvana.ops import dispatch, warn_without_kernels


def tokens_of(B, T):
    return torch.randint(1, 61, (B, T), generator=torch.Generator().manual_seed(0))


def test_defaults_add_nothing():
    """Names and shapes are those of models from before these settings."""
    config = preset("tiny")
    names = {name for name, _ in NirvanaForCausalLM(config).named_parameters()}
    assert not any(".qkv." in name for name in names)
    assert (config.head_sizes, config.qkv_size, config.without_kernels) == ((3, 3, 64), 576, ())
    assert NirvanaForCausalLM(config).model.layers[2].updater.window_up.shape == (3, 12, 192)


@pytest.mark.parametrize("variant", ADOPTED, ids=range(len(ADOPTED)))
def test_the_cache_holds_no_repeated_heads(small_model, variant):
    """Its bytes are those of the state, which the dry run prints."""
    model, rows, T = small_model(**variant), 2, 40
    state = model(tokens_of(rows, T), return_state=True).state
    _, G, K = model.config.head_sizes
    for layer in state.layers:
        if layer.keys is not None:
            assert layer.keys.shape == (rows, G, 11, K)
    planned = State.start(model.config, rows, dtype=torch.float64)
    assert state.num_bytes() == planned.num_bytes()
    cache = model(tokens_of(rows, T), use_cache=True).past_key_values
    kept = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert all(keys.shape[1] == G or keys.shape[-1] == 0 for keys in kept)


def test_room_counts_only_without_a_window():
    open_config = preset("tiny", sliding_window=None)
    sizes = [State.start(open_config, 1, "meta", room=n).num_bytes() for n in (0, 10)]
    assert sizes[1] - sizes[0] == 6 * 2 * 10 * 192 * 4
    closed = [State.start(preset("tiny"), 1, "meta", room=n).num_bytes() for n in (0, 10)]
    assert closed[0] == closed[1]


@pytest.mark.parametrize("rope_theta", [None, 10000.0])
@torch.no_grad()
def test_sinks_reach_beyond_the_window(small_model, rope_theta):
    """One layer of attention: token 0 changes the last token only if it is a sink."""
    changes = {}
    for sinks in (0, 1):
        model = small_model(
            branches="window",
            num_prelude_layers=0,
            num_hidden_layers=1,
            num_sinks=sinks,
            rope_theta=rope_theta,
        )
        tokens = tokens_of(1, 40)
        other = tokens.clone()
        other[0, 0] = (other[0, 0] + 1) % 61
        changes[sinks] = (model(tokens).logits - model(other).logits)[0, -1].abs().max()
    assert changes[0] == 0
    assert changes[1] > 1e-4


@torch.no_grad()
def test_far_sinks_are_seen_at_one_distance(small_model):
    """However long the text, a sink is as far away as the token next to the window: with the same
    tokens in the window the result stays the same."""
    model = small_model(
        branches="window",
        num_prelude_layers=0,
        num_hidden_layers=1,
        num_sinks=2,
        rope_theta=10000.0,
        sliding_window=5,
    )
    start, end = tokens_of(1, 2), tokens_of(1, 5) + 1
    lasts = []
    for middle in (0, 1, 30, 300):
        text = torch.cat([start, torch.full((1, middle), 7), end], dim=1)
        lasts.append(model(text).logits[0, -1])
    for last in lasts[1:]:
        torch.testing.assert_close(last, lasts[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_are_the_window_branchs_alone(small_model):
    """A model whose window branch is switched off does not depend on them."""
    fields = {"num_prelude_layers": 0, "interpolation": "independent", "gate": "constant"}
    plain, turned = (small_model(**fields, rope_theta=theta) for theta in (None, 100.0))
    turned.load_state_dict(plain.state_dict())
    tokens = tokens_of(1, 30)
    assert (plain(tokens).logits - turned(tokens).logits).abs().max() > 1e-3
    for model in (plain, turned):
        for layer in model.model.layers:
            layer.updater.window_kept = torch.zeros(1, 1, 1)
    torch.testing.assert_close(plain(tokens).logits, turned(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("interpolation", ["convex", "independent"])
@torch.no_grad()
def test_a_dropped_window_leaves_the_linear_branch(small_model, interpolation):
    """Row by row: the rows that keep it are as before, and the others do not see it."""
    model = small_model(interpolation=interpolation, gate="constant", num_prelude_layers=0)
    tokens = tokens_of(2, 30)
    before = model(tokens).logits
    updaters = [layer.updater for layer in model.model.layers]
    for updater in updaters:
        updater.window_kept = torch.tensor([1.0, 0.0])[:, None, None]
    after = model(tokens).logits
    torch.testing.assert_close(after[0], before[0])
    for updater in updaters:
        updater.window_out[-1].weight.zero_()
    alone = model(tokens).logits
    torch.testing.assert_close(alone[1], after[1])
    assert (after[1] - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_scaled_positions_are_the_librarys(kind):
    scaling = {
        "llama3": LLAMA3,
        "yarn": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        "linear": {"rope_type": "linear", "factor": 3.0},
    }[kind]
    config = NirvanaConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=3,
        rope_theta=500.0,
        rope_scaling=scaling,
    )
    llama = LlamaConfig(
        hidden_size=64, num_attention_heads=2, rope_parameters={**scaling, "rope_theta": 500.0}
    )
    x, positions = torch.randn(1, 9, 2, 32), torch.arange(9)[None] * 11
    cos, sin = LlamaRotaryEmbedding(llama)(x, positions)
    half = torch.cat([-x[..., 16:], x[..., :16]], dim=-1)
    expected = x * cos[:, :, None] + half * sin[:, :, None]
    rotary = Rotary.of(config)
    assert rotary is not None
    torch.testing.assert_close(rotate(x, positions, rotary), expected, rtol=0, atol=1e-5)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, positions, rotary), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic' must be one of linear"),
        ({"rope_type": "linear"}, "rope_scaling.factor = None must be a number above 0"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "without beta, unknown to linear"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings = None"),
    ],
)
def test_wrong_scalings_are_named(scaling, message):
    with pytest.raises(InputError, match=message):
        preset("tiny", rope_theta=1e4, rope_scaling=scaling)


def test_settings_without_kernels_are_logged_once(monkeypatch, caplog):
    """And never computed by a kernel."""
    config = preset("tiny", conv_size=3, num_sinks=100, sliding_window=8)
    monkeypatch.setattr(dispatch, "suits_kernels", lambda x: True)
    dispatch._warn_of.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            warn_without_kernels(torch.ones(1), 64, config.without_kernels)
    expected = "conv_size = 3, num_sinks = 100, sliding_window = 8"
    assert caplog.messages == [f"no GPU kernel takes {expected}: PyTorch computes them"]
    qkv, borders = torch.ones(1, 9, 3 * 64), (torch.zeros(1, 9), torch.ones(2))
    assert not dispatch.linear_branch_fits(qkv, torch.ones(192, 3), 64, None, None, None)
    assert not dispatch.sink_attention_fits(qkv[..., :64], 100, 16, None, None, None)
    assert not dispatch.sink_attention_fits(qkv[..., :64], 4, 8, None, None, None)
    assert not dispatch.sink_attention_fits(qkv[..., :64], 4, 16, None, None, torch.ones(1))
    adopted = preset("tiny", num_key_value_heads=1, conv_size=None, conv_silu=False, num_sinks=4)
    assert adopted.without_kernels == ()
    assert dispatch.linear_branch_fits(qkv, None, 64, *borders, None)
    assert dispatch.sink_attention_fits(qkv[..., :64], 4, 16, *borders, None)


@pytest.mark.parametrize("variant", ADOPTED, ids=range(len(ADOPTED)))
@torch.no_grad()
def test_static_cache_and_decoder_are_forward(small_model, variant):
    model, tokens = small_model(**variant), tokens_of(2, 45)
    expected = model(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [model(tokens[:, :20], past_key_values=cache, use_cache=True).logits]
    for t in range(20, 45):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)
    if model.config.branches == "window":
        return
    decoder = Decoder(model, max_length=64)
    logits = [decoder.prefill(tokens[:, :20])]
    logits += [decoder.step(tokens[:, t : t + 1]) for t in range(20, 45)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 19:])


@pytest.mark.parametrize("width", [16, 21])
def test_an_aligned_product_is_the_product(width):
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, 12, dtype=torch.float64, requires_grad=True)
    y = aligned_linear(x, weight)
    assert y.shape == (2, 5, width)
    assert y.stride(1) % ALIGNED == 0
    found = torch.autograd.grad(y.square().sum(), (x, weight))
    plain = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain.square().sum(), (x, weight)))
