"""Distillation of an adopted Transformer: `nirvana.model.adopt` starts it, its teacher ends it.

Three stages, each a run of its own that starts from the one before (`run.initial`):

1. "attention": every layer's mixer reads the teacher's inputs and learns the teacher's attention
   output. Layers do not depend on one another, so that all learn at once (RADLADS, arXiv
   2505.03005; LoLCATs, arXiv 2410.10254).
2. "logits": the teacher's distribution of the next token, KL(teacher || model).
3. "context": the same on longer rows. Tokens further into their document than the teacher's length
   learn from the text.

A linear branch beside a window branch is bypassed unless it must work alone: layers drop the window
branch of some rows (scheduled window dropout, arXiv 2510.05901), at first of all of them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from nirvana.config import load_config
from nirvana.errors import InputError
from nirvana.model.adopt import load_teacher
from nirvana.model.config import NirvanaConfig
from nirvana.model.masks import create_masks
from nirvana.model.nirvana import compile_blocks
from nirvana.model.updater import Updater
from nirvana.ops import distillation_loss
from nirvana.ops.cross_entropy import IGNORE
from nirvana.train.config import DistillConfig, ModelSection
from nirvana.train.distributed import ProcessContext
from nirvana.train.language import LanguageTask, document_borders
from nirvana.train.loop import Outcome, check_run, fit_configured
from nirvana.train.saved_model import NOT_COMPARED, find_model
from nirvana.train.teacher import (
    attention_pairs,
    compile_teacher,
    prepare_teacher,
    teacher_logits,
)

WINDOW_DROPOUT = {"attention": (1.0, 0.5), "logits": (0.5, 0.0), "context": (0.0, 0.0)}
"""The default of `distill.window_dropout` by stage, of models with both branches."""
PRESET = "tiny"  # all of its fields are overridden


class DistillTask(LanguageTask):
    """Learns a teacher's attention or its distribution of the next token, on packed documents.

    Args:
        config: of the whole run; `model` is that of `run.initial`.
        device: of both models; "meta" builds them without weights.

    Raises:
        InputError: as of `LanguageTask`; for a teacher that cannot be read, or is of another shape
            than the model; for rows beyond the teacher's length in the stage "logits", and for a
            window dropout of a model without both branches.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.stage = config.distill.stage
        found = load_teacher(config.distill.teacher)
        _require_pair(found.model.config, self.architecture, config.distill.teacher)
        dtype = config.run.autocast_dtype(device) or torch.float32
        # No part of `self.model`: checkpoints do not hold it.
        self.teacher: nn.Module = nn.Module.to(found.model, device, dtype).requires_grad_(False)
        prepare_teacher(self.teacher)
        self.teacher_length: int = found.model.config.max_position_embeddings
        if self.stage == "logits" and config.data.context_length > self.teacher_length:
            raise InputError(
                f"data.context_length = {config.data.context_length} exceeds the teacher's length, "
                f"{self.teacher_length}: distill.stage = 'context' is for longer rows"
            )
        self.dropout = _dropout(config, self.architecture)
        tokens = self.units_per_step
        self.flops_per_step += 2.0 * tokens * sum(p.numel() for p in found.model.parameters())
        self.blocks: list[Any] = list(self.model.model.layers)  # type: ignore[union-attr,arg-type]
        self.error = relative_error

    def prepare(self, processes: ProcessContext, compiled: bool) -> None:
        """See `LanguageTask.prepare`; the stage "attention" computes no whole blocks, and compiles
        the mixers alone. The teacher is compiled, too."""
        whole = self.stage != "attention"
        super().prepare(processes, compiled and whole)
        if compiled:
            compile_teacher(self.teacher, hooked=not whole)
        if compiled and not whole:
            compile_blocks(block.updater for block in self.blocks)
            self.error = torch.compile(relative_error, dynamic=False)
        for block in self.blocks:
            register_fsdp_forward_method(block, "mix")
        register_fsdp_forward_method(self.model, "mixed")

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """See `PackedLoader.batch`; "dropout" `[B]` is the probability of the step."""
        batch = super().batch(step, micro)
        first, last = self.dropout
        share = step / max(1, self.config.run.steps - 1)
        dropout = torch.full((len(batch["labels"]),), first + (last - first) * min(1.0, share))
        return {**batch, "dropout": dropout}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of the stage.

        Args:
            batch: see `batch`, on the CPU.

        Returns:
            In "attention" the mean over layers of the squared error relative to the teacher's
            output. Else KL(teacher || model) in nats per token, and further into a document than
            the teacher's length the cross-entropy; both are means over the tokens with a label,
            and the scalars "kl" and "cross_entropy" are means over all of these tokens.
        """
        if any(self.dropout):
            dropped = torch.rand(len(self.blocks), len(batch["dropout"])) < batch["dropout"]
            self._keep_windows((~dropped).float()[..., None, None].to(self.device))
        borders = document_borders(batch["position_ids"])
        batch = self._on_device(batch)
        given = {name: batch[name] for name in ("input_ids", "position_ids")}
        masks = create_masks(
            self.architecture, batch["input_ids"], None, None, batch["position_ids"], borders
        )
        packed = {name: masks[name] for name in ("segments", "cu_seqlens")}
        if self.stage == "attention":
            inputs, targets = attention_pairs(self.teacher, given, packed)
            outputs = self.model.mixed(inputs, batch["position_ids"], borders)  # type: ignore[operator]
            errors = torch.stack(
                [self.error(y, target) for y, target in zip(outputs, targets, strict=True)]
            )
            return errors.mean(), {"worst_layer": errors.max().detach()}
        taught = teacher_logits(self.teacher, given, packed)
        logits = self.model(**given, cu_seqlens=borders, use_cache=False).logits
        within = batch["position_ids"] < self.teacher_length
        return token_losses(logits, taught, batch["labels"], within)

    def observe(self, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        """See `LanguageTask.observe`; with the window branches of all rows."""
        self._keep_windows(None)
        return super().observe(batch)

    def validate(self) -> dict[str, float]:
        """See `LanguageTask.validate`; with the window branches of all rows."""
        self._keep_windows(None)
        return super().validate()

    def _keep_windows(self, kept: Tensor | None) -> None:
        """Sets which rows keep the window branch of which layers, `[layers, B, 1, 1]`; None: all.
        It holds until the next call, because the backward pass may recompute the blocks."""
        for number, block in enumerate(self.blocks):
            if isinstance(block.updater, Updater):
                block.updater.window_kept = None if kept is None else kept[number]


def relative_error(y: Tensor, target: Tensor) -> Tensor:
    """The squared error of y `[B, T, D]`, relative to the mean square of the target."""
    target = target.float()
    return (y.float() - target).square().mean() / target.square().mean()


def token_losses(
    logits: Tensor, taught: Tensor, labels: Tensor, within: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL(teacher || model) within the teacher's length, the cross-entropy beyond it.

    Args:
        logits: `[B, T, V]`, of the model.
        taught: `[B, T, V]`, of the teacher.
        labels: `[B, T]`, the token that follows; `IGNORE` where there is none.
        within: bool, `[B, T]`, true within that length.

    Returns:
        the mean over the tokens with a label, in nats, and the means "kl" and "cross_entropy" of
        these tokens, detached.
    """
    count = (labels != IGNORE).sum().clamp(min=1)
    logits, taught = (x.flatten(0, 1) for x in (logits, taught))
    sums = distillation_loss(logits, taught, labels.flatten(), within.flatten())
    loss, kl, entropy = (x / count for x in sums)
    return loss, {"kl": kl, "cross_entropy": entropy}


