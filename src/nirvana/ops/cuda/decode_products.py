"""Products of a weight with one vector, or with those of a batch of texts, for CUDA tensors.

A product's cost is that of reading its weight once, so what comes before it (a norm) and after it
(SiLU, the residual sum, the blend) is part of its kernel. One vector is multiplied by sums in
float32; a batch, in blocks of 16 to 64 rows, by tensor cores.

Vectors are rows of `[B, ...]`; a row may be a part of a longer one, with ones between its numbers.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

MOST = 64
"""Rows of a batch that a program multiplies with; a larger batch reads the weights again."""


@triton.jit
def _products(
    weight, x, norm, row, b, N, B, X, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """x of each text times rows of weight `[N, K]`: `[BATCH, rows]`; x has unit root mean square
    and is scaled by norm, where there is one."""
    start = weight + row[:, None].to(tl.int64) * K
    if BATCH == 1:
        x += tl.sum(b, 0).to(tl.int64) * X
        sums = tl.zeros((row.shape[0], COLUMNS), tl.float32)
        squares = tl.zeros((COLUMNS,), tl.float32)
        for first in tl.static_range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            w = tl.load(start + k[None, :], (row < N)[:, None] & (k < K)[None, :], 0.0)
            v = tl.load(x + k, k < K, 0.0).to(tl.float32)
            if HAS_NORM:
                squares += v * v
                v *= tl.load(norm + k, k < K, 0.0).to(tl.float32)
            sums += w.to(tl.float32) * v[None, :]
        y = tl.sum(sums, 1)[None, :]
        if HAS_NORM:
            y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    else:
        y = tl.zeros((BATCH, row.shape[0]), tl.float32)
        total = tl.zeros((BATCH,), tl.float32)
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            w = tl.load(start + k[None, :], (row < N)[:, None] & (k < K)[None, :], 0.0)
            at = x + b[:, None].to(tl.int64) * X + k[None, :]
            v = tl.load(at, (b < B)[:, None] & (k < K)[None, :], 0.0)
            if HAS_NORM:
                precise = v.to(tl.float32)
                total += tl.sum(precise * precise, 1)
                v = precise * tl.load(norm + k, k < K, 0.0).to(tl.float32)[None, :]
            y = tl.dot(v.to(w.dtype), tl.trans(w), y, input_precision="ieee")
        if HAS_NORM:
            y *= tl.rsqrt(total / K + eps)[:, None]
    return y


@triton.jit
def product_kernel(
    weight, x, norm, added, out, N, B, X, ADDED, OUT, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ADDED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    y = _products(weight, x, norm, row, b, N, B, X, eps, K, COLUMNS, BATCH, HAS_NORM)
    real = (b < B)[:, None] & (row < N)[None, :]
    b = b[:, None].to(tl.int64)
    if SILU:
        y *= tl.sigmoid(y)
    if HAS_ADDED:
        y += tl.load(added + b * ADDED + row[None, :], real, 0.0).to(tl.float32)
    tl.store(out + b * OUT + row[None, :], y, real)


@triton.jit
def swiglu_kernel(
    weight, x, norm, out, N, B, X, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    gate = _products(weight, x, norm, row, b, N, B, X, eps, K, COLUMNS, BATCH, True)
    weight += N.to(tl.int64) * K
    up = _products(weight, x, norm, row, b, N, B, X, eps, K, COLUMNS, BATCH, True)
    real = (b < B)[:, None] & (row < N)[None, :]
    at = out + b[:, None].to(tl.int64) * N + row[None, :]
    tl.store(at, gate * tl.sigmoid(gate) * up, real)


@triton.jit
def blend_kernel(
    weight, x, together, gates, h, N, B, TOGETHER,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
    CONVEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    zeta = _products(weight, x, x, row, b, N, B, K, 0.0, K, COLUMNS, BATCH, False)
    real = (b < B)[:, None] & (row < N)[None, :]
    t = tl.load(gates + 2 * b, b < B, 0.0)[:, None]
    other = 1 - t if CONVEX else tl.load(gates + 2 * b + 1, b < B, 0.0)[:, None]
    at = together + b[:, None].to(tl.int64) * TOGETHER + row[None, :]
    linear = tl.load(at, real, 0.0).to(tl.float32)
    window = tl.load(at + N, real, 0.0).to(tl.float32)
    at = h + b[:, None].to(tl.int64) * N + row[None, :]
    old = tl.load(at, real, 0.0).to(tl.float32)
    tl.store(at, old + t * (window + other * zeta) + other * linear, real)


@triton.jit
def _gated(
    o, norm, gate, b, c, real, eps, D, X, K: tl.constexpr, COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
):  # fmt: skip
    """Columns c of o `[B, D]`, every head of unit root mean square, scaled and gated."""
    row = b[:, None].to(tl.int64)
    heads = tl.load(o + row * D + c[None, :], real, 0.0)
    heads = tl.reshape(heads, (BATCH, COLUMNS // K, K))
    heads *= tl.rsqrt(tl.sum(heads * heads, 2) / K + eps)[:, :, None]
    g = tl.load(gate + row * X + c[None, :], real, 0.0).to(tl.float32)
    scale = tl.load(norm + c % K).to(tl.float32)
    return tl.reshape(heads, (BATCH, COLUMNS)) * scale[None, :] * g * tl.sigmoid(g)


@triton.jit
def gated_product_kernel(
    weight, o, norm, gate, added, out, N, B, X, ADDED, OUT, eps,
    D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BATCH: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """Rows of weight `[N, D]` times o, every head of unit root mean square, scaled and gated."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    start = weight + row[:, None].to(tl.int64) * D
    if BATCH == 1:
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            w = tl.load(start + c[None, :], (row < N)[:, None] & (c < D)[None, :], 0.0)
            real = (b < B)[:, None] & (c < D)[None, :]
            v = _gated(o, norm, gate, b, c, real, eps, D, X, K, COLUMNS, BATCH)
            sums += w.to(tl.float32) * v
        y = tl.sum(sums, 1)[None, :]
    else:
        y = tl.zeros((BATCH, ROWS), tl.float32)
        for first in range(0, D, COLUMNS):
            c = first + tl.arange(0, COLUMNS)
            w = tl.load(start + c[None, :], (row < N)[:, None] & (c < D)[None, :], 0.0)
            real = (b < B)[:, None] & (c < D)[None, :]
            v = _gated(o, norm, gate, b, c, real, eps, D, X, K, COLUMNS, BATCH)
            y = tl.dot(v.to(w.dtype), tl.trans(w), y, input_precision="ieee")
    real = (b < B)[:, None] & (row < N)[None, :]
    b = b[:, None].to(tl.int64)
    if HAS_ADDED:
        y += tl.load(added + b * ADDED + row[None, :], real, 0.0).to(tl.float32)
    tl.store(out + b * OUT + row[None, :], y, real)


