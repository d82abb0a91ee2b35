"""The definitions of the operations, token by token.

Slow and obvious, one for every public function of `nirvana.ops`, with its arguments. The other
backends are tested against these in values and gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.precision import at_least_float32, no_autocast

UNIT_EPS = 1e-6
"""Added to the squared length of q and k before the root."""
TRIGGER_EPS = 1e-6
"""Added to the variance over C before the root, in the Trigger."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.gated_delta_rule`."""
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
    x: Tensor,
    weight: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.causal_conv`."""
    B, T, D = x.shape
    if weight is None:
        weight = x.new_ones(D, 1)
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
    y = torch.stack(outputs, dim=1)
    return F.silu(y) if silu else y, (inputs[:, T:] * own[..., None]).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """See `nirvana.ops.unit`."""
    x = at_least_float32(x)
    return x / (x.square().sum(-1, keepdim=True) + UNIT_EPS).sqrt()


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
    H, heads = beta.shape[-1], qkv.shape[-1] // head_dim
    G = (heads - H) // 2
    with no_autocast(qkv.device):
        mixed, recent = causal_conv(at_least_float32(qkv), conv_weight, conv_state, segments, silu)
        q, k, v = mixed.unflatten(-1, (-1, head_dim)).split([H, G, G], dim=2)
        k, v = _served(q, k, v)
        o, last = gated_delta_rule(unit(q), unit(k), v, log_alpha, beta, state, segments)
    return (o, recent, last) if final else (o, None, None)


def add_low_rank(
    qkv: Tensor, low_rank: Tensor, up: Tensor, head_dim: int, num_heads: int | None = None
) -> tuple[Tensor, ...]:
    """See `nirvana.ops.add_low_rank`."""
    if up.ndim == 2:
        assert num_heads is not None
        heads, last = qkv.unflatten(-1, (-1, head_dim)), 0
        G, parts = (heads.shape[2] - num_heads) // 2, []
        for factor, n in zip(low_rank.chunk(3, dim=-1), (num_heads, G, G), strict=True):
            first, last = last, last + n
            weight = up[:, first * head_dim : last * head_dim].to(factor.dtype)
            delta = torch.einsum("btr,rd->btd", factor, weight).unflatten(-1, (n, head_dim))
            parts.append(heads[:, :, first:last] + delta)
        return tuple(parts)
    factors = low_rank.unflatten(-1, (3, -1))
    delta = torch.einsum("btpr,prd->btpd", factors, up.to(factors.dtype))
    q, k, v = (qkv.unflatten(-1, (3, -1)) + delta).unbind(2)
    return tuple(x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))


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


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_attention`."""
    k, v = _served(q, k, v)
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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """See `nirvana.ops.masked_attention`."""
    k, v = _served(q, k, v)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)


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
    """See `nirvana.ops.sink_attention`."""
    k, v, sink_k, sink_v = _served(q, k, v, sink_k, sink_v)
    B, T, _, K = q.shape
    past, n = k.shape[1] - T, sink_k.shape[1] - T
    rows = []
    for b in range(B):
        outputs = []
        for t in range(T):
            own = past + t
            near = list(range(max(0, own - window + 1), own + 1))
            if mask is not None:
                near = mask[b, 0, t].nonzero()[:, 0].tolist()
            elif segments is not None:
                near = [s for s in near if segments[b, s] == segments[b, t]]
            read = int(index.expand(B, T)[b, t])  # tokens of the sample before this one
            scores = [k[b, s] * q[b, t] for s in near]
            values = [v[b, s] for s in near]
            for j in range(min(n, read - window + 1)):
                new = t - read + j
                at = j if new < 0 else n + new
                scores.append(sink_k[b, at] * far[b, t])
                values.append(sink_v[b, at])
            weights = (torch.stack(scores).sum(-1) * K**-0.5).softmax(0)  # [keys, H]
            outputs.append((weights[..., None] * torch.stack(values)).sum(0))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def swiglu(x: Tensor) -> Tensor:
    """See `nirvana.ops.swiglu`."""
    gate, up = x.unflatten(-1, (2, -1)).unbind(-2)
    return gate * torch.sigmoid(gate) * up


def trigger_gradient(
    k: Tensor,
    v: Tensor,
    fast: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor,
    exact: bool = True,
) -> Tensor:
    """See `nirvana.ops.trigger_gradient`."""
    k, v, weight, gain, bias, shift = map(at_least_float32, (k, v, weight, gain, bias, shift))
    outputs = []
    for t in range(k.shape[-2]):
        k_t, v_t, p = k[..., t, :], v[..., t, :], fast[..., t, :, :]
        f, n, s = _trigger_token(k_t, p, weight, gain, bias, shift)
        e = f - v_t
        u = torch.einsum("cr,...r->...c", gain, p[..., 1, :]) * e  # of n
        if exact:  # the derivative of the normalisation
            u = u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True)
        delta = u / s  # of z
        g = [
            torch.einsum("...i,icr,...c->...r", k_t, weight, delta),
            torch.einsum("cr,...c->...r", gain, e * n),
            torch.einsum("cr,...c->...r", bias, delta),
            torch.einsum("cr,...c->...r", shift, e),
        ]
        outputs.append(torch.stack(g, dim=-2))
    return torch.stack(outputs, dim=-3)


def trigger_apply(
    x: Tensor, fast: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """See `nirvana.ops.trigger_apply`."""
    x, weight, gain, bias, shift = map(at_least_float32, (x, weight, gain, bias, shift))
    outputs = []
    for t in range(x.shape[-2]):
        f, _, _ = _trigger_token(x[..., t, :], fast[..., t, :, :], weight, gain, bias, shift)
        outputs.append(f)
    return torch.stack(outputs, dim=-2)


def _trigger_token(
    x: Tensor, p: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x; p), n and s of one token: x `[..., C]`, p `[..., 4, R]`."""
    p_w, p_g, p_b, p_s = p.unbind(-2)
    W = torch.einsum("icr,...r->...ic", weight, p_w)
    z = torch.einsum("...i,...ic->...c", x, W) + torch.einsum("cr,...r->...c", bias, p_b)
    s = (z.var(-1, correction=0, keepdim=True) + TRIGGER_EPS).sqrt()
    n = (z - z.mean(-1, keepdim=True)) / s
    f = x + torch.einsum("cr,...r->...c", gain, p_g) * n
    return f + torch.einsum("cr,...r->...c", shift, p_s), n, s


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.linear_cross_entropy`."""
    logits = at_least_float32(h @ weight.mT)
    squares = logits[labels != -100].logsumexp(1).square().sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")  # which leaves out -100, as we do
    return loss + z_loss * squares, squares.detach()


def distillation_loss(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nirvana.ops.distillation_loss`."""
    counted = labels != -100
    logits, taught = (at_least_float32(x)[counted] for x in (logits, taught))
    p = taught.softmax(1)
    kl = (p * (p / logits.softmax(1)).log()).sum(1)
    entropy = F.cross_entropy(logits, labels[counted], reduction="none")
    loss = torch.where(within[counted], kl, entropy).sum()
    return loss, kl.sum().detach(), entropy.sum().detach()


def decayed_sum(
    g: Tensor, decay: Tensor | float, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `nirvana.ops.decayed_sum`."""
    m = torch.zeros_like(g[:, 0]) if state is None else state.to(g.dtype)
    outputs = []
    for t in range(g.shape[1]):
        m = _restart(m, segments, t) * decay + g[:, t]
        outputs.append(m)
    return torch.stack(outputs, dim=1), m


def _served(q: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
    """Shared heads `[B, S, G, K]`, one for each of the H of q, `[B, T, H, K]`."""
    H, G = q.shape[2], shared[0].shape[2]
    return tuple(x[:, :, torch.arange(H) * G // H] for x in shared)


def _restart(state: Tensor, segments: Tensor | None, t: int) -> Tensor:
    """Zeroes the state of the rows in which a new sample starts at token t."""
    if segments is None:
        return state
    before = segments[:, t - 1] if t > 0 else torch.zeros_like(segments[:, 0])
    keep = (segments[:, t] == before).to(state.dtype)
    return state * keep.view(-1, *[1] * (state.ndim - 1))
