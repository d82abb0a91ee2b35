"""Softmax attention within a window: of the window branch, and in place of a whole Updater."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.state import SLOTS, LayerStates, unshared
from nirvana.model.trigger import TriggerTrace
from nirvana.ops import at_least_float32, masked_attention, sink_attention, window_attention

SINKS = SLOTS.index("sinks")


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dimension, in the input's dtype even if the weight is float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class QKV(nn.Module):
    """What follows the projection to q, k and v: a bias and the norms of q and k, both optional.

    Args:
        config: of the model.
    """

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        H, G, K = config.head_sizes
        self.heads = [H, G, G]
        self.head_dim = K
        self.bias = nn.Parameter(torch.empty(config.qkv_size)) if config.qkv_bias else None
        self.q_norm = RMSNorm(K, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(K, eps=config.rms_norm_eps) if config.qk_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the bias to zero."""
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, qkv: Tensor) -> Tensor:
        """q, k and v side by side, `[B, T, (H + 2 G) K]`, to the same."""
        if self.bias is not None:
            qkv = qkv + self.bias.to(qkv.dtype)
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = self.split(qkv)
        parts = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=2)
        return parts.flatten(2).to(qkv.dtype)  # autocast normalises in float32

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q `[B, T, H, K]`, k and v `[B, T, G, K]`, of `[B, T, (H + 2 G) K]`."""
        return qkv.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864).

    Attributes:
        theta: base of the frequencies.
        scaling: the library's `rope_parameters` as JSON, where they are not powers of theta.
        factor: of cosines and sines.
    """

    theta: float
    scaling: str | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, config: NirvanaConfig) -> "Rotary | None":
        """The rotary positions of a model; None without."""
        if config.rope_theta is None or config.rope_scaling is None:
            return None if config.rope_theta is None else cls(config.rope_theta)
        scaling = json.dumps({**config.rope_scaling, "rope_theta": config.rope_theta})
        assert config.head_dim is not None
        return cls(config.rope_theta, scaling, _scaled(scaling, config.head_dim, "cpu")[1])


def rotate(x: Tensor, positions: Tensor | None, rotary: Rotary) -> Tensor:
    """Rotates pairs of numbers of each head by angles that grow with the position.

    Args:
        x: `[B, T, H, K]`, K even.
        positions: `[B, T]` or `[1, T]`.
        rotary: the frequencies.

    Returns:
        `[B, T, H, K]` in x's dtype.
    """
    assert positions is not None
    half = x.shape[-1] // 2
    frequency = frequencies(rotary, x.shape[-1], x.device)
    # In float64 the angles, too: only their differences matter, which float32 rounds.
    precise = at_least_float32(x)
    angle = (positions[..., None].to(precise.dtype) * frequency.to(precise.dtype))[:, :, None]
    first, second = precise.split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    if rotary.factor != 1:
        cos, sin = cos * rotary.factor, sin * rotary.factor
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def frequencies(rotary: Rotary, head_dim: int, device: torch.device) -> Tensor:
    """The angles by which pairs of numbers turn from one position to the next.

    Args:
        rotary: the positions.
        head_dim: K, even.
        device: of the result.

    Returns:
        `[K / 2]`, float32.
    """
    if rotary.scaling is not None:
        return _frequency(rotary.scaling, head_dim, str(device))
    half = head_dim // 2
    return rotary.theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)


@torch.compiler.assume_constant_result
def _frequency(scaling: str, head_dim: int, device: str) -> Tensor:
    return _scaled(scaling, head_dim, device)[0]


@lru_cache(maxsize=32)
def _scaled(scaling: str, head_dim: int, device: str) -> tuple[Tensor, float]:
    """Frequencies `[K / 2]` and the factor of cosines and sines, of the library's functions.

    Computed once for a device: a copy from the host cannot be recorded in a CUDA graph.
    """
    given: dict[str, Any] = json.loads(scaling)
    original = given.get("original_max_position_embeddings", 2048)
    described = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=int(original * given["factor"]),
        rope_parameters=given,  # type: ignore[arg-type]
    )
    compute: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[given["rope_type"]]
    # Models are made on the meta device, without memory, and run in inference mode.
    with torch.inference_mode(False), torch.device("cpu"):
        frequency, factor = compute(described, torch.device("cpu"))
        return frequency.to(device), float(factor)


