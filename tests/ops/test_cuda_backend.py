"""The kernels for half precision on a GPU against the definitions in float64: values, gradients,
borders, and the invariants of a model in bf16. Skips without a GPU."""

from copy import deepcopy

import pytest
import torch

from helpers.adopted_settings import LLAMA3
from nirvana import NirvanaConfig, NirvanaForCausalLM, ops
from nirvana.device import HAS_KERNELS
from nirvana.generate import graph_decoder
from nirvana.generate.fused_step import FusedStep
from nirvana.generate.graph_decoder import Decoder
from nirvana.model.masks import create_masks
from nirvana.model.nirvana import compile_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.skipif(not HAS_KERNELS, reason="needs fla-core and Triton"),
]
TOLERANCE = 2e-2
SIZES = [(2, 131, 2, 128), (1, 517, 3, 64), (2, 512, 2, 128)]  # B, T, H, K


@pytest.fixture(autouse=True)
def _on_gpu():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def borders_of(B, T, packed):
    if not packed:
        return {"segments": None, "cu_seqlens": None}
    segments = (torch.rand(B, T) < 0.02).cumsum(1)
    segments = segments - segments[:, :1]
    config = NirvanaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=1)
    starts = segments.diff(dim=1, prepend=segments[:, :1] - 1) != 0
    count = torch.arange(T).expand(B, T)
    positions = count - torch.where(starts, count, 0).cummax(1).values
    masks = create_masks(config, torch.zeros(B, T, 8), None, None, positions)
    assert torch.equal(masks["segments"], segments)
    return {name: masks[name] for name in ("segments", "cu_seqlens")}


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def compare(operation, inputs, **more):
    """The outputs and the gradients of a random sum of them, bf16 kernels against float64.

    States in `more["fixed"]` need no gradient; `more["exact"]` is the backend that computes in
    float64."""
    fixed, exact = more.pop("fixed", ()), more.pop("exact", "reference")
    outcomes = []
    for backend, dtype in (("cuda", None), (exact, torch.float64)):
        given = {
            name: x
            if x is None
            else x.detach().to(dtype or x.dtype).requires_grad_(name not in fixed)
            for name, x in inputs.items()
        }
        with ops.use_backend(backend):
            outputs = operation(**given, **more)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        given_back = [x for x in outputs if x is not None]
        sum((x * torch.randn(x.shape).to(x.dtype)).sum() for x in given_back).backward()
        grads = {n: x.grad for n, x in given.items() if x is not None and x.requires_grad}
        values = {str(i): x.detach() for i, x in enumerate(outputs) if x is not None and x.numel()}
        outcomes.append(values | grads)
    fast, exact = outcomes
    errors = {name: relative(fast[name], exact[name]) for name in exact}
    assert max(errors.values()) < TOLERANCE, errors


def linear_inputs(B, T, H, K, with_state):
    half = {"dtype": torch.bfloat16}
    return {
        "qkv": torch.randn(B, T, 3 * H * K + 8, **half)[..., : 3 * H * K],
        "conv_weight": torch.randn(3 * H * K, 4, **half) / 2,
        "log_alpha": -torch.nn.functional.softplus(torch.randn(B, T, H) - 3),
        "beta": torch.rand(B, T, H),
        "conv_state": torch.randn(B, 3 * H * K, 3, **half) if with_state else None,
        "state": torch.randn(B, H, K, K) / 8 if with_state else None,
    }


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_branch(size, packed):
    compare(
        ops.linear_branch,
        linear_inputs(*size, False),
        head_dim=size[-1],
        **borders_of(*size[:2], packed),
    )


