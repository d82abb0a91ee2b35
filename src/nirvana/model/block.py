"""One block of a Nirvana model, and the rule by which gradient checkpointing is used."""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana.model.attention import Attention, RMSNorm
from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import Masks
from nirvana.model.state import LayerStates
from nirvana.model.trigger import TriggerTrace, WeightBank
from nirvana.model.updater import Updater
from nirvana.ops import swiglu


class CheckpointedWithGradients:
    """Gradient checkpointing only where gradients are enabled: without them a model in training
    mode uses its cache as in evaluation. The library's own blocks do so since 5.24."""

    _checkpointing = False

    @property
    def gradient_checkpointing(self) -> bool:
        return self._checkpointing and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpointing = enabled


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up are one matrix product."""

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class NirvanaBlock(CheckpointedWithGradients, GradientCheckpointingLayer):
    """Pre-norm block: the Updater under its Trigger, then SwiGLU."""

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        self.updater_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attention = config.branches == "window" and layer_idx >= config.num_prelude_layers
        self.updater = (Attention if attention else Updater)(config, layer_idx, initialise=False)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        h: Tensor,
        fast: Tensor,
        bank: WeightBank,
        masks: Masks,
        states: LayerStates | None = None,
        traces: list[TriggerTrace] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block's residual stream `[B, T, D]` and fast parameters; arguments: see `Updater`."""
        y, fast = self.updater(self.updater_norm(h), fast, bank, masks, states, traces)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), fast

    def mix(self, x: Tensor, fast: Tensor, bank: WeightBank, masks: Masks) -> tuple[Tensor, Tensor]:
        """The Updater alone, on x `[B, T, D]` in place of the normalised residual stream."""
        return self.updater(x, fast, bank, masks)
