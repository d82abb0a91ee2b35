"""Cross-entropy of a linear head, in chunks: the logits of all tokens never exist together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens whose logits exist at a time."""
IGNORE = -100
"""The label of a token that the loss leaves out."""


def linear_cross_entropy(h: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """See `nirvana.ops.linear_cross_entropy`."""
    return LinearCrossEntropy.apply(h, weight, labels, loss_and_gradient)


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, with both gradients computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        of_logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The summed loss.

        Args:
            ctx: autograd's.
            h: `[N, D]`.
            weight: `[V, D]`.
            labels: `[N]`.
            of_logits: `loss_and_gradient`, or a compiled form of it.

        Returns:
            a scalar.
        """
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        losses = []
        with torch.autocast(h.device.type, enabled=False):
            for first in range(0, len(h), CHUNK):
                rows = slice(first, first + CHUNK)
                loss, dlogits = of_logits(h[rows] @ weight.mT, labels[rows])
                losses.append(loss)
                if dh is not None:
                    torch.mm(dlogits, weight, out=dh[rows])
                if dweight is not None:
                    dweight.addmm_(dlogits.mT, h[rows])
        ctx.save_for_backward(dh, dweight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients of the forward pass by dloss."""
        grads = (x if x is None else x * dloss.to(x.dtype) for x in ctx.saved_tensors)
        return *grads, None, None


def loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over rows, and its gradient with respect to the logits.

    Args:
        logits: `[N, V]`.
        labels: `[N]`, int64, `IGNORE` where a row does not count.

    Returns:
        a scalar in float32 (float64 for float64), and `[N, V]` in the logits' dtype.
    """
    dtype = logits.dtype
    logits = logits if dtype == torch.float64 else logits.float()
    counted = labels != IGNORE
    index = torch.where(counted, labels, 0)[:, None]
    log_sum = logits.logsumexp(1, keepdim=True)
    loss = ((log_sum - logits.gather(1, index))[:, 0] * counted).sum()
    one_hot = torch.arange(logits.shape[1], device=logits.device) == index
    dlogits = ((logits - log_sum).exp() - one_hot.to(logits.dtype)) * counted[:, None]
    return loss, dlogits.to(dtype)
