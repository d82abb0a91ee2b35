"""AdamW, what it decays, and its learning rate as a function of the step."""

import math
import re
from collections.abc import Collection, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nirvana.train.config import OptimConfig

_NOT_DECAYED = re.compile(r"(^|\.)bias$|embed|norm", re.IGNORECASE)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter of any model: to matrices that are not an
    embedding, norm or bias."""
    return parameter.ndim >= 2 and not _NOT_DECAYED.search(name)


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    undecayed: Collection[str] = (),
) -> torch.optim.AdamW:
    """AdamW over named parameters: groups with and without weight decay, each of either parameters
    that are cut over processes or whole ones, which no kernel of the fused form takes together.

    On CUDA in its fused form, which can leave a step out under a tensor's control (`found_inf`),
    without a synchronisation of the host. Not on the CPU: there that form rounds the last few
    entries of a tensor differently, so that the result would depend on how parameters are cut.

    Args:
        parameters: pairs of a name and a parameter.
        config: of the optimiser.
        undecayed: names that take no weight decay, beside those that `is_decayed` leaves out.

    Returns:
        the optimiser.
    """
    named = list(parameters)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        decayed = name not in undecayed and is_decayed(name, parameter)
        kind = (decayed, isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if decayed else 0.0}
            for (decayed, _), group in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.is_cuda for _, parameter in named),
    )


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of an update: linear warm-up, then a cosine down to `min_lr`.

    Args:
        step: which update, 0..steps-1.
        steps: updates of the whole run; the last has `min_lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = steps - 1 - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / length) if length > 0 else 1.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
