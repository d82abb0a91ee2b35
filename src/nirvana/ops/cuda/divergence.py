"""The loss of a distillation with its work on logits compiled: a few passes over them, in the dtype
in which they are stored."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from nirvana.ops.divergence import DistillationLoss, loss_and_gradient


def distillation_loss(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nirvana.ops.distillation_loss`."""
    return DistillationLoss.apply(logits, taught, labels, within, _compiled())


@cache
def _compiled() -> Any:
    return torch.compile(loss_and_gradient, dynamic=False)
