"""One token of each text of a batch through a layer, for CUDA tensors.

The cost of a decoded token is that of reading the weights once, plus the launches of short kernels
in sequence. States are updated in place; a barrier separates the reads of a value by several lanes
from the write. The output of in_proj, a row of X numbers a text, has the layout of
`Updater.sections`: q k v | gate | beta | alpha | low rank of q k v | task. Every text has its own
number of tokens, `count`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.decode_products import gated_product
from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

UNIT_EPS = tl.constexpr(1e-6)
"""Epsilon of the unit length of q and k, and of the Trigger's normalisation."""
KEYS = 64
"""Slots of the ring buffer that a program of the attention reads at a time."""
PROGRAMS = 1056
"""Programs of the attention from which on each reads several times: eight a multiprocessor."""
NEVER = tl.constexpr(-1e30)
"""The largest score of a program that has none."""


@triton.jit
def mix_kernel(x, state, weight, mixed, H, X, K: tl.constexpr):
    """The convolution of one head of q, k or v, SiLU, unit length of q (over sqrt(K)) and k."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = head * K + tl.arange(0, K)
    x, state, mixed = x + b * X, state + b * 9 * H * K, mixed + b * 3 * H * K
    x0, x1 = tl.load(x + c), tl.load(state + c * 3 + 2)
    x2, x3 = tl.load(state + c * 3 + 1), tl.load(state + c * 3)
    a = x0.to(tl.float32) * tl.load(weight + c * 4 + 3).to(tl.float32)
    a += x1.to(tl.float32) * tl.load(weight + c * 4 + 2).to(tl.float32)
    a += x2.to(tl.float32) * tl.load(weight + c * 4 + 1).to(tl.float32)
    a += x3.to(tl.float32) * tl.load(weight + c * 4).to(tl.float32)
    y = a * tl.sigmoid(a)
    if head < 2 * H:
        y *= tl.rsqrt((tl.sum(y * y, 0) + UNIT_EPS) * tl.where(head < H, K, 1))
    tl.store(mixed + c, y)
    tl.debug_barrier()
    tl.store(state + c * 3, x2)
    tl.store(state + c * 3 + 1, x1)
    tl.store(state + c * 3 + 2, x0)


@triton.jit
def delta_kernel(
    x, mixed, A_log, dt_bias, state, o, H, X, K: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The gated delta rule for some columns of one head's state; columns are independent."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    x, mixed, o, state = x + b * X, mixed + b * 3 * H * K, o + b * H * K, state + b * H * K * K
    D, i, j = H * K, tl.arange(0, K), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = state + head * K * K + i[:, None] * K + j[None, :]
    S = tl.load(places)
    q, k = tl.load(mixed + head * K + i), tl.load(mixed + D + head * K + i)
    v = tl.load(mixed + 2 * D + head * K + j)
    beta = tl.sigmoid(tl.load(x + 4 * D + head).to(tl.float32))
    step = tl.load(x + 4 * D + H + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    # Softplus. For small exp(step), log(1 + exp(step)) loses digits and exp(step) is exact enough.
    small, middle = tl.exp(step), tl.log(1 + tl.exp(tl.minimum(step, 20.0)))
    step = tl.where(step > 20, step, tl.where(step < -10, small, middle))
    S *= tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    S += k[:, None] * (beta * (v - tl.sum(S * k[:, None], 0)))[None, :]
    tl.store(o + head * K + j, tl.sum(S * q[:, None], 0))
    tl.debug_barrier()
    tl.store(places, S)


@triton.jit
def low_rank_kernel(
    x, factors, up, q, keys, values, count, B, SLOTS, D, RANK, X,
    K: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the low-rank terms; a text's key and value go to their slot."""
    b = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part, r = tl.program_id(1), tl.arange(0, PADDED)
    tile = up + (part * RANK + r)[:, None] * D + c[None, :]
    tile = tl.load(tile, (r < RANK)[:, None] & (c < D)[None, :], 0.0)
    row, some = b[:, None].to(tl.int64), (b < B)[:, None]
    factor = factors + row * X + (part * RANK + r)[None, :]
    factor = tl.load(factor, some & (r < RANK)[None, :], 0.0)
    real = some & (c < D)[None, :]
    y = tl.dot(factor, tile, input_precision="ieee")
    y += tl.load(x + row * X + (part * D + c)[None, :], real, 0.0).to(tl.float32)
    place = (tl.load(count + b, b < B, 0) % SLOTS)[:, None]
    ring = row * D * SLOTS + ((c // K)[None, :] * SLOTS + place) * K + (c % K)[None, :]
    if part == 0:
        tl.store(q + row * D + c[None, :], y, real)
    elif part == 1:
        tl.store(keys + ring, y, real)
    else:
        tl.store(values + ring, y, real)


@triton.jit
def attention_kernel(
    q, keys, values, count, o, most, total, done, out, SLOTS, SPLITS, scale,
    K: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The attention of one head to some of its slots, by tensor cores: the first row of ROWS is the
    query, the others are zeros. The last of a head's programs combines what all of them found."""
    split, i = tl.program_id(1), tl.arange(0, K)
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    row = tl.arange(0, ROWS)
    query = tl.where((row == 0)[:, None], tl.load(q + head * K + i)[None, :], 0.0)
    query = query.to(keys.dtype.element_ty)
    length = tl.minimum(tl.load(count + tl.program_id(2)) + 1, SLOTS).to(tl.int32)
    first = split * (KEYS * TILES)
    top, sums = tl.full((ROWS,), NEVER, tl.float32), tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, K), tl.float32)
    for start in range(first, tl.minimum(first + KEYS * TILES, length), KEYS):
        n = start + tl.arange(0, KEYS)
        near = (head * SLOTS + n)[:, None] * K + i[None, :]
        k = tl.load(keys + near, (n < length)[:, None], 0.0)
        v = tl.load(values + near, (n < length)[:, None], 0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((n < length)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
        sums = sums * shrink + tl.sum(p, 1)
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        top = higher
    at = head * SPLITS + split
    tl.store(most + at + row, top, row == 0)
    tl.store(total + at + row, sums, row == 0)
    tl.store(o + at * K + row[:, None] * K + i[None, :], y, (row == 0)[:, None])
    tl.debug_barrier()
    if tl.atomic_add(done + head, 1) == SPLITS - 1:
        tl.store(out + head * K + i, _combined(o, most, total, head, SPLITS, K, PADDED))
        tl.store(done + head, 0)


@triton.jit
def _combined(o, most, total, head, SPLITS, K: tl.constexpr, PADDED: tl.constexpr):
    """A head's attention from that of its programs."""
    s, i = tl.arange(0, PADDED), tl.arange(0, K)
    largest = tl.full((), NEVER, tl.float32)
    for first in range(0, SPLITS, PADDED):
        at = first + s
        here = tl.load(most + head * SPLITS + at, at < SPLITS, NEVER)
        largest = tl.maximum(largest, tl.max(here, 0))
    length, sums = tl.zeros((), tl.float32), tl.zeros((K,), tl.float32)
    for first in range(0, SPLITS, PADDED):
        at = head * SPLITS + first + s
        real = first + s < SPLITS
        share = tl.exp(tl.load(most + at, real, NEVER) - largest)
        length += tl.sum(share * tl.load(total + at, real, 0.0), 0)
        parts = tl.load(o + at[:, None] * K + i[None, :], real[:, None], 0.0)
        sums += tl.sum(share[:, None] * parts, 0)
    return sums / length


@triton.jit
def project_kernel(
    task, bank, U, B, C, CR, X, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The bank times the task query and the task key of each text, which are rows."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c, i = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    at = (row // 2).to(tl.int64) * X + (row % 2) * C
    tile = bank + i[:, None] * CR + c[None, :]
    tile = tl.load(tile, (i < C)[:, None] & (c < CR)[None, :], 0.0)
    x = tl.load(task + at[:, None] + i[None, :], (row < 2 * B)[:, None] & (i < C)[None, :], 0.0)
    y = tl.dot(x.to(tile.dtype), tile, input_precision="ieee")
    place = row[:, None].to(tl.int64) * CR + c[None, :]
    tl.store(U + place, y, (row < 2 * B)[:, None] & (c < CR)[None, :])


@triton.jit
def _normalised(z, C, real):
    """n and s of z over its C real entries."""
    z = tl.where(real, z - tl.sum(tl.where(real, z, 0.0), 0) / C, 0.0)
    s = tl.sqrt(tl.sum(z * z, 0) / C + UNIT_EPS)
    return z / s, s


@triton.jit
def trigger_kernel(
    task, U, gain, bias, shift, fast, memory, rates, gate_weight, h_task, gates, C, R, X, H_TASK,
    PC: tl.constexpr, PR: tl.constexpr, START: tl.constexpr, EXACT: tl.constexpr,
    HAS_MEMORY: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    task, U, fast = task + b * X, U + b * 2 * C * R, fast + b * 4 * R
    h_task, gates = h_task + b * H_TASK, gates + b * 2
    if HAS_MEMORY:
        memory += b * 4 * R
    c, r = tl.arange(0, PC), tl.arange(0, PR)
    real, some = c < C, r < R
    cr = c[:, None] * R + r[None, :]
    both = real[:, None] & some[None, :]
    gain = tl.load(gain + cr, both, 0.0).to(tl.float32)
    bias = tl.load(bias + cr, both, 0.0).to(tl.float32)
    shift = tl.load(shift + cr, both, 0.0).to(tl.float32)
    U_q, U_k = tl.load(U + cr, both, 0.0), tl.load(U + C * R + cr, both, 0.0)
    q = tl.load(task + c, real, 0.0).to(tl.float32)
    k = tl.load(task + C + c, real, 0.0).to(tl.float32)
    v = tl.load(task + 2 * C + c, real, 0.0).to(tl.float32)
    if START:
        p_w = tl.where(some, 1.0, 0.0)
        p_g, p_b, p_s = p_w, p_w, p_w
    else:
        p_w, p_g = tl.load(fast + r, some, 0.0), tl.load(fast + R + r, some, 0.0)
        p_b, p_s = tl.load(fast + 2 * R + r, some, 0.0), tl.load(fast + 3 * R + r, some, 0.0)
    # The gradient at k: see `nirvana.ops.trigger_gradient`.
    scale = tl.sum(gain * p_g[None, :], 1)
    n, s = _normalised(tl.sum(U_k * p_w[None, :] + bias * p_b[None, :], 1), C, real)
    e = tl.where(real, scale * n + tl.sum(shift * p_s[None, :], 1) + k - v, 0.0)
    u = scale * e
    if EXACT:
        u = tl.where(real, u - tl.sum(u, 0) / C - n * (tl.sum(u * n, 0) / C), 0.0)
    dz = u / s
    g_w, g_g = tl.sum(U_k * dz[:, None], 0), tl.sum(gain * (e * n)[:, None], 0)
    g_b, g_s = tl.sum(bias * dz[:, None], 0), tl.sum(shift * e[:, None], 0)
    lr, decay = tl.load(rates), tl.load(rates + 1)
    if HAS_MEMORY:
        g_w += decay * tl.load(memory + r, some, 0.0)
        g_g += decay * tl.load(memory + R + r, some, 0.0)
        g_b += decay * tl.load(memory + 2 * R + r, some, 0.0)
        g_s += decay * tl.load(memory + 3 * R + r, some, 0.0)
    p_w, p_g, p_b, p_s = p_w - lr * g_w, p_g - lr * g_g, p_b - lr * g_b, p_s - lr * g_s
    n, _ = _normalised(tl.sum(U_q * p_w[None, :] + bias * p_b[None, :], 1), C, real)
    h = q + tl.sum(gain * p_g[None, :], 1) * n + tl.sum(shift * p_s[None, :], 1)
    tl.store(h_task + c, h, real)
    for g in tl.static_range(GATES):
        w = tl.load(gate_weight + g * C + c, real, 0.0).to(tl.float32)
        tl.store(gates + g, tl.sigmoid(tl.sum(w * h, 0)))
    tl.debug_barrier()
    tl.store(fast + r, p_w, some)
    tl.store(fast + R + r, p_g, some)
    tl.store(fast + 2 * R + r, p_b, some)
    tl.store(fast + 3 * R + r, p_s, some)
    if HAS_MEMORY:
        tl.store(memory + r, g_w, some)
        tl.store(memory + R + r, g_g, some)
        tl.store(memory + 2 * R + r, g_b, some)
        tl.store(memory + 3 * R + r, g_s, some)


def linear(
    x: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    scratch: tuple[Tensor, Tensor],
    out: Tensor,
    added: Tensor | None = None,
) -> None:
    """out = the linear branch for one token + added; updates both states in place.

    Args:
        x: `[B, X]`, the output of in_proj; q k v, gate, beta and alpha are read.
        conv_state: `[B, 3 D, 3]`, the last inputs of the convolution.
        conv_weight: `[3 D, 4]`.
        A_log: `[H]`.
        dt_bias: `[H]`.
        state: `[B, H, K, K]`, float32.
        norm: `[K]`, the scale of the norm of a head.
        eps: of that norm.
        weight: `[D, D]`, of the output projection.
        scratch: `[B, 3 D]` and `[B, D]`, float32, overwritten.
        out: `[B, D]`, written.
        added: `[B, D]`, may be `out`; None means zero.
    """
    B, H, K, _ = state.shape
    D, (mixed, o), X = H * K, scratch, x.stride(0)
    launch(mix_kernel, (3 * H, B), x, conv_state, conv_weight, mixed, H, X, K=K, num_warps=1)
    given, columns = (x, mixed, A_log, dt_bias, state, o, H, X), min(K, 32)
    launch(delta_kernel, (H, K // columns, B), *given, K=K, COLUMNS=columns, num_warps=4)
    gated_product(weight, o, norm, x[:, 3 * D :], eps, out, added)


def window(
    x: Tensor,
    factors: Tensor,
    up: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    scratch: dict[str, Tensor],
    out: Tensor,
) -> None:
    """out = the window branch for one token, before its output projection.

    The token's key and value are written to slot `count` modulo the number of slots.

    Args:
        x: `[B, X]`, the output of in_proj; q k v are read.
        factors: `[B, 3 r]`, the low-rank factors of q, k and v, within the rows of x.
        up: `[3, r, D]`.
        keys: `[B, H, slots, K]`, a ring buffer.
        values: `[B, H, slots, K]`, a ring buffer.
        count: `[B]`, int64, tokens of each text read before this one.
        scratch: of `window_scratch`, overwritten.
        out: `[B, D]`, written.
    """
    B, H, slots, K = keys.shape
    _, rank, D = up.shape
    rows, tiles = min(64, padded(B, LEAST)), _tiles(B * H, slots)
    sizes = {"K": K, "PADDED": padded(rank, LEAST), "COLUMNS": 64, "ROWS": rows}
    given = (x, factors, up, scratch["q"], keys, values, count, B, slots, D, rank, x.stride(0))
    launch(low_rank_kernel, (blocks(D, 64), 3, blocks(B, rows)), *given, **sizes)
    splits = blocks(slots, KEYS * tiles)
    parts = (scratch[name] for name in ("o", "most", "total", "done"))
    given = (scratch["q"], keys, values, count, *parts, out, slots, splits, K**-0.5)
    sizes = {"K": K, "KEYS": KEYS, "TILES": tiles, "ROWS": LEAST, "PADDED": min(64, padded(splits))}
    launch(attention_kernel, (H, splits, B), *given, **sizes, num_stages=3)


def _tiles(heads: int, slots: int) -> int:
    """Tiles of `KEYS` keys that a program of the attention reads, for heads in all texts."""
    return max(1, min(blocks(slots, KEYS), heads * blocks(slots, KEYS) // PROGRAMS))


def window_scratch(keys: Tensor) -> dict[str, Tensor]:
    """Allocates the scratch memory of `window`, for keys `[B, H, slots, K]`."""
    B, H, slots, K = keys.shape
    parts = B * H * blocks(slots, KEYS * _tiles(B * H, slots))
    o, most, total = (keys.new_empty(parts * n, dtype=torch.float32) for n in (K, 1, 1))
    done = keys.new_zeros(B * H, dtype=torch.int32)
    return {"q": keys.new_empty(B, H * K), "o": o, "most": most, "total": total, "done": done}


def trigger(
    task: Tensor,
    bank: tuple[Tensor, Tensor, Tensor, Tensor],
    fast: Tensor,
    memory: Tensor | None,
    rates: Tensor,
    gate_weight: Tensor,
    U: Tensor,
    h_task: Tensor,
    gates: Tensor,
    start: bool,
    exact: bool,
) -> None:
    """The Trigger's step for one token.

    Args:
        task: `[B, 3 C]`, task query, key and value.
        bank: weight `[C, C, R]`, gain, bias and shift `[C, R]`.
        fast: `[B, 4, R]`, float32, updated in place.
        memory: `[B, 4, R]`, float32, updated in place; None without memory.
        rates: `[2]`, float32, step size and decay.
        gate_weight: `[1 or 2, C]`.
        U: `[B, 2, C R]`, float32, overwritten.
        h_task: `[B, C]`, written.
        gates: `[B, 2]`, float32, written: t, or t and t'.
        start: whether this is the first layer with a Trigger, whose fast parameters are ones.
        exact: as of `nirvana.ops.trigger_gradient`.
    """
    weight, gain, bias, shift = bank
    (C, R), B, X = gain.shape, task.shape[0], task.stride(0)
    pads, columns, rows = {"PC": padded(C), "PR": padded(R)}, 64, min(64, padded(2 * B, LEAST))
    sizes = {"PADDED": padded(C, LEAST), "ROWS": rows, "COLUMNS": columns}
    grid = blocks(C * R, columns), blocks(2 * B, rows)
    launch(project_kernel, grid, task, weight, U, B, C, C * R, X, **sizes)
    flags = {"START": start, "EXACT": exact, "HAS_MEMORY": memory is not None}
    given = (task, U, gain, bias, shift, fast, memory, rates, gate_weight, h_task, gates, C, R)
    given = (*given, X, h_task.stride(0))
    launch(trigger_kernel, (B,), *given, **pads, **flags, GATES=gate_weight.shape[0])
