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
    train, texts = folder / "train.tar.xz", folder / scored
    for file in (train, texts):
        if not file.is_file():
            raise InputError(f"{file}: no such file; write it with {program}")
    identity = sha256(train)[:8] + sha256(texts)[:8]
    shards = folder / f"shards-{identity[:8]}"
    try:
        if not shards.is_dir():
            with atomic_folder(shards) as new, tarfile.open(train) as tar:
                tar.extractall(new, filter="data")
        content = json.loads(lzma.decompress(texts.read_bytes()))
    except (lzma.LZMAError, tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{folder}: damaged: {error}; write it again with {program}") from None
    return shards, content, identity
