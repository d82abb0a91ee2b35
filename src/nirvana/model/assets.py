"""Loading language models: from a folder, or under the name of a packaged checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from nirvana.data.tokenizer import load_tokenizer
from nirvana.errors import InputError
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.packaged import resolve


def load_language_model(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[NirvanaForCausalLM, PreTrainedTokenizerBase]:
    """Loads a language model; nothing in its folder is executed or unpickled.

    Args:
        name: see `resolve`.
        device: of the model.
        dtype: of its parameters.

    Returns:
        the model in eval mode, and its tokenizer.

    Raises:
        InputError: for a folder that does not hold a Nirvana model with its tokenizer.
    """
    folder = resolve(name)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json beside its weights")
    try:
        with without_progress_bars():
            loaded: Any = NirvanaForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (
        SafetensorError,
        StrictDataclassError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"{folder} does not hold a Nirvana language model: {first}") from error
    model, report = loaded
    wrong = [
        f"{what}: {name}" for what, names in report.items() for name in sorted(map(str, names))
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(wrong[:3])}{more}"
        )
    return model.eval().to(device), load_tokenizer(folder, required=())


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disables the progress bars of transformers, which would break up ours."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
