"""A codec small enough to train in a test, on a small backbone of random weights."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from nirvana import NirvanaConfig, NirvanaForCausalLM
from nirvana.mri.model.config import CodecConfig
from nirvana.packaged import resolve

BACKBONE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "sliding_window": 256,
    "task_dim": 8,
    "bank_size": 4,
    "trigger_decay": 0.5,
}


def small_backbone(folder: Path) -> str:
    """Writes a language model with the packaged tokenizer; returns its name."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")
    }
    torch.manual_seed(1)
    config = NirvanaConfig(vocab_size=len(tokenizer), **BACKBONE, **special)
    model = NirvanaForCausalLM(config)
    with torch.no_grad():  # large random weights, whose outputs depend on their inputs
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_config(backbone: str) -> CodecConfig:
    """The codec's sizes."""
    return CodecConfig(
        backbone="none" if backbone == "none" else "nirvana",
        weights=backbone,
        encoder_cascades=0,
        image_cascades=0,
        vit_dim=16,
        vit_depth=1,
        vit_heads=2,
        token_dim=16,
    )
