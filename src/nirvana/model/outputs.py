"""The outputs of the models, and the order of their columns."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from nirvana.model.cache import CACHE_FIELD
from nirvana.model.state import State
from nirvana.model.trigger import TriggerTrace


class _CacheNamed:
    """Adds the cache's newer name to outputs where the library has only the older one."""

    if CACHE_FIELD != "cache":

        @property
        def cache(self) -> Cache | None:
            return getattr(self, CACHE_FIELD)


@dataclass
class NirvanaOutputWithPast(_CacheNamed, BaseModelOutputWithPast):
    """The library's output, `trigger`, one trace for each layer with a Trigger, and `state`."""

    trigger: tuple[TriggerTrace, ...] | None = None
    state: State | None = None


@dataclass
class NirvanaCausalLMOutputWithPast(_CacheNamed, CausalLMOutputWithPast):
    """The library's output; `trigger`, one trace for each layer with a Trigger; `state`; and
    `z_loss`, that term of the loss."""

    trigger: tuple[TriggerTrace, ...] | None = None
    state: State | None = None
    z_loss: Tensor | None = None


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Gathers columns: x `[B, T, ...]` with the columns `order`, int64 `[B, T]`."""
    # Not take_along_dim, with which an export fixes the sizes.
    return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))


def restore_order(outputs: NirvanaOutputWithPast, order: Tensor) -> None:
    """Reorders the columns of all outputs in place.

    Args:
        outputs: of the model.
        order: int64 `[B, T]`, for each place the column that belongs there.
    """
    outputs["last_hidden_state"] = reordered(outputs["last_hidden_state"], order)
    if outputs.hidden_states is not None:
        outputs["hidden_states"] = tuple(
            h if h is None else reordered(h, order)  # None where they were not selected
            for h in outputs.hidden_states
        )
    if outputs.trigger is not None:
        outputs["trigger"] = tuple(
            TriggerTrace(*(reordered(x, order) for x in trace)) for trace in outputs.trigger
        )
