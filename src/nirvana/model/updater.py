"""Specialized Memory Updater: linear and window attention, blended under the Trigger's control."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.trigger import Trigger, TriggerReport, WeightBank, trigger_report
from nirvana.ops import (
    at_least_float32,
    linear_branch,
    masked_attention,
    moved_heads,
    window_attention,
    window_branch,
)


class RMSNorm(nn.RMSNorm):
    """Over the last dimension, in the input's dtype also where the weight is float32 (autocast)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Updater(nn.Module):
    """Gated delta rule and sliding-window attention on shared q, k, v, in SPEC's words the memory.

    The first `num_prelude_layers` layers have the linear branch alone: y = b. The others blend it
    with the window branch a, with t = sigmoid(h_task . w_t) and zeta = MLP([b, a, h_task]):

        "convex"       y = t a + (1 - t) b + t (1 - t) zeta
        "independent"  y = t a + t' b + t t' zeta

    Without Trigger, `gate` = "input" puts x W in h_task's place, W: D -> C; with "constant" there
    is no h_task, and t (and t') are the logistic function of learned numbers.
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        D, H, C = config.hidden_size, config.num_attention_heads, config.task_dim
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.rope_theta = config.rope_theta
        self.convex = config.interpolation == "convex"
        self.has_window = layer_idx >= config.num_prelude_layers and config.branches == "both"
        self.has_trigger = self.has_window and config.has_trigger
        self.counts_tokens = config.branches == "linear" and layer_idx == config.counting_layer
        rank = max(1, D // 16)
        C = 0 if config.gate == "constant" else C
        task = 3 * C if self.has_trigger else C
        # One product instead of ten: q k v | gate | beta | alpha | low rank of q k v | task.
        self.sections = [3 * D, D, H, H] + ([3 * rank, task] if self.has_window else [])
        self.in_proj = nn.Linear(D, sum(self.sections), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * D, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.out_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)
        if not self.has_window:
            return
        if self.has_trigger:
            self.trigger = Trigger(config, layer_idx)
        self.window_up = nn.Parameter(torch.empty(3, rank, D))
        self.window_out = nn.Sequential(
            nn.Linear(D, max(1, D // 8), bias=False), nn.Linear(max(1, D // 8), D, bias=False)
        )
        num_gates = 1 if self.convex else 2
        self.constant = config.gate == "constant"
        if self.constant:
            self.gate_logit = nn.Parameter(torch.empty(num_gates))
        else:
            self.gate_proj = nn.Linear(C, num_gates, bias=False)
        self.zeta = nn.Sequential(
            nn.Linear(2 * D + C, max(1, D // 8), bias=False),
            nn.SiLU(),
            nn.Linear(max(1, D // 8), D, bias=False),
        )

    def forward(
        self,
        x: Tensor,
        fast: Tensor,
        bank: WeightBank,
        masks: Masks,
        cache: Cache | None = None,
        reports: list[TriggerReport] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x `[B, T, D]` and fast parameters `[B, T, 4, R]` to y `[B, T, D]` and the new fast.

        A list given as `reports` receives what the Trigger did.
        """
        state = self._states(cache)
        qkv, gate, beta, alpha, *rest = _Split.apply(self.in_proj(x), self.sections)
        b = self.linear(qkv, gate, beta, alpha, masks, state, cache)
        if not self.has_window:
            return b, fast
        low_rank, task = rest
        a = self.windowed(qkv, low_rank, masks, cache)
        if not self.has_trigger:
            return self.blend(a, b, task, self.gates(task)), fast
        h_task, moved, memory = self.trigger(task, fast, bank, state["memory"], masks["segments"])
        if cache is not None and memory is not None:
            cache.update_conv_state(memory, self.layer_idx, state_idx=1)
        gates = self.gates(h_task)
        if reports is not None:
            reports.append(trigger_report(task, fast, moved, gates, bank))
        return self.blend(a, b, h_task, gates), moved

    def gates(self, h_task: Tensor) -> Tensor:
        """t, or t and t' ("independent"): `[B, T, 1 or 2]`."""
        if self.constant:
            return self.gate_logit.sigmoid().to(h_task.dtype).expand(*h_task.shape[:2], -1)
        return self.gate_proj(h_task).sigmoid()

    def _states(self, cache: Cache | None) -> dict[str, Tensor | None]:
        """The layer's states before this call; all are read before any is updated, because the
        library's cache reports a layer as filled as soon as its convolution state is written."""
        if cache is None:
            return {"conv": None, "delta": None, "memory": None}
        has_memory = self.has_trigger and self.trigger.has_memory
        return {
            "conv": cache.get_conv_state(self.layer_idx),
            "delta": cache.get_recurrent_state(self.layer_idx),
            "memory": cache.get_conv_state(self.layer_idx, state_idx=1) if has_memory else None,
        }

    def linear(
        self,
        qkv: Tensor,
        gate: Tensor,
        beta: Tensor,
        alpha: Tensor,
        masks: Masks,
        state: dict[str, Tensor | None],
        cache: Cache | None,
    ) -> Tensor:
        """b: convolution, gated delta rule, gated norm, output projection."""
        rate, alpha, beta = (at_least_float32(y) for y in (self.A_log, alpha, beta))
        log_alpha = -rate.exp() * F.softplus(alpha + self.dt_bias)
        o, recent, S = linear_branch(
            qkv,
            self.conv_weight,
            log_alpha,
            beta.sigmoid(),
            self.head_dim,
            state["conv"],
            state["delta"],
            masks["segments"],
            masks["cu_seqlens"],
            final=cache is not None,
        )
        if cache is not None:  # the cache writes in place: only now, after the old state was used
            assert recent is not None
            assert S is not None
            cache.update_conv_state(recent, self.layer_idx)
            cache.update_recurrent_state(S, self.layer_idx)
            if self.counts_tokens:
                empty = qkv.new_empty(qkv.shape[0], 1, qkv.shape[1], 0)
                cache.update(empty, empty, self.layer_idx)
        o = self.out_norm(o) * F.silu(gate.unflatten(-1, (-1, self.head_dim)))
        return self.out_proj(o.flatten(2))

    def windowed(
        self,
        qkv: Tensor,
        low_rank: Tensor,
        masks: Masks,
        cache: Cache | None,
    ) -> Tensor:
        """a: the window branch on q, k, v moved by a low-rank term."""
        if cache is None and self.rope_theta is None and masks["window"] is None:
            borders = masks["segments"], masks["cu_seqlens"]
            o = window_branch(qkv, low_rank, self.window_up, self.head_dim, self.window, *borders)
            return self.window_out(o.flatten(2))
        q, k, v = moved_heads(qkv, low_rank, self.window_up, self.head_dim)
        o = attend(q, k, v, self.window, self.rope_theta, masks, cache, self.layer_idx)
        return self.window_out(o.flatten(2))

    def blend(self, a: Tensor, b: Tensor, h_task: Tensor, gates: Tensor) -> Tensor:
        """The interpolation of both branches."""
        t, other = (gates, 1 - gates) if self.convex else gates.split(1, dim=-1)
        together = torch.cat([b, a, h_task], dim=-1)
        zeta = self.zeta(together)
        # Read back from there, so that a compiled backward keeps one copy of each and not two.
        b, a = together[..., : 2 * b.shape[-1]].chunk(2, dim=-1)
        return t * (a + other * zeta) + other * b


