"""The models to measure: ours and its peers, of the same width and about the same size."""

import importlib
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana.model.config import NirvanaConfig
from nirvana.model.nirvana import NirvanaForCausalLM

OURS = "nirvana"


def nirvana(config: NirvanaConfig) -> nn.Module:
    """Our model."""
    return NirvanaForCausalLM(config)


def gated_deltanet(config: NirvanaConfig) -> nn.Module:
    """flash-linear-attention's Gated DeltaNet: six heads of D/8, values twice as wide.

    At `1.3b` this is that library's default model: 21 layers, 1.32 B parameters.
    """
    models = importlib.import_module("fla.models")
    D = config.hidden_size
    return models.GatedDeltaNetForCausalLM(
        models.GatedDeltaNetConfig(
            vocab_size=config.vocab_size,
            hidden_size=D,
            num_hidden_layers=_depth(config, 21),
            head_dim=D // 8,
            num_heads=6,
            expand_v=2,
            intermediate_size=config.intermediate_size,
            tie_word_embeddings=True,
            fuse_cross_entropy=True,
        )
    )


def llama(config: NirvanaConfig) -> nn.Module:
    """transformers' Llama with SDPA: at `1.3b` 24 layers, 1.30 B parameters."""
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=_depth(config, 24),
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size or 4 * config.hidden_size,
            max_position_embeddings=2**20,
            tie_word_embeddings=True,
        ),
        attn_implementation="sdpa",
    )


PEERS: dict[str, Callable[[NirvanaConfig], nn.Module]] = {
    "gated_deltanet": gated_deltanet,
    "llama": llama,
    "llama_compiled": llama,
}


def build(
    name: str, config: NirvanaConfig, device: torch.device, dtype: torch.dtype, compiled: bool
) -> nn.Module:
    """Builds a model with random weights.

    Args:
        name: `OURS`, or one of `PEERS`.
        config: whose sizes it has.
        device: of its parameters.
        dtype: of its parameters.
        compiled: compile each block of `llama_compiled`. Our model is compiled by the measurements,
            the others stay eager.

    Returns:
        the model.
    """
    torch.manual_seed(0)
    with device:
        model = (nirvana if name == OURS else PEERS[name])(config).to(dtype)
    if compiled and name == "llama_compiled":
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.compile()
    return model


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def _depth(config: NirvanaConfig, at_22_layers: int) -> int:
    """Layers of a peer that has `at_22_layers` of them where ours has 22."""
    return max(1, round(config.num_hidden_layers * at_22_layers / 22))
