"""The prepared data of the study, and where its rows lie."""

from pathlib import Path
from typing import Any

from experiments.common.prepared import load_prepared
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
    return load_prepared(folder, "evaluation.json.xz", "experiments.language.prepare")


def trained_tokens(config: LanguageConfig) -> int:
    """How many tokens a training on one process reads."""
    rows = config.data.batch_size * config.optim.accumulation
    return config.run.steps * rows * config.data.context_length
