"""The kernels of a block against the definitions: the convolution with its gradients, the low-rank
sum, and SwiGLU. Without a GPU they run in Triton's interpreter."""

import pytest
import torch

from nirvana.ops import reference

pytest.importorskip("triton")
from triton import knobs

from nirvana.ops.cuda import conv, low_rank, swiglu


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


SIZES = [(2, 37, 2, 16), (1, 131, 1, 32), (3, 2, 1, 16)]  # B, T, H, K


def strided(B, T, D):
    """As a slice of a larger product lies."""
    return torch.randn(B, T, D + 5)[..., 2 : D + 2]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution(size, with_state, packed):
    B, T, H, K = size
    x, weight = strided(B, T, 3 * H * K), torch.randn(3 * H * K, 4)
    state = torch.randn(B, 3 * H * K, 3) if with_state else None
    segments = (torch.rand(B, T) < 0.1).cumsum(1) if packed else None
    actual = conv.forward(x, weight, K, state, segments)

    x_, weight_ = (y.detach().double().requires_grad_() for y in (x, weight))
    old = None if state is None else state.double()
    y, _ = reference.causal_conv(x_, weight_, old, segments)
    q, k, v = y.unflatten(-1, (3, H, K)).unbind(2)
    expected = torch.stack([reference.unit(q), reference.unit(k), v])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    grads = torch.randn_like(actual)
    dx, dweight = conv.backward(grads.unbind(0), x, weight, K, state, segments)
    (expected * grads).sum().backward()
    for actual, right in ((dx, x_.grad), (dweight, weight_.grad)):
        scale = right.abs().max()
        torch.testing.assert_close(actual.double() / scale, right / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_sum(size, rank):
    B, T, H, K = size
    x, factors = strided(B, T, 3 * H * K), strided(B, T, 3 * rank)
    up = torch.randn(3, rank, H * K)
    expected = torch.stack(reference.add_low_rank(x, factors, up, K), dim=2).flatten(2)
    error = (low_rank.add_low_rank(x, factors, up) - expected).norm() / expected.norm()
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
