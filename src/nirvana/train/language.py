"""Training a language model from token shards."""

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.evaluate.perplexity import Score, score_tokens
from nirvana.files import atomic_folder
from nirvana.model.config import preset
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.train.config import LanguageConfig, load_config, to_dict
from nirvana.train.data import IGNORE, PackedLoader, TokenShards
from nirvana.train.loop import Outcome, choose_device, fit
from nirvana.train.tokenize import TOKENIZER_FILES, load_tokenizer, tokenizer_folder


class LanguageTask:
    """A `nirvana.train.loop.Task`: next-token prediction on packed documents.

    Args:
        config: of the whole run.
        device: where the model lies.

    Raises:
        InputError: for unusable shards, shards of different tokenizers, or a model's
            configuration that is wrong or whose vocabulary is smaller than the tokenizer's.
    """

    unit = "tokens"

    def __init__(self, config: LanguageConfig, device: torch.device) -> None:
        data = config.data
        sources = {name: TokenShards(folder) for name, folder in data.train.items()}
        self.loader = PackedLoader(
            sources,
            data.context_length,
            data.batch_size,
            config.run.seed,
            data.weights or None,
            config.optim.accumulation,
        )
        first = next(iter(sources.values()))
        self.valid = {name: TokenShards(folder) for name, folder in data.valid.items()}
        for shards in self.valid.values():
            if shards.tokenizer_sha256 != first.tokenizer_sha256:
                raise InputError(
                    f"{shards.folder} was written with another tokenizer than {first.folder}; "
                    "tokenize both with the same --tokenizer"
                )
        self.data = data
        self.tokenizer = tokenizer_folder(first.folder)
        self.units_per_step = data.context_length * data.batch_size * config.optim.accumulation
        self.export_dtype = config.run.export_dtype
        self.device = device
        self.model: nn.Module = _build_model(config, first)
        self.model.to(device)

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Every parameter."""
        return self.model.named_parameters()

    def loss(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy, in nats, of the tokens that follow in the same document."""
        batch = self.loader.batch(step, micro)
        if self.device.type == "cuda":
            batch = {
                name: value.pin_memory().to(self.device, non_blocking=True)
                for name, value in batch.items()
            }
        logits = self.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        labels = batch["labels"].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORE), {}

    def validate(self) -> dict[str, float]:
        """Bits per byte of the first documents of every domain, and their mean over domains.

        Of a long document the first `valid_tokens` tokens are read, and the bytes that they spell
        are counted (a character that the cut divides may be miscounted by two bytes).
        """
        figures = {}
        decode = load_tokenizer(self.tokenizer).decode
        for name, shards in self.valid.items():
            total = Score()
            for tokens, num_bytes in shards.documents(self.data.valid_documents):
                tokens = tokens[:-1]  # EOS is not scored
                if len(tokens) > self.data.valid_tokens:
                    tokens = tokens[: self.data.valid_tokens]
                    num_bytes = len(decode(tokens[1:]).encode("utf-8"))
                costs = score_tokens(self.model, torch.from_numpy(tokens))
                total += Score(float(costs.sum()), len(costs), num_bytes, 1)
            figures[f"{name}_bits_per_byte"] = total.bits_per_byte
        if figures:
            figures["mean_bits_per_byte"] = sum(figures.values()) / len(figures)
        return figures

    def compile(self) -> None:
        """Compiles every block in place: one graph for all, since all have the same shapes."""
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            layer.compile(dynamic=False)

    def export(self, folder: Path) -> None:
        """Writes the model and its tokenizer as a transformers folder."""
        model = copy.deepcopy(self.model).to(self.export_dtype)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)  # type: ignore[operator]
            for name in TOKENIZER_FILES:
                if (self.tokenizer / name).is_file():
                    shutil.copyfile(self.tokenizer / name, temporary / name)


def train(
    config_path: str | Path, overrides: list[str] | None = None, resume: bool = False
) -> Outcome:
    """Trains a language model as a configuration file says.

    Args:
        config_path: TOML of `LanguageConfig`, or the config.json that a run saved.
        overrides: `["--optim.lr", "1e-3", ...]`.
        resume: continue the newest checkpoint in `run.out`.

    Raises:
        InputError: for whatever is wrong in the configuration, the data or the run's folder.
    """
    config = load_config(LanguageConfig, config_path, overrides)
    device = choose_device(config.run.device)
    torch.manual_seed(config.run.seed)
    task = LanguageTask(config, device)
    return fit(task, config.optim, config.run, to_dict(config), resume)


def _build_model(config: LanguageConfig, shards: TokenShards) -> nn.Module:
    """The model of the preset; its vocabulary is the tokenizer's unless the file says otherwise."""
    tokenizer = load_tokenizer(shards.folder)
    fields = {
        "vocab_size": shards.vocab_size,
        "bos_token_id": shards.bos,
        "eos_token_id": shards.eos,
        "pad_token_id": tokenizer.pad_token_id,
        **config.model.fields,
    }
    model_config = preset(config.model.preset, **fields)
    if model_config.vocab_size < shards.vocab_size:
        raise InputError(
            f"configuration: model.vocab_size = {model_config.vocab_size} must be at least the "
            f"tokenizer's {shards.vocab_size}"
        )
    return NirvanaForCausalLM(model_config)
