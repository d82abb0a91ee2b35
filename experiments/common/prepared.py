"""The prepared data of a study: token shards for training, and what is scored."""

import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import atomic_folder, sha256


def load_prepared(folder: Path, scored: str, program: str) -> tuple[Path, dict[str, Any], str]:
    """Reads the data that a study's `prepare` wrote: `train.tar.xz`, and JSON in a .json.xz file.

    The shards are unpacked beside their archive, once.

    Args:
        folder: of the data.
        scored: name of the .json.xz file.
        program: that writes the data, for error messages.

    Returns:
        Folder of each domain's token shards, the content of `scored`, and a hash of both files.

    Raises:
        InputError: for data that `program` did not write.
    """
    train = folder / "train.tar.xz"
    if not train.is_file():
        raise InputError(f"{train}: no such file; write it with {program}")
    content, of_scored = load_scored(folder / scored, program)
    identity = sha256(train)[:8] + of_scored
    shards = folder / f"shards-{identity[:8]}"
    try:
        if not shards.is_dir():
            with atomic_folder(shards) as new, tarfile.open(train) as tar:
                tar.extractall(new, filter="data")
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{folder}: damaged: {error}; write it again with {program}") from None
    return shards, content, identity


def load_scored(file: Path, program: str) -> tuple[dict[str, Any], str]:
    """Reads the JSON in a .json.xz file of a study's prepared data.

    Args:
        file: the file.
        program: that writes it, for error messages.

    Returns:
        its content, and a hash of the file.

    Raises:
        InputError: for a file that `program` did not write.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; write it with {program}")
    try:
        content = json.loads(lzma.decompress(file.read_bytes()))
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise InputError(f"{file}: damaged: {error}; write it again with {program}") from None
    return content, sha256(file)[:8]
