"""Tokenizers in folders of the transformers library."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.packaged import local_or_packaged

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
BOS_AND_EOS = ("bos_token", "eos_token")


def tokenizer_folder(path: str | Path) -> Path:
    """The folder with `tokenizer.json`: `path` itself, or `path/tokenizer` of token shards; `path`
    may be the name of a packaged model.

    Raises:
        InputError: when there is none.
    """
    found = local_or_packaged(path)
    for folder in (found, found / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise InputError(f"{path}: not a tokenizer: it has no tokenizer.json")


def load_tokenizer(path: str | Path, required: Sequence[str] = BOS_AND_EOS) -> Any:
    """The fast tokenizer in the folder `path`, see `tokenizer_folder`.

    Code that lies in the folder is not executed, whatever its configuration names, and nothing is
    fetched.

    Args:
        required: special tokens that it must have.

    Raises:
        InputError: when there is none, it is damaged, needs code of its own, or lacks a required
            token.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(path)
    try:
        # None instead of False would make transformers ask on a terminal.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises plain exceptions
        if _names_code(folder):
            raise InputError(
                f"{folder}: the tokenizer needs Python code of its own (auto_map in "
                "tokenizer_config.json), which is not executed; give one that works without"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}: not a readable tokenizer: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: not a fast tokenizer; save it with its tokenizer.json")
    for name in required:
        if getattr(tokenizer, name) is None:
            raise InputError(f"{folder}: the tokenizer has no {name}; name one in its config")
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _names_code(folder: Path) -> bool:
    """Whether a tokenizer's configuration names a class in a Python file."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("auto_map"))
