"""The Trigger's kernels, in Triton; `triton_trigger` makes operations of them.

A program holds a block of tokens and walks over the bank: for each r one product of its tokens with
`weight[:, :, r]`, used at once and dropped. N tokens; CP and RP are C and R padded to powers of
two, and padding holds zeros throughout. Products take operands of type DOT and sum in float32.

Backward of g = (g_w, g_g, g_b, g_s), for a = dL/dg and P(x) = x - mean(x) - n mean(x n), which is
its own adjoint (bars are gradients, names are those of `trigger_gradient`, gamma = gain p_g):

    dz_bar = sum_r a_w[r] U_r + bias a_b        xi = gain a_g
    exact:      u_bar = P(dz_bar / s)     n_bar = -(dz_bar / s) mean(u n) - u mean(n dz_bar / s)
    truncated:  u_bar = dz_bar / s        n_bar = 0
    s_bar = -sum(dz_bar dz) / s
    e_bar = xi n + shift a_s + gamma u_bar       k_bar = e_bar + ...       v_bar = -e_bar
    n_bar = n_bar + xi e + gamma e_bar           gamma_bar = e u_bar + n e_bar
    z_bar = P(n_bar) / s + n s_bar / C

and with U_bar_r = p_w[r] z_bar + a_w[r] dz, the bank's share of the gradients:

    p_bar = (U_r . z_bar, gamma_bar gain, z_bar bias, e_bar shift)
    k_bar = e_bar + sum_r U_bar_r weight_r^T     weight_bar_r = k^T U_bar_r
    gain_bar = (e n)^T a_g + gamma_bar^T p_g     bias_bar = dz^T a_b + z_bar^T p_b
    shift_bar = e^T a_s + e_bar^T p_s
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
    """The other way: x `[BLOCK, CP]` through gain, bias or shift, stored as `[tokens, R]`."""
    bank = _load(ptr, tl.arange(0, CP), C, R, R, RP)
    _store(out, _dot(x, bank, tl.float32, PRECISION), t, N, 4 * R, R, RP)


@triton.jit
def _outer(x, ptr, t, N, R: tl.constexpr, RP: tl.constexpr, DOT: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """p^T x, summed over the block, `[RP, CP]`. p is loaded transposed: the product of a transposed
    register tile came out wrong in bf16 (Triton 3.6, sm_90)."""
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
    """P(x): what the normalisation's derivative leaves of x, up to 1/s."""
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
    h_bar_ptr, x_ptr, x_stride, fast, weight, gain, bias, shift,
    x_bar_ptr, fast_bar, z_bar_ptr, bank_bar, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _load(x_ptr, t, N, x_stride, C, CP)
    z = _z(x, fast, weight, bias, t, N, C, R, CP, RP, DOT, PRECISION)
    n, s = _normalise(z, C, CP)
    h_bar = _load(h_bar_ptr, t, N, C, C, CP).to(tl.float32)
    gamma_bar = h_bar * n
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    z_bar = _project(gamma * h_bar, n, C, CP) / s
    _store(z_bar_ptr, z_bar, t, N, C, C, CP)

    _to_bank(fast_bar + R, gain, gamma_bar, t, N, C, R, CP, RP, PRECISION)
    _to_bank(fast_bar + 2 * R, bias, z_bar, t, N, C, R, CP, RP, PRECISION)
    _to_bank(fast_bar + 3 * R, shift, h_bar, t, N, C, R, CP, RP, PRECISION)
    bank_bar += tl.program_id(0) * (3 * C * R)
    gain_bar = _outer(gamma_bar, fast + R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar, gain_bar, C, R, CP, RP)
    bias_bar = _outer(z_bar, fast + 2 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar + C * R, bias_bar, C, R, CP, RP)
    shift_bar = _outer(h_bar, fast + 3 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar + 2 * C * R, shift_bar, C, R, CP, RP)

    x_bar = h_bar
    for r in range(R):
        V = _dot(z_bar, tl.trans(_weight(weight, r, C, CP)), DOT, PRECISION)
        _store_column(fast_bar, tl.sum(x.to(tl.float32) * V, 1), t, N, r, R)
        x_bar += V * _column(fast, t, N, r, R)
    _store(x_bar_ptr, x_bar, t, N, C, C, CP)


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
    dz = gamma * e
    if EXACT:
        dz = _project(dz, n, C, CP)
    dz = dz / s

    _to_bank(g + R, gain, e * n, t, N, C, R, CP, RP, PRECISION)
    _to_bank(g + 2 * R, bias, dz, t, N, C, R, CP, RP, PRECISION)
    _to_bank(g + 3 * R, shift, e, t, N, C, R, CP, RP, PRECISION)
    for r in range(R):
        U = _dot(k, _weight(weight, r, C, CP), DOT, PRECISION)
        _store_column(g, tl.sum(U * dz, 1), t, N, r, R)


