"""One token of each text through the model, by the kernels of `nirvana.ops.cuda.decode_step`, of
`decode_window` and of `decode_products`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from nirvana.generate.refusals import model_refusal
from nirvana.model.attention import frequencies
from nirvana.model.config import NirvanaConfig
from nirvana.model.updater import ALIGNED, Updater
from nirvana.ops import suits_kernels
from nirvana.ops.limits import CONV_WIDTH, HEAD_DIMS, MAX_SINKS


class FusedStep:
    """A step from tokens to logits that waits for nothing, so that a CUDA graph can record it.

    The window branch and the Trigger run in parallel to the linear branch, each in a stream of its
    own.

    Args:
        model: a `NirvanaForCausalLM` without a `refusal`.
        states: of each layer, written in place: `conv`, `delta`, and as far as the layer has them
            `memory`, `sinks`, `keys` and `values`, of the shapes in
            `nirvana.generate.decode_states`.
        count: tokens of each text read so far, `[B]`, int64; the token's slot in a ring buffer is
            count modulo its number of slots.
    """

    def __init__(self, model: Any, states: Sequence[Any], count: Tensor) -> None:
        config: NirvanaConfig = model.config
        self.model, self.config, self.states, self.count = model, config, states, count
        (H, _, K), R = config.head_sizes, config.bank_size
        B, D = count.numel(), config.hidden_size
        C = 0 if config.gate == "constant" else config.task_dim
        layers = model.model.layers
        weight = layers[0].updater.in_proj.weight
        rank = max(1, D // 8)
        sizes = {"h": D, "together": D + C, "a": H * K, "zeta": rank}
        sizes |= {"act": config.intermediate_size, "logits": config.vocab_size}
        self.buffers = {name: weight.new_empty(B, size) for name, size in sizes.items()}
        self.x = weight.new_empty(B * max(_row(layer.updater) for layer in layers))
        floats = {"mixed": [config.qkv_size], "o": [H * K], "U": [2, C * R], "fast": [4, R]}
        self.floats = {
            name: weight.new_empty(B, *size, dtype=torch.float32) for name, size in floats.items()
        }
        # Of an even number of texts, so that those of each layer begin at a multiple of 16 bytes.
        self.gates = weight.new_empty(len(layers), B + B % 2, 2, dtype=torch.float32)
        self.rates = weight.new_zeros(len(layers), 2, dtype=torch.float32)
        self.window = None
        self.maps: dict[int, tuple[Tensor, Tensor]] = {}
        if config.branches == "both":
            from nirvana.ops.cuda import decode_window

            self.window = decode_window.window_scratch(states[-1].keys, H)
            first = D if config.window_output == "full" else rank
            self.buffers["window"] = weight.new_empty(B, first + rank)
        self.rotary, self.turns = layers[-1].updater.rotary, None
        if self.window is not None and self.rotary is not None:
            self.frequency = frequencies(self.rotary, K, weight.device)
            self.turns = weight.new_empty(B, 2, K, dtype=torch.float32)
        sides = range(1 + config.has_trigger if config.branches == "both" else 0)
        self.sides = [torch.cuda.Stream(weight.device) if weight.is_cuda else None for _ in sides]
        self.refresh()

    @staticmethod
    def refusal(model: Any) -> str | None:
        """Why the kernels do not take a model: None for a half-precision model with linear branches
        on a GPU, whose linear layers and embedding are plain.

        Args:
            model: a `NirvanaForCausalLM`.
        """
        config: NirvanaConfig = model.config
        taken = {
            "branches": config.branches != "window",
            "gate": config.gate != "input",
            "trigger_step": config.trigger_step == "plain" or not config.has_trigger,
            "conv_size": config.conv_size in (CONV_WIDTH, None),
            "head_dim": config.head_dim in HEAD_DIMS,
            "num_sinks": config.num_sinks <= MAX_SINKS,
        }
        refusal = model_refusal(model, taken)
        if refusal is not None:
            return refusal
        if not suits_kernels(model.lm_head.weight):
            return "it is not in half precision on a GPU with Triton"
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes step sizes, decays, constant gates and `zeta_maps` to where a recorded graph reads
        them."""
        layers = self.model.model.layers
        for index, layer in enumerate(layers):
            if layer.updater.has_window:
                maps = zeta_maps(layer.updater)
                for kept, new in zip(self.maps.setdefault(index, maps), maps, strict=True):
                    kept.copy_(new)
        for rates, gates, layer in zip(self.rates, self.gates, layers, strict=True):
            updater = layer.updater
            if updater.has_trigger:
                trigger = updater.trigger
                rates[0] = trigger.lr if trigger.enabled else 0.0
                rates[1] = trigger.decay
            elif updater.has_window:
                gates[:, : updater.gate_logit.numel()] = updater.gate_logit.sigmoid()

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """Reads one token of each text; the caller increments `count`.

        Args:
            token: `[B, 1]`, int64.

        Returns:
            logits `[B, vocab_size]`, which the next call overwrites.
        """
        from nirvana.ops.cuda import decode_products, decode_window

        trunk, buffers = self.model.model, self.buffers
        h, logits = buffers["h"], buffers["logits"]
        torch.index_select(trunk.embed_tokens.weight, 0, token[:, 0], out=h)
        if self.turns is not None:
            window, n = self.config.sliding_window, self.config.num_sinks
            end = window + n - 1 if window is not None and n else None
            decode_window.rotary(self.count, self.frequency, self.rotary.factor, self.turns, end)
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
        (B, D), row, width = h.shape, _row(updater), sum(updater.sections)
        x = self.x[: B * row].view(B, row)[:, :width]
        decode_products.product(updater.in_proj.weight, h, x, block.updater_norm.weight, eps)
        if self.config.qkv_bias or self.config.qk_norm:
            bias, *norms = updater.qkv.bias, updater.qkv.q_norm, updater.qkv.k_norm
            scales = tuple(norm.weight for norm in norms if norm is not None)
            decode_step.qkv(x, self.config.head_sizes, bias, scales or None, eps)
        if updater.has_window:
            self._window(updater, x, state, index)
        if updater.has_trigger:
            self._trigger(updater, x, state, index)
        given = (x, state.conv, updater.conv_weight, self.config.conv_silu, updater.A_log)
        given = (*given, updater.dt_bias, state.delta, updater.out_norm.weight, eps)
        given = (*given, updater.out_proj.weight, (self.floats["mixed"], self.floats["o"]))
        if updater.has_window:
            together, zeta = buffers["together"], buffers["zeta"]
            decode_step.linear(*given, together[:, :D])
            self._join(self.sides[1:])
            decode_products.product(self.maps[index][1], together, zeta)
            self._join(self.sides[:1])
            *_, up = (None, *(part.weight for part in updater.window_out[1:]))
            parts = buffers["window"], zeta, together, self.gates[index], h
            decode_products.blend(updater.zeta[2].weight, up, *parts, updater.convex)
        else:
            decode_step.linear(*given, h, added=h)
        mlp, act = block.mlp, buffers["act"]
        decode_products.swiglu(mlp.gate_up_proj.weight, h, block.mlp_norm.weight, eps, act)
        decode_products.product(mlp.down_proj.weight, act, h, added=h)

    def _window(self, updater: Any, x: Tensor, state: Any, index: int) -> None:
        from nirvana.ops.cuda import decode_products, decode_window

        assert self.window is not None
        a, factors = self.buffers["a"], x.split(updater.sections, dim=1)[4]
        with _on_stream(self.sides[0]):
            kept = state.keys, state.values, state.sinks, self.count
            how = self.turns, self.config.sliding_window, self.window
            decode_window.window(x, factors, updater.window_up, *kept, *how, a)
            decode_products.product(self.maps[index][0], a, self.buffers["window"])

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
                self.buffers["together"][:, self.config.hidden_size :],
                self.gates[index],
                start=index == self.config.num_prelude_layers,
                exact=updater.trigger.exact,
            )

    def _join(self, sides: Sequence[torch.cuda.Stream | None]) -> None:
        for side in sides:
            if side is not None:
                torch.cuda.current_stream(side.device).wait_stream(side)


def zeta_maps(updater: Updater) -> tuple[Tensor, Tensor]:
    """Zeta's first map, taken apart so that its product does not have to wait for all maps of the
    window branch.

    Args:
        updater: with a window branch of r or D columns after its first map, and zeta of rank Z.

    Returns:
        `[r + Z, H K]` or `[D + Z, H K]`, the branch's first map above zeta's of the branch's o; and
        `[Z, D + C]`, zeta's of b and h_task.
    """
    D = updater.out_proj.out_features
    first, *up = (cast(Tensor, part.weight) for part in updater.window_out)
    b, a, h_task = cast(Tensor, updater.zeta[0].weight).tensor_split([D, 2 * D], dim=1)
    for weight in (*up, first):
        a = a.float() @ weight.float()
    return torch.cat([first, a.to(first.dtype)]), torch.cat([b, h_task], dim=1)


def _row(updater: Updater) -> int:
    """Numbers from one text's output of in_proj to the next one's: cuBLAS has slower kernels for
    rows that do not begin at multiples of 16 bytes."""
    return -(-sum(updater.sections) // ALIGNED) * ALIGNED


@contextmanager
def _on_stream(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Launches the block's work on `side`, after the work launched on the current stream so far."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        yield
