"""The two branches of the Updater on half-precision CUDA tensors, as operations that compile.

Each keeps little for its backward and computes the rest again: the linear branch its inputs, the
decays' sums and the chunks' small inverses, but no convolved q, k, v; the window branch its inputs
and output, but no moved q, k, v. The gated delta rule itself is fla-core's, through flash-qla where
that is installed and fits; it wants rows laid end to end, with `cu_seqlens` between them.
"""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from nirvana.ops import attention, triton_conv, triton_low_rank

HAS_FLASH_QLA = find_spec("flash_qla") is not None
FREE = (torch.Tag.flexible_layout,)
"""Slices of a larger product reach an operation as they lie, without a copy."""
CHUNK = 64
"""Tokens of a chunk in both libraries."""


HEAD_DIMS = (32, 64, 128)
"""Sizes of a head that the attention and the delta rule here take."""


def _rows(x: Tensor) -> Tensor:
    """x `[B, T, D]` itself if its tokens lie at equal distances, each in one piece; else a copy."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even or (x.shape[0] == 1 and x.stride(2) == 1) else x.contiguous()


# The linear branch.


@lru_cache(maxsize=64)
def _equal_rows(B: int, T: int, device: torch.device) -> Tensor:
    """One tensor for one shape: the libraries remember a tensor's lengths by its identity, and
    read them from the device only once."""
    return torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)


def _flash_qla_fits(q: Tensor) -> bool:
    return (
        HAS_FLASH_QLA
        and q.shape[-1] == 128
        and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    )


def _delta_forward(
    qkv: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor | None, borders: Tensor, final: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """o, sums of log_alpha within chunks, inverses of the chunks, and the documents' last states.

    Args: qkv `[3, 1, N, H, K]`, log_alpha and beta `[1, N, H]`.
    """
    q, k, v = qkv.unbind(0)
    scale = q.shape[-1] ** -0.5
    if _flash_qla_fits(q):
        chunk = import_module("flash_qla.ops.gated_delta_rule.chunk")
        sums, inverse, o, _, last, _ = chunk.chunk_gated_delta_rule_fwd(
            q, k, v, log_alpha, beta, scale, state, borders, final, is_train=not final
        )
        return o, sums, inverse, last
    chunk = import_module("fla.ops.gated_delta_rule.chunk")
    places = import_module("fla.ops.utils.index").prepare_chunk_indices(borders, CHUNK)
    sums, o, inverse, last, _, _ = chunk.chunk_gated_delta_rule_fwd(
        q, k, v, log_alpha, beta, scale, state, final, False, borders, None, places
    )
    return o.to(q.dtype), sums, inverse.to(q.dtype), last


def _delta_backward(
    o_bar: Tensor,
    qkv: Tensor,
    beta: Tensor,
    sums: Tensor,
    inverse: Tensor,
    state: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, `[1, N, H, K]`, log_alpha and beta."""
    q, k, v = qkv.unbind(0)
    scale = q.shape[-1] ** -0.5
    if _flash_qla_fits(q):
        chunk = import_module("flash_qla.ops.gated_delta_rule.chunk")
        q_bar, k_bar, v_bar, beta_bar, alpha_bar, _ = chunk.chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, inverse, o_bar, None, scale, state, borders
        )
    else:
        chunk = import_module("fla.ops.gated_delta_rule.chunk")
        places = import_module("fla.ops.utils.index").prepare_chunk_indices(borders, CHUNK)
        q_bar, k_bar, v_bar, beta_bar, alpha_bar, *_ = chunk.chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, inverse, scale, state, o_bar, None, False, borders, None, places
        )
    bars = (bar.to(q.dtype).contiguous() for bar in (q_bar, k_bar, v_bar))
    return *bars, alpha_bar.float(), beta_bar.float()


