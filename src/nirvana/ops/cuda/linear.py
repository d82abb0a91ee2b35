"""The linear branch of the Updater on half-precision CUDA tensors, as an operation that compiles.

It saves its inputs, the sums of the decays and the small inverses of the chunks for its backward,
and computes the convolved q, k and v again. The gated delta rule itself is fla-core's, or
flash-qla's where that is installed and takes the call; both take rows laid end to end, with
`cu_seqlens` between them, and as many heads of k and v as of q, so shared heads are repeated.
"""

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.chunked import last_inputs
from nirvana.ops.cuda import conv, unit
from nirvana.ops.cuda.launch import FLEXIBLE_LAYOUT, even_rows

HAS_FLASH_QLA = find_spec("flash_qla") is not None
CHUNK = 64
"""Tokens of a chunk in both libraries."""


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


def _mixed(
    qkv: Tensor,
    conv_weight: Tensor | None,
    head_dim: int,
    num_heads: int,
    conv_state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> Tensor:
    """The q, k and v of the delta rule, `[3, B, T, H, K]`."""
    if conv_weight is None:
        return unit.forward(qkv, head_dim, num_heads, silu)
    weight = conv_weight.contiguous()
    return conv.forward(qkv, weight, head_dim, num_heads, conv_state, segments, silu)


@torch.library.custom_op(
    "nirvana::linear_branch", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
def _linear(
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
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, last states (empty unless `final`), and for the backward the sums and inverses."""
    B, T, H = beta.shape
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    mixed = _mixed(even_rows(qkv), conv_weight, head_dim, H, conv_state, segments, silu)
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
    silu,
):
    B, T, H = beta.shape
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
    conv_weight: Tensor | None,
    beta: Tensor,
    head_dim: int,
    conv_state: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    sums: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, conv_weight (empty without one), log_alpha, beta, and state (empty without
    a state)."""
    B, T, H = beta.shape
    borders = _equal_rows(B, T, qkv.device) if cu_seqlens is None else cu_seqlens
    qkv = even_rows(qkv)
    mixed = _mixed(qkv, conv_weight, head_dim, H, conv_state, segments, silu)
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
    dq, dk, dv = (grad.view(B, T, H, head_dim) for grad in (dq, dk, dv))
    if conv_weight is None:
        dqkv, dweight = unit.backward((dq, dk, dv), qkv, head_dim, silu), sums.new_empty(0)
    else:
        weight = conv_weight.contiguous()
        dqkv, dweight = conv.backward(
            (dq, dk, dv), qkv, weight, head_dim, conv_state, segments, silu
        )
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
    silu,
    sums,
    inverse,
):
    dalpha, dbeta = (beta.new_empty(beta.shape, dtype=torch.float32) for _ in range(2))
    dweight = sums.new_empty((0,) if conv_weight is None else conv_weight.shape)
    dstate = sums.new_empty((0,) if state is None else state.shape)
    return qkv.new_empty(qkv.shape), dweight, dalpha, dbeta, dstate


def _linear_save(ctx, inputs, output):
    qkv, conv_weight, _, beta, ctx.head_dim, conv_state, state, *borders, final, ctx.silu = inputs
    _, last, sums, inverse = output
    ctx.final = final
    ctx.mark_non_differentiable(sums, inverse, *(() if final else (last,)))
    ctx.save_for_backward(qkv, conv_weight, beta, conv_state, state, *borders, sums, inverse)


def _linear_autograd(ctx, do, dlast, *_):
    qkv, conv_weight, beta, conv_state, state, segments, cu_seqlens, sums, inverse = (
        ctx.saved_tensors
    )
    dqkv, dweight, dalpha, dbeta, dstate = _linear_gradients(
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
        ctx.silu,
        sums,
        inverse,
    )
    dweight = None if conv_weight is None else dweight
    dstate = None if state is None else dstate
    return dqkv, dweight, dalpha, dbeta, None, None, dstate, None, None, None, None


_linear.register_autograd(_linear_autograd, setup_context=_linear_save)


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
    width = 1 if conv_weight is None else conv_weight.shape[1]
    recent = last_inputs(qkv, width, conv_state, segments) if final else None
    in_front = 0
    if width == 1:
        conv_state = None  # of no inputs
    elif conv_state is not None and conv_state.requires_grad and torch.is_grad_enabled():
        # The convolution's kernel has no gradient of its state. Here the state is tokens in front
        # of the row, which write nothing to the delta rule's state and keep it.
        in_front = width - 1
        qkv = torch.cat([conv_state.mT.to(qkv.dtype), qkv], dim=1)
        log_alpha, beta = (F.pad(x, (0, 0, in_front, 0)) for x in (log_alpha, beta))
        conv_state = None
    o, last, _, _ = _linear(
        qkv,
        None if conv_weight is None else conv_weight.float(),
        log_alpha.float(),
        beta.float(),
        head_dim,
        conv_state,
        None if state is None else state.float(),
        segments,
        cu_seqlens,
        final,
        silu,
    )
    return o[:, in_front:], recent, last if final else None
