"""One token of each text of a batch through the window branch, for CUDA tensors.

Every text has its own number of tokens, `count`, before this one; its token's key and value go to
slot `count` modulo SLOTS of its ring buffers, those of the first SINKS tokens to the sinks, too. A
text reads a sink from there once it has left the window. SHARED = H / G heads of q have one head of
k and v: a program of the attention computes all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

KEYS = 64
"""Slots of the ring buffer that a program of the attention reads at a time."""
PROGRAMS = 528
"""Programs of the attention from which on each reads several times: four a multiprocessor."""
NEVER = tl.constexpr(-1e30)
"""The largest score of a program that has none."""
PARTS = 64
"""Programs whose results are combined at a time, over all heads that share a key."""


@triton.jit
def rotary_kernel(count, frequency, turns, END, factor, HALF: tl.constexpr):
    """Cosines and sines of a text's position, and of the one from which it sees its sinks."""
    b, far, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, HALF)
    position = tl.load(count + b)
    if far == 1:
        position = tl.minimum(position, END)
    angle = position.to(tl.float32) * tl.load(frequency + i)
    at = turns + (b * 2 + far) * 2 * HALF + i
    tl.store(at, tl.cos(angle) * factor)
    tl.store(at + HALF, tl.sin(angle) * factor)


@triton.jit
def _raised(
    x, factors, up, part, b, c, B, first, size, W, RANK, X, PADDED: tl.constexpr,
):  # fmt: skip
    """Columns c of q, k or v, of `size` columns, plus their low-rank term."""
    r = tl.arange(0, PADDED)
    tile = up + (part * RANK + r)[:, None] * W + c[None, :]
    tile = tl.load(tile, (r < RANK)[:, None] & (c < size)[None, :], 0.0)
    row, some = b[:, None].to(tl.int64), (b < B)[:, None]
    factor = factors + row * X + (part * RANK + r)[None, :]
    factor = tl.load(factor, some & (r < RANK)[None, :], 0.0)
    real = some & (c < size)[None, :]
    y = tl.dot(factor, tile, input_precision="ieee")
    return y + tl.load(x + row * X + (first + c)[None, :], real, 0.0).to(tl.float32)


@triton.jit
def _rotated(y, partner, turns, c, some, K: tl.constexpr):
    """Columns c, whose partners are half a head away, by the cosines and sines of rows `turns`."""
    HALF: tl.constexpr = K // 2
    at = turns + (c % HALF)[None, :]
    cos, sin = tl.load(at, some, 0.0), tl.load(at + HALF, some, 0.0)
    return y * cos + tl.where((c % K < HALF)[None, :], -partner, partner) * sin


