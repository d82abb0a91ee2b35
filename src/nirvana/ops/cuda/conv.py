"""The convolutions of q, k and v, SiLU where it is on, and the unit length of q and k, for CUDA
tensors. Shared heads of k and v come out once for each head of q that they serve.

A program processes STEPS tokens of one row in order, for a few heads, all of q, of k or of v, and
keeps the inputs of later tokens in registers, so that each number is read once. Before the first
token of a sample the inputs are zero, or, at a row's first sample, the state that was passed in.

With a the convolution, four wide, y = silu(a) (or a) and, for q and k, u = y r with
r = (sum y^2 + eps)^-1/2:

    dy = r (du - u sum(u du))          da = dy sigma(a) (1 + a (1 - sigma(a)))   (or dy)
    dx_t = sum_j weight[:, 3 - j] da_{t + j}
    dweight[:, 3 - j] = sum_t da_t x_{t - j}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import blocks, launch

STEPS, GRADIENT_STEPS = 64, 128
"""Tokens of a program, forward and backward."""
WARPS, GRADIENT_WARPS = 4, 2
CHANNELS = 512
"""Channels of a program, at most."""
EPS = tl.constexpr(1e-6)


@triton.jit
def _four(x, t, stride, c, T):
    """Tokens t to t + 3 of the row x, zero beyond it: loaded together, before any is used."""
    at = x + t.to(tl.int64) * stride + c
    x0 = tl.load(at, t < T, 0.0)
    x1 = tl.load(at + stride, t + 1 < T, 0.0)
    x2 = tl.load(at + 2 * stride, t + 2 < T, 0.0)
    x3 = tl.load(at + 3 * stride, t + 3 < T, 0.0)
    return x0, x1, x2, x3


@triton.jit
def _four_summed(x, t, stride, c, T, count, K: tl.constexpr, REPEATS: tl.constexpr):
    """`_four` of a gradient, summed over the `count` heads of q that a head serves."""
    x0, x1, x2, x3 = _four(x, t, stride, c, T)  # type: ignore[reportGeneralTypeIssues]
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    if REPEATS > 1:
        for r in range(1, count):
            y0, y1, y2, y3 = _four(x, t, stride, c + r * K, T)
            x0, x1, x2, x3 = x0 + y0, x1 + y1, x2 + y2, x3 + y3
    return x0, x1, x2, x3


@triton.jit
def _segment(segments, t, T, HAS_SEGMENTS: tl.constexpr):
    """The sample of token t, -1 beyond the row."""
    if HAS_SEGMENTS:
        return tl.load(segments + t, (t >= 0) & (t < T), -1).to(tl.int32)
    return t * 0


@triton.jit
def _before(
    x, first, j: tl.constexpr, stride, state, segments, c, T,
    HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """The input of the convolution j tokens before the program's first one."""
    segment = _segment(segments, first, T, HAS_SEGMENTS)
    same = segment == _segment(segments, first - j, T, HAS_SEGMENTS)
    at = x + (first - j).to(tl.int64) * stride + c
    tap = tl.load(at, (first > 0) & same, 0.0).to(tl.float32)
    if HAS_STATE:
        tap += tl.load(state + c * 3 + (3 - j), (first == 0) & (segment == 0), 0.0).to(tl.float32)
    return tap


@triton.jit
def _start(
    x, first, stride, state, segments, c, T, HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr
):  # fmt: skip
    """The three taps before the program's first token, and that token's sample."""
    x1 = _before(x, first, 1, stride, state, segments, c, T, HAS_STATE, HAS_SEGMENTS)
    x2 = _before(x, first, 2, stride, state, segments, c, T, HAS_STATE, HAS_SEGMENTS)
    x3 = _before(x, first, 3, stride, state, segments, c, T, HAS_STATE, HAS_SEGMENTS)
    return x1, x2, x3, _segment(segments, first, T, HAS_SEGMENTS)


@triton.jit
def _weights(weight, c):
    """The weights of the token itself and of the three tokens before it."""
    w0, w1 = tl.load(weight + c * 4 + 3), tl.load(weight + c * 4 + 2)
    return w0, w1, tl.load(weight + c * 4 + 1), tl.load(weight + c * 4)


