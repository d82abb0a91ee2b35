"""The state that a sample carries from chunk to chunk, without the gradients of the last one."""

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache


class CarriedCache(DynamicCache):
    """The library's dynamic cache, which a forward with gradients may update.

    The library writes recurrent and convolution states in place, over values that the backward of
    the same forward needs. Here each write goes to a copy.
    """

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """See the library."""
        self._unshare("conv_states", layer_idx, state_idx)
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """See the library."""
        self._unshare("recurrent_states", layer_idx, state_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _unshare(self, kind: str, layer_idx: int, state_idx: int) -> None:
        states = getattr(self.layers[layer_idx], kind, {})
        if states.get(state_idx) is not None:
            states[state_idx] = states[state_idx].clone()

    def detached(self) -> "CarriedCache":
        """A cache with the same contents and no gradients; updating one leaves the other."""
        other = copy.copy(self)
        other.layers = [_detached(layer) for layer in self.layers]
        return other


def _detached(layer: Any) -> Any:
    """A copy of a layer of the library's cache that shares its values, but not their gradients."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(other, name, value.detach())
        elif isinstance(value, dict):
            values = {k: v.detach() if isinstance(v, Tensor) else v for k, v in value.items()}
            setattr(other, name, values)
    return other