def product(
    weight: Tensor,
    x: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    silu: bool = False,
) -> None:
    """out = silu(weight norm(x)) + added, where norm, SiLU and sum are optional.

    Args:
        weight: `[N, K]`.
        x: `[B, K]`.
        out: `[B, N]`, written.
        norm: `[K]`, the scale of an RMSNorm of x; None means none.
        eps: of that norm.
        added: `[B, N]`, may be `out`; None means zero.
        silu: whether to apply SiLU.
    """
    N, K = weight.shape
    B = x.shape[0]
    tile = _tile(N, K, B)
    flags = {"HAS_NORM": norm is not None, "HAS_ADDED": added is not None, "SILU": silu}
    strides = x.stride(0), 0 if added is None else added.stride(0), out.stride(0)
    given = (weight, x, norm, added, out, N, B, *strides, eps)
    launch(product_kernel, tile.grid(N, B), *given, K=K, **tile.constants(), **flags)


def swiglu(weight: Tensor, x: Tensor, norm: Tensor, eps: float, out: Tensor) -> None:
    """out = silu(gate) * up, for gate and up = weight norm(x).

    Args:
        weight: `[2 F, K]`.
        x: `[B, K]`.
        norm: `[K]`, the scale of the RMSNorm of x.
        eps: of that norm.
        out: `[B, F]`, written.
    """
    (B, N), K = out.shape, weight.shape[1]
    tile = Tile(min(2048, padded(K)), 1, 1, 4) if B == 1 else _tile(N, K, B)
    given = (weight, x, norm, out, N, B, x.stride(0), eps)
    launch(swiglu_kernel, tile.grid(N, B), *given, K=K, **tile.constants())


