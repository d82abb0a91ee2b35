"""AdamW, the parameters it decays, and the learning rate schedule."""

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
    """Builds AdamW over named parameters.

    The groups separate parameters with weight decay from those without, and sharded parameters from
    whole ones, which the fused kernels do not accept together. On CUDA the fused form is used,
    which can skip a step depending on a tensor (`found_inf`), without synchronisation. On the CPU
    it is not: there it rounds the last few entries of a tensor differently, so that the result
    would depend on the sharding.

    Args:
        parameters: the trained parameters by name.
        config: learning rate, betas, epsilon and weight decay.
        undecayed: names that take no weight decay, beside those that `is_decayed` leaves out.

    Returns:
        The optimiser, without state.
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
    """Computes the learning rate of a step: linear warm-up, then a cosine down to `min_lr`.

    Args:
        step: 0 to steps - 1.
        config: `lr`, `min_lr` and `warmup_steps`.
        steps: steps of the whole run; the last one has `min_lr`.

    Returns:
        The learning rate, from above 0 to `lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = steps - 1 - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / length) if length > 0 else 1.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
