"""Where model names lead: a folder of the user's, or a checkpoint that ships with the package."""

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
    """The folder of a packaged checkpoint, whatever a folder of the user's is called."""
    return Path(str(resources.files("nirvana") / "assets" / name))


def resolve(name: str | Path, kind: str = "language model") -> Path:
    """The folder that `name` means: an existing folder, or a packaged checkpoint's name.

    Args:
        kind: one of the values of `PACKAGED`; also what the error calls it.

    Raises:
        InputError: for a name that is neither, or a folder without a configuration or weights.
    """
    folder = Path(name)
    if PACKAGED.get(str(name)) == kind and not folder.is_dir():
        folder = packaged(str(name))
    elif not folder.exists():
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
    """The model, in eval mode, and its tokenizer; see `resolve` for names.

    Raises:
        InputError: for what is not a Nirvana model with its tokenizer; nothing is executed or
            unpickled from the folder.
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
