"""What the benchmarks of training share: made-up documents, and the settings of a short training.

Documents are random words whose number is log-normal, as in web text (a median of 400, a mean of
800 words); their content does not affect the time.
"""

import json
from pathlib import Path

import numpy as np

from nirvana.data.shards import tokenize
from nirvana.errors import InputError
from nirvana.packaged import config_names, packaged, packaged_config

TOKENIZER = packaged("tiny")


def configuration(preset: str) -> Path:
    """The file of settings that belongs to a preset.

    Raises:
        InputError: naming the presets that have one.
    """
    if preset not in config_names():
        raise InputError(f"--preset {preset}: known are {', '.join(config_names())}")
    return packaged_config(preset)


def write_shards(folder: Path, documents: int = 4000) -> Path:
    """Token shards of made-up documents, the same at every call."""
    random = np.random.default_rng(0)
    words = (TOKENIZER / "README.md").read_text(encoding="utf-8").split()
    text = folder / "text.jsonl"
    with open(text, "w", encoding="utf-8") as file:
        for length in random.lognormal(np.log(400), 1.18, documents).astype(int) + 1:
            file.write(json.dumps({"text": " ".join(random.choice(words, length))}) + "\n")
    tokenize([text], folder / "shards", TOKENIZER)
    return folder / "shards"


def overrides(
    shards: Path, out: Path, steps: int, warmup: int, batch_size: int, accumulation: int
) -> list[str]:
    """Arguments that make a configuration a training of `steps` on `shards` into `out`, without
    validations, samples and checkpoints on the way."""
    settings = {
        "data.train": f'{{ random = "{shards}" }}',
        "data.valid": "{}",
        "data.weights": "{}",
        "data.batch_size": batch_size,
        "data.sample_prompts": "[]",
        "optim.accumulation": accumulation,
        "optim.warmup_steps": warmup,
        "run.steps": steps,
        "run.checkpoint_interval": 0,
        "run.validation_interval": 0,
        "run.out": out,
    }
    return [f"--{key}={value}" for key, value in settings.items()]
