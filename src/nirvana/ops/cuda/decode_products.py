"""Products of a weight with one vector, or with those of a batch of texts, for CUDA tensors.

A product's cost is that of reading its weight once. For one vector what comes before the product (a
norm) and after it (SiLU, the residual sum, the blend) is part of its kernel. For a batch a large
product is cuBLAS's, and what comes before and after are kernels of their own: in the loop of a
product they keep its loads from running ahead, which costs three times the time of the product.

Vectors are rows of `[B, ...]`; a row may be a part of a longer one, with ones between its numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded
from nirvana.ops.cuda.swiglu import COLUMNS, swiglu_kernel

SMALL = 512
"""Columns of a weight up to which our kernel is faster with a batch than cuBLAS."""


@triton.jit
def _product(
    weight, x, norm, row, N, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """x times rows of weight `[N, K]`; x has unit root mean square and is scaled by norm, where
    there is one."""
    start = weight + row[:, None].to(tl.int64) * K
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
    y = tl.sum(sums, 1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + eps)
    return y


@triton.jit
def product_kernel(
    weight, x, norm, added, out, N, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    y = _product(weight, x, norm, row, N, eps, K, COLUMNS, HAS_NORM)
    if HAS_ADDED:
        y += tl.load(added + row, row < N, 0.0).to(tl.float32)
    tl.store(out + row, y, row < N)


@triton.jit
def _vectors(x, b, B, X, K: tl.constexpr, PADDED: tl.constexpr):
    """Vectors b of x `[B, K]`."""
    k = tl.arange(0, PADDED)
    at = x + b[:, None].to(tl.int64) * X + k[None, :]
    return tl.load(at, (b < B)[:, None] & (k < K)[None, :], 0.0)


@triton.jit
def _products(weight, v, row, N, K: tl.constexpr, PADDED: tl.constexpr):
    """Vectors v, one or at least 16, times rows of weight `[N, K]`."""
    k = tl.arange(0, PADDED)
    w = weight + row[:, None].to(tl.int64) * K + k[None, :]
    w = tl.load(w, (row < N)[:, None] & (k < K)[None, :], 0.0)
    if v.shape[0] == 1:
        y = tl.sum(w.to(tl.float32) * v.to(tl.float32), 1)[None, :]
    else:
        y = tl.dot(v.to(w.dtype), tl.trans(w), input_precision="ieee")
    return y


@triton.jit
def products_kernel(
    weight, x, out, N, B, X, OUT,
    K: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    y = _products(weight, _vectors(x, b, B, X, K, PADDED), row, N, K, PADDED)
    at = out + b[:, None].to(tl.int64) * OUT + row[None, :]
    tl.store(at, y, (b < B)[:, None] & (row < N)[None, :])


@triton.jit
def norm_kernel(x, norm, out, eps, K: tl.constexpr, COLUMNS: tl.constexpr):
    """One row of x `[B, K]`, of unit root mean square, scaled by norm."""
    at, k = tl.program_id(0).to(tl.int64) * K, tl.arange(0, COLUMNS)
    v = tl.load(x + at + k, k < K, 0.0).to(tl.float32)
    unit = v * tl.rsqrt(tl.sum(v * v, 0) / K + eps)
    tl.store(out + at + k, unit * tl.load(norm + k, k < K, 0.0).to(tl.float32), k < K)


@triton.jit
def swiglu_product_kernel(
    weight, x, norm, out, N, eps, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = _product(weight, x, norm, row, N, eps, K, COLUMNS, True)
    up = _product(weight + N.to(tl.int64) * K, x, norm, row, N, eps, K, COLUMNS, True)
    tl.store(out + row, gate * tl.sigmoid(gate) * up, row < N)


@triton.jit
def blend_kernel(
    weight, up, window, zeta, linear, gates, h, N, B, LINEAR,
    K: tl.constexpr, PADDED: tl.constexpr, LOW: tl.constexpr, PADDED_LOW: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, CONVEX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    real, text = (b < B)[:, None] & (row < N)[None, :], b[:, None].to(tl.int64)
    first = LOW if LOW else N
    z = _vectors(zeta, b, B, K, K, PADDED).to(tl.float32)
    z += _vectors(window + first, b, B, first + K, K, PADDED).to(tl.float32)
    y = _products(weight, z * tl.sigmoid(z), row, N, K, PADDED)
    if LOW:
        a = _products(up, _vectors(window, b, B, LOW + K, LOW, PADDED_LOW), row, N, LOW, PADDED_LOW)
    else:
        a = tl.load(window + text * (N + K) + row[None, :], real, 0.0).to(tl.float32)
    t = tl.load(gates + 2 * b, b < B, 0.0)[:, None]
    other = 1 - t if CONVEX else tl.load(gates + 2 * b + 1, b < B, 0.0)[:, None]
    part = tl.load(linear + text * LINEAR + row[None, :], real, 0.0).to(tl.float32)
    at = h + text * N + row[None, :]
    old = tl.load(at, real, 0.0).to(tl.float32)
    tl.store(at, old + t * (a + other * y) + other * part, real)


@triton.jit
def _gated(o, norm, gate, c, D, eps, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns c of o `[D]`, every head of unit root mean square, scaled and gated."""
    heads = tl.reshape(tl.load(o + c, c < D, 0.0), (COLUMNS // K, K))
    heads *= tl.rsqrt(tl.sum(heads * heads, 1) / K + eps)[:, None]
    g = tl.load(gate + c, c < D, 0.0).to(tl.float32)
    scale = tl.load(norm + c % K).to(tl.float32)
    return tl.reshape(heads, (COLUMNS,)) * scale * g * tl.sigmoid(g)


@triton.jit
def gated_product_kernel(
    weight, o, norm, gate, added, out, N, eps,
    D: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """Rows of weight `[N, D]` times o, every head of unit root mean square, scaled and gated."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = weight + row[:, None].to(tl.int64) * D
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, D, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        w = tl.load(start + c[None, :], (row < N)[:, None] & (c < D)[None, :], 0.0)
        v = _gated(o, norm, gate, c, D, eps, K, COLUMNS)
        sums += w.to(tl.float32) * v[None, :]
    y = tl.sum(sums, 1)
    if HAS_ADDED:
        y += tl.load(added + row, row < N, 0.0).to(tl.float32)
    tl.store(out + row, y, row < N)


@triton.jit
def gated_norm_kernel(o, norm, gate, out, D, X, eps, K: tl.constexpr, COLUMNS: tl.constexpr):
    c, b = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1).to(tl.int64)
    y = _gated(o + b * D, norm, gate + b * X, c, D, eps, K, COLUMNS)
    tl.store(out + b * D + c, y, c < D)


def product(
    weight: Tensor,
    x: Tensor,
    out: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
) -> None:
    """out = weight norm(x) + added, where norm and sum are optional.

    Args:
        weight: `[N, K]`.
        x: `[B, K]`.
        out: `[B, N]`, written.
        norm: `[K]`, the scale of an RMSNorm of x; None means none.
        eps: of that norm.
        added: `[B, N]`, may be `out`; None means zero.
    """
    (N, K), B = weight.shape, x.shape[0]
    if B > 1:
        _multiply(weight, x if norm is None else _normalised(x, norm, eps), out, added)
        return
    tile = _tile(N, K)
    flags = {"HAS_NORM": norm is not None, "HAS_ADDED": added is not None}
    given = (weight, x, norm, added, out, N, eps)
    launch(product_kernel, tile.grid(N), *given, K=K, **tile.constants(), **flags)


def swiglu(weight: Tensor, x: Tensor, norm: Tensor, eps: float, out: Tensor) -> None:
    """out = silu(gate) * up, for gate and up = weight norm(x).

    Args:
        weight: `[2 N, K]`.
        x: `[B, K]`.
        norm: `[K]`, the scale of the RMSNorm of x.
        eps: of that norm.
        out: `[B, N]`, written.
    """
    (B, N), K = out.shape, weight.shape[1]
    if B > 1:
        both = F.linear(_normalised(x, norm, eps), weight)
        launch(swiglu_kernel, (B, blocks(N, COLUMNS)), both, out, N, COLUMNS=COLUMNS)
        return
    tile = Tile(min(2048, padded(K)), 1, 4)
    given = (weight, x, norm, out, N, eps)
    launch(swiglu_product_kernel, tile.grid(N), *given, K=K, **tile.constants())


def blend(
    weight: Tensor,
    up: Tensor | None,
    window: Tensor,
    zeta: Tensor,
    linear: Tensor,
    gates: Tensor,
    h: Tensor,
    convex: bool,
) -> None:
    """h += the interpolation of a and b, with zeta = weight silu(the sum of both its terms).

    Args:
        weight: `[D, Z]`.
        up: `[D, r]`, the last map of the window branch; None means that it has one map.
        window: `[B, r + Z]` or `[B, D + Z]`: a before `up`, or a; and its term of zeta.
        zeta: `[B, Z]`, the other term.
        linear: `[B, D]`, b.
        gates: `[B, 2]`: t (convex), or t and t'.
        h: `[B, D]`, the residual stream, updated in place.
        convex: whether the interpolation is convex.
    """
    (N, K), B = weight.shape, zeta.shape[0]
    low = 0 if up is None else up.shape[1]
    rows, batch, grid = _small_tile(N, B)
    sizes = {
        "K": K,
        "PADDED": padded(K, LEAST),
        "LOW": low,
        "PADDED_LOW": padded(max(1, low), LEAST),
    }
    given = (weight, up, window, zeta, linear, gates, h, N, B, linear.stride(0))
    launch(blend_kernel, grid, *given, **sizes, ROWS=rows, BATCH=batch, CONVEX=convex, num_warps=8)


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
    if B > 1:
        columns = max(K, min(1024, padded(D)))
        x = out.new_empty(B, D)
        given = (o, norm, gate, x, D, gate.stride(0), eps)
        launch(gated_norm_kernel, (blocks(D, columns), B), *given, K=K, COLUMNS=columns)
        _multiply(weight, x, out, added)
        return
    tile = _tile(N, D)
    constants = tile.constants() | {"COLUMNS": max(K, tile.columns)}
    given = (weight, o, norm, gate, added, out, N, eps)
    flags = {"HAS_ADDED": added is not None}
    launch(gated_product_kernel, tile.grid(N), *given, D=D, K=K, **constants, **flags)


def _multiply(weight: Tensor, x: Tensor, out: Tensor, added: Tensor | None) -> None:
    """out = weight x + added, for the vectors of a batch."""
    (N, K), B = weight.shape, x.shape[0]
    if added is not None:
        torch.addmm(added, x, weight.T, out=out)
    elif K > SMALL:
        torch.mm(x, weight.T, out=out)
    else:
        rows, batch, grid = _small_tile(N, B)
        sizes = {"K": K, "PADDED": padded(K, LEAST), "ROWS": rows, "BATCH": batch}
        launch(products_kernel, grid, weight, x, out, N, B, x.stride(0), out.stride(0), **sizes)


def _normalised(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x `[B, K]`, contiguous, of unit root mean square, scaled by norm `[K]`."""
    out, (B, K) = torch.empty_like(x), x.shape
    launch(norm_kernel, (B,), x, norm, out, eps, K=K, COLUMNS=padded(K), num_warps=8)
    return out


def _small_tile(N: int, B: int) -> tuple[int, int, tuple[int, int]]:
    """Rows of a small weight and of a batch that a program takes, and the programs."""
    rows, batch = (8, 1) if B == 1 else (LEAST, min(64, padded(B, LEAST)))
    return rows, batch, (blocks(N, rows), blocks(B, batch))


@dataclass(frozen=True)
class Tile:
    """What a program of a product computes.

    Attributes:
        columns: of the weight, read at a time.
        rows: of the weight.
        warps: of the program.
    """

    columns: int
    rows: int
    warps: int

    def grid(self, N: int) -> tuple[int]:
        """The programs for N rows of the weight."""
        return (blocks(N, self.rows),)

    def constants(self) -> dict[str, int]:
        """The constants of a launch."""
        return {"COLUMNS": self.columns, "ROWS": self.rows, "num_warps": self.warps}


def _tile(N: int, K: int) -> Tile:
    """The tile of a product with one vector: the fastest of a few on an H200 for the sizes of the
    1.3b preset."""
    if K <= 512:
        return Tile(padded(K), 8, 4)
    if N <= 512:
        return Tile(min(2048, padded(K)), 1, 4)
    if K > 4096:
        return Tile(1024, 1, 2)
    return Tile(1024, 4 if N > 4096 else 2, 4)
