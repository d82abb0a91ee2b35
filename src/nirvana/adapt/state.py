"""The state that a sample carries from chunk to chunk, without the gradients of the last one."""

import copy
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nirvana.model.cache import in_output
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.model.state import State


def read_chunk(
    model: PreTrainedModel, tokens: Tensor, state: "State | CarriedCache | None"
) -> "tuple[Tensor, State | CarriedCache]":
    """Reads a chunk of every row, with gradients where they are enabled.

    Args:
        model: a causal language model of transformers.
        tokens: `[B, T]`.
        state: before the chunk, which stays as it is; None before the first one.

    Returns:
        logits `[B, T, vocabulary]`, and the state after the chunk, through which no gradient flows.
    """
    if isinstance(model, NirvanaForCausalLM):
        assert not isinstance(state, CarriedCache)
        output = model(tokens, state=state, return_state=True)
        assert output.state is not None
        return output.logits, output.state.detach()
    cache = CarriedCache(config=model.config) if state is None else state.detach()
    logits = model(input_ids=tokens, use_cache=True, **in_output(cache)).logits  # type: ignore[arg-type]
    return logits, cache.detach()  # type: ignore[return-value]


class CarriedCache(DynamicCache):
    """The library's dynamic cache, which a forward with gradients may update: for models of other
    architectures, which have no state as a value.

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

    def detach(self) -> "CarriedCache":
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
