"""The Trigger's kernels, in Triton; `trigger` makes operations of them.

A program holds a block of tokens and iterates over the bank: for each r one product of its tokens
with `weight[:, :, r]`, used at once and discarded. N tokens; CP and RP are C and R padded to powers
of two, and padding holds zeros throughout. Products take operands of type DOT and sum in float32.

Backward of g = (g_w, g_g, g_b, g_s), for dg = dL/dg and P(x) = x - mean(x) - n mean(x n), which is
its own adjoint (dx is the gradient of L with respect to x; delta, gamma, e, n, s, U_r are those of
`nirvana.ops.trigger_gradient`, and u = gamma e):

    ddelta = sum_r dg_w[r] U_r + bias dg_b        xi = gain dg_g
    exact:      du = P(ddelta / s)     dn = -(ddelta / s) mean(u n) - u mean(n ddelta / s)
    truncated:  du = ddelta / s        dn = 0
    ds = -sum(ddelta delta) / s
    de = xi n + shift dg_s + gamma du       dk = de + ...       dv = -de
    dn += xi e + gamma de              dgamma = e du + n de
    dz = P(dn) / s + n ds / C

and with dU_r = p_w[r] dz + dg_w[r] delta, the bank's share of the gradients:

    dp = (U_r . dz, dgamma gain, dz bias, de shift)
    dk = de + sum_r dU_r weight_r^T     dweight_r = k^T dU_r
    dgain = (e n)^T dg_g + dgamma^T p_g     dbias = delta^T dg_b + dz^T p_b
    dshift = e^T dg_s + de^T p_s
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)


@triton.jit
def _load(ptr, t, N, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows t of a matrix, `[BLOCK, PADDED]`."""
    c = tl.arange(0, PADDED)[None, :]
    return tl.load(ptr + t[:, None] * stride + c, (t[:, None] < N) & (c < WIDTH), 0.0)


