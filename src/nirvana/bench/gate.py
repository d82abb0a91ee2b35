"""The check before any figure: the fast path against float32 on the CPU, with the same weights."""

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
    """Relative errors in the Euclidean norm; the gradients are the five worst, worst first."""

    loss: float
    logits: float
    gradients: dict[str, float]
    backends: dict[str, list[str]]

    @property
    def passed(self) -> bool:
        worst = {
            "loss": self.loss,
            "logits": self.logits,
            "gradient": max(self.gradients.values(), key=_nan_is_worst),
        }
        return all(worst[name] <= limit for name, limit in LIMITS.items())

    def __str__(self) -> str:
        name, error = next(iter(self.gradients.items()))
        return (
            f"loss {self.loss:.2%} (limit {LIMITS['loss']:.0%}), "
            f"logits {self.logits:.2%} (limit {LIMITS['logits']:.0%}), "
            f"worst gradient {error:.2%} at {name} (limit {LIMITS['gradient']:.0%})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "limits": LIMITS, "passed": self.passed}


def check(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> Gate:
    """The preset's width in 4 layers, B 2, T 1024, every branch taking part.

    The window is cut to less than T, so that it matters.
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
    worst = sorted(errors.items(), key=lambda item: _nan_is_worst(item[1]), reverse=True)
    return Gate(
        loss=((fast_loss - loss) / loss).abs().item(),
        logits=((fast_logits - logits).norm() / logits.norm()).item(),
        gradients=dict(worst[:5]),
        backends=backends,
    )


def filled(model: nn.Module, config: NirvanaConfig) -> nn.Module:
    """The model with its zero parameters drawn anew, because zero factors hide whole branches."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=config.initializer_range)
    return model


def outcome(
    model: nn.Module, ids: Tensor, skip_logits: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and every parameter's gradient, in float32 on the CPU.

    Args:
        skip_logits: take the loss from the path that training takes, which makes no logits.
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


def _nan_is_worst(error: float) -> float:
    return error if error == error else float("inf")
