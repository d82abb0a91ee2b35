"""SiLU where it is on and the unit length of q and k, for CUDA tensors: what remains of `conv`
without a convolution.

Shared heads of k and v come out once for each head of q that they serve. With y = silu(x) (or x)
and, for q and k, u = y r with r = (sum y^2 + eps)^-1/2:

    dy = r (du - u sum(u du))          dx = dy sigma(x) (1 + x (1 - sigma(x)))   (or dy)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.conv import EPS, shared_heads
from nirvana.ops.cuda.launch import blocks, launch

BLOCK, WARPS = 64, 4
"""Tokens of a program, which takes one head of x, and its warps."""


@triton.jit
def unit_kernel(
    x, stride, out, N, H, G, K: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    k = tl.arange(0, K)[None, :]
    head = tl.program_id(1)
    y = tl.load(x + n.to(tl.int64) * stride + head * K + k, n < N, 0.0).to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    if head < H + G:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    part, first, serves = 0, head, 1
    if head >= H + G:
        part, first, serves = 2, (head - H - G) * (H // G), H // G
    elif head >= H:
        part, first, serves = 1, (head - H) * (H // G), H // G
    at = out + (part * N + n).to(tl.int64) * (H * K) + first * K + k
    for i in range(serves):
        tl.store(at + i * K, y, n < N)


@triton.jit
def unit_gradient_kernel(
    x, stride, dq, dk, dv, dx, N, H, G,
    K: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    k = tl.arange(0, K)[None, :]
    head = tl.program_id(1)
    grad, first, serves = dq, head, 1
    if head >= H + G:
        grad, first, serves = dv, (head - H - G) * (H // G), H // G
    elif head >= H:
        grad, first, serves = dk, (head - H) * (H // G), H // G
    at = grad + n.to(tl.int64) * (H * K) + first * K + k
    dy = tl.zeros((BLOCK, K), tl.float32)
    for i in range(serves):
        dy += tl.load(at + i * K, n < N, 0.0).to(tl.float32)
    y = tl.load(x + n.to(tl.int64) * stride + head * K + k, n < N, 0.0).to(tl.float32)
    a = y
    if SILU:
        y = a * tl.sigmoid(a)
    if head < H + G:
        r = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        dy = r * (dy - y * (r * r * tl.sum(y * dy, 1)[:, None]))
    if SILU:
        sigma = tl.sigmoid(a)
        dy = dy * sigma * (1 + a * (1 - sigma))
    tl.store(dx + n.to(tl.int64) * ((H + 2 * G) * K) + head * K + k, dy, n < N)


def forward(x: Tensor, head_dim: int, num_heads: int, silu: bool) -> Tensor:
    """Scales q and k to unit length.

    Args:
        x: `[B, T, (H + 2 G) K]`, q, k and v side by side; tokens are one stride apart.
        head_dim: K, a power of two.
        num_heads: H, a multiple of G.
        silu: apply SiLU first.

    Returns:
        `[3, B, T, H, K]` in x's dtype; each head of k and v H / G times.
    """
    B, T, _ = x.shape
    H, G = num_heads, shared_heads(x, head_dim, num_heads)
    out = torch.empty(3, B, T, H, head_dim, dtype=x.dtype, device=x.device)
    constants = {"K": head_dim, "BLOCK": BLOCK, "SILU": silu, "num_warps": WARPS}
    grid = (blocks(B * T, BLOCK), H + 2 * G)
    launch(unit_kernel, grid, x, x.stride(1), out, B * T, H, G, **constants)
    return out


def backward(grads: tuple[Tensor, Tensor, Tensor], x: Tensor, head_dim: int, silu: bool) -> Tensor:
    """The gradient of `forward`.

    Args:
        grads: dq, dk and dv, each `[B, T, H, K]`, contiguous.
        x: as of `forward`, like the arguments that follow.
        head_dim: K.
        silu: as of `forward`.

    Returns:
        dx `[B, T, (H + 2 G) K]` in x's dtype.
    """
    B, T, _ = x.shape
    H = grads[0].shape[2]
    G = shared_heads(x, head_dim, H)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = {"K": head_dim, "BLOCK": BLOCK, "SILU": silu, "num_warps": WARPS}
    grid = (blocks(B * T, BLOCK), H + 2 * G)
    launch(unit_gradient_kernel, grid, x, x.stride(1), *grads, dx, B * T, H, G, **constants)
    return dx
