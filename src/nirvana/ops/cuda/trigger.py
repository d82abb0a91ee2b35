"""The Trigger's two products with the bank, fused, forward and backward, for CUDA tensors.

Nothing of size `[tokens, C, R]` is stored: the backward recomputes it from the inputs. Arithmetic
is float32. bf16 tokens and a bf16 bank are multiplied on the tensor cores, which is exact because
sums are float32; only operands of the backward are rounded to bf16. Other dtypes follow
`torch.set_float32_matmul_precision`. The operations take flat tokens: k, v, x `[N, C]`, fast
`[N, 4, R]`, weight `[R, C, C]`.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from nirvana.ops.cuda.launch import LEAST, blocks, launch, padded
from nirvana.ops.cuda.trigger_kernels import (
    apply_backward,
    apply_forward,
    gradient_backward,
    gradient_forward,
    weight_backward,
)

BLOCK, WARPS, STAGES = 64, 4, 3
"""Tokens of a program, its warps, and the depth of its pipeline of loads."""
WEIGHT_BLOCK, WEIGHT_RANK, WEIGHT_PARTS = 64, 4, 16
"""The weight's gradient: tokens a step, matrices a program (fewer where they are wider than 64,
because of the size of shared memory), parts that the tokens are divided into."""
WEIGHT_WARPS, WEIGHT_STAGES = 8, 2
TUNING = (
    *("BLOCK", "WARPS", "STAGES"),
    *("WEIGHT_BLOCK", "WEIGHT_RANK", "WEIGHT_PARTS", "WEIGHT_WARPS", "WEIGHT_STAGES"),
)
"""The constants that `benchmarks/trigger.py` can change, to tune for another GPU."""


def _blocks(x: Tensor) -> tuple[int]:
    return (blocks(x.shape[0], BLOCK),)


def _constants(x: Tensor, weight: Tensor) -> dict[str, Any]:
    R, C, _ = weight.shape
    return {
        "C": C,
        "R": R,
        "CP": padded(C, LEAST),
        "RP": padded(R, LEAST),
        "BLOCK": BLOCK,
        **_precision(x, weight),
        "num_warps": WARPS,
        "num_stages": STAGES,
    }


def _precision(x: Tensor, weight: Tensor) -> dict[str, Any]:
    if _half(x, weight) and not knobs.runtime.interpret:  # the interpreter has no bf16 products
        return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
    full = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {"DOT": tl.float32, "PRECISION": "ieee" if full else "tf32"}


def _half(x: Tensor, weight: Tensor) -> bool:
    return x.dtype == weight.dtype == torch.bfloat16


def _scratch(x: Tensor, weight: Tensor) -> Tensor:
    """An operand of the weight's gradient, in the dtype in which it will be multiplied."""
    return torch.empty(
        x.shape, dtype=x.dtype if _half(x, weight) else torch.float32, device=x.device
    )


def _bank_parts(x: Tensor, gain: Tensor) -> Tensor:
    """Gradients of gain, bias and shift, one part of the sum for each block of tokens."""
    return x.new_empty(*_blocks(x), 3, *gain.shape, dtype=torch.float32)


