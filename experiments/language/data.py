"""The prepared data of the study, and where its rows lie."""

import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import atomic_folder, sha256
from nirvana.train.config import LanguageConfig

HERE = Path(__file__).parent
FOLDER = HERE / "data"
RESULTS = HERE / "results.jsonl.xz"
CANDIDATES = HERE / "candidates.jsonl"


def load_data(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """Folder of each domain's token shards, what is scored, and a hash that identifies both.

    The shards are unpacked beside their archive, once.

    Raises:
        InputError: for data that `experiments.language.prepare` did not write.
    """
    train, scored = folder / "train.tar.xz", folder / "evaluation.json.xz"
    for file in (train, scored):
        if not file.is_file():
            raise InputError(f"{file}: no such file; write it with experiments.language.prepare")
    identity = sha256(train)[:8] + sha256(scored)[:8]
    shards = folder / f"shards-{identity[:8]}"
    try:
        if not shards.is_dir():
            with atomic_folder(shards) as new, tarfile.open(train) as tar:
                tar.extractall(new, filter="data")
        evaluation = json.loads(lzma.decompress(scored.read_bytes()))
    except (lzma.LZMAError, tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(
            f"{folder}: damaged: {error}; write it again with experiments.language.prepare"
        ) from None
    return shards, evaluation, identity


def trained_tokens(config: LanguageConfig) -> int:
    """How many tokens a training on one process reads."""
    rows = config.data.batch_size * config.optim.accumulation
    return config.run.steps * rows * config.data.context_length
