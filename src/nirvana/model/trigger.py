"""Task-Aware Memory Trigger: one step of gradient descent per layer on a self-supervised loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nirvana.model.config import NirvanaConfig
from nirvana.ops import (
    at_least_float32,
    decayed_sum,
    no_autocast,
    trigger_apply,
    trigger_gradient,
)

STEP_EPS = 1e-6
"""Added to the mean square of the step before the root, with `trigger_step` "normalised"."""


class WeightBank(nn.Module):
    """Parameters shared by all layers and tokens, from which fast weights are mixed.

    `weight` `[C, C, R]` (in, out, bank), `gain`, `bias` and `shift` `[C, R]`, which
    `nirvana.ops.trigger_apply` combines with fast parameters p = (p_w, p_g, p_b, p_s), each `[R]`.

    Args:
        config: of the model; C is `task_dim`, R `bank_size`.
    """

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        C, R = config.task_dim, config.bank_size
        self.weight = nn.Parameter(torch.empty(C, C, R))
        self.gain = nn.Parameter(torch.empty(C, R))
        self.bias = nn.Parameter(torch.empty(C, R))
        self.shift = nn.Parameter(torch.empty(C, R))

    def start(self, x: Tensor) -> Tensor:
        """Fast parameters before the first step, all ones.

        Args:
            x: `[B, T, ...]`, for its shape, device and dtype.

        Returns:
            `[B, T, 4, R]`, float32 (float64 for float64).
        """
        return at_least_float32(x.new_ones(*x.shape[:2], 4, self.gain.shape[1]))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, gain, bias and shift, the last arguments of the operations of the Trigger."""
        return self.weight, self.gain, self.bias, self.shift


class NoBank(nn.Module):
    """The bank of a model without Trigger: no parameters, fast parameters of length 0."""

    def __init__(self, config: NirvanaConfig):
        super().__init__()

    def start(self, x: Tensor) -> Tensor:
        """Fast parameters of length 0, `[B, T, 4, 0]`, for x `[B, T, ...]`."""
        return at_least_float32(x.new_empty(*x.shape[:2], 4, 0))


class Trigger(nn.Module):
    """One closed-form gradient step on 1/2 ||f(k; p) - v||^2, then the task vector f(q; p).

    Along the sample gradients are summed with a decay, m_t = decay m_{t-1} + g_t, and the next
    layer receives p_t - lr m_t; a "normalised" step first divides each of m's four vectors by its
    root mean square. The gradient needs no autograd: it works under `torch.inference_mode`.
    Arithmetic is float32 (float64 stays float64).

    Args:
        config: of the model.
        layer_idx: of the layer, counted from 0; selects per-layer settings.
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        self.exact = config.trigger_gradient == "exact"
        self.normalised = config.trigger_step == "normalised"
        self.enabled = True
        self.fixed_lr = config.per_trigger("trigger_lr", layer_idx)
        if config.trigger_lr_learnable:
            # In hundredths, so that an optimiser's step is small relative to the value.
            self.lr_percent = nn.Parameter(torch.empty(()))
        self.fixed_decay = config.per_trigger("trigger_decay", layer_idx)
        self.has_memory = config.has_memory
        if config.trigger_decay_learnable:
            self.decay_logit = nn.Parameter(torch.empty(()))

    @property
    def lr(self) -> Tensor | float:
        """Step size; may be negative."""
        if "lr_percent" not in self._parameters:
            return self.fixed_lr
        return at_least_float32(self.lr_percent) / 100

    @property
    def decay(self) -> Tensor | float:
        """In 0..1; learned as the logistic function of a parameter."""
        if "decay_logit" not in self._parameters:
            return self.fixed_decay
        return at_least_float32(self.decay_logit).sigmoid()

    def forward(
        self,
        qkv: Tensor,
        fast: Tensor,
        bank: WeightBank,
        state: Tensor | None = None,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes the step of every token.

        Args:
            qkv: `[B, T, 3 C]`, the token's task query, key and value.
            fast: `[B, T, 4, R]`, fast parameters from the layer below.
            bank: the model's bank.
            state: m before the first token, `[B, 4, R]`; None means zero.
            segments: `[B, T]`, see `nirvana.ops`; the memory restarts with every sample.
            lengths: `[B]`, see `nirvana.ops`.

        Returns:
            the task vector `[B, T, C]` in qkv's dtype; the fast parameters after the step,
            `[B, T, 4, R]`; and m after the last token, `[B, 4, R]` (None without memory).
        """
        with no_autocast(qkv.device):
            q, k, v = qkv.chunk(3, dim=-1)
            if self.enabled:
                g = trigger_gradient(k, v, fast, *bank.parts(), exact=self.exact)
                if self.has_memory:
                    initial = None if state is None else state.flatten(1)
                    m, last = decayed_sum(g.flatten(2), self.decay, initial, segments, lengths)
                    g, state = m.view_as(g), last.view_as(g[:, 0])
                if self.normalised:
                    g = g * (g.square().mean(-1, keepdim=True) + STEP_EPS).rsqrt()
                fast = fast - self.lr * g
            h_task = trigger_apply(q, fast, *bank.parts())
        return h_task.to(qkv.dtype), fast, state


class TriggerTrace(NamedTuple):
    """What one layer's Trigger computed for every token; float32, without gradients.

    Attributes:
        loss_before: `[B, T]`, 1/2 ||f(k; p) - v||^2 with the fast parameters from the layer below.
        loss_after: `[B, T]`, the same with those after the step.
        change: `[B, T]`, Euclidean norm of the step in all four fast vectors.
        gates: `[B, T, 1]` t, or `[B, T, 2]` t and t' ("independent"), in 0..1.
    """

    loss_before: Tensor
    loss_after: Tensor
    change: Tensor
    gates: Tensor


@torch.no_grad()
def trace_step(
    qkv: Tensor, before: Tensor, after: Tensor, gates: Tensor, bank: WeightBank
) -> TriggerTrace:
    """Computes the trace of a step.

    Args:
        qkv: `[B, T, 3 C]`, the token's task query, key and value.
        before: `[B, T, 4, R]`, fast parameters before the step.
        after: `[B, T, 4, R]`, those after it.
        gates: `[B, T, 1 or 2]`.
        bank: the model's bank.

    Returns:
        the trace.
    """
    with no_autocast(qkv.device):
        _, k, v = at_least_float32(qkv).chunk(3, dim=-1)
        return TriggerTrace(
            loss_before=(trigger_apply(k, before, *bank.parts()) - v).square().sum(-1) / 2,
            loss_after=(trigger_apply(k, after, *bank.parts()) - v).square().sum(-1) / 2,
            change=(after - before).flatten(2).norm(dim=-1),
            gates=at_least_float32(gates).detach(),
        )


@contextmanager
def without_trigger(model: nn.Module) -> Iterator[None]:
    """Disables the step of every Trigger of a model in a block: fast parameters stay all ones.

    Args:
        model: a model, or any module that contains Triggers.

    Yields:
        None.
    """
    triggers = [module for module in model.modules() if isinstance(module, Trigger)]
    before = [trigger.enabled for trigger in triggers]
    try:
        for trigger in triggers:
            trigger.enabled = False
        yield
    finally:
        for trigger, enabled in zip(triggers, before, strict=True):
            trigger.enabled = enabled