@pytest.mark.parametrize("fixed", [(), ("conv_state",), ("conv_state", "state")], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_branch_goes_on_from_states(size, fixed):
    """The gradients flow from both last states, and into those of the states that need one."""
    compare(ops.linear_branch, linear_inputs(*size, True), head_dim=size[-1], fixed=fixed)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_samples_go_on_from_states(size):
    """The first samples of some rows do, those of others begin with the row."""
    inputs = linear_inputs(*size, True)
    packed = borders_of(*size[:2], True)
    packed["segments"][-1] += 1
    compare(ops.linear_branch, inputs, head_dim=size[-1], fixed=("conv_state",), **packed)


def test_linear_branch_without_last_states():
    size = SIZES[0]
    compare(ops.linear_branch, linear_inputs(*size, True), head_dim=size[-1], final=False)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_window_branch(size, window, packed):
    B, T, H, K = size
    half = {"dtype": torch.bfloat16}
    inputs = {
        "qkv": torch.randn(B, T, 3 * H * K + 8, **half)[..., : 3 * H * K],
        "low_rank": torch.randn(B, T, 3 * 16, **half),
        "up": torch.randn(3, 16, H * K, **half) / 4,
    }
    compare(ops.window_branch, inputs, head_dim=K, window=window, **borders_of(B, T, packed))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_terms_have_a_kernel_without_gradients(size):
    B, T, H, K = size
    half = {"dtype": torch.bfloat16}
    inputs = [
        torch.randn(B, T, 3 * H * K + 8, **half)[..., : 3 * H * K],
        torch.randn(B, T, 3 * 16, **half),
        torch.randn(3, 16, H * K, **half) / 4,
    ]
    with ops.dispatch.recorded_backends() as used:
        fast = ops.add_low_rank(*inputs, K)
    assert used == {"add_low_rank": ["cuda"]}
    exact = ops.add_low_rank(*(x.double() for x in inputs), K)
    for actual, expected in zip(fast, exact, strict=True):
        assert actual.shape == size
        assert relative(actual, expected) < TOLERANCE
    inputs[2].requires_grad_()
    with ops.dispatch.recorded_backends() as used:
        ops.add_low_rank(*inputs, K)
    assert used == {"add_low_rank": ["chunked"]}


@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_window_attention(size, window):
    heads = {name: torch.randn(size, dtype=torch.bfloat16) for name in "qkv"}
    compare(ops.window_attention, heads, window=window)


@pytest.mark.parametrize(("queries", "past"), [(256, 99), (33, 200), (256, 256)])
def test_window_attention_over_the_past(queries, past):
    q = torch.randn(2, queries, 2, 128, dtype=torch.bfloat16)
    k, v = (torch.randn(2, past + queries, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        fast = ops.window_attention(q, k, v, 100)
        with ops.use_backend("reference"):
            exact = ops.window_attention(*(x.double() for x in (q, k, v)), 100)
    assert relative(fast, exact) < TOLERANCE


@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize(("queries", "past"), [(256, 99), (33, 200), (256, 256)])
def test_gradients_of_attention_over_the_past(queries, past, window):
    inputs = {"q": torch.randn(2, queries, 2, 128, dtype=torch.bfloat16)}
    for name in "kv":
        inputs[name] = torch.randn(2, past + queries, 2, 128, dtype=torch.bfloat16)
    compare(ops.window_attention, inputs, window=window)


SHARED = [(2, 131, 4, 2, 128), (1, 517, 9, 3, 64), (2, 512, 9, 3, 64)]  # B, T, H, G, K


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize(("taps", "silu"), [(None, False), (None, True), (4, False)])
@pytest.mark.parametrize("size", SHARED, ids=str)
def test_linear_branch_of_an_adopted_model(size, taps, silu, with_state, packed):
    """Shared heads of k and v, with and without convolution and SiLU."""
    B, T, H, G, K = size
    D = (H + 2 * G) * K
    inputs = linear_inputs(B, T, H, K, with_state)
    inputs["qkv"] = torch.randn(B, T, D + 8, dtype=torch.bfloat16)[..., :D]
    inputs["conv_weight"] = inputs["conv_state"] = None
    if taps:
        inputs["conv_weight"] = torch.randn(D, taps, dtype=torch.bfloat16) / 2
        if with_state:
            inputs["conv_state"] = torch.randn(B, D, taps - 1, dtype=torch.bfloat16)
    more = {"head_dim": K, "silu": silu, "fixed": ("conv_state",), **borders_of(B, T, packed)}
    compare(ops.linear_branch, inputs, **more)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [100, None])
@pytest.mark.parametrize("size", SHARED, ids=str)
def test_window_attention_with_shared_heads(size, window, packed):
    B, T, H, G, K = size
    heads = {"q": torch.randn(B, T, H, K, dtype=torch.bfloat16)}
    heads |= {name: torch.randn(B, T, G, K, dtype=torch.bfloat16) for name in "kv"}
    compare(ops.window_attention, heads, window=window, **borders_of(B, T, packed))


def sink_inputs(B, T, past, H, G, K, sinks=4):
    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16)

    inputs = {"q": normal(B, T, H, K), "far": normal(B, T, H, K)}
    inputs |= {name: normal(B, past + T, G, K) for name in "kv"}
    return inputs | {name: normal(B, sinks + T, G, K) for name in ("sink_k", "sink_v")}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("window", [16, 30])
@pytest.mark.parametrize("size", SHARED, ids=str)
def test_sink_attention(size, window, packed):
    """Of packed documents some are shorter than the window, and some longer."""
    B, T, *heads = size
    borders, index = borders_of(B, T, packed), torch.arange(T)[None]
    if packed:
        segments = borders["segments"]
        starts = segments.diff(dim=1, prepend=segments[:, :1]) != 0
        index = index - torch.where(starts, index, 0).cummax(1).values
    fixed = {"window": window, "index": index, **borders}
    compare(ops.sink_attention, sink_inputs(B, T, 0, *heads), exact="chunked", **fixed)


@pytest.mark.parametrize("begun", [200, 2])  # tokens of the sample before the new ones
@pytest.mark.parametrize("queries", [256, 33])
def test_sink_attention_over_the_past(queries, begun):
    inputs = sink_inputs(2, queries, 49, 4, 2, 64)
    index = begun + torch.arange(queries)[None]
    compare(ops.sink_attention, inputs, exact="chunked", window=50, index=index)


def test_distillation_loss():
    V, N = 1000, 5000
    labels = torch.randint(V, (N,))
    labels[::7] = -100
    fixed = {"labels": labels, "within": torch.rand(N) < 0.6}
    fixed["taught"] = torch.randn(N, V, dtype=torch.bfloat16)
    compare(ops.distillation_loss, {"logits": torch.randn(N, V, dtype=torch.bfloat16)}, **fixed)


@pytest.mark.parametrize("branches", ["both", "linear", "window"])
def test_kernels_compute_every_operation_of_an_adopted_model(branches):
    """In training on packed documents, under autocast; `add_low_rank` of shared heads has none."""
    settings = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "num_prelude_layers": 0,
        "conv_size": None,
        "conv_silu": False,
        "rms_norm_eps": 1e-5,
        "branches": branches,
        "trigger_decay": 0.0,
    }
    if branches != "linear":
        settings |= {"num_sinks": 4, "rope_theta": 1e5}
    if branches == "both":
        settings |= {"window_output": "full", "interpolation": "independent"}
    model = make_model(**settings).float().train()
    tokens, borders = torch.randint(97, (2, 512)), torch.tensor([0, 300, 512, 700, 1024])
    results = []
    for half in (True, False):
        model.zero_grad()
        half_products = torch.autocast("cuda", torch.bfloat16, enabled=half)
        with half_products, ops.dispatch.recorded_backends() as used:
            how = {"labels": tokens, "skip_logits": True}
            loss = model(tokens, cu_seqlens=borders.int().cpu(), **how).loss
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
        if half:
            without = used.pop("add_low_rank", ["chunked"])
            assert without == ["chunked"]
            assert used.keys() >= {"swiglu", "linear_cross_entropy"}
            assert set(map(tuple, used.values())) == {("cuda",)}, used
    fast, exact = results
    total = sum(g.square().sum() for g in exact[1:]) ** 0.5
    for actual, expected in zip(fast, exact, strict=True):
        error = (actual.float() - expected).norm()
        assert error < 0.1 * max(expected.norm(), 0.01 * total)


