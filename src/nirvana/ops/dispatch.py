"""Which backend computes a call of an operation.

Three backends: `reference`, the definitions, token by token; `chunked`, PyTorch on any device,
linear in the number of tokens; `cuda`, the Triton, cuDNN and fla-core kernels for half precision on
a GPU. The tensors decide at every call: `cuda` where its kernels fit, else `chunked`. Nothing else
in the package chooses. `use_backend` overrides the choice, for tests.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nirvana.device import HAS_KERNELS
from nirvana.ops import chunked, reference
from nirvana.ops.chunks import is_exporting
from nirvana.ops.limits import CONV_WIDTH, HEAD_DIMS, LEAST_WINDOW, MAX_SINKS, MAX_TASK_DIM

BACKENDS = ("reference", "chunked", "cuda")
"""The names of the backends."""
KERNELS = (
    "linear_branch",
    "add_low_rank",
    "window_branch",
    "window_attention",
    "sink_attention",
    "swiglu",
    "trigger_gradient",
    "trigger_apply",
    "linear_cross_entropy",
    "distillation_loss",
)
"""The operations that `cuda` has kernels for."""

_forced: str | None = None
_recorded: dict[str, list[str]] | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Computes every operation in the block with one backend, in all threads of the process.

    With "cuda", operations that have no kernels are computed by "chunked", and a call that the
    kernels do not take raises ValueError.

    Args:
        name: one of `BACKENDS`.

    Yields:
        None.

    Raises:
        ValueError: if there is no such backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def recorded_backends() -> Iterator[dict[str, list[str]]]:
    """Records which backends compute which operations in the block; not in compiled code.

    Yields:
        the names of the backends by the name of the operation, filled as the block runs.
    """
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


def implementation(operation: str, fits: bool = False) -> Callable[..., Any]:
    """The function that computes a call of an operation.

    Args:
        operation: the name of a public function of `nirvana.ops`.
        fits: whether the kernels of `cuda` take this call.

    Returns:
        a function with the arguments of the public one.

    Raises:
        ValueError: inside `use_backend("cuda")`, if the kernels do not take this call.
    """
    fits = fits and not is_exporting()  # a program runs where we are not installed
    name = ("cuda" if fits else "chunked") if _forced is None else _forced
    if name == "cuda":
        if operation not in KERNELS:
            name = "chunked"
        elif not fits:
            raise ValueError(f"the kernels of the cuda backend do not take this {operation}")
    if _recorded is not None:
        names = _recorded.setdefault(operation, [])
        if name not in names:
            names.append(name)
    if name == "cuda":
        return getattr(_kernel_module(operation), operation)
    return getattr(reference if name == "reference" else chunked, operation)


def _kernel_module(operation: str) -> Any:
    # Plain imports: a compiler traces through them, which it does not through import_module.
    if operation == "swiglu":
        from nirvana.ops.cuda import swiglu

        return swiglu
    if operation.startswith("trigger"):
        from nirvana.ops.cuda import trigger

        return trigger
    if operation == "linear_cross_entropy":
        from nirvana.ops.cuda import cross_entropy

        return cross_entropy
    if operation == "distillation_loss":
        from nirvana.ops.cuda import divergence

        return divergence
    if operation == "linear_branch":
        from nirvana.ops.cuda import linear

        return linear
    if operation == "add_low_rank":
        from nirvana.ops.cuda import low_rank

        return low_rank
    from nirvana.ops.cuda import window

    return window


def suits_kernels(x: Tensor) -> bool:
    """Whether x is a half-precision CUDA tensor and the kernels' packages are installed."""
    return HAS_KERNELS and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def warn_without_kernels(x: Tensor, head_dim: int, others: tuple[str, ...] = ()) -> None:
    """Logs once for each head size that tensors like x suit the kernels, but the size does not; and
    so for other settings.

    Args:
        x: the input of a model or layer.
        head_dim: K.
        others: settings that the kernels do not take, such as "num_sinks = 4".
    """
    if torch.compiler.is_compiling() or not suits_kernels(x):
        return
    if head_dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        _warn_of(f"heads of {head_dim}", f"; there are kernels for {sizes}")
    if others:
        _warn_of(", ".join(others), "")


@cache
def _warn_of(what: str, instead: str) -> None:
    logging.getLogger(__name__).warning(
        "no GPU kernel takes %s: PyTorch computes them%s", what, instead
    )


def branch_fits(
    x: Tensor, head_dim: int, segments: Tensor | None, cu_seqlens: Tensor | None
) -> bool:
    """Whether the kernels of a branch of the Updater take a call.

    They take more than one token, and packed samples only with `cu_seqlens`.

    Args:
        x: `[B, T, ...]`, the input.
        head_dim: K.
        segments: `[B, T]`, see `nirvana.ops`.
        cu_seqlens: `[samples + 1]`, see `nirvana.ops`.

    Returns:
        True if they do.
    """
    if not suits_kernels(x) or x.shape[1] == 1:
        return False
    return head_dim in HEAD_DIMS and (segments is None or cu_seqlens is not None)


def linear_branch_fits(
    qkv: Tensor,
    conv_weight: Tensor | None,
    head_dim: int,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
) -> bool:
    """Whether the kernels of `linear_branch` take a call; arguments as of `branch_fits`.

    They have no gradient of the convolution's state before packed samples.
    """
    if conv_weight is not None:
        learned = conv_state is not None and conv_state.requires_grad and torch.is_grad_enabled()
        if conv_weight.shape[1] != CONV_WIDTH or (learned and segments is not None):
            return False
    return branch_fits(qkv, head_dim, segments, cu_seqlens)


def low_rank_fits(qkv: Tensor, low_rank: Tensor, up: Tensor) -> bool:
    """Whether the kernel of `add_low_rank` takes a call; the arguments are its own.

    It has no gradient: without a past `window_branch` adds the terms, and computes theirs.
    """
    learned = any(x.requires_grad for x in (qkv, low_rank, up)) and torch.is_grad_enabled()
    return suits_kernels(qkv) and qkv.shape[1] > 1 and up.ndim == 3 and not learned


def sink_attention_fits(
    q: Tensor,
    sinks: int,
    window: int,
    segments: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> bool:
    """Whether the kernels of `sink_attention` take a call; arguments as of `branch_fits`, and the
    mask and the number of sinks."""
    sizes = window >= LEAST_WINDOW and sinks <= MAX_SINKS and mask is None
    return sizes and branch_fits(q, q.shape[-1], segments, cu_seqlens)


def trigger_fits(x: Tensor) -> bool:
    """Whether the Trigger's kernels take tokens x `[..., T, C]`.

    For a single token the products of PyTorch are faster.
    """
    return suits_kernels(x) and x.shape[-2] > 1 and x.shape[-1] <= MAX_TASK_DIM


def swiglu_fits(x: Tensor) -> bool:
    """Whether the kernels of `swiglu` compute it for x `[..., 2 F]`.

    Without a gradient a compiler does as well, and fuses SwiGLU with its neighbours.
    """
    return suits_kernels(x) and x.requires_grad


def cross_entropy_fits(h: Tensor) -> bool:
    """Whether a loss over chunks of logits is compiled: on a GPU, in any dtype."""
    return h.is_cuda
