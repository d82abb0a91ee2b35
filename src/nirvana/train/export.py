"""Export of a language model's checkpoint to a folder of the transformers library."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from nirvana.config import from_dict
from nirvana.data.tokenizer import (
    TOKENIZER_FILES,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_folder,
)
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder
from nirvana.model.config import NirvanaConfig, preset
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.train.checkpoint import Checkpoint, latest, read, restore
from nirvana.train.config import LanguageConfig

RESULTS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "README.md",
    *TOKENIZER_FILES,
)

CARD = """---
library_name: nirvana
pipeline_tag: text-generation
---

# {name}

A Nirvana language model of {parameters:,} parameters, step {step:,} of {steps:,} of its training.

    import nirvana
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")

| | |
|---|---|
| architecture | preset `{preset}`: D {config.hidden_size}, {config.num_hidden_layers} layers \
({config.num_prelude_layers} prelude), {config.num_attention_heads} heads of {config.head_dim}, \
branches {config.branches}, gate {config.gate}, window {config.sliding_window}, \
C {config.task_dim}, R {config.bank_size}, {config.interpolation} \
interpolation |
| tokenizer | {vocab_size:,} tokens |
| weights | {precision} |
| training tokens | {tokens:,} ({sources}), rows of {data.context_length} |
| optimiser | AdamW, learning rate {optim.lr:g} to {optim.min_lr:g}, {optim.warmup_steps} steps of \
warm-up, betas {optim.betas[0]:g}, {optim.betas[1]:g}, weight decay {optim.weight_decay:g}, clip \
{optim.clip:g} |
"""


def export(
    source: str | Path, out: str | Path, precision: str = "", tokenizer: str | Path | None = None
) -> Checkpoint:
    """Writes a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        source: a run's folder, of which the newest undamaged checkpoint is exported, or the folder
            of a checkpoint.
        out: folder to write: safetensors, configuration, tokenizer, and a card, README.md; results
            of an earlier export are replaced.
        precision: "float32" or "bf16"; "": `run.export_precision` of the run.
        tokenizer: folder of the tokenizer; None: the run's.

    Returns:
        The checkpoint that was exported.

    Raises:
        InputError: for a folder that is not a run or checkpoint of a language model, and for a
            damaged checkpoint.
    """
    source = Path(source)
    is_run = (source / "checkpoints").is_dir()
    if not is_run and not (source / "state.json").is_file():
        raise InputError(f"{source}: neither a run (with checkpoints/) nor a checkpoint")
    run = source if is_run else source.resolve().parents[1]
    metrics = run / "metrics.jsonl"
    given = tokenizer or run / "tokenizer"
    out = replaceable_folder(out, RESULTS)
    check_outputs({"out": out}, [source / "checkpoints" if is_run else source, given, metrics])
    checkpoint = latest(source) if is_run else read(source)
    if checkpoint is None:
        raise InputError(f"{source}: holds no checkpoint yet")
    config = from_dict(LanguageConfig, checkpoint.config, "")
    tokenizer_source = tokenizer_folder(given)
    if precision not in ("", "float32", "bf16"):
        raise InputError(f"precision {precision!r} must be float32 or bf16")
    chosen = precision or config.run.export_precision
    model = NirvanaForCausalLM(model_config(config, load_tokenizer(tokenizer_source)))
    restore(checkpoint, model, model.named_parameters())
    nn.Module.to(model, torch.bfloat16 if chosen == "bf16" else torch.float32)
    with atomic_folder(out) as folder:
        with _quiet():
            model.save_pretrained(folder)
        copy_tokenizer(tokenizer_source, folder)
        card = _card(checkpoint, config, model, chosen, metrics)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return checkpoint


def model_config(config: LanguageConfig, tokenizer: Any) -> NirvanaConfig:
    """Builds the model's configuration.

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Disables the progress bars of transformers, which would break up ours."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _card(
    checkpoint: Checkpoint, config: LanguageConfig, model: Any, precision: str, metrics: Path
) -> str:
    data = config.data
    per_step = data.context_length * data.batch_size * config.optim.accumulation
    card = CARD.format(
        name=Path(config.run.out).name,
        parameters=sum(p.numel() for p in model.parameters()),
        step=checkpoint.step,
        steps=config.run.steps,
        preset=config.model.preset,
        config=model.config,
        vocab_size=model.config.vocab_size,
        precision=precision,
        tokens=checkpoint.step * per_step,
        sources=", ".join(data.train),
        data=data,
        optim=config.optim,
    )
    figures = _last_validation(metrics, checkpoint.step)
    if figures:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
        card += f"\nLast validation during the training:\n\n| figure | value |\n|---|---|\n{rows}\n"
    return card


def _last_validation(metrics: Path, step: int) -> dict[str, float]:
    if not metrics.is_file():
        return {}
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    found = [line["valid"] for line in lines if line["step"] <= step and line.get("valid")]
    return found[-1] if found else {}
