"""The kernels of a block against the definitions: the convolution and the unit length with their
gradients, the low-rank sum, and SwiGLU. Without a GPU they run in Triton's interpreter; there the
definition stands in for the libraries' delta rule, so that the operation around it is tested."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from nirvana.ops import chunked, reference

pytest.importorskip("triton")
from triton import knobs

from nirvana.ops.cuda import conv, linear, low_rank, swiglu, unit


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


@pytest.fixture
def _short_programs(monkeypatch, device):
    """Programs of few tokens, in which the interpreter takes seconds less, and of which a text of
    19 tokens has three; on a GPU as they are."""
    if device == "cpu":
        monkeypatch.setattr(conv, "STEPS", 8)
        monkeypatch.setattr(conv, "GRADIENT_STEPS", 8)


SIZES = [(2, 37, 2, 16), (1, 131, 1, 32), (3, 2, 1, 16)]  # B, T, H, K
SHARED = [(1, 37, 3, 1, 16), (2, 9, 4, 2, 16)]  # B, T, H, G, K


def strided(B, T, D):
    """As a slice of a larger product lies."""
    return torch.randn(B, T, D + 5)[..., 2 : D + 2]


def mixed(x, weight, heads, K, state=None, segments=None, silu=True):
    """The q, k and v of the delta rule by definition: `[3, B, T, H, K]`."""
    y, _ = reference.causal_conv(x, weight, state, segments, silu)
    H, G = heads
    q, k, v = y.unflatten(-1, (-1, K)).split([H, G, G], dim=2)
    k, v = (part.repeat_interleave(H // G, dim=2) for part in (k, v))
    return torch.stack([reference.unit(q), reference.unit(k), v])


def assert_near(actual, right):
    scale = right.abs().max()
    torch.testing.assert_close(actual.double() / scale, right / scale, rtol=0, atol=1e-5)


CONVOLUTIONS = [  # with a state, and packed
    *(
        ((B, T, H, H, K), True, with_state, packed)
        for B, T, H, K in ((2, 19, 2, 16), (1, 27, 1, 32), (3, 2, 1, 16))
        for with_state in (False, True)
        for packed in (False, True)
    ),
    ((1, 19, 3, 1, 16), False, True, True),
    ((2, 9, 4, 2, 16), True, False, False),
]


@pytest.mark.usefixtures("_short_programs")
@pytest.mark.parametrize(("size", "silu", "with_state", "packed"), CONVOLUTIONS, ids=str)
def test_convolution(size, silu, with_state, packed):
    check_convolution(size, silu, with_state, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_by_whole_programs(packed):
    """The number of tokens that a program takes changes no formula: two cases are enough."""
    check_convolution((1, 131, 1, 1, 32), True, packed, packed)


def check_convolution(size, silu, with_state, packed):
    """Values and gradients against the definition."""
    B, T, H, G, K = size
    D = (H + 2 * G) * K
    x, weight = strided(B, T, D), torch.randn(D, 4)
    state = torch.randn(B, D, 3) if with_state else None
    segments = (torch.rand(B, T) < 0.2).cumsum(1) if packed else None
    actual = conv.forward(x, weight, K, H, state, segments, silu)

    x_, weight_ = (y.detach().double().requires_grad_() for y in (x, weight))
    old = None if state is None else state.double()
    expected = mixed(x_, weight_, (H, G), K, old, segments, silu)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    grads = torch.randn_like(actual)
    dx, dweight = conv.backward(grads.unbind(0), x, weight, K, state, segments, silu)
    (expected * grads).sum().backward()
    assert_near(dx, x_.grad)
    assert_near(dweight, weight_.grad)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
@pytest.mark.parametrize("size", [(2, 37, 2, 2, 16), *SHARED], ids=str)
def test_unit_without_convolution(size, silu):
    B, T, H, G, K = size
    x = linear.even_rows(strided(B, T, (H + 2 * G) * K))
    actual = unit.forward(x, K, H, silu)
    x_ = x.detach().double().requires_grad_()
    expected = mixed(x_, None, (H, G), K, silu=silu)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.randn_like(actual)
    (expected * grads).sum().backward()
    assert_near(unit.backward(grads.unbind(0), x, K, silu), x_.grad)


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_sum(size, rank):
    B, T, H, K = size
    x, factors = strided(B, T, 3 * H * K), strided(B, T, 3 * rank)
    up = torch.randn(3, rank, H * K)
    expected = torch.stack(reference.add_low_rank(x, factors, up, K), dim=2).flatten(2)
    error = (low_rank.add(x, factors, up) - expected).norm() / expected.norm()
    assert error < (1e-6 if x.device.type == "cpu" else 1e-3)  # a GPU multiplies in tf32


@pytest.mark.parametrize("width", [3, 1100])
def test_swiglu(width):
    x = torch.randn(2, 5, 2 * width, requires_grad=True)
    dy = torch.randn(2, 5, width)
    y = swiglu.swiglu(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    expected = reference.swiglu(exact)
    (expected_dx,) = torch.autograd.grad(expected, exact, dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), expected_dx, rtol=1e-5, atol=1e-5)


def test_swiglu_is_a_proper_operation():
    x = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(swiglu._swiglu, (x,))


def delta_rule(q, k, v, log_alpha, beta, state, borders):
    """Of rows laid end to end, `[1, N, ...]`, and the last states of all documents."""
    outputs = []
    for i, (start, end) in enumerate(zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)):
        parts = (x[:, start:end] for x in (q, k, v, log_alpha, beta))
        before = None if state is None else state[i : i + 1]
        outputs.append(chunked.gated_delta_rule(*parts, before, None))
    o, last = zip(*outputs, strict=True)
    return torch.cat(o, dim=1), torch.cat(last)


def delta_forward(qkv, log_alpha, beta, state, borders, final):
    o, last = delta_rule(*qkv, log_alpha, beta, state, borders)
    return o, log_alpha.clone(), o.new_empty(1), last if final else None


def delta_backward(do, dlast, qkv, beta, sums, inverse, state, borders):
    given = [x for x in (*qkv, sums, beta, state) if x is not None]
    leaves = [x.detach().requires_grad_() for x in given]
    o, last = delta_rule(*leaves[:5], None if state is None else leaves[5], borders)
    loss = (o * do).sum() + (0 if dlast is None else (last * dlast).sum())
    return *torch.autograd.grad(loss, leaves), *([] if state is not None else [None])


@pytest.fixture
def linear_branch(monkeypatch, device):
    """The operation of the linear branch on the CPU."""
    if device != "cpu":
        pytest.skip("test_cuda_backend tests it with the libraries' delta rule")
    for operation in (linear._linear, linear._linear_gradients):
        operation.register_kernel("cpu")(operation._init_fn)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(linear, "_delta_forward", delta_forward)

    def in_a_thread(*given):  # within an operation's own gradient autograd is off
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(delta_backward, *given).result()

    monkeypatch.setattr(linear, "_delta_backward", in_a_thread)
    return linear.linear_branch


STARTS = [  # which of the first states are constants, and packed; None: there are no first states
    *((None, packed) for packed in (False, True)),
    ((), False),  # the dispatch keeps the packed one from the kernels
    *((("conv_state",), packed) for packed in (False, True)),
    *((("conv_state", "state"), packed) for packed in (False, True)),
]


@pytest.mark.usefixtures("_short_programs")
@pytest.mark.parametrize(
    ("fixed", "packed", "kind", "final"),
    [
        (*start, kind, (number + place) % 2 == 0)
        for number, start in enumerate(STARTS)
        for place, kind in enumerate(("usual", "shared heads, no convolution"))
    ],
    ids=str,
)
def test_linear_branch_around_the_delta_rule(linear_branch, fixed, packed, kind, final):
    """Gradients flow from the last states and into the first ones. Every two of start, kind and
    last states meet once."""
    B, T, H, K = 2, 13, 2, 16
    D = (3 * H if kind == "usual" else H + 2) * K
    inputs = {
        "qkv": torch.randn(B, T, D),
        "conv_weight": torch.randn(D, 4) / 2,
        "log_alpha": -torch.nn.functional.softplus(torch.randn(B, T, H) - 3),
        "beta": torch.rand(B, T, H),
    }
    states = {"conv_state": torch.randn(B, D, 3), "state": torch.randn(B, H, K, K) / 8}
    inputs |= states if fixed is not None else {}
    silu = kind == "usual"
    if kind.endswith("no convolution"):
        del inputs["conv_weight"]
        inputs.pop("conv_state", None)
    segments = borders = None
    if packed:
        segments = (torch.rand(B, T) < 0.2).cumsum(1)
        segments[:, 0] = 0
        segments[1] += fixed is not None  # the second row goes on from no state
        starts = segments.diff(dim=1, prepend=segments[:, :1] - 1) != 0
        ends = torch.tensor([B * T])
        borders = torch.cat([starts.flatten().nonzero()[:, 0], ends]).int()
    results = []
    for compute in (linear_branch, reference.linear_branch):
        leaves = {
            name: x.detach().clone().requires_grad_(name not in (fixed or ()))
            for name, x in inputs.items()
        }
        given = {**dict.fromkeys((*states, "conv_weight")), **leaves, "silu": silu}
        outputs = compute(**given, head_dim=K, segments=segments, cu_seqlens=borders, final=final)
        outputs = [x for x in outputs if x is not None]
        torch.manual_seed(1)
        loss = sum((x * torch.randn(x.shape)).sum() for x in outputs)
        grads = torch.autograd.grad(loss, [x for x in leaves.values() if x.requires_grad])
        results.append([*outputs, *grads])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
