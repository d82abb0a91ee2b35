"""A specialist: tokens of another domain read by a frozen language model.

The domain supplies an encoder (signal -> tokens) and a decoder (hidden states of the tokens ->
signal); this module connects them to the language model and depends on neither.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class SpecialistOutput(NamedTuple):
    """The backbone's output for a sample.

    Attributes:
        hidden: `[B, N, D]`, hidden states of the foreign tokens.
        logits: `[B, M, vocabulary]` of the text's positions, by the backbone's own head; logits
            at position i predict text token i + 1. None without text.
    """

    hidden: Tensor
    logits: Tensor | None = None


class Specialist(nn.Module):
    """[start, N foreign tokens, end, text] through a frozen backbone.

    Gradients flow through the backbone, but its parameters do not require them, and it stays in
    eval mode. The normalisation of the foreign tokens and the start and end vectors are learned.

    Args:
        backbone: a causal language model of the transformers library; None is the identity (the
            foreign tokens are their own hidden states, no text).
        dim: D, the backbone's hidden size.
    """

    backbone: PreTrainedModel | None

    def __init__(self, backbone: PreTrainedModel | None, dim: int):
        super().__init__()
        if backbone is not None:
            dim = backbone.config.hidden_size
            backbone.requires_grad_(False).eval()
        self.backbone = backbone
        self.norm = nn.LayerNorm(dim)
        self.start = nn.Parameter(torch.empty(dim))
        self.end = nn.Parameter(torch.empty(dim))
        scale = 0.02
        if backbone is not None:
            # Foreign tokens get the scale of the word embeddings.
            embedding = backbone.get_input_embeddings().weight
            scale = float(torch.as_tensor(embedding).float().std())
        nn.init.constant_(self.norm.weight, scale)
        nn.init.normal_(self.start, std=scale)
        nn.init.normal_(self.end, std=scale)

    def train(self, mode: bool = True) -> "Specialist":
        super().train(mode)
        if self.backbone is not None:
            self.backbone.eval()
        return self

    def forward(self, foreign: Tensor, text: Tensor | None = None) -> SpecialistOutput:
        """Reads foreign tokens, and optionally text after them.

        Args:
            foreign: `[B, N, D]`, tokens of the domain's encoder.
            text: `[B, M]`, token ids of prompt and answer after the end token.

        Returns:
            hidden states of the foreign tokens, and logits at the text's positions.

        Raises:
            ValueError: text for the identity, which has no head.
        """
        tokens = self.norm(foreign)
        if self.backbone is None:
            if text is not None:
                raise ValueError("text needs a backbone: the identity has no language head")
            return SpecialistOutput(tokens)
        B, N, _ = tokens.shape
        embeds = [self.start.expand(B, 1, -1), tokens, self.end.expand(B, 1, -1)]
        if text is not None:
            embeds.append(self.backbone.get_input_embeddings()(text).to(tokens.dtype))
        h = self.backbone.base_model(
            inputs_embeds=torch.cat(embeds, dim=1).to(self.backbone.dtype), use_cache=False
        ).last_hidden_state
        if text is None:
            return SpecialistOutput(h[:, 1 : N + 1])
        head = self.backbone.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return SpecialistOutput(h[:, 1 : N + 1], head(h[:, N + 2 :]))


def own_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A module's state without that of the frozen backbones in it.

    Args:
        module: any module.

    Returns:
        the state by name, as of `state_dict`.
    """
    frozen = [
        f"{name}.backbone." if name else "backbone."
        for name, part in module.named_modules()
        if isinstance(part, Specialist)
    ]
    state = module.state_dict()
    return {name: x for name, x in state.items() if not name.startswith(tuple(frozen))}