def blend(
    weight: Tensor, x: Tensor, together: Tensor, gates: Tensor, h: Tensor, convex: bool
) -> None:
    """h += the interpolation of both branches, with zeta = weight x.

    Args:
        weight: `[D, rank]`.
        x: `[B, rank]`.
        together: `[B, 2 D + C]`: b, a and h_task side by side.
        gates: `[B, 2]`: t (convex), or t and t'.
        h: `[B, D]`, the residual stream, updated in place.
        convex: whether the interpolation is convex.
    """
    N, K = weight.shape
    B = x.shape[0]
    tile = _tile(N, K, B)
    given = (weight, x, together, gates, h, N, B, together.stride(0))
    launch(blend_kernel, tile.grid(N, B), *given, K=K, CONVEX=convex, **tile.constants())


def gated_product(
    weight: Tensor,
    o: Tensor,
    norm: Tensor,
    gate: Tensor,
    eps: float,
    out: Tensor,
    added: Tensor | None = None,
) -> None:
    """out = weight (norm(o) silu(gate)) + added, with an RMSNorm of every head.

    Args:
        weight: `[N, D]`.
        o: `[B, D]`, float32.
        norm: `[K]`, the scale of the norm of a head.
        gate: `[B, D]`.
        eps: of that norm.
        out: `[B, N]`, written.
        added: `[B, N]`, may be `out`; None means zero.
    """
    (N, D), B, K = weight.shape, o.shape[0], norm.shape[0]
    tile = _tile(N, D, B)
    constants = tile.constants() | {"COLUMNS": max(K, tile.columns)}
    strides = gate.stride(0), 0 if added is None else added.stride(0), out.stride(0)
    given = (weight, o, norm, gate, added, out, N, B, *strides, eps)
    flags = {"HAS_ADDED": added is not None}
    launch(gated_product_kernel, tile.grid(N, B), *given, D=D, K=K, **constants, **flags)


@dataclass(frozen=True)
class Tile:
    """What a program of a product computes.

    Attributes:
        columns: of the weight, read at a time.
        rows: of the weight.
        batch: rows of the batch.
        warps: of the program.
        stages: tiles that are loaded ahead.
    """

    columns: int
    rows: int
    batch: int
    warps: int
    stages: int = 3

    def grid(self, N: int, B: int) -> tuple[int, int]:
        """The programs for N rows of the weight and B of the batch."""
        return blocks(N, self.rows), blocks(B, self.batch)

    def constants(self) -> dict[str, int]:
        """The constants of a launch."""
        sizes = {"COLUMNS": self.columns, "ROWS": self.rows, "BATCH": self.batch}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


def _tile(N: int, K: int, B: int) -> Tile:
    """The tile of a product; for one row the fastest of a few on an H200 for the sizes of the 1.3b
    preset."""
    if B > 1:
        batch = min(MOST, padded(B, LEAST))
        return Tile(min(128, padded(K, LEAST)), 32 if N > 4096 else LEAST, batch, 4, 4)
    if K <= 512:
        return Tile(padded(K), 8, 1, 4)
    if N <= 512:
        return Tile(min(2048, padded(K)), 1, 1, 4)
    if K > 4096:
        return Tile(1024, 1, 1, 2)
    return Tile(1024, 4 if N > 4096 else 2, 1, 4)
