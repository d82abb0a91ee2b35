"""Specialized Memory Updater: linear and window attention, blended under the Trigger's control."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.state import LayerStates
from nirvana.model.trigger import Trigger, TriggerTrace, WeightBank, trace_step
from nirvana.ops import (
    add_low_rank,
    at_least_float32,
    linear_branch,
    masked_attention,
    window_attention,
    window_branch,
)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, in the input's dtype even if the weight is float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Updater(nn.Module):
    """Gated delta rule and sliding-window attention on shared q, k and v, blended by gates.

    The first `num_prelude_layers` layers have the linear branch alone: y = b. The others blend it
    with the window branch a, with t = sigmoid(h_task . w_t) and zeta = MLP([b, a, h_task]):

        "convex"       y = t a + (1 - t) b + t (1 - t) zeta
        "independent"  y = t a + t' b + t t' zeta

    Without Trigger, `gate` = "input" replaces h_task by x W, W: D -> C; with "constant" there is no
    h_task, and t (and t') are the logistic function of learned numbers.

    Args:
        config: of the model.
        layer_idx: of the layer, counted from 0.
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
        states: LayerStates | None = None,
        traces: list[TriggerTrace] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the layer's update of the residual stream.

        Args:
            x: `[B, T, D]`, normalised.
            fast: `[B, T, 4, R]`, fast parameters from the layer below.
            bank: the model's bank.
            masks: of `create_masks`.
            states: give the states before x and receive those after it; None means none.
            traces: a list that receives the Trigger's trace.

        Returns:
            y `[B, T, D]`, and the fast parameters for the layer above, `[B, T, 4, R]`.
        """
        before = self._before(states)
        qkv, gate, beta, alpha, *rest = _Split.apply(self.in_proj(x), self.sections)
        b = self.linear(qkv, gate, beta, alpha, masks, before, states)
        if not self.has_window:
            return b, fast
        low_rank, task = rest
        a = self.windowed(qkv, low_rank, masks, states)
        if not self.has_trigger:
            return self.blend(a, b, task, self.gates(task)), fast
        h_task, fast_next, memory = self.trigger(
            task, fast, bank, before["memory"], masks["segments"], masks["lengths"]
        )
        if states is not None and memory is not None:
            states.update_conv_state(memory, self.layer_idx, state_idx=1)
        gates = self.gates(h_task)
        if traces is not None:
            traces.append(trace_step(task, fast, fast_next, gates, bank))
        return self.blend(a, b, h_task, gates), fast_next

    def gates(self, h_task: Tensor) -> Tensor:
        """t `[B, T, 1]`, or t and t' `[B, T, 2]`, in 0..1, for h_task `[B, T, C]`."""
        if self.constant:
            return self.gate_logit.sigmoid().to(h_task.dtype).expand(*h_task.shape[:2], -1)
        return self.gate_proj(h_task).sigmoid()

    def _before(self, states: LayerStates | None) -> dict[str, Tensor | None]:
        """The layer's states before this call. All are read before any is updated, because the
        library's cache counts a layer as filled as soon as its convolution state is written."""
        if states is None:
            return {"conv": None, "delta": None, "memory": None}
        has_memory = self.has_trigger and self.trigger.has_memory
        return {
            "conv": states.get_conv_state(self.layer_idx),
            "delta": states.get_recurrent_state(self.layer_idx),
            "memory": states.get_conv_state(self.layer_idx, state_idx=1) if has_memory else None,
        }

    def linear(
        self,
        qkv: Tensor,
        gate: Tensor,
        beta: Tensor,
        alpha: Tensor,
        masks: Masks,
        before: dict[str, Tensor | None],
        states: LayerStates | None,
    ) -> Tensor:
        """The linear branch b: convolution, gated delta rule, gated norm, output projection.

        Args:
            qkv: `[B, T, 3 D]`.
            gate: `[B, T, D]`, of the gated norm.
            beta: `[B, T, H]`, logits of the write strength.
            alpha: `[B, T, H]`, logits of the time step.
            masks: of `create_masks`.
            before: the layer's states before x, by name.
            states: receive those after x.

        Returns:
            b `[B, T, D]`.
        """
        rate, alpha, beta = (at_least_float32(y) for y in (self.A_log, alpha, beta))
        log_alpha = -rate.exp() * F.softplus(alpha + self.dt_bias)
        o, recent, S = linear_branch(
            qkv,
            self.conv_weight,
            log_alpha,
            beta.sigmoid(),
            self.head_dim,
            before["conv"],
            before["delta"],
            masks["segments"],
            masks["cu_seqlens"],
            final=states is not None,
            lengths=masks["lengths"],
        )
        if states is not None:  # a cache writes in place, so only after the old state was read
            assert recent is not None
            assert S is not None
            states.update_conv_state(recent, self.layer_idx)
            states.update_recurrent_state(S, self.layer_idx)
            if self.counts_tokens:
                empty = qkv.new_empty(qkv.shape[0], 1, qkv.shape[1], 0)
                states.update(empty, empty, self.layer_idx)
        o = self.out_norm(o) * F.silu(gate.unflatten(-1, (-1, self.head_dim)))
        return self.out_proj(o.flatten(2))

    def windowed(
        self,
        qkv: Tensor,
        low_rank: Tensor,
        masks: Masks,
        states: LayerStates | None,
    ) -> Tensor:
        """The window branch a, on q, k and v plus their low-rank terms.

        Args:
            qkv: `[B, T, 3 D]`.
            low_rank: `[B, T, 3 r]`.
            masks: of `create_masks`.
            states: hold the keys and values of the past, and receive the new ones.

        Returns:
            a `[B, T, D]`.
        """
        if states is None and self.rope_theta is None and masks["window"] is None:
            borders = masks["segments"], masks["cu_seqlens"]
            o = window_branch(qkv, low_rank, self.window_up, self.head_dim, self.window, *borders)
            return self.window_out(o.flatten(2))
        q, k, v = add_low_rank(qkv, low_rank, self.window_up, self.head_dim)
        o = attend(q, k, v, self.window, self.rope_theta, masks, states, self.layer_idx)
        return self.window_out(o.flatten(2))

    def blend(self, a: Tensor, b: Tensor, h_task: Tensor, gates: Tensor) -> Tensor:
        """The interpolation of both branches, see the class.

        Args:
            a: `[B, T, D]`, of the window branch.
            b: `[B, T, D]`, of the linear branch.
            h_task: `[B, T, C]`.
            gates: `[B, T, 1 or 2]`.

        Returns:
            y `[B, T, D]`.
        """
        t, other = (gates, 1 - gates) if self.convex else gates.split(1, dim=-1)
        together = torch.cat([b, a, h_task], dim=-1)
        zeta = self.zeta(together)
        # Slices of the concatenation, so that a compiled backward saves one copy of each, not two.
        b, a = together[..., : 2 * b.shape[-1]].chunk(2, dim=-1)
        return t * (a + other * zeta) + other * b


class _Split(torch.autograd.Function):
    """x.split(sections, dim=-1), whose gradient concatenates more than eight pieces.

    PyTorch's compiler fuses a concatenation of up to eight pieces with the kernels of its inputs,
    and then evaluates every piece's formula at every column: five times slower here than one kernel
    for each piece.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sections: list[int]) -> tuple[Tensor, ...]:
        return x.split(sections, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qkv, gate, *others = grads
        return torch.cat([*qkv.chunk(3, dim=-1), *gate.chunk(4, dim=-1), *others], dim=-1), None


class Attention(nn.Module):
    """The layer of a Transformer in place of the Updater: softmax attention without low-rank terms.

    Args:
        config: of the model.
        layer_idx: of the layer, counted from 0.
    """

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
        states: LayerStates | None = None,
        traces: list[TriggerTrace] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention from x `[B, T, D]` to y `[B, T, D]`; arguments and returns as of the Updater.

        `fast` is returned unchanged.
        """
        q, k, v = self.in_proj(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        o = attend(q, k, v, self.window, self.rope_theta, masks, states, self.layer_idx)
        return self.out_proj(o.flatten(2)), fast


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    rope_theta: float | None,
    masks: Masks,
    states: LayerStates | None,
    layer_idx: int,
) -> Tensor:
    """Window attention of new tokens to themselves and to those of the past.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, H, K]`.
        v: `[B, T, H, K]`.
        window: tokens that a token attends to, itself included; None means all before it.
        rope_theta: base of rotary positions; None means none.
        masks: of `create_masks`.
        states: hold the keys and values of the past, and receive the new ones; None means none.
        layer_idx: of the layer, for the states.

    Returns:
        `[B, T, H, K]`.
    """
    if rope_theta is not None:
        q, k = (rotate(x, masks["positions"], rope_theta) for x in (q, k))
    if states is not None:
        k, v = states.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    if masks["window"] is None:
        return window_attention(q, k, v, window, masks["segments"], masks["cu_seqlens"])
    return masked_attention(q, k, v, masks["window"])


def rotate(x: Tensor, positions: Tensor | None, theta: float) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864).

    Args:
        x: `[B, T, H, K]`, K even.
        positions: `[B, T]` or `[1, T]`.
        theta: base of the frequencies.

    Returns:
        `[B, T, H, K]` in x's dtype.
    """
    assert positions is not None
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions[..., None].float() * frequency)[:, :, None]
    first, second = at_least_float32(x).split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