@triton.jit
def conv_kernel(
    x, stride, state, segments, weight, out, T, H, G,
    K: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * STEPS, tl.program_id(2).to(tl.int64)
    top = tl.program_id(1) * HEADS  # of the heads that come out, H of each of q, k and v
    inner = tl.arange(0, HEADS)[:, None] * K + tl.arange(0, K)[None, :]
    part = top // H
    serves = tl.where(part == 0, 1, H // G)
    read = tl.where(part == 0, 0, H + (part - 1) * G)
    read += (top % H + tl.arange(0, HEADS)) // serves
    c = read[:, None] * K + tl.arange(0, K)[None, :]
    x += row * T * stride
    if HAS_STATE:
        state += row * ((H + 2 * G) * K) * 3
    if HAS_SEGMENTS:
        segments += row * T
    out += (part * tl.num_programs(2) + row) * T * (H * K) + top % H * K
    w0, w1, w2, w3 = _weights(weight, c)  # type: ignore[reportGeneralTypeIssues]
    x1, x2, x3, before = _start(x, first, stride, state, segments, c, T, HAS_STATE, HAS_SEGMENTS)
    for i in range(STEPS // 4):
        t = first + i * 4
        ahead = _four(x, t, stride, c, T)
        for j in tl.static_range(4):
            if HAS_SEGMENTS:
                segment = _segment(segments, t, T, HAS_SEGMENTS)
                kept = tl.where(segment == before, 1.0, 0.0)
                x1, x2, x3, before = x1 * kept, x2 * kept, x3 * kept, segment
            x0 = ahead[j].to(tl.float32)
            y = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
            if SILU:
                y = y * tl.sigmoid(y)
            if top < 2 * H:
                y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
            tl.store(out + t.to(tl.int64) * (H * K) + inner, y, t < T)
            x3, x2, x1, t = x2, x1, x0, t + 1


@triton.jit
def conv_gradient_kernel(
    x, stride, state, segments, weight, dq, dk, dv, dx, dweight, T, H, G,
    K: tl.constexpr, HEADS: tl.constexpr, REPEATS: tl.constexpr, STEPS: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_SEGMENTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * STEPS, tl.program_id(2).to(tl.int64)
    top = tl.program_id(1) * HEADS  # of the heads of x
    end, D = first + STEPS, (H + 2 * G) * K
    channel = tl.arange(0, K)[None, :]
    c = (top + tl.arange(0, HEADS))[:, None] * K + channel
    x += row * T * stride
    dx += row * T * D
    if HAS_STATE:
        state += row * D * 3
    if HAS_SEGMENTS:
        segments += row * T
    grad, serves, own_top = dq, 1, top
    if top >= H + G:
        grad, serves, own_top = dv, REPEATS, top - H - G
    elif top >= H:
        grad, serves, own_top = dk, REPEATS, top - H
    grad += row * T * (H * K)
    inner = (own_top + tl.arange(0, HEADS))[:, None] * serves * K + channel
    w0, w1, w2, w3 = _weights(weight, c)  # type: ignore[reportGeneralTypeIssues]
    x1, x2, x3, before = _start(x, first, stride, state, segments, c, T, HAS_STATE, HAS_SEGMENTS)
    # g1..g3: the gradients of x at the three tokens before t, summed so far; near1..near3: 1 where
    # that token is of t's sample, else 0.
    g1 = tl.zeros((HEADS, K), tl.float32)
    g2, g3, sum0, sum1, sum2, sum3 = g1, g1, g1, g1, g1, g1
    near1 = tl.zeros((), tl.float32)
    near2, near3 = near1, near1
    for i in range(STEPS // 4 + 1):  # the last four finish the gradients of those before
        t = first + i * 4
        ahead = _four(x, t, stride, c, T)
        grads = _four_summed(grad, t, H * K, inner, T, serves, K, REPEATS)
        for j in tl.static_range(4):
            if HAS_SEGMENTS:
                segment = _segment(segments, t, T, HAS_SEGMENTS)
                kept = tl.where(segment == before, 1.0, 0.0)
                x1, x2, x3, before = x1 * kept, x2 * kept, x3 * kept, segment
                near1, near2, near3 = near1 * kept, near2 * kept, near3 * kept
            x0, da = ahead[j].to(tl.float32), grads[j]
            a = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
            sigma = tl.sigmoid(a)
            if top < H + G:
                y = a
                if SILU:
                    y = a * sigma
                r = tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
                da = r * (da - y * (r * r * tl.sum(y * da, 1)[:, None]))
            if SILU:
                da = da * sigma * (1 + a * (1 - sigma))
            if HAS_SEGMENTS:
                g1 += da * w1 * near1
                g2 += da * w2 * near2
                g3 += da * w3 * near3
            else:
                g1 += da * w1
                g2 += da * w2
                g3 += da * w3
            ready = t - 3
            ours = (ready >= first) & (ready < end) & (ready < T)
            tl.store(dx + ready.to(tl.int64) * D + c, g3, ours)
            own = da * tl.where(t < end, 1.0, 0.0)
            sum0 += own * x0
            sum1 += own * x1
            sum2 += own * x2
            sum3 += own * x3
            g3, g2, g1 = g2, g1, da * w0
            near3, near2, near1 = near2, near1, near1 * 0 + 1
            x3, x2, x1, t = x2, x1, x0, t + 1
    part = dweight + (row * tl.num_programs(0) + tl.program_id(0)) * (D * 4) + c * 4
    tl.store(part + 3, sum0)
    tl.store(part + 2, sum1)
    tl.store(part + 1, sum2)
    tl.store(part, sum3)


def forward(
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    num_heads: int,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> Tensor:
    """Convolves q, k and v, and scales q and k to unit length.

    Args:
        x: `[B, T, (H + 2 G) K]`, q, k and v side by side; rows may have gaps between them.
        weight: `[(H + 2 G) K, 4]`, float32.
        head_dim: K, a power of two.
        num_heads: H, a multiple of G.
        state: `[B, (H + 2 G) K, 3]`, see `nirvana.ops.causal_conv`.
        segments: `[B, T]`, contiguous, see `nirvana.ops`.
        silu: apply SiLU after the convolution.

    Returns:
        `[3, B, T, H, K]` in x's dtype; each head of k and v H / G times.
    """
    B, T, _ = x.shape
    H, G = num_heads, shared_heads(x, head_dim, num_heads)
    out = torch.empty(3, B, T, H, head_dim, dtype=x.dtype, device=x.device)
    constants = _constants(H, head_dim, state, segments, silu)
    grid = (blocks(T, STEPS), 3 * H // constants["HEADS"], B)
    given = (*_inputs(x, state, segments, weight), out, T, H, G)
    launch(conv_kernel, grid, *given, STEPS=STEPS, num_warps=WARPS, **constants)
    return out


def backward(
    grads: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
    head_dim: int,
    state: Tensor | None,
    segments: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `forward`.

    Args:
        grads: dq, dk and dv, each `[B, T, H, K]`, contiguous.
        x: as of `forward`, like the arguments that follow.
        weight: `[(H + 2 G) K, 4]`, float32.
        head_dim: K.
        state: `[B, (H + 2 G) K, 3]`, or None.
        segments: `[B, T]`, or None.
        silu: as of `forward`.

    Returns:
        dx `[B, T, (H + 2 G) K]` in x's dtype, and dweight `[(H + 2 G) K, 4]` in float32.
    """
    B, T, D = x.shape
    H = grads[0].shape[2]
    G = shared_heads(x, head_dim, H)
    parts = blocks(T, GRADIENT_STEPS)
    dweight = torch.empty(B * parts, *weight.shape, dtype=torch.float32, device=x.device)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    constants = _constants(G, head_dim, state, segments, silu)
    grid = (parts, (H + 2 * G) // constants["HEADS"], B)
    given = (*_inputs(x, state, segments, weight), *grads, dx, dweight, T, H, G)
    constants |= {"REPEATS": H // G, "STEPS": GRADIENT_STEPS, "num_warps": GRADIENT_WARPS}
    launch(conv_gradient_kernel, grid, *given, **constants)
    return dx, dweight.sum(0)


def shared_heads(x: Tensor, head_dim: int, num_heads: int) -> int:
    """G of q, k and v side by side, `[B, T, (H + 2 G) K]`."""
    return (x.shape[-1] // head_dim - num_heads) // 2


def _inputs(
    x: Tensor, state: Tensor | None, segments: Tensor | None, weight: Tensor
) -> tuple[Tensor | int | None, ...]:
    return x, x.stride(1), None if state is None else state.contiguous(), segments, weight


def _constants(
    heads: int, K: int, state: Tensor | None, segments: Tensor | None, silu: bool
) -> dict[str, int]:
    """Constants of a launch; HEADS divides `heads`, so that a program lies within q, k or v."""
    assert segments is None or segments.is_contiguous()
    heads = min(heads & -heads, max(1, CHANNELS // K))
    borders = {"HAS_STATE": state is not None, "HAS_SEGMENTS": segments is not None}
    return {"K": K, "HEADS": heads, "SILU": silu, **borders}
