"""Decoding as one graph: the states in fixed places, a whole step replayed by the device.

    decoder = Decoder(model)
    logits = decoder.prefill(prompt)              # [B, vocab_size], any length, bounded memory
    for _ in range(100):
        logits = decoder.step(logits.argmax(-1, keepdim=True))

A `Decoder` is a cache of the library, too:

    model.generate(prompt, past_key_values=Decoder(model))
"""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.one_token import OneToken

PREFILL_CHUNK = 32768
"""Tokens read at once; what a prefill holds beside the weights grows with it, not with the text."""


class _States:
    """One layer's states, under the methods of the library's cache that a layer calls."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.conv: Tensor | None = None  # [B, 3 D, width - 1]
        self.delta: Tensor | None = None  # [B, H, K, K]
        self.memory: Tensor | None = None  # [B, 4, R]
        self.keys: Tensor | None = None  # [B, H, places, K]
        self.values: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.memory if state_idx else self.conv

    def get_recurrent_state(self, layer_idx: int) -> Tensor | None:
        return self.delta


class _Reading(_States):
    """States of a text that is read in pieces: each replaces the one before, keys in order."""

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0) -> None:
        if state_idx:
            self.memory = x
        else:
            self.conv = x.clone()  # not a view, which would keep the piece's projections alive

    def update_recurrent_state(self, x: Tensor, layer_idx: int) -> None:
        self.delta = x

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        kept = slice(None) if self.window is None else slice(1 - self.window, None)
        self.keys, self.values = keys[:, :, kept].clone(), values[:, :, kept].clone()
        return keys, values


class _Writing(_States):
    """States of tokens that come one by one, written in place. Keys lie in a ring: token t at place
    t modulo its length, which attention without order may do (rotary keys carry their own)."""

    def __init__(self, read: _Reading, length: int, places: int, place: Tensor) -> None:
        super().__init__(read.window)
        assert read.conv is not None
        assert read.delta is not None
        self.place = place  # of the token that comes next, [1]
        self.conv, self.delta = read.conv.contiguous(), read.delta.contiguous()
        self.memory = None if read.memory is None else read.memory.contiguous()
        if read.keys is not None and read.values is not None:
            kept = read.keys.shape[2]
            slots = torch.arange(length - kept, length, device=place.device) % places
            self.keys, self.values = (
                x.new_zeros(*x.shape[:2], places, x.shape[3]).index_copy_(2, slots, x)
                for x in (read.keys, read.values)
            )

    def refill(self, other: "_Writing") -> None:
        """Takes over the values of `other`; a graph goes on reading them here."""
        for name in ("conv", "delta", "memory", "keys", "values"):
            mine = getattr(self, name)
            if mine is not None:
                mine.copy_(getattr(other, name))

    def update_conv_state(self, x: Tensor, layer_idx: int, state_idx: int = 0) -> None:
        mine = self.memory if state_idx else self.conv
        assert mine is not None
        mine.copy_(x)

    def update_recurrent_state(self, x: Tensor, layer_idx: int) -> None:
        assert self.delta is not None
        self.delta.copy_(x)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


def _block(
    block: nn.Module, h: Tensor, fast: Tensor, bank: nn.Module, masks: Masks, states: _States
) -> tuple[Tensor, Tensor]:
    # Not block(...): that may be compiled for training.
    return block.forward(h, fast, bank, masks, cache=states)


def _head(model: Any, h: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(h[:, -1]))


class Decoder(Cache):
    """Reads a text and then token after token, each step one replayed CUDA graph: for one text of
    the kernels of `OneToken` where they fit, else of the compiled blocks.

    On a CPU, and with `compiled=False`, the same without graph and compilation.

    Args:
        model: a `NirvanaForCausalLM`; its weights may change between texts, in place.
        max_length: without a window, the most tokens that text and continuation have together.
        compiled: compile the steps, and the pieces of a text that are `PREFILL_CHUNK` long.
    """

    def __init__(self, model: Any, max_length: int | None = None, compiled: bool = True) -> None:
        super().__init__(layers=[])
        config: NirvanaConfig = model.config
        places = config.sliding_window or max_length
        if places is None:
            raise ValueError("a model without a window needs max_length: room for all its keys")
        self.model, self.config, self.places = model, config, places
        self.compiled = compiled and model.device.type == "cuda"
        self.length = 0
        self.kind: tuple[int, ...] = ()  # of texts that the states and the graph are for
        self.states: list[_Writing] = []
        self.one: OneToken | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: rows stay where they are.

        Raises:
            ValueError: always.
        """
        raise ValueError("a Decoder has one continuation a row: search beams with another cache")

    def crop(self, tokens: int) -> None:
        """Refused: a state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a Decoder cannot forget its last tokens: read the text again")

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Forgets what was before and reads `[B, T]`; logits of the last token, `[B, V]`.

        Raises:
            ValueError: for a text that leaves no room for a token (without a window).
        """
        length = tokens.shape[1]
        if self.config.sliding_window is None and length >= self.places:
            raise ValueError(f"a text of {length} tokens needs a max_length above {length}")
        blocks = self.model.model.layers
        states = [_Reading(self.config.sliding_window) for _ in blocks]
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
        """Reads one more token of each row, `[B, 1]`; its logits, `[B, V]`, which the next step
        overwrites.

        Raises:
            ValueError: for another number of tokens or rows, before any text, and where
                `max_length` tokens are read.
        """
        if self.length == 0 or token.shape != self.token.shape:
            rows = self.token.shape[0] if self.length else "a text that was read:"
            raise ValueError(f"a step reads one token for {rows} rows, not {tuple(token.shape)}")
        if self.config.sliding_window is None and self.length >= self.places:
            raise ValueError(f"all of max_length = {self.places} tokens are read")
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
        """`prefill` where nothing was read, else `step` by `step`: logits of the last token.

        Raises:
            ValueError: when there is nothing new to read.
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
        # Blocks of two kinds, with and without a past, of any number of models: all share the code.
        with torch._dynamo.config.patch(recompile_limit=256):
            for layer, state in zip(trunk.layers, states, strict=True):
                h, fast = block(layer, h, fast, trunk.bank, masks, state)
        return h

    def _keep(self, read: list[_Reading], length: int, batch: int) -> None:
        """Moves the states of the text to where the steps write them."""
        device = self.model.device
        triggers = [layer.updater for layer in self.model.model.layers if layer.updater.has_trigger]
        kind = (batch, *(updater.trigger.enabled for updater in triggers))
        if self.kind != kind:  # what a graph has recorded does not change with them
            self.kind = kind
            self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
            self.place = torch.zeros(1, dtype=torch.long, device=device)
            self.count = torch.zeros(1, dtype=torch.long, device=device)
            self.states, self.one, self.graph = [], None, None
        self.count.fill_(length)
        self.place.fill_(length % self.places)
        new = [_Writing(state, length, self.places, self.place) for state in read]
        if self.states:
            for mine, other in zip(self.states, new, strict=True):
                mine.refill(other)
        else:
            self.states = new
            if self.compiled and OneToken.fits(self.model, batch):
                self.one = OneToken(self.model, new, self.count)
        if self.one is not None:
            self.one.refresh()
        self.length = length

    def _step(self) -> Tensor:
        if self.one is not None:
            logits = self.one(self.token)
        else:
            masks = _no_masks(self.count[None])
            places = torch.arange(self.places, device=self.count.device)
            masks["window"] = (places <= self.count)[None, None, None]
            block = _compiled_block() if self.compiled else _block
            logits = _head(self.model, self._run(self.token, masks, self.states, block))
        self.count += 1
        self.place.copy_(self.count % self.places)
        return logits

    def _capture(self) -> None:
        """Compiles and records a step, and puts back what that changed."""
        count, place, states = deepcopy((self.count, self.place, self.states))
        device = self.model.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.logits = self._step()
        for state, old in zip(self.states, states, strict=True):
            state.refill(old)
        self.count.copy_(count)
        self.place.copy_(place)


def _no_masks(positions: Tensor) -> Masks:
    return {"segments": None, "cu_seqlens": None, "window": None, "positions": positions}


@lru_cache(maxsize=1)
def _compiled_block() -> Callable[..., Any]:
    """One compiled function for all models: the blocks of a kind share the code."""
    return torch.compile(_block, dynamic=False, fullgraph=True)
