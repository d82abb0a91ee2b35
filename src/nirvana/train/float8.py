"""Training in float8: the large matrix products of the blocks, forward and backward.

Inputs and weights are rounded to e4m3 and gradients to e5m2 (Micikevicius et al., arXiv
2209.05433), whose exponent is wider. Every tensor is first scaled so that its largest magnitude is
the largest number of the format. Sums, outputs, weights and everything else are those of bf16.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.ops import in_autocast

MULTIPLE = 16
"""Of the tokens, columns and rows of a product in float8."""
NARROW = 8
"""Maps of which one side is this many times the other (low-rank factors, gates) stay in bf16: their
products are bound by the memory, and rounding reads and writes their input once more."""
CAPABILITY = (8, 9)
"""The first CUDA devices with float8 products."""
LEAST_SCALED = 1e-30
"""Below this largest magnitude a tensor is not scaled up further, so that scales are finite."""


def has_float8(device: torch.device) -> bool:
    """Whether a device has matrix products in float8.

    Args:
        device: any.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def require_float8(device: torch.device) -> None:
    """Checks that a device has matrix products in float8.

    Args:
        device: of the training.

    Raises:
        InputError: if it has none.
    """
    if not has_float8(device):
        on_cuda = device.type == "cuda"
        raise no_float8(torch.cuda.get_device_name(device) if on_cuda else device.type)


def no_float8(name: str) -> InputError:
    """The error for a device without such products.

    Args:
        name: of the device.
    """
    return InputError(
        f"run.precision = 'fp8': {name} has no matrix products in float8 (NVIDIA GPUs have them "
        "from compute capability 8.9 on, as L4 and H100); choose 'bf16'"
    )


def use_float8(blocks: Iterable[nn.Module]) -> list[str]:
    """Replaces the large linear maps of blocks by `Float8Linear`; parameters stay.

    Args:
        blocks: the layers of a model.

    Returns:
        the sizes that no product in float8 takes, "OUT x IN"; their maps are unchanged.
    """
    unfit: dict[str, None] = {}
    for owner in [module for block in blocks for module in block.modules()]:
        for name, part in owner.named_children():
            if type(part) is not nn.Linear or part.bias is not None:
                continue
            sizes = part.out_features, part.in_features
            if max(sizes) >= NARROW * min(sizes):
                continue
            if any(size % MULTIPLE for size in sizes):
                unfit["{} x {}".format(*sizes)] = None
            else:
                # Assigning a class to the old module is not enough: compiled code that has run a
                # few times may no longer check classes, but does notice replaced modules.
                setattr(owner, name, Float8Linear.of(part))
    return list(unfit)


class Float8Linear(nn.Linear):
    """A linear map without bias whose products are computed in float8 while it is trained.

    In evaluation it is an ordinary one, as the model will be that is exported, and so it is for
    numbers of tokens that are no multiple of `MULTIPLE`.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "Float8Linear":
        """A new module with the weight of another."""
        with torch.device("meta"):
            rounded = cls(linear.in_features, linear.out_features, bias=False)
        rounded.weight = linear.weight
        return rounded.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` to `[..., N]`."""
        if not self.training or x.shape[:-1].numel() % MULTIPLE:
            return super().forward(x)
        y = _Product.apply(in_autocast(x).flatten(0, -2), in_autocast(self.weight))
        return y.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """x weight^T, for x `[M, K]` and weight `[N, K]`; all three products are in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = _rounded(x), _rounded(weight)
        ctx.save_for_backward(x8, x_scale, weight, w_scale)
        return _product(x8, w8, x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[reportIncompatibleMethodOverride]
        x8, x_scale, weight, w_scale = ctx.saved_tensors
        w8 = _round_by(weight, w_scale, torch.float8_e4m3fn)
        dy8, dy_scale = _rounded(dy, torch.float8_e5m2)
        dx = _product(dy8, _transposed(w8), dy_scale, w_scale, dy.dtype)
        dweight = _product(_transposed(dy8), _transposed(x8), dy_scale, x_scale, weight.dtype)
        return dx, dweight


def _product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a b^T, for a `[M, K]` and b `[N, K]` in float8, both contiguous.

    `fast` sums in the tensor cores' own precision, which is enough for values; sums of gradients
    are moved to float32 registers at intervals.
    """
    return torch._scaled_mm(  # type: ignore[reportPrivateImportUsage]
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


def _rounded(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """x in float8, and the scale `[]`, float32, by which that is to be multiplied."""
    largest = x.abs().amax().float().clamp(min=LEAST_SCALED)
    scale = largest / torch.finfo(dtype).max
    return _round_by(x, scale, dtype), scale


def _round_by(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in float8, contiguous; beyond the largest number float8 has no infinity to give."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous()


def _transposed(x: Tensor) -> Tensor:
    """x^T, contiguous: products in float8 read both operands along the summed dimension."""
    return x.t().contiguous()