def make_model(**overrides):
    settings = {
        "vocab_size": 97,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "sliding_window": 100,
        "trigger_decay": 0.8,
    }
    model = NirvanaForCausalLM(NirvanaConfig(**{**settings, **overrides})).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def test_causality():
    model = make_model().eval()
    tokens = torch.randint(97, (2, 300))
    changed = tokens.clone()
    changed[:, 150] = (changed[:, 150] + 1) % 97
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    assert torch.equal(a[:, :150], b[:, :150])
    assert not torch.equal(a[:, 150], b[:, 150])


def test_packed_is_separate():
    model = make_model().eval()
    parts = [torch.randint(97, (1, n)) for n in (5, 130, 64, 1, 200)]
    lengths = torch.tensor([0, *(p.shape[1] for p in parts)])
    cu_seqlens = lengths.cumsum(0).int()
    with torch.no_grad():
        together = model(torch.cat(parts, 1), cu_seqlens=cu_seqlens, use_cache=False).logits
        alone = torch.cat([model(p, use_cache=False).logits for p in parts], 1)
    assert relative(together, alone) < TOLERANCE


def test_borders_given_on_the_cpu_are_those_counted_on_the_gpu():
    config = NirvanaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=1)
    x = torch.zeros(2, 9, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [5, 6, 7, 8, 9, 10, 0, 1, 2]])
    counted = create_masks(config, x, None, None, positions)
    borders = torch.tensor([0, 3, 8, 15, 18], device="cpu")
    for given in (None, positions):
        known = create_masks(config, x, None, None, given, borders)
        assert torch.equal(known["segments"], counted["segments"])
        assert torch.equal(known["cu_seqlens"], counted["cu_seqlens"])


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_chunks_is_training_on_the_whole_text(compiled):
    """Loss and gradients, with and without compiled blocks; the kernels compute the chunks too."""
    model = make_model().train()
    tokens = torch.randint(97, (2, 512))
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    how = {"skip_logits": True, "num_items_in_batch": 1022}
    whole = model(tokens, shift_labels=labels, **how).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(whole, parameters)
    if compiled:
        compile_blocks(model.model.layers)
    state, total = None, 0.0
    with ops.dispatch.recorded_backends() as used:
        for chunk, shifted in zip(tokens.chunk(4, 1), labels.chunk(4, 1), strict=True):
            out = model(chunk, shift_labels=shifted, state=state, return_state=True, **how)
            state, total = out.state, total + out.loss
    if not compiled:
        assert used["linear_branch"] == used["window_attention"] == ["cuda"]
    assert abs(total - whole).item() < 2e-3
    found = torch.autograd.grad(total, parameters)
    # Each is some bf16 roundings from the exact one, those of scalars and small vectors the most.
    for name, a, b in zip(names, found, expected, strict=True):
        assert relative(a, b) < (0.05 if b.numel() > 1000 else 0.2), name


