"""One token of each text through the model on a CPU, in as few operations as PyTorch allows.

In a small model an operation takes longer to call than to compute. So everything that a step reads
and writes is allocated once, all views of it are made in advance, and products that share an
argument are one product. The formulas are those of `nirvana.model` and `nirvana.ops`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.generate.cpu_parts import Linear, Norm, Product, Recent, Trigger, Window
from nirvana.generate.decode_states import DecodeStates, Place
from nirvana.generate.refusals import model_refusal
from nirvana.model.config import NirvanaConfig

BLOCK = 64
"""The part of the ring buffers that attention reads grows by so many slots."""
COPY_AFTER = 8
"""Tokens after which wide weights are copied, when the copy has paid for itself."""
COPY_SIZE = 2**25
"""Parameters at most of a model whose weights are copied."""


class CpuStep:
    """A step from tokens to logits.

    After `load` the inputs of the convolutions are here and not in `states`; all other states are
    written in place.

    Args:
        model: a `NirvanaForCausalLM` without a `refusal`.
        states: of each layer.
        place: of the states; `slot` is that of the next token of each text.
        count: tokens of each text read so far, `[B]`, int64.
    """

    def __init__(
        self, model: Any, states: Sequence[DecodeStates], place: Place, count: Tensor
    ) -> None:
        config: NirvanaConfig = model.config
        self.model, self.count, self.slots = model, count, states[-1].slots
        B, D, H = count.numel(), config.hidden_size, config.num_attention_heads
        weight = model.lm_head.weight
        self.h, self.normed = weight.new_empty(2, B, D)
        self.head = Product(self.normed, weight.new_empty(B, config.vocab_size))
        self.bias = weight.new_empty(B, H, 1, self.slots)
        slot = place.slot[:, None, None, None]
        self.slot = slot.expand(B, H, 1, 1)
        self.fast = weight.new_empty(B, 4, config.bank_size)
        shared = self.h, self.normed, self.fast, slot, self.bias
        self.layers = [
            _Layer(model.model, index, state, *shared) for index, state in enumerate(states)
        ]
        self.norm = Norm(model.model.norm, self.h, self.normed)
        self.copies = B == 1 and sum(p.numel() for p in model.parameters()) <= COPY_SIZE

    @staticmethod
    def refusal(model: Any) -> str | None:
        """Why the step does not take a model: None for a float32 or float64 model with Triggers on
        a CPU, whose linear layers and embedding are plain.

        Args:
            model: a `NirvanaForCausalLM`.
        """
        config: NirvanaConfig = model.config
        H, G, _ = config.head_sizes
        taken = {
            "branches": config.branches == "both",
            "gate": config.gate == "trigger",
            "trigger_step": config.trigger_step == "plain",
            "num_key_value_heads": G == H,
            "conv_size": config.conv_size is not None,
            "num_sinks": config.num_sinks == 0,
            "qkv_bias": not config.qkv_bias,
            "qk_norm": not config.qk_norm,
            "rope_theta": config.rope_theta is None,
        }
        refusal = model_refusal(model, taken)
        if refusal is not None:
            return refusal
        kinds = {(p.dtype, p.device.type) for p in model.parameters()}
        if kinds not in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")}):
            return "it is not in float32 or float64 on a CPU"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        return None

    @torch.no_grad()
    def load(self) -> None:
        """Goes on from the states, as a prefill leaves them, with the weights that the model has
        now."""
        self.length, self.steps = int(self.count.max()), 0
        self.head.take(self.model.lm_head.weight)
        self.norm.refresh()
        order = torch.arange(self.slots)
        unread = (order >= self.count[:, None])[:, None, None]
        self.bias.zero_().masked_fill_(unread, float("-inf"))
        for layer in self.layers:
            layer.load()
        self._read(self._needed())

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Replaces the texts by those of the given rows, `[B]`."""
        self.bias.copy_(self.bias.index_select(0, rows))
        for layer in self.layers:
            ring = layer.recent.ring
            ring.copy_(ring.index_select(2, rows))

    @torch.inference_mode()  # a tenth less time than `no_grad`: no version counters
    def __call__(self, token: Tensor) -> Tensor:
        """Reads one token of each text; the caller increments `count` and `slot`.

        Args:
            token: `[B, 1]`, int64.

        Returns:
            logits `[B, vocab_size]`, which the next call overwrites.
        """
        if self.read < self._needed():
            self._read(self._needed())
        self.length += 1
        self.steps += 1
        if self.steps == COPY_AFTER and self.copies:
            self._copy()
        self.bias.scatter_(3, self.slot, 0.0)
        self.fast.fill_(1.0)
        torch.index_select(self.model.model.embed_tokens.weight, 0, token[:, 0], out=self.h)
        for layer in self.layers:
            layer()
        self.norm()
        return self.head()

    def _copy(self) -> None:
        """Copies the weights with many more rows than columns so that their rows are in memory what
        were columns: a product with one vector then adds up rows, which takes half the time of as
        many short scalar products. The copies contain the gains of the norms before them."""
        self.norm.fold_into(self.head)
        for layer in self.layers:
            layer.copy()

    def _needed(self) -> int:
        """Slots that the next token attends to, rounded up."""
        return min(self.slots, -(-(self.length + 1) // BLOCK) * BLOCK)

    def _read(self, slots: int) -> None:
        self.read = slots
        for layer in self.layers:
            if layer.has_window:
                layer.window.read(slots)


class _Layer:
    """`NirvanaBlock.forward`, on the residual stream `h` `[B, D]` in place.

    Args:
        trunk: a `NirvanaModel`.
        index: of the layer.
        state: of the layer.
        h: `[B, D]`.
        normed: `[B, D]`, overwritten.
        fast: `[B, 4, R]`.
        slot: see `Window`.
        bias: see `Window`.
    """

    def __init__(
        self, trunk: Any, index: int, state: DecodeStates, h: Tensor, normed: Tensor,
        fast: Tensor, slot: Tensor, bias: Tensor,
    ) -> None:  # fmt: skip
        block = trunk.layers[index]
        self.updater = updater = block.updater
        self.h, self.state, self.has_window = h, state, updater.has_window
        B, D = h.shape
        self.norms = Norm(block.updater_norm, h, normed), Norm(block.mlp_norm, h, normed)
        self.mlp = block.mlp
        self.x = h.new_empty(B, updater.in_proj.out_features)
        self.in_proj = Product(normed, self.x)
        pre = h.new_empty(B, block.mlp.gate_up_proj.out_features)
        self.gate_up, (self.act, self.up) = Product(normed, pre), pre.chunk(2, dim=1)
        self.down = Product(self.act, h, adds=True)
        self.recent = Recent(updater, self.x)
        assert state.delta is not None
        self.linear = Linear(updater, self.x, state.delta, self.recent.slots)
        if not self.has_window:
            self.out_proj = Product(self.linear.out, h, adds=True)
            return
        C = updater.gate_proj.in_features
        self.together = h.new_empty(B, 2 * D + C)
        self.b, self.a, h_task = self.together.split([D, D, C], dim=1)
        self.out_proj = Product(self.linear.out, self.b)
        self.window = Window(updater, self.x, state, slot, bias)
        given = self.x, state.memory, fast, h_task
        self.trigger = Trigger(updater, trunk.bank, *given)
        *first, self.window_up = [part.weight.T for part in updater.window_out]
        self.window_down = [(w, h.new_empty(B, w.shape[1])) for w in first]
        self.zeta_down, self.zeta_up = updater.zeta[0].weight.T, updater.zeta[2].weight.T
        self.low, self.zeta = h.new_empty(B, self.zeta_down.shape[1]), h.new_empty(B, D)
        self.h_task, self.gates = h_task, h.new_empty(B, 2)
        self.t, self.rest = self.gates.split(1, dim=1)

    def load(self) -> None:
        """Takes the states of a prefill, and the small weights."""
        updater = self.updater
        self.in_proj.take(updater.in_proj.weight)
        self.out_proj.take(updater.out_proj.weight)
        self.gate_up.take(self.mlp.gate_up_proj.weight)
        self.down.take(self.mlp.down_proj.weight)
        parts = [*self.norms, self.recent, self.linear]
        parts += [self.trigger] if self.has_window else []
        for part in parts:
            part.refresh()
        assert self.state.conv is not None
        self.recent.load(self.state.conv)
        if self.has_window:
            gate = updater.gate_proj.weight
            # 1 - sigmoid(x) is sigmoid(-x).
            self.gate = torch.cat([gate, -gate] if updater.convex else [gate]).T

    def copy(self) -> None:
        """See `CpuStep._copy`."""
        before, after = self.norms
        before.fold_into(self.in_proj)
        self.linear.fold_into(self.out_proj)
        after.fold_into(self.gate_up)

    def __call__(self) -> None:
        self.norms[0]()
        self.in_proj()
        self.linear(self.recent())
        self.out_proj()
        if self.has_window:
            self.window()
            self.trigger()
            self._blend()
        self.norms[1]()
        self.gate_up()
        F.silu(self.act, inplace=True).mul_(self.up)
        self.down()

    def _blend(self) -> None:
        """h += t (a + t' zeta) + t' b, see `Updater`."""
        a = self.window.out
        for weight, low in self.window_down:
            a = torch.mm(a, weight, out=low)
        torch.mm(a, self.window_up, out=self.a)
        torch.mm(self.h_task, self.gate, out=self.gates).sigmoid_()
        low = F.silu(torch.mm(self.together, self.zeta_down, out=self.low), inplace=True)
        zeta = torch.mm(low, self.zeta_up, out=self.zeta)
        torch.addcmul(self.a, self.rest, zeta, out=zeta)
        self.h.addcmul_(self.t, zeta).addcmul_(self.rest, self.b)
