"""The operations: chunked = reference, packed = separate, and the choice of the backend."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nirvana import ops
from nirvana.ops import dispatch

pytestmark = pytest.mark.usefixtures("device")
LENGTHS = [1, 2, 63, 64, 65, 131]


def borders(B: int, T: int, seed: int) -> torch.Tensor:
    """Random sample borders, also at token 0 and side by side."""
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = torch.rand(B, T, generator=generator, device="cpu") < 0.15
    return starts.long().cumsum(1).to(torch.get_default_device())


def delta_inputs(B: int, T: int, H: int, K: int, V: int, seed: int = 0) -> dict:
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(torch.get_default_device())

    unit = torch.nn.functional.normalize
    return {
        "q": unit(normal(B, T, H, K), dim=-1),
        "k": unit(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "log_alpha": -torch.exp(normal(B, T, H)),
        "beta": normal(B, T, H).sigmoid(),
        "state": normal(B, H, K, V),
    }


def assert_same(operation, inputs: dict, **fixed) -> None:
    """Values and gradients of every floating input agree between the two backends."""
    results = {}
    for backend in ("reference", "chunked"):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        with ops.use_backend(backend):
            out = operation(**leaves, **fixed)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        # Not randn_like: on a GPU its numbers follow the strides, which differ by backend.
        loss = sum((x * torch.randn(x.shape, dtype=x.dtype)).sum() for x in out)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results[backend] = [*out, *grads]
    names = [f"output {i}" for i in range(len(out))] + [f"gradient of {name}" for name in inputs]
    for name, a, b in zip(names, results["reference"], results["chunked"], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_delta_rule_chunked_is_step_by_step(T, packed):
    segments = borders(2, T, seed=T) if packed else None
    assert_same(ops.gated_delta_rule, delta_inputs(2, T, 2, 8, 5), segments=segments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [*LENGTHS, 64 * 64 + 7])
def test_decayed_sum_chunked_is_step_by_step(T, packed):
    inputs = {
        "g": torch.randn(2, T, 3, dtype=torch.float64),
        "decay": torch.tensor(0.93, dtype=torch.float64),
        "state": torch.randn(2, 3, dtype=torch.float64),
    }
    assert_same(ops.decayed_sum, inputs, segments=borders(2, T, seed=T) if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 2, 64, 131])
@torch.no_grad()
def test_what_an_export_traces_is_step_by_step(monkeypatch, T, packed):
    segments = borders(2, T, seed=T) if packed else None
    delta = delta_inputs(2, T, 2, 8, 5)
    sums = {"g": normal(2, T, 3), "decay": 0.93, "state": normal(2, 3)}
    heads = {name: normal(2, T, 2, 4) for name in "qkv"}
    conv = {"x": normal(2, T, 6), "weight": normal(6, 4), "state": normal(2, 6, 3)}
    calls = (
        lambda: ops.gated_delta_rule(**delta, segments=segments),
        lambda: ops.decayed_sum(**sums, segments=segments),
        lambda: ops.window_attention(**heads, window=7, segments=segments),
        lambda: ops.causal_conv(**conv, segments=segments),
    )
    with ops.use_backend("reference"):
        expected = [call() for call in calls]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close([call() for call in calls], expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 2, 9])
def test_conv_is_step_by_step(T, packed):
    inputs = {
        "x": torch.randn(2, T, 6, dtype=torch.float64),
        "weight": torch.randn(6, 4, dtype=torch.float64),
        "state": torch.randn(2, 6, 3, dtype=torch.float64),
    }
    assert_same(ops.causal_conv, inputs, segments=borders(2, T, seed=T) if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 5, 16, 40, None])
def test_window_attention_is_step_by_step(window, packed):
    T = 37
    q, k, v = torch.randn(3, 2, T, 2, 4, dtype=torch.float64)
    segments = borders(2, T, seed=3) if packed else None
    assert_same(ops.window_attention, {"q": q, "k": k, "v": v}, window=window, segments=segments)


# The past has 30 tokens; windows end within it, at its border, at its start and before it.
@pytest.mark.parametrize("window", [1, 4, 8, 30, 31, 33, 100, None])
@pytest.mark.parametrize("T", [1, 2, 9, 40])
def test_window_attention_over_past_keys_is_step_by_step(T, window):
    q = torch.randn(2, T, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 30 + T, 2, 4, dtype=torch.float64)
    assert_same(ops.window_attention, {"q": q, "k": k, "v": v}, window=window)


def sink_attention(window: int, **inputs) -> torch.Tensor:
    """`ops.sink_attention`; inputs that it does not read get a gradient of zero."""
    others = {name: inputs.pop(name, None) for name in ("index", "segments", "mask")}
    unread = sum((x * 0).sum() for x in inputs.values())
    return ops.sink_attention(**inputs, window=window, **others) + unread


def sink_inputs(T: int, past: int, n: int = 3) -> dict:
    """Queries with two heads over keys with one, the last T of which are also those of sinks."""
    q, far = torch.randn(2, 2, T, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, past + T, 1, 4, dtype=torch.float64)
    sink_k, sink_v = torch.randn(2, 2, n + T, 1, 4, dtype=torch.float64)
    return {"q": q, "far": far, "k": k, "v": v, "sink_k": sink_k, "sink_v": sink_v}


@pytest.mark.parametrize("window", [2, 5, 16, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_sink_attention_is_step_by_step(window, packed):
    segments = borders(2, 37, seed=3).cummax(1).values // 2 if packed else None
    index = torch.arange(37)[None]
    if segments is not None:
        first = torch.nn.functional.pad(segments.diff(dim=1) != 0, (1, 0)) * torch.arange(37)
        index = torch.arange(37) - first.cummax(1).values
    fixed = {"window": window, "index": index, "segments": segments}
    assert_same(sink_attention, sink_inputs(37, 0), **fixed)


@pytest.mark.parametrize("window", [2, 8, 31, 33])
@pytest.mark.parametrize("T", [1, 2, 9, 40])
@pytest.mark.parametrize("begun", [30, 1, 0])  # tokens of the sample in the past: all, one, none
def test_sink_attention_over_past_keys_is_step_by_step(T, window, begun):
    past = min(30, window - 1)
    index = begun + torch.arange(T)[None]
    assert_same(sink_attention, sink_inputs(T, past), window=window, index=index)


@pytest.mark.parametrize("T", [1, 9])
def test_sink_attention_with_a_mask_is_step_by_step(T):
    """As behind a static cache, whose slots may be empty."""
    mask = torch.rand(2, 1, T, 10 + T) < 0.5
    mask[..., 3] = True
    index = torch.tensor([[2], [30]]) + torch.arange(T)
    assert_same(sink_attention, sink_inputs(T, 10), window=6, index=index, mask=mask)


def test_sinks_are_seen_beyond_the_window():
    """With one query for both it is attention to the window and the first tokens."""
    x = sink_inputs(20, 0)
    keys, values = (torch.cat([torch.zeros_like(y[:, :3]), y], dim=1) for y in (x["k"], x["v"]))
    o = ops.sink_attention(x["q"], x["q"], x["k"], x["v"], keys, values, 5, torch.arange(20)[None])
    place = torch.arange(20)
    mask = (place <= place[:, None]) & ((place > place[:, None] - 5) | (place < 3))
    torch.testing.assert_close(o, ops.masked_attention(x["q"], x["k"], x["v"], mask))


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("silu", [False, True])
def test_linear_branch_without_conv_and_with_shared_heads_is_step_by_step(T, silu):
    inputs = {
        "qkv": torch.randn(2, T, (4 + 2 * 2) * 3, dtype=torch.float64),
        "log_alpha": -torch.rand(2, T, 4, dtype=torch.float64),
        "beta": torch.rand(2, T, 4, dtype=torch.float64),
        "state": torch.randn(2, 4, 3, 3, dtype=torch.float64),
    }

    def compute(**given):
        o, recent, last = ops.linear_branch(conv_weight=None, head_dim=3, silu=silu, **given)
        assert recent is not None
        assert recent.shape == (2, 24, 0)
        assert last is not None
        return o, last

    assert_same(compute, inputs)


def test_low_rank_terms_of_shared_heads_are_step_by_step():
    inputs = {
        "qkv": torch.randn(2, 5, (4 + 2 * 2) * 3, dtype=torch.float64),
        "low_rank": torch.randn(2, 5, 6, dtype=torch.float64),
        "up": torch.randn(2, 24, dtype=torch.float64),
    }
    assert_same(ops.add_low_rank, inputs, head_dim=3, num_heads=4)


@pytest.mark.parametrize("heads", ["window_attention", "masked_attention"])
def test_shared_heads_of_keys_are_repeated(heads):
    q = torch.randn(2, 9, 4, 3, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 2, 3, dtype=torch.float64)
    more = {"window": 4} if heads == "window_attention" else {"mask": torch.ones(9, 9).tril() > 0}
    attend = getattr(ops, heads)
    repeated = (x.repeat_interleave(2, dim=2) for x in (k, v))
    torch.testing.assert_close(attend(q, k, v, **more), attend(q, *repeated, **more))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("window", [1, 4, 30, 100, None])
@pytest.mark.parametrize("T", [1, 9])
def test_window_attention_goes_on_from_its_past(T, window, backend):
    """The last queries over all keys are the last rows of the whole."""
    q, k, v = torch.randn(3, 2, 30 + T, 2, 4, dtype=torch.float64)
    with ops.use_backend(backend):
        whole = ops.window_attention(q, k, v, window)
        last = ops.window_attention(q[:, 30:], k, v, window)
    torch.testing.assert_close(last, whole[:, 30:])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_window_attention_refuses_segments_over_past_keys(backend):
    q, k = torch.randn(1, 3, 1, 4), torch.randn(1, 5, 1, 4)
    with (
        ops.use_backend(backend),
        pytest.raises(ValueError, match="segments separate new tokens, not those of the past"),
    ):
        ops.window_attention(q, k, k, 4, torch.zeros(1, 3, dtype=torch.long))


@given(T=st.integers(1, 150), cut=st.integers(1, 149), seed=st.integers(0, 99))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device stays the same
)
def test_delta_rule_goes_on_from_its_state(T, cut, seed):
    cut = min(cut, T)
    inputs = delta_inputs(1, T, 2, 4, 4, seed)
    state = inputs.pop("state")
    whole, last = ops.gated_delta_rule(**inputs, state=state)
    first, middle = ops.gated_delta_rule(**{n: x[:, :cut] for n, x in inputs.items()}, state=state)
    parts = [first]
    end = middle
    if cut < T:
        rest, end = ops.gated_delta_rule(**{n: x[:, cut:] for n, x in inputs.items()}, state=middle)
        parts.append(rest)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(end, last)


def test_delta_rule_packed_is_separate():
    inputs = delta_inputs(1, 150, 2, 8, 8)
    inputs.pop("state")
    lengths = [1, 70, 64, 15]
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed, state = ops.gated_delta_rule(**inputs, segments=segments)
    pieces = zip(*(x.split(lengths, dim=1) for x in inputs.values()), strict=True)
    separate = [ops.gated_delta_rule(*piece) for piece in pieces]
    torch.testing.assert_close(packed, torch.cat([o for o, _ in separate], dim=1))
    torch.testing.assert_close(state, separate[-1][1])


def test_repeated_token_is_stable_in_float32():
    """All keys equal and beta = 1 make the triangular system as ill-behaved as it gets."""
    inputs = delta_inputs(1, 512, 1, 16, 16)
    inputs = {name: x.float() for name, x in inputs.items()}
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"])
    inputs["beta"] = torch.ones_like(inputs["beta"])
    inputs["log_alpha"] = torch.zeros_like(inputs["log_alpha"])
    with ops.use_backend("reference"):
        slow = ops.gated_delta_rule(**inputs)[0]
    torch.testing.assert_close(ops.gated_delta_rule(**inputs)[0], slow, rtol=1e-4, atol=1e-4)


def test_strong_decay_gives_no_nan():
    inputs = delta_inputs(1, 130, 1, 8, 8)
    inputs["log_alpha"] = torch.full_like(inputs["log_alpha"], -1e4)
    assert_same(ops.gated_delta_rule, inputs)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def trigger_inputs(B, T, C, R):
    names = ("weight", "gain", "bias", "shift")
    bank = zip(names, ((C, C, R), (C, R), (C, R), (C, R)), strict=True)
    return {"fast": 1 + normal(B, T, 4, R)} | {name: normal(*shape) for name, shape in bank}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 70])
def test_linear_branch_is_its_definition(T, packed):
    B, H, K = 2, 3, 4
    inputs = {
        "qkv": normal(B, T, 3 * H * K),
        "conv_weight": normal(3 * H * K, 3),
        "log_alpha": -torch.exp(normal(B, T, H)),
        "beta": normal(B, T, H).sigmoid(),
        "conv_state": normal(B, 3 * H * K, 2),
        "state": normal(B, H, K, K),
    }
    segments = borders(B, T, seed=T) if packed else None
    assert_same(ops.linear_branch, inputs, head_dim=K, segments=segments)
    with ops.use_backend("reference"):
        assert ops.linear_branch(**inputs, head_dim=K, final=False)[1:] == (None, None)
    assert ops.linear_branch(**inputs, head_dim=K, final=False)[1:] == (None, None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_states_are_those_after_the_lengths(backend, packed):
    """As of each row cut there, in values and gradients; a row without tokens keeps its states."""
    B, T, H, K, F = 5, 70, 2, 4, 6
    lengths = [0, 1, 2, 64, 70]
    inputs = {
        "qkv": normal(B, T, 3 * H * K),
        "log_alpha": -torch.exp(normal(B, T, H)),
        "beta": normal(B, T, H).sigmoid(),
        "conv_state": normal(B, 3 * H * K, 3),
        "state": normal(B, H, K, K),
        "g": normal(B, T, F),
        "m": normal(B, F),
    }
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    weight = normal(3 * H * K, 4)
    segments = borders(B, T, seed=T) if packed else None
    if segments is not None:  # padding belongs to the last sample
        place = torch.arange(T).clamp(max=(torch.tensor(lengths)[:, None] - 1).clamp(min=0))
        segments = segments.gather(1, place)
        segments[0] = 0

    def states(rows, T, lengths=None):
        x = {name: each[rows] for name, each in inputs.items()}
        own = None if segments is None else segments[rows, :T]
        qkv, log_alpha, beta = (x[name][:, :T] for name in ("qkv", "log_alpha", "beta"))
        branch = ops.linear_branch(
            *(qkv, weight, log_alpha, beta, K, x["conv_state"], x["state"], own), lengths=lengths
        )
        return *branch[1:], ops.decayed_sum(x["g"][:, :T], 0.9, x["m"], own, lengths)[1]

    with ops.use_backend(backend):
        together = states(slice(0, B), T, torch.tensor(lengths))
        alone = [states(slice(row, row + 1), lengths[row]) for row in range(1, B)]
    kept = [inputs[name][:1] for name in ("conv_state", "state", "m")]
    expected = [torch.cat(each) for each in zip(kept, *alone, strict=True)]
    torch.testing.assert_close(list(together), expected)
    weights = [torch.randn_like(x) for x in expected]
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(given, weights, strict=True)), list(inputs.values())
        )
        for given in (together, expected)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("packed", [False, True])
def test_window_branch_is_its_definition(packed):
    B, T, H, K, rank = 2, 37, 3, 4, 5
    inputs = {
        "qkv": normal(B, T, 3 * H * K),
        "low_rank": normal(B, T, 3 * rank),
        "up": normal(3, rank, H * K),
    }
    assert_same(ops.add_low_rank, inputs, head_dim=K)
    segments = borders(B, T, seed=3) if packed else None
    assert_same(ops.window_branch, inputs, head_dim=K, window=9, segments=segments)


def test_masked_attention_is_its_definition():
    q, k, v = normal(2, 7, 3, 4), normal(2, 9, 3, 4), normal(2, 9, 3, 4)
    mask = torch.rand(2, 1, 7, 9) < 0.5
    mask[..., 0] = True
    assert_same(ops.masked_attention, {"q": q, "k": k, "v": v}, mask=mask)


@pytest.mark.parametrize("operation", [ops.swiglu, ops.unit])
def test_functions_of_one_token_are_their_definitions(operation):
    assert_same(operation, {"x": normal(2, 5, 14)})


@pytest.mark.parametrize("exact", [True, False])
def test_trigger_is_its_definition(exact):
    inputs = trigger_inputs(2, 5, 6, 3)
    assert_same(ops.trigger_apply, {"x": normal(2, 5, 6)} | inputs)
    keys = {"k": normal(2, 5, 6), "v": normal(2, 5, 6)}
    assert_same(ops.trigger_gradient, keys | inputs, exact=exact)


def test_cross_entropy_is_its_definition():
    labels = torch.randint(11, (23,))
    labels[::5] = -100
    tensors = {"h": normal(23, 7), "weight": normal(11, 7)}
    assert_same(ops.linear_cross_entropy, tensors, labels=labels)
    assert_same(ops.linear_cross_entropy, tensors, labels=labels, z_loss=0.1)


def test_distillation_loss_is_its_definition():
    labels = torch.randint(11, (23,))
    labels[::5] = -100
    given = {"taught": normal(23, 11), "labels": labels, "within": torch.arange(23) < 12}
    assert_same(ops.distillation_loss, {"logits": normal(23, 11)}, **given)


OPERATIONS = sorted(
    set(ops.__all__)
    - {"BACKENDS", "HAS_KERNELS", "MIN_LOG_ALPHA", "at_least_float32", "in_autocast"}
    - {"no_autocast", "suits_kernels", "use_backend", "warn_without_kernels"}
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_its_twins(name):
    assert callable(getattr(dispatch.reference, name))
    assert callable(getattr(dispatch.chunked, name))
    if name in dispatch.KERNELS:
        pytest.importorskip("triton")
        assert callable(getattr(dispatch._kernel_module(name), name))


def test_use_backend_chooses_and_ends():
    x, g = torch.randn(2, 5, 6), torch.randn(1, 3, 2)

    def used():
        with dispatch.recorded_backends() as names:
            ops.swiglu(x)
            ops.decayed_sum(g, 0.5)
        return names

    plain = {"swiglu": ["chunked"], "decayed_sum": ["chunked"]}
    assert used() == plain
    with ops.use_backend("reference"):
        assert used() == {"swiglu": ["reference"], "decayed_sum": ["reference"]}
        with ops.use_backend("chunked"):
            assert used() == plain
        assert used() == {"swiglu": ["reference"], "decayed_sum": ["reference"]}
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert used() == plain


def test_the_cuda_backend_refuses_what_its_kernels_do_not_take():
    x = torch.randn(2, 5, 6)  # float32
    with ops.use_backend("cuda"):
        with pytest.raises(ValueError, match="the kernels of the cuda backend do not take"):
            ops.swiglu(x)
        ops.decayed_sum(x, 0.5)  # has no kernels


def test_unknown_backend_is_named():
    message = "'fast' is not one of reference, chunked, cuda"
    with pytest.raises(ValueError, match=message), ops.use_backend("fast"):
        pass
