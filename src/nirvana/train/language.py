"""Training of a language model on token shards."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nirvana.config import load_config
from nirvana.data.loader import PackedLoader, ReadAhead
from nirvana.data.shards import TokenShards
from nirvana.data.tokenizer import copy_tokenizer, load_tokenizer, text_encoder, tokenizer_folder
from nirvana.errors import InputError
from nirvana.evaluate.likelihood import token_log_likelihoods
from nirvana.evaluate.perplexity import Score
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.train.config import LanguageConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.estimate import warn_of_repetition
from nirvana.train.export import export
from nirvana.train.float8 import MULTIPLE, require_float8, use_float8
from nirvana.train.loop import Outcome, check_run, fit_configured
from nirvana.train.parallel import parallelize
from nirvana.train.saved_model import find_model, model_config
from nirvana.train.task import Task


class LanguageTask(Task):
    """Next-token prediction on packed documents.

    Args:
        config: of the whole run.
        device: of the model; "meta" builds one without weights, for estimates.

    Raises:
        InputError: for unusable shards, shards of different tokenizers, a wrong configuration of
            the model, a vocabulary smaller than the tokenizer's, or a device without float8 for
            `run.precision` = "fp8".
    """

    unit = "tokens"

    def __init__(self, config: LanguageConfig, device: torch.device) -> None:
        data = config.data
        self.config, self.data, self.device = config, data, device
        if config.run.precision == "fp8" and device.type != "meta":
            require_float8(device)
        self.sources = {name: TokenShards(folder) for name, folder in data.train.items()}
        self.loader = PackedLoader(
            self.sources,
            data.context_length,
            data.batch_size,
            config.run.seed,
            data.weights or None,
            config.optim.accumulation,
            data.reset,
        )
        self.ahead = ReadAhead(self.loader.batch, data.workers)
        first = next(iter(self.sources.values()))
        self.valid = {name: TokenShards(folder) for name, folder in data.valid.items()}
        for shards in self.valid.values():
            if shards.tokenizer_sha256 != first.tokenizer_sha256:
                raise InputError(
                    f"{shards.folder} was written with another tokenizer than {first.folder}; "
                    "tokenize both with the same --tokenizer"
                )
        self.tokenizer_folder = tokenizer_folder(first.folder)
        self.tokenizer = load_tokenizer(self.tokenizer_folder)
        self.units_per_step = data.context_length * data.batch_size * config.optim.accumulation
        self.architecture = model_config(config, self.tokenizer)
        with torch.device("meta" if device.type == "meta" else "cpu"):
            model = NirvanaForCausalLM(self.architecture)
        nn.Module.to(model, device)
        self.model: nn.Module = model
        self.undecayed = model.no_weight_decay()
        self.flops_per_step = model.flops_per_token(data.context_length) * self.units_per_step

    def verify(self) -> None:
        """Verifies the files of all token shards; see `Task.verify`."""
        for shards in (*self.sources.values(), *self.valid.values()):
            shards.verify()

    def initialize(self, initial: str) -> None:
        """Loads the weights of a model with the same configuration and tokens; on the meta device
        it only checks that they fit. See `Task.initialize`."""
        try:
            found = find_model(initial)
            found.require_fit(self.architecture, self.tokenizer)
            if self.device.type != "meta":
                found.load(self.model)
        except InputError as error:
            raise InputError(f"run.initial = {initial!r}: {error}") from error

    def matrices(self) -> set[str]:
        """See `Task.matrices`; the head, a linear map to the vocabulary, is not among them."""
        return super().matrices() - {"lm_head.weight"}

    def prepare(self, processes: ProcessContext, compiled: bool) -> None:
        """Applies recomputation, compilation and sharding; see `Task.prepare`."""
        blocks = list(self.model.model.layers)  # type: ignore[union-attr,arg-type]
        rounded = self.config.run.autocast_dtype(processes.device)
        if processes.is_main:
            warn_of_repetition(self.loader, self.config.run.steps)
        if self.config.run.precision == "fp8":
            self._use_float8(blocks, processes.is_main)
        parallelize(self.model, blocks, self.config.parallel, processes, compiled, rounded)

    def _use_float8(self, blocks: list[nn.Module], is_main: bool) -> None:
        """Computes the large products of the blocks in float8; the main process logs which cannot
        be."""
        tokens = self.data.batch_size * self.data.context_length
        unfit = [f"{tokens:,} tokens"] if tokens % MULTIPLE else use_float8(blocks)
        if unfit and is_main:
            logging.getLogger(__name__).warning(
                "products of %s stay in bf16: float8 needs multiples of %d",
                ", ".join(unfit),
                MULTIPLE,
            )

    def begin(self, folder: Path) -> None:
        """Copies the tokenizer into the run's folder, so that checkpoints can be exported."""
        copy_tokenizer(self.tokenizer_folder, folder / "tokenizer")

    def position(self, step: int) -> dict[str, Any]:
        """See `PackedLoader.position`."""
        return self.loader.position(step)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """See `PackedLoader.batch`."""
        return self.ahead.get(step, micro)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the mean cross-entropy of next-token prediction within documents.

        Args:
            batch: see `PackedLoader.batch`, on the CPU.

        Returns:
            The loss in nats per token, with `optim.z_loss` of the mean of (log Z)^2 in it; that
            term is the scalar "z_loss", logged if it is used.
        """
        borders = document_borders(batch["position_ids"])  # on the CPU, to avoid a synchronisation
        batch = self._on_device(batch)
        output = self.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seqlens=borders,
            labels=batch["labels"],
            shift_labels=batch["labels"],
            skip_logits=True,
            z_loss=self.config.optim.z_loss,
        )
        z_loss = output.z_loss
        return output.loss, {} if z_loss is None else {"z_loss": z_loss.detach()}

    def observe(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """Computes means over the first row of a batch of what the Triggers do.

        Args:
            batch: see `PackedLoader.batch`, on the CPU.

        Returns:
            "trigger" -> loss before and after the Trigger's step and the window branch's gate, each
            over all tokens and layers, and the gate of each layer. Empty without Trigger.
        """
        if not self.architecture.has_trigger:
            return {}
        first = self._on_device({name: value[:1] for name, value in batch.items()})
        traces = self.model(
            input_ids=first["input_ids"],
            position_ids=first["position_ids"],
            use_cache=False,
            output_trigger=True,
            logits_to_keep=1,
        ).trigger
        gates = torch.stack([trace.gates[..., 0].mean() for trace in traces])
        means = torch.stack(
            [
                torch.stack([trace.loss_before.mean() for trace in traces]).mean(),
                torch.stack([trace.loss_after.mean() for trace in traces]).mean(),
                gates.mean(),
                *gates,
            ]
        ).tolist()
        prelude = self.architecture.num_prelude_layers
        names = ["loss_before", "loss_after", "gate"]
        names += [f"gate_layer_{prelude + i:02d}" for i in range(len(gates))]
        return {"trigger": dict(zip(names, means, strict=True))}

    def validate(self) -> dict[str, float]:
        """Computes bits per byte of the first documents of every domain.

        Of a long document the first `valid_tokens` tokens are scored against the bytes that they
        decode to (off by up to two bytes where the cut splits a character). Every process scores
        all documents, so that the figures do not depend on the number of processes.

        Returns:
            "DOMAIN_bits_per_byte" of each domain, and "mean_bits_per_byte" over the domains.
        """
        figures = {}
        for name, shards in self.valid.items():
            total = Score()
            for tokens, num_bytes in shards.documents(self.data.valid_documents):
                tokens = tokens[:-1]  # EOS is not scored
                if len(tokens) > self.data.valid_tokens:
                    tokens = tokens[: self.data.valid_tokens]
                    num_bytes = len(self.tokenizer.decode(tokens[1:]).encode("utf-8"))
                ((nll, _),) = token_log_likelihoods(self.model, [torch.from_numpy(tokens)])
                total += Score(float(nll.sum()), len(nll), num_bytes, 1)
            figures[f"{name}_bits_per_byte"] = total.bits_per_byte
        if figures:
            figures["mean_bits_per_byte"] = sum(figures.values()) / len(figures)
        return figures

    def samples(self) -> dict[str, str | None]:
        """Samples a continuation of every prompt; see `Task.samples`."""
        encode = text_encoder(self.tokenizer)
        return {prompt: self._continue(encode([prompt])[0]) for prompt in self.data.sample_prompts}

    def _continue(self, prompt: list[int]) -> str | None:
        """Samples a fixed number of tokens, None if logits are not finite: all processes that hold
        shards of the model must call it equally often."""
        ids = torch.tensor([[self.tokenizer.bos_token_id, *prompt]], device=self.device)
        length = ids.shape[1]
        past, new, finite = None, ids, True
        for _ in range(self.data.sample_tokens):
            output = self.model(input_ids=new, cache=past, use_cache=True)
            past = output.cache
            logits = output.logits[:, -1].float()
            finite = finite and bool(logits.isfinite().all())
            new = torch.multinomial((logits if finite else torch.zeros_like(logits)).softmax(-1), 1)
            ids = torch.cat([ids, new], dim=1)
        return self.tokenizer.decode(ids[0, length:]) if finite else None

    def export(self, folder: Path) -> None:
        """Writes the newest checkpoint as a transformers folder; see `Task.export`."""
        export(self.config.run.out, folder)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return batch
        return {
            name: value.pin_memory().to(self.device, non_blocking=True)
            for name, value in batch.items()
        }


def document_borders(position_ids: Tensor) -> Tensor:
    """Finds where documents begin and end, on the CPU.

    Args:
        position_ids: `[B, T]`, counted within each document.

    Returns:
        int32 `[documents + 1]`, cumulative lengths in the rows laid out as one.
    """
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).int()


def train(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    make_task: Callable[[LanguageConfig, torch.device], LanguageTask] = LanguageTask,
) -> Outcome:
    """Trains a language model from a configuration file, in one process or under torchrun.

    Args:
        config_path: TOML of `LanguageConfig`, or the config.json that a run saved.
        overrides: `["--optim.lr", "1e-3", ...]`.
        resume: continue from the newest checkpoint in `run.out`.
        accept_changes: resume even if settings or data differ from those of the checkpoint.
        make_task: builds the task; for example a subclass that also measures time.

    Returns:
        How the run ended.

    Raises:
        InputError: for errors in the configuration, the data or the run's folder.
    """
    config = load_config(LanguageConfig, config_path, overrides)
    shards = [*config.data.train.values(), *config.data.valid.values()]
    check_run(config.run.out, config_path, [*shards, config.run.initial or None])
    return fit_configured(config, make_task, resume, accept_changes)
