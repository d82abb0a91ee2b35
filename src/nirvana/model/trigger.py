"""Task-Aware Memory Trigger: one step of gradient descent per layer on a self-supervised loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.model.config import NirvanaConfig
from nirvana.ops import at_least_float32, decayed_sum, no_autocast, suits_kernels

EPS = 1e-6
"""Inside the root of the normalisation over C."""
WIDEST = 128
"""C that the kernels take."""


class WeightBank(nn.Module):
    """Parameters shared by all layers and tokens, from which fast weights are mixed.

    `weight [C, C, R]` (in, out, bank), `gain`, `bias` and `shift [C, R]`. With fast parameters
    p = (p_w, p_g, p_b, p_s), each `[R]`, and n over C with biased variance:

        z(x; p) = sum_ir x_i weight[i, :, r] p_w[r] + bias p_b
        f(x; p) = x + (gain p_g) * n(z(x; p)) + shift p_s
    """

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        C, R = config.task_dim, config.bank_size
        self.weight = nn.Parameter(torch.empty(C, C, R))
        self.gain = nn.Parameter(torch.empty(C, R))
        self.bias = nn.Parameter(torch.empty(C, R))
        self.shift = nn.Parameter(torch.empty(C, R))

    def start(self, x: Tensor) -> Tensor:
        """Fast parameters before the first step, all ones: `[B, T, 4, R]` for x `[B, T, ...]`."""
        return at_least_float32(x.new_ones(*x.shape[:2], 4, self.gain.shape[1]))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, gain, bias and shift."""
        return self.weight, self.gain, self.bias, self.shift

    def project(self, x: Tensor) -> Tensor:
        """x `[..., C]` through every weight of the bank: U = x . weight, `[..., C, R]`."""
        weight = self.weight.to(x.dtype)
        return (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


class NoBank(nn.Module):
    """The bank of a model without Trigger: no parameters, fast parameters of length 0."""

    def __init__(self, config: NirvanaConfig):
        super().__init__()

    def start(self, x: Tensor) -> Tensor:
        """Nothing to carry: `[B, T, 4, 0]`."""
        return at_least_float32(x.new_empty(*x.shape[:2], 4, 0))


class Trigger(nn.Module):
    """One closed-form gradient step on 1/2 ||f(k; p) - v||^2, then the task vector f(q; p).

    Along the sample the gradient is remembered, m_t = decay m_{t-1} + g_t, and p_t <- p_t - lr m_t
    goes on to the next layer; a "normalised" step divides each of m's four vectors by its root mean
    square first. No autograd inside, so it works under `torch.inference_mode`; all
    arithmetic is float32 (float64 stays float64).
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        self.exact = config.trigger_gradient == "exact"
        self.normalised = config.trigger_step == "normalised"
        self.enabled = True
        self.fixed_lr = config.per_trigger("trigger_lr", layer_idx)
        if config.trigger_lr_learnable:
            # In hundredths: an optimiser's steps are then small against the value, not above it.
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
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            qkv: `[B, T, 3 C]`, the token's task query, key and value.
            fast: `[B, T, 4, R]`, fast parameters from the layer below.
            state: m before the first token, `[B, 4, R]`; None means zero.
            segments: `[B, T]`, see `nirvana.ops`; the memory restarts with every sample.

        Returns: task vector `[B, T, C]`, fast parameters after the step, m after the last token
            (None without memory).
        """
        with no_autocast(qkv.device):
            q, k, v = qkv.chunk(3, dim=-1)
            if self.enabled:
                g = trigger_gradient(k, v, fast, bank, self.exact)
                if self.has_memory:
                    initial = None if state is None else state.flatten(1)
                    m, last = decayed_sum(g.flatten(2), self.decay, initial, segments)
                    g, state = m.view_as(g), last.view_as(g[:, 0])
                if self.normalised:
                    g = g * (g.square().mean(-1, keepdim=True) + EPS).rsqrt()
                fast = fast - self.lr * g
            h_task = trigger_apply(q, fast, bank)
        return h_task.to(qkv.dtype), fast, state


def trigger_gradient(
    k: Tensor, v: Tensor, fast: Tensor, bank: WeightBank, exact: bool = True
) -> Tensor:
    """Gradient of 1/2 ||f(k; p) - v||^2 with respect to p, in closed form.

    Args:
        k, v: `[..., C]`.
        fast: p, `[..., 4, R]`.
        exact: False leaves out the normalisation's own derivative, as the released code does.

    Returns: `[..., 4, R]`.
    """
    if fused(k):
        from nirvana.ops import triton_trigger

        return triton_trigger.trigger_gradient(k, v, fast, *bank.parts(), exact)
    k, v = at_least_float32(k), at_least_float32(v)
    U = bank.project(k)
    f, n, s = _apply(k, U, fast, bank)
    gain, bias, shift = (x.to(k.dtype) for x in (bank.gain, bank.bias, bank.shift))
    e = f - v
    u = F.linear(fast[..., 1, :], gain) * e
    if exact:
        u = u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True)
    dz = u / s
    g_w = (U * dz[..., None]).sum(-2)
    return torch.stack([g_w, (e * n) @ gain, dz @ bias, e @ shift], dim=-2)


