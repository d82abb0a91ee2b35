"""Specialized Memory Updater: linear and window attention, blended under the Trigger's control."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.trigger import Trigger, TriggerReport, WeightBank, trigger_report
from nirvana.ops import at_least_float32, causal_conv, gated_delta_rule, window_attention

L2_EPS = 1e-6
"""Inside the root of the normalisation of q and k along a head."""


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
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        D, H, C = config.hidden_size, config.num_attention_heads, config.task_dim
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.rope_theta = config.rope_theta
        self.convex = config.interpolation == "convex"
        self.has_trigger = layer_idx >= config.num_prelude_layers
        rank = max(1, D // 16)
        # One product instead of ten: q k v | gate | beta | alpha | low rank of q k v | task.
        self.sections = [3 * D, D, H, H] + ([3 * rank, 3 * C] if self.has_trigger else [])
        self.in_proj = nn.Linear(D, sum(self.sections), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * D, config.conv_size))
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.out_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(D, D, bias=False)
        if not self.has_trigger:
            return
        self.trigger = Trigger(config, layer_idx)
        self.window_up = nn.Parameter(torch.empty(3, rank, D))
        self.window_out = nn.Sequential(
            nn.Linear(D, max(1, D // 8), bias=False), nn.Linear(max(1, D // 8), D, bias=False)
        )
        self.gate_proj = nn.Linear(C, 1 if self.convex else 2, bias=False)
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
        state = _read(cache, self.layer_idx)
        qkv, gate, beta, alpha, *rest = self.in_proj(x).split(self.sections, dim=-1)
        b = self.linear(qkv, gate, beta, alpha, masks, state, cache)
        if not self.has_trigger:
            return b, fast
        low_rank, task = rest
        a = self.windowed(qkv, low_rank, masks, cache)
        h_task, moved, memory = self.trigger(task, fast, bank, state["memory"], masks["segments"])
        if cache is not None and memory is not None:
            cache.update_conv_state(memory, self.layer_idx, state_idx=1)
        gates = self.gate_proj(h_task).sigmoid()
        if reports is not None:
            reports.append(trigger_report(task, fast, moved, gates, bank))
        return self.blend(a, b, h_task, gates), moved

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
        segments = masks["segments"]
        mixed, recent = causal_conv(qkv, self.conv_weight, state["conv"], segments)
        qk, v = mixed.unflatten(-1, (3, -1, self.head_dim)).split([2, 1], dim=2)
        q, k = _unit(qk).unbind(2)
        rate, alpha, beta = (at_least_float32(y) for y in (self.A_log, alpha, beta))
        log_alpha = -rate.exp() * F.softplus(alpha + self.dt_bias)
        o, S = gated_delta_rule(
            q, k, v.squeeze(2), log_alpha, beta.sigmoid(), state["delta"], segments
        )
        if cache is not None:  # the cache writes in place: only now, after the old state was used
            cache.update_conv_state(recent, self.layer_idx)
            cache.update_recurrent_state(S, self.layer_idx)
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
        factors = low_rank.flatten(0, 1).unflatten(-1, (3, -1)).transpose(0, 1)  # [3, B T, r]
        move = torch.bmm(factors, self.window_up.to(factors.dtype)).transpose(0, 1)
        moved = qkv + move.reshape(qkv.shape)
        q, k, v = moved.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        if self.rope_theta is not None:
            q, k = (rotate(x, masks["positions"], self.rope_theta) for x in (q, k))
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if masks["window"] is None:
            o = window_attention(q, k, v, self.window, masks["segments"])
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=masks["window"]).transpose(1, 2)
        return self.window_out(o.flatten(2))

    def blend(self, a: Tensor, b: Tensor, h_task: Tensor, gates: Tensor) -> Tensor:
        """The interpolation of both branches."""
        t, other = (gates, 1 - gates) if self.convex else gates.split(1, dim=-1)
        zeta = self.zeta(torch.cat([b, a, h_task], dim=-1))
        return t * a + other * b + t * other * zeta


def rotate(x: Tensor, positions: Tensor | None, theta: float) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864): x `[B, T, H, K]`, positions `[B, T]`."""
    assert positions is not None
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions[..., None].float() * frequency)[:, :, None]
    first, second = at_least_float32(x).split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _read(cache: Cache | None, layer_idx: int) -> dict[str, Tensor | None]:
    """The layer's states before this call; all are read before any is updated, because the
    library's cache reports a layer as filled as soon as its convolution state is written."""
    if cache is None:
        return {"conv": None, "delta": None, "memory": None}
    memory = None
    if getattr(cache.layers[layer_idx], "number_of_states", 1) > 1:
        memory = cache.get_conv_state(layer_idx, state_idx=1)
    return {
        "conv": cache.get_conv_state(layer_idx),
        "delta": cache.get_recurrent_state(layer_idx),
        "memory": memory,
    }


def _unit(x: Tensor) -> Tensor:
    """Unit length along the last dimension, in float32."""
    x = at_least_float32(x)
    return x * (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
