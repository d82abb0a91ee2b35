"""The sinks of window attention, for CUDA tensors: added to a softmax that was computed without
them.

With s_j the score of sink j, l the logarithm of the softmax's sum within the window and
l' = log(exp(l) + sum_j exp(s_j)):

    o' = exp(l - l') o + sum_j p_j v_j          p_j = exp(s_j - l')
    ds_j = p_j (do . v_j - do . o')             dfar = sum_j ds_j k_j
    dk_j = sum_t ds_j far_t                     dv_j = sum_t p_j do_t

A program takes the heads of q that one head of k and v serves, and a block of tokens no longer than
the window. A token reads sinks only if its sample began at least a window before it, so all that a
block reads belong to the sample of its first token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

BLOCK, CHANNELS = 64, 16
"""Tokens of a program at most, and the channels of a head for each of its warps."""


@triton.jit
def _places(index, first, t, T, window, NUM: tl.constexpr, PADDED: tl.constexpr):
    """Where the sinks of the block's sample lie among its sinks and new tokens, and which of them
    each token reads, `[tokens, PADDED]`."""
    j = tl.arange(0, PADDED)
    column = first - tl.load(index + first) + j  # among the new tokens; earlier ones are kept ones
    places = tl.where(column < 0, j, column + NUM)
    read = tl.load(index + t, t < T, 0)
    reads = (read[:, None] - j[None, :] >= window) & (j < NUM)[None, :] & (t < T)[:, None]
    return places, reads


@triton.jit
def _at(x, row, token, head, row_step, token_step, head_step, K: tl.constexpr):
    """Where tokens' numbers of one head lie, `[tokens, K]`; row is 64 bits wide."""
    tokens = row * row_step + token.to(tl.int64)[:, None] * token_step
    return x + tokens + head * head_step + tl.arange(0, K)[None, :]


@triton.jit
def add_kernel(
    o, sums, sums_row, sums_token, sums_head, far, far_row, far_token, far_head, sink_k, k_row,
    k_token, k_head, sink_v, v_row, v_token, v_head, index, index_row, T, window, scale,
    REPEATS: tl.constexpr, K: tl.constexpr, NUM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, shared, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, BLOCK)
    places, reads = _places(index + row * index_row, first, t, T, window, NUM, PADDED)  # type: ignore[reportGeneralTypeIssues]
    if tl.max(tl.max(reads.to(tl.int32), 1), 0) > 0:
        any_read = tl.max(reads.to(tl.int32), 0) > 0
        to_keys = _at(sink_k, row, places, shared, k_row, k_token, k_head, K)
        keys = tl.load(to_keys, any_read[:, None], 0.0)
        to_values = _at(sink_v, row, places, shared, v_row, v_token, v_head, K)
        values = tl.load(to_values, any_read[:, None], 0.0)
        real, width = (t < T)[:, None], tl.num_programs(1) * (REPEATS * K)
        for i in range(REPEATS):
            head = shared * REPEATS + i
            queries = tl.load(_at(far, row, t, head, far_row, far_token, far_head, K), real, 0.0)
            scores = tl.dot(queries, tl.trans(keys)) * scale
            scores = tl.where(reads, scores, float("-inf"))
            to_sum = sums + row * sums_row + head * sums_head + t * sums_token
            before = tl.load(to_sum, t < T, 0.0)
            top = tl.maximum(before, tl.max(scores, 1))
            weights = tl.exp(scores - top[:, None])
            kept = tl.exp(before - top)
            total = kept + tl.sum(weights, 1)
            weights = (weights / total[:, None]).to(values.dtype)
            to_o = _at(o, row, t, head, T * width, width, K, K)
            old = tl.load(to_o, real, 0.0).to(tl.float32)
            new = old * (kept / total)[:, None] + tl.dot(weights, values)
            tl.store(to_o, new, real)
            tl.store(to_sum, top + tl.log(total), t < T)


