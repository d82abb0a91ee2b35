"""q, k and v plus their low-rank terms in one pass, for half-precision CUDA tensors.

out[:, p] = x[:, p] + factors[:, p] up[p]       p = q, k, v;  x `[N, 3 D]`, factors `[N, 3 r]`
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import FLEXIBLE_LAYOUT, LEAST, blocks, even_rows, launch, padded

BLOCK, COLUMNS, WARPS = 128, 128, 8
"""Tokens and columns of a program, and its warps."""


@triton.jit
def low_rank_kernel(
    x, x_stride, factors, factors_stride, up, out, N, D, RANK,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.program_id(2)
    r = tl.arange(0, PADDED)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = n[:, None].to(tl.int64)
    real = (n < N)[:, None] & (c < D)[None, :]
    left = factors + rows * factors_stride + (p * RANK + r)[None, :]
    left = tl.load(left, (n < N)[:, None] & (r < RANK)[None, :], 0.0)
    right = up + (p * RANK + r)[:, None] * D + c[None, :]
    right = tl.load(right, (r < RANK)[:, None] & (c < D)[None, :], 0.0)
    sums = tl.dot(left, right)
    sums += tl.load(x + rows * x_stride + (p * D + c)[None, :], real, 0.0).to(tl.float32)
    tl.store(out + rows * (3 * D) + (p * D + c)[None, :], sums, real)


def add(x: Tensor, factors: Tensor, up: Tensor) -> Tensor:
    """Adds the low-rank terms.

    Args:
        x: `[B, T, 3 D]`; rows may have gaps between them.
        factors: `[B, T, 3 r]`; rows may have gaps between them.
        up: `[3, r, D]`, contiguous.

    Returns:
        `[B, T, 3 D]`, contiguous, in x's dtype.
    """
    B, T, _ = x.shape
    _, rank, D = up.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (blocks(B * T, BLOCK), blocks(D, COLUMNS), 3)
    sizes = {"BLOCK": BLOCK, "COLUMNS": COLUMNS, "PADDED": padded(rank, LEAST)}
    given = (x, x.stride(1), factors, factors.stride(1), up, out, B * T, D, rank)
    launch(low_rank_kernel, grid, *given, **sizes, num_warps=WARPS)
    return out


@torch.library.custom_op(
    "nirvana::add_low_rank", mutates_args=(), device_types="cuda", tags=FLEXIBLE_LAYOUT
)
def _add(x: Tensor, factors: Tensor, up: Tensor) -> Tensor:
    return add(even_rows(x), even_rows(factors), up.contiguous())


@_add.register_fake
def _(x, factors, up):
    return x.new_empty(x.shape)


def add_low_rank(
    qkv: Tensor, low_rank: Tensor, up: Tensor, head_dim: int, num_heads: int | None
) -> tuple[Tensor, ...]:
    """See `nirvana.ops.add_low_rank`; `dispatch` lets through only calls without gradients and with
    as many heads of k and v as of q."""
    return _add(qkv, low_rank, up.to(qkv.dtype)).unflatten(-1, (3, -1, head_dim)).unbind(2)
