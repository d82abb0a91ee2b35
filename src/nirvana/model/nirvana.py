"""The Nirvana language model."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nirvana.model.arguments import check_arguments
from nirvana.model.attention import QKV, RMSNorm
from nirvana.model.block import CheckpointedWithGradients, NirvanaBlock
from nirvana.model.cache import (
    CACHE_FIELD,
    StepDecoder,
    in_output,
    refuse_contents,
    refuse_in_export,
    usable_cache,
)
from nirvana.model.config import NirvanaConfig
from nirvana.model.generation import DecoderGenerationMixin, require_decodable
from nirvana.model.loss import fused_loss, is_plain, shifted, z_loss
from nirvana.model.masks import Borders, Masks, create_masks, create_state_masks
from nirvana.model.outputs import (
    NirvanaCausalLMOutputWithPast,
    NirvanaOutputWithPast,
    reordered,
    restore_order,
)
from nirvana.model.state import LayerStates, NewStates, State
from nirvana.model.trigger import NoBank, Trigger, TriggerTrace, WeightBank
from nirvana.model.updater import Updater
from nirvana.ops import in_autocast, warn_without_kernels
from nirvana.ops.chunks import is_exporting


class NirvanaPreTrainedModel(PreTrainedModel):
    """The declarations that the library reads, every initialisation, and the facts of the model."""

    config: NirvanaConfig
    config_class = NirvanaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NirvanaBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _skip_keys_device_placement = ["cache", "past_key_values", "states"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": NirvanaBlock}  # noqa: RUF012
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Matrices and embeddings: normal, `initializer_range`; norms: one. Beyond these:

        - convolutions: uniform within 1 / sqrt(width);
        - decay: A uniform in 1..16, time step log-uniform in 0.001..0.1 through softplus;
        - second low-rank factors (window_up, window_out, zeta), and a full output projection of the
          window branch: zero, so a = 0 and zeta = 0; biases of q, k and v: zero;
        - a constant gate: logit zero, t = 1/2;
        - bank: weight normal / sqrt(C R); gain 1 / R, so that f starts as x + n(z), bias and
          shift 0; each with noise, without which the R entries would always stay equal;
        - Trigger: step size and decay from the configuration.
        """
        super()._init_weights(module)
        if isinstance(module, Updater | QKV | WeightBank | Trigger):
            module.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimiser should not decay.

        Gains, shifts and gates have a natural value that is not zero, and rows of an embedding
        that occur rarely would only shrink: decay is for the matrices of linear maps.

        Returns:
            the names, as in `named_parameters`.
        """
        undecayed = ("bank.gain", "bank.bias", "bank.shift", "embed_tokens.weight")
        return {n for n, p in self.named_parameters() if p.ndim < 2 or n.endswith(undecayed)}


class NirvanaModel(CheckpointedWithGradients, NirvanaPreTrainedModel):
    """Embedding, blocks and final norm; returns hidden states `[B, T, D]`."""

    def __init__(self, config: NirvanaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.bank = (WeightBank if config.has_trigger else NoBank)(config, initialise=False)
        self.layers = nn.ModuleList(
            NirvanaBlock(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Masks | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        cu_seqlens: Borders | None = None,
        cu_seq_lens_q: Borders | None = None,
        seq_idx: Tensor | None = None,
        output_trigger: bool = False,
        state: State | None = None,
        return_state: bool = False,
        **kwargs: Any,
    ) -> NirvanaOutputWithPast:
        """Computes hidden states.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]` instead.
            attention_mask: `[B, past + T]`, 0 at padding; or another form that
                `nirvana.model.rows.row_layout` reads, or the result of `create_masks`. With `state`
                or `return_state` `[B, T]`, see `nirvana.model.rows.chunk_layout`.
            position_ids: `[B, T]`; wherever they do not increase by one, a new sample starts and no
                state crosses (packed documents). When continuing from the cache of a packed row,
                pass `position_ids` relative to the current sample.
            cache: the library's cache; `past_key_values` is its other name.
            inputs_embeds: `[B, T, D]`, in place of tokens.
            use_cache: return the cache, a new one if none is given.
            past_key_values: see `cache`.
            cu_seqlens: `[documents + 1]`, where packed documents start and end in the batch laid
                out as one row. `cu_seq_lens_q` is its other name.
            cu_seq_lens_q: see `cu_seqlens`.
            seq_idx: `[B, T]`, a number for each document.
            output_trigger: return `trigger`, a `TriggerTrace` for each layer with a Trigger.
            state: the state after the tokens before these, which a forward with `return_state`
                returned; in place of a cache. Gradients flow through it.
            return_state: return `state`, the state after these tokens, and no cache.
            kwargs: `output_hidden_states` and `return_dict` of the library, and the arguments that
                `nirvana.model.arguments` lists as without effect.

        Returns:
            hidden states `[B, T, D]` after the final norm, the cache, the traces and the state.

        Raises:
            TypeError: for an unknown argument, and for a cache that is not a `Cache`.
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for masks
                and borders that `row_layout` rejects, and caches that `usable_cache` rejects; for a
                cache beside a state, and a state that is not one of this model and batch; for a
                cache that holds tokens in gradient checkpointing.
        """
        check_arguments(type(self).forward, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if cu_seqlens is not None and cu_seq_lens_q is not None:
            raise ValueError("cu_seqlens and cu_seq_lens_q are two names of one argument: give one")
        functional = state is not None or return_state
        if functional and not (cache is None and past_key_values is None):
            raise ValueError("state and cache are two ways to continue a text: give one")
        if self.training and self.gradient_checkpointing:
            refuse_contents(self.config, cache, past_key_values)
            cache = past_key_values = None  # the second forward would write to it again
            if functional and self._checkpoints_reentrantly():
                raise ValueError(
                    "states have no gradient in reentrant checkpointing: "
                    'gradient_checkpointing_enable({"use_reentrant": False})'
                )
        cache = usable_cache(self.config, cache, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if state is not None:
            state.require(self.config, inputs_embeds.shape[0])
        if use_cache and cache is None and not (functional or is_exporting()):
            cache = DynamicCache(config=self.config)
        masks = attention_mask
        if not isinstance(masks, dict):
            borders = cu_seq_lens_q if cu_seqlens is None else cu_seqlens
            given = (position_ids, borders, seq_idx)
            if functional:
                masks = create_state_masks(self.config, inputs_embeds, masks, state, *given)
            else:
                masks = create_masks(self.config, inputs_embeds, masks, cache, *given)
        order = masks["order"]
        if order is not None:
            inputs_embeds = reordered(inputs_embeds, order)
        kwargs["return_dict"] = True
        states = NewStates(self.config, state, masks["lengths"]) if functional else cache
        use_cache = bool(use_cache) and cache is not None
        outputs = self._run_blocks(
            inputs_embeds, masks, states, use_cache, output_trigger, **kwargs
        )
        if order is not None:
            restore_order(outputs, order.argsort(1))
        if return_state and isinstance(states, NewStates):
            outputs["state"] = states.state_after(masks)
        return outputs

    def _checkpoints_reentrantly(self) -> bool:
        checkpoint = getattr(self, "_gradient_checkpointing_func", None)
        return getattr(checkpoint, "keywords", {}).get("use_reentrant", False)

    @capture_outputs
    def _run_blocks(
        self,
        inputs_embeds: Tensor,
        masks: Masks,
        states: LayerStates | None,
        use_cache: bool,
        output_trigger: bool,
        **kwargs: Any,
    ) -> NirvanaOutputWithPast:
        """The blocks, over columns in the order of the masks."""
        traces: list[TriggerTrace] | None = [] if output_trigger else None
        h = in_autocast(inputs_embeds)  # else a float32 table would make all residuals float32
        warn_without_kernels(h, self.config.head_dim or 0, self.config.without_kernels)
        fast = self.bank.start(h)
        for layer in self.layers if h.shape[1] > 0 else ():
            h, fast = layer(h, fast, self.bank, masks, states=states, traces=traces)
        return NirvanaOutputWithPast(
            last_hidden_state=self.norm(h),
            trigger=None if traces is None else tuple(traces),
            **in_output(states if use_cache else None),  # type: ignore[arg-type]
        )


NO_CONTINUOUS_BATCHING = (
    "continuous batching is not possible: transformers pages keys and values of attention layers, "
    "and Nirvana's layers also have states of constant size; use generate with rows of a batch"
)


class NirvanaForCausalLM(NirvanaPreTrainedModel, DecoderGenerationMixin):
    """`NirvanaModel` with a language head, tied to the embedding by default."""

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
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        cu_seqlens: Borders | None = None,
        cu_seq_lens_q: Borders | None = None,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        output_trigger: bool = False,
        state: State | None = None,
        return_state: bool = False,
        **kwargs: Any,
    ) -> NirvanaCausalLMOutputWithPast:
        """Computes logits and the loss; arguments as of `NirvanaModel.forward`, and:

        Args:
            labels: `[B, T]`, -100 where the loss leaves a token out; the loss shifts them by one.
            logits_to_keep: the number of last positions that get logits (0: all), or their indices.
            num_items_in_batch: the divisor of the summed loss; None: the number of labels.
            skip_logits: return the loss alone, for training; needs labels and returns no cache.
                With a plain head `nirvana.ops.linear_cross_entropy` computes it, and the logits of
                all tokens never exist together; a head with an adapter, quantised or replaced
                computes them.
            kwargs: `shift_labels` `[B, T]`, labels that are shifted already, in place of `labels`;
                `z_loss`, the weight of the mean of (log Z)^2 in the loss, Z the sum of the
                exponentials of a token's logits; and those of `NirvanaModel.forward`.

        Returns:
            logits `[B, T, vocab_size]` (None if skipped), the loss, the cache, the traces, the
            state, hidden states if `output_hidden_states`, and the term of `z_loss` if it is not 0.

        Raises:
            TypeError: see `NirvanaModel.forward`.
            ValueError: see `NirvanaModel.forward`; for `skip_logits` without labels; and for
                arguments that a `StepDecoder` does not read.
        """
        # Not in the signature: the Trainer waits for every label that it finds there.
        shift_labels = kwargs.pop("shift_labels", None)
        z_weight = kwargs.pop("z_loss", 0.0)
        check_arguments(type(self).forward, kwargs)
        if skip_logits and labels is None and shift_labels is None:
            raise ValueError("skip_logits leaves nothing to compute without labels")
        if skip_logits and is_exporting():
            raise ValueError(
                "torch.export needs logits: without them the loss is a loop over tokens"
            )
        decoder = past_key_values if cache is None else cache
        if isinstance(decoder, StepDecoder):
            refuse_in_export(decoder)
            unread = [cu_seqlens, cu_seq_lens_q, seq_idx, state, labels]
            require_decodable(unread, position_ids, attention_mask, return_state)
            return self._decode(decoder, input_ids, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=False if skip_logits else use_cache,
            past_key_values=past_key_values,
            cu_seqlens=cu_seqlens,
            cu_seq_lens_q=cu_seq_lens_q,
            seq_idx=seq_idx,
            output_trigger=output_trigger,
            state=state,
            return_state=return_state,
            return_dict=True,  # whatever the configuration has for this model's own output
            **kwargs,
        )
        h, logits, loss, z_term = outputs.last_hidden_state, None, None, None
        if skip_logits and is_plain(self.lm_head):
            targets = shifted(labels, shift_labels)
            loss, z_term = fused_loss(h, self.lm_head.weight, targets, num_items_in_batch, z_weight)
        else:
            keep = slice(-logits_to_keep, None)
            keep = keep if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(h if skip_logits else h[:, keep])
            if labels is not None or shift_labels is not None:
                loss = self.loss_function(
                    logits,
                    labels,
                    self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shift_labels,
                )
                if z_weight:
                    targets = shifted(labels, shift_labels)
                    z_term = z_loss(logits, targets, num_items_in_batch, z_weight)
                    loss = loss + z_term
        return NirvanaCausalLMOutputWithPast(
            loss=loss,
            z_loss=z_term,
            logits=None if skip_logits else logits,
            hidden_states=outputs.hidden_states,
            trigger=outputs.trigger,
            state=outputs.state,
            **in_output(outputs.get(CACHE_FIELD)),
        )

    def mixed(
        self, inputs: Sequence[Tensor], position_ids: Tensor | None, cu_seqlens: Borders | None
    ) -> tuple[Tensor, ...]:
        """Computes every layer's Updater alone; only the fast parameters pass between them.

        Args:
            inputs: `[B, T, D]` for each layer, in place of the normalised residual stream.
            position_ids: see `NirvanaModel.forward`.
            cu_seqlens: see `NirvanaModel.forward`.

        Returns:
            `[B, T, D]` for each layer, what it would add to the residual stream.
        """
        trunk, first = self.model, inputs[0]
        masks = create_masks(self.config, first, None, None, position_ids, cu_seqlens)
        fast, outputs = trunk.bank.start(in_autocast(first)), []
        for layer, x in zip(trunk.layers, inputs, strict=True):
            y, fast = layer.mix(in_autocast(x), fast, trunk.bank, masks)  # type: ignore[operator]
            outputs.append(y)
        return tuple(outputs)

    def flops_per_token(self, context_length: int) -> float:
        """Floating-point operations of a forward and a backward pass for each token of a row.

        The useful ones: recomputation is not counted. Products with weights, 6 for each entry (the
        tied embedding counts once, as the head); the delta rule, three products with the state;
        window attention, two products with the keys that a token attends to on average in a row
        that is one document; the Trigger, two products with the bank.

        Args:
            context_length: tokens of a row.

        Returns:
            FLOPs.
        """
        config = self.config
        T, (H, _, K) = context_length, config.head_sizes
        others = ("conv_weight", "bank.gain", "bank.bias", "bank.shift")
        weights = sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if (
                (parameter.ndim == 2 and not name.endswith(others))
                and (config.tie_word_embeddings or "embed_tokens" not in name)
            )
            or name.endswith("window_up")
        )
        W = T if config.sliding_window is None else min(T, config.sliding_window)
        keys = W - W * (W - 1) / (2 * T) + config.num_sinks * (T - W) / T
        later = config.num_hidden_layers - config.num_prelude_layers
        linear = config.num_hidden_layers - (later if config.branches == "window" else 0)
        windows = 0 if config.branches == "linear" else later
        triggers = later if config.has_trigger else 0
        forward = 2 * weights + linear * 6 * H * K**2 + windows * 4 * keys * H * K
        forward += triggers * 4 * config.task_dim**2 * config.bank_size
        return 3.0 * forward

    def _decode(
        self, decoder: StepDecoder, input_ids: Tensor | None, attention_mask: Tensor | Masks | None
    ) -> NirvanaCausalLMOutputWithPast:
        """The last token's logits, computed by the decoder."""
        if input_ids is None:
            raise ValueError("a Decoder reads input_ids, not inputs_embeds")
        mask = attention_mask if isinstance(attention_mask, Tensor) else None
        logits = decoder.read(input_ids, mask)[:, None]
        return NirvanaCausalLMOutputWithPast(logits=logits, **in_output(decoder))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused. The library calls this by its name before all continuous batching.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_CONTINUOUS_BATCHING)

    @staticmethod
    def create_masks_for_generate(
        config: NirvanaConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Masks | Tensor | None:
        """Creates the masks outside a compiled forward. The library calls this by its name, with
        the arguments of all its models."""
        cache = past_key_values if cache is None else cache
        if isinstance(cache, StepDecoder):
            return attention_mask
        return create_masks(config, inputs_embeds, attention_mask, cache, position_ids)


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles every block in place; blocks of one kind share the code.

    Args:
        blocks: the layers of a model.
    """
    for block in blocks:
        block.compile(backend=_inductor, dynamic=False)


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """PyTorch's compiler, which recomputes in the backward the cheap inputs of matrix products
    (norms, SwiGLU's product, the gated output) instead of saving them: a third of the
    activations."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)
