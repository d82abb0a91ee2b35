"""The loss of a language head: with or without logits, and the term of log Z."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.ops import at_least_float32, linear_cross_entropy
from nirvana.ops.cross_entropy import IGNORE

Divisor = Tensor | int | None
"""What a summed loss is divided by; None means the number of labels."""


def shifted(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
    """Returns the label of each token's successor.

    Args:
        labels: `[B, T]`, the label of each token.
        shift_labels: `[B, T]`, labels that are shifted already, in place of `labels`.

    Returns:
        `[B, T]`, -100 where the loss leaves a token out.
    """
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def fused_loss(
    h: Tensor, weight: Tensor, labels: Tensor, divisor: Divisor, z_weight: float
) -> tuple[Tensor, Tensor | None]:
    """The library's causal loss, without logits.

    Args:
        h: `[B, T, D]`, the hidden states.
        weight: `[V, D]`, of a head that `is_plain`.
        labels: `[B, T]`, of `shifted`.
        divisor: of the sum over tokens.
        z_weight: weight of (log Z)^2 in the loss.

    Returns:
        the loss, and the term of log Z in it, None if `z_weight` is 0; scalars.
    """
    labels = labels.flatten()
    count = (labels != IGNORE).sum() if divisor is None else divisor
    count = torch.as_tensor(count, device=h.device)
    total, squares = linear_cross_entropy(h.flatten(0, 1), weight, labels, z_weight)
    return total / count, z_weight * squares / count if z_weight else None


def z_loss(logits: Tensor, labels: Tensor, divisor: Divisor, z_weight: float) -> Tensor:
    """The term of log Z in a loss that was computed from logits.

    Args:
        logits: `[B, T, V]`.
        labels: `[B, T]`, of `shifted`.
        divisor: of the sum over tokens.
        z_weight: weight of (log Z)^2 in the loss.

    Returns:
        a scalar, float32 (float64 for float64).
    """
    squares = at_least_float32(logits[labels != IGNORE]).logsumexp(-1).square()
    return z_weight * squares.sum() / (squares.numel() if divisor is None else divisor)


def is_plain(head: nn.Module) -> bool:
    """Returns whether a head is a product with its weight and nothing else: no adapter,
    parametrisation, quantised or offloaded weight, bias or hook that its own forward would apply.

    Args:
        head: any module.
    """
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, Tensor)
        and head.weight.is_floating_point()
        and not head.weight.is_meta
        and not (head._forward_hooks or head._forward_pre_hooks)
        and "forward" not in vars(head)
    )
