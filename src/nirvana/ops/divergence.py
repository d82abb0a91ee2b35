"""The loss of a distillation, in chunks: the logits of all tokens never exist in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nirvana.ops.cross_entropy import IGNORE
from nirvana.ops.precision import at_least_float32

CHUNK = 4096
"""Tokens whose logits exist in float32 at a time."""


def distillation_loss(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nirvana.ops.distillation_loss`."""
    return DistillationLoss.apply(logits, taught, labels, within, loss_and_gradient)


class DistillationLoss(torch.autograd.Function):
    """The loss, with the gradient of the logits computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        taught: Tensor,
        labels: Tensor,
        within: Tensor,
        compute: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of the loss, of the divergence and of the cross-entropy.

        Args:
            ctx: autograd's.
            logits: `[N, V]`.
            taught: `[N, V]`.
            labels: `[N]`.
            within: `[N]`.
            compute: `loss_and_gradient`, or a compiled form of it.

        Returns:
            three scalars; the first has a gradient, of `logits` alone.
        """
        dlogits = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        sums = []
        for first in range(0, max(1, len(logits)), CHUNK):
            rows = slice(first, first + CHUNK)
            each, gradient = compute(logits[rows], taught[rows], labels[rows], within[rows])
            sums.append(each)
            if dlogits is not None:
                dlogits[rows] = gradient
        ctx.save_for_backward(dlogits)
        loss, divergence, entropy = torch.stack(sums).sum(0).unbind()
        ctx.mark_non_differentiable(divergence, entropy)
        return loss, divergence, entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradient of the forward pass by dloss.

        Raises:
            RuntimeError: with `create_graph`: that gradient is a constant here, so that a second
                derivative would miss what it depends on.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("the loss of a distillation has no second derivative")
        (dlogits,) = ctx.saved_tensors
        return dlogits * dloss.to(dlogits.dtype), None, None, None, None


def loss_and_gradient(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of the loss, the divergence and the cross-entropy of rows, and the gradient.

    Args:
        logits: `[N, V]`.
        taught: `[N, V]`.
        labels: `[N]`, int64, `IGNORE` where a row does not count.
        within: bool, `[N]`.

    Returns:
        the sums, `[3]`, in float32 (float64 for float64), and the gradient of the loss, `[N, V]`
        in the dtype of `logits`.
    """
    own, target = (at_least_float32(x).log_softmax(-1) for x in (logits, taught))
    counted = labels != IGNORE
    index = torch.where(counted, labels, 0)[:, None]
    aim = target.exp()
    divergence = (aim * (target - own)).sum(-1)
    entropy = -own.gather(1, index)[:, 0]
    loss = torch.where(within, divergence, entropy)
    sums = torch.stack([(x * counted).sum() for x in (loss, divergence, entropy)])
    one_hot = torch.arange(logits.shape[1], device=logits.device) == index
    aim = torch.where(within[:, None], aim, one_hot.to(aim.dtype))
    return sums, ((own.exp() - aim) * counted[:, None]).to(logits.dtype)
