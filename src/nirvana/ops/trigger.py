"""The Trigger's two functions in PyTorch, for the `chunked` backend: closed forms, any device.

Both read the bank once through U = x . weight, `[..., C, R]`. Formulas: `nirvana.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.ops.precision import at_least_float32
from nirvana.ops.reference import TRIGGER_EPS


def trigger_gradient(
    k: Tensor,
    v: Tensor,
    fast: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor,
    exact: bool = True,
) -> Tensor:
    """See `nirvana.ops.trigger_gradient`."""
    k, v = at_least_float32(k), at_least_float32(v)
    U = _project(k, weight)
    f, n, s = _apply(k, U, fast, gain, bias, shift)
    gain, bias, shift = (x.to(k.dtype) for x in (gain, bias, shift))
    e = f - v
    u = F.linear(fast[..., 1, :], gain) * e
    if exact:
        u = u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True)
    delta = u / s
    g_w = (U * delta[..., None]).sum(-2)
    return torch.stack([g_w, (e * n) @ gain, delta @ bias, e @ shift], dim=-2)


def trigger_apply(
    x: Tensor, fast: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """See `nirvana.ops.trigger_apply`."""
    x = at_least_float32(x)
    return _apply(x, _project(x, weight), fast, gain, bias, shift)[0]


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x `[..., C]` times every matrix of the bank: U, `[..., C, R]`."""
    weight = weight.to(x.dtype)
    return (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


def _apply(
    x: Tensor, U: Tensor, fast: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """f(x; p) `[..., C]`, the normalised n `[..., C]` and its divisor s `[..., 1]`."""
    p_w, p_g, p_b, p_s = fast.unbind(-2)
    gain, bias, shift = (y.to(x.dtype) for y in (gain, bias, shift))
    z = (U * p_w[..., None, :]).sum(-1) + F.linear(p_b, bias)
    variance, mean = torch.var_mean(z, dim=-1, correction=0, keepdim=True)
    s = (variance + TRIGGER_EPS).sqrt()
    n = (z - mean) / s
    return x + F.linear(p_g, gain) * n + F.linear(p_s, shift), n, s