@triton.jit
def gradient_kernel(
    do, o, sums, sums_row, sums_token, sums_head, far, far_row, far_token, far_head, sink_k, k_row,
    k_token, k_head, sink_v, v_row, v_token, v_head, index, index_row, dfar, dk, dv, T, window,
    scale, REPEATS: tl.constexpr, K: tl.constexpr, NUM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, shared, row = tl.program_id(0) * BLOCK, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = first + tl.arange(0, BLOCK)
    places, reads = _places(index + row * index_row, first, t, T, window, NUM, PADDED)  # type: ignore[reportGeneralTypeIssues]
    real = (t < T)[:, None]
    any_read = tl.max(reads.to(tl.int32), 0) > 0
    width = tl.num_programs(1) * (REPEATS * K)
    if tl.max(any_read.to(tl.int32), 0) > 0:
        to_keys = _at(sink_k, row, places, shared, k_row, k_token, k_head, K)
        keys = tl.load(to_keys, any_read[:, None], 0.0)
        to_values = _at(sink_v, row, places, shared, v_row, v_token, v_head, K)
        values = tl.load(to_values, any_read[:, None], 0.0)
        dkeys = tl.zeros((PADDED, K), tl.float32)
        dvalues = tl.zeros((PADDED, K), tl.float32)
        for i in range(REPEATS):
            head = shared * REPEATS + i
            queries = tl.load(_at(far, row, t, head, far_row, far_token, far_head, K), real, 0.0)
            grad = tl.load(_at(do, row, t, head, T * width, width, K, K), real, 0.0)
            out = tl.load(_at(o, row, t, head, T * width, width, K, K), real, 0.0)
            sum_ = tl.load(sums + row * sums_row + head * sums_head + t * sums_token, t < T, 0.0)
            scores = tl.dot(queries, tl.trans(keys)) * scale
            weights = tl.where(reads, tl.exp(scores - sum_[:, None]), 0.0)
            inner = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            dscores = weights * (tl.dot(grad, tl.trans(values)) - inner[:, None]) * scale
            dscores = dscores.to(keys.dtype)
            to_dfar = _at(dfar, row, t, head, T * width, width, K, K)
            tl.store(to_dfar, tl.dot(dscores, keys), real)
            dkeys += tl.dot(tl.trans(dscores), queries)
            dvalues += tl.dot(tl.trans(weights.to(grad.dtype)), grad)
        step = tl.num_programs(1) * K
        to_dk = _at(dk, row, places, shared, (NUM + T) * step, step, K, K)
        tl.atomic_add(to_dk, dkeys, any_read[:, None])
        to_dv = _at(dv, row, places, shared, (NUM + T) * step, step, K, K)
        tl.atomic_add(to_dv, dvalues, any_read[:, None])
    else:
        for i in range(REPEATS):
            zeros = tl.zeros((BLOCK, K), tl.float32)
            to_dfar = _at(dfar, row, t, shared * REPEATS + i, T * width, width, K, K)
            tl.store(to_dfar, zeros, real)


def add(
    o: Tensor,
    sums: Tensor,
    far: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
) -> None:
    """Adds the sinks to a softmax, in place.

    Args:
        o: `[B, T, H, K]`, contiguous, within the window; receives the whole output.
        sums: `[B, T, H]`, float32, of any strides, the logarithms of its sums; receives the whole.
        far: `[B, T, H, K]`, see `nirvana.ops.sink_attention`, like the arguments that follow.
        sink_k: `[B, n + T, G, K]`.
        sink_v: `[B, n + T, G, K]`.
        window: at least `LEAST`.
        index: `[B, T]`.
    """
    given, constants, grid = _arguments(o, sums, far, sink_k, sink_v, window, index)
    T, scale = o.shape[1], o.shape[3] ** -0.5
    launch(add_kernel, grid, o, *given, T, window, scale, **constants)


def backward(
    do: Tensor,
    o: Tensor,
    sums: Tensor,
    far: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of far, sink_k and sink_v, in their shapes and dtypes.

    Args:
        do: `[B, T, H, K]`, contiguous, of the whole output.
        o: `[B, T, H, K]`, contiguous, of `add`, like the arguments that follow.
        sums: `[B, T, H]`.
        far: `[B, T, H, K]`.
        sink_k: `[B, n + T, G, K]`.
        sink_v: `[B, n + T, G, K]`.
        window: at least `LEAST`.
        index: `[B, T]`.
    """
    given, constants, grid = _arguments(o, sums, far, sink_k, sink_v, window, index)
    dfar = torch.empty(far.shape, dtype=far.dtype, device=far.device)
    dk, dv = far.new_zeros(2, *sink_k.shape, dtype=torch.float32).unbind(0)
    T, scale = o.shape[1], o.shape[3] ** -0.5
    launch(gradient_kernel, grid, do, o, *given, dfar, dk, dv, T, window, scale, **constants)
    return dfar, dk.to(sink_k.dtype, copy=True), dv.to(sink_v.dtype, copy=True)


def _arguments(
    o: Tensor,
    sums: Tensor,
    far: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    window: int,
    index: Tensor,
) -> tuple[list[Tensor | int], dict[str, int], tuple[int, int, int]]:
    B, T, H, K = o.shape
    num, G = sink_k.shape[1] - T, sink_k.shape[2]
    far, sink_k, sink_v = (x if x.stride(3) == 1 else x.contiguous() for x in (far, sink_k, sink_v))
    index = index if index.stride(1) == 1 else index.contiguous()
    given: list[Tensor | int] = []
    for x in (sums, far, sink_k, sink_v):
        given += [x, *x.stride()[:3]]
    block = min(BLOCK, padded(window + 1) // 2)  # the largest power of two within the window
    sizes = {"REPEATS": H // G, "K": K, "NUM": num, "PADDED": padded(num, LEAST), "BLOCK": block}
    return (
        [*given, index, index.stride(0)],
        sizes | {"num_warps": max(1, K // CHANNELS)},
        (blocks(T, block), G, B),
    )
