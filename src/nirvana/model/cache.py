"""The library's cache: which one a model accepts, its name, and what its tokens are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from nirvana.model.config import NirvanaConfig
from nirvana.ops.chunks import is_exporting

CACHE_FIELD = next(
    field.name
    for field in fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""The name of the cache in the library's outputs: "cache" since transformers 5.24."""


def in_output(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of the library's outputs."""
    return {CACHE_FIELD: cache}


class StepDecoder(Cache, ABC):
    """A cache that computes the next token's logits itself, in place of the model's forward.

    Given as the cache of a `NirvanaForCausalLM`, it receives the tokens of every call.

    Attributes:
        length: tokens read so far.
    """

    length: int

    @abstractmethod
    def read(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Reads tokens that follow those read so far.

        Args:
            tokens: `[B, T]`, int64.
            attention_mask: of all tokens so far, 0 at padding, which is only before a row's first
                token; None means ones.

        Returns:
            logits of the last token, `[B, vocab_size]`, which the next call may overwrite.
        """


def refuse_in_export(cache: Cache) -> None:
    """Raises while `torch.export` traces.

    Args:
        cache: of any kind.

    Raises:
        ValueError: in an export.
    """
    if is_exporting():
        raise ValueError(
            f"torch.export cannot follow a {type(cache).__name__}, which is changed in place and "
            "counts its tokens outside of the graph: give state=State.start(...) and "
            "return_state=True"
        )


def usable_cache(
    config: NirvanaConfig, cache: Cache | None, past_key_values: Cache | None
) -> Cache | None:
    """Checks the cache, which is given under either of the library's names.

    A `DynamicCache()` that was made without a configuration gets the layers that the model needs.

    Args:
        config: of the model.
        cache: the cache, or None.
        past_key_values: the same under its older name, or None.

    Returns:
        the cache, or None.

    Raises:
        TypeError: if it is not a `Cache` of the library.
        ValueError: if it is given twice; for an offloaded cache, unless the model has full
            attention layers; for a cache of a model with another number of layers or another
            window; in an export.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    cache = past_key_values if cache is None else cache
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, not {type(cache).__name__}")
    refuse_in_export(cache)
    # Windows bound the cache anyway; and the library moves a layer's other states away along with
    # its keys, but returns them before the copy back has finished.
    if getattr(cache, "offloading", False) and "full_attention" not in (config.layer_types or ()):
        raise ValueError(
            "an offloaded cache is only for models with full attention layers: "
            "use the dynamic or the static cache"
        )
    if not cache.layers and isinstance(cache, DynamicCache):
        cache.layers.extend(DynamicCache(config=config).layers)
        cache.layer_class_to_replicate = None
    how = "make it with DynamicCache(config=model.config)"
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            f"the cache has {len(cache.layers)} layers, the model {config.num_hidden_layers}: {how}"
        )
    for number, (layer, kind) in enumerate(
        zip(cache.layers, config.layer_types or (), strict=True)
    ):
        recurrent = kind.startswith(("hybrid", "linear"))
        if recurrent and not isinstance(layer, LinearAttentionCacheLayerMixin):
            raise ValueError(
                f"layer {number} of the cache is a {type(layer).__name__}, which has no recurrent "
                f"state (prefix tuning has none for it either): {how}"
            )
        kept = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        if kept not in (None, config.sliding_window) and config.branches != "linear":
            raise ValueError(
                f"the cache keeps a window of {kept} tokens, the model attends to "
                f"{config.sliding_window or 'all'}: {how}"
            )
    return cache


def refuse_contents(config: NirvanaConfig, *caches: Cache | None) -> None:
    """Raises for a cache that holds tokens, where gradient checkpointing leaves caches out.

    Args:
        config: of the model.
        caches: under each of the library's names.

    Raises:
        ValueError: if the tokens would be computed as if those in the cache did not exist.
    """
    for cache in caches:
        if isinstance(cache, Cache) and cache.layers:
            past = cache.get_seq_length(config.counting_layer)
            if int(past) > 0:
                raise ValueError(
                    f"gradient checkpointing cannot read a cache, and this one holds {int(past)} "
                    "tokens: continue from a state (state=..., return_state=True)"
                )


def require_room(config: NirvanaConfig, cache: Cache, past: int, new: int) -> None:
    """Raises if a static cache has no room for new tokens.

    A static cache that is shorter than the window would drop keys that are still within it; that of
    a model without a window would be written beyond its end.

    Args:
        config: of the model.
        cache: the cache.
        past: tokens in it.
        new: tokens to add.

    Raises:
        ValueError: if `past` cached and `new` tokens do not fit.
    """
    room = getattr(cache.layers[config.counting_layer], "max_cache_len", None)
    window = config.sliding_window
    if not cache.is_compileable or room is None or config.branches == "linear":
        return
    if window is not None and room >= window:
        return
    if past + new > room:
        enough = "" if window is None else f"; {window}, the window, suffices"
        raise ValueError(
            f"the static cache has room for {room} tokens, not for {past} + {new}: give it a "
            f"larger max_cache_len{enough}"
        )


def require_rows(config: NirvanaConfig, cache: Cache, past: int, rows: int) -> None:
    """Raises if the batch has another size than the one whose states the cache holds.

    Args:
        config: of the model.
        cache: the cache.
        past: tokens in it.
        rows: of the batch.

    Raises:
        ValueError: if the numbers of rows differ.
    """
    keys = getattr(cache.layers[config.counting_layer], "keys", None) if past > 0 else None
    if keys is not None and keys.shape[0] != rows:
        raise ValueError(
            f"the cache holds {keys.shape[0]} rows, the batch has {rows}: "
            "select or repeat rows with cache.reorder_cache(row_numbers)"
        )


@dataclass(frozen=True)
class CacheContents:
    """Properties of the tokens in a cache that its states do not reveal; stored on the cache.

    Attributes:
        padding: some are padding, whose keys only the attention mask hides.
        packed: a row holds several samples; positions or sample numbers hide the keys of earlier
            ones.
        ended: a row ends with padding, which is part of its states.
    """

    padding: bool = False
    packed: bool = False
    ended: bool = False

    @classmethod
    def of(cls, cache: Cache, past: int) -> "CacheContents":
        """The contents stored on a cache that has read `past` tokens."""
        return getattr(cache, "contents", cls()) if past > 0 else cls()

    def require(self, numbered: bool, positioned: bool) -> None:
        """Raises if the arguments of a call would misread the cached tokens.

        Args:
            numbered: an attention mask with padding or numbers covers cached and new tokens.
            positioned: position ids of the new tokens are given.

        Raises:
            ValueError: if nothing hides padding or other samples, or after padding at the end.
        """
        if self.ended:
            raise ValueError("the cached tokens end with padding, which their states have read")
        if self.padding and not numbered:
            raise ValueError(
                "the cached tokens contain padding: attention_mask must cover them, [B, past + T]"
            )
        if self.packed and not (numbered or positioned):
            raise ValueError(
                "the cached tokens are packed samples: give position_ids that count within them"
            )
