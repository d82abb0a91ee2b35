"""Window attention of half-precision CUDA tensors, as operations that compile.

The window branch saves its inputs and output for its backward, but not q, k and v with their
low-rank terms. Attention that also reads sinks adds them to the softmax of the kernels within the
window: these take and give the logarithms of its sums.
"""

import torch
from torch import Tensor

from nirvana.ops.cuda import attention, sinks
from nirvana.ops.cuda.launch import FLEXIBLE_LAYOUT, even_rows
from nirvana.ops.cuda.low_rank import add


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
    q, k, v = _heads(add(even_rows(qkv), even_rows(low_rank), up.contiguous()), head_dim)
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
    q, k, v = _heads(add(even_rows(qkv), even_rows(low_rank), up.contiguous()), head_dim)
    grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = _heads(grads, head_dim)
    attention.backward(do.contiguous(), q, k, v, o, lse, window, cu_seqlens, parts)
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
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    attention.backward(do.contiguous(), q, k, v, o, lse, window, cu_seqlens, (dq, dk, dv))
    return dq, dk, dv


@_attention_gradients.register_fake
def _(do, q, k, v, o, lse, window, cu_seqlens):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _attention_save(ctx, inputs, output):
    q, k, v, ctx.window, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, cu_seqlens, o, lse)


def _attention_autograd(ctx, do, _):
    q, k, v, cu_seqlens, o, lse = ctx.saved_tensors
    grads = _attention_gradients(do, q, k, v, o, lse, ctx.window, cu_seqlens)
    return *grads, None, None


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
    return _attention(q, k, v, window, cu_seqlens)[0]


@torch.library.custom_op("nirvana::sink_attention", mutates_args=(), device_types="cuda")
def _sinks(
    q: Tensor,
    far: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    o, lse = attention.forward(q, k, v, window, cu_seqlens)
    sums = attention.sums_by_token(lse, q, cu_seqlens)
    sinks.add(o, sums, far, sink_k, sink_v, window, index)
    return o, lse


@_sinks.register_fake
def _(q, far, k, v, sink_k, sink_v, window, index, cu_seqlens):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3].numel(), dtype=torch.float32)


@torch.library.custom_op("nirvana::sink_attention_gradients", mutates_args=(), device_types="cuda")
def _sinks_gradients(
    do: Tensor,
    q: Tensor,
    far: Tensor,
    k: Tensor,
    v: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    o: Tensor,
    lse: Tensor,
    window: int,
    index: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, far, sink_k and sink_v."""
    do = do.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    attention.backward(do, q, k, v, o, lse, window, cu_seqlens, (dq, dk, dv))
    sums = attention.sums_by_token(lse, q, cu_seqlens)
    return dq, dk, dv, *sinks.backward(do, o, sums, far, sink_k, sink_v, window, index)


@_sinks_gradients.register_fake
def _(do, q, far, k, v, sink_k, sink_v, o, lse, window, index, cu_seqlens):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, far, sink_k, sink_v))


def _sinks_save(ctx, inputs, output):
    *tensors, ctx.window, index, cu_seqlens = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, index, cu_seqlens, o, lse)


def _sinks_autograd(ctx, do, _):
    *tensors, index, cu_seqlens, o, lse = ctx.saved_tensors
    dq, dk, dv, dfar, *dsinks = _sinks_gradients(
        do, *tensors, o, lse, ctx.window, index, cu_seqlens
    )
    return dq, dfar, dk, dv, *dsinks, None, None, None


_sinks.register_autograd(_sinks_autograd, setup_context=_sinks_save)


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
    """See `nirvana.ops.sink_attention`; the kernels read the borders from `cu_seqlens`, and
    `dispatch` lets through only calls without a mask."""
    index = index.expand(q.shape[:2])
    sink_k, sink_v = sink_k.to(q.dtype), sink_v.to(q.dtype)
    return _sinks(q, far, k, v, sink_k, sink_v, window, index, cu_seqlens)[0]
