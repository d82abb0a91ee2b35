"""Language models on the disk, in whichever form: folders, packaged ones, checkpoints of runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nirvana.data.tokenizer import load_tokenizer, same_tokens, tokenizer_folder
from nirvana.errors import InputError
from nirvana.model.assets import load_language_model
from nirvana.model.config import NirvanaConfig, checked_config, preset
from nirvana.packaged import folder_of, resolve
from nirvana.train.checkpoint import Checkpoint, find_checkpoint, restore
from nirvana.train.config import LanguageConfig, saved_language_config

# Fields without effect on weights and results, or that follow from others. Special tokens are
# compared with the tokenizers.
NOT_COMPARED = (
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "layer_types",
    "pad_token_id",
    "use_cache",
)
# A learned value is among the weights; the field only holds where it started.
LEARNED = ("trigger_lr", "trigger_decay")


@dataclass(frozen=True)
class SavedModel:
    """A language model on the disk.

    Attributes:
        folder: of the model, or of the checkpoint.
        config: of the model.
        tokenizer: folder of its tokenizer.
        checkpoint: the checkpoint; None for the folder of a model.
    """

    folder: Path
    config: NirvanaConfig
    tokenizer: Path
    checkpoint: Checkpoint | None = None

    def require_fit(self, config: NirvanaConfig, tokenizer: Any) -> None:
        """Checks that another model could have these weights.

        Args:
            config: of the other model.
            tokenizer: of its data.

        Raises:
            InputError: naming the fields that differ, or for a tokenizer with other tokens.
        """
        learned = [name for name in LEARNED if getattr(config, f"{name}_learnable")]
        compared = set(NirvanaConfig.__annotations__).difference(NOT_COMPARED, learned)
        pairs = {name: (getattr(self.config, name), getattr(config, name)) for name in compared}
        differences = [
            f"{name} is {there!r} there and {here!r} in [model]"
            for name, (there, here) in sorted(pairs.items())
            if there != here
        ]
        if differences:
            raise InputError(f"{self.folder} is another model: {'; '.join(differences)}")
        if not same_tokens(load_tokenizer(self.tokenizer), tokenizer):
            raise InputError(
                f"{self.folder} has another tokenizer than the data; write the token shards with: "
                f"nirvana data tokenize FILES --out DIR --tokenizer {self.tokenizer}"
            )

    def load(self, model: nn.Module) -> None:
        """Copies the weights into a model that they fit.

        Args:
            model: unsharded, of any floating dtype.

        Raises:
            InputError: for weights that cannot be read.
        """
        if self.checkpoint is not None:
            restore(self.checkpoint, model, model.named_parameters())
        else:
            loaded, _ = load_language_model(self.folder)
            model.load_state_dict(loaded.state_dict())


def model_folder(name: str | Path) -> Path:
    """Returns the folder that `find_model` reads, by a glance at the names of its files.

    Args:
        name: see `find_model`.

    Raises:
        InputError: for a name that means no folder of a run, a checkpoint or a model.
    """
    folder = folder_of(name)
    if not any((folder / file).exists() for file in ("state.json", "checkpoints", "config.json")):
        raise InputError(f"{name}: neither a run (with checkpoints/), a checkpoint nor a model")
    return folder


def find_model(name: str | Path, tokenizer: str | Path | None = None) -> SavedModel:
    """Finds a language model on the disk.

    Args:
        name: the folder of a model, the name of a packaged one, the folder of a run, for its newest
            undamaged checkpoint, or the folder of a checkpoint.
        tokenizer: folder of the tokenizer; None: the model's or the run's own.

    Returns:
        The model, its weights not yet loaded.

    Raises:
        InputError: for a name that is none of these, and for a model without a tokenizer.
    """
    folder = model_folder(name)
    if not any((folder / file).exists() for file in ("state.json", "checkpoints")):
        folder = resolve(name)
        return SavedModel(folder, saved_config(folder), tokenizer_folder(tokenizer or folder))
    checkpoint = find_checkpoint(folder)
    own = checkpoint.folder.resolve().parents[1] / "tokenizer"
    found = tokenizer_folder(tokenizer or own)
    config = model_config(saved_language_config(checkpoint.config), load_tokenizer(found))
    return SavedModel(checkpoint.folder, config, found, checkpoint)


def saved_config(folder: Path) -> NirvanaConfig:
    """Reads the configuration in the folder of a model.

    Args:
        folder: with a `config.json`.

    Returns:
        The configuration.

    Raises:
        InputError: for one of another kind of model, or that cannot be read.
    """
    try:
        fields, _ = NirvanaConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}/config.json cannot be read: {first}") from error
    if fields.get("model_type") != NirvanaConfig.model_type:
        kind = fields.get("model_type")
        raise InputError(f"{folder} holds a model of the type {kind!r}, not 'nirvana'")
    known = NirvanaConfig.__dataclass_fields__
    return checked_config(
        {key: value for key, value in fields.items() if key in known}, str(folder)
    )


def model_config(config: LanguageConfig, tokenizer: Any) -> NirvanaConfig:
    """Builds the configuration of a training's model.

    Args:
        config: preset and overridden fields.
        tokenizer: gives the vocabulary size and special tokens that the fields do not set.

    Returns:
        The configuration of the model.

    Raises:
        InputError: for a vocabulary smaller than the tokenizer's.
    """
    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **config.model.fields,
    }
    found = preset(config.model.preset, **fields)
    if found.vocab_size < len(tokenizer):
        raise InputError(
            f"configuration: model.vocab_size = {found.vocab_size} must be at least the "
            f"tokenizer's {len(tokenizer)}"
        )
    return found
