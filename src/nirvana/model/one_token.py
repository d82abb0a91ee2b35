"""One token of one text through the model, by kernels made for that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nirvana.model.config import NirvanaConfig
from nirvana.ops import suits_kernels


class OneToken:
    """A step of the model from token to logits that allocates nothing, for a graph to record.

    The window branch and the Trigger run beside the linear branch, each in a stream of its own.

    Args:
        model: a `NirvanaForCausalLM` that `fits`.
        states: of each layer, written in place: `conv`, `delta`, and where there is a Trigger
            `memory`, `keys` and `values`, of the shapes in `nirvana.model.decode` with B = 1.
        count: tokens read so far, `[1]`, int64; a ring's place for the token is count modulo its
            length.
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
        self.half = {name: weight.new_empty(size) for name, size in sizes.items()}
        self.mixed = weight.new_empty(4 * D, dtype=torch.float32)
        self.U = weight.new_empty(2, C * R, dtype=torch.float32)
        self.fast = weight.new_empty(4, R, dtype=torch.float32)
        self.gates = weight.new_empty(2, dtype=torch.float32)
        self.rates = weight.new_zeros(len(layers), 2, dtype=torch.float32)
        self.window = None
        keys = states[-1].keys
        if keys is not None:
            from nirvana.ops import triton_step

            self.window = triton_step.window_scratch(keys[0])
        self.sides = [torch.cuda.Stream(weight.device) if weight.is_cuda else None for _ in "ab"]
        self.refresh()

    @staticmethod
    def fits(model: Any, batch: int) -> bool:
        """Whether the kernels are for this model and number of texts."""
        config: NirvanaConfig = model.config
        sizes = config.head_dim in (32, 64, 128) and config.conv_size == 4
        plain = config.branches == "both" and config.trigger_step == "plain"
        gated = config.gate == "trigger" and config.rope_theta is None
        # The kernels read weights; an adapter's or a quantised layer computes more than that.
        bare = all(type(layer) is nn.Linear for layer in _products(model))
        embedded = type(model.model.embed_tokens) is nn.Embedding
        fits = batch == 1 and sizes and plain and gated and bare and embedded
        return fits and suits_kernels(model.lm_head.weight)

    @torch.no_grad()
    def refresh(self) -> None:
        """Reads step sizes and decays again, which a recorded graph cannot."""
        for rates, layer in zip(self.rates, self.model.model.layers, strict=True):
            if layer.updater.has_trigger:
                trigger = layer.updater.trigger
                rates[0] = trigger.lr if trigger.enabled else 0.0
                rates[1] = trigger.decay

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """Logits `[1, vocab_size]` after token `[1, 1]`, overwritten by the next call; `count` is
        left to the caller."""
        from nirvana.ops import triton_step

        trunk, half = self.model.model, self.half
        torch.index_select(trunk.embed_tokens.weight, 0, token[0], out=half["h"][None])
        for index in range(len(trunk.layers)):
            self._layer(index)
        norm, eps = trunk.norm.weight, self.config.rms_norm_eps
        triton_step.product(self.model.lm_head.weight, half["h"], half["logits"], norm, eps)
        return half["logits"][None]

    def _layer(self, index: int) -> None:
        """`NirvanaBlock.forward`."""
        from nirvana.ops import triton_step as ops

        block, state, half = self.model.model.layers[index], self.states[index], self.half
        updater, eps, h = block.updater, self.config.rms_norm_eps, half["h"]
        x = half["x"][: sum(updater.sections)]
        ops.product(updater.in_proj.weight, h, x, block.updater_norm.weight, eps)
        if updater.has_trigger:
            self._window(updater, x, state)
            self._trigger(updater, x, state, index)
        weights = updater.conv_weight, updater.A_log, updater.dt_bias
        given = (x, state.conv[0], *weights, state.delta[0], updater.out_norm.weight, eps)
        given = (*given, updater.out_proj.weight, self.mixed)
        if updater.has_trigger:
            together, zeta = half["together"], updater.zeta
            ops.linear(*given, together[: h.numel()])
            self._join()
            ops.product(zeta[0].weight, together, half["zeta"], silu=True)
            ops.blend(zeta[2].weight, half["zeta"], together, self.gates, h, updater.convex)
        else:
            ops.linear(*given, h, added=h)
        mlp = block.mlp
        ops.swiglu(mlp.gate_up_proj.weight, h, block.mlp_norm.weight, eps, half["act"])
        ops.product(mlp.down_proj.weight, half["act"], h, added=h)

    def _window(self, updater: Any, x: Tensor, state: Any) -> None:
        from nirvana.ops import triton_step as ops

        assert self.window is not None
        half, D = self.half, self.config.hidden_size
        factors = x.split(updater.sections)[4]
        with _beside(self.sides[0]):
            rings = state.keys[0], state.values[0], self.count
            ops.window(x, factors, updater.window_up, *rings, self.window, half["a"])
            ops.product(updater.window_out[0].weight, half["a"], half["low"])
            ops.product(updater.window_out[1].weight, half["low"], half["together"][D : 2 * D])

    def _trigger(self, updater: Any, x: Tensor, state: Any, index: int) -> None:
        from nirvana.ops import triton_step as ops

        with _beside(self.sides[1]):
            ops.trigger(
                x.split(updater.sections)[5],
                self.model.model.bank.parts(),
                self.fast,
                None if state.memory is None else state.memory[0],
                self.rates[index],
                updater.gate_proj.weight,
                self.U,
                self.half["together"][2 * self.config.hidden_size :],
                self.gates,
                start=index == self.config.num_prelude_layers,
                exact=updater.trigger.exact,
            )

    def _join(self) -> None:
        for side in self.sides:
            if side is not None:
                torch.cuda.current_stream(side.device).wait_stream(side)


def _products(model: Any) -> Iterator[nn.Module]:
    """The layers whose weights the kernels read."""
    yield model.lm_head
    for layer in model.model.layers:
        updater = layer.updater
        yield from (updater.in_proj, updater.out_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        if updater.has_trigger:
            yield from (*updater.window_out, updater.zeta[0], updater.zeta[2], updater.gate_proj)


@contextmanager
def _beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Inside the block work goes to `side`, after what the current stream has been given so far."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