def trigger_apply(x: Tensor, fast: Tensor, bank: WeightBank) -> Tensor:
    """f(x; p) `[..., C]`, for x `[..., C]` and p `[..., 4, R]`."""
    if fused(x):
        from nirvana.ops import triton_trigger

        return triton_trigger.trigger_apply(x, fast, *bank.parts())
    x = at_least_float32(x)
    return _apply(x, bank.project(x), fast, bank)[0]


def fused(x: Tensor) -> bool:
    """Whether the Trigger's kernels take x `[B, T, C]`: half precision on a GPU, and not one token,
    for which PyTorch's products are the faster ones; nor a C whose matrices of the bank are too
    large for a multiprocessor's memory."""
    return suits_kernels(x) and x.shape[-2] > 1 and x.shape[-1] <= WIDEST


def _apply(x: Tensor, U: Tensor, fast: Tensor, bank: WeightBank) -> tuple[Tensor, Tensor, Tensor]:
    """f(x; p) `[..., C]`, and the n and s that it met, for U = `bank.project(x)`."""
    p_w, p_g, p_b, p_s = fast.unbind(-2)
    gain, bias, shift = (y.to(x.dtype) for y in (bank.gain, bank.bias, bank.shift))
    z = (U * p_w[..., None, :]).sum(-1) + F.linear(p_b, bias)
    variance, mean = torch.var_mean(z, dim=-1, correction=0, keepdim=True)
    s = (variance + EPS).sqrt()
    n = (z - mean) / s
    return x + F.linear(p_g, gain) * n + F.linear(p_s, shift), n, s


class TriggerReport(NamedTuple):
    """What one layer's Trigger did, for every token; float32, without gradients."""

    loss_before: Tensor  # [B, T], 1/2 ||f(k; p) - v||^2 with the fast parameters from below
    loss_after: Tensor  # [B, T], the same with those after the step
    change: Tensor  # [B, T], Euclidean norm of the step in all four fast vectors
    gates: Tensor  # [B, T, 1] t, or [B, T, 2] t and t' ("independent")


@torch.no_grad()
def trigger_report(
    qkv: Tensor, before: Tensor, after: Tensor, gates: Tensor, bank: WeightBank
) -> TriggerReport:
    """The report of a step from `before` to `after`, each `[B, T, 4, R]`; qkv `[B, T, 3 C]`."""
    with no_autocast(qkv.device):
        _, k, v = at_least_float32(qkv).chunk(3, dim=-1)
        U = bank.project(k)
        return TriggerReport(
            loss_before=(_apply(k, U, before, bank)[0] - v).square().sum(-1) / 2,
            loss_after=(_apply(k, U, after, bank)[0] - v).square().sum(-1) / 2,
            change=(after - before).flatten(2).norm(dim=-1),
            gates=at_least_float32(gates).detach(),
        )


@contextmanager
def without_trigger(model: nn.Module) -> Iterator[None]:
    """Inside the block no Trigger of `model` takes its step: fast parameters stay all ones."""
    triggers = [module for module in model.modules() if isinstance(module, Trigger)]
    before = [trigger.enabled for trigger in triggers]
    try:
        for trigger in triggers:
            trigger.enabled = False
        yield
    finally:
        for trigger, enabled in zip(triggers, before, strict=True):
            trigger.enabled = enabled
