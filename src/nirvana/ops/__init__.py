"""The operations of Nirvana: one public function each.

`nirvana.ops.dispatch` chooses, at every call, the backend that computes it: `cuda` for half
precision on a GPU, `chunked` for everything else; inside `use_backend(name)` the named one.
Whatever the model's dtype, the recurrences and the Trigger compute in float32 (float64 stays
float64).

Two arguments separate packed samples within a row, and one ends it:

- `segments`, integer `[B, T]`, grows by one wherever a new sample starts. No state crosses such a
  border. A state passed in belongs to segment 0; the state returned belongs to the last token's
  segment. None means that the whole row is segment 0.
- `cu_seqlens`, int32 `[samples + 1]`, holds the same borders for the kernels: the cumulative
  lengths of all samples in the batch laid out as one row, where rows are borders too. Without it
  packed samples are computed by `chunked`.
- `lengths`, integer `[B]`, is the number of tokens of each row that padding follows: the state
  returned is the one after them. Padding belongs to the last sample. None means no padding.
"""

import torch
from torch import Tensor

from nirvana.ops import dispatch
from nirvana.ops.chunked import last_inputs
from nirvana.ops.dispatch import BACKENDS, suits_kernels, use_backend, warn_without_kernels
from nirvana.ops.precision import at_least_float32, in_autocast, no_autocast

__all__ = [
    "BACKENDS",
    "MIN_LOG_ALPHA",
    "add_low_rank",
    "at_least_float32",
    "causal_conv",
    "decayed_sum",
    "distillation_loss",
    "gated_delta_rule",
    "in_autocast",
    "linear_branch",
    "linear_cross_entropy",
    "masked_attention",
    "no_autocast",
    "sink_attention",
    "suits_kernels",
    "swiglu",
    "trigger_apply",
    "trigger_gradient",
    "unit",
    "use_backend",
    "warn_without_kernels",
    "window_attention",
    "window_branch",
]

MIN_LOG_ALPHA = -40.0
"""Lower bound of log_alpha. exp(-40) is below float64's rounding, so the state is erased; backends
sum log_alpha over a chunk, and a larger magnitude would absorb the small decays that follow."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (Yang et al., arXiv 2412.06464), causal along T.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T ;   o_t = S_t q_t / sqrt(K)

    Args:
        q: `[B, T, H, K]`, usually of unit length along K.
        k: `[B, T, H, K]`, of unit length along K.
        v: `[B, T, H, V]`.
        log_alpha: `[B, T, H]`, logarithm of the decay, <= 0.
        beta: `[B, T, H]`, write strength in 0..1.
        state: `[B, H, K, V]`, the transpose of S before the first token; None means zero.
        segments: `[B, T]`, see the module.

    Returns:
        o `[B, T, H, V]` in v's dtype, and the state after the last token, `[B, H, K, V]`, in
        float32 (float64 for float64).
    """
    with no_autocast(q.device):
        log_alpha = at_least_float32(log_alpha).clamp(min=MIN_LOG_ALPHA)
        o, last = dispatch.implementation("gated_delta_rule")(
            *(at_least_float32(x) for x in (q, k, v, log_alpha, beta)), state, segments
        )
    return o.to(v.dtype), last


