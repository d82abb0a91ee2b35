"""One token of each text of a batch through a layer, for CUDA tensors.

The cost of a decoded token is that of reading the weights once, plus the launches of short kernels
in sequence. States are updated in place; a barrier separates the reads of a value by several lanes
from the write. The output of in_proj, a row of X numbers a text, has the layout of
`Updater.sections`: q k v | gate | beta | alpha | low rank of q k v | task. SHARED = H / G heads of
q have one head of k and v. The window branch has a module of its own, `decode_window`.
"""

import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.decode_products import gated_product
from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded

UNIT_EPS = tl.constexpr(1e-6)
"""Epsilon of the unit length of q and k, and of the Trigger's normalisation."""


@triton.jit
def qkv_kernel(
    x, bias, q_norm, k_norm, H, X, eps,
    K: tl.constexpr, SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """The bias and the norm of one head of q, k or v, in place."""
    head, b, i = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, K)
    at = x + b * X + head * K + i
    y = tl.load(at).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + head * K + i).to(tl.float32)
    if HAS_NORM:
        unit = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps)
        if head < H:
            y = unit * tl.load(q_norm + i).to(tl.float32)
        elif head < H + H // SHARED:
            y = unit * tl.load(k_norm + i).to(tl.float32)
    tl.debug_barrier()
    tl.store(at, y)


@triton.jit
def mix_kernel(
    x, state, weight, mixed, H, X,
    K: tl.constexpr, SHARED: tl.constexpr, HAS_CONV: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The convolution of one head of q, k or v, SiLU, unit length of q (over sqrt(K)) and k."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c, G = head * K + tl.arange(0, K), H // SHARED
    x, state = x + b * X, state + b * 3 * (SHARED + 2) * G * K
    mixed += b * (SHARED + 2) * G * K
    x0 = tl.load(x + c)
    if HAS_CONV:
        x1, x2 = tl.load(state + c * 3 + 2), tl.load(state + c * 3 + 1)
        x3 = tl.load(state + c * 3)
        y = x0.to(tl.float32) * tl.load(weight + c * 4 + 3).to(tl.float32)
        y += x1.to(tl.float32) * tl.load(weight + c * 4 + 2).to(tl.float32)
        y += x2.to(tl.float32) * tl.load(weight + c * 4 + 1).to(tl.float32)
        y += x3.to(tl.float32) * tl.load(weight + c * 4).to(tl.float32)
    else:
        y = x0.to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    if head < (SHARED + 1) * G:
        y *= tl.rsqrt((tl.sum(y * y, 0) + UNIT_EPS) * tl.where(head < H, K, 1))
    tl.store(mixed + c, y)
    if HAS_CONV:
        tl.debug_barrier()
        tl.store(state + c * 3, x2)
        tl.store(state + c * 3 + 1, x1)
        tl.store(state + c * 3 + 2, x0)


@triton.jit
def delta_kernel(
    x, mixed, A_log, dt_bias, state, o, H, X,
    K: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gated delta rule for some columns of one head's state; columns are independent."""
    head, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    G, shared = H // SHARED, head // SHARED
    x, mixed = x + b * X, mixed + b * (SHARED + 2) * G * K
    o, state = o + b * H * K, state + b * H * K * K
    D, i, j = G * K, tl.arange(0, K), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = state + head * K * K + i[:, None] * K + j[None, :]
    S = tl.load(places)
    q, k = tl.load(mixed + head * K + i), tl.load(mixed + SHARED * D + shared * K + i)
    v = tl.load(mixed + (SHARED + 1) * D + shared * K + j)
    beta = tl.sigmoid(tl.load(x + (2 * SHARED + 2) * D + head).to(tl.float32))
    step = tl.load(x + (2 * SHARED + 2) * D + H + head).to(tl.float32)
    step += tl.load(dt_bias + head).to(tl.float32)
    # Softplus. For small exp(step), log(1 + exp(step)) loses digits and exp(step) is exact enough.
    small, middle = tl.exp(step), tl.log(1 + tl.exp(tl.minimum(step, 20.0)))
    step = tl.where(step > 20, step, tl.where(step < -10, small, middle))
    S *= tl.exp(-tl.exp(tl.load(A_log + head).to(tl.float32)) * step)
    S += k[:, None] * (beta * (v - tl.sum(S * k[:, None], 0)))[None, :]
    tl.store(o + head * K + j, tl.sum(S * q[:, None], 0))
    tl.debug_barrier()
    tl.store(places, S)


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


def qkv(
    x: Tensor,
    head_sizes: tuple[int, int, int],
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> None:
    """Adds the bias to q, k and v, then normalises q and k, in place.

    Args:
        x: `[B, X]`, the output of in_proj, whose first (H + 2 G) K columns are changed.
        head_sizes: H, G and K.
        bias: `[(H + 2 G) K]`; None means zero.
        norms: scales of the RMSNorms of every head of q and of k, `[K]` each; None means no norms.
        eps: of these norms.
    """
    H, G, K = head_sizes
    q_norm, k_norm = norms or (None, None)
    flags = {"HAS_BIAS": bias is not None, "HAS_NORM": norms is not None}
    given = (x, bias, q_norm, k_norm, H, x.stride(0), eps)
    launch(qkv_kernel, (H + 2 * G, x.shape[0]), *given, K=K, SHARED=H // G, **flags, num_warps=1)


def linear(
    x: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor | None,
    silu: bool,
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
        conv_state: `[B, (H + 2 G) K, 3]`, the last inputs of the convolution; unused without one.
        conv_weight: `[(H + 2 G) K, 4]`; None means no convolution.
        silu: apply SiLU to q, k and v.
        A_log: `[H]`.
        dt_bias: `[H]`.
        state: `[B, H, K, K]`, float32.
        norm: `[K]`, the scale of the norm of a head.
        eps: of that norm.
        weight: `[D, H K]`, of the output projection.
        scratch: `[B, (H + 2 G) K]` and `[B, H K]`, float32, overwritten.
        out: `[B, D]`, written.
        added: `[B, D]`, may be `out`; None means zero.
    """
    B, H, K, _ = state.shape
    (mixed, o), X = scratch, x.stride(0)
    heads = mixed.shape[1] // K
    sizes = {"K": K, "SHARED": 2 * H // (heads - H)}
    flags = {"HAS_CONV": conv_weight is not None, "SILU": silu}
    given = (x, conv_state, conv_weight, mixed, H, X)
    launch(mix_kernel, (heads, B), *given, **sizes, **flags, num_warps=1)
    given, columns = (x, mixed, A_log, dt_bias, state, o, H, X), min(K, 32)
    launch(delta_kernel, (H, K // columns, B), *given, **sizes, COLUMNS=columns, num_warps=4)
    gated_product(weight, o, norm, x[:, heads * K :], eps, out, added)


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