@triton.jit
def low_rank_kernel(
    x, factors, up, q, far, keys, values, sinks, count, turns, B, SLOTS, D, RANK, X,
    K: tl.constexpr, SHARED: tl.constexpr, SINKS: tl.constexpr, ROTARY: tl.constexpr,
    PADDED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the low-rank terms and rotates; a text's key and value go to their places."""
    b = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    first, size, W = part * D, D, D
    if SHARED > 1:
        size = tl.where(part == 0, D, D // SHARED)
        first = tl.where(part == 0, 0, D + (part - 1) * size)
        W = D + 2 * (D // SHARED)
        up += first - part * RANK * W  # here the parts are columns, in `_raised` rows
    y = _raised(x, factors, up, part, b, c, B, first, size, W, RANK, X, PADDED)
    row, some = b[:, None].to(tl.int64), (b < B)[:, None]
    real = some & (c < size)[None, :]
    away = y
    if ROTARY and part < 2:
        other = c ^ (K // 2)
        partner = _raised(x, factors, up, part, b, other, B, first, size, W, RANK, X, PADDED)
        if SINKS:
            away = _rotated(y, partner, turns + (row * 2 + 1) * K, c, some, K)
        y = _rotated(y, partner, turns + row * 2 * K, c, some, K)
    read = tl.load(count + b, b < B, 0)
    place = (read % SLOTS)[:, None]
    ring = row * size * SLOTS + ((c // K)[None, :] * SLOTS + place) * K + (c % K)[None, :]
    if part == 0:
        tl.store(q + row * D + c[None, :], y, real)
        if ROTARY and SINKS > 0:
            tl.store(far + row * D + c[None, :], away, real)
    elif part == 1:
        tl.store(keys + ring, y, real)
    else:
        tl.store(values + ring, y, real)
    if SINKS and part > 0:
        at = (row * 2 * size + (part - 1) * size + c[None, :]) * SINKS + read[:, None]
        tl.store(sinks + at, y, real & (read < SINKS)[:, None])


@triton.jit
def _attended(query, k, v, seen, top, sums, y, scale):
    """The running softmax of some rows after further keys: largest score, sum and weighted sum."""
    score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    score = tl.where(seen[None, :], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    p, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
    sums = sums * shrink + tl.sum(p, 1)
    y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
    return higher, sums, y


@triton.jit
def attention_kernel(
    q, far, keys, values, sinks, count, o, most, total, done, out, SLOTS, WINDOW, SPLITS, scale,
    K: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, SINKS: tl.constexpr, PADDED_SINKS: tl.constexpr, PADDED: tl.constexpr,
    PADDED_SHARED: tl.constexpr,
):  # fmt: skip
    """The attention of the heads that share a key to some of their slots, by tensor cores: the
    first of ROWS rows are their queries, the others zeros. The first program of a head of k adds
    the sinks, and the last one to end combines what all of them found."""
    split, i = tl.program_id(1), tl.arange(0, K)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tl.arange(0, ROWS)
    some = (row < SHARED)[:, None]
    rows = (head * SHARED + row)[:, None] * K + i[None, :]
    if SHARED == 1:  # one row, broadcast: masked rows leave the results another layout
        query = tl.where(some, tl.load(q + head * K + i)[None, :], 0.0).to(q.dtype.element_ty)
    else:
        query = tl.load(q + rows, some, 0.0)
    read = tl.load(count + tl.program_id(2))
    length = tl.minimum(read + 1, SLOTS).to(tl.int32)
    first = split * (KEYS * TILES)
    top, sums = tl.full((ROWS,), NEVER, tl.float32), tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, K), tl.float32)
    if SINKS and split == 0:
        n = tl.arange(0, PADDED_SINKS)
        seen = n < tl.minimum(read + 1 - WINDOW, SINKS)
        G = tl.num_programs(0)
        at = tl.program_id(2).to(tl.int64) * 2 * G + tl.program_id(0)
        at = (at * K + i)[None, :] * SINKS + n[:, None]
        k = tl.load(sinks + at, seen[:, None], 0.0)
        v = tl.load(sinks + at + G * K * SINKS, seen[:, None], 0.0)
        away = tl.load(far + rows, some, 0.0)
        top, sums, y = _attended(away, k, v, seen, top, sums, y, scale)
    for start in range(first, tl.minimum(first + KEYS * TILES, length), KEYS):
        n = start + tl.arange(0, KEYS)
        near = (head * SLOTS + n)[:, None] * K + i[None, :]
        k = tl.load(keys + near, (n < length)[:, None], 0.0)
        v = tl.load(values + near, (n < length)[:, None], 0.0)
        top, sums, y = _attended(query, k, v, n < length, top, sums, y, scale)
    at = (head * SPLITS + split) * SHARED
    tl.store(most + at + row, top, row < SHARED)
    tl.store(total + at + row, sums, row < SHARED)
    tl.store(o + at * K + row[:, None] * K + i[None, :], y, some)
    tl.debug_barrier()
    if tl.atomic_add(done + head, 1) == SPLITS - 1:
        h = tl.full((), 0, tl.int32) if SHARED == 1 else tl.arange(0, PADDED_SHARED)
        to = out + tl.expand_dims(head * SHARED + h, -1) * K + i
        result = _combined(o, most, total, head, h, SPLITS, SHARED, K, PADDED)
        tl.store(to, result, tl.expand_dims(h < SHARED, -1))
        tl.store(done + head, 0)


@triton.jit
def _combined(
    o, most, total, head, h, SPLITS, SHARED: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The attention of heads h, `[heads, K]`, or `[K]` of one, from that of their programs."""
    s, i = tl.arange(0, PADDED), tl.arange(0, K)
    if SHARED > 1:
        s = s[:, None]
    largest = tl.full(h.shape, NEVER, tl.float32)
    for first in range(0, SPLITS, PADDED):
        here = most + head * SPLITS * SHARED + (first + s) * SHARED + h
        here = tl.load(here, (first + s < SPLITS) & (h < SHARED), NEVER)
        largest = tl.maximum(largest, tl.max(here, 0))
    length = tl.zeros(h.shape, tl.float32)
    sums = tl.expand_dims(length, -1) + tl.zeros((K,), tl.float32)
    for first in range(0, SPLITS, PADDED):
        at = (head * SPLITS + first + s) * SHARED + h
        real = (first + s < SPLITS) & (h < SHARED)
        share = tl.exp(tl.load(most + at, real, NEVER) - largest)
        length += tl.sum(share * tl.load(total + at, real, 0.0), 0)
        parts = tl.load(o + tl.expand_dims(at, -1) * K + i, tl.expand_dims(real, -1), 0.0)
        sums += tl.sum(tl.expand_dims(share, -1) * parts, 0)
    return sums / tl.expand_dims(length, -1)


def rotary(count: Tensor, frequency: Tensor, factor: float, turns: Tensor, end: int | None) -> None:
    """Cosines and sines of the texts' positions, the same for all layers.

    Args:
        count: `[B]`, int64, tokens of each text read before this one.
        frequency: `[K / 2]`, float32.
        factor: of cosines and sines.
        turns: `[B, 2, 2, K / 2]`, float32, written: cosines and sines at the position, and at most
            at position `end`.
        end: from which far sinks are seen; None leaves the second half of `turns` as it is.
    """
    half = frequency.numel()
    grid, far = (count.numel(), 1 if end is None else 2), end or 0
    launch(rotary_kernel, grid, count, frequency, turns, far, factor, HALF=half, num_warps=1)


def window(
    x: Tensor,
    factors: Tensor,
    up: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    count: Tensor,
    turns: Tensor | None,
    size: int | None,
    scratch: dict[str, Tensor],
    out: Tensor,
) -> None:
    """out = the window branch for one token, before its output projection.

    The token's key and value are written to slot `count` modulo the number of slots, and to the
    sinks, if it is one.

    Args:
        x: `[B, X]`, the output of in_proj; q k v are read.
        factors: `[B, 3 r]`, the low-rank factors of q, k and v, within the rows of x.
        up: `[3, r, D]`, or `[r, (H + 2 G) K]` where G is not H.
        keys: `[B, G, slots, K]`, a ring buffer.
        values: `[B, G, slots, K]`, a ring buffer.
        sinks: `[B, 2 G K, n]`; None means none.
        count: `[B]`, int64, tokens of each text read before this one.
        turns: of `rotary`; None means no positions.
        size: W, the window; None means all tokens.
        scratch: of `window_scratch`, overwritten.
        out: `[B, H K]`, written.
    """
    B, G, slots, K = keys.shape
    D, rank = out.shape[1], up.shape[-2]
    shared, n = D // (G * K), 0 if sinks is None else sinks.shape[2]
    rows, tiles = min(64, padded(B, LEAST)), _tiles(B * G, slots)
    q, far = scratch["q"], None
    if n:
        far = q if turns is None else scratch["far"]
    sizes = {"K": K, "PADDED": padded(rank, LEAST), "COLUMNS": 64, "ROWS": rows}
    flags = {"SHARED": shared, "SINKS": n}
    given = (x, factors, up, q, far, keys, values, sinks, count, turns, B, slots, D, rank)
    grid = (blocks(D, 64), 3, blocks(B, rows))
    rotated = turns is not None
    launch(low_rank_kernel, grid, *given, x.stride(0), **sizes, **flags, ROTARY=rotated)
    splits, heads = blocks(slots, KEYS * tiles), padded(shared)
    parts = (scratch[name] for name in ("o", "most", "total", "done"))
    given = (q, far, keys, values, sinks, count, *parts, out, slots, size if n else None, splits)
    sizes = {"K": K, "KEYS": KEYS, "TILES": tiles, "ROWS": padded(shared, LEAST)}
    sizes |= {"PADDED": min(max(1, PARTS // heads), padded(splits)), "PADDED_SHARED": heads}
    sizes["PADDED_SINKS"] = padded(max(1, n), LEAST)
    # Of several reads in turn, one ahead is enough: more programs then fit a multiprocessor.
    stages = {"num_stages": 2 if tiles > 1 else 3}
    launch(attention_kernel, (G, splits, B), *given, K**-0.5, **sizes, **flags, **stages)


def _tiles(heads: int, slots: int) -> int:
    """Tiles of `KEYS` keys that a program of the attention reads, for heads in all texts."""
    return max(1, min(blocks(slots, KEYS), heads * blocks(slots, KEYS) // PROGRAMS))


def window_scratch(keys: Tensor, num_heads: int) -> dict[str, Tensor]:
    """Allocates the scratch memory of `window`, for keys `[B, G, slots, K]` and H heads of q."""
    B, G, slots, K = keys.shape
    parts = B * num_heads * blocks(slots, KEYS * _tiles(B * G, slots))
    o, most, total = (keys.new_empty(parts * n, dtype=torch.float32) for n in (K, 1, 1))
    done = keys.new_zeros(B * G, dtype=torch.int32)
    q, far = keys.new_empty(2, B, num_heads * K)
    return {"q": q, "far": far, "o": o, "most": most, "total": total, "done": done}
