"""Generation by a decoder in place of the library's cache, where the package has a faster one."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin

from nirvana.model.cache import CACHE_FIELD, StepDecoder
from nirvana.model.masks import Masks

READ = {CACHE_FIELD, "attention_mask", "position_ids", "logits_to_keep", "use_cache"}
"""The arguments of the forward that a `StepDecoder` reads, or that do not change what it gives."""


class DecoderGenerationMixin(GenerationMixin):
    """The library's `generate`, which reads through a `StepDecoder` in place of the dynamic cache
    that it would make.

    Attributes:
        decoder_for: makes a decoder from a model and the largest length of a text, or returns None
            for the library's cache. The package sets it; None means always the library's.
    """

    decoder_for: ClassVar[Callable[[Any, int], StepDecoder | None] | None] = None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Puts the cache of a call of `generate` into `model_kwargs`. The library calls this by its
        name, and has it expand the prompts before."""
        given = model_kwargs.get(CACHE_FIELD) is not None
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache, make = model_kwargs.get(CACHE_FIELD), type(self).decoder_for
        if given or make is None or type(cache) is not DynamicCache or cache.offloading:
            return result
        # A caller who receives the cache may want to copy it or to go on without `generate`.
        returned = generation_config.return_dict_in_generate
        pieces = generation_config.prefill_chunk_size is not None
        arguments = {name for name, value in model_kwargs.items() if value is not None}
        if returned or pieces or generation_config.is_assistant or not arguments <= READ:
            return result
        mask, positions = (model_kwargs.get(name) for name in ("attention_mask", "position_ids"))
        if not _is_left_padded(mask) or _has_jumps(positions, mask):
            return result
        decoder = make(self, generation_config.max_length)
        if decoder is not None:
            model_kwargs[CACHE_FIELD] = decoder
        return result


def require_decodable(
    unread: list[Any],
    position_ids: Tensor | None,
    attention_mask: Tensor | Masks | None,
    return_state: bool,
) -> None:
    """Raises for arguments that a `StepDecoder` does not read.

    Args:
        unread: arguments that must be None.
        position_ids: `[B, T]` or None.
        attention_mask: of the call.
        return_state: of the call.

    Raises:
        ValueError: for one of `unread`, for a state, and for positions of several samples.
    """
    several = return_state or any(argument is not None for argument in unread)
    if several or _has_jumps(position_ids, attention_mask):
        raise ValueError(
            "a Decoder reads one sample a row, and gives logits, not a loss and not a state"
        )


def _has_jumps(position_ids: Tensor | None, attention_mask: Tensor | Masks | None) -> bool:
    """Whether the positions of a row's text do not increase by one."""
    if position_ids is None or position_ids.shape[-1] <= 1:
        return False
    jump = position_ids.diff(dim=-1) != 1
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        # Positions of padding are any.
        jump = jump & (attention_mask[:, -jump.shape[-1] - 1 : -1] != 0)
    return bool(jump.any())


def _is_left_padded(mask: Any) -> bool:
    """Whether a mask, `[B, T]`, hides nothing but padding before each row's text."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.device.type != "cpu":
        return False
    real = mask != 0
    return bool(real[:, -1].all() and (real[:, 1:] >= real[:, :-1]).all())
