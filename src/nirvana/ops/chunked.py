"""The operations in PyTorch, in chunks, on any device: linear in T in time and memory.

The functions of windows, the Trigger and the losses, which this backend has too, are in `window`,
`trigger`, `cross_entropy` and `divergence`. While `torch.export` traces, nothing depends on the
value of T, so that a program exported for a dynamic length holds for every length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.chunks import chunk_count, is_exporting, is_one, pad_segments
from nirvana.ops.cross_entropy import linear_cross_entropy
from nirvana.ops.divergence import distillation_loss
from nirvana.ops.precision import at_least_float32, no_autocast
from nirvana.ops.reference import UNIT_EPS
from nirvana.ops.trigger import trigger_apply, trigger_gradient
from nirvana.ops.window import masked_attention, sink_attention, window_attention

__all__ = [
    "add_low_rank",
    "causal_conv",
    "decayed_sum",
    "distillation_loss",
    "gated_delta_rule",
    "linear_branch",
    "linear_cross_entropy",
    "masked_attention",
    "sink_attention",
    "swiglu",
    "trigger_apply",
    "trigger_gradient",
    "unit",
    "window_attention",
    "window_branch",
]

DELTA_CHUNK = 64
"""Tokens of a chunk of the gated delta rule."""
SOLVE_SIZE = 16
"""Triangular matrices up to this size are inverted by the library."""
SUM_CHUNK = 64
"""Tokens of a chunk of the decayed sum."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.gated_delta_rule`.

    Within a chunk the writes solve one unit triangular system (the WY form of arXiv 2412.06464,
    section 3.3); only the update of the state runs from chunk to chunk.
    """
    B, T, H, K = q.shape
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1])
    state = state.to(q.dtype)
    if is_one(T) and segments is None:
        return _delta_step(q * K**-0.5, k, v, log_alpha, beta, state)

    c = DELTA_CHUNK if is_exporting() else min(DELTA_CHUNK, T)
    N = chunk_count(T, c)
    # Padding writes nothing (beta = 0) and keeps the state (alpha = 1).
    q, k, v, beta, log_alpha = (_chunks(x, c) for x in (q, k, v, beta, log_alpha))
    G = log_alpha.cumsum(-1)
    same = torch.ones(c, c, dtype=torch.bool, device=q.device).tril()
    enter, leave, keep = G.exp(), (G[:, -1:] - G).exp(), G[:, -1:].exp()
    if segments is not None:
        owner = pad_segments(segments, c).unflatten(1, (N, c)).transpose(0, 1)
        owner = owner.repeat_interleave(H, dim=1)  # [N, BH, c]
        last = owner[..., -1:]
        carried = F.pad(last, (0, 0, 0, 0, 1, 0))[:-1]  # owner of the state that enters the chunk
        owner, last, carried = (x.flatten(0, 1) for x in (owner, last, carried))
        same = same & (owner[:, :, None] == owner[:, None])
        enter = enter * (owner == carried)
        leave = leave * (owner == last)
        keep = keep * (last == carried)
    # The exponent is masked before exp: above the diagonal it may be large and positive.
    decay = (G[:, :, None] - G[:, None]).masked_fill_(~same, float("-inf")).exp_()

    # What is written at each token is u - w S, S the state that enters the chunk.
    solve = _UnitInverse.apply((k @ k.mT).mul_(decay * beta[..., None])) * beta[:, None]
    u, w = solve @ v, solve @ (k * enter[..., None])
    k_leave = (k * leave[..., None]).mT
    through = _scan_chunks if is_exporting() else _loop_over_chunks
    S, states, writes = through(state.flatten(0, 1), N, u, w, k_leave, keep[..., None])
    read = (q * enter[..., None]) @ states
    scores = (q @ k.mT).mul_(decay)
    o = torch.baddbmm(read, scores, writes, alpha=K**-0.5, beta=K**-0.5)
    o = o.view(N, B, H, c, v.shape[-1]).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return o[:, :T], S.view(B, H, *S.shape[1:])


def _loop_over_chunks(
    S: Tensor, N: int, u: Tensor, w: Tensor, k: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The state through N chunks, S <- keep S + k (u - w S): after the last one `[BH, K, V]`,
    before each `[N BH, K, V]`, and what each writes, `[N BH, c, V]`."""
    states, writes = [], []
    for u_n, w_n, k_n, keep_n in zip(*(x.chunk(N) for x in (u, w, k, keep)), strict=True):
        states.append(S)
        writes.append(torch.baddbmm(u_n, w_n, S, alpha=-1))
        S = (keep_n * S).baddbmm_(k_n, writes[-1])
    return S, torch.cat(states), torch.cat(writes)


