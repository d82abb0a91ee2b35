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
        real = self._real(h, input_ids, attention_mask)
        starts = None if position_ids is None else real & (position_ids == 0)
        borders = [kwargs.get(name) for name in ("cu_seqlens", "cu_seq_lens_q", "seq_idx")]
        if any(x is not None for x in borders) or (starts is not None and starts.sum(1).max() > 1):
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

    def _real(self, h: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """Where the tokens are not padding, `[B, T]`."""
        B, T = h.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            return attention_mask[:, -T:].to(h.device) != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            return input_ids != self.config.pad_token_id
        if input_ids is not None and B > 1:
            raise ValueError(
                "several rows need an attention_mask, or a pad_token_id to find padding"
            )
        return torch.ones(B, T, dtype=torch.bool, device=h.device)


class NirvanaForTokenClassification(GenericForTokenClassification, NirvanaPreTrainedModel):
    """A label for every token, `logits` `[B, T, num_labels]`; packed samples as in the trunk."""
