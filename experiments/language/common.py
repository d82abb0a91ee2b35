"""What the study's programs share: the prepared data, and lines of results."""

import json
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from nirvana.errors import InputError
from nirvana.files import atomic_folder, sha256
from nirvana.train.config import LanguageConfig

HERE = Path(__file__).parent
FOLDER = HERE / "data"
RESULTS = HERE / "results.jsonl"
CANDIDATES = HERE / "candidates.jsonl"


def load_data(folder: Path) -> tuple[Path, dict[str, Any], str]:
    """Where each domain's token shards lie, what is scored, and a sum that identifies both.

    The shards are unpacked beside their archive, once.

    Raises:
        InputError: for data that `prepare.py` has not written.
    """
    train, scored = folder / "train.tar.xz", folder / "evaluation.json.xz"
    for file in (train, scored):
        if not file.is_file():
            raise InputError(f"{file}: no such file; write it with prepare.py")
    identity = sha256(train)[:8] + sha256(scored)[:8]
    shards = folder / f"shards-{identity[:8]}"
    try:
        if not shards.is_dir():
            with atomic_folder(shards) as new, tarfile.open(train) as tar:
                tar.extractall(new, filter="data")
        evaluation = json.loads(lzma.decompress(scored.read_bytes()))
    except (lzma.LZMAError, tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{folder}: damaged: {error}; write it anew with prepare.py") from None
    return shards, evaluation, identity


def trained_tokens(config: LanguageConfig) -> int:
    """How many tokens a training on one process reads."""
    rows = config.data.batch_size * config.optim.accumulation
    return config.run.steps * rows * config.data.context_length


def append_result(path: Path, line: dict[str, Any]) -> None:
    """Adds a line; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with lock, open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if it is not there; one that was cut off in writing is left out.

    Raises:
        InputError: for a damaged line before the last.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON") from None
    return found