def _scan_chunks(
    S: Tensor, N: int, u: Tensor, w: Tensor, k: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_loop_over_chunks` as one operator, for any N."""
    from torch._higher_order_ops.scan import scan

    def step(S: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u_n, w_n, k_n, keep_n = given
        write = torch.baddbmm(u_n, w_n, S, alpha=-1)
        return (keep_n * S).baddbmm(k_n, write), (S.clone(), write)

    rows = S.shape[0]
    chunks = tuple(x.unflatten(0, (N, rows)) for x in (u, w, k, keep))
    S, (states, writes) = scan(step, S.clone(), chunks)  # the tracer fixes the sizes of a view
    return S, states.flatten(0, 1), writes.flatten(0, 1)


class _UnitInverse(torch.autograd.Function):
    """(I + L)^-1 for the strictly lower triangle L of each matrix `[..., n, n]`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(L: Tensor) -> Tensor:
        if L.shape[-1] <= SOLVE_SIZE:
            # PyTorch 2.11 would compile a copy into X so that the backward gets X before it.
            return _solve(L)
        X = torch.zeros_like(L)
        _invert(L, X)
        return X

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (X,) = ctx.saved_tensors
        return -(X.mT @ grad @ X.mT).tril(-1)


def _invert(L: Tensor, X: Tensor) -> None:
    """Writes (I + L)^-1 into X, halves first: mostly products, none of which overflows."""
    n = L.shape[-1]
    if n <= SOLVE_SIZE:
        X.copy_(_solve(L))
        return
    head, tail = slice(n // 2), slice(n // 2, n)
    _invert(L[..., head, head], X[..., head, head])
    _invert(L[..., tail, tail], X[..., tail, tail])
    X[..., tail, head] = -X[..., tail, tail] @ L[..., tail, head] @ X[..., head, head]


def _solve(L: Tensor) -> Tensor:
    """(I + L)^-1 by substitution."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: the recurrence itself."""
    B, _, H, _ = q.shape
    q, k, v = (x.reshape(B * H, 1, -1) for x in (q, k, v))
    alpha, beta = log_alpha.exp().reshape(-1, 1, 1), beta.reshape(-1, 1, 1)
    S = state.flatten(0, 1) * alpha
    S = torch.baddbmm(S, k.mT, beta * torch.baddbmm(v, k, S, alpha=-1))
    return torch.bmm(q, S).view(B, 1, H, -1), S.view(B, H, *S.shape[1:])


def _chunks(x: Tensor, c: int) -> Tensor:
    """`[B, T, H, ...]` to `[N B H, c, ...]`, N chunks of c tokens, padded with zeros."""
    N = chunk_count(x.shape[1], c)
    x = F.pad(x, (*[0, 0] * (x.ndim - 2), 0, N * c - x.shape[1]))
    x = x.unflatten(1, (N, c)).transpose(0, 1).transpose(2, 3)
    return x.flatten(0, 2).contiguous()


def causal_conv(
    x: Tensor,
    weight: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.causal_conv`.

    A sum of shifted copies: exact at sample borders, and one pass when compiled.
    """
    activate = F.silu if silu else torch.clone
    if weight is None:
        return activate(x), x.new_empty(x.shape[0], x.shape[2], 0)
    T, width = x.shape[1], weight.shape[1]
    if state is None:
        inputs = F.pad(x, (0, 0, width - 1, 0))
    else:
        inputs = torch.cat([state.mT.to(x.dtype), x], dim=1)
    if is_one(T) and segments is None:
        return activate((inputs * weight.mT).sum(1, keepdim=True)), inputs[:, 1:].mT
    y = x * weight[:, -1]
    owner = None if segments is None else F.pad(segments, (width - 1, 0))
    for j in range(width - 1):
        tap = inputs[:, j : j + T]
        if owner is not None:
            tap = tap * (owner[:, j : j + T] == segments)[..., None]
        y = y + tap * weight[:, j]
    return activate(y), last_inputs(x, width, state, segments)


def last_inputs(
    x: Tensor,
    width: int,
    state: Tensor | None,
    segments: Tensor | None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The inputs that the convolution of the next token reads.

    Args:
        x: `[B, T, D]`, the inputs of this call.
        width: of the convolution.
        state: `[B, D, width - 1]`, the inputs before; None means zero.
        segments: `[B, T]`, see `nirvana.ops`.
        lengths: `[B]`, see `nirvana.ops`.

    Returns:
        `[B, D, width - 1]`, zero where an input is not of the last token's sample.
    """
    T = x.shape[1]
    old = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if state is not None:
        old = state.mT.to(x.dtype)
    first = max(0, T - width + 1) if isinstance(T, int) and lengths is None else 0
    last, own = torch.cat([old, x[:, first:]], dim=1), None
    if segments is not None:  # padding belongs to the last sample
        own = F.pad(segments[:, first:], (width - 1, 0)) == segments[:, -1:]
    if lengths is None:
        last, own = last[:, T - first :], None if own is None else own[:, T - first :]
    else:
        place = torch.arange(width - 1, device=x.device) + lengths[:, None]
        last = last.gather(1, place[..., None].expand(-1, -1, x.shape[2]))
        own = None if own is None else own.gather(1, place)
    return (last if own is None else last * own[..., None]).mT


def unit(x: Tensor) -> Tensor:
    """See `nirvana.ops.unit`."""
    x = at_least_float32(x)
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()


def linear_branch(
    qkv: Tensor,
    conv_weight: Tensor | None,
    log_alpha: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    final: bool,
    silu: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `nirvana.ops.linear_branch`."""
    H = beta.shape[-1]
    mixed, recent = causal_conv(qkv, conv_weight, conv_state, segments, silu)
    mixed = mixed.to(qkv.dtype).unflatten(-1, (-1, head_dim))
    G = (mixed.shape[2] - H) // 2
    q, k, v = mixed.split([H, G, G], dim=2)
    q, k = unit(q), unit(k)
    with no_autocast(qkv.device):
        v = at_least_float32(v)
        if G < H:
            k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
        o, last = gated_delta_rule(q, k, v, log_alpha, beta, state, segments)
    o = o.to(qkv.dtype)
    return (o, recent, last) if final else (o, None, None)


def add_low_rank(
    qkv: Tensor, low_rank: Tensor, up: Tensor, head_dim: int, num_heads: int | None = None
) -> tuple[Tensor, ...]:
    """See `nirvana.ops.add_low_rank`."""
    if up.ndim == 2:
        assert num_heads is not None
        G = (qkv.shape[-1] // head_dim - num_heads) // 2
        ups = up.to(low_rank.dtype).split([n * head_dim for n in (num_heads, G, G)], dim=1)
        pairs = zip(low_rank.chunk(3, dim=-1), ups, strict=True)
        x = qkv + torch.cat([factor @ weight for factor, weight in pairs], dim=-1)
        return x.unflatten(-1, (-1, head_dim)).split([num_heads, G, G], dim=2)
    factors = low_rank.flatten(0, 1).unflatten(-1, (3, -1)).transpose(0, 1)  # [3, B T, r]
    delta = torch.bmm(factors, up.to(factors.dtype)).transpose(0, 1)
    return (qkv + delta.reshape(qkv.shape)).unflatten(-1, (3, -1, head_dim)).unbind(2)


def window_branch(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_branch`."""
    q, k, v = add_low_rank(qkv, low_rank, up, head_dim)
    return window_attention(q, k, v, window, segments, cu_seqlens)


def swiglu(x: Tensor) -> Tensor:
    """See `nirvana.ops.swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def decayed_sum(
    g: Tensor, decay: Tensor | float, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.decayed_sum`.

    Products with a triangle of powers; chunk ends are summed by the same rule, recursively.
    """
    B, T, _ = g.shape
    if state is None:
        state = torch.zeros_like(g[:, 0])
    state = state.to(g.dtype)
    decay = torch.as_tensor(decay, dtype=g.dtype, device=g.device)
    if is_one(T) and segments is None:
        m = state * decay + g[:, 0]
        return m[:, None], m
    if segments is None:
        segments = torch.zeros(B, T, dtype=torch.long, device=g.device)
    c = SUM_CHUNK if is_exporting() else min(SUM_CHUNK, T)
    N = chunk_count(T, c)
    g = F.pad(g, (0, 0, 0, N * c - T)).unflatten(1, (N, c))
    owner = pad_segments(segments, c).unflatten(1, (N, c))
    steps = torch.arange(c, device=g.device)
    age = (steps[:, None] - steps).clamp(min=0)
    same = (owner[..., :, None] == owner[..., None, :]).tril()
    m = (decay**age * same) @ g
    ends = owner[:, :, -1]
    carried = F.pad(ends, (1, 0))[:, :-1]
    if is_exporting():
        carry = _scan_sums(state, m[:, :, -1], decay**c * (ends == carried)[..., None])
    elif m.shape[1] > 1:
        carry, _ = decayed_sum(m[:, :, -1], decay**c, state, ends)
        carry = torch.cat([state[:, None], carry[:, :-1]], dim=1)
    else:
        carry = state[:, None]
    reach = decay ** (steps + 1) * (owner == carried[..., None])
    m = (m + reach[..., None] * carry[:, :, None]).flatten(1, 2)[:, :T]
    return m, m[:, -1]


def _scan_sums(state: Tensor, ends: Tensor, keep: Tensor) -> Tensor:
    """The sum before each of N chunks, m <- end + keep m, as one operator for any N: `[B, N, F]`,
    for state `[B, F]`, ends `[B, N, F]` and keep `[B, N, 1]`."""
    from torch._higher_order_ops.scan import scan

    def step(m: Tensor, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        end, kept = given
        return end + kept * m, m.clone()

    chunks = (ends.transpose(0, 1).contiguous(), keep.transpose(0, 1).contiguous())
    return scan(step, state.contiguous(), chunks)[1].transpose(0, 1)
