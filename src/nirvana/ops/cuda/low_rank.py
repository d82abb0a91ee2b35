"""q, k and v plus their low-rank terms in one pass, for half-precision CUDA tensors.

out[:, p] = x[:, p] + factors[:, p] up[p]       p = q, k, v;  x `[N, 3 D]`, factors `[N, 3 r]`
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

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


def add_low_rank(x: Tensor, factors: Tensor, up: Tensor) -> Tensor:
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
