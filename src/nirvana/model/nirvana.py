"""The Nirvana language model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nirvana.model.config import NirvanaConfig
from nirvana.model.decode import Decoder
from nirvana.model.masks import Masks, create_masks
from nirvana.model.trigger import NoBank, Trigger, TriggerReport, WeightBank
from nirvana.model.updater import Attention, RMSNorm, Updater
from nirvana.ops import in_autocast, swiglu
from nirvana.ops.cross_entropy import IGNORE, linear_cross_entropy


@dataclass
class NirvanaOutputWithPast(BaseModelOutputWithPast):
    """The library's output, and `trigger`: one report for each layer with a Trigger."""

    trigger: tuple[TriggerReport, ...] | None = None


@dataclass
class NirvanaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """The library's output, and `trigger`: one report for each layer with a Trigger."""

    trigger: tuple[TriggerReport, ...] | None = None


class SwiGLU(nn.Module):
    """silu(x W_gate) * (x W_up), then W_down; gate and up are one product."""

    def __init__(self, config: NirvanaConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class NirvanaBlock(GradientCheckpointingLayer):
    """Pre-norm block: the Updater under its Trigger, then SwiGLU."""

    def __init__(self, config: NirvanaConfig, layer_idx: int):
        super().__init__()
        self.updater_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attention = config.branches == "window" and layer_idx >= config.num_prelude_layers
        self.updater = (Attention if attention else Updater)(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        h: Tensor,
        fast: Tensor,
        bank: WeightBank,
        masks: Masks,
        past_key_values: Cache | None = None,
        reports: list[TriggerReport] | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, fast = self.updater(self.updater_norm(h), fast, bank, masks, past_key_values, reports)
        h = h + y
        return h + self.mlp(self.mlp_norm(h)), fast


class NirvanaPreTrainedModel(PreTrainedModel):
    """What the library needs to know, and every initialisation."""

    config: NirvanaConfig
    config_class = NirvanaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NirvanaBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NirvanaBlock}  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices and embeddings: normal, `initializer_range`; norms: one. Beyond these:

        - convolutions: uniform within 1 / sqrt(width);
        - decay: A uniform in 1..16, time step log-uniform in 0.001..0.1 through softplus;
        - second low-rank factors (window_up, window_out, zeta): zero, so a = 0 and zeta = 0;
        - a constant gate: logit zero, t = 1/2;
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
            if module.has_window:
                if module.constant:
                    init.zeros_(module.gate_logit)
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
        self.bank = (WeightBank if config.has_trigger else NoBank)(config)
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
        cu_seqlens: Tensor | None = None,
        output_trigger: bool = False,
        **kwargs: Any,
    ) -> NirvanaOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]` instead.
            attention_mask: `[B, past + T]`, 0 at padding; or what `create_masks` returned.
            position_ids: `[B, T]`; wherever they do not go on by one, a new sample starts and no
                state crosses (packed documents).
            past_key_values: the library's cache.
            cu_seqlens: `[documents + 1]`, where packed documents start and end in the batch laid
                out as one row; says the same without positions. `cu_seq_lens_q` is taken, too.
                Whoever goes on from a packed row's cache hands on `position_ids` that count
                within the sample.
            output_trigger: return `trigger`, a `TriggerReport` for each layer with a Trigger.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for an
                offloaded cache, unless the model has full attention layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        # Where windows bound the cache nothing is gained; and a layer's other states the library
        # moves away along with its keys, but hands out without waiting for them to come back.
        offloaded = getattr(past_key_values, "offloading", False)
        if offloaded and "full_attention" not in (self.config.layer_types or ()):
            raise ValueError(
                "an offloaded cache is only for models with full attention layers: "
                "use the dynamic or the static cache"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            borders = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
            masks = create_masks(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids, borders
            )
        reports: list[TriggerReport] | None = [] if output_trigger else None
        h = in_autocast(inputs_embeds)  # else a float32 table would make all residuals float32
        fast = self.bank.start(h)
        for layer in self.layers:
            h, fast = layer(
                h, fast, self.bank, masks, past_key_values=past_key_values, reports=reports
            )
        return NirvanaOutputWithPast(
            last_hidden_state=self.norm(h),
            past_key_values=past_key_values if use_cache else None,
            trigger=None if reports is None else tuple(reports),
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
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> NirvanaCausalLMOutputWithPast:
        """As `NirvanaModel.forward`, and:

        Args:
            labels: `[B, T]`, -100 where nothing is asked; the loss shifts them by one.
            logits_to_keep: only the last so many positions get logits (0: all), or which ones.
            skip_logits: the loss alone, from `nirvana.ops.linear_cross_entropy`: the logits of all
                tokens never exist together. For training; needs labels, makes no cache.

        Returns: logits `[B, T, vocab_size]` (None if skipped), the loss, the cache, hidden states
            when asked for.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits leaves nothing to compute without labels")
        if isinstance(past_key_values, Decoder):
            _refuse_what_a_decoder_ignores(labels, position_ids, **kwargs)
            return self._decode(past_key_values, input_ids, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if skip_logits else use_cache,
            **kwargs,
        )
        logits = loss = None
        if skip_logits and labels is not None:
            loss = self._loss(outputs.last_hidden_state, labels, **kwargs)
        else:
            keep = slice(-logits_to_keep, None)
            keep = keep if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, keep])
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return NirvanaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            trigger=outputs.trigger,
        )

    def _loss(
        self,
        h: Tensor,
        labels: Tensor,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The library's causal loss, without logits."""
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        shift_labels = shift_labels.flatten()
        if num_items_in_batch is None:
            num_items_in_batch = (shift_labels != IGNORE).sum()
        total = linear_cross_entropy(h.flatten(0, 1), self.lm_head.weight, shift_labels)
        return total / torch.as_tensor(num_items_in_batch, device=total.device)

    def _decode(
        self, decoder: Decoder, input_ids: Tensor | None, attention_mask: Tensor | Masks | None
    ) -> NirvanaCausalLMOutputWithPast:
        """The last token's logits, by the decoder's graph."""
        if input_ids is None:
            raise ValueError("a Decoder reads input_ids, not inputs_embeds")
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        new_text = decoder.length == 0 or input_ids.shape[1] > 1
        if mask is not None and new_text and not mask.all():
            raise ValueError("a Decoder takes rows of one length, without padding")
        logits = decoder.read(input_ids)[:, None]
        return NirvanaCausalLMOutputWithPast(logits=logits, past_key_values=decoder)

    @staticmethod
    def create_masks_for_generate(
        config: NirvanaConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Masks | Tensor | None:
        """The masks made outside a compiled forward; the library calls this by its name."""
        if isinstance(past_key_values, Decoder):
            return attention_mask
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)


def _refuse_what_a_decoder_ignores(
    labels: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> None:
    packed = cu_seqlens is not None or cu_seq_lens_q is not None
    if position_ids is not None and position_ids.shape[-1] > 1:
        packed = packed or bool((position_ids.diff(dim=-1) != 1).any())
    if packed or labels is not None:
        raise ValueError("a Decoder reads one sample a row, and gives logits, not a loss")


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles every block in place, one by one; those of a kind share the code."""
    for block in blocks:
        block.compile(backend=_inductor, dynamic=False)


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """PyTorch's compiler, told to compute again in the backward what it would keep of the cheap
    inputs of products (norms, SwiGLU's middle, the gated output): a third of the activations."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)
