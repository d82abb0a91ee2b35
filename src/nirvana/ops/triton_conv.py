"""The convolutions of q, k and v, SiLU and the unit length of q and k, for CUDA tensors.

A program walks along STEPS tokens of a few heads, all of q, of k or of v, and keeps what later
tokens want in registers, so that each number is read once. Tokens are numbered through the batch,
n = b T + t. Where a row or a sample begins, what was before counts as zero, or, at a row's first
sample, as the state that was handed in.

With a the convolution, four wide, y = silu(a) and, for q and k, u = y r with
r = (sum y^2 + eps)^-1/2:

    y_bar = r (u_bar - u sum(u u_bar))          a_bar = y_bar sigma(a) (1 + a (1 - sigma(a)))
    x_bar_t = sum_j weight[:, 3 - j] a_bar_{t + j}
    weight_bar[:, 3 - j] = sum_t a_bar_t x_{t - j}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.launch import blocks, launch

STEPS, GRADIENT_STEPS = 64, 128
"""Tokens that a program walks, forward and backward."""
CHANNELS = 512
"""Of a program, at most."""
EPS = tl.constexpr(1e-6)


@triton.jit
def _four(x, n, stride, c, N):
    """Rows n to n + 3 of x, zero where there are none: asked for together, before any is used."""
    at = x + n.to(tl.int64) * stride + c
    x0 = tl.load(at, (n >= 0) & (n < N), 0.0)
    x1 = tl.load(at + stride, (n >= -1) & (n < N - 1), 0.0)
    x2 = tl.load(at + 2 * stride, (n >= -2) & (n < N - 2), 0.0)
    x3 = tl.load(at + 3 * stride, (n >= -3) & (n < N - 3), 0.0)
    return x0, x1, x2, x3


@triton.jit
def _taps(
    x1, x2, x3, n, t, before, state, segments, c, N, T, D3,
    HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What the convolution at token n reads 1, 2 and 3 tokens before it; whether a sample starts
    there; and the token's segment, for the next call's `before`."""
    real = (n >= 0) & (n < N)
    starts, segment = t == 0, t * 0
    if HAS_SEGMENTS:
        segment = tl.load(segments + n, real, -1).to(tl.int32)
        starts = starts | (segment != before)
    kept = tl.where(starts, 0.0, 1.0)
    x1, x2, x3 = x1 * kept, x2 * kept, x3 * kept
    if HAS_STATE:  # noqa: SIM102  (the one is decided by the compiler)
        if real & (t == 0) & (segment == 0):
            old = state + (n // T).to(tl.int64) * D3 * 3 + c * 3
            x1 = tl.load(old + 2).to(tl.float32)
            x2 = tl.load(old + 1).to(tl.float32)
            x3 = tl.load(old).to(tl.float32)
    return x1, x2, x3, starts, segment


@triton.jit
def conv_kernel(
    x, stride, state, segments, weight, out, N, T, H,
    K: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    first, top, D3 = tl.program_id(0) * STEPS, tl.program_id(1) * HEADS, 3 * H * K
    inner = tl.arange(0, HEADS)[:, None] * K + tl.arange(0, K)[None, :]
    c = top * K + inner
    w0, w1 = tl.load(weight + c * 4 + 3), tl.load(weight + c * 4 + 2)
    w2, w3 = tl.load(weight + c * 4 + 1), tl.load(weight + c * 4)
    out += (top // H).to(tl.int64) * N * (H * K) + top % H * K
    x1 = tl.zeros((HEADS, K), tl.float32)
    x2, x3 = x1, x1
    t, segment = (first + 4 * T - 4) % T, first * 0
    for i in range(-1, STEPS // 4):
        n = first + i * 4
        ahead = _four(x, n, stride, c, N)
        for j in tl.static_range(4):
            x1, x2, x3, _, segment = _taps(
                x1, x2, x3, n, t, segment, state, segments, c, N, T, D3, HAS_STATE, HAS_SEGMENTS
            )
            x0 = ahead[j].to(tl.float32)
            a = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
            y = a * tl.sigmoid(a)
            if top < 2 * H:
                y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
            tl.store(out + n.to(tl.int64) * (H * K) + inner, y, (n >= first) & (n < N))
            x3, x2, x1 = x2, x1, x0
            n, t = n + 1, tl.where(t + 1 == T, 0, t + 1)


@triton.jit
def conv_gradient_kernel(
    x, stride, state, segments, weight, q_bar, k_bar, v_bar, x_bar, weight_bar, N, T, H,
    K: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    first, top = tl.program_id(0) * STEPS, tl.program_id(1) * HEADS
    end, D3 = first + STEPS, 3 * H * K
    inner = tl.arange(0, HEADS)[:, None] * K + tl.arange(0, K)[None, :]
    c = top * K + inner
    bar = q_bar
    if top >= 2 * H:
        bar = v_bar
    elif top >= H:
        bar = k_bar
    bar += top % H * K
    w0, w1 = tl.load(weight + c * 4 + 3), tl.load(weight + c * 4 + 2)
    w2, w3 = tl.load(weight + c * 4 + 1), tl.load(weight + c * 4)
    x1 = tl.zeros((HEADS, K), tl.float32)
    x2, x3 = x1, x1
    # Of the gradients of x at the three tokens before n, what is known so far; and whether n's
    # sample reaches back to them.
    g1 = tl.zeros((HEADS, K), tl.float32)
    g2, g3, sum0, sum1, sum2, sum3 = g1, g1, g1, g1, g1, g1
    near1 = tl.zeros((), tl.float32)
    near2, near3 = near1, near1
    t, segment = (first + 4 * T - 4) % T, first * 0
    for i in range(-1, STEPS // 4 + 1):  # four tokens to fill the taps, four to finish gradients
        n = first + i * 4
        ahead, bars = _four(x, n, stride, c, N), _four(bar, n, H * K, inner, N)
        for j in tl.static_range(4):
            x1, x2, x3, starts, segment = _taps(
                x1, x2, x3, n, t, segment, state, segments, c, N, T, D3, HAS_STATE, HAS_SEGMENTS
            )
            x0, y_bar = ahead[j].to(tl.float32), bars[j].to(tl.float32)
            a = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
            sigma = tl.sigmoid(a)
            if top < 2 * H:
                y = a * sigma
                r = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
                y_bar = r * (y_bar - y * (r * r * tl.sum(y * y_bar, 1)[:, None]))
            a_bar = y_bar * sigma * (1 + a * (1 - sigma))
            kept = tl.where(starts, 0.0, 1.0)
            near1, near2, near3 = near1 * kept, near2 * kept, near3 * kept
            g1 += a_bar * w1 * near1
            g2 += a_bar * w2 * near2
            g3 += a_bar * w3 * near3
            ready = n - 3
            ours = (ready >= first) & (ready < end) & (ready < N)
            tl.store(x_bar + ready.to(tl.int64) * D3 + c, g3, ours)
            own = a_bar * tl.where((n >= first) & (n < end), 1.0, 0.0)
            sum0 += own * x0
            sum1 += own * x1
            sum2 += own * x2
            sum3 += own * x3
            g3, g2, g1 = g2, g1, a_bar * w0
            near3, near2, near1 = near2, near1, near1 * 0 + 1
            x3, x2, x1 = x2, x1, x0
            n, t = n + 1, tl.where(t + 1 == T, 0, t + 1)
    part = weight_bar + tl.program_id(0) * (D3 * 4) + c * 4
    tl.store(part + 3, sum0)
    tl.store(part + 2, sum1)
    tl.store(part + 1, sum2)
    tl.store(part, sum3)


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
    how = _how(H, head_dim, state, segments)
    grid = (blocks(B * T, STEPS), 3 * H // how["HEADS"])
    given = (*_inputs(x, state, segments, weight), out, B * T, T, H)
    launch(conv_kernel, grid, *given, STEPS=STEPS, **how)
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
    parts = blocks(B * T, GRADIENT_STEPS)
    weight_bar = torch.empty(parts, *weight.shape, dtype=torch.float32, device=x.device)
    x_bar = torch.empty(B, T, D3, dtype=x.dtype, device=x.device)
    how = _how(H, head_dim, state, segments)
    grid = (parts, 3 * H // how["HEADS"])
    given = (*_inputs(x, state, segments, weight), *bars, x_bar, weight_bar, B * T, T, H)
    launch(conv_gradient_kernel, grid, *given, STEPS=GRADIENT_STEPS, **how)
    return x_bar, weight_bar.sum(0)


def _inputs(
    x: Tensor, state: Tensor | None, segments: Tensor | None, weight: Tensor
) -> tuple[Tensor | int | None, ...]:
    return x, x.stride(1), None if state is None else state.contiguous(), segments, weight


def _how(H: int, K: int, state: Tensor | None, segments: Tensor | None) -> dict[str, int]:
    """Constants of a launch; a program's heads divide H, so that they lie in one of q, k and v."""
    assert segments is None or segments.is_contiguous()
    heads = min(H & -H, max(1, CHANNELS // K))
    borders = {"HAS_STATE": state is not None, "HAS_SEGMENTS": segments is not None}
    return {"K": K, "HEADS": heads, "num_warps": 4, **borders}
