"""The state of a text as a value: given to a forward and returned by it, nothing written in place.

    state = None
    for tokens in text.split(256, dim=1):                 # text `[B, T]`
        out = model(tokens, state=state, return_state=True)
        state = out.state                                 # .detach() truncates the gradient here

Reading a text in chunks computes what reading it whole computes, gradients included. The library's
cache is the other way to go on with a text: it is updated in place and made for generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.cache_utils import Cache

from nirvana.model.cache import CacheContents
from nirvana.model.config import NirvanaConfig

SLOTS = ("conv", "memory", "sinks")
"""What the slots of the convolution states hold, named as in `LayerState`."""


class LayerStates(Protocol):
    """The methods by which a layer reads its states before a call and hands on those after it.

    The library's caches have them, and so have `NewStates` and the states of a `Decoder`. Slot 0 of
    the convolution states holds the inputs of the convolutions, slot 1 the Trigger's memory, slot 2
    the sinks: `SLOTS`.
    """

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None: ...

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None: ...

    def update_conv_state(self, x: Tensor, /, layer_idx: int, state_idx: int = 0) -> Any: ...

    def update_recurrent_state(self, x: Tensor, /, layer_idx: int) -> Any: ...

    def update(self, keys: Tensor, values: Tensor, /, layer_idx: int) -> tuple[Tensor, Tensor]: ...


def unshared(x: Tensor | None, states: LayerStates) -> Tensor | None:
    """A state that was read, as a tensor that gradients can be computed with.

    The library's caches overwrite their states in place, and a backward needs the former values.

    Args:
        x: the state.
        states: what it was read from.

    Returns:
        `x`, or a copy where `states` is a cache of the library and gradients are recorded.
    """
    overwritten = torch.is_grad_enabled() and isinstance(states, Cache)
    return x.clone() if x is not None and overwritten else x


@dataclass(frozen=True)
class LayerState:
    """The state of one layer; None where the layer has no such part.

    Attributes:
        conv: `[B, (H + 2 G) K, conv_size - 1]`, the last inputs of the convolutions.
        delta: `[B, H, K, K]`, the transpose of S, float32 (float64 for float64).
        memory: `[B, 4, R]`, the Trigger's m, float32 (float64 for float64).
        sinks: `[B, 2 G K, num_sinks]`, keys and values of the first tokens of the current sample.
        keys: `[B, G, n, K]`, keys of the window branch, the last token's last; n is at most W - 1
            with a window of W. Those before the current sample are not read.
        values: `[B, G, n, K]`, the values of the same tokens.
    """

    conv: Tensor | None = None
    delta: Tensor | None = None
    memory: Tensor | None = None
    sinks: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class State:
    """The state of every row of a batch after the tokens read so far, of each row's last sample.

    A pytree, whose leaves are the tensors, which all have the rows in their first dimension, None
    where a layer has no such part, and `ragged`.

    Attributes:
        layers: the states of the layers.
        position: `[B]`, int64, tokens of the current sample read so far.
        ragged: whether keys before the current sample must be hidden in some row, after padding or
            packed samples.
    """

    layers: tuple[LayerState, ...]
    position: Tensor
    ragged: bool = False

    @classmethod
    def start(
        cls,
        config: NirvanaConfig,
        rows: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        room: int = 0,
    ) -> "State":
        """The state before the first token, all zeros.

        It computes what `state=None` computes. All its shapes stay the same from chunk to chunk,
        those of the keys (W - 1) too, if the model has a window or no window branch.

        Args:
            config: of the model.
            rows: B.
            device: of the tensors.
            dtype: of the model.
            room: keys of each row, for a model without a window.

        Returns:
            the state.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        high = torch.float64 if dtype == torch.float64 else torch.float32
        room = room if config.sliding_window is None else config.sliding_window - 1
        layers = [
            LayerState(
                **{
                    name: torch.zeros(
                        [room if size is None else size for size in shape],
                        dtype=high if name in ("delta", "memory") else dtype,
                        device=device,
                    )
                    for name, shape in state_shapes(config, layer_idx, rows).items()
                }
            )
            for layer_idx in range(config.num_hidden_layers)
        ]
        position = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(tuple(layers), position, ragged=True)

    def num_bytes(self) -> int:
        """The memory of all tensors in bytes."""
        leaves = [x for x in pytree.tree_leaves(self.layers) if x is not None]
        return sum(x.numel() * x.element_size() for x in leaves)

    @property
    def rows(self) -> int:
        """B."""
        return self.position.shape[0]

    def detach(self) -> "State":
        """The same values, through which no gradient flows."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "State":
        """The state on a device."""
        return self._map(lambda x: x.to(device))

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """The states of some rows, in the order given; rows may be repeated.

        Args:
            rows: int64 `[N]`, the numbers of the rows.

        Returns:
            the state of N rows.
        """
        index = torch.as_tensor(rows, dtype=torch.long, device=self.position.device)
        return self._map(lambda x: x.index_select(0, index))

    def require(self, config: NirvanaConfig, rows: int) -> None:
        """Raises if this is not a state of a model and a batch.

        Args:
            config: of the model.
            rows: of the batch.

        Raises:
            ValueError: for another number of rows or layers, and for other shapes.
        """
        if self.rows != rows:
            raise ValueError(
                f"the state holds {self.rows} rows, the batch has {rows}: "
                "select or repeat rows with state.select(row_numbers)"
            )
        if len(self.layers) != config.num_hidden_layers:
            count = len(self.layers)
            raise ValueError(
                f"the state has {count} layers, the model {config.num_hidden_layers}: "
                "it is another model's"
            )
        for layer_idx, layer in enumerate(self.layers):
            shapes = state_shapes(config, layer_idx, rows)
            for field in fields(layer):
                x, shape = getattr(layer, field.name), shapes.get(field.name)
                if x is not None and (shape is None or not _has_shape(x, shape)):
                    raise ValueError(
                        f"{field.name} of layer {layer_idx} of the state is {list(x.shape)}, "
                        f"that of the model {shape}: the state is another model's"
                    )

    def attention_mask(self) -> Tensor:
        """Rows as if padded on the left to the longest sample: `[B, longest]`, 0 at padding."""
        longest = int(self.position.max())
        place = torch.arange(longest, device=self.position.device)
        return (place >= longest - self.position[:, None]).long()

    def to_cache(self, config: NirvanaConfig) -> DynamicCache:
        """A cache of the library that continues the samples, for generation.

        It is that of the samples padded on the left: where they differ in length, the mask of the
        tokens that follow is preceded by `attention_mask()`.

        Args:
            config: of the model.

        Returns:
            the cache; it holds copies, without gradients.
        """
        cache, longest = DynamicCache(config=config), int(self.position.max())
        with torch.no_grad():
            for layer_idx, layer in enumerate(self.layers):
                for slot, name in enumerate(SLOTS):
                    state = getattr(layer, name)
                    if state is not None:
                        cache.update_conv_state(state, layer_idx, state_idx=slot)
                if layer.delta is not None:
                    cache.update_recurrent_state(layer.delta, layer_idx)
                if layer.keys is not None and layer.values is not None:
                    first = max(0, layer.keys.shape[2] - longest)
                    keys, values = layer.keys[:, :, first:], layer.values[:, :, first:]
                    cache.update(keys, values, layer_idx)  # which concatenates
                if hasattr(cache.layers[layer_idx], "cumulative_length"):
                    cache.layers[layer_idx].cumulative_length = longest  # type: ignore[attr-defined]
        padding = bool((self.position != longest).any())
        cache.contents = CacheContents(padding=padding)  # type: ignore[attr-defined]
        return cache

    def number_of_keys(self, config: NirvanaConfig) -> int:
        """n, the keys of a row that a layer with a window branch holds; 0 without such layers."""
        keys = self.layers[config.counting_layer].keys
        return 0 if keys is None else keys.shape[2]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        return pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, self)


def state_shapes(config: NirvanaConfig, layer_idx: int, rows: int) -> dict[str, list[int | None]]:
    """The shapes of the parts of a layer's state.

    Args:
        config: of the model.
        layer_idx: of the layer.
        rows: B.

    Returns:
        the shapes by the names of `LayerState`; None is the number of keys.
    """
    H, G, K = config.head_sizes
    later = layer_idx >= config.num_prelude_layers
    shapes: dict[str, list[int | None]] = {}
    if config.branches != "window" or not later:
        shapes["conv"] = [rows, config.qkv_size, config.conv_states]
        shapes["delta"] = [rows, H, K, K]
    if config.branches != "linear" and later:
        shapes["keys"] = shapes["values"] = [rows, G, None, K]
        if config.num_sinks:
            shapes["sinks"] = [rows, 2 * G * K, config.num_sinks]
    if config.has_memory and later:
        shapes["memory"] = [rows, 4, config.bank_size]
    return shapes


def _has_shape(x: Tensor, shape: list[int | None]) -> bool:
    return x.ndim == len(shape) and all(
        size is None or n == size for n, size in zip(x.shape, shape, strict=True)
    )


class NewStates:
    """Reads one state and collects the next, with the methods of `LayerStates`.

    Args:
        config: of the model.
        state: before the chunk; None before the first one.
        lengths: `[B]`, tokens of each row, which padding follows; None without padding.
    """

    def __init__(self, config: NirvanaConfig, state: State | None, lengths: Tensor | None):
        layers = config.num_hidden_layers
        self.given, self.window, self.lengths = state, config.sliding_window, lengths
        self.before = [LayerState()] * layers if state is None else state.layers
        self.after: list[dict[str, Tensor]] = [{} for _ in range(layers)]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return getattr(self.before[layer_idx], SLOTS[state_idx])

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None:
        return self.before[layer_idx].delta

    def update_conv_state(self, x: Tensor, /, layer_idx: int, state_idx: int = 0) -> None:
        # A view would keep all of the chunk's inputs alive.
        self.after[layer_idx][SLOTS[state_idx]] = x.clone()

    def update_recurrent_state(self, x: Tensor, /, layer_idx: int) -> None:
        self.after[layer_idx]["delta"] = x

    def update(self, keys: Tensor, values: Tensor, /, layer_idx: int) -> tuple[Tensor, Tensor]:
        before, new = self.before[layer_idx], keys.shape[2]
        if before.keys is not None and before.values is not None:
            keys = torch.cat([before.keys, keys], dim=2)
            values = torch.cat([before.values, values], dim=2)
        if keys.shape[3] > 0:  # width 0 only counts tokens, for the library's cache
            self.after[layer_idx]["keys"] = self._last(keys, new)
            self.after[layer_idx]["values"] = self._last(values, new)
        return keys, values

    def _last(self, x: Tensor, new: int) -> Tensor:
        """The last W - 1 tokens without padding, of keys or values `[B, H, n + new, K]`."""
        S = x.shape[2]
        kept = S if self.window is None else min(S, self.window - 1)
        if self.lengths is None:
            return x[:, :, S - kept :].clone()
        place = torch.arange(S - new - kept, S - new, device=x.device) + self.lengths[:, None]
        place = place.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, place)

    def state_after(self, masks: dict[str, Tensor | None]) -> State:
        """The state after the chunk.

        Args:
            masks: of the chunk, see `nirvana.model.masks.create_state_masks`.

        Returns:
            the state; what no layer has updated is as before.
        """
        layers = [
            replace(before, **after) for before, after in zip(self.before, self.after, strict=True)
        ]
        positions, lengths = masks["positions"], masks["lengths"]
        assert positions is not None
        B, T = positions.shape
        position = positions.new_zeros(B) if self.given is None else self.given.position
        if lengths is not None:
            last = positions.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            position = torch.where(lengths > 0, last + 1, position)
        elif T > 0:
            position = positions[:, -1] + 1
        ragged = self.given is not None and self.given.ragged
        ragged = ragged or lengths is not None or masks["segments"] is not None
        return State(tuple(layers), position, ragged)


pytree.register_dataclass(LayerState, serialized_type_name="nirvana.model.state.LayerState")
pytree.register_dataclass(State, serialized_type_name="nirvana.model.state.State")
