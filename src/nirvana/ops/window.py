"""Window attention in PyTorch, in blocks of one window: linear in T in time and memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.chunks import chunk_count, is_exporting, is_one, pad_segments


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_attention`.

    In blocks of one window: a block of queries attends to its own and the previous block of keys.
    """
    T, S = q.shape[1], k.shape[1]
    k, v = _for_each_query(q, k, v)
    if is_one(T):
        k, v = (x if window is None else x[:, -window:] for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if T < S:  # queries of zeros at the places of the earlier keys; their rows are dropped
        q = F.pad(q, (0, 0, 0, 0, S - T, 0))
        return window_attention(q, k, v, window, segments, cu_seqlens)[:, S - T :]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None or (not is_exporting() and window >= T):
        if segments is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    B = q.shape[0]
    N = chunk_count(T, window)
    padding = N * window - T
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (N, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (k, v))
    mask = _block_mask(N, window, segments, B, q.device)
    mask = mask.expand(B, -1, -1, -1).flatten(0, 1)[:, None]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B N, H, ...]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return o.unflatten(0, (B, N)).transpose(2, 3).flatten(1, 2)[:, :T]


def sink_attention(
    q: Tensor,
    far: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
    segments: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.sink_attention`.

    As `window_attention` in blocks of one window. A token reads sinks only if its sample began at
    least a window before it, so that all those in a block belong to the sample of its first token:
    each block has n further keys. In one softmax with two queries: `[q, far]` on keys `[k, 0]`
    within the window and `[0, k]` for sinks.
    """
    k, v, sink_k, sink_v = _for_each_query(q, k, v, sink_k, sink_v)
    (B, T, _, K), S, n = q.shape, k.shape[1], sink_k.shape[1] - q.shape[1]
    index = index.expand(B, T)
    q = torch.cat([q, far], dim=-1)
    k, sink_k = F.pad(k, (0, K)), F.pad(sink_k, (K, 0))
    if T == 1 or mask is not None:
        if mask is None:
            k, v = k[:, -window:], v[:, -window:]
            mask = torch.ones(1, 1, 1, k.shape[1], dtype=torch.bool, device=q.device)
        reads = _reads_sinks(index, n, window)[:, None]
        mask = torch.cat([reads, mask.expand(B, 1, T, -1)], dim=-1)
        k, v = torch.cat([sink_k, k], dim=1), torch.cat([sink_v, v], dim=1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=K**-0.5)
        return o.transpose(1, 2)
    past = S - T
    padding = -S % window
    # Queries of zeros at the places of the earlier keys and of the padding; their rows are dropped.
    q = F.pad(q, (0, 0, 0, 0, past, padding)).unflatten(1, (-1, window))
    before = index[:, :1] + torch.arange(-past, 0, device=q.device)
    index = F.pad(torch.cat([before, index], dim=1), (0, padding))
    own_k, own_v = (F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, window)) for x in (k, v))
    first = torch.arange(0, S + padding, window, device=q.device)
    column = (first - past - index[:, first])[..., None] + torch.arange(n, device=q.device)
    place = torch.where(column < 0, torch.arange(n, device=q.device), column + n)
    place = place.clamp(max=n + T - 1).flatten(1)[..., None, None]  # [B, N n, 1, 1]
    keys = [
        torch.cat(
            [
                source.take_along_dim(place, dim=1).unflatten(1, (-1, n)),
                F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1],
                own,
            ],
            dim=2,
        )
        for source, own in ((sink_k, own_k), (sink_v, own_v))
    ]
    far_enough = index.unflatten(1, (-1, window))[..., None] - torch.arange(n, device=q.device)
    near = _block_mask(q.shape[1], window, segments, B, q.device)
    near = near.expand(B, q.shape[1], window, -1)
    mask = torch.cat([far_enough >= window, near], dim=-1).flatten(0, 1)[:, None]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, *keys))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=K**-0.5)
    return o.transpose(1, 2).unflatten(0, (B, -1)).flatten(1, 2)[:, past:S]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """See `nirvana.ops.masked_attention`."""
    k, v = _for_each_query(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _for_each_query(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Heads of keys or values `[B, S, G, K]`, once for each head of q `[B, T, H, K]`."""
    H, G = q.shape[2], others[0].shape[2]
    return others if H == G else tuple(x.repeat_interleave(H // G, dim=2) for x in others)


def _reads_sinks(index: Tensor, n: int, window: int) -> Tensor:
    """Which sinks a token reads: `[B, T, n + T]`, of n of the past and of T new tokens."""
    T = index.shape[1]
    place = torch.arange(T, device=index.device)
    began = (place - index)[..., None]  # the column in which the token's sample began
    old = torch.arange(n, device=index.device)
    stored = (began + old < 0) & (index[..., None] - old >= window)
    new = (place >= began) & (place < began + n) & (place[:, None] - place >= window)
    return torch.cat([stored, new], dim=-1)


def _block_mask(
    N: int, window: int, segments: Tensor | None, B: int, device: torch.device
) -> Tensor:
    """Where the queries of N blocks attend to the keys of the block before and of their own:
    `[1, N, W, 2 W]`, or `[B, N, W, 2 W]` with segments."""
    row = torch.arange(window, device=device)[:, None]
    column = torch.arange(2 * window, device=device)
    mask = (column > row) & (column <= row + window)
    first = torch.arange(N, device=device)[:, None, None] == 0
    mask = (mask & ~(first & (column < window)))[None]  # nothing before the first block
    if segments is None:
        return mask
    own = pad_segments(segments, window).unflatten(1, (N, window))  # [B, N, W]
    before = torch.cat([F.pad(own, (0, 0, 1, 0))[:, :-1], own], dim=2)
    return mask & (own[..., None] == before[:, :, None])