class _Split(torch.autograd.Function):
    """x.split(sections, dim=-1), whose gradient is put together from more than eight pieces.

    Up to eight PyTorch's compiler would make one kernel of a concatenation and all that its pieces
    are computed from, which computes each piece's formula at every column: five times slower here
    than each piece written to its place by a kernel of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sections: list[int]) -> tuple[Tensor, ...]:
        return x.split(sections, dim=-1)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Tensor, None]:
        qkv, gate, *others = bars
        return torch.cat([*qkv.chunk(3, dim=-1), *gate.chunk(4, dim=-1), *others], dim=-1), None


class Attention(nn.Module):
    """The layer of a Transformer in the Updater's place: softmax attention alone, no low rank."""

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        D = config.hidden_size
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.rope_theta = config.rope_theta
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(
        self,
        x: Tensor,
        fast: Tensor,
        bank: nn.Module,
        masks: Masks,
        cache: Cache | None = None,
        reports: list[TriggerReport] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x `[B, T, D]` to y `[B, T, D]`, arguments as the Updater's; fast comes back as it is."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        o = attend(q, k, v, self.window, self.rope_theta, masks, cache, self.layer_idx)
        return self.out_proj(o.flatten(2)), fast


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    rope_theta: float | None,
    masks: Masks,
    cache: Cache | None,
    layer_idx: int,
) -> Tensor:
    """Window attention of new tokens, q, k, v `[B, T, H, K]`, to themselves and to cached ones."""
    if rope_theta is not None:
        q, k = (rotate(x, masks["positions"], rope_theta) for x in (q, k))
    if cache is not None:
        k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    if masks["window"] is None:
        return window_attention(q, k, v, window, masks["segments"], masks["cu_seqlens"])
    return masked_attention(q, k, v, masks["window"])


def rotate(x: Tensor, positions: Tensor | None, theta: float) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): x `[B, T, H, K]`, positions `[B, T]`."""
    assert positions is not None
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions[..., None].float() * frequency)[:, :, None]
    first, second = at_least_float32(x).split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
