"""One token of one text through the model, by the kernels of `nirvana.ops.cuda.decode_step`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.model.config import NirvanaConfig
from nirvana.ops import suits_kernels
from nirvana.ops.dispatch import CONV_WIDTH, HEAD_DIMS


class FusedStep:
    """A step from token to logits that allocates nothing, so that a CUDA graph can record it.

    The window branch and the Trigger run in parallel to the linear branch, each in a stream of its
    own.

    Args:
        model: a `NirvanaForCausalLM` that `fits`.
        states: of each layer, written in place: `conv`, `delta`, and with a Trigger `memory`,
            `keys` and `values`, of the shapes in `nirvana.generate.graph_decoder` with B = 1.
        count: tokens read so far, `[1]`, int64; the token's slot in a ring buffer is count modulo
            its number of slots.
    """

    def __init__(self, model: Any, states: Sequence[Any], count: Tensor) -> None:
        config: NirvanaConfig = model.config
        self.model, self.config, self.states, self.count = model, config, states, count
        D, C, R = config.hidden_size, config.task_dim, config.bank_size
        layers = model.model.layers
        weight = layers[0].updater.in_proj.weight
        widest = max(sum(layer.updater.sections) for layer in layers)
        rank = max(1, D // 8)
        sizes = {"h": D, "x": widest, "together": 2 * D + C, "a": D, "low": rank}
        sizes |= {"zeta": rank, "act": config.intermediate_size, "logits": config.vocab_size}
        self.buffers = {name: weight.new_empty(size) for name, size in sizes.items()}
        self.mixed = weight.new_empty(4 * D, dtype=torch.float32)
        self.U = weight.new_empty(2, C * R, dtype=torch.float32)
        self.fast = weight.new_empty(4, R, dtype=torch.float32)
        self.gates = weight.new_empty(2, dtype=torch.float32)
        self.rates = weight.new_zeros(len(layers), 2, dtype=torch.float32)
        self.window = None
        keys = states[-1].keys
        if keys is not None:
            from nirvana.ops.cuda import decode_step

            self.window = decode_step.window_scratch(keys[0])
        self.sides = [torch.cuda.Stream(weight.device) if weight.is_cuda else None for _ in "ab"]
        self.refresh()

    @staticmethod
    def fits(model: Any, batch: int) -> bool:
        """Whether the kernels take a model.

        Args:
            model: a `NirvanaForCausalLM`.
            batch: number of texts.

        Returns:
            True for one text and a half-precision model with Triggers on a GPU, whose linear layers
            and embedding are plain.
        """
        config: NirvanaConfig = model.config
        H, G, K = config.head_sizes
        sizes = K in HEAD_DIMS and config.conv_size == CONV_WIDTH
        sizes = sizes and config.hidden_size == H * K == G * K and not config.without_kernels
        usual = not (config.qkv_bias or config.qk_norm) and config.window_output == "low_rank"
        plain = config.branches == "both" and config.trigger_step == "plain"
        gated = config.gate == "trigger" and config.rope_theta is None
        # The kernels read weights; an adapter or a quantised layer computes more than a product.
        bare = all(type(layer) is nn.Linear for layer in _linear_layers(model))
        embedded = type(model.model.embed_tokens) is nn.Embedding
        fits = batch == 1 and sizes and usual and plain and gated and bare and embedded
        return fits and suits_kernels(model.lm_head.weight)

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
        """Reads one token; the caller increments `count`.

        Args:
            token: `[1, 1]`, int64.

        Returns:
            logits `[1, vocab_size]`, which the next call overwrites.
        """
        from nirvana.ops.cuda import decode_step

        trunk, buffers = self.model.model, self.buffers
        torch.index_select(trunk.embed_tokens.weight, 0, token[0], out=buffers["h"][None])
        for index in range(len(trunk.layers)):
            self._layer(index)
        norm, eps = trunk.norm.weight, self.config.rms_norm_eps
        decode_step.product(self.model.lm_head.weight, buffers["h"], buffers["logits"], norm, eps)
        return buffers["logits"][None]

    def _layer(self, index: int) -> None:
        """`NirvanaBlock.forward`."""
        from nirvana.ops.cuda import decode_step

        block, state, buffers = self.model.model.layers[index], self.states[index], self.buffers
        updater, eps, h = block.updater, self.config.rms_norm_eps, buffers["h"]
        x = buffers["x"][: sum(updater.sections)]
        decode_step.product(updater.in_proj.weight, h, x, block.updater_norm.weight, eps)
        if updater.has_trigger:
            self._window(updater, x, state)
            self._trigger(updater, x, state, index)
        weights = updater.conv_weight, updater.A_log, updater.dt_bias
        given = (x, state.conv[0], *weights, state.delta[0], updater.out_norm.weight, eps)
        given = (*given, updater.out_proj.weight, self.mixed)
        if updater.has_trigger:
            together, zeta = buffers["together"], updater.zeta
            decode_step.linear(*given, together[: h.numel()])
            self._join()
            decode_step.product(zeta[0].weight, together, buffers["zeta"], silu=True)
            decode_step.blend(
                zeta[2].weight, buffers["zeta"], together, self.gates, h, updater.convex
            )
        else:
            decode_step.linear(*given, h, added=h)
        mlp = block.mlp
        decode_step.swiglu(mlp.gate_up_proj.weight, h, block.mlp_norm.weight, eps, buffers["act"])
        decode_step.product(mlp.down_proj.weight, buffers["act"], h, added=h)

    def _window(self, updater: Any, x: Tensor, state: Any) -> None:
        from nirvana.ops.cuda import decode_step

        assert self.window is not None
        buffers, D = self.buffers, self.config.hidden_size
        factors = x.split(updater.sections)[4]
        with _on_stream(self.sides[0]):
            rings = state.keys[0], state.values[0], self.count
            decode_step.window(x, factors, updater.window_up, *rings, self.window, buffers["a"])
            decode_step.product(updater.window_out[0].weight, buffers["a"], buffers["low"])
            decode_step.product(
                updater.window_out[1].weight, buffers["low"], buffers["together"][D : 2 * D]
            )

    def _trigger(self, updater: Any, x: Tensor, state: Any, index: int) -> None:
        from nirvana.ops.cuda import decode_step

        with _on_stream(self.sides[1]):
            decode_step.trigger(
                x.split(updater.sections)[5],
                self.model.model.bank.parts(),
                self.fast,
                None if state.memory is None else state.memory[0],
                self.rates[index],
                updater.gate_proj.weight,
                self.U,
                self.buffers["together"][2 * self.config.hidden_size :],
                self.gates,
                start=index == self.config.num_prelude_layers,
                exact=updater.trigger.exact,
            )

    def _join(self) -> None:
        for side in self.sides:
            if side is not None:
                torch.cuda.current_stream(side.device).wait_stream(side)


def _linear_layers(model: Any) -> Iterator[nn.Module]:
    """The linear layers whose weights the kernels read."""
    yield model.lm_head
    for layer in model.model.layers:
        updater = layer.updater
        yield from (updater.in_proj, updater.out_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        if updater.has_trigger:
            yield from (*updater.window_out, updater.zeta[0], updater.zeta[2], updater.gate_proj)


@contextmanager
def _on_stream(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launches the block's work on `side`, after the work launched on the current stream so far."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
