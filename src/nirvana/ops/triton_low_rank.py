"""q, k and v moved by their low-rank terms in one pass, for half-precision CUDA tensors.

out[:, p] = x[:, p] + factors[:, p] up[p]       p = q, k, v;  x `[N, 3 D]`, factors `[N, 3 r]`
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.launch import LEAST, blocks, launch, padded

BLOCK, COLUMNS, WARPS = 128, 128, 8
"""Tokens and columns of a program, and its warps."""


@triton.jit
def move_kernel(
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
    moved = tl.dot(left, right)
    moved += tl.load(x + rows * x_stride + (p * D + c)[None, :], real, 0.0).to(tl.float32)
    tl.store(out + rows * (3 * D) + (p * D + c)[None, :], moved, real)


def move(x: Tensor, factors: Tensor, up: Tensor) -> Tensor:
    """`[B, T, 3 D]` for x `[B, T, 3 D]` and factors `[B, T, 3 r]`, whose rows may have gaps between
    them, and up `[3, r, D]` without gaps."""
    B, T, _ = x.shape
    _, rank, D = up.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (blocks(B * T, BLOCK), blocks(D, COLUMNS), 3)
    sizes = {"BLOCK": BLOCK, "COLUMNS": COLUMNS, "PADDED": padded(rank, LEAST)}
    given = (x, x.stride(1), factors, factors.stride(1), up, out, B * T, D, rank)
    launch(move_kernel, grid, *given, **sizes, num_warps=WARPS)
    return out
