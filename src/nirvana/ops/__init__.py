"""The operations of Nirvana: one public function each, backends behind it.

The backend is chosen per call by the device of the tensors, never at import; `backend=` overrides
the choice (tests compare `reference` with `chunked`). Whatever the model's dtype, the recurrences
and the Trigger compute in float32 (float64 stays float64) and return the dtype they were given.

`segments` tells samples apart within one row: an integer `[B, T]` that grows by one wherever a new
sample starts. No state crosses such a border. A state handed in belongs to segment 0; the state
handed back belongs to the last token's segment. None means that the whole row is segment 0.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from nirvana.ops import chunked, reference

BACKENDS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}

MIN_LOG_ALPHA = -40.0
"""Forgets everything (exp of it is below float64's rounding); backends sum log_alpha over a chunk,
and a larger sum would swallow the small decays that follow."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Inside the block autocast is off; costs nothing where it was off before."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule (Yang et al., arXiv 2412.06464), causal along T.

        S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T ;   o_t = S_t q_t / sqrt(K)

    Args:
        q, k: `[B, T, H, K]`; k (and usually q) of unit length along K.
        v: `[B, T, H, V]`.
        log_alpha: `[B, T, H]`, logarithm of the decay, <= 0.
        beta: `[B, T, H]`, write strength in 0..1.
        state: `[B, H, K, V]`, the transpose of S before the first token; None means zero.
        segments: see the module.

    Returns: o `[B, T, H, V]` in v's dtype and the state after the last token, `[B, H, K, V]`.
    """
    with no_autocast(q.device):
        log_alpha = at_least_float32(log_alpha).clamp(min=MIN_LOG_ALPHA)
        o, last = _backend(backend).gated_delta_rule(
            *(at_least_float32(x) for x in (q, k, v, log_alpha, beta)), state, segments
        )
    return o.to(v.dtype), last


def causal_conv(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

        y_t = silu(sum_j weight[:, j] x_{t - width + 1 + j})

    Args:
        x: `[B, T, D]`.
        weight: `[D, width]`; the last column meets the token itself.
        state: `[B, D, width - 1]`, the inputs before the first token; None means zero.

    Returns: y `[B, T, D]` and the last inputs, `[B, D, width - 1]`.
    """
    y, last = _backend(backend).causal_conv(x, at_least_float32(weight), state, segments)
    return y.to(x.dtype), last


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal softmax attention within a window, scale 1/sqrt(K).

    A token sees itself and the `window - 1` tokens before it; None means all before it.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, S, H, K]`; the last T of them are the queries' own, those before are the past.
        segments: see the module; only where S = T.

    Returns: `[B, T, H, K]`.

    Raises:
        ValueError: for segments where S differs from T.
    """
    if segments is not None and k.shape[1] != q.shape[1]:
        raise ValueError("segments tell new tokens apart, not those of the past")
    return _backend(backend).window_attention(q, k, v, window, segments)


def decayed_sum(
    g: Tensor,
    decay: Tensor | float,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The memory along the sample, m_t = decay m_{t-1} + g_t.

    Args:
        g: `[B, T, F]`.
        decay: one number in 0..1.
        state: m before the first token `[B, F]`; None means zero.

    Returns: m `[B, T, F]` and its last row `[B, F]`.
    """
    with no_autocast(g.device):
        return _backend(backend).decayed_sum(at_least_float32(g), decay, state, segments)


def _backend(name: str | None) -> ModuleType:
    if name is None:
        return chunked
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
