"""Classification of whole sequences and of tokens: the library's generic classes on our trunk."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from nirvana.model.cache import CACHE_FIELD, in_output
from nirvana.model.nirvana import NirvanaPreTrainedModel
from nirvana.model.rows import may_sync, row_layout, sample_numbers


class NirvanaForSequenceClassification(GenericForSequenceClassification, NirvanaPreTrainedModel):
    """A label, or with `num_labels` = 1 a score, from the hidden state of each row's last token.

    The library's class with its own way to that token: padding is what `attention_mask` hides, and
    only without one what equals `pad_token_id`, which may be the token that ends a text. A row is
    one sample. No cache is made unless `use_cache` requests one.
    """

    score: nn.Linear

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Computes the logits of every row and the loss.

        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]` instead.
            attention_mask: `[B, past + T]`, 0 at padding.
            position_ids: see `NirvanaModel.forward`.
            inputs_embeds: `[B, T, D]`, in place of tokens.
            labels: `[B]`, or `[B, num_labels]`, as the library's `problem_type` has it.
            use_cache: return the cache.
            kwargs: see `NirvanaModel.forward`.

        Returns:
            logits `[B, num_labels]`, the loss, the cache, and hidden states if requested.

        Raises:
            ValueError: for packed samples and `return_state`; for several rows without
                `attention_mask` if the configuration has no `pad_token_id`.
        """
        if kwargs.get("return_state"):
            raise ValueError("a classifier returns no state: its trunk, model.model, does")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            return_dict=True,
            **kwargs,
        )
        h = outputs.last_hidden_state
        continued = any(kwargs.get(n) is not None for n in ("cache", "past_key_values", "state"))
        real = self._real(h, input_ids, attention_mask, continued)
        borders = [kwargs.get(name) for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx")]
        packed = any(each is not None for each in borders)
        read = may_sync() and not continued
        if packed or (read and _several(real, attention_mask, position_ids)):
            raise ValueError("packed samples have a label each: put every sample into a row")
        place = torch.arange(h.shape[1], device=h.device)
        rows = torch.arange(h.shape[0], device=h.device)
        pooled = self.score(h[rows, (real * place).argmax(1)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled, labels=labels, pooled_logits=pooled, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=pooled,
            hidden_states=outputs.hidden_states,
            **in_output(outputs.get(CACHE_FIELD)),
        )

    def _real(
        self, h: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, continued: bool
    ) -> Tensor:
        """Where the tokens are not padding, `[B, T]`."""
        B, T = h.shape[:2]
        if attention_mask is not None:
            mask = attention_mask.to(h.device)
            return (mask[:, -T:] if continued else sample_numbers(mask, B, T, 0)) != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        if input_ids is not None and B > 1:
            raise ValueError(
                "several rows need an attention_mask, or a pad_token_id to find padding"
            )
        return torch.ones(B, T, dtype=torch.bool, device=h.device)


def _several(real: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether a row holds several samples, by the rules of `row_layout`.

    Args:
        real: `[B, T]`, where the tokens are not padding.
        attention_mask: see `row_layout`.
        position_ids: see `row_layout`.
    """
    given = attention_mask, position_ids, None, None
    row = row_layout(*given, *real.shape, past=0, device=real.device, cached=False)
    if row.border is None:
        return False
    if row.order is not None:
        real = real.gather(1, row.order)
    begun = row.border & real
    begun[:, 0] = real[:, 0]
    return bool((begun.sum(1) > 1).any())


class NirvanaForTokenClassification(GenericForTokenClassification, NirvanaPreTrainedModel):
    """A label for every token, `logits` `[B, T, num_labels]`; packed samples as in the trunk."""