@torch.library.custom_op("nirvana::trigger_apply", mutates_args=())
def _apply(
    x: Tensor, fast: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inputs = (x, x.stride(0), fast, weight, gain, bias, shift)
    launch(apply_forward, _blocks(x), *inputs, h, x.shape[0], **_constants(x, weight))
    return h


@_apply.register_fake
def _(x, fast, weight, gain, bias, shift):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("nirvana::triggerapply_backward", mutates_args=())
def _apply_gradients(
    dh: Tensor,
    x: Tensor,
    fast: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and fast, dz, and the parts of gain's, bias' and shift's."""
    outputs = _apply_gradients_like(x, fast, weight, gain)
    inputs = (dh, x, x.stride(0), fast, weight, gain, bias, shift)
    launch(apply_backward, _blocks(x), *inputs, *outputs, x.shape[0], **_constants(x, weight))
    return outputs


def _apply_gradients_like(x, fast, weight, gain):
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty_like(fast), _scratch(x, weight), _bank_parts(x, gain)


@_apply_gradients.register_fake
def _(dh, x, fast, weight, gain, bias, shift):
    return _apply_gradients_like(x, fast, weight, gain)


@torch.library.custom_op("nirvana::trigger_gradient", mutates_args=())
def _gradient(
    k: Tensor,
    v: Tensor,
    fast: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor,
    exact: bool,
) -> Tensor:
    g = torch.empty_like(fast)
    inputs = (k, k.stride(0), v, v.stride(0), fast, weight, gain, bias, shift)
    constants = {**_constants(k, weight), "EXACT": exact}
    launch(gradient_forward, _blocks(k), *inputs, g, k.shape[0], **constants)
    return g


@_gradient.register_fake
def _(k, v, fast, weight, gain, bias, shift, exact):
    return torch.empty_like(fast)


@torch.library.custom_op("nirvana::triggergradient_backward", mutates_args=())
def _gradient_gradients(
    dg: Tensor,
    k: Tensor,
    v: Tensor,
    fast: Tensor,
    weight: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v and fast, then dz, delta, and the parts of gain's, bias' and shift's."""
    outputs = _gradient_gradients_like(k, v, fast, weight, gain)
    inputs = (dg, k, k.stride(0), v, v.stride(0), fast, weight, gain, bias, shift)
    constants = {**_constants(k, weight), "EXACT": exact}
    launch(gradient_backward, _blocks(k), *inputs, *outputs, k.shape[0], **constants)
    return outputs


def _gradient_gradients_like(k, v, fast, weight, gain):
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dz, delta = _scratch(k, weight), _scratch(k, weight)
    return dk, dv, torch.empty_like(fast), dz, delta, _bank_parts(k, gain)


@_gradient_gradients.register_fake
def _(dg, k, v, fast, weight, gain, bias, shift, exact):
    return _gradient_gradients_like(k, v, fast, weight, gain)


@torch.library.custom_op("nirvana::triggerweight_backward", mutates_args=())
def _weight_gradient(
    x: Tensor, weight: Tensor, fast: Tensor, dz: Tensor, dg: Tensor | None, delta: Tensor | None
) -> Tensor:
    """sum_t x_t^T (p_w[r] dz + dg_w[r] delta)_t, `[R, C, C]`; dg and delta are both given or both
    None."""
    R, C, _ = weight.shape
    parts = x.new_empty(WEIGHT_PARTS, R, C, C, dtype=torch.float32)
    width = padded(C, LEAST)
    rank = max(1, WEIGHT_RANK * 64 // max(64, width))
    constants = {
        "C": C,
        "R": R,
        "CP": width,
        "BLOCK": WEIGHT_BLOCK,
        "RANK": rank,
        "TWO": dg is not None,
        **_precision(x, weight),
        "num_warps": WEIGHT_WARPS,
        "num_stages": WEIGHT_STAGES,
    }
    steps = blocks(x.shape[0], WEIGHT_BLOCK * WEIGHT_PARTS)
    grid = (blocks(R, rank), WEIGHT_PARTS)
    inputs = (x, x.stride(0), fast, dz, dg, delta)
    launch(weight_backward, grid, *inputs, parts, x.shape[0], steps, **constants)
    return parts.sum(0).to(weight.dtype)


@_weight_gradient.register_fake
def _(x, weight, fast, dz, dg, delta):
    return torch.empty_like(weight)


def _save(ctx, inputs, output):
    *tensors, ctx.exact = inputs if isinstance(inputs[-1], bool) else (*inputs, None)
    ctx.save_for_backward(*tensors)


def _bank_gradients(parts: Tensor, like: Tensor) -> list[Tensor]:
    return list(parts.sum(0).to(like.dtype).unbind(0))


def _apply_autograd(ctx, dh):
    x, fast, weight, gain, bias, shift = ctx.saved_tensors
    dx, dfast, dz, parts = _apply_gradients(dh.contiguous(), x, fast, weight, gain, bias, shift)
    dweight = None
    if ctx.needs_input_grad[2]:
        dweight = _weight_gradient(x, weight, fast, dz, None, None)
    return dx, dfast, dweight, *_bank_gradients(parts, gain)


def _gradient_autograd(ctx, dg):
    k, v, fast, weight, gain, bias, shift = ctx.saved_tensors
    dg = dg.contiguous()
    dk, dv, dfast, dz, delta, parts = _gradient_gradients(
        dg, k, v, fast, weight, gain, bias, shift, ctx.exact
    )
    dweight = None
    if ctx.needs_input_grad[3]:
        dweight = _weight_gradient(k, weight, fast, dz, dg, delta)
    return dk, dv, dfast, dweight, *_bank_gradients(parts, gain), None


_apply.register_autograd(_apply_autograd, setup_context=_save)
_gradient.register_autograd(_gradient_autograd, setup_context=_save)


def trigger_apply(
    x: Tensor, fast: Tensor, weight: Tensor, gain: Tensor, bias: Tensor, shift: Tensor
) -> Tensor:
    """See `nirvana.ops.trigger_apply`; the result is in x's dtype."""
    bank = (_bank_first(weight, x), *(y.contiguous() for y in (gain, bias, shift)))
    return _apply(_rows(x), _tokens(fast), *bank).view(x.shape)


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
    """See `nirvana.ops.trigger_gradient`; the result is float32."""
    bank = (_bank_first(weight, k), *(y.contiguous() for y in (gain, bias, shift)))
    return _gradient(_rows(k), _rows(v), _tokens(fast), *bank, exact).view(fast.shape)


def _bank_first(weight: Tensor, x: Tensor) -> Tensor:
    """`[C, C, R]` to `[R, C, C]`, so that every matrix of the bank is contiguous; in the dtype of
    the tokens x, which a float32 master weight does not have."""
    return weight.to(x.dtype).permute(2, 0, 1).contiguous()


def _rows(x: Tensor) -> Tensor:
    """`[..., C]` to `[N, C]`: a view also of a slice of qkv, whose rows have gaps between them."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _tokens(fast: Tensor) -> Tensor:
    return fast.float().flatten(0, -3).contiguous()
