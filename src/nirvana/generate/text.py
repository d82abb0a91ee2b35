"""Text to tokens and on: prompts and their sampled continuations."""

from typing import Any

import torch
from torch import Tensor

from nirvana.data.tokenizer import text_encoder
from nirvana.errors import InputError


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt, BOS first.

    Args:
        tokenizer: of the model.
        prompt: any text.

    Raises:
        InputError: the tokenizer has no BOS or no EOS token.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise InputError("the model's tokenizer must have a BOS and an EOS token")
    return [tokenizer.bos_token_id, *text_encoder(tokenizer)([prompt])[0]]


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Continues the tokens of a prompt, until EOS at the latest.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        prompt: of `prompt_tokens`.
        max_new_tokens: tokens to write at most.
        temperature: 0 takes the likeliest token.
        top_p: sample from so much of the probability.
        seed: of torch's global generators, from which the library samples.
        **options: further arguments of the library's `generate`, such as `streamer`.

    Returns:
        `[1, T]`, the tokens of the prompt and of its continuation.
    """
    torch.manual_seed(seed)
    tokens = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
        **options,
    )
