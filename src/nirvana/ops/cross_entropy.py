"""Cross-entropy of a linear head, in chunks: the logits of all tokens never exist together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens whose logits exist at a time."""
IGNORE = -100
"""The label of a token that the loss leaves out."""


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.linear_cross_entropy`."""
    return LinearCrossEntropy.apply(h, weight, labels, z_loss, loss_and_gradient)


class LinearCrossEntropy(torch.autograd.Function):
    """The loss, with both gradients computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        of_logits: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and the sum of the (log Z)^2.

        Args:
            ctx: autograd's.
            h: `[N, D]`.
            weight: `[V, D]`.
            labels: `[N]`.
            z_loss: weight of (log Z)^2 in the loss.
            of_logits: `loss_and_gradient`, or a compiled form of it.

        Returns:
            two scalars; the second has no gradient.
        """
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        sums = []
        with torch.autocast(h.device.type, enabled=False):
            for first in range(0, max(1, len(h)), CHUNK):
                rows = slice(first, first + CHUNK)
                loss, squares, dlogits = of_logits(h[rows] @ weight.mT, labels[rows], z_loss)
                sums.append(torch.stack([loss, squares]))
                if dh is not None:
                    torch.mm(dlogits, weight, out=dh[rows])
                if dweight is not None:
                    dweight.addmm_(dlogits.mT, h[rows])
        ctx.save_for_backward(dh, dweight)
        loss, squares = torch.stack(sums).sum(0).unbind()
        ctx.mark_non_differentiable(squares)
        return loss, squares

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _dsquares: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients of the forward pass by dloss.

        Raises:
            RuntimeError: with `create_graph`. The gradients of the forward pass are constants here,
                so that a second derivative would miss what they depend on.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the loss without logits has no second derivative: leave out skip_logits"
            )
        grads = (x if x is None else x * dloss.to(x.dtype) for x in ctx.saved_tensors)
        return *grads, None, None, None


def loss_and_gradient(
    logits: Tensor, labels: Tensor, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and z_loss (log Z)^2 summed over rows, and the gradient of the logits.

    Args:
        logits: `[N, V]`.
        labels: `[N]`, int64, `IGNORE` where a row does not count.
        z_loss: at least 0.

    Returns:
        the loss and the sum of the (log Z)^2, scalars in float32 (float64 for float64), and the
        gradient of the loss, `[N, V]` in the logits' dtype.
    """
    dtype = logits.dtype
    logits = logits if dtype == torch.float64 else logits.float()
    counted = labels != IGNORE
    index = torch.where(counted, labels, 0)[:, None]
    log_sum = logits.logsumexp(1, keepdim=True)
    squares = (log_sum[:, 0].square() * counted).sum()
    loss = ((log_sum - logits.gather(1, index))[:, 0] * counted).sum() + z_loss * squares
    one_hot = torch.arange(logits.shape[1], device=logits.device) == index
    softmax = (logits - log_sum).exp()
    if z_loss:
        softmax = softmax * (1 + 2 * z_loss * log_sum)
    dlogits = (softmax - one_hot.to(logits.dtype)) * counted[:, None]
    return loss, squares, dlogits.to(dtype)
