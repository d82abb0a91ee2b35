"""The arguments of a forward: those of the library without effect here, and unknown ones."""

from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any

WITHOUT_EFFECT = {
    "cu_seq_lens_k": "the same borders as cu_seq_lens_q",
    "max_length_q": "the longest packed sample, for FlashAttention",
    "max_length_k": "the same for keys",
    "output_attentions": "no attention matrix exists; the output's is None",
    "output_router_logits": "there are no experts",
    "tokenizer": "the server hands it to `generate`, which passes it on",
    "token_type_ids": "tokenizers add it; there are no token types",
    "num_items_in_batch": "the Trainer sends it with every batch; the loss reads it",
}
"""Arguments that transformers, tokenizers and collators pass, and why they are ignored."""

OTHER_NAMES = {
    "document_ids": "seq_idx",
    "segment_ids": "seq_idx",
    "sequence_ids": "seq_idx",
    "packed_seq_params": "cu_seqlens",
    "cache_params": "cache",
}
"""Names that other libraries have for our arguments."""

READ_BY_DECORATORS = ("output_hidden_states", "return_dict", "is_causal")
"""Arguments that the library's decorators of a forward read."""


def check_arguments(forward: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raises for arguments that no part of the model reads.

    Args:
        forward: the method, for its named arguments.
        kwargs: the other arguments that it received.

    Raises:
        TypeError: for an unknown argument; the message names it and the closest known one.
        ValueError: for `is_causal=False`.
    """
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal = False is impossible: the model's states are causal")
    for name in kwargs:
        if name not in WITHOUT_EFFECT and name not in READ_BY_DECORATORS:
            raise TypeError(_unexpected(name, forward))


def _unexpected(name: str, forward: Callable[..., Any]) -> str:
    known = [each for each in signature(forward).parameters if each not in ("self", "kwargs")]
    close = get_close_matches(name, [*known, "output_hidden_states"], n=1, cutoff=0.5)
    meant = OTHER_NAMES.get(name) or (close[0] if close else None)
    hint = f": did you mean {meant!r}?" if meant else ""
    return f"{forward.__qualname__}() got an unexpected argument {name!r}{hint}"
