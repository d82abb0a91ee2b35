"""The linear branch against other people's plain-torch versions of it: values and gradients.

The peers are transformers' Qwen3-Next (its operators, and a whole layer of it with our weights) and
fla's naive functions. They cast to float32 whatever they are given; `exact` lets them compute in
float64, so that a difference of conventions cannot hide behind rounding.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from nirvana import NirvanaConfig
from nirvana.model.updater import Updater
from nirvana.ops import causal_conv, gated_delta_rule, unit, use_backend

try:
    from fla.ops.gated_delta_rule import naive as fla_naive
except ImportError:
    fla_naive = None

# Where fla is installed the library would call its GPU kernels by these names.
PLAIN = {
    name: inspect.unwrap(getattr(qwen3_next, name))
    for name in (
        "torch_chunk_gated_delta_rule",
        "torch_recurrent_gated_delta_rule",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    )
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return getattr(torch, request.param)


@pytest.fixture
def exact(dtype, monkeypatch):
    """What a peer calls float32 is float64 in a test of float64."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            if dtype == torch.float64:
                patch.setattr(torch, "float32", torch.float64)
                patch.setattr(torch, "float", torch.float64)
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return function(*args, **kwargs)

    return call


def qwen3_next_rule(name):
    def rule(q, k, v, log_alpha, beta, state):
        return PLAIN[name](
            q,
            k,
            v,
            g=log_alpha,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    return rule


def fla_rule(name):
    def rule(q, k, v, log_alpha, beta, state):
        given = {"g": log_alpha, "beta": beta, "initial_state": state, "output_final_state": True}
        return getattr(fla_naive, name)(unit(q), unit(k), v, **given)

    return rule


needs_fla = pytest.mark.skipif(fla_naive is None, reason="needs fla-core and Triton")
RULES = [
    pytest.param(qwen3_next_rule("torch_chunk_gated_delta_rule"), id="qwen3_next-chunked"),
    pytest.param(qwen3_next_rule("torch_recurrent_gated_delta_rule"), id="qwen3_next-recurrent"),
    pytest.param(fla_rule("naive_chunk_gated_delta_rule"), id="fla-chunked", marks=needs_fla),
    pytest.param(fla_rule("naive_recurrent_gated_delta_rule"), id="fla-recurrent", marks=needs_fla),
]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 37, 131])
@pytest.mark.parametrize("peer", RULES)
def test_gated_delta_rule(peer, length, with_state, backend, dtype, exact):
    B, H, K, V = 2, 3, 16, 24
    q, k = (torch.randn(B, length, H, K, dtype=dtype) for _ in range(2))
    v = torch.randn(B, length, H, V, dtype=dtype)
    log_alpha = -F.softplus(2 * torch.randn(B, length, H, dtype=dtype))
    beta = torch.rand(B, length, H, dtype=dtype)
    inputs = [q, k, v, log_alpha, beta]
    if with_state:
        inputs.append(torch.randn(B, H, K, V, dtype=dtype))

    def ours(q, k, v, log_alpha, beta, state=None):
        with use_backend(backend):
            return gated_delta_rule(unit(q), unit(k), v, log_alpha, beta, state)

    def theirs(q, k, v, log_alpha, beta, state=None):
        return exact(peer, q, k, v, log_alpha, beta, state)

    assert_same(ours, theirs, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution(length, backend, dtype, exact):
    x, weight = torch.randn(2, length, 6, dtype=dtype), torch.randn(6, 4, dtype=dtype)

    def ours(x, weight):
        with use_backend(backend):
            return causal_conv(x, weight)[:1]

    def theirs(x, weight):
        return (exact(PLAIN["causal_conv1d_fn"], x.mT, weight, activation="silu").mT,)

    assert_same(ours, theirs, [x, weight], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_after_a_state(length, backend, dtype, exact):
    x, weight = torch.randn(2, length, 6, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    state = torch.randn(2, 6, 3, dtype=dtype)

    def ours(x, weight, state):
        with use_backend(backend):
            return causal_conv(x, weight, state)[:1]

    def theirs(x, weight, state):
        y = exact(PLAIN["causal_conv1d_update"], x.mT, state.clone(), weight, activation="silu")
        return (y.mT,)

    assert_same(ours, theirs, [x, weight, state], TOLERANCE[dtype])


D, H, WIDTH = 48, 3, 4


@pytest.fixture
def layers(dtype, monkeypatch):
    """A layer of ours without Trigger, with its weights all at work, and a layer of Qwen3-Next."""
    for name, function in PLAIN.items():
        monkeypatch.setattr(qwen3_next, name, function)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": H}
    ours = Updater(NirvanaConfig(**sizes, num_prelude_layers=1, conv_size=WIDTH), layer_idx=0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = qwen3_next.Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            **sizes,
            linear_num_key_heads=H,
            linear_num_value_heads=H,
            linear_key_head_dim=D // H,
            linear_value_head_dim=D // H,
            linear_conv_kernel_dim=WIDTH,
            rms_norm_eps=ours.out_norm.eps,
            layer_types=["linear_attention", "full_attention"],
        ),
        layer_idx=0,
    )
    return ours.to(dtype), theirs.to(dtype)


def in_their_order(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our parameters as a Qwen3-Next layer names and orders them: by head, then by role."""
    roles = ours["in_proj.weight"][: 4 * D].view(4, H, D // H, D)  # q k v gate
    rates = ours["in_proj.weight"][4 * D :].view(2, H, D)  # beta alpha
    return {
        "in_proj_qkvz.weight": roles.transpose(0, 1).reshape(4 * D, D),
        "in_proj_ba.weight": rates.transpose(0, 1).reshape(2 * H, D),
        "conv1d.weight": ours["conv_weight"][:, None],
        "A_log": ours["A_log"],
        "dt_bias": ours["dt_bias"],
        "norm.weight": ours["out_norm.weight"],
        "out_proj.weight": ours["out_proj.weight"],
    }


@pytest.mark.parametrize("length", [1, 7, 131])
def test_whole_layer(length, layers, dtype, exact):
    ours, theirs = layers
    names, parameters = zip(*ours.named_parameters(), strict=True)

    def run_ours(x, *parameters):
        arguments = (
            x,
            x.new_ones(1),
            None,
            {"segments": None, "cu_seqlens": None, "lengths": None},
        )
        weights = dict(zip(names, parameters, strict=True))
        return (torch.func.functional_call(ours, weights, arguments)[0],)

    def run_theirs(x, *parameters):
        weights = in_their_order(dict(zip(names, parameters, strict=True)))
        return (exact(torch.func.functional_call, theirs, weights, (x,)),)

    x = torch.randn(2, length, D, dtype=dtype)
    assert_same(run_ours, run_theirs, [x, *parameters], 5 * TOLERANCE[dtype])


@torch.no_grad()
def test_whole_layer_step_by_step(layers, dtype, exact):
    """Prefill, then one token at a time, each layer with its own cache."""
    ours, theirs = layers
    theirs.load_state_dict(in_their_order(dict(ours.named_parameters())))
    x = torch.randn(2, 9, D, dtype=dtype)
    config = NirvanaConfig(num_hidden_layers=2, num_prelude_layers=1)
    our_cache, their_cache = DynamicCache(config=config), DynamicCache(config=config)
    for part in x.split([5, 1, 1, 1, 1], dim=1):
        y, _ = ours(
            part,
            x.new_ones(1),
            None,
            {"segments": None, "cu_seqlens": None, "lengths": None},
            our_cache,
        )
        expected = exact(theirs, part, cache_params=their_cache)
        assert_close(y, expected, 5 * TOLERANCE[dtype])


def assert_same(ours, theirs, inputs, tolerance):
    """Compares all outputs, and the gradients to all inputs of one random functional of them."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        torch.manual_seed(1)
        loss = sum((y * torch.randn(y.shape, dtype=y.dtype)).sum() for y in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, leaves)))
    for y, expected in zip(*results, strict=True):
        assert_close(y, expected, tolerance)


def assert_close(y, expected, tolerance):
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    # A gradient may be zero: one token without a past has no use for its decay.
    scale = max(expected.abs().max().item(), 0.1)
    assert (y - expected).abs().max().item() <= tolerance * scale
