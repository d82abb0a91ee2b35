"""The operations in PyTorch, in chunks, on any device: linear in T in time and memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

DELTA_CHUNK = 64
SUM_CHUNK = 64


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chunks of 64 tokens: within a chunk the writes solve one unit triangular system (the WY form
    of arXiv 2412.06464, section 3.3); from chunk to chunk the state moves by S <- P + M S.
    """
    B, T, H, K = q.shape
    q = q * K**-0.5
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1])
    state = state.to(q.dtype)
    if T == 1 and segments is None:
        return _delta_step(q, k, v, log_alpha, beta, state)

    c = min(DELTA_CHUNK, T)
    # Padding writes nothing (beta = 0) and keeps the state (alpha = 1).
    q, k, v, beta, log_alpha = (_chunks(x, c) for x in (q, k, v, beta, log_alpha))
    G = log_alpha.cumsum(-1)
    lower = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    if segments is None:
        same, from_start, to_end, keep = lower, 1.0, 1.0, 1.0
    else:
        segments = _pad_segments(segments, c).unflatten(1, (-1, c))[:, None]  # [B, 1, N, c]
        last = segments[..., -1:]
        carried = F.pad(last[:, :, :-1], (0, 0, 1, 0))  # owner of the state that enters the chunk
        same = lower & (segments[..., :, None] == segments[..., None, :])
        from_start, to_end = (segments == carried).to(q.dtype), (segments == last).to(q.dtype)
        keep = (last == carried).to(q.dtype)
    # The exponent is masked before exp: above the diagonal it may be large and positive.
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(~same, float("-inf")).exp()
    enter = (G.exp() * from_start)[..., None]
    leave = ((G[..., -1:] - G).exp() * to_end)[..., None]
    keep = (G[..., -1:].exp() * keep)[..., None]

    k_beta = k * beta[..., None]
    A = (k_beta @ k.mT * decay).tril(-1)
    solved = torch.linalg.solve_triangular(
        A, torch.cat([v * beta[..., None], k_beta * enter], dim=-1), upper=False, unitriangular=True
    )
    u, w = solved.split([v.shape[-1], K], dim=-1)
    k_leave = (k * leave).mT
    P = k_leave @ u
    M = keep * torch.eye(K, dtype=q.dtype, device=q.device) - k_leave @ w
    states = [state]
    for P_n, M_n in zip(P.unbind(2), M.unbind(2), strict=True):
        states.append(P_n + M_n @ states[-1])
    S = torch.stack(states[:-1], dim=2)
    o = (q * enter) @ S + (q @ k.mT * decay) @ (u - w @ S)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), states[-1]


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    q, k, v = (x.squeeze(1)[:, :, None] for x in (q, k, v))  # [B, H, 1, K]
    S = state * log_alpha.squeeze(1)[..., None, None].exp()
    S = S + k.mT @ (beta.squeeze(1)[..., None, None] * (v - k @ S))
    return (q @ S).transpose(1, 2), S


def _chunks(x: Tensor, c: int) -> Tensor:
    """`[B, T, H, ...]` to `[B, H, N, c, ...]`, padded with zeros."""
    x = x.transpose(1, 2)
    padding = -x.shape[2] % c
    x = F.pad(x, (*[0, 0] * (x.ndim - 3), 0, padding))
    return x.unflatten(2, (-1, c))


def _pad_segments(segments: Tensor, c: int) -> Tensor:
    """Padding belongs to the last sample, so that the final state is that sample's."""
    padding = -segments.shape[1] % c
    return torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1)


def causal_conv(x: Tensor, weight: Tensor, state: Tensor | None, segments: Tensor | None) -> Tensor:
    """A sum of shifted copies: exact at sample borders, and one pass when compiled."""
    T, width = x.shape[1], weight.shape[1]
    if state is None:
        inputs = F.pad(x, (0, 0, width - 1, 0))
    else:
        inputs = torch.cat([state.mT.to(x.dtype), x], dim=1)
    if T == 1 and segments is None:
        return F.silu((inputs * weight.mT).sum(1, keepdim=True))
    y = x * weight[:, -1]
    owner = None if segments is None else F.pad(segments, (width - 1, 0))
    for j in range(width - 1):
        tap = inputs[:, j : j + T]
        if owner is not None:
            tap = tap * (owner[:, j : j + T] == segments)[..., None]
        y = y + tap * weight[:, j]
    return F.silu(y)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Tensor | None
) -> Tensor:
    """Blocks of one window: a block of queries meets its own and the previous block of keys."""
    T = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None or window >= T:
        if segments is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    B = len(q)
    padding = -T % window
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (k, v))
    row = torch.arange(window, device=q.device)[:, None]
    column = torch.arange(2 * window, device=q.device)
    mask = (column > row) & (column <= row + window)
    first = torch.arange(q.shape[2], device=q.device)[:, None, None] == 0
    mask = mask & ~(first & (column < window))  # [N, W, 2W]: nothing before the first block
    if segments is not None:
        own = _pad_segments(segments, window).unflatten(1, (-1, window))  # [B, N, W]
        before = torch.cat([F.pad(own, (0, 0, 1, 0))[:, :-1], own], dim=2)
        mask = mask & (own[..., None] == before[:, :, None])
        mask = mask.flatten(0, 1)[:, None]
    else:
        mask = mask.repeat(B, 1, 1)[:, None]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B N, H, ...]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.unflatten(0, (B, -1)).transpose(2, 3).flatten(1, 2)[:, :T]


def decayed_sum(
    g: Tensor, decay: Tensor | float, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Products with a triangle of powers; chunk ends are summed by the same rule, recursively."""
    B, T, _ = g.shape
    if state is None:
        state = torch.zeros_like(g[:, 0])
    state = state.to(g.dtype)
    decay = torch.as_tensor(decay, dtype=g.dtype, device=g.device)
    if T == 1 and segments is None:
        m = state * decay + g[:, 0]
        return m[:, None], m
    if segments is None:
        segments = torch.zeros(B, T, dtype=torch.long, device=g.device)
    c = min(SUM_CHUNK, T)
    g = F.pad(g, (0, 0, 0, -T % c)).unflatten(1, (-1, c))
    owner = _pad_segments(segments, c).unflatten(1, (-1, c))  # [B, N, c]
    steps = torch.arange(c, device=g.device)
    age = (steps[:, None] - steps).clamp(min=0)
    same = (owner[..., :, None] == owner[..., None, :]).tril()
    m = (decay**age * same) @ g
    ends = owner[:, :, -1]
    if m.shape[1] > 1:
        carry, _ = decayed_sum(m[:, :, -1], decay**c, state, ends)
        carry = torch.cat([state[:, None], carry[:, :-1]], dim=1)
    else:
        carry = state[:, None]
    carried = F.pad(ends[:, :-1], (1, 0))
    reach = decay ** (steps + 1) * (owner == carried[..., None])
    m = (m + reach[..., None] * carry[:, :, None]).flatten(1, 2)[:, :T]
    return m, m[:, -1]