class Attention(nn.Module):
    """The layer of a Transformer in place of the Updater: softmax attention without low-rank terms.

    Args:
        config: of the model.
        layer_idx: of the layer, counted from 0.
        initialise: see `Updater`.
    """

    def __init__(self, config: NirvanaConfig, layer_idx: int, initialise: bool = True):
        super().__init__()
        D, (H, _, K) = config.hidden_size, config.head_sizes
        self.config, self.layer_idx, self.rotary = config, layer_idx, Rotary.of(config)
        self.in_proj = nn.Linear(D, config.qkv_size, bias=False)
        self.qkv = QKV(config)
        self.out_proj = nn.Linear(H * K, D, bias=False)
        if initialise:
            for part in (self.in_proj, self.out_proj):
                init.normal_(part.weight, 0.0, config.initializer_range)

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
        q, k, v = self.qkv.split(self.qkv(self.in_proj(x)))
        sinks = None
        if states is not None and self.config.num_sinks:
            sinks = unshared(states.get_conv_state(self.layer_idx, state_idx=SINKS), states)
        o = attend(q, k, v, self.config, self.rotary, masks, sinks, states, self.layer_idx)
        return self.out_proj(o.flatten(2)), fast


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: NirvanaConfig,
    rotary: Rotary | None,
    masks: Masks,
    sinks: Tensor | None,
    states: LayerStates | None,
    layer_idx: int,
) -> Tensor:
    """Window attention of new tokens to themselves, to those of the past and to the sinks.

    Rotary positions within the window are those of the tokens. A sink that has left the window is
    seen as if it were next to the window, as in StreamingLLM (arXiv 2309.17453): no distance
    exceeds W + n - 1, however long the sample.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, G, K]`.
        v: `[B, T, G, K]`.
        config: gives the window W and the number n of sinks.
        rotary: of the positions; None means none.
        masks: of `create_masks`.
        sinks: `[B, 2 G K, n]`, of the past; None means none.
        states: hold the keys and values of the past, and receive the new ones; None means none.
        layer_idx: of the layer, for the states.

    Returns:
        `[B, T, H, K]`.
    """
    window, n, (B, T) = config.sliding_window, config.num_sinks, q.shape[:2]
    positions, index, mask = masks["positions"], masks["index"], masks["window"]
    far, both = q, None
    if rotary is not None:
        if n:
            assert positions is not None
            assert index is not None
            assert window is not None
            far = rotate(q, positions - (index - (window + n - 1)).clamp(min=0), rotary)
        q, k = (rotate(x, positions, rotary) for x in (q, k))
    if n and index is not None:
        new = torch.stack([k, v], dim=2)
        if sinks is None:
            old = new.new_zeros(B, n, *new.shape[2:])
        else:
            old = sinks.mT.unflatten(-1, new.shape[2:])
        both = torch.cat([old, new], dim=1)
        if states is not None:
            last = _first_tokens(both, index.expand(B, T), masks["lengths"])
            states.update_conv_state(last.flatten(2).mT, layer_idx, state_idx=SINKS)
    if states is not None:
        k, v = states.update(k.transpose(1, 2), v.transpose(1, 2), layer_idx)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    borders = masks["cu_seqlens"]
    in_reach = states is None and window is not None and window >= T  # all tokens of the row
    if both is not None and window is not None and index is not None and not in_reach:
        near = masks["segments"] if mask is None else None
        sink_k, sink_v = both.unbind(2)
        return sink_attention(q, far, k, v, sink_k, sink_v, window, index, near, mask, borders)
    if mask is None:
        return window_attention(q, k, v, window, masks["segments"], borders)
    return masked_attention(q, k, v, mask)


def _first_tokens(both: Tensor, index: Tensor, lengths: Tensor | None) -> Tensor:
    """The keys and values of the first tokens of each row's last sample, `[B, n, 2, G, K]`.

    Args:
        both: `[B, n + T, 2, G, K]`, those of the sample that the first token continues, then those
            of the new tokens.
        index: `[B, T]`, tokens of its sample before each token.
        lengths: `[B]`, tokens of each row that padding follows; None without padding.
    """
    T = index.shape[1]
    n = both.shape[1] - T
    end = torch.full_like(index[:, 0], T - 1) if lengths is None else lengths - 1
    read = index.gather(1, end.clamp(min=0)[:, None])
    old = torch.arange(n, device=index.device)
    column = end[:, None] - read + old  # among the new tokens; those that follow are not read yet
    place = torch.where(column < 0, old, column + n).clamp(max=n + T - 1)
    place = torch.where(end[:, None] < 0, old, place)
    return both.take_along_dim(place[..., None, None, None], dim=1)
