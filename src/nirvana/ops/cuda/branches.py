"""The two branches of the Updater on half-precision CUDA tensors, as operations that compile.

Each saves little for its backward and recomputes the rest: the linear branch saves its inputs, the
sums of the decays and the small inverses of the chunks, but not the convolved q, k, v; the window
branch saves its inputs and output, but not q, k, v with their low-rank terms. The gated delta rule
itself is fla-core's, or flash-qla's where that is installed and takes the call; both take rows laid
end to end, with `cu_seqlens` between them.
"""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.chunked import last_inputs
from nirvana.ops.cuda import attention, conv
from nirvana.ops.cuda.low_rank import add_low_rank

HAS_FLASH_QLA = find_spec("flash_qla") is not None
FLEXIBLE_LAYOUT = (torch.Tag.flexible_layout,)
"""Tag of operations that take strided slices of a larger product, so that none is copied."""
CHUNK = 64
"""Tokens of a chunk in both libraries."""


def _rows(x: Tensor) -> Tensor:
    """x `[B, T, D]` itself if its tokens have one stride and are contiguous each; else a copy."""
    even = x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even or (x.shape[0] == 1 and x.stride(2) == 1) else x.contiguous()


# The linear branch.


@lru_cache(maxsize=64)
def _equal_rows(B: int, T: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of B rows of T tokens. One tensor for one shape: the libraries cache a tensor's
    lengths by its identity, and so copy them from the device only once."""
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
    """The gated delta rule of N tokens in rows laid end to end.

    Args:
        qkv: `[3, 1, N, H, K]`.
        log_alpha: `[1, N, H]`.
        beta: `[1, N, H]`.
        state: `[rows, H, K, K]`, or None.
        borders: `[documents + 1]`, where documents start and end.
        final: whether to return the last states.

    Returns:
        o `[1, N, H, K]`, sums of log_alpha within chunks, inverses of the chunks' matrices, and
        the last state of every document (None unless `final`).
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
    do: Tensor,
    dlast: Tensor | None,
    qkv: Tensor,
    beta: Tensor,
    sums: Tensor,
    inverse: Tensor,
    state: Tensor | None,
    borders: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, each `[1, N, H, K]`, of log_alpha and beta, `[1, N, H]`, and of the
    state (None without a state); `dlast` `[documents, H, K, K]` is that of the last states."""
    q, k, v = qkv.unbind(0)
    scale = q.shape[-1] ** -0.5
    if _flash_qla_fits(q):
        chunk = import_module("flash_qla.ops.gated_delta_rule.chunk")
        dq, dk, dv, dbeta, dalpha, dstate = chunk.chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, inverse, do, dlast, scale, state, borders
        )
    else:
        chunk = import_module("fla.ops.gated_delta_rule.chunk")
        places = import_module("fla.ops.utils.index").prepare_chunk_indices(borders, CHUNK)
        dq, dk, dv, dbeta, dalpha, dstate, *_ = chunk.chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, inverse, scale, state, do, dlast, False, borders, None, places
        )
    grads = (grad.to(q.dtype).contiguous() for grad in (dq, dk, dv))
    return *grads, dalpha.float(), dbeta.float(), dstate


def _row_documents(borders: Tensor, B: int, T: int) -> tuple[Tensor, Tensor]:
    """The numbers of the first and of the last document of each of B rows of T tokens, `[B]`."""
    rows = torch.arange(B + 1, dtype=torch.int32, device=borders.device) * T
    starts = torch.searchsorted(borders, rows)
    return starts[:-1], starts[1:] - 1


def _document_states(state: Tensor, borders: Tensor, segments: Tensor) -> Tensor:
    """The state before every document, `[documents, H, K, K]`: that of its row `[B, H, K, K]` where
    a row's first document goes on from it, else zero."""
    first, _ = _row_documents(borders, *segments.shape)
    states = state.new_zeros(len(borders) - 1, *state.shape[1:])
    return states.index_copy_(0, first, state * _continues(segments))


def _continues(segments: Tensor) -> Tensor:
    """Whether each row's first token goes on from the row's state, `[B, 1, 1, 1]`."""
    return (segments[:, :1, None, None] == 0).float()


@torch.library.custom_op(
    "nirvana::linear_branch", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
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
    """o, last states (empty unless `final`), and for the backward the sums and inverses."""
    B, T, D3 = qkv.shape
    H = D3 // (3 * head_dim)
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    qkv, conv_weight = _rows(qkv), conv_weight.contiguous()
    mixed = conv.forward(qkv, conv_weight, head_dim, conv_state, segments)
    rows = mixed.view(3, 1, B * T, H, head_dim)
    log_alpha, beta = (x.contiguous().view(1, B * T, H) for x in (log_alpha, beta))
    if state is not None and cu_seqlens is not None and segments is not None:
        state = _document_states(state, borders, segments)
    with torch.cuda.device_of(qkv):
        o, sums, inverse, last = _delta_forward(rows, log_alpha, beta, state, borders, final)
    if last is None:
        last = sums.new_empty(0)
    elif cu_seqlens is not None:  # one state per document: take that of each row's last document
        last = last[_row_documents(borders, B, T)[1]]
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
    "nirvana::linear_branch_gradients", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
def _linear_gradients(
    do: Tensor,
    dlast: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, conv_weight, log_alpha, beta, and state (empty without a state)."""
    B, T, D3 = qkv.shape
    H = D3 // (3 * head_dim)
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    qkv, conv_weight = _rows(qkv), conv_weight.contiguous()
    mixed = conv.forward(qkv, conv_weight, head_dim, conv_state, segments)
    if dlast is not None and cu_seqlens is not None:
        documents = dlast.new_zeros(len(borders) - 1, *dlast.shape[1:])
        dlast = documents.index_copy_(0, _row_documents(borders, B, T)[1], dlast)
    if state is not None and cu_seqlens is not None and segments is not None:
        state = _document_states(state, borders, segments)
    with torch.cuda.device_of(qkv):
        dq, dk, dv, dalpha, dbeta, dstate = _delta_backward(
            do.contiguous().view(1, B * T, H, head_dim),
            None if dlast is None else dlast.contiguous(),
            mixed.view(3, 1, B * T, H, head_dim),
            beta.contiguous().view(1, B * T, H),
            sums,
            inverse,
            state,
            borders,
        )
    dqkv, dweight = conv.backward((dq, dk, dv), qkv, conv_weight, head_dim, conv_state, segments)
    if dstate is None:
        dstate = sums.new_empty(0)
    elif cu_seqlens is not None and segments is not None:
        dstate = dstate[_row_documents(borders, B, T)[0]] * _continues(segments)
    dstate = dstate.float()
    return dqkv, dweight, dalpha.view(B, T, H), dbeta.view(B, T, H), dstate


@_linear_gradients.register_fake
def _(
    do,
    dlast,
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
    dalpha, dbeta = (beta.new_empty(beta.shape, dtype=torch.float32) for _ in range(2))
    dweight = conv_weight.new_empty(conv_weight.shape, dtype=torch.float32)
    dstate = sums.new_empty((0,) if state is None else state.shape)
    return qkv.new_empty(qkv.shape), dweight, dalpha, dbeta, dstate


def _linear_save(ctx, inputs, output):
    qkv, conv_weight, _, beta, ctx.head_dim, conv_state, state, segments, cu_seqlens, final = inputs
    _, last, sums, inverse = output
    ctx.final = final
    ctx.mark_non_differentiable(sums, inverse, *(() if final else (last,)))
    ctx.save_for_backward(
        qkv, conv_weight, beta, conv_state, state, segments, cu_seqlens, sums, inverse
    )


def _linear_autograd(ctx, do, dlast, *_):
    qkv, conv_weight, beta, conv_state, state, segments, cu_seqlens, sums, inverse = (
        ctx.saved_tensors
    )
    *grads, dstate = _linear_gradients(
        do,
        dlast if ctx.final else None,
        qkv,
        conv_weight,
        beta,
        ctx.head_dim,
        conv_state,
        state,
        segments,
        cu_seqlens,
        sums,
        inverse,
    )
    return *grads, None, None, None if state is None else dstate, None, None, None


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
    silu: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `nirvana.ops.linear_branch`; `dispatch` lets through only calls with SiLU."""
    width = conv_weight.shape[1]
    recent = last_inputs(qkv, width, conv_state, segments) if final else None
    in_front = 0
    if conv_state is not None and conv_state.requires_grad and torch.is_grad_enabled():
        # The convolution's kernel has no gradient of its state. Here the state is tokens in front
        # of the row, which write nothing to the delta rule's state and keep it.
        in_front = width - 1
        qkv = torch.cat([conv_state.mT.to(qkv.dtype), qkv], dim=1)
        log_alpha, beta = (F.pad(x, (0, 0, in_front, 0)) for x in (log_alpha, beta))
        conv_state = None
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
    return o[:, in_front:], recent, last if final else None


# The window branch.


def _parts(x: Tensor) -> Tensor:
    """`[B, T, 3 D]` as `[3, B T, D]`."""
    return x.flatten(0, 1).unflatten(-1, (3, -1)).transpose(0, 1)


def _heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, ...]:
    """`[B, T, 3 H K]` as three `[B, T, H, K]`."""
    return qkv.unflatten(-1, (3, -1, head_dim)).unbind(2)


@torch.library.custom_op(
    "nirvana::window_branch", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
def _window(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads(add_low_rank(_rows(qkv), _rows(low_rank), up.contiguous()), head_dim)
    return attention.forward(q, k, v, window, cu_seqlens)


@_window.register_fake
def _(qkv, low_rank, up, head_dim, window, cu_seqlens):
    B, T, D3 = qkv.shape
    o = qkv.new_empty(B, T, D3 // (3 * head_dim), head_dim)
    return o, qkv.new_empty(o.shape[:3].numel(), dtype=torch.float32)


@torch.library.custom_op(
    "nirvana::window_branch_gradients", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
def _window_gradients(
    do: Tensor,
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
    q, k, v = _heads(add_low_rank(_rows(qkv), _rows(low_rank), up.contiguous()), head_dim)
    grads = attention.backward(do.contiguous(), q, k, v, o, lse, window, cu_seqlens)
    grads = grads.flatten(2)
    dlow_rank = torch.bmm(_parts(grads), up.mT).transpose(0, 1).reshape(low_rank.shape)
    return grads, dlow_rank, torch.bmm(_parts(low_rank).mT, _parts(grads))


@_window_gradients.register_fake
def _(do, qkv, low_rank, up, head_dim, window, cu_seqlens, o, lse):
    dqkv = qkv.new_empty(qkv.shape)
    return dqkv, low_rank.new_empty(low_rank.shape), torch.empty_like(up)


def _window_save(ctx, inputs, output):
    qkv, low_rank, up, ctx.head_dim, ctx.window, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, low_rank, up, cu_seqlens, o, lse)


def _window_autograd(ctx, do, _):
    qkv, low_rank, up, cu_seqlens, o, lse = ctx.saved_tensors
    grads = _window_gradients(do, qkv, low_rank, up, ctx.head_dim, ctx.window, cu_seqlens, o, lse)
    return *grads, None, None, None


_window.register_autograd(_window_autograd, setup_context=_window_save)


def window_branch(
    qkv: Tensor,
    low_rank: Tensor,
    up: Tensor,
    head_dim: int,
    window: int | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_branch`; the kernels read the borders from `cu_seqlens`."""
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
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return attention.backward(do.contiguous(), q, k, v, o, lse, window, cu_seqlens)


@_attention_gradients.register_fake
def _(do, q, k, v, o, lse, window, cu_seqlens):
    B, T, H, K = q.shape
    return q.new_empty(B, T, 3, H, K)


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.window, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, cu_seqlens, o, lse)


def _attention_autograd(ctx, do, _):
    q, k, v, cu_seqlens, o, lse = ctx.saved_tensors
    grads = _attention_gradients(do, q, k, v, o, lse, ctx.window, cu_seqlens)
    return *grads.unbind(2), None, None


_attention.register_autograd(_attention_autograd, setup_context=_attention_save)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """See `nirvana.ops.window_attention`; the kernels read the borders from `cu_seqlens`."""
    past = k.shape[1] - q.shape[1]
    if past and torch.is_grad_enabled():
        # The gradient's kernels take one query for each key: zeros for those of the past.
        q = F.pad(q, (0, 0, 0, 0, past, 0))
        return _attention(q, k, v, window, cu_seqlens)[0][:, past:]
    return _attention(q, k, v, window, cu_seqlens)[0]
