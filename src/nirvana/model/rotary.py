"""Rotary positions: the angles of all tokens, computed once for all layers, and their use."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana.model.config import NirvanaConfig
from nirvana.ops import at_least_float32


def rotation(config: NirvanaConfig, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The cosines and sines by which the heads of tokens turn (Su et al., arXiv 2104.09864).

    Args:
        config: of the model.
        positions: `[B, T]` or `[1, T]`.
        dtype: of the residual stream. In float64 the angles, too: only their differences matter,
            which float32 rounds.

    Returns:
        `[2, B or 1, T, 1, K / 2]`, float32 or float64; None for a model without rotary positions.
    """
    if config.rope_theta is None:
        return None
    assert config.head_dim is not None
    half, device, factor = config.head_dim // 2, positions.device, 1.0
    if config.rope_scaling is None:
        powers = -torch.arange(half, device=device, dtype=torch.float32) / half
        frequency = config.rope_theta**powers
    else:
        scaling = json.dumps({**config.rope_scaling, "rope_theta": config.rope_theta})
        frequency = _frequency(scaling, config.head_dim, str(device))
        factor = _scaled(scaling, config.head_dim, "cpu")[1]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    angle = (positions[..., None].to(precise) * frequency.to(precise))[:, :, None]
    return torch.stack([angle.cos(), angle.sin()]) * factor


def far_positions(config: NirvanaConfig, positions: Tensor, index: Tensor) -> Tensor:
    """The positions from which tokens see the sinks: as if these were next to the window.

    Args:
        config: of the model, with a window.
        positions: `[B, T]` or `[1, T]`.
        index: `[B, T]` or `[1, T]`, tokens of its sample before each token.
    """
    assert config.sliding_window is not None
    farthest = config.sliding_window + config.num_sinks - 1
    return positions - (index - farthest).clamp(min=0)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotates pairs of numbers of each head by angles that grow with the position.

    Args:
        x: `[B, T, H, K]`, K even.
        by: `[2, B or 1, T, 1, K / 2]`, see `rotation`.

    Returns:
        `[B, T, H, K]` in x's dtype.
    """
    cos, sin = by
    first, second = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


@torch.compiler.assume_constant_result
def _frequency(scaling: str, head_dim: int, device: str) -> Tensor:
    return _scaled(scaling, head_dim, device)[0]


@lru_cache(maxsize=32)
def _scaled(scaling: str, head_dim: int, device: str) -> tuple[Tensor, float]:
    """Frequencies `[K / 2]` and the factor of cosines and sines, of the library's functions.

    Computed once for a device: a copy from the host cannot be recorded in a CUDA graph.
    """
    given: dict[str, Any] = json.loads(scaling)
    original = given.get("original_max_position_embeddings", 2048)
    described = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=int(original * given["factor"]),
        rope_parameters=given,  # type: ignore[arg-type]
    )
    compute: Callable[..., tuple[Tensor, float]] = ROPE_INIT_FUNCTIONS[given["rope_type"]]
    # Models are made on the meta device, without memory, and run in inference mode.
    with torch.inference_mode(False), torch.device("cpu"):
        frequency, factor = compute(described, torch.device("cpu"))
        return frequency.to(device), float(factor)
