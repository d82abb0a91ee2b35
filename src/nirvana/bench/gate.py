"""The check before any measurement: the fast path against float32 on the CPU, same weights."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.bench.measure import clean_room
from nirvana.model.config import NirvanaConfig, preset
from nirvana.model.nirvana import NirvanaForCausalLM, compile_blocks
from nirvana.ops.dispatch import recorded_backends

LAYERS = 4
BATCH, LENGTH = 2, 1024
LIMITS = {"loss": 0.01, "logits": 0.03, "gradient": 0.08}
SMALL = 0.01
"""A gradient below this share of the norm of all is measured against that share instead."""


@dataclass(frozen=True)
class Gate:
    """Relative errors in the Euclidean norm; gradients are the five largest, largest first."""

    loss: float
    logits: float
    gradients: dict[str, float]
    backends: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        errors = {
            "loss": self.loss,
            "logits": self.logits,
            "gradient": max(self.gradients.values(), key=_nan_as_inf),
        }
        return all(errors[name] <= limit for name, limit in LIMITS.items())

    def __str__(self) -> str:
        name, error = next(iter(self.gradients.items()))
        return (
            f"loss {self.loss:.2%} (limit {LIMITS['loss']:.0%}), "
            f"logits {self.logits:.2%} (limit {LIMITS['logits']:.0%}), "
            f"largest gradient error {error:.2%} at {name} (limit {LIMITS['gradient']:.0%})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "limits": LIMITS, "passed": self.passed}


def check(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Gate:
    """Compares loss, logits and gradients of the fast path and of float32 on the CPU.

    The model has the preset's width, 4 layers, B = 2, T = 1024, no zero parameters, and a window
    shorter than T.

    Args:
        name: of the preset.
        device: of the fast path.
        dtype: of the fast path.
        compiled: whether its blocks are compiled.

    Returns:
        the relative errors.
    """
    window = preset(name).sliding_window or LENGTH
    config = preset(name, num_hidden_layers=LAYERS, sliding_window=min(window, LENGTH // 2))
    torch.manual_seed(0)
    exact = filled(NirvanaForCausalLM(config), config).to(dtype).float()
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    logits, loss, gradients = outcome(exact, ids, skip_logits=False)
    with clean_room():
        fast = NirvanaForCausalLM(config)
        fast.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        fast.load_state_dict(exact.state_dict())
        del exact
        with recorded_backends() as backends, torch.no_grad():
            fast(input_ids=ids.to(device))
        if compiled:
            compile_blocks(fast.model.layers)
        fast_logits, fast_loss, fast_gradients = outcome(fast, ids.to(device), skip_logits=True)
        del fast
    total = sum(g.square().sum().item() for g in gradients.values()) ** 0.5
    errors = {
        name: ((fast_gradients[name] - g).norm() / g.norm().clamp(min=SMALL * total)).item()
        for name, g in gradients.items()
    }
    largest = sorted(errors.items(), key=lambda item: _nan_as_inf(item[1]), reverse=True)
    return Gate(
        loss=((fast_loss - loss) / loss).abs().item(),
        logits=((fast_logits - logits).norm() / logits.norm()).item(),
        gradients=dict(largest[:5]),
        backends=backends,
    )


def filled(model: nn.Module, config: NirvanaConfig) -> nn.Module:
    """Draws the parameters that are zero at random, because zero factors disable whole branches.

    Args:
        model: changed in place.
        config: of the model.

    Returns:
        the model.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=config.initializer_range)
    return model


def outcome(
    model: nn.Module, ids: Tensor, skip_logits: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Computes logits, loss and every parameter's gradient.

    Args:
        model: a causal language model.
        ids: `[B, T]`, int64, inputs and labels.
        skip_logits: compute the loss as in training, without logits.

    Returns:
        logits `[B, T, V]`, the loss, and gradients by name, in float32 on the CPU.
    """
    how = {"skip_logits": True} if skip_logits else {}
    loss = model(input_ids=ids, labels=ids, **how).loss
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"{name} has no gradient")
        gradients[name] = parameter.grad.float().cpu()
    return logits.float().cpu(), loss.detach().float().cpu(), gradients


def _nan_as_inf(error: float) -> float:
    return error if error == error else float("inf")