@torch.library.custom_op("nirvana::linear_branch", mutates_args=(), device_types="cuda", tags=FREE)
def _linear(
    qkv: Tensor,
    conv_weight: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, last states (empty unless `final`), and what the backward wants: sums and inverses."""
    B, T, D3 = qkv.shape
    H = D3 // (3 * head_dim)
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    qkv, conv_weight = _rows(qkv), conv_weight.contiguous()
    mixed = triton_conv.forward(qkv, conv_weight, head_dim, conv_state, segments)
    rows = mixed.view(3, 1, B * T, H, head_dim)
    log_alpha, beta = (x.contiguous().view(1, B * T, H) for x in (log_alpha, beta))
    with torch.cuda.device_of(qkv):
        o, sums, inverse, last = _delta_forward(rows, log_alpha, beta, state, borders, final)
    if last is None:
        last = sums.new_empty(0)
    elif cu_seqlens is not None:  # of every document: a row's last one ends where the row does
        ends = torch.arange(1, B + 1, dtype=torch.int32, device=qkv.device) * T
        last = last[torch.searchsorted(borders, ends) - 1]
    return o.view(B, T, H, head_dim), last, sums, inverse


@_linear.register_fake
def _(
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
):
    B, T, D3 = qkv.shape
    H = D3 // (3 * head_dim)
    o = qkv.new_empty(B, T, H, head_dim)
    last = (B, H, head_dim, head_dim) if final else (0,)
    sums = log_alpha.new_empty(1, B * T, H)
    return o, log_alpha.new_empty(last), sums, qkv.new_empty(1, B * T, H, CHUNK)


@torch.library.custom_op(
    "nirvana::linear_branch_gradients", mutates_args=(), device_types="cuda", tags=FREE
)
def _linear_gradients(
    o_bar: Tensor,
    qkv: Tensor,
    conv_weight: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    sums: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, conv_weight, log_alpha and beta."""
    B, T, D3 = qkv.shape
    H = D3 // (3 * head_dim)
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    qkv, conv_weight = _rows(qkv), conv_weight.contiguous()
    mixed = triton_conv.forward(qkv, conv_weight, head_dim, conv_state, segments)
    with torch.cuda.device_of(qkv):
        q_bar, k_bar, v_bar, alpha_bar, beta_bar = _delta_backward(
            o_bar.contiguous().view(1, B * T, H, head_dim),
            mixed.view(3, 1, B * T, H, head_dim),
            beta.contiguous().view(1, B * T, H),
            sums,
            inverse,
            state,
            borders,
        )
    qkv_bar, weight_bar = triton_conv.backward(
        (q_bar, k_bar, v_bar), qkv, conv_weight, head_dim, conv_state, segments
    )
    return qkv_bar, weight_bar, alpha_bar.view(B, T, H), beta_bar.view(B, T, H)


@_linear_gradients.register_fake
def _(
    o_bar,
    qkv,
    conv_weight,
    beta,
    head_dim,
    conv_state,
    state,
    segments,
    cu_seqlens,
    sums,
    inverse,
):
    alpha_bar, beta_bar = (beta.new_empty(beta.shape, dtype=torch.float32) for _ in range(2))
    weight_bar = conv_weight.new_empty(conv_weight.shape, dtype=torch.float32)
    return qkv.new_empty(qkv.shape), weight_bar, alpha_bar, beta_bar


def _linear_save(ctx, inputs, output):
    qkv, conv_weight, _, beta, ctx.head_dim, conv_state, state, segments, cu_seqlens, _ = inputs
    _, last, sums, inverse = output
    ctx.mark_non_differentiable(last, sums, inverse)
    ctx.save_for_backward(
        qkv, conv_weight, beta, conv_state, state, segments, cu_seqlens, sums, inverse
    )


def _linear_autograd(ctx, o_bar, *_):
    qkv, conv_weight, beta, conv_state, state, segments, cu_seqlens, *kept = ctx.saved_tensors
    bars = _linear_gradients(
        o_bar,
        qkv,
        conv_weight,
        beta,
        ctx.head_dim,
        conv_state,
        state,
        segments,
        cu_seqlens,
        *kept,
    )
    return *bars, None, None, None, None, None, None


_linear.register_autograd(_linear_autograd, setup_context=_linear_save)


def linear_branch(
    qkv: Tensor,
    conv_weight: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `nirvana.ops.linear_branch`; the states are not differentiable."""
    o, last, _, _ = _linear(
        qkv,
        conv_weight.float(),
        log_alpha.float(),
        beta.float(),
        head_dim,
        conv_state,
        None if state is None else state.float(),
        segments,
        cu_seqlens,
        final,
    )
    return o, last if final else None


# The window branch.


def _parts(x: Tensor) -> Tensor:
    """`[B, T, 3 D]` as `[3, B T, D]`."""
    return x.flatten(0, 1).unflatten(-1, (3, -1)).transpose(0, 1)


def _heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """`[B, T, 3 H K]` as three `[B, T, H, K]`."""
    return qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)


@torch.library.custom_op("nirvana::window_branch", mutates_args=(), device_types="cuda", tags=FREE)
def _window(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    moved = triton_low_rank.move(_rows(qkv), _rows(low_rank), up.contiguous())
    q, k, v = _heads(moved, head_dim)
    return attention.forward(q, k, v, window, cu_seqlens)


@_window.register_fake
def _(qkv, low_rank, up, head_dim, window, cu_seqlens):
    B, T, D3 = qkv.shape
    o = qkv.new_empty(B, T, D3 // (3 * head_dim), head_dim)
    return o, qkv.new_empty(o.shape[:3].numel(), dtype=torch.float32)


@torch.library.custom_op(
    "nirvana::window_branch_gradients", mutates_args=(), device_types="cuda", tags=FREE
)
def _window_gradients(
    o_bar: Tensor,
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, low_rank and up."""
    moved = triton_low_rank.move(_rows(qkv), _rows(low_rank), up.contiguous())
    q, k, v = _heads(moved, head_dim)
    bars = attention.backward(o_bar.contiguous(), q, k, v, o, lse, window, cu_seqlens)
    bars = bars.flatten(2)
    low_rank_bar = torch.bmm(_parts(bars), up.mT).transpose(0, 1).reshape(low_rank.shape)
    return bars, low_rank_bar, torch.bmm(_parts(low_rank).mT, _parts(bars))


@_window_gradients.register_fake
def _(o_bar, qkv, low_rank, up, head_dim, window, cu_seqlens, o, lse):
    qkv_bar = qkv.new_empty(qkv.shape)
    return qkv_bar, low_rank.new_empty(low_rank.shape), torch.empty_like(up)


def _window_save(ctx, inputs, output):
    qkv, low_rank, up, ctx.head_dim, ctx.window, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, low_rank, up, cu_seqlens, o, lse)


def _window_autograd(ctx, o_bar, _):
    qkv, low_rank, up, cu_seqlens, o, lse = ctx.saved_tensors
    bars = _window_gradients(o_bar, qkv, low_rank, up, ctx.head_dim, ctx.window, cu_seqlens, o, lse)
    return *bars, None, None, None


_window.register_autograd(_window_autograd, setup_context=_window_save)


def window_branch(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_branch`."""
    return _window(qkv, low_rank, up.to(qkv.dtype), head_dim, window, cu_seqlens)[0]


@torch.library.custom_op("nirvana::window_attention", mutates_args=(), device_types="cuda")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    return attention.forward(q, k, v, window, cu_seqlens)


@_attention.register_fake
def _(q, k, v, window, cu_seqlens):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3].numel(), dtype=torch.float32)


@torch.library.custom_op(
    "nirvana::window_attention_gradients", mutates_args=(), device_types="cuda"
)
def _attention_gradients(
    o_bar: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return attention.backward(o_bar.contiguous(), q, k, v, o, lse, window, cu_seqlens)


@_attention_gradients.register_fake
def _(o_bar, q, k, v, o, lse, window, cu_seqlens):
    B, T, H, K = q.shape
    return q.new_empty(B, T, 3, H, K)


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.window, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, cu_seqlens, o, lse)


def _attention_autograd(ctx, o_bar, _):
    q, k, v, cu_seqlens, o, lse = ctx.saved_tensors
    bars = _attention_gradients(o_bar, q, k, v, o, lse, ctx.window, cu_seqlens)
    return *bars.unbind(2), None, None


_attention.register_autograd(_attention_autograd, setup_context=_attention_save)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    """See `nirvana.ops.window_attention`."""
    return _attention(q, k, v, window, cu_seqlens)[0]
