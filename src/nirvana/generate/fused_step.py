"""One token of each text through the model, by the kernels of `nirvana.ops.cuda.decode_step`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.model.attention import QKV, RMSNorm
from nirvana.model.block import NirvanaBlock, SwiGLU
from nirvana.model.config import NirvanaConfig
from nirvana.model.nirvana import NirvanaModel
from nirvana.model.trigger import Trigger, WeightBank
from nirvana.model.updater import Updater
from nirvana.ops import suits_kernels
from nirvana.ops.limits import CONV_WIDTH, HEAD_DIMS

PLAIN = frozenset(
    [
        *(nn.Linear, nn.Embedding, nn.ModuleList, nn.Sequential, nn.SiLU, RMSNorm, QKV, SwiGLU),
        *(NirvanaModel, NirvanaBlock, Updater, Trigger, WeightBank),
    ]
)
"""The classes of the parts of a model with Triggers."""


class FusedStep:
    """A step from tokens to logits that waits for nothing, so that a CUDA graph can record it.

    The window branch and the Trigger run in parallel to the linear branch, each in a stream of its
    own.

    Args:
        model: a `NirvanaForCausalLM` without a `refusal`.
        states: of each layer, written in place: `conv`, `delta`, and with a Trigger `memory`,
            `keys` and `values`, of the shapes in `nirvana.generate.decode_states`.
        count: tokens of each text read so far, `[B]`, int64; the token's slot in a ring buffer is
            count modulo its number of slots.
    """

    def __init__(self, model: Any, states: Sequence[Any], count: Tensor) -> None:
        config: NirvanaConfig = model.config
        self.model, self.config, self.states, self.count = model, config, states, count
        B, D, C, R = count.numel(), config.hidden_size, config.task_dim, config.bank_size
        layers = model.model.layers
        weight = layers[0].updater.in_proj.weight
        widest = max(sum(layer.updater.sections) for layer in layers)
        rank = max(1, D // 8)
        sizes = {"h": D, "together": 2 * D + C, "a": D, "low": rank}
        sizes |= {"zeta": rank, "act": config.intermediate_size, "logits": config.vocab_size}
        self.buffers = {name: weight.new_empty(B, size) for name, size in sizes.items()}
        self.x = weight.new_empty(B * widest)
        floats = {"mixed": [3 * D], "o": [D], "U": [2, C * R], "fast": [4, R], "gates": [2]}
        self.floats = {
            name: weight.new_empty(B, *size, dtype=torch.float32) for name, size in floats.items()
        }
        self.rates = weight.new_zeros(len(layers), 2, dtype=torch.float32)
        self.window = None
        keys = states[-1].keys
        if keys is not None:
            from nirvana.ops.cuda import decode_step

            self.window = decode_step.window_scratch(keys)
        self.sides = [torch.cuda.Stream(weight.device) if weight.is_cuda else None for _ in "ab"]
        self.refresh()

    @staticmethod
    def refusal(model: Any) -> str | None:
        """Why the kernels do not take a model: None for a half-precision model with Triggers on a
        GPU, whose linear layers and embedding are plain.

        Args:
            model: a `NirvanaForCausalLM`.
        """
        config: NirvanaConfig = model.config
        H, G, K = config.head_sizes
        known = K in HEAD_DIMS and config.conv_size == CONV_WIDTH and config.conv_silu
        known = known and config.hidden_size == H * K == G * K and not config.num_sinks
        known = known and not (config.qkv_bias or config.qk_norm)
        known = known and config.window_output == "low_rank" and config.rope_theta is None
        known = known and config.branches == "both" and config.trigger_step == "plain"
        if not (known and config.gate == "trigger"):
            return "its architecture settings are not those of a published model"
        if not has_plain_layers(model):
            return "it has adapters, or quantised or replaced layers"
        if not suits_kernels(model.lm_head.weight):
            return "it is not in half precision on a GPU with Triton"
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies step sizes and decays to where a recorded graph reads them."""
        for rates, layer in zip(self.rates, self.model.model.layers, strict=True):
            if layer.updater.has_trigger:
                trigger = layer.updater.trigger
                rates[0] = trigger.lr if trigger.enabled else 0.0
                rates[1] = trigger.decay

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """Reads one token of each text; the caller increments `count`.

        Args:
            token: `[B, 1]`, int64.

        Returns:
            logits `[B, vocab_size]`, which the next call overwrites.
        """
        from nirvana.ops.cuda import decode_products

        trunk, buffers = self.model.model, self.buffers
        h, logits = buffers["h"], buffers["logits"]
        torch.index_select(trunk.embed_tokens.weight, 0, token[:, 0], out=h)
        for index in range(len(trunk.layers)):
            self._layer(index)
        norm, eps = trunk.norm.weight, self.config.rms_norm_eps
        decode_products.product(self.model.lm_head.weight, h, logits, norm, eps)
        return logits

    def _layer(self, index: int) -> None:
        """`NirvanaBlock.forward`."""
        from nirvana.ops.cuda import decode_products, decode_step

        block, state, buffers = self.model.model.layers[index], self.states[index], self.buffers
        updater, eps, h = block.updater, self.config.rms_norm_eps, buffers["h"]
        (B, D), width = h.shape, sum(updater.sections)
        x = self.x[: B * width].view(B, width)
        decode_products.product(updater.in_proj.weight, h, x, block.updater_norm.weight, eps)
        if updater.has_trigger:
            self._window(updater, x, state)
            self._trigger(updater, x, state, index)
        weights = updater.conv_weight, updater.A_log, updater.dt_bias
        given = (x, state.conv, *weights, state.delta, updater.out_norm.weight, eps)
        given = (*given, updater.out_proj.weight, (self.floats["mixed"], self.floats["o"]))
        if updater.has_trigger:
            together, zeta, low = buffers["together"], updater.zeta, buffers["zeta"]
            decode_step.linear(*given, together[:, :D])
            self._join()
            decode_products.product(zeta[0].weight, together, low)
            gates = self.floats["gates"]
            decode_products.blend(zeta[2].weight, low, together, gates, h, updater.convex)
        else:
            decode_step.linear(*given, h, added=h)
        mlp, act = block.mlp, buffers["act"]
        decode_products.swiglu(mlp.gate_up_proj.weight, h, block.mlp_norm.weight, eps, act)
        decode_products.product(mlp.down_proj.weight, act, h, added=h)

    def _window(self, updater: Any, x: Tensor, state: Any) -> None:
        from nirvana.ops.cuda import decode_products, decode_step

        assert self.window is not None
        a, low, D = self.buffers["a"], self.buffers["low"], self.config.hidden_size
        factors = x.split(updater.sections, dim=1)[4]
        down, up = updater.window_out
        with _on_stream(self.sides[0]):
            rings = state.keys, state.values, self.count
            decode_step.window(x, factors, updater.window_up, *rings, self.window, a)
            decode_products.product(down.weight, a, low)
            decode_products.product(up.weight, low, self.buffers["together"][:, D : 2 * D])

    def _trigger(self, updater: Any, x: Tensor, state: Any, index: int) -> None:
        from nirvana.ops.cuda import decode_step

        with _on_stream(self.sides[1]):
            decode_step.trigger(
                x.split(updater.sections, dim=1)[5],
                self.model.model.bank.parts(),
                self.floats["fast"],
                state.memory,
                self.rates[index],
                updater.gate_proj.weight,
                self.floats["U"],
                self.buffers["together"][:, 2 * self.config.hidden_size :],
                self.floats["gates"],
                start=index == self.config.num_prelude_layers,
                exact=updater.trigger.exact,
            )

    def _join(self) -> None:
        for side in self.sides:
            if side is not None:
                torch.cuda.current_stream(side.device).wait_stream(side)


def has_plain_layers(model: Any) -> bool:
    """Whether all parts of a model with Triggers are of the classes that it was made of. A step
    reads their weights, and an adapter, a wrapper or a quantised layer computes more than those.

    Args:
        model: a `NirvanaForCausalLM`.
    """
    return all(type(part) in PLAIN for part in model.modules() if part is not model)


@contextmanager
def _on_stream(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launches the block's work on `side`, after the work launched on the current stream so far."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
