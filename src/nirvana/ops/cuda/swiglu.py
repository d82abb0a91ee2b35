"""silu(gate) * up for gate and up side by side, and its gradient in one pass, for CUDA tensors.

A compiler selects the gradient's two halves with masks, so every lane computes both: 1.6 times the
time of the memory traffic alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.cuda.launch import blocks, launch

COLUMNS = 1024
"""Columns of a program, which takes one row."""


@triton.jit
def swiglu_kernel(x, out, F, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x + row * (2 * F) + c, c < F, 0.0).to(tl.float32)
    up = tl.load(x + row * (2 * F) + F + c, c < F, 0.0).to(tl.float32)
    tl.store(out + row * F + c, gate * tl.sigmoid(gate) * up, c < F)


@triton.jit
def swiglu_gradient_kernel(dy_ptr, x, dx, F, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x + row * (2 * F) + c, c < F, 0.0).to(tl.float32)
    up = tl.load(x + row * (2 * F) + F + c, c < F, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + c, c < F, 0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    dgate = dy * up * sigma * (1 + gate * (1 - sigma))
    tl.store(dx + row * (2 * F) + c, dgate, c < F)
    tl.store(dx + row * (2 * F) + F + c, dy * gate * sigma, c < F)


@torch.library.custom_op("nirvana::swiglu", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    N, F = x.shape[0], x.shape[1] // 2
    out = torch.empty(N, F, dtype=x.dtype, device=x.device)
    launch(swiglu_kernel, (N, blocks(F, COLUMNS)), x.contiguous(), out, F, COLUMNS=COLUMNS)
    return out


@_swiglu.register_fake
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("nirvana::swiglu_gradient", mutates_args=())
def _gradient(dy: Tensor, x: Tensor) -> Tensor:
    N, F = dy.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    given = (dy.contiguous(), x.contiguous(), dx, F)
    launch(swiglu_gradient_kernel, (N, blocks(F, COLUMNS)), *given, COLUMNS=COLUMNS)
    return dx


@_gradient.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return _gradient(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_autograd, setup_context=_save)


def swiglu(x: Tensor) -> Tensor:
    """See `nirvana.ops.swiglu`."""
    return _swiglu(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
