"""The convolutions of q, k and v, SiLU and the unit length of q and k, for CUDA tensors.

A program holds BLOCK tokens of one head: of q, k or v, one after the other over the grid. Tokens
are numbered through the batch, n = b T + t. What the convolution, four wide, reads at token t - j
is a token of the same row and sample, or, before the first one, of the state that was handed in.

With a the convolution, y = silu(a) and, for q and k, u = y r with r = (sum y^2 + eps)^-1/2:

    y_bar = r (u_bar - u sum(u u_bar))          a_bar = y_bar sigma(a) (1 + a (1 - sigma(a)))
    x_bar_t = sum_j weight[:, 3 - j] a_bar_{t + j}
    weight_bar[:, 3 - j] = sum_t a_bar_t x_{t - j}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.launch import blocks, launch

BLOCK, GRADIENT_BLOCK, GRADIENT_STEPS, TRANSPOSED_BLOCK = 32, 16, 32, 32
"""Tokens of a program, forward; of a step of the backward and its steps; of the transposed one."""
EPS = tl.constexpr(1e-6)


@triton.jit
def _tap(
    x, stride, state, segments, first, i, c, j: tl.constexpr, N, T, D3,
    HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What the convolution reads j tokens before n = first + i, `[BLOCK, K]`."""
    n = first + i
    t = n % T
    inside = (n < N) & (t >= j)
    if HAS_SEGMENTS:
        own = tl.load(segments + n, n < N, 0)
        inside = inside & (own == tl.load(segments + n - j, inside, -1))
    # Within a program 32 bits are enough, and half the arithmetic of 64.
    near = (i - j)[:, None] * stride + c[None, :]
    tap = tl.load(x + first.to(tl.int64) * stride + near, inside[:, None], 0.0).to(tl.float32)
    if HAS_STATE and j > 0:
        before = (n < N) & (t < j)
        if HAS_SEGMENTS:
            before = before & (own == 0)
        if tl.max(before.to(tl.int32)) > 0:
            old = ((n // T * D3)[:, None] + c[None, :]) * 3 + (3 + t - j)[:, None]
            tap += tl.load(state + old, before[:, None], 0.0).to(tl.float32)
    return tap


@triton.jit
def forward_kernel(
    x, stride, state, segments, weight, out, N, T, H,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    first, i = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    head = tl.program_id(1)
    c = head * K + tl.arange(0, K)
    a = tl.zeros((BLOCK, K), tl.float32)
    for j in tl.static_range(4):
        tap = _tap(
            x, stride, state, segments, first, i, c, j, N, T, 3 * H * K, HAS_STATE, HAS_SEGMENTS
        )
        a += tap * tl.load(weight + c * 4 + (3 - j))[None, :]
    y = a * tl.sigmoid(a)
    if head < 2 * H:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    out += ((head // H).to(tl.int64) * N + first) * (H * K) + head % H * K
    near = i[:, None] * (H * K) + tl.arange(0, K)[None, :]
    tl.store(out + near, y, (first + i < N)[:, None])


@triton.jit
def backward_kernel(
    x, stride, state, segments, weight, q_bar, k_bar, v_bar, a_bar, weight_bar, N, T, H,
    K: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    c = head * K + tl.arange(0, K)
    i, D3 = tl.arange(0, BLOCK), 3 * H * K
    out_bar = q_bar
    if head >= 2 * H:
        out_bar = v_bar
    elif head >= H:
        out_bar = k_bar
    w0 = tl.load(weight + c * 4 + 3)[None, :]
    w1 = tl.load(weight + c * 4 + 2)[None, :]
    w2 = tl.load(weight + c * 4 + 1)[None, :]
    w3 = tl.load(weight + c * 4)[None, :]
    sum0 = tl.zeros((BLOCK, K), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * BLOCK
        real = (first + i < N)[:, None]
        x0 = _tap(x, stride, state, segments, first, i, c, 0, N, T, D3, HAS_STATE, HAS_SEGMENTS)
        x1 = _tap(x, stride, state, segments, first, i, c, 1, N, T, D3, HAS_STATE, HAS_SEGMENTS)
        x2 = _tap(x, stride, state, segments, first, i, c, 2, N, T, D3, HAS_STATE, HAS_SEGMENTS)
        x3 = _tap(x, stride, state, segments, first, i, c, 3, N, T, D3, HAS_STATE, HAS_SEGMENTS)
        a = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
        sigma = tl.sigmoid(a)
        near = i[:, None] * (H * K) + tl.arange(0, K)[None, :]
        start = out_bar + first.to(tl.int64) * (H * K) + head % H * K
        bar = tl.load(start + near, real, 0.0).to(tl.float32)
        if head < 2 * H:
            y = a * sigma
            r = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
            u = y * r
            bar = r * (bar - u * tl.sum(u * bar, 1)[:, None])
        bar = bar * sigma * (1 + a * (1 - sigma))
        tl.store(a_bar + first.to(tl.int64) * D3 + i[:, None] * D3 + c[None, :], bar, real)
        sum0 += bar * x0
        sum1 += bar * x1
        sum2 += bar * x2
        sum3 += bar * x3
    part = weight_bar + tl.program_id(0) * (D3 * 4) + c * 4
    tl.store(part + 3, tl.sum(sum0, 0))
    tl.store(part + 2, tl.sum(sum1, 0))
    tl.store(part + 1, tl.sum(sum2, 0))
    tl.store(part, tl.sum(sum3, 0))


@triton.jit
def transposed_kernel(
    a_bar, segments, weight, x_bar, N, T, H,
    K: tl.constexpr, BLOCK: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    first, i = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    n = first + i
    c = tl.program_id(1) * K + tl.arange(0, K)
    start = first.to(tl.int64) * (3 * H * K)
    near = i[:, None] * (3 * H * K) + c[None, :]
    bar = tl.zeros((BLOCK, K), tl.float32)
    for j in tl.static_range(4):
        inside = (n < N) & (n % T + j < T)
        if HAS_SEGMENTS:
            own = tl.load(segments + n, n < N, 0)
            inside = inside & (own == tl.load(segments + n + j, inside, -1))
        later = a_bar + start + j * (3 * H * K) + near
        tap = tl.load(later, inside[:, None], 0.0).to(tl.float32)
        bar += tap * tl.load(weight + c * 4 + (3 - j))[None, :]
    tl.store(x_bar + start + near, bar, (n < N)[:, None])


def forward(
    x: Tensor, weight: Tensor, head_dim: int, state: Tensor | None, segments: Tensor | None
) -> Tensor:
    """q, k (of unit length) and v: `[3, B, T, H, K]`.

    Args:
        x: `[B, T, 3 H K]`, q, k and v side by side; rows may have gaps between them.
        weight: `[3 H K, 4]`, float32.
        head_dim: K, a power of two.
        state, segments: see `nirvana.ops.causal_conv`.
    """
    B, T, D3 = x.shape
    H = D3 // (3 * head_dim)
    out = torch.empty(3, B, T, H, head_dim, dtype=x.dtype, device=x.device)
    how = {"K": head_dim, **_borders(state, segments), "num_warps": 4}
    grid = (blocks(B * T, BLOCK), 3 * H)
    given = (*_inputs(x, state, segments, weight), out, B * T, T, H)
    launch(forward_kernel, grid, *given, BLOCK=BLOCK, **how)
    return out


def backward(
    bars: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    state: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x_bar `[B, T, 3 H K]` and weight_bar `[3 H K, 4]` in float32.

    Args:
        bars: gradients of q, k and v, each `[B, T, H, K]` without gaps; the others: see `forward`.
    """
    B, T, D3 = x.shape
    H = D3 // (3 * head_dim)
    a_bar = torch.empty(B, T, D3, dtype=x.dtype, device=x.device)
    parts = blocks(B * T, GRADIENT_BLOCK * GRADIENT_STEPS)
    weight_bar = torch.empty(parts, *weight.shape, dtype=torch.float32, device=x.device)
    x_bar = torch.empty_like(a_bar)
    how = {"K": head_dim, **_borders(state, segments), "num_warps": 4}
    sizes = (B * T, T, H)
    given = (*_inputs(x, state, segments, weight), *bars, a_bar, weight_bar, *sizes)
    steps = {"BLOCK": GRADIENT_BLOCK, "STEPS": GRADIENT_STEPS}
    launch(backward_kernel, (parts, 3 * H), *given, **steps, **how)
    del how["HAS_STATE"]
    grid = (blocks(B * T, TRANSPOSED_BLOCK), 3 * H)
    given = (a_bar, segments, weight, x_bar, *sizes)
    launch(transposed_kernel, grid, *given, BLOCK=TRANSPOSED_BLOCK, **how)
    return x_bar, weight_bar.sum(0)


def _inputs(
    x: Tensor, state: Tensor | None, segments: Tensor | None, weight: Tensor
) -> tuple[Tensor | int | None, ...]:
    return x, x.stride(1), None if state is None else state.contiguous(), segments, weight


def _borders(state: Tensor | None, segments: Tensor | None) -> dict[str, int]:
    assert segments is None or segments.is_contiguous()
    return {"HAS_STATE": state is not None, "HAS_SEGMENTS": segments is not None}
