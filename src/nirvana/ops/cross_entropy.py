"""Cross-entropy of a linear head without the logits of all tokens."""

from typing import Any

import torch
from torch import Tensor

from nirvana.ops import in_autocast

CHUNK = 4096
"""Tokens whose logits exist at a time."""
IGNORE = -100
"""The label of a token that is not asked."""


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """sum_t -log softmax(weight h_t)[labels_t], over the tokens whose label is not `IGNORE`.

    Both gradients are made in the forward pass, chunk by chunk; the logits are in h's dtype, what
    is done with them in float32.

    Args:
        h: `[N, D]`.
        weight: `[V, D]`; under autocast in the dtype of autocast's products.
        labels: `[N]`, int64.

    Returns: a scalar, float32 (float64 for float64).
    """
    return _LinearCrossEntropy.apply(in_autocast(h), in_autocast(weight), labels)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        h_bar = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        weight_bar = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_logits = _compiled() if h.is_cuda else _loss_and_gradient
        losses = []
        with torch.autocast(h.device.type, enabled=False):
            for first in range(0, len(h), CHUNK):
                rows = slice(first, first + CHUNK)
                loss, bar = of_logits(h[rows] @ weight.mT, labels[rows])
                losses.append(loss)
                if h_bar is not None:
                    torch.mm(bar, weight, out=h_bar[rows])
                if weight_bar is not None:
                    weight_bar.addmm_(bar.mT, h[rows])
        ctx.save_for_backward(h_bar, weight_bar)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, loss_bar: Tensor) -> tuple[Tensor | None, ...]:
        bars = (bar if bar is None else bar * loss_bar.to(bar.dtype) for bar in ctx.saved_tensors)
        return *bars, None


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows, and its gradient in the logits' dtype."""
    dtype = logits.dtype
    logits = logits if dtype == torch.float64 else logits.float()
    asked = labels != IGNORE
    places = torch.where(asked, labels, 0)[:, None]
    log_sum = logits.logsumexp(1, keepdim=True)
    loss = ((log_sum - logits.gather(1, places))[:, 0] * asked).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == places
    bar = ((logits - log_sum).exp() - hit.to(logits.dtype)) * asked[:, None]
    return loss, bar.to(dtype)


_COMPILED: list[Any] = []


def _compiled() -> Any:
    """One or two passes over the logits, where PyTorch as it is would take six."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(_loss_and_gradient, dynamic=False))
    return _COMPILED[0]
