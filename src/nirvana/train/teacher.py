"""The teacher of a distillation on packed documents: its attention by the operation of the models,
which needs no mask of all pairs of tokens and has kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from nirvana.model.nirvana import compile_blocks
from nirvana.ops import window_attention

ATTENTION = "nirvana"
"""The name of that attention in transformers."""
Packed = dict[str, Tensor | None]
"""`segments` and `cu_seqlens` of packed documents, see `nirvana.ops`."""


def prepare_teacher(teacher: Any) -> None:
    """Lets a teacher use the operation; it then reads packed documents only by these functions.

    Args:
        teacher: of a family that `nirvana.model.adopt` knows.
    """
    AttentionInterface.register(ATTENTION, _attend)
    teacher.set_attn_implementation(ATTENTION)


def compile_teacher(teacher: Any, hooked: bool) -> None:
    """Compiles the layers of a teacher in place.

    Args:
        teacher: of `prepare_teacher`.
        hooked: of each layer only the parts without hooks, the MLP and the norms, for
            `attention_pairs`.
    """
    layers = teacher.model.layers
    parts = ("input_layernorm", "post_attention_layernorm", "mlp")
    compile_blocks((getattr(x, part) for x in layers for part in parts) if hooked else layers)


@torch.no_grad()
def teacher_logits(teacher: Any, given: dict[str, Tensor], packed: Packed) -> Tensor:
    """The teacher's logits, `[B, T, V]`.

    Args:
        teacher: of `prepare_teacher`.
        given: `input_ids` and `position_ids`, `[B, T]`.
        packed: the borders of the documents.
    """
    return teacher(**given, **packed, use_cache=False).logits


@torch.no_grad()
def attention_pairs(
    teacher: Any, given: dict[str, Tensor], packed: Packed
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and outputs of a teacher's attention layers, each `[B, T, D]`; arguments as of
    `teacher_logits`."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(part: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        inputs.append(named["hidden_states"])
        outputs.append(output[0])

    hooks = [
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
        for layer in teacher.model.layers
    ]
    try:
        teacher.model(**given, **packed, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    return inputs, outputs


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the library's form: heads before tokens, and no weights."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return window_attention(q, k, v, sliding_window, segments, cu_seqlens), None
