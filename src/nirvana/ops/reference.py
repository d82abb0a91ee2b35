"""The definitions of the operations, step by step.

Slow and obvious; the other backends are tested against these in values and gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(q.dtype)
    outputs = []
    for t in range(T):
        S = _restart(S, segments, t)
        S = S * log_alpha[:, t, :, None, None].exp()
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], S)
        write = beta[:, t, :, None] * (v[:, t] - read)
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S) * K**-0.5)
    return torch.stack(outputs, dim=1), S


def causal_conv(
    x: Tensor, weight: Tensor, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(B, D, width - 1)
    inputs = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    if segments is None:
        segments = torch.zeros(B, T, dtype=torch.long, device=x.device)
    owner = F.pad(segments, (width - 1, 0))
    outputs = []
    for t in range(T):
        own = owner[:, t : t + width] == segments[:, t, None]
        taps = inputs[:, t : t + width] * own[..., None]
        outputs.append((taps * weight.T).sum(1))
    own = owner[:, T:] == segments[:, -1:]
    return F.silu(torch.stack(outputs, dim=1)), (inputs[:, T:] * own[..., None]).transpose(1, 2)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Tensor | None
) -> Tensor:
    S, K = k.shape[1], k.shape[-1]
    past = S - q.shape[1]
    outputs = []
    for t in range(past, S):
        first = 0 if window is None else max(0, t - window + 1)
        scores = torch.einsum("bhk,bshk->bhs", q[:, t - past], k[:, first : t + 1]) * K**-0.5
        if segments is not None:
            own = segments[:, first : t + 1] == segments[:, t, None]
            scores = scores.masked_fill(~own[:, None], float("-inf"))
        outputs.append(torch.einsum("bhs,bshk->bhk", scores.softmax(-1), v[:, first : t + 1]))
    return torch.stack(outputs, dim=1)


def decayed_sum(
    g: Tensor, decay: Tensor | float, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    m = torch.zeros_like(g[:, 0]) if state is None else state.to(g.dtype)
    outputs = []
    for t in range(g.shape[1]):
        m = _restart(m, segments, t) * decay + g[:, t]
        outputs.append(m)
    return torch.stack(outputs, dim=1), m


def _restart(state: Tensor, segments: Tensor | None, t: int) -> Tensor:
    """Zeroes the state of the rows in which a new sample starts at token t."""
    if segments is None:
        return state
    before = segments[:, t - 1] if t > 0 else torch.zeros_like(segments[:, 0])
    keep = (segments[:, t] == before).to(state.dtype)
    return state * keep.view(-1, *[1] * (state.ndim - 1))