def _dropout(config: DistillConfig, architecture: NirvanaConfig) -> tuple[float, float]:
    """The probabilities of window dropout at the first and the last step."""
    given = config.distill.window_dropout
    if architecture.branches == "both":
        first, last = given or WINDOW_DROPOUT[config.distill.stage]
        return first, last
    if any(given):
        raise InputError(
            f"distill.window_dropout = {given} needs a linear branch beside the window branch, and "
            f"the model has branches = {architecture.branches!r}"
        )
    return 0.0, 0.0


def _require_pair(teacher: Any, model: NirvanaConfig, name: str) -> None:
    """Raises unless a model could have been adopted from the teacher."""
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        there, here = getattr(teacher, field), getattr(model, field)
        if there != here:
            raise InputError(
                f"distill.teacher = {name!r} has {field} = {there}, the model {here}: give the "
                "model's own teacher"
            )


def with_initial_model(config: DistillConfig) -> DistillConfig:
    """Fills in [model]: the architecture of `run.initial`.

    Args:
        config: settings of a distillation.

    Returns:
        the settings with all fields of the model.

    Raises:
        InputError: for an initial model that cannot be read, or that [model] contradicts.
    """
    found = find_model(config.run.initial).config
    known = set(NirvanaConfig.__annotations__).difference(NOT_COMPARED)
    fields = {name: getattr(found, name) for name in sorted(known)}
    for name, value in config.model.fields.items():
        if fields.get(name) != value:
            raise InputError(
                f"model.{name} = {value!r} contradicts run.initial = {config.run.initial!r}, which "
                "gives all of [model]: leave it out"
            )
    return replace(config, model=ModelSection(PRESET, fields))


def distill(
    config_path: str | Path,
    overrides: list[str] | None = None,
    resume: bool = False,
    accept_changes: bool = False,
) -> Outcome:
    """Trains one stage of a distillation, in one process or under torchrun.

    Args:
        config_path: TOML of `DistillConfig`, or the config.json that a run saved.
        overrides: `["--distill.stage", "logits", ...]`.
        resume: continue from the newest checkpoint in `run.out`.
        accept_changes: resume even if settings or data differ from those of the checkpoint.

    Returns:
        How the run ended.

    Raises:
        InputError: for errors in the configuration, the data, the teacher or the run's folder.
    """
    config = load_config(DistillConfig, config_path, overrides)
    shards = [*config.data.train.values(), *config.data.valid.values()]
    check_run(config.run.out, config_path, [*shards, config.run.initial, config.distill.teacher])
    config = with_initial_model(config)
    return fit_configured(config, DistillTask, resume, accept_changes)
