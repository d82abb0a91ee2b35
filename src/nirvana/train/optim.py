"""AdamW, Muon, the parameters that each updates and decays, and the learning rate schedules."""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nirvana.errors import InputError
from nirvana.train.config import OptimConfig

_NOT_DECAYED = re.compile(r"(^|\.)bias$|embed|norm", re.IGNORECASE)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter of any model: to matrices that are not an
    embedding, norm or bias."""
    return parameter.ndim >= 2 and not _NOT_DECAYED.search(name)


class MuonAndAdamW:
    """Muon for some parameters and AdamW for all others, used as one optimiser.

    Attributes:
        param_groups: those of both.
        state: parameter -> its state in the optimiser that updates it.
    """

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self._parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state: dict[nn.Parameter, Any] = {
            parameter: part.state[parameter]
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def step(self) -> None:
        """Updates all parameters by their gradients."""
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        """Removes all gradients."""
        for part in self._parts:
            part.zero_grad()


Optimizer = torch.optim.AdamW | MuonAndAdamW


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    undecayed: Collection[str] = (),
    matrices: Collection[str] = (),
) -> Optimizer:
    """Builds the optimiser over named parameters.

    The groups separate parameters with weight decay from those without, and sharded parameters from
    whole ones, which AdamW's fused kernels do not accept together. On CUDA its fused form is used,
    which can skip a step depending on a tensor, without synchronisation. On the CPU it is not:
    there it rounds the last few entries of a tensor differently, so that the result would depend on
    the sharding.

    Muon's steps are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982), so
    that learning rate and weight decay apply to both.

    Args:
        parameters: the trained parameters by name.
        config: name, learning rate, betas, epsilon, momentum and weight decay.
        undecayed: names that take no weight decay, beside those that `is_decayed` leaves out.
        matrices: names of the parameters that Muon updates if `config.name` is "muon", all of two
            dimensions.

    Returns:
        The optimiser, without state.

    Raises:
        InputError: for Muon where there are no matrices for it.
    """
    named = list(parameters)
    by_muon = {n: p for n, p in named if config.name == "muon" and n in matrices}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if name in by_muon:
            continue
        decayed = name not in undecayed and is_decayed(name, parameter)
        kind = (decayed, isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    adamw = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": config.weight_decay if decayed else 0.0}
            for (decayed, _), group in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(parameter.is_cuda for _, parameter in named),
    )
    if config.name == "adamw":
        return adamw
    if not by_muon:
        raise InputError(
            "configuration: optim.name = 'muon' must be adamw: it has no matrices here"
        )
    muon = torch.optim.Muon(
        list(by_muon.values()),
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return MuonAndAdamW(muon, adamw)


def step_if_finite(optimizer: Optimizer, finite: Tensor) -> None:
    """Takes a step, moments and counters included, unless loss or gradient was not finite.

    AdamW's fused kernels decide on the device; with Muon the host waits for the decision.

    Args:
        optimizer: of `build_optimizer`.
        finite: bool, a scalar.
    """
    if not isinstance(optimizer, MuonAndAdamW) and optimizer.defaults["fused"]:
        # Where this is 1 the fused kernel skips the step.
        setattr(optimizer, "found_inf", (~finite).float())  # noqa: B010  (undeclared there)
        optimizer.step()
    elif finite:
        optimizer.step()


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Computes the learning rate of a step: a linear warm-up, then the schedule down to `min_lr`.

    "cosine" and "linear" fall from the end of the warm-up to the last step. "wsd" (warm-up, stable,
    decay) stays at `lr` for `stable_steps` and then falls as 1 - sqrt(progress), the shape that
    did best in Hägele et al. (arXiv 2405.18392).

    Args:
        step: 0 to steps - 1.
        config: `lr`, `min_lr`, `warmup_steps`, `schedule` and `decay_share`.
        steps: steps of the whole run; the last one has `min_lr`.

    Returns:
        The learning rate, from above 0 to `lr`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    begin = config.warmup_steps
    if config.schedule == "wsd":
        # The first step of the decay is already below lr: the stable phase has its full length.
        begin = stable_steps(config, steps) - 1
        if step <= begin:
            return config.lr
    length = steps - 1 - begin
    progress = min(1.0, (step - begin) / length) if length > 0 else 1.0
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "wsd": 1 - math.sqrt(progress),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * shape


def stable_steps(config: OptimConfig, steps: int) -> int:
    """Computes the number of first steps whose rate does not depend on the length of the run.

    Args:
        config: `schedule`, `warmup_steps` and `decay_share`.
        steps: steps of the whole run.

    Returns:
        Under "wsd" the steps before the decay, warm-up included; else 0. Two runs that differ only
        in `run.steps`, `optim.decay_share` and `optim.min_lr` are equal over the smaller of their
        numbers.
    """
    if config.schedule != "wsd":
        return 0
    decay = max(1, round(config.decay_share * steps))
    return min(steps, max(config.warmup_steps, steps - decay))
