"""The operations of Nirvana: one public function each, backends behind it.

The backend is chosen per call by the tensors, never at import: `cuda` for half precision on a GPU
(with fla-core and Triton installed), `chunked` for all else; `backend=` overrides the choice (tests
compare `reference` with the others). Whatever the model's dtype, the recurrences and the Trigger
compute in float32 (float64 stays float64) and return the dtype they were given.

`segments` tells samples apart within one row: an integer `[B, T]` that grows by one wherever a new
sample starts. No state crosses such a border. A state handed in belongs to segment 0; the state
handed back belongs to the last token's segment. None means that the whole row is segment 0. The
kernels of `cuda` want the same borders as `cu_seqlens`, int32 `[samples + 1]`: where samples start
and end in the batch laid out as one row (rows are samples, too). Segments without it are computed
by `chunked`.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.device import HAS_KERNELS
from nirvana.ops import chunked, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}

UNIT_EPS = 1e-6
"""Inside the root of the normalisation of q and k along a head."""

MIN_LOG_ALPHA = -40.0
"""Forgets everything (exp of it is below float64's rounding); backends sum log_alpha over a chunk,
and a larger sum would swallow the small decays that follow."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def suits_kernels(x: Tensor) -> bool:
    """Whether x is what the kernels for GPUs are for, and they are installed."""
    return HAS_KERNELS and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Inside the block autocast is off; costs nothing where it was off before."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def in_autocast(x: Tensor) -> Tensor:
    """x in the dtype of autocast's products where autocast is on; elsewhere as it is."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (Yang et al., arXiv 2412.06464), causal along T.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T ;   o_t = S_t q_t / sqrt(K)

    Args:
        q, k: `[B, T, H, K]`; k (and usually q) of unit length along K.
        v: `[B, T, H, V]`.
        log_alpha: `[B, T, H]`, logarithm of the decay, <= 0.
        beta: `[B, T, H]`, write strength in 0..1.
        state: `[B, H, K, V]`, the transpose of S before the first token; None means zero.
        segments: see the module.

    Returns: o `[B, T, H, V]` in v's dtype and the state after the last token, `[B, H, K, V]`.
    """
    with no_autocast(q.device):
        log_alpha = at_least_float32(log_alpha).clamp(min=MIN_LOG_ALPHA)
        o, last = _backend(backend).gated_delta_rule(
            *(at_least_float32(x) for x in (q, k, v, log_alpha, beta)), state, segments
        )
    return o.to(v.dtype), last


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

        y_t = silu(sum_j weight[:, j] x_{t - width + 1 + j})

    Args:
        x: `[B, T, D]`.
        weight: `[D, width]`; the last column meets the token itself.
        state: `[B, D, width - 1]`, the inputs before the first token; None means zero.

    Returns: y `[B, T, D]` and the last inputs, `[B, D, width - 1]`.
    """
    y, last = _backend(backend).causal_conv(x, at_least_float32(weight), state, segments)
    return y.to(x.dtype), last


def linear_branch(
    qkv: Tensor,
    conv_weight: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`causal_conv` of q, k and v, unit length of q and k, then `gated_delta_rule`.

    Args:
        qkv: `[B, T, 3 H K]`, q, k and v side by side.
        conv_weight: `[3 H K, width]`.
        log_alpha, beta, state: as of `gated_delta_rule`, `[B, T, H]` and `[B, H, K, K]`.
        head_dim: K.
        conv_state: as of `causal_conv`.
        final: whether the states after the last token are wanted.

    Returns: o `[B, T, H, K]`; the last inputs of the convolution, `[B, 3 H K, width - 1]`, and the
        delta rule's last state, `[B, H, K, K]`, both None unless `final`.
    """
    four = conv_weight.shape[1] == 4
    if backend is None and four and _fused(qkv, head_dim, segments, cu_seqlens, conv_state, state):
        from nirvana.ops import cuda

        log_alpha = at_least_float32(log_alpha).clamp(min=MIN_LOG_ALPHA)
        o, last = cuda.linear_branch(
            qkv,
            conv_weight,
            log_alpha,
            beta,
            head_dim,
            conv_state,
            state,
            segments,
            cu_seqlens,
            final,
        )
        width = conv_weight.shape[1]
        recent = chunked.last_inputs(qkv, width, conv_state, segments) if final else None
        return o, recent, last
    mixed, recent = causal_conv(qkv, conv_weight, conv_state, segments, backend)
    qk, v = mixed.unflatten(-1, (3, -1, head_dim)).split([2, 1], dim=2)
    q, k = unit(qk).unbind(2)
    o, last = gated_delta_rule(q, k, v.squeeze(2), log_alpha, beta, state, segments, backend)
    return (o, recent, last) if final else (o, None, None)


def window_branch(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`window_attention` on q, k and v, each moved by a low-rank term.

    Args:
        qkv: `[B, T, 3 H K]`, q, k and v side by side.
        low_rank: `[B, T, 3 r]`.
        up: `[3, r, H K]`.

    Returns: `[B, T, H, K]`.
    """
    if backend is None and _fused(qkv, head_dim, segments, cu_seqlens):
        from nirvana.ops import cuda

        return cuda.window_branch(qkv, low_rank, up, head_dim, window, cu_seqlens)
    q, k, v = moved_heads(qkv, low_rank, up, head_dim)
    return window_attention(q, k, v, window, segments, cu_seqlens, backend)


def moved_heads(qkv: Tensor, low_rank: Tensor, up: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """q, k and v of `window_branch`, each `[B, T, H, K]`."""
    factors = low_rank.flatten(0, 1).unflatten(-1, (3, -1)).transpose(0, 1)  # [3, B T, r]
    move = torch.bmm(factors, up.to(factors.dtype)).transpose(0, 1)
    return (qkv + move.reshape(qkv.shape)).unflatten(-1, (3, -1, head_dim)).unbind(2)


def unit(x: Tensor) -> Tensor:
    """Unit length along the last dimension, in float32."""
    x = at_least_float32(x)
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention within a window, scale 1/sqrt(K).

    A token sees itself and the `window - 1` tokens before it; None means all before it.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, S, H, K]`; the last T of them are the queries' own, those before are the past.
        segments: see the module; only where S = T.

    Returns: `[B, T, H, K]`.

    Raises:
        ValueError: for segments where S differs from T.
    """
    if segments is not None and k.shape[1] != q.shape[1]:
        raise ValueError("segments tell new tokens apart, not those of the past")
    differentiable = q.shape == k.shape or not torch.is_grad_enabled()
    if backend is None and differentiable and _fused(q, q.shape[-1], segments, cu_seqlens):
        from nirvana.ops import cuda

        return cuda.window_attention(q, k, v, window, cu_seqlens)
    return _backend(backend).window_attention(q, k, v, window, segments)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention where `mask` is true, scale 1/sqrt(K).

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, S, H, K]`.
        mask: bool, broadcasts to `[B, H, T, S]`.

    Returns: `[B, T, H, K]`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for gate and up side by side.

    Args:
        x: `[B, T, 2 F]`.

    Returns: `[B, T, F]`.
    """
    # Where no gradient is wanted, a compiler does as well, and fuses it with what is around.
    if suits_kernels(x) and x.requires_grad:
        from nirvana.ops import triton_swiglu

        return triton_swiglu.swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def decayed_sum(
    g: Tensor,
    decay: Tensor | float,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory along the sample, m_t = decay m_{t-1} + g_t.

    Args:
        g: `[B, T, F]`.
        decay: one number in 0..1.
        state: m before the first token `[B, F]`; None means zero.

    Returns: m `[B, T, F]` and its last row `[B, F]`.
    """
    with no_autocast(g.device):
        return _backend(backend).decayed_sum(at_least_float32(g), decay, state, segments)


def _fused(
    x: Tensor,
    head_dim: int,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    *states: Tensor | None,
) -> bool:
    """Whether `cuda` computes this: more than one token, and borders that its kernels can take."""
    if not suits_kernels(x) or x.shape[1] == 1:
        return False
    if segments is not None and (cu_seqlens is None or any(s is not None for s in states)):
        return False
    from nirvana.ops import cuda

    return head_dim in cuda.HEAD_DIMS


def _backend(name: str | None) -> ModuleType:
    if name is None:
        return chunked
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
