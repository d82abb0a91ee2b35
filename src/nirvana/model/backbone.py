"""The frozen language model of a specialist: its kind and its weights."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from nirvana.errors import InputError
from nirvana.model.assets import load_language_model
from nirvana.model.config import preset
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.model.trigger import Trigger
from nirvana.packaged import packaged, resolve

Backbone = Literal["nirvana", "nirvana-without-trigger", "gated_deltanet", "transformer", "none"]
"""Kinds of backbone; "none" is the identity."""

DEFAULT = "default"
RANDOM = "random"
PACKAGED = "tiny"
RANDOM_SEED = 0


def load_backbone(
    kind: Backbone, weights: str = DEFAULT, device: str | torch.device = "cpu"
) -> PreTrainedModel | None:
    """Loads a backbone.

    Args:
        kind: of the model. "nirvana-without-trigger" is a Nirvana whose Triggers take no step.
        weights: folder in transformers' format, or a packaged name. "default" is the packaged
            `tiny` for a Nirvana; for the other two, of which no trained model is packaged, it is a
            network of `tiny`'s width and depth with random weights from a fixed seed. "random" is
            such a network of any kind, for a Nirvana of `tiny`'s own architecture.
        device: of the model.

    Returns:
        a language model in eval mode, float32; None for "none".

    Raises:
        InputError: for weights that do not exist or are of another kind.
    """
    if kind == "none":
        return None
    is_nirvana = kind in ("nirvana", "nirvana-without-trigger")
    if weights == RANDOM or (weights == DEFAULT and not is_nirvana):
        model = _random(kind)
    elif is_nirvana:
        model = load_language_model(_place(weights), device)[0]
    else:
        model = _foreign(weights, kind)
    if kind == "nirvana-without-trigger":
        for module in model.modules():
            if isinstance(module, Trigger):
                module.enabled = False
    nn.Module.to(model, device)
    return model.eval()


def backbone_folder(weights: str = DEFAULT) -> Path:
    """The folder of a backbone's weights and tokenizer.

    Args:
        weights: see `load_backbone`; "default" and "random" are the packaged `tiny`.

    Returns:
        the folder.

    Raises:
        InputError: for weights that do not exist.
    """
    return resolve(_place(weights))


def fingerprint(model: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> str:
    """SHA-256 over the names and values of a model's parameters; of sharded parameters, over the
    local shard.

    Args:
        model: any module.
        dtype: to which values are rounded first: in bfloat16 a checkpoint and its packaged bfloat16
            copy are the same backbone. None hashes the exact values.

    Returns:
        the digest, hexadecimal.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        values = part.detach().to("cpu", dtype or part.dtype).contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _place(weights: str) -> str:
    """Replaces "default", and "random", whose tokenizer it has, by the packaged folder."""
    return str(packaged(PACKAGED)) if weights in (DEFAULT, RANDOM) else weights


def _random(kind: str) -> PreTrainedModel:
    shape = preset(PACKAGED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        if kind in ("nirvana", "nirvana-without-trigger"):
            return NirvanaForCausalLM(shape)
        if kind == "gated_deltanet":
            return gated_deltanet(shape.num_hidden_layers, PACKAGED)
        return LlamaForCausalLM._from_config(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                num_hidden_layers=shape.num_hidden_layers,
                num_attention_heads=shape.num_attention_heads,
                intermediate_size=shape.intermediate_size or 0,
                tie_word_embeddings=True,
            ),
            attn_implementation="sdpa",
        )


def gated_deltanet(num_layers: int, size: str = PACKAGED, **overrides: Any) -> NirvanaForCausalLM:
    """Builds a Nirvana of prelude layers only (gated delta rule and SwiGLU), with random weights.

    Args:
        num_layers: number of layers.
        size: name of the preset that gives its width.
        overrides: further fields of `NirvanaConfig`.

    Returns:
        the model.
    """
    config = preset(
        size, num_hidden_layers=num_layers + 1, num_prelude_layers=num_layers, **overrides
    )
    model = NirvanaForCausalLM(config)
    # A configuration has at least one layer with a Trigger, here the last.
    del model.model.layers[num_layers:]
    return model


def _foreign(weights: str, kind: str) -> PreTrainedModel:
    folder = resolve(weights) if Path(weights).exists() else None
    if folder is None:
        raise InputError(f"no {kind} at {weights!r}: give a folder in transformers' format")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
    except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder} does not hold a language model: {reason}") from error
    if isinstance(model, NirvanaForCausalLM):
        raise InputError(f"{folder} holds a nirvana, not a {kind}; set backbone = 'nirvana'")
    return model
