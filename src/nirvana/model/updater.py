"""Specialized Memory Updater: linear and window attention, blended under the Trigger's control."""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from nirvana.model.attention import QKV, SINKS, RMSNorm, Rotary, attend
from nirvana.model.config import NirvanaConfig
from nirvana.model.loss import is_plain
from nirvana.model.masks import Masks
from nirvana.model.state import LayerStates, unshared
from nirvana.model.trigger import Trigger, TriggerTrace, WeightBank, trace_step
from nirvana.ops import add_low_rank, at_least_float32, linear_branch, window_branch

ALIGNED = 8
"""Columns of half precision in 16 bytes."""


class Updater(nn.Module):
    """Gated delta rule and sliding-window attention on shared q, k and v, blended by gates.

    The first `num_prelude_layers` layers have the linear branch alone: y = b. The others blend it
    with the window branch a, with t = sigmoid(h_task . w_t) and zeta = MLP([b, a, h_task]):

        "convex"       y = t a + (1 - t) b + t (1 - t) zeta
        "independent"  y = t a + t' b + t t' zeta

    Without Trigger, `gate` = "input" replaces h_task by x W, W: D -> C; with "constant" there is no
    h_task, and t (and t') are the logistic function of learned numbers.

    Where `window_kept` is a tensor `[B, 1, 1]`, t is multiplied by it: 0 drops the window branch of
    a row, so that the linear branch carries it alone (scheduled window dropout, arXiv 2510.05901).

    Args:
        config: of the model.
        layer_idx: of the layer, counted from 0.
        initialise: draw initial values; a model draws those of all its parts itself, in one order.
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int, initialise: bool = True):
        super().__init__()
        self.initial_std = config.initializer_range
        D, (H, _, K), C = config.hidden_size, config.head_sizes, config.task_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, K
        self.rotary = Rotary.of(config)
        self.convex = config.interpolation == "convex"
        self.has_window = layer_idx >= config.num_prelude_layers and config.branches == "both"
        self.has_trigger = self.has_window and config.has_trigger
        self.counts_tokens = config.branches == "linear" and layer_idx == config.counting_layer
        rank = max(1, D // 16)
        C = 0 if config.gate == "constant" else C
        task = 3 * C if self.has_trigger else C
        # One product instead of ten: q k v | gate | beta | alpha | low rank of q k v | task.
        width = config.qkv_size
        self.sections = [width, H * K, H, H] + ([3 * rank, task] if self.has_window else [])
        self.in_proj = nn.Linear(D, sum(self.sections), bias=False)
        self.qkv = QKV(config)
        taps = config.conv_size
        self.conv_weight = None if taps is None else nn.Parameter(torch.empty(width, taps))
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.out_norm = RMSNorm(K, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(H * K, D, bias=False)
        self.window_kept: Tensor | None = None
        if self.has_window:
            self._add_window(config, rank, C)
        if initialise:
            for part in self.modules():
                if isinstance(part, nn.Linear):
                    init.normal_(part.weight, 0.0, self.initial_std)
            self.reset_parameters()

    def _add_window(self, config: NirvanaConfig, rank: int, C: int) -> None:
        """The parts of a layer with a window branch and a blend, in the order of their weights."""
        D, (H, G, K) = config.hidden_size, config.head_sizes
        if self.has_trigger:
            self.trigger = Trigger(config, self.layer_idx)
        up = (3, rank, H * K) if G == H else (rank, config.qkv_size)
        self.window_up = nn.Parameter(torch.empty(up))
        sizes = [H * K, D] if config.window_output == "full" else [H * K, max(1, D // 8), D]
        self.window_out = nn.Sequential(*(nn.Linear(i, o, bias=False) for i, o in pairwise(sizes)))
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial values of what is not a plain linear map or norm; see
        `NirvanaPreTrainedModel._init_weights`."""
        if self.conv_weight is not None:
            bound = self.conv_weight.shape[1] ** -0.5
            init.uniform_(self.conv_weight, -bound, bound)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
        init.copy_(self.dt_bias, step + (-torch.expm1(-step)).log())
        if self.has_window:
            if self.constant:
                init.zeros_(self.gate_logit)
            init.zeros_(self.window_up)
            init.zeros_(self.window_out[-1].weight)  # type: ignore[arg-type]
            init.zeros_(self.zeta[-1].weight)  # type: ignore[arg-type]

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
        plain = x.is_cuda and is_plain(self.in_proj)
        y = aligned_linear(x, self.in_proj.weight) if plain else self.in_proj(x)
        qkv, gate, beta, alpha, *rest = _split(y, self.sections)
        qkv = self.qkv(qkv)
        b = self.linear(qkv, gate, beta, alpha, masks, before, states)
        if not self.has_window:
            return b, fast
        low_rank, task = rest
        a = self.windowed(qkv, low_rank, masks, before["sinks"], states)
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
            return dict.fromkeys(("conv", "delta", "memory", "sinks"))
        has_memory = self.has_trigger and self.trigger.has_memory
        has_sinks = self.has_window and self.config.num_sinks > 0
        before = {
            "conv": states.get_conv_state(self.layer_idx),
            "delta": states.get_recurrent_state(self.layer_idx),
            "memory": states.get_conv_state(self.layer_idx, state_idx=1) if has_memory else None,
            "sinks": states.get_conv_state(self.layer_idx, SINKS) if has_sinks else None,
        }
        return {name: unshared(x, states) for name, x in before.items()}

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
            qkv: `[B, T, (H + 2 G) K]`.
            gate: `[B, T, H K]`, of the gated norm.
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
            silu=self.config.conv_silu,
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
        sinks: Tensor | None,
        states: LayerStates | None,
    ) -> Tensor:
        """The window branch a, on q, k and v plus their low-rank terms.

        Args:
            qkv: `[B, T, (H + 2 G) K]`.
            low_rank: `[B, T, 3 r]`.
            masks: of `create_masks`.
            sinks: see `attend`.
            states: hold the keys and values of the past, and receive the new ones.

        Returns:
            a `[B, T, D]`.
        """
        config, (H, G, K) = self.config, self.config.head_sizes
        plain = self.rotary is None and G == H and not config.num_sinks
        if plain and states is None and masks["window"] is None:
            borders = masks["segments"], masks["cu_seqlens"]
            window = config.sliding_window
            o = window_branch(qkv, low_rank, self.window_up, K, window, *borders)
            return self.window_out(o.flatten(2))
        q, k, v = add_low_rank(qkv, low_rank, self.window_up, K, H)
        o = attend(q, k, v, config, self.rotary, masks, sinks, states, self.layer_idx)
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
        if self.window_kept is not None:
            t = t * self.window_kept.to(t.dtype)
            other = 1 - t if self.convex else other
        together = torch.cat([b, a, h_task], dim=-1)
        zeta = self.zeta(together)
        # Slices of the concatenation, so that a compiled backward saves one copy of each, not two.
        b, a = together[..., : 2 * b.shape[-1]].chunk(2, dim=-1)
        return t * (a + other * zeta) + other * b


