"""The library's cache: which one serves a model, its name, and what its tokens are."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from nirvana.model.config import NirvanaConfig

CACHE_FIELD = next(
    field.name
    for field in fields(BaseModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""The name of the cache in the library's outputs: "cache" since transformers 5.24."""


def in_output(cache: Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of the library's outputs."""
    return {CACHE_FIELD: cache}


def usable_cache(
    config: NirvanaConfig, cache: Cache | None, past_key_values: Cache | None
) -> Cache | None:
    """The cache, given under either of the library's names for it.

    A `DynamicCache()` that was made without a configuration gets the layers that the model needs.

    Raises:
        TypeError: if it is no `Cache` of the library.
        ValueError: if it is given twice; for an offloaded cache, unless the model has full
            attention layers; for a cache of a model with another number of layers.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    cache = past_key_values if cache is None else cache
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, not {type(cache).__name__}")
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
    return cache


def require_room(config: NirvanaConfig, cache: Cache, past: int, new: int) -> None:
    """Refuses more tokens than a static cache has room for.

    A static cache that is shorter than the window forgets what the window must see; one of a model
    without a window would be written behind its end.

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
    """Refuses a batch of another size than the one whose states the cache holds.

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
    """What the tokens in a cache are, which its states do not show; stored on the cache."""

    padding: bool = False
    """Some are padding: their keys are hidden by the attention mask alone."""
    packed: bool = False
    """A row holds several samples: keys of earlier ones are hidden by positions or numbers."""
    ended: bool = False
    """A row ends with padding, which its states have read."""

    @classmethod
    def of(cls, cache: Cache, past: int) -> "CacheContents":
        """What was stored on a cache that has read `past` tokens."""
        return getattr(cache, "contents", cls()) if past > 0 else cls()

    def require(self, numbered: bool, positioned: bool) -> None:
        """Refuses what would read the cached tokens wrongly.

        Args:
            numbered: an attention mask with padding or numbers covers cached and new tokens.
            positioned: position ids of the new tokens are given.

        Raises:
            ValueError: without what hides padding or other samples, or behind padding.
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
