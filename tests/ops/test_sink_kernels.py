"""The kernels of sinks against the definition. Without a GPU they run in Triton's interpreter, and
PyTorch stands in for the libraries' attention within the window."""

from contextlib import nullcontext

import pytest
import torch

from nirvana.ops import reference

pytest.importorskip("triton")
from triton import knobs

from nirvana.ops.cuda import attention, sinks, window

B, H, G, K, SINKS = 2, 4, 2, 16, 3


@pytest.fixture(autouse=True)
def _where_triton_runs(device):
    if device == "cpu" and not knobs.runtime.interpret:
        pytest.skip("Triton is compiled for the GPU here")


def scores_of(q, k, width, segments):
    """The scores of q `[B, T, H, K]` with keys `[B, S, G, K]`, -inf beyond the window."""
    T, S = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    age = torch.arange(S - T, S)[:, None] - torch.arange(S)
    seen = ((age >= 0) & (age < width)).expand(B, T, S)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    return (torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5).masked_fill(
        ~seen[:, None], float("-inf")
    )


def within_window(q, k, v, width, segments):
    """o `[B, T, H, K]`, and the logarithms of the sums, `[B, T, H]`."""
    scores = scores_of(q, k, width, segments)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    o = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)
    return o, scores.logsumexp(-1).transpose(1, 2)


def case(T, kind, past=0):
    """Inputs in float64, and index and segments: rows; packed documents; rows that go on."""
    q, far = torch.randn(2, B, T, H, K, dtype=torch.float64)
    k, v = torch.randn(2, B, past + T, G, K, dtype=torch.float64)
    sink_k, sink_v = torch.randn(2, B, SINKS + T, G, K, dtype=torch.float64)
    index, segments = torch.arange(T).expand(B, T), None
    if kind == "packed":
        starts = torch.tensor([[7], [33]])
        segments = (torch.arange(T) >= starts).long()
        index = index - segments * starts
    if kind == "continued":  # one row lacks two of its sinks yet
        index = index + torch.tensor([[1], [50]])
    return (q, far, k, v, sink_k, sink_v), index, segments


def assert_near(actual, right):
    scale = right.abs().max()
    atol = 1e-5 if actual.device.type == "cpu" else 5e-3  # a GPU multiplies in tf32
    torch.testing.assert_close(actual.double() / scale, right / scale, rtol=0, atol=atol)


@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("kind", ["rows", "packed", "continued"])
def test_sinks_join_a_softmax(kind, width):
    inputs, index, segments = case(70, kind)
    leaves = [x.requires_grad_() for x in inputs]
    expected = reference.sink_attention(*leaves, width, index, segments, None, None)
    do = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, leaves, do)
    q, far, k, v, sink_k, sink_v = (x.detach() for x in inputs)
    o, sums = (x.float().contiguous() for x in within_window(q, k, v, width, segments))
    sums = sums.transpose(1, 2).contiguous().transpose(1, 2)  # head by head, as rows are
    given = [x.float() for x in (far, sink_k, sink_v)]
    sinks.add(o, sums, *given, width, index)
    assert_near(o, expected.detach())
    found = sinks.backward(do.float(), o, sums, *given, width, index)
    for actual, right in zip(found, (grads[1], *grads[4:]), strict=True):
        assert_near(actual, right)


def forward(q, k, v, width, segments):
    o, sums = within_window(q, k, v, width, segments)
    return o.contiguous(), sums.transpose(1, 2).flatten()


def backward(do, q, k, v, o, lse, width, segments, grads):
    """FlashAttention's formulas, which read o and lse."""
    scores = scores_of(q, k, width, segments)
    weights = (scores - lse.view(B, H, q.shape[1], 1)).exp()
    shared = [x.repeat_interleave(H // G, 2) for x in (k, v)]
    inner = (do * o).sum(-1).transpose(1, 2)[..., None]
    dscores = weights * (torch.einsum("bthk,bshk->bhts", do, shared[1]) - inner) * K**-0.5
    grads[0].copy_(torch.einsum("bhts,bshk->bthk", dscores, shared[0]))
    for grad, parts in zip(grads[1:], ((dscores, q), (weights, do)), strict=True):
        whole = torch.einsum("bhts,bthk->bshk", *parts)
        grad.copy_(whole.unflatten(2, (G, H // G)).sum(3))


@pytest.fixture
def sink_attention(monkeypatch, device):
    """The operation on the CPU; PyTorch computes the window, with segments as its borders."""
    if device != "cpu":
        pytest.skip("test_cuda_backend tests it with the libraries' attention")
    for operation in (window._sinks, window._sinks_gradients):
        operation.register_kernel("cpu")(operation._init_fn)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: nullcontext())
    monkeypatch.setattr(attention, "forward", forward)
    monkeypatch.setattr(attention, "backward", backward)
    rows = attention.sums_by_token
    monkeypatch.setattr(attention, "sums_by_token", lambda lse, q, borders: rows(lse, q, None))
    return window.sink_attention


@pytest.mark.parametrize(("kind", "past"), [("rows", 0), ("packed", 0), ("continued", 15)])
def test_sink_attention_around_the_window(sink_attention, kind, past):
    inputs, index, segments = case(50, kind, past)
    results = []
    for compute, borders in ((reference.sink_attention, None), (sink_attention, segments)):
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        o = compute(*leaves, 16, index, segments, None, borders)
        torch.manual_seed(1)
        results.append([o, *torch.autograd.grad(o, leaves, torch.randn_like(o))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
