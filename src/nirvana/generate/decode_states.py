"""The states of the texts that a `Decoder` reads: one allocation, written in place.

Keys are in ring buffers: token t of a text is in slot t modulo the number of slots. Attention does
not depend on that order (rotary keys are rotated before they are stored). Every text of a batch has
its own number of tokens, so that texts of different lengths need no padding among the keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nirvana.model.config import NirvanaConfig
from nirvana.model.state import SLOTS, state_shapes


@dataclass
class Place:
    """Where the layers read and write, the same for all of them.

    Attributes:
        empty: nothing was read yet, whatever the states hold.
        slot: `[B]`, int64, of the next token.
        past: `[B, n]`, int64, the slots of the last n tokens, in order; the first ones of a shorter
            text are any.
        source: `[B, slots]`, int64, which new token a slot receives, if it receives one.
        filled: `[B, slots]`, whether it does.
    """

    slot: Tensor
    empty: bool = True
    past: Tensor | None = None
    source: Tensor | None = None
    filled: Tensor | None = None

    def step(self) -> None:
        """From now on, one token of each text is read at a time."""
        self.empty, self.past, self.source, self.filled = False, None, None, None

    def piece(self, count: Tensor, new: Tensor, past: int, slots: int) -> None:
        """The next call reads a piece of the prompts.

        Args:
            count: `[B]`, tokens of each text read so far.
            new: `[B]`, tokens of each text in the piece.
            past: n, tokens of the longest text that the piece sees.
            slots: of the ring buffers.
        """
        order = torch.arange(-past, 0, device=count.device)
        self.past = (count[:, None] + order).clamp(min=0) % slots
        # The last token that a slot is for, among those read so far and the new ones.
        last = (count + new)[:, None] - 1
        last = last - (last - torch.arange(slots, device=count.device)) % slots
        self.filled = last >= count[:, None]
        self.source = (last - count[:, None]).clamp(min=0)


class DecodeStates:
    """One layer's states, with the methods of `LayerStates`.

    Args:
        config: of the model.
        layer_idx: of the layer.
        slots: of a ring buffer.
        place: shared by the layers; the caller keeps it up to date.
        like: a tensor of the model's dtype and device.

    Attributes:
        conv: `[B, (H + 2 G) K, conv_size - 1]`.
        delta: `[B, H, K, K]`, float32 (float64 for float64).
        memory: `[B, 4, R]` in the same dtype, or None.
        sinks: `[B, 2 G K, num_sinks]`, or None.
        keys: `[B, G, slots, K]`, or None.
        values: `[B, G, slots, K]`, or None.
        keys_values: both, `[2, B, G, slots, K]`, or None.
    """

    def __init__(
        self, config: NirvanaConfig, layer_idx: int, slots: int, place: Place, like: Tensor
    ) -> None:
        self.place, self.slots = place, slots
        shapes = state_shapes(config, layer_idx, place.slot.numel())
        if "keys" in shapes:
            shapes["keys_values"] = [2, *shapes["keys"]]
        high = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name in (*SLOTS, "delta", "keys_values"):
            dtype, state = high if name in ("delta", "memory") else like.dtype, None
            if name in shapes:
                sizes = [slots if size is None else size for size in shapes[name]]
                state = like.new_zeros(sizes, dtype=dtype)
            setattr(self, name, state)
        both = self.keys_values
        self.keys, self.values = (None, None) if both is None else both

    conv: Tensor | None
    delta: Tensor | None
    memory: Tensor | None
    sinks: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    keys_values: Tensor | None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.place.empty else getattr(self, SLOTS[state_idx])

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None:
        return None if self.place.empty else self.delta

    def update_conv_state(self, x: Tensor, /, layer_idx: int, state_idx: int = 0) -> None:
        state = getattr(self, SLOTS[state_idx])
        assert state is not None
        state.copy_(x)

    def update_recurrent_state(self, x: Tensor, /, layer_idx: int) -> None:
        assert self.delta is not None
        self.delta.copy_(x)

    def update(self, keys: Tensor, values: Tensor, /, layer_idx: int) -> tuple[Tensor, Tensor]:
        if keys.shape[3] == 0:  # only counts tokens, for the library's cache
            return keys, values
        assert self.keys is not None
        assert self.values is not None
        return self._extended(self.keys, keys), self._extended(self.values, values)

    def reorder(self, rows: Tensor) -> None:
        """Replaces the texts by those of the given rows, `[B]`."""
        for name in (*SLOTS, "delta", "keys", "values"):
            state = getattr(self, name)
            if state is not None:
                state.copy_(state.index_select(0, rows))

    def _extended(self, ring: Tensor, new: Tensor) -> Tensor:
        """Writes new keys or values `[B, G, T, K]` to a ring buffer; gives what they attend to."""
        place, shape = self.place, new.shape
        if place.past is None or place.source is None or place.filled is None:
            slot = place.slot[:, None, None, None].expand(*shape[:2], 1, shape[3])
            ring.scatter_(2, slot, new.to(ring.dtype))
            return ring.to(new.dtype)
        seen = new
        if place.past.shape[1] > 0:
            past = place.past[:, None, :, None].expand(*shape[:2], -1, shape[3])
            seen = torch.cat([ring.gather(2, past).to(new.dtype), new], dim=2)
        source = place.source[:, None, :, None].expand_as(ring)
        ring.copy_(torch.where(place.filled[:, None, :, None], new.gather(2, source), ring))
        return seen