def causal_conv(
    x: Tensor,
    weight: Tensor | None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU, both of them optional.

        y_t = silu(sum_j weight[:, j] x_{t - width + 1 + j})

    Args:
        x: `[B, T, D]`.
        weight: `[D, width]`; the last column multiplies the token itself. None means no
            convolution, of width 1.
        state: `[B, D, width - 1]`, the inputs before the first token; None means zero.
        segments: `[B, T]`, see the module.
        silu: apply SiLU.

    Returns:
        y `[B, T, D]` in x's dtype, and the last inputs, `[B, D, width - 1]`.
    """
    weight = None if weight is None else at_least_float32(weight)
    y, last = dispatch.implementation("causal_conv")(x, weight, state, segments, silu)
    return y.to(x.dtype), last


def unit(x: Tensor) -> Tensor:
    """Scales vectors to unit length: x / sqrt(sum x^2 + 1e-6), along the last dimension.

    Args:
        x: `[..., K]`.

    Returns:
        `[..., K]` in float32 (float64 for float64).
    """
    return dispatch.implementation("unit")(x)


def linear_branch(
    qkv: Tensor,
    conv_weight: Tensor | None,
    log_alpha: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final: bool = True,
    lengths: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`causal_conv` of q, k and v, `unit` of q and k, then `gated_delta_rule`.

    Args:
        qkv: `[B, T, (H + 2 G) K]`, q, k and v side by side; each of the G heads of k and v serves
            H / G heads of q, whose states are their own.
        conv_weight: `[(H + 2 G) K, width]`; None means no convolution, of width 1.
        log_alpha: `[B, T, H]`, logarithm of the decay, <= 0.
        beta: `[B, T, H]`, write strength in 0..1.
        head_dim: K.
        conv_state: `[B, (H + 2 G) K, width - 1]`, as of `causal_conv`.
        state: `[B, H, K, K]`, as of `gated_delta_rule`.
        segments: `[B, T]`, see the module.
        cu_seqlens: `[samples + 1]`, see the module.
        final: whether to return the states after the last token.
        lengths: `[B]`, see the module.
        silu: see `causal_conv`.

    Returns:
        o `[B, T, H, K]` in qkv's dtype; the last inputs of the convolution,
        `[B, (H + 2 G) K, width - 1]`; and the delta rule's last state, `[B, H, K, K]`, in float32
        (float64 for float64). Both states are None unless `final`.
    """
    if lengths is not None:  # padding writes nothing and keeps the state
        real = torch.arange(qkv.shape[1], device=qkv.device) < lengths[:, None]
        log_alpha, beta = (x * real[..., None] for x in (log_alpha, beta))
    fits = dispatch.linear_branch_fits(qkv, conv_weight, head_dim, segments, cu_seqlens, conv_state)
    o, recent, last = dispatch.implementation("linear_branch", fits)(
        qkv,
        None if conv_weight is None else at_least_float32(conv_weight),
        at_least_float32(log_alpha).clamp(min=MIN_LOG_ALPHA),
        at_least_float32(beta),
        head_dim,
        conv_state,
        state,
        segments,
        cu_seqlens,
        final,
        silu,
    )
    if final and lengths is not None and conv_weight is not None:
        recent = last_inputs(qkv, conv_weight.shape[1], conv_state, segments, lengths)
    return o.to(qkv.dtype), recent, last


def add_low_rank(
    qkv: Tensor, low_rank: Tensor, up: Tensor, head_dim: int, num_heads: int | None = None
) -> tuple[Tensor, ...]:
    """Adds a low-rank term to q, k and v: x_p + low_rank_p up_p for p = q, k, v.

    Args:
        qkv: `[B, T, (H + 2 G) K]`, q, k and v side by side.
        low_rank: `[B, T, 3 r]`, the factors of q, k and v side by side.
        up: `[3, r, H K]`; with fewer heads of k and v, G < H, `[r, (H + 2 G) K]`, those of q, k and
            v side by side.
        head_dim: K.
        num_heads: H; None means G = H.

    Returns:
        q `[B, T, H, K]`, k and v `[B, T, G, K]`.
    """
    fits = dispatch.low_rank_fits(qkv, low_rank, up)
    compute = dispatch.implementation("add_low_rank", fits)
    return compute(qkv, low_rank, up, head_dim, num_heads)


def window_branch(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`window_attention` on the q, k and v of `add_low_rank`.

    Args:
        qkv: `[B, T, 3 H K]`, q, k and v side by side.
        low_rank: `[B, T, 3 r]`, the factors of q, k and v side by side.
        up: `[3, r, H K]`.
        head_dim: K.
        window: tokens that a token attends to, itself included; None means all before it.
        segments: `[B, T]`, see the module.
        cu_seqlens: `[samples + 1]`, see the module.

    Returns:
        `[B, T, H, K]`.
    """
    fits = dispatch.branch_fits(qkv, head_dim, segments, cu_seqlens)
    compute = dispatch.implementation("window_branch", fits)
    return compute(qkv, low_rank, up, head_dim, window, segments, cu_seqlens)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention within a window, scale 1/sqrt(K).

    A token attends to itself and the `window - 1` tokens before it.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`, each of the G heads for H / G heads of q; the last T keys are the
            queries' own, the S - T before are the past.
        v: `[B, S, G, K]`.
        window: tokens that a token attends to, itself included; None means all before it.
        segments: `[B, T]`, see the module; only with S = T.
        cu_seqlens: `[samples + 1]`, see the module.

    Returns:
        `[B, T, H, K]`.

    Raises:
        ValueError: if there are segments and S differs from T.
    """
    if segments is not None and k.shape[1] != q.shape[1]:
        raise ValueError("segments separate new tokens, not those of the past")
    fits = dispatch.branch_fits(q, q.shape[-1], segments, cu_seqlens)
    compute = dispatch.implementation("window_attention", fits)
    return compute(q, k, v, window, segments, cu_seqlens)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention where `mask` is true, scale 1/sqrt(K).

    Args:
        q: `[B, T, H, K]`.
        k: `[B, S, G, K]`, each of the G heads for H / G heads of q.
        v: `[B, S, G, K]`.
        mask: bool, broadcasts to `[B, H, T, S]`; true somewhere in every row.

    Returns:
        `[B, T, H, K]`.
    """
    return dispatch.implementation("masked_attention")(q, k, v, mask)


def sink_attention(
    q: Tensor,
    far: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
    segments: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`window_attention` that also attends to the first tokens of a sample, its sinks.

    A token attends to the window before it with q, and with `far` to those of the first n tokens
    of its sample that have left the window (StreamingLLM, arXiv 2309.17453); one softmax.

    Args:
        q: `[B, T, H, K]`.
        far: `[B, T, H, K]`, the queries of the sinks, which other rotary positions may distinguish.
        k: `[B, S, G, K]`; the last T keys are the queries' own, the S - T before are the past.
        v: `[B, S, G, K]`.
        sink_k: `[B, n + T, G, K]`, the first n keys of the sample that the first token continues,
            then the new tokens' own; what the n lack because it is new is not read from them.
        sink_v: `[B, n + T, G, K]`, their values.
        window: tokens that a token attends to, itself included.
        index: `[B, T]` or `[1, T]`, tokens of its sample before each token.
        segments: `[B, T]`, see the module; only with S = T.
        mask: bool, broadcasts to `[B, 1, T, S]`, true within the window; None: by position.
        cu_seqlens: `[samples + 1]`, see the module.

    Returns:
        `[B, T, H, K]`.

    Raises:
        ValueError: if there are segments and no mask, and S differs from T.
    """
    if segments is not None and mask is None and k.shape[1] != q.shape[1]:
        raise ValueError("segments separate new tokens, not those of the past")
    sinks = sink_k.shape[1] - q.shape[1]
    fits = dispatch.sink_attention_fits(q, sinks, window, segments, cu_seqlens, mask)
    compute = dispatch.implementation("sink_attention", fits)
    return compute(q, far, k, v, sink_k, sink_v, window, index, segments, mask, cu_seqlens)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for gate and up side by side (Shazeer, arXiv 2002.05202).

    Args:
        x: `[..., 2 F]`.

    Returns:
        `[..., F]`.
    """
    return dispatch.implementation("swiglu", dispatch.swiglu_fits(x))(x)


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
    """Gradient of 1/2 ||f(k; p) - v||^2 with respect to p, in closed form; f as of `trigger_apply`.

    With e = f(k; p) - v, gamma = gain p_g, U_r = k weight[:, :, r] and
    delta = P(gamma e) / s, where P(u) = u - mean(u) - n mean(u n):

        g_w[r] = U_r . delta      g_g = gain^T (e n)      g_b = bias^T delta      g_s = shift^T e

    Args:
        k: `[..., T, C]`, the task keys.
        v: `[..., T, C]`, the task values.
        fast: p, `[..., T, 4, R]`, float32 (float64 for float64).
        weight: `[C, C, R]` (in, out, bank).
        gain: `[C, R]`.
        bias: `[C, R]`.
        shift: `[C, R]`.
        exact: False leaves out the derivative of the normalisation (P(u) = u), as the authors'
            released code does.

    Returns:
        `[..., T, 4, R]`, the gradients of p_w, p_g, p_b and p_s, in fast's dtype.
    """
    compute = dispatch.implementation("trigger_gradient", dispatch.trigger_fits(k))
    return compute(k, v, fast, weight, gain, bias, shift, exact)


def trigger_apply(
    x: Tensor, fast: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """The function f of the Trigger, whose weights are mixed from a bank by the fast parameters.

    With p = (p_w, p_g, p_b, p_s), each `[R]`:

        z(x; p) = sum_ir x_i weight[i, :, r] p_w[r] + bias p_b
        f(x; p) = x + (gain p_g) n + shift p_s      n = (z - mean(z)) / s,  s^2 = var(z) + 1e-6

    Mean and (biased) variance are over C.

    Args:
        x: `[..., T, C]`.
        fast: p, `[..., T, 4, R]`, float32 (float64 for float64).
        weight: `[C, C, R]` (in, out, bank).
        gain: `[C, R]`.
        bias: `[C, R]`.
        shift: `[C, R]`.

    Returns:
        `[..., T, C]`; float32 or x's dtype.
    """
    compute = dispatch.implementation("trigger_apply", dispatch.trigger_fits(x))
    return compute(x, fast, weight, gain, bias, shift)


def decayed_sum(
    g: Tensor,
    decay: Tensor | float,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Trigger's memory along the sample, m_t = decay m_{t-1} + g_t.

    Args:
        g: `[B, T, F]`.
        decay: one number in 0..1.
        state: `[B, F]`, m before the first token; None means zero.
        segments: `[B, T]`, see the module.
        lengths: `[B]`, see the module.

    Returns:
        m `[B, T, F]` and its last row, `[B, F]`, in float32 (float64 for float64).
    """
    with no_autocast(g.device):
        compute = dispatch.implementation("decayed_sum")
        m, last = compute(at_least_float32(g), decay, state, segments)
        if lengths is not None:
            before = torch.zeros_like(last) if state is None else state.to(last.dtype)
            place = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, m.shape[2])
            last = m.gather(1, place)[:, 0]
            last = torch.where(lengths[:, None] > 0, last, before)
        return m, last


def linear_cross_entropy(
    h: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """sum_t -log softmax(weight h_t)[labels_t] + z_loss (log Z_t)^2, over the tokens whose label is
    not -100.

    Z_t is the sum of the exponentials of the token's logits. The logits are in h's dtype; the
    softmax is computed in float32 (float64 for float64).

    Args:
        h: `[N, D]`, in autocast's dtype where autocast is on.
        weight: `[V, D]`, the same.
        labels: `[N]`, int64, in 0..V-1, or -100 (`cross_entropy.IGNORE`).
        z_loss: at least 0 (PaLM, arXiv 2204.02311: 1e-4).

    Returns:
        the loss, a scalar, float32 (float64 for float64), and the sum of the (log Z_t)^2 in it,
        which carries no gradient.
    """
    h, weight = in_autocast(h), in_autocast(weight)
    fits = dispatch.cross_entropy_fits(h)
    return dispatch.implementation("linear_cross_entropy", fits)(h, weight, labels, z_loss)


def distillation_loss(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_t KL(p_t || q_t) where `within`, else -log q_t[labels_t], over the tokens whose label is
    not -100; p is the softmax of `taught`, q that of `logits`, in float32 (float64 for float64).

    Args:
        logits: `[N, V]`.
        taught: `[N, V]`, constant: it gets no gradient.
        labels: `[N]`, int64, in 0..V-1, or -100 (`cross_entropy.IGNORE`).
        within: bool, `[N]`.

    Returns:
        the loss; and without gradients the sums of the divergence and of -log q_t[labels_t] over
        all these tokens. Scalars, float32 (float64 for float64).
    """
    fits = dispatch.cross_entropy_fits(logits)
    compute = dispatch.implementation("distillation_loss", fits)
    return compute(logits, taught.detach(), labels, within)
