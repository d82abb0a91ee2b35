"""The Nirvana language model."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nirvana.model.config import NirvanaConfig
from nirvana.model.trigger import Trigger, WeightBank
from nirvana.model.updater import RMSNorm, Updater

Masks = dict[str, Tensor | None]


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up are one product."""

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class NirvanaBlock(GradientCheckpointingLayer):
    """Pre-norm block: the Updater under its Trigger, then SwiGLU."""

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        self.updater_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.updater = Updater(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        h: Tensor,
        fast: Tensor,
        bank: WeightBank,
        masks: Masks,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, fast = self.updater(self.updater_norm(h), fast, bank, masks, past_key_values)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), fast


class NirvanaPreTrainedModel(PreTrainedModel):
    """What the library needs to know, and every initialisation."""

    config: NirvanaConfig
    config_class = NirvanaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NirvanaBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NirvanaBlock}  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices and embeddings: normal, `initializer_range`; norms: one. Beyond these:

        - convolutions: uniform within 1 / sqrt(width);
        - decay: A uniform in 1..16, time step log-uniform in 0.001..0.1 through softplus;
        - second low-rank factors (window_up, window_out, zeta): zero, so a = 0 and zeta = 0;
        - bank: weight normal / sqrt(C R); gain 1 / R, so that f starts as x + n(z), and bias and
          shift 0, each with noise, without which the R entries would stay equal for ever;
        - Trigger: step size and decay from the configuration.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Updater):
            bound = module.conv_weight.shape[1] ** -0.5
            init.uniform_(module.conv_weight, -bound, bound)
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            step = torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp()
            init.copy_(module.dt_bias, step + (-torch.expm1(-step)).log())
            if module.has_trigger:
                init.zeros_(module.window_up)
                init.zeros_(module.window_out[-1].weight)  # type: ignore[arg-type]
                init.zeros_(module.zeta[-1].weight)  # type: ignore[arg-type]
        elif isinstance(module, WeightBank):
            C, R = module.gain.shape
            init.normal_(module.weight, 0.0, (C * R) ** -0.5)
            init.normal_(module.gain, 1 / R, std)
            init.normal_(module.bias, 0.0, std)
            init.normal_(module.shift, 0.0, std)
        elif isinstance(module, Trigger):
            if "lr_percent" in module._parameters:
                init.constant_(module.lr_percent, 100 * module.fixed_lr)
            if "decay_logit" in module._parameters:
                decay = module.fixed_decay
                init.constant_(module.decay_logit, math.log(decay / (1 - decay)))


class NirvanaModel(NirvanaPreTrainedModel):
    """Embedding, blocks and final norm; returns hidden states `[B, T, D]`."""

    def __init__(self, config: NirvanaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bank = WeightBank(config)
        self.layers = nn.ModuleList(
            NirvanaBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]` instead.
            attention_mask: `[B, past + T]`, 0 at padding; or what `create_masks` returned.
            position_ids: `[B, T]`; wherever they do not go on by one, a new sample starts and no
                state crosses (packed documents).
            past_key_values: the library's cache.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = create_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids
            )
        h, fast = inputs_embeds, self.bank.start(inputs_embeds)
        for layer in self.layers:
            h, fast = layer(h, fast, self.bank, masks, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(h), past_key_values=past_key_values if use_cache else None
        )


class NirvanaForCausalLM(NirvanaPreTrainedModel, GenerationMixin):
    """`NirvanaModel` with the language head, tied to the embedding by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NirvanaConfig):
        super().__init__(config)
        self.model = NirvanaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `NirvanaModel.forward`, and:

        Args:
            labels: `[B, T]`, -100 where nothing is asked; the loss shifts them by one.
            logits_to_keep: only the last so many positions get logits (0: all), or which ones.

        Returns: logits `[B, T, vocab_size]`, the loss, the cache, hidden states when asked for.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    @staticmethod
    def create_masks_for_generate(
        config: NirvanaConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Masks:
        """The masks made outside a compiled forward; the library calls this by its name."""
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)


def create_masks(
    config: NirvanaConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None,
) -> Masks:
    """What may see what, once for all layers.

    Returns:
        segments: `[B, T]` or None, see `nirvana.ops`; padding is a sample of its own, so that it
            reaches nothing.
        window: `[B, 1, T, S]`, true where a query sees a cached or new key; None when there are
            only new keys, then window and segments say it all.
        positions: `[B, T]` or `[1, T]`, for rotary embeddings.
    """
    B, T = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past, num_keys, offset = 0, T, 0
    if past_key_values is not None:
        first = config.num_prelude_layers
        past = past_key_values.get_seq_length(first)
        num_keys, offset = past_key_values.get_mask_sizes(T, first)
    new = torch.arange(past, past + T, device=device)
    segments = _segments(attention_mask, position_ids, B, T, past)
    window = None
    if (num_keys, offset) != (T, 0):
        keys = torch.arange(offset, offset + num_keys, device=device)
        window = keys <= new[:, None]
        if config.sliding_window is not None:
            window = window & (keys > new[:, None] - config.sliding_window)
        window = window[None]
        if attention_mask is not None:
            padded = F.pad(attention_mask, (0, max(0, offset + num_keys - attention_mask.shape[1])))
            window = window & padded[:, None, offset : offset + num_keys].bool()
        if segments is not None:
            before = past - offset
            owner = F.pad(segments, (before, num_keys - before - T))
            window = window & (owner[:, None] == segments[:, :, None])
        # A padded query sees itself: a row that sees nothing would be NaN.
        window = (window | (keys == new[:, None]))[:, None].expand(B, 1, -1, -1)
    positions = new[None] if position_ids is None else position_ids
    return {"segments": segments, "window": window, "positions": positions}


def _segments(
    attention_mask: Tensor | None, position_ids: Tensor | None, B: int, T: int, past: int
) -> Tensor | None:
    """A count of the sample borders before and at every token; None where there are none."""
    given = [x for x in (attention_mask, position_ids) if x is not None]
    if T == 1 or not given:
        return None
    border = torch.zeros(B, T, dtype=torch.bool, device=given[0].device)
    if position_ids is not None:
        border[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        if past > 0:
            border[:, 0] |= position_ids[:, 0] == 0
    if attention_mask is not None:
        local = attention_mask[:, -T:]
        border[:, 1:] |= local[:, 1:] != local[:, :-1]
    # Inference looks whether there is any border at all; a training step must not wait for that.
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not border.any():
        return None
    return border.cumsum(1)


AutoModel.register(NirvanaConfig, NirvanaModel, exist_ok=True)
AutoModelForCausalLM.register(NirvanaConfig, NirvanaForCausalLM, exist_ok=True)
