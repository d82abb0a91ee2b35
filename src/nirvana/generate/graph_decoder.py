"""Decoding with a CUDA graph: states at fixed addresses, a whole step replayed by the device.

    decoder = Decoder(model)
    logits = decoder.prefill(prompts)             # [B, vocab_size], any length, bounded memory
    for _ in range(100):
        logits = decoder.step(logits.argmax(-1, keepdim=True))

A `Decoder` is also a cache of the library, for prompts of different lengths, too:

    model.generate(prompts, attention_mask=mask, past_key_values=Decoder(model))

On a CPU plain `generate` makes one by itself (`cpu_decoder`).
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.cuda_graphs import record
from nirvana.generate.cpu_step import CpuStep
from nirvana.generate.decode_states import DecodeStates, Place
from nirvana.generate.fused_step import FusedStep
from nirvana.model.cache import StepDecoder
from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks, create_state_masks
from nirvana.model.state import LayerState, State

logger = logging.getLogger(__name__)

PREFILL_CHUNK = 32768
"""Tokens of a piece of the prompts, in all rows together; the memory of a prefill grows with it,
not with the prompts."""


def _block(
    block: nn.Module, h: Tensor, fast: Tensor, bank: nn.Module, masks: Masks, states: DecodeStates
) -> tuple[Tensor, Tensor]:
    # block(...) may be compiled for training.
    return block.forward(h, fast, bank, masks, states)


def _head(model: Any, h: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(h[:, -1]))


class Decoder(StepDecoder):
    """Reads prompts, then token after token of each, each step one replayed CUDA graph: of the
    kernels of `FusedStep` where they fit, else of the compiled blocks.

    On a CPU, and with `compiled=False`, it computes the same without graph and compilation; on a
    CPU by `CpuStep` where that takes the model.

    Args:
        model: a `NirvanaForCausalLM` with a linear branch in every layer; its weights may change
            between texts, in place.
        max_length: the largest length of prompt and continuation. A model without a window needs
            it; with a window, a smaller number saves the memory of the keys beyond it.
        compiled: compile the steps, and of prompts in several pieces those that are `PREFILL_CHUNK`
            long.

    Raises:
        ValueError: for a model without a window, if there is no `max_length`.
    """

    def __init__(self, model: Any, max_length: int | None = None, compiled: bool = True) -> None:
        super().__init__(layers=[])
        if has_hooks(model):
            raise ValueError(
                "a Decoder reads the weights alone, not hooks such as those of task parameters: "
                "generate with the library's cache"
            )
        config: NirvanaConfig = model.config
        limits = [size for size in (config.sliding_window, max_length) if size is not None]
        if not limits:
            raise ValueError("a model without a window needs max_length: room for all its keys")
        self.model, self.config, self.slots = model, config, min(limits)
        self.max_length = max_length
        self.compiled = compiled and model.device.type == "cuda"
        self.length = 0
        self.kind: tuple[int, ...] = ()  # batch size and enabled Triggers of states and graph
        self.states: list[DecodeStates] = []
        self.fused: FusedStep | CpuStep | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens of the longest text read so far; `layer_idx` has no effect."""
        return self.length

    @torch.no_grad()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replaces the texts by those of other rows, as a search with beams does.

        Args:
            beam_idx: int64 `[B]`, the row whose text each row goes on with.
        """
        for state in self.states:
            state.reorder(beam_idx)
        for numbers in (self.count, self.place.slot):
            numbers.copy_(numbers[beam_idx])
        if isinstance(self.fused, CpuStep):
            self.fused.reorder(beam_idx)

    def crop(self, tokens: int) -> None:
        """Not supported: a recurrent state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a Decoder cannot forget its last tokens: read the text again")

    @torch.no_grad()
    def prefill(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Discards the states and reads a prompt of each row.

        Args:
            tokens: `[B, T]`, int64.
            attention_mask: `[B, T]`, 0 at padding before a row's prompt, else 1; None means ones.

        Returns:
            logits of the last token of each row, `[B, vocab_size]`.

        Raises:
            ValueError: if the prompt leaves no room for a token within `max_length`; for padding
                that is not before the prompt, and for a row of padding alone.
        """
        B, T = tokens.shape
        if self.max_length is not None and self.max_length <= T:
            raise ValueError(f"a text of {T} tokens needs a max_length above {T}")
        tokens, lengths = _shifted(tokens, attention_mask)
        self._begin(B)
        size = max(1, PREFILL_CHUNK // B)
        last = None
        for first in range(0, T, size):
            piece = tokens[:, first : first + size]
            new = torch.full_like(self.count, piece.shape[1])
            if lengths is not None:
                new = (lengths - first).clamp(min=0, max=piece.shape[1])
            window = self.config.sliding_window
            past = first if window is None else min(first, window - 1)
            masks = self._piece_masks(piece, first, past, None if lengths is None else new)
            self.place.piece(self.count, new, past, self.slots)
            # A single piece ends sooner than its compilation, which a batch size needs of its own.
            whole = self.compiled and lengths is None and piece.shape[1] == size < T
            h = self._run(piece, masks, _compiled_block() if whole else _block)
            end = h.take_along_dim((new - 1).clamp(min=0)[:, None, None], dim=1)
            last = end if last is None else torch.where((new > 0)[:, None, None], end, last)
            self.place.empty = False
            self.count += new
        self.place.step()
        self.place.slot.copy_(self.count % self.slots)
        self.length = T
        if isinstance(self.fused, CpuStep):
            self.fused.load()
        assert last is not None
        return _head(self.model, last)

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
        if self.max_length is not None and self.length >= self.max_length:
            raise ValueError(f"all of max_length = {self.max_length} tokens are read")
        self.token.copy_(token)
        self.length += 1
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def read(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Reads tokens: with `prefill` if nothing was read, else with a `step` each.

        Args:
            tokens: `[B, T]`, int64.
            attention_mask: of `prefill`; of tokens that follow, all ones.

        Returns:
            logits of the last token, `[B, vocab_size]`, which the next step overwrites.

        Raises:
            ValueError: for T = 0, and for padding between or behind tokens.
        """
        if tokens.shape[1] == 0:
            raise ValueError("a Decoder that has read all of this text needs a new token")
        if self.length == 0:
            return self.prefill(tokens, attention_mask)
        # Behind a prompt the library hands in one token a call, and a look would wait for the GPU.
        if attention_mask is not None and tokens.shape[1] > 1:
            _require_no_padding(attention_mask[:, -tokens.shape[1] :])
        for token in tokens.split(1, dim=1):
            logits = self.step(token)
        return logits

    def _run(self, tokens: Tensor, masks: Masks, block: Callable[..., Any]) -> Tensor:
        trunk = self.model.model
        h = trunk.embed_tokens(tokens)
        fast = trunk.bank.start(h)
        # Blocks of both kinds, with and without a past, of any number of models share this code.
        with torch._dynamo.config.patch(recompile_limit=256):
            for layer, state in zip(trunk.layers, self.states, strict=True):
                h, fast = block(layer, h, fast, trunk.bank, masks, state)
        return h

    def _begin(self, batch: int) -> None:
        """Forgets all texts. For another kind of batch it allocates the states, and records a step
        on them while they hold nothing that this could spoil."""
        device = self.model.device
        triggers = [layer.updater for layer in self.model.model.layers if layer.updater.has_trigger]
        kind = (batch, *(updater.trigger.enabled for updater in triggers))
        if self.kind != kind:
            self.states, self.fused, self.graph = [], None, None
            self.kind = ()  # until all of it is there
            numbers = torch.zeros(3, batch, dtype=torch.long, device=device)
            self.token, self.count = numbers[0, :, None], numbers[1]
            self.place = Place(slot=numbers[2])
            self.states = [
                DecodeStates(self.config, index, self.slots, self.place, self._like())
                for index in range(self.config.num_hidden_layers)
            ]
            if self.compiled:
                self._record()
            elif CpuStep.refusal(self.model) is None:
                self.fused = CpuStep(self.model, self.states, self.place, self.count)
            self.kind = kind
        if isinstance(self.fused, FusedStep):
            self.fused.refresh()
        self.length = 0
        self.count.zero_()
        self.place.empty = True

    def _record(self) -> None:
        """Records a step as a graph."""
        refusal = FusedStep.refusal(self.model)
        if refusal is None:
            self.fused = FusedStep(self.model, self.states, self.count)
        else:
            logger.warning(
                "this model is decoded by its compiled blocks, not by the faster kernels: %s",
                refusal,
            )
        self.place.step()
        self.graph, self.logits = record(self._step, self.model.device, warmups=3)

    def _like(self) -> Tensor:
        return self.model.model.norm.weight

    def _piece_masks(self, piece: Tensor, first: int, past: int, new: Tensor | None) -> Masks:
        """The masks of a piece that begins at column `first` and sees `past` tokens before it."""
        columns = torch.arange(piece.shape[1], device=piece.device)
        if new is None:
            return _no_masks(first + columns[None])
        # Masks depend on the number of keys, not on their values.
        like = self._like()
        keys = like.new_empty(1, 1, past, 1, device="meta")
        layers = (LayerState(keys=keys),) * self.config.num_hidden_layers
        state = State(layers, self.count, ragged=True)
        return create_state_masks(
            self.config, piece[..., None], (columns < new[:, None]).long(), state, None
        )

    def _step(self) -> Tensor:
        if self.fused is not None:
            logits = self.fused(self.token)
        else:
            masks = _no_masks(self.count[:, None])
            slots = torch.arange(self.slots, device=self.count.device)
            masks["window"] = (slots <= self.count[:, None])[:, None, None]
            block = _compiled_block() if self.compiled else _block
            logits = _head(self.model, self._run(self.token, masks, block))
        self.count += 1
        self.place.slot.copy_(self.count % self.slots)
        return logits


def cpu_decoder(model: Any, max_length: int) -> Decoder | None:
    """A decoder for one call of `generate` on a CPU.

    Args:
        model: a `NirvanaForCausalLM`.
        max_length: the largest length of prompt and continuation.

    Returns:
        the decoder; None on other devices, and where the library's cache is the faster one, with a
        line in the log that gives the reason.
    """
    if model.device.type != "cpu":
        return None
    refusal = CpuStep.refusal(model)
    if refusal is None and model.config.sliding_window is None:
        refusal = "it has no window, and all keys would be allocated in advance"
    if refusal is None and has_hooks(model):
        refusal = "it has hooks, such as those of task parameters"
    if refusal is None:
        return Decoder(model, max_length=max_length + 1)
    _log_refusal(refusal)
    return None


@lru_cache(maxsize=32)
def _log_refusal(refusal: str) -> None:
    logger.info("generate reads through the library's cache, not the faster step: %s", refusal)


def has_hooks(model: nn.Module) -> bool:
    """Whether a part of the model has hooks of its forward, which a `Decoder` would not call."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def _shifted(tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts from the first column on, and their lengths `[B]`; None if they have the same."""
    if attention_mask is None or bool(attention_mask.all()):
        return tokens, None
    if attention_mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, the prompts {list(tokens.shape)}: "
            "a Decoder takes a mask of 1 at tokens and 0 at padding"
        )
    real = attention_mask != 0
    if not real[:, -1].all() or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("a Decoder takes prompts that are padded on the left, or not at all")
    lengths = real.sum(1)
    T = tokens.shape[1]
    order = (torch.arange(T, device=tokens.device) + (T - lengths)[:, None]) % T
    return tokens.gather(1, order), lengths


def _require_no_padding(mask: Tensor) -> None:
    if not mask.all():
        raise ValueError("the tokens that follow a prompt in a Decoder are without padding")


def _no_masks(positions: Tensor) -> Masks:
    names = ("segments", "cu_seqlens", "lengths", "window")
    return {"positions": positions, "index": positions, **dict.fromkeys(names)}


@lru_cache(maxsize=1)
def _compiled_block() -> Callable[..., Any]:
    """One compiled function for all models; blocks of one kind share the code."""
    return torch.compile(_block, dynamic=False, fullgraph=True)