def test_memory_of_chunks_does_not_grow():
    model = make_model().train()
    tokens = torch.randint(97, (2, 16 * 256))
    peaks, state = [], None
    for chunk in tokens.chunk(16, 1):
        torch.cuda.reset_peak_memory_stats()
        out = model(chunk, labels=chunk, skip_logits=True, state=state, return_state=True)
        out.loss.backward()
        state, out = out.state.detach(), None
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks[3:]) <= 1.02 * peaks[2]


@pytest.mark.parametrize("n", [1, 64, 130, 259])
def test_prefill_and_decode_are_forward(n):
    model = make_model().eval()
    tokens = torch.randint(97, (2, 260))
    with torch.no_grad():
        expected = model(tokens).logits
        out = model(tokens[:, :n], use_cache=True)
        logits = [out.logits]
        for t in range(n, 260, 1 if n > 200 else 43):
            out = model(
                tokens[:, t : t + (1 if n > 200 else 43)], past_key_values=out.past_key_values
            )
            logits.append(out.logits)
    assert relative(torch.cat(logits, 1)[:, :260], expected) < TOLERANCE


ADOPTED = {
    "hidden_size": 144,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_prelude_layers": 0,
    "conv_size": None,
    "conv_silu": False,
    "num_sinks": 4,
    "window_output": "full",
    "interpolation": "independent",
    "rope_theta": 10000.0,
    "rope_scaling": LLAMA3,
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        ADOPTED,
        {**ADOPTED, "gate": "constant", "qkv_bias": True, "qk_norm": True, "num_sinks": 0},
        {"branches": "linear", "num_key_value_heads": 1},
    ],
    ids=["published", "adopted", "bias and norms", "linear"],
)
def test_one_graph_a_token_is_the_forward_pass(monkeypatch, settings):
    monkeypatch.setattr(graph_decoder, "PREFILL_CHUNK", 64)
    model = make_model(**settings).eval()
    tokens = torch.randint(97, (2, 200))
    torch.set_default_device(None)  # its mode is in the way of the compiler
    decoder, exact = Decoder(model), deepcopy(model).float()
    for length in (130, 70):  # the second text finds the graph of the first
        text = tokens[:, : length + 40]
        with torch.no_grad():
            expected, whole = (
                each(text, use_cache=False).logits[:, length - 1 :] for each in (exact, model)
            )
        logits = [decoder.prefill(tokens[:, :length])]
        assert isinstance(decoder.fused, FusedStep)
        for t in range(length, length + 40):
            logits.append(decoder.step(tokens[:, t : t + 1]).clone())
        # In half precision both round, each in its way.
        assert relative(torch.stack(logits, 1), expected) < 1.5 * relative(whole, expected)