def aligned_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight) as the first columns of a product whose width is a multiple of `ALIGNED`.

    Tensor cores read 16 bytes at once. Where rows do not begin at multiples of that, cuBLAS takes
    kernels that are three times slower in the backward pass. The weight is padded by a copy, which
    costs little beside the product.

    Args:
        x: `[..., D]`.
        weight: `[N, D]`.

    Returns:
        `[..., N]`.
    """
    missing = -len(weight) % ALIGNED
    if not missing:
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, missing)))[..., : len(weight)]


def _split(x: Tensor, sections: list[int]) -> tuple[Tensor, ...]:
    """x.split(sections, dim=-1), with the gradient of `_Split` where there may be one."""
    return _Split.apply(x, sections) if torch.is_grad_enabled() else x.split(sections, dim=-1)


class _Split(torch.autograd.Function):
    """x.split(sections, dim=-1), whose gradient concatenates more than eight pieces.

    PyTorch's compiler fuses a concatenation of up to eight pieces with the kernels of its inputs,
    and then evaluates every piece's formula at every column: five times slower here than one kernel
    for each piece.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, sections: list[int]) -> tuple[Tensor, ...]:
        return x.split(sections, dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        qkv, gate, *others = grads
        return torch.cat([*qkv.chunk(3, dim=-1), *gate.chunk(4, dim=-1), *others], dim=-1), None
