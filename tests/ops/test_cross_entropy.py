"""The loss without logits against the library's, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from nirvana.ops import cross_entropy, linear_cross_entropy
from nirvana.ops.cross_entropy import IGNORE


def inputs(N=23, D=7, V=11):
    h = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (N,))
    return h, weight, labels


@pytest.mark.parametrize("chunk", [4, 23, 100])
@pytest.mark.parametrize("ignored", [0, 5, 23])
def test_is_the_cross_entropy_of_the_logits(monkeypatch, chunk, ignored):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    h, weight, labels = inputs()
    labels[torch.randperm(23)[:ignored]] = IGNORE
    ours, squares = linear_cross_entropy(h, weight, labels)
    assert not squares.requires_grad
    gradients = torch.autograd.grad(3 * ours, (h, weight))
    theirs = F.cross_entropy(h @ weight.T, labels, reduction="sum", ignore_index=IGNORE)
    expected = torch.autograd.grad(3 * theirs, (h, weight))
    torch.testing.assert_close(ours, theirs)
    for actual, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("chunk", [4, 23])
def test_the_z_loss_is_that_of_the_logits(monkeypatch, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    h, weight, labels = inputs()
    labels[::4] = IGNORE
    plain, _ = linear_cross_entropy(h, weight, labels)
    ours, squares = linear_cross_entropy(h, weight, labels, 0.3)
    logits = h @ weight.T
    theirs = logits[labels != IGNORE].logsumexp(1).square().sum()
    torch.testing.assert_close(squares, theirs)
    torch.testing.assert_close(ours, plain + 0.3 * theirs)
    gradients = torch.autograd.grad(ours - plain, (h, weight))
    expected = torch.autograd.grad(0.3 * theirs, (h, weight))
    for actual, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen):
    tensors = inputs()
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors)[0].backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad.any()


def test_makes_products_in_the_dtype_of_autocast():
    h, weight, labels = (x.float() if x.is_floating_point() else x for x in inputs())
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(h, weight, labels)
        expected = F.cross_entropy(F.linear(h, weight).float(), labels, reduction="sum")
    loss.backward()
    assert loss.dtype == h.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_a_second_derivative_is_refused():
    """The gradients of the forward pass are constants, so it would lack most of its terms."""
    h, weight, labels = inputs()
    loss, _ = linear_cross_entropy(h, weight, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_no_rows_are_no_loss():
    loss, squares = linear_cross_entropy(*inputs(N=0))
    assert loss == squares == 0