def test_gradients_of_a_compiled_model_are_those_of_float32_on_the_cpu():
    model = make_model()
    tokens = torch.randint(97, (2, 260))
    torch.set_default_device(None)
    exact = NirvanaForCausalLM(model.config).float()
    exact.load_state_dict(model.state_dict())
    exact(tokens.cpu(), labels=tokens.cpu(), skip_logits=True).loss.backward()
    compile_blocks(model.model.layers)
    model(tokens, labels=tokens, skip_logits=True).loss.backward()
    total = sum(p.grad.square().sum() for p in exact.parameters()) ** 0.5
    for (name, actual), expected in zip(model.named_parameters(), exact.parameters(), strict=True):
        error = (actual.grad.cpu().float() - expected.grad).norm()
        assert error < 0.08 * max(expected.grad.norm(), 0.01 * total), name


def test_operations_are_proper():
    from nirvana.ops.cuda import linear
    from nirvana.ops.cuda import low_rank as low_ranks
    from nirvana.ops.cuda import window as windows

    B, T, H, K = 1, 70, 2, 128
    inputs = linear_inputs(B, T, H, K, False)
    qkv = inputs["qkv"].requires_grad_()
    weight, alpha, beta = (
        inputs[x].float().requires_grad_() for x in ("conv_weight", "log_alpha", "beta")
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for taps in (weight, None):
        arguments = (qkv, taps, alpha, beta, K, None, None, None, None, False, True)
        torch.library.opcheck(linear._linear, arguments, test_utils=checks)
    low_rank, up = torch.randn(B, T, 48).bfloat16(), torch.randn(3, 16, H * K).bfloat16()
    arguments = (qkv, low_rank, up, K, 30, None)
    torch.library.opcheck(windows._window, arguments, test_utils=checks)
    torch.library.opcheck(low_ranks._add, (qkv, low_rank, up), test_utils=checks[:2])
    q, k, v = (torch.randn(B, T, H, K).bfloat16().requires_grad_() for _ in range(3))
    torch.library.opcheck(windows._attention, (q, k, v, 30, None), test_utils=checks)
    sinks = (torch.randn(B, 4 + T, H, K).bfloat16().requires_grad_() for _ in range(2))
    arguments = (q, q, k, v, *sinks, 30, torch.arange(T).expand(B, T), None)
    torch.library.opcheck(windows._sinks, arguments, test_utils=checks)
