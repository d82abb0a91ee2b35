"""Resolves the names of models: a folder, or a checkpoint that ships with the package."""

from importlib import resources
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

PACKAGED = {"tiny": "language model", "codec": "MRI codec", "reporter": "MRI reporter"}


def packaged(name: str) -> Path:
    """The folder of a packaged checkpoint, even if the working directory has one of that name."""
    return Path(str(resources.files("nirvana") / "assets" / name))


def folder_of(name: str | Path, kind: str = "language model") -> Path:
    """The folder that `name` means, see `resolve`, whatever it holds and whether or not it is
    there."""
    if PACKAGED.get(str(name)) == kind and not Path(name).is_dir():
        return packaged(str(name))
    return Path(name)


def resolve(name: str | Path, kind: str = "language model") -> Path:
    """Resolves the name of a model.

    Args:
        name: an existing folder, or the name of a packaged checkpoint.
        kind: one of the values of `PACKAGED`; part of the error message, too.

    Returns:
        the model's folder.

    Raises:
        InputError: for a name that is neither, or a folder without a configuration or weights.
    """
    folder = folder_of(name, kind)
    if not folder.exists():
        names = [each for each, of_kind in PACKAGED.items() if of_kind == kind]
        raise InputError(f"no {kind} {str(name)!r}: give a folder, or {' or '.join(names)}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {kind}: it has no config.json")
    if not any(folder.glob("model*.safetensors")):
        raise InputError(f"{folder} holds no {kind}: it has no weights (model.safetensors)")
    return folder


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
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
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
    finally:
        if bars:
            logging.enable_progress_bar()
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