@triton.jit
def gradient_backward(
    a, k_ptr, k_stride, v_ptr, v_stride, fast, weight, gain, bias, shift,
    k_bar_ptr, v_bar_ptr, fast_bar, z_bar_ptr, dz_ptr, bank_bar, N,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = _load(k_ptr, t, N, k_stride, C, CP)
    z = _from_bank(bias, fast + 2 * R, t, N, C, R, CP, RP, PRECISION)
    dz_bar = _from_bank(bias, a + 2 * R, t, N, C, R, CP, RP, PRECISION)
    for r in range(R):
        U = _dot(k, _weight(weight, r, C, CP), DOT, PRECISION)
        z += U * _column(fast, t, N, r, R)
        dz_bar += U * _column(a, t, N, r, R)

    n, s = _normalise(z, C, CP)
    gamma = _from_bank(gain, fast + R, t, N, C, R, CP, RP, PRECISION)
    v = _load(v_ptr, t, N, v_stride, C, CP)
    e = gamma * n + (k.to(tl.float32) - v.to(tl.float32))
    e += _from_bank(shift, fast + 3 * R, t, N, C, R, CP, RP, PRECISION)
    u = gamma * e
    w_bar = dz_bar / s
    if EXACT:
        dz = _project(u, n, C, CP) / s
        u_bar = _project(w_bar, n, C, CP)
        n_bar = -(w_bar * _mean(u * n, C) + u * _mean(w_bar * n, C))
    else:
        dz = u / s
        u_bar = w_bar
        n_bar = tl.zeros_like(u)
    xi = _from_bank(gain, a + R, t, N, C, R, CP, RP, PRECISION)
    e_bar = xi * n + gamma * u_bar
    e_bar += _from_bank(shift, a + 3 * R, t, N, C, R, CP, RP, PRECISION)
    n_bar += xi * e + gamma * e_bar
    gamma_bar = e * u_bar + n * e_bar
    z_bar = _project(n_bar, n, C, CP) / s - n * (_mean(dz_bar * dz, C) / s)
    _store(v_bar_ptr, -e_bar, t, N, C, C, CP)
    _store(z_bar_ptr, z_bar, t, N, C, C, CP)
    _store(dz_ptr, dz, t, N, C, C, CP)

    _to_bank(fast_bar + R, gain, gamma_bar, t, N, C, R, CP, RP, PRECISION)
    _to_bank(fast_bar + 2 * R, bias, z_bar, t, N, C, R, CP, RP, PRECISION)
    _to_bank(fast_bar + 3 * R, shift, e_bar, t, N, C, R, CP, RP, PRECISION)
    bank_bar += tl.program_id(0) * (3 * C * R)
    gain_bar = _outer(gamma_bar, fast + R, t, N, R, RP, DOT, PRECISION)
    gain_bar += _outer(e * n, a + R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar, gain_bar, C, R, CP, RP)
    bias_bar = _outer(z_bar, fast + 2 * R, t, N, R, RP, DOT, PRECISION)
    bias_bar += _outer(dz, a + 2 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar + C * R, bias_bar, C, R, CP, RP)
    shift_bar = _outer(e_bar, fast + 3 * R, t, N, R, RP, DOT, PRECISION)
    shift_bar += _outer(e, a + 3 * R, t, N, R, RP, DOT, PRECISION)
    _store_transposed(bank_bar + 2 * C * R, shift_bar, C, R, CP, RP)

    k_bar = e_bar
    for r in range(R):
        W = _weight(weight, r, C, CP)
        U = _dot(k, W, DOT, PRECISION)
        _store_column(fast_bar, tl.sum(U * z_bar, 1), t, N, r, R)
        U_bar = z_bar * _column(fast, t, N, r, R) + dz * _column(a, t, N, r, R)
        k_bar += _dot(U_bar, tl.trans(W), DOT, PRECISION)
    _store(k_bar_ptr, k_bar, t, N, C, C, CP)


@triton.jit
def _mixed(p, y, t, N, first, R: tl.constexpr, RANK: tl.constexpr):
    """p_w[r] y for RANK numbers r side by side, `[BLOCK, RANK CP]`."""
    r = first + tl.arange(0, RANK)[None, :]
    p_w = tl.load(p + t[:, None] * (4 * R) + r, (t[:, None] < N) & (r < R), 0.0)
    mixed = p_w[:, :, None] * y.to(tl.float32)[:, None, :]
    return tl.reshape(mixed, (y.shape[0], RANK * y.shape[1]))


@triton.jit
def weight_backward(
    x_ptr, x_stride, fast, z_bar_ptr, a, dz_ptr, parts, N, steps,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    TWO: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x^T (p_w[r] z_bar + a_w[r] dz) for RANK matrices r, over the tokens of one part."""
    first = tl.program_id(0) * RANK
    part = tl.program_id(1)
    total = tl.zeros((CP, RANK * CP), tl.float32)
    for step in range(steps):
        t = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        U_bar = _mixed(fast, _load(z_bar_ptr, t, N, C, C, CP), t, N, first, R, RANK)
        if TWO:
            U_bar += _mixed(a, _load(dz_ptr, t, N, C, C, CP), t, N, first, R, RANK)
        x = _load(x_ptr, t, N, x_stride, C, CP)
        total += _dot(tl.trans(x), U_bar, DOT, PRECISION)
    i = tl.arange(0, CP)[:, None]
    o = tl.arange(0, RANK * CP)[None, :]
    r, o = first + o // CP, o % CP
    out = parts + (part * R + r) * (C * C) + i * C + o
    tl.store(out, total, (i < C) & (o < C) & (r < R))