@triton.jit
def _store(ptr, x, t, N, stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    c = tl.arange(0, PADDED)[None, :]
    tl.store(ptr + t[:, None] * stride + c, x, (t[:, None] < N) & (c < WIDTH))


@triton.jit
def _column(ptr, t, N, r, R: tl.constexpr):
    """Number r of the first vector of fast parameters, `[BLOCK, 1]`."""
    return tl.load(ptr + t * (4 * R) + r, t < N, 0.0)[:, None]


@triton.jit
def _store_column(ptr, x, t, N, r, R: tl.constexpr):
    tl.store(ptr + t * (4 * R) + r, x, t < N)


@triton.jit
def _weight(ptr, r, C: tl.constexpr, CP: tl.constexpr):
    i = tl.arange(0, CP)
    return _load(ptr + r * (C * C), i, C, C, C, CP)


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _from_bank(ptr, p, t, N, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Vectors p `[tokens, R]` through one of gain, bias, shift `[C, R]`: `[BLOCK, CP]`."""
    bank = _load(ptr, tl.arange(0, CP), C, R, R, RP)
    return _dot(_load(p, t, N, 4 * R, R, RP), tl.trans(bank), tl.float32, PRECISION)


@triton.jit
def _to_bank(out, ptr, x, t, N, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr,
             RP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The transpose of `_from_bank`: x `[BLOCK, CP]` to `[tokens, R]`, stored."""
    bank = _load(ptr, tl.arange(0, CP), C, R, R, RP)
    _store(out, _dot(x, bank, tl.float32, PRECISION), t, N, 4 * R, R, RP)


@triton.jit
def _outer(x, ptr, t, N, R: tl.constexpr, RP: tl.constexpr, DOT: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """p^T x, summed over the block, `[RP, CP]`. p is loaded transposed: in Triton 3.6 the product
    of a transposed register tile is wrong in bf16 on sm_90."""
    r = tl.arange(0, RP)[:, None]
    p = tl.load(ptr + t[None, :] * (4 * R) + r, (t[None, :] < N) & (r < R), 0.0)
    return _dot(p, x, DOT, PRECISION)


@triton.jit
def _store_transposed(ptr, x, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr,
                      RP: tl.constexpr):  # fmt: skip
    """x `[RP, CP]` as `[C, R]`."""
    c, r = tl.arange(0, CP)[None, :], tl.arange(0, RP)[:, None]
    tl.store(ptr + c * R + r, x, (c < C) & (r < R))


@triton.jit
def _mean(x, C: tl.constexpr):
    return tl.sum(x, 1)[:, None] / C


@triton.jit
def _only_real(x, C: tl.constexpr, CP: tl.constexpr):
    return tl.where(tl.arange(0, CP)[None, :] < C, x, 0.0)


@triton.jit
def _normalise(z, C: tl.constexpr, CP: tl.constexpr):
    """n and s `[BLOCK, 1]`."""
    z = _only_real(z - _mean(z, C), C, CP)
    s = tl.sqrt(_mean(z * z, C) + EPS)
    return z / s, s


@triton.jit
def _project(x, n, C: tl.constexpr, CP: tl.constexpr):
    """P(x): the derivative of the normalisation applied to x, times s."""
    return _only_real(x - _mean(x, C) - n * _mean(x * n, C), C, CP)


@triton.jit
def _z(x, fast, weight, bias, t, N, C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr,
       RP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    z = _from_bank(bias, fast + 2 * R, t, N, C, R, CP, RP, PRECISION)
    for r in range(R):
        U = _dot(x, _weight(weight, r, C, CP), DOT, PRECISION)
        z += U * _column(fast, t, N, r, R)
    return z


@triton.jit
def apply_forward(
    x_ptr, x_stride, fast, weight, gain, bias, shift, out, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr, t, N, x_stride, C, CP)
    z = _z(x, fast, weight, bias, t, N, C, R, CP, RP, DOT, PRECISION)
    n, _ = _normalise(z, C, CP)
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    f = x.to(tl.float32) + gamma * n
    f += _from_bank(shift, fast + 3 * R, t, N, C, R, CP, RP, PRECISION)
    _store(out, f, t, N, C, C, CP)


@triton.jit
def apply_backward(
    dh_ptr, x_ptr, x_stride, fast, weight, gain, bias, shift,
    dx_ptr, dfast, dz_ptr, dbank, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr, t, N, x_stride, C, CP)
    z = _z(x, fast, weight, bias, t, N, C, R, CP, RP, DOT, PRECISION)
    n, s = _normalise(z, C, CP)
    dh = _load(dh_ptr, t, N, C, C, CP).to(tl.float32)
    dgamma = dh * n
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    dz = _project(gamma * dh, n, C, CP) / s
    _store(dz_ptr, dz, t, N, C, C, CP)

    _to_bank(dfast + R, gain, dgamma, t, N, C, R, CP, RP, PRECISION)
    _to_bank(dfast + 2 * R, bias, dz, t, N, C, R, CP, RP, PRECISION)
    _to_bank(dfast + 3 * R, shift, dh, t, N, C, R, CP, RP, PRECISION)
    dbank += tl.program_id(0) * (3 * C * R)
    dgain = _outer(dgamma, fast + R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank, dgain, C, R, CP, RP)
    dbias = _outer(dz, fast + 2 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank + C * R, dbias, C, R, CP, RP)
    dshift = _outer(dh, fast + 3 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank + 2 * C * R, dshift, C, R, CP, RP)

    dx = dh
    for r in range(R):
        V = _dot(dz, tl.trans(_weight(weight, r, C, CP)), DOT, PRECISION)
        _store_column(dfast, tl.sum(x.to(tl.float32) * V, 1), t, N, r, R)
        dx += V * _column(fast, t, N, r, R)
    _store(dx_ptr, dx, t, N, C, C, CP)


@triton.jit
def gradient_forward(
    k_ptr, k_stride, v_ptr, v_stride, fast, weight, gain, bias, shift, g, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = _load(k_ptr, t, N, k_stride, C, CP)
    z = _z(k, fast, weight, bias, t, N, C, R, CP, RP, DOT, PRECISION)
    n, s = _normalise(z, C, CP)
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    v = _load(v_ptr, t, N, v_stride, C, CP)
    e = gamma * n + (k.to(tl.float32) - v.to(tl.float32))
    e += _from_bank(shift, fast + 3 * R, t, N, C, R, CP, RP, PRECISION)
    delta = gamma * e
    if EXACT:
        delta = _project(delta, n, C, CP)
    delta = delta / s

    _to_bank(g + R, gain, e * n, t, N, C, R, CP, RP, PRECISION)
    _to_bank(g + 2 * R, bias, delta, t, N, C, R, CP, RP, PRECISION)
    _to_bank(g + 3 * R, shift, e, t, N, C, R, CP, RP, PRECISION)
    for r in range(R):
        U = _dot(k, _weight(weight, r, C, CP), DOT, PRECISION)
        _store_column(g, tl.sum(U * delta, 1), t, N, r, R)


@triton.jit
def gradient_backward(
    dg, k_ptr, k_stride, v_ptr, v_stride, fast, weight, gain, bias, shift,
    dk_ptr, dv_ptr, dfast, dz_ptr, delta_ptr, dbank, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = _load(k_ptr, t, N, k_stride, C, CP)
    z = _from_bank(bias, fast + 2 * R, t, N, C, R, CP, RP, PRECISION)
    ddelta = _from_bank(bias, dg + 2 * R, t, N, C, R, CP, RP, PRECISION)
    for r in range(R):
        U = _dot(k, _weight(weight, r, C, CP), DOT, PRECISION)
        z += U * _column(fast, t, N, r, R)
        ddelta += U * _column(dg, t, N, r, R)

    n, s = _normalise(z, C, CP)
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    v = _load(v_ptr, t, N, v_stride, C, CP)
    e = gamma * n + (k.to(tl.float32) - v.to(tl.float32))
    e += _from_bank(shift, fast + 3 * R, t, N, C, R, CP, RP, PRECISION)
    u = gamma * e
    dprojected = ddelta / s
    if EXACT:
        delta = _project(u, n, C, CP) / s
        du = _project(dprojected, n, C, CP)
        dn = -(dprojected * _mean(u * n, C) + u * _mean(dprojected * n, C))
    else:
        delta = u / s
        du = dprojected
        dn = tl.zeros_like(u)
    xi = _from_bank(gain, dg + R, t, N, C, R, CP, RP, PRECISION)
    de = xi * n + gamma * du
    de += _from_bank(shift, dg + 3 * R, t, N, C, R, CP, RP, PRECISION)
    dn += xi * e + gamma * de
    dgamma = e * du + n * de
    dz = _project(dn, n, C, CP) / s - n * (_mean(ddelta * delta, C) / s)
    _store(dv_ptr, -de, t, N, C, C, CP)
    _store(dz_ptr, dz, t, N, C, C, CP)
    _store(delta_ptr, delta, t, N, C, C, CP)

    _to_bank(dfast + R, gain, dgamma, t, N, C, R, CP, RP, PRECISION)
    _to_bank(dfast + 2 * R, bias, dz, t, N, C, R, CP, RP, PRECISION)
    _to_bank(dfast + 3 * R, shift, de, t, N, C, R, CP, RP, PRECISION)
    dbank += tl.program_id(0) * (3 * C * R)
    dgain = _outer(dgamma, fast + R, t, N, R, RP, DOT, PRECISION)
    dgain += _outer(e * n, dg + R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank, dgain, C, R, CP, RP)
    dbias = _outer(dz, fast + 2 * R, t, N, R, RP, DOT, PRECISION)
    dbias += _outer(delta, dg + 2 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank + C * R, dbias, C, R, CP, RP)
    dshift = _outer(de, fast + 3 * R, t, N, R, RP, DOT, PRECISION)
    dshift += _outer(e, dg + 3 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(dbank + 2 * C * R, dshift, C, R, CP, RP)

    dk = de
    for r in range(R):
        W = _weight(weight, r, C, CP)
        U = _dot(k, W, DOT, PRECISION)
        _store_column(dfast, tl.sum(U * dz, 1), t, N, r, R)
        dU = dz * _column(fast, t, N, r, R) + delta * _column(dg, t, N, r, R)
        dk += _dot(dU, tl.trans(W), DOT, PRECISION)
    _store(dk_ptr, dk, t, N, C, C, CP)


@triton.jit
def _mixed(p, y, t, N, first, R: tl.constexpr, RANK: tl.constexpr):
    """p_w[r] y for RANK numbers r side by side, `[BLOCK, RANK CP]`."""
    r = first + tl.arange(0, RANK)[None, :]
    p_w = tl.load(p + t[:, None] * (4 * R) + r, (t[:, None] < N) & (r < R), 0.0)
    mixed = p_w[:, :, None] * y.to(tl.float32)[:, None, :]
    return tl.reshape(mixed, (y.shape[0], RANK * y.shape[1]))


@triton.jit
def weight_backward(
    x_ptr, x_stride, fast, dz_ptr, dg, delta_ptr, parts, N, steps,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    TWO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x^T (p_w[r] dz + dg_w[r] delta) for RANK matrices r, over the tokens of one part."""
    first = tl.program_id(0) * RANK
    part = tl.program_id(1)
    total = tl.zeros((CP, RANK * CP), tl.float32)
    for step in range(steps):
        t = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        dU = _mixed(fast, _load(dz_ptr, t, N, C, C, CP), t, N, first, R, RANK)
        if TWO:
            dU += _mixed(dg, _load(delta_ptr, t, N, C, C, CP), t, N, first, R, RANK)
        x = _load(x_ptr, t, N, x_stride, C, CP)
        total += _dot(tl.trans(x), dU, DOT, PRECISION)
    i = tl.arange(0, CP)[:, None]
    o = tl.arange(0, RANK * CP)[None, :]
    r, o = first + o // CP, o % CP
    out = parts + (part * R + r) * (C * C) + i * C + o
    tl.store(out, total, (i < C) & (o < C) & (r < R))
