"""Training a language model from token shards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nirvana.data.tokenizer import copy_tokenizer, load_tokenizer, tokenizer_folder
from nirvana.errors import InputError
from nirvana.evaluate.perplexity import Score, score_tokens
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.text import text_encoder
from nirvana.train.config import LanguageConfig, load_config, to_dict
from nirvana.train.data import PackedLoader, ReadAhead, TokenShards
from nirvana.train.estimate import memory_bytes, peak_flops
from nirvana.train.export import export, model_config
from nirvana.train.loop import Outcome, check_run, fit
from nirvana.train.parallel import make_mesh, parallelize
from nirvana.train.task import Task
from nirvana.train.world import World, join

ASSUMED_MFU = 0.4  # of the estimates before a run


class LanguageTask(Task):
    """Next-token prediction on packed documents.

    Args:
        config: of the whole run.
        device: where the model lies; "meta" makes one without weights, for estimates.

    Raises:
        InputError: for unusable shards, shards of different tokenizers, or a model's
            configuration that is wrong or whose vocabulary is smaller than the tokenizer's.
    """

    unit = "tokens"

    def __init__(self, config: LanguageConfig, device: torch.device) -> None:
        data = config.data
        self.config, self.data, self.device = config, data, device
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

    def prepare(self, world: World, compiled: bool) -> None:
        """Recompute, compile, shard."""
        blocks = list(self.model.model.layers)  # type: ignore[union-attr,arg-type]
        rounded = self.config.run.autocast_dtype(world.device)
        parallelize(self.model, blocks, self.config.parallel, world, compiled, rounded)

    def begin(self, folder: Path) -> None:
        """The run carries its tokenizer, so that its checkpoints can be exported anywhere."""
        copy_tokenizer(self.tokenizer_folder, folder / "tokenizer")

    def position(self, step: int) -> dict[str, Any]:
        """The loader's."""
        return self.loader.position(step)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """See `PackedLoader.batch`."""
        return self.ahead.get(step, micro)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy, in nats, of the tokens that follow in the same document."""
        borders = _borders(batch["position_ids"])  # on the CPU: a GPU need not be waited for
        batch = self._on_device(batch)
        output = self.model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seqlens=borders,
            labels=batch["labels"],
            shift_labels=batch["labels"],
            skip_logits=True,
        )
        return output.loss, {}

    def observe(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """What the Triggers do on the first row: the mean of their loss before and after the step,
        and of the window branch's gate, over all tokens and layers; and the gate layer by layer.
        Nothing without Trigger."""
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
        # A loss that is not finite is counted by the loop; here it would only break the log.
        values = {n: v for n, v in zip(names, means, strict=True) if abs(v) < float("inf")}
        return {"trigger": values}

    def validate(self) -> dict[str, float]:
        """Bits per byte of the first documents of every domain, and their mean over domains.

        Of a long document the first `valid_tokens` tokens are read, and the bytes that they spell
        are counted (a character that the cut divides may be miscounted by two bytes). Every process
        reads all of them, so that the figures do not depend on how many there are.
        """
        figures = {}
        for name, shards in self.valid.items():
            total = Score()
            for tokens, num_bytes in shards.documents(self.data.valid_documents):
                tokens = tokens[:-1]  # EOS is not scored
                if len(tokens) > self.data.valid_tokens:
                    tokens = tokens[: self.data.valid_tokens]
                    num_bytes = len(self.tokenizer.decode(tokens[1:]).encode("utf-8"))
                costs = score_tokens(self.model, torch.from_numpy(tokens))
                total += Score(float(costs.sum()), len(costs), num_bytes, 1)
            figures[f"{name}_bits_per_byte"] = total.bits_per_byte
        if figures:
            figures["mean_bits_per_byte"] = sum(figures.values()) / len(figures)
        return figures

    def samples(self) -> dict[str, str]:
        """A continuation of every prompt, sampled."""
        encode = text_encoder(self.tokenizer)
        return {prompt: self._continue(encode([prompt])[0]) for prompt in self.data.sample_prompts}

    def _continue(self, prompt: list[int]) -> str:
        """Always the same number of tokens: processes that hold parts of one model must all call it
        equally often."""
        ids = torch.tensor([[self.tokenizer.bos_token_id, *prompt]], device=self.device)
        length = ids.shape[1]
        past, new = None, ids
        for _ in range(self.data.sample_tokens):
            output = self.model(input_ids=new, cache=past, use_cache=True)
            past = output.cache
            new = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
            ids = torch.cat([ids, new], dim=1)
        return self.tokenizer.decode(ids[0, length:])

    def export(self, folder: Path) -> None:
        """Writes the newest checkpoint as a transformers folder."""
        export(self.config.run.out, folder)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return batch
        return {
            name: value.pin_memory().to(self.device, non_blocking=True)
            for name, value in batch.items()
        }


def _borders(position_ids: Tensor) -> Tensor:
    """Where samples and rows `[B, T]` start and end in the batch laid out as one row."""
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).int()


def train(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    make_task: Callable[[LanguageConfig, torch.device], LanguageTask] = LanguageTask,
) -> Outcome:
    """Trains a language model as a configuration file says, alone or under torchrun.

    Args:
        config_path: TOML of `LanguageConfig`, or the config.json that a run saved.
        overrides: `["--optim.lr", "1e-3", ...]`.
        resume: continue the newest checkpoint in `run.out`.
        accept_changes: also when settings or data are not those of the checkpoint.
        make_task: builds the task; one that also measures, for example.

    Raises:
        InputError: for whatever is wrong in the configuration, the data or the run's folder.
    """
    config = load_config(LanguageConfig, config_path, overrides)
    shards = [*config.data.train.values(), *config.data.valid.values()]
    check_run(config.run.out, config_path, shards)
    with join(config.run.device) as world:
        torch.manual_seed(config.run.seed)
        task = make_task(config, world.device)
        return fit(
            task,
            config.optim,
            config.run,
            to_dict(config),
            resume,
            world,
            accept_changes=accept_changes,
        )


def estimate(config_path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Checks a configuration and its data, prints what the training will take, writes nothing.

    Returns:
        the printed figures.

    Raises:
        InputError: as `train`.
    """
    config = load_config(LanguageConfig, config_path, overrides)
    with join(config.run.device) as world:
        world.share(config.optim.accumulation)
        task = LanguageTask(config, torch.device("meta"))
        parts = make_mesh(config.parallel, world).size(-1) if world.size > 1 else 1
        data, model = config.data, task.model
        rows = memory_bytes(
            model,
            task.architecture,
            data.batch_size * data.context_length,
            parts,
            config.parallel.recompute,
        )
        corpus = sum(shards.num_tokens for shards in task.sources.values())
        peak = peak_flops(world.device, config.run.precision)
        figures: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens per step": task.units_per_step,
            "steps": config.run.steps,
            "tokens of the run": task.units_per_step * config.run.steps,
            "tokens of the data": corpus,
            "epochs": task.units_per_step * config.run.steps / corpus,
            "FLOP per token": task.flops_per_step / task.units_per_step,
            "processes": world.size,
            "state per device, GiB": rows["state"] / 2**30,
            "activations per device, GiB, about": rows["activations"] / 2**30,
        }
        if peak:
            seconds = task.flops_per_step / (ASSUMED_MFU * peak * world.size)
            figures[f"seconds per step, at {ASSUMED_MFU:.0%} MFU"] = seconds
            figures[f"days of the run, at {ASSUMED_MFU:.0%} MFU"] = (
                seconds * config.run.steps / 86400
            )
        if world.first:
            table = Table("", "", show_header=False)
            for name, value in figures.items():
                table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}")
            Console().print(table)
        return figures
