"""Transformers with random weights, which models are adopted from."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nirvana.data.tokenizer import load_tokenizer


def save_random_teacher(folder: Path, **fields: Any) -> None:
    """Writes a random Llama beside the tokenizer that a folder holds.

    Args:
        folder: of the tokenizer.
        fields: of its configuration.
    """
    torch.manual_seed(0)
    size = len(load_tokenizer(folder))
    config = LlamaConfig(vocab_size=size, initializer_range=0.2, **fields)
    LlamaForCausalLM(config).save_pretrained(folder)
