"""Decoding with a CUDA graph: states at fixed addresses, a whole step replayed by the device.

    decoder = Decoder(model)
    logits = decoder.prefill(prompt)              # [B, vocab_size], any length, bounded memory
    for _ in range(100):
        logits = decoder.step(logits.argmax(-1, keepdim=True))

A `Decoder` is also a cache of the library:

    model.generate(prompt, past_key_values=Decoder(model))
"""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.cuda_graphs import record
from nirvana.generate.fused_step import FusedStep
from nirvana.model.cache import StepDecoder
from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.state import SLOTS

PREFILL_CHUNK = 32768
"""Tokens of a piece of the prompt; the memory of a prefill grows with it, not with the prompt."""


class _States:
    """One layer's states, with the methods of the library's cache that a layer calls."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.conv: Tensor | None = None  # [B, (H + 2 G) K, width - 1]
        self.delta: Tensor | None = None  # [B, H, K, K]
        self.memory: Tensor | None = None  # [B, 4, R]
        self.sinks: Tensor | None = None  # [B, 2 G K, num_sinks]
        self.keys: Tensor | None = None  # [B, G, slots, K]
        self.values: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return getattr(self, SLOTS[state_idx])

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None:
        return self.delta


class _PrefillStates(_States):
    """States of a text that is read in pieces; each update replaces them, with keys in order."""

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0) -> None:
        # A view of inputs would keep the piece's projections alive.
        setattr(self, SLOTS[state_idx], x.clone())

    def update_recurrent_state(self, x: Tensor, layer_idx: int) -> None:
        self.delta = x

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        kept = slice(None) if self.window is None else slice(1 - self.window, None)
        self.keys, self.values = keys[:, :, kept].clone(), values[:, :, kept].clone()
        return keys, values


class _DecodeStates(_States):
    """States of tokens that are read one by one, updated in place. Keys are in a ring buffer, token
    t in slot t modulo its length; attention is invariant to that order (rotary keys are rotated
    before they are stored)."""

    def __init__(self, read: _PrefillStates, length: int, slots: int, slot: Tensor) -> None:
        super().__init__(read.window)
        assert read.conv is not None
        assert read.delta is not None
        self.slot = slot  # of the next token, [1]
        self.conv, self.delta = read.conv.contiguous(), read.delta.contiguous()
        self.memory = None if read.memory is None else read.memory.contiguous()
        self.sinks = None if read.sinks is None else read.sinks.contiguous()
        if read.keys is not None and read.values is not None:
            kept = read.keys.shape[2]
            filled = torch.arange(length - kept, length, device=slot.device) % slots
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], slots, x.shape[3]).index_copy_(2, filled, x)
                for x in (read.keys, read.values)
            )

    def refill(self, other: "_DecodeStates") -> None:
        """Copies the values of `other` to the addresses that a graph reads."""
        for name in (*SLOTS, "delta", "keys", "values"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(getattr(other, name))

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0) -> None:
        mine = getattr(self, SLOTS[state_idx])
        assert mine is not None
        mine.copy_(x)

    def update_recurrent_state(self, x: Tensor, layer_idx: int) -> None:
        assert self.delta is not None
        self.delta.copy_(x)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.slot, keys)
        self.values.index_copy_(2, self.slot, values)
        return self.keys, self.values


def _block(
    block: nn.Module, h: Tensor, fast: Tensor, bank: nn.Module, masks: Masks, states: _States
) -> tuple[Tensor, Tensor]:
    # block(...) may be compiled for training.
    return block.forward(h, fast, bank, masks, states)


def _head(model: Any, h: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(h[:, -1]))


class Decoder(StepDecoder):
    """Reads a prompt, then token after token, each step one replayed CUDA graph: of the kernels of
    `FusedStep` where they fit, else of the compiled blocks.

    On a CPU, and with `compiled=False`, it computes the same without graph and compilation.

    Args:
        model: a `NirvanaForCausalLM` with a linear branch in every layer; its weights may change
            between texts, in place.
        max_length: for a model without a window, the largest length of prompt and continuation.
        compiled: compile the steps, and the pieces of a prompt that are `PREFILL_CHUNK` long.

    Raises:
        ValueError: for a model without a window, if there is no `max_length`.
    """

    def __init__(self, model: Any, max_length: int | None = None, compiled: bool = True) -> None:
        super().__init__(layers=[])
        if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
            raise ValueError(
                "a Decoder reads the weights alone, not hooks such as those of task parameters: "
                "generate with the library's cache"
            )
        config: NirvanaConfig = model.config
        slots = config.sliding_window or max_length
        if slots is None:
            raise ValueError("a model without a window needs max_length: room for all its keys")
        self.model, self.config, self.slots = model, config, slots
        self.compiled = compiled and model.device.type == "cuda"
        self.length = 0
        self.kind: tuple[int, ...] = ()  # batch size and enabled Triggers of states and graph
        self.states: list[_DecodeStates] = []
        self.fused: FusedStep | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens read so far; `layer_idx` has no effect."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not supported: a `Decoder` does not move rows.

        Raises:
            ValueError: always.
        """
        raise ValueError("a Decoder has one continuation a row: search beams with another cache")

    def crop(self, tokens: int) -> None:
        """Not supported: a recurrent state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a Decoder cannot forget its last tokens: read the text again")

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Discards the states and reads a prompt.

        Args:
            tokens: `[B, T]`, int64.

        Returns:
            logits of the last token, `[B, vocab_size]`.

        Raises:
            ValueError: for a model without a window, if the prompt leaves no room for a token.
        """
        length = tokens.shape[1]
        if self.config.sliding_window is None and length >= self.slots:
            raise ValueError(f"a text of {length} tokens needs a max_length above {length}")
        blocks = self.model.model.layers
        states = [_PrefillStates(self.config.sliding_window) for _ in blocks]
        h = None
        for first in range(0, length, PREFILL_CHUNK):
            piece = tokens[:, first : first + PREFILL_CHUNK]
            whole = self.compiled and piece.shape[1] == PREFILL_CHUNK
            positions = torch.arange(first, first + piece.shape[1], device=tokens.device)
            masks = _no_masks(positions[None])
            h = self._run(piece, masks, states, _compiled_block() if whole else _block)
        self._keep(states, length, tokens.shape[0])
        assert h is not None
        return _head(self.model, h)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Reads one more token of each row.

        Args:
            token: `[B, 1]`, int64.

        Returns:
            its logits, `[B, vocab_size]`, which the next step overwrites.

        Raises:
            ValueError: for another number of tokens or rows, before any prompt, and after
                `max_length` tokens.
        """
        if self.length == 0 or token.shape != self.token.shape:
            rows = self.token.shape[0] if self.length else "a text that was read:"
            raise ValueError(f"a step reads one token for {rows} rows, not {tuple(token.shape)}")
        if self.config.sliding_window is None and self.length >= self.slots:
            raise ValueError(f"all of max_length = {self.slots} tokens are read")
        self.token.copy_(token)
        self.length += 1
        if not self.compiled:
            return self._step()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.logits

    def read(self, tokens: Tensor) -> Tensor:
        """Reads tokens: with `prefill` if nothing was read, else with a `step` each.

        Args:
            tokens: `[B, T]`, int64.

        Returns:
            logits of the last token, `[B, vocab_size]`, which the next step overwrites.

        Raises:
            ValueError: for T = 0.
        """
        if tokens.shape[1] == 0:
            raise ValueError("a Decoder that has read all of this text needs a new token")
        if self.length == 0:
            return self.prefill(tokens)
        for token in tokens.split(1, dim=1):
            logits = self.step(token)
        return logits

    def _run(
        self, tokens: Tensor, masks: Masks, states: list[Any], block: Callable[..., Any]
    ) -> Tensor:
        trunk = self.model.model
        h = trunk.embed_tokens(tokens)
        fast = trunk.bank.start(h)
        # Blocks of both kinds, with and without a past, of any number of models share this code.
        with torch._dynamo.config.patch(recompile_limit=256):
            for layer, state in zip(trunk.layers, states, strict=True):
                h, fast = block(layer, h, fast, trunk.bank, masks, state)
        return h

    def _keep(self, read: list[_PrefillStates], length: int, batch: int) -> None:
        """Copies the states of the prompt to the addresses that the steps update."""
        device = self.model.device
        triggers = [layer.updater for layer in self.model.model.layers if layer.updater.has_trigger]
        kind = (batch, *(updater.trigger.enabled for updater in triggers))
        if self.kind != kind:  # a recorded graph is for one kind
            self.kind = kind
            self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.slot = torch.zeros(1, dtype=torch.long, device=device)
            self.count = torch.zeros(1, dtype=torch.long, device=device)
            self.states, self.fused, self.graph = [], None, None
        self.count.fill_(length)
        self.slot.fill_(length % self.slots)
        new = [_DecodeStates(state, length, self.slots, self.slot) for state in read]
        if self.states:
            for mine, other in zip(self.states, new, strict=True):
                mine.refill(other)
        else:
            self.states = new
            if self.compiled and FusedStep.fits(self.model, batch):
                self.fused = FusedStep(self.model, new, self.count)
        if self.fused is not None:
            self.fused.refresh()
        self.length = length

    def _step(self) -> Tensor:
        if self.fused is not None:
            logits = self.fused(self.token)
        else:
            masks = _no_masks(self.count[None])
            slots = torch.arange(self.slots, device=self.count.device)
            masks["window"] = (slots <= self.count)[None, None, None]
            block = _compiled_block() if self.compiled else _block
            logits = _head(self.model, self._run(self.token, masks, self.states, block))
        self.count += 1
        self.slot.copy_(self.count % self.slots)
        return logits

    def _capture(self) -> None:
        """Compiles and records a step, and restores the states that this changed."""
        count, slot, states = deepcopy((self.count, self.slot, self.states))
        self.graph, self.logits = record(self._step, self.model.device, warmups=3)
        for state, old in zip(self.states, states, strict=True):
            state.refill(old)
        self.count.copy_(count)
        self.slot.copy_(slot)


def _no_masks(positions: Tensor) -> Masks:
    names = ("segments", "cu_seqlens", "lengths", "window")
    return {"positions": positions, "index": positions, **dict.fromkeys(names)}


@lru_cache(maxsize=1)
def _compiled_block() -> Callable[..., Any]:
    """One compiled function for all models; blocks of one kind share the code."""
    return torch.compile(_block, dynamic=False, fullgraph=True)
