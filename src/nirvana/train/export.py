"""Export of a language model to a folder of the transformers library."""

import importlib.metadata
import json
from pathlib import Path

import torch
from torch import nn

from nirvana.data.tokenizer import TOKENIZER_FILES, copy_tokenizer
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder
from nirvana.model import standalone as standalone_code
from nirvana.model.assets import load_language_model, without_progress_bars
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.train.checkpoint import Checkpoint
from nirvana.train.config import DistillConfig, saved_language_config
from nirvana.train.metrics import figure
from nirvana.train.saved_model import SavedModel, find_model, model_folder

CODE = f"{standalone_code.MODULE}.py"
RESULTS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "README.md",
    CODE,
    *TOKENIZER_FILES,
)

CARD = """---
library_name: nirvana
pipeline_tag: text-generation
---

# {name}

A Nirvana language model of {parameters:,} parameters, step {step:,} of {steps:,} of its training.

| | |
|---|---|
| architecture | {origin}: D {config.hidden_size}, {config.num_hidden_layers} layers \
({config.num_prelude_layers} prelude), {config.num_attention_heads} heads of {config.head_dim}, \
branches {config.branches}, gate {config.gate}, window {config.sliding_window}, \
C {config.task_dim}, R {config.bank_size}, {config.interpolation} \
interpolation |
| tokenizer | {vocab_size:,} tokens |
| weights | {precision} |
| training tokens | {tokens:,} ({sources}), rows of {data.context_length} |
| started from | {initial} |
| optimiser | {optim.name}, learning rate {optim.lr:g} to {optim.min_lr:g} ({optim.schedule}), \
{optim.warmup_steps} steps of warm-up, betas {optim.betas[0]:g}, {optim.betas[1]:g}, weight decay \
{optim.weight_decay:g}, clip {optim.clip:g} |
"""

LOADING = """
## Loading

The code of this model is the package nirvana. In a clone of its repository:

    pip install .

Importing it registers the model with transformers, which does not know the type "nirvana" itself:

    import nirvana
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")

`nirvana export FOLDER OUT --standalone` writes a folder that loads without the package.
"""

LOADING_STANDALONE = """
## Loading

    pip install {requirements}

`{code}` in this folder is the code of the model. It is executed if you agree to that:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)

Where the package nirvana is installed, which has kernels for GPUs, the folder also loads after
`import nirvana`, and nothing in it is executed.
"""


def export(
    source: str | Path,
    out: str | Path,
    precision: str = "",
    tokenizer: str | Path | None = None,
    standalone: bool = False,
) -> SavedModel:
    """Writes a language model as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        source: see `nirvana.train.saved_model.find_model`.
        out: folder to write: safetensors, configuration, tokenizer, and a card, README.md; results
            of an earlier export are replaced.
        precision: "float32" or "bf16"; "": `run.export_precision` of the run, or that of the model.
        tokenizer: folder of the tokenizer; None: the run's or the model's own.
        standalone: add the model's code (`nirvana.model.standalone`), with which the folder loads
            where this package is not installed.

    Returns:
        The model that was exported.

    Raises:
        InputError: for a source that holds no language model, and for a damaged one.
    """
    folder = model_folder(source)
    is_run = (folder / "checkpoints").is_dir()
    run = folder if is_run else folder.resolve().parents[1]
    metrics = run / "metrics.jsonl"
    out = replaceable_folder(out, RESULTS)
    check_outputs({"out": out}, [folder / "checkpoints" if is_run else folder, tokenizer, metrics])
    saved = find_model(source, tokenizer)
    if precision not in ("", "float32", "bf16"):
        raise InputError(f"precision {precision!r} must be float32 or bf16")
    model, dtype = _loaded(saved, precision)
    nn.Module.to(model, dtype)
    vars(model.config).pop("auto_map", None)  # of a standalone source
    if standalone:
        model.config.auto_map = standalone_code.auto_map()
    with atomic_folder(out) as temporary:
        with without_progress_bars():
            model.save_pretrained(temporary)
        copy_tokenizer(saved.tokenizer, temporary)
        if standalone:
            (temporary / CODE).write_text(standalone_code.source(), encoding="utf-8")
        card = _card(saved, model, metrics) + _loading(standalone)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return saved


def _loaded(saved: SavedModel, precision: str) -> tuple[NirvanaForCausalLM, torch.dtype]:
    """The model on the CPU, and the dtype in which it is written."""
    if saved.checkpoint is None:
        model, _ = load_language_model(saved.folder)
        found = saved.config.dtype
        dtype = found if isinstance(found, torch.dtype) else torch.float32
    else:
        model = NirvanaForCausalLM(saved.config)
        saved.load(model)
        dtype = saved_language_config(saved.checkpoint.config).run.export_dtype
    given = {"float32": torch.float32, "bf16": torch.bfloat16}
    return model, given.get(precision, dtype)


def _card(saved: SavedModel, model: NirvanaForCausalLM, metrics: Path) -> str:
    """The card without the section on loading: of the training, or that of the model's folder."""
    if saved.checkpoint is not None:
        return _training_card(saved.checkpoint, model, metrics)
    own = saved.folder / "README.md"
    if own.is_file():
        return own.read_text(encoding="utf-8").partition("\n## Loading\n")[0].rstrip() + "\n"
    count = sum(p.numel() for p in model.parameters())
    return f"# {saved.folder.name}\n\nA Nirvana language model of {count:,} parameters.\n"


def _training_card(checkpoint: Checkpoint, model: NirvanaForCausalLM, metrics: Path) -> str:
    config = saved_language_config(checkpoint.config)
    data = config.data
    per_step = data.context_length * data.batch_size * config.optim.accumulation
    card = CARD.format(
        name=Path(config.run.out).name,
        parameters=sum(p.numel() for p in model.parameters()),
        step=checkpoint.step,
        steps=config.run.steps,
        origin=f"adopted from `{config.distill.teacher}`"
        if isinstance(config, DistillConfig)
        else f"preset `{config.model.preset}`",
        config=model.config,
        vocab_size=model.config.vocab_size,
        precision="bf16" if model.dtype == torch.bfloat16 else "float32",
        tokens=checkpoint.step * per_step,
        sources=", ".join(data.train),
        data=data,
        optim=config.optim,
        initial=config.run.initial or "random weights",
    )
    figures = _last_validation(metrics, checkpoint.step)
    if figures:
        rows = "\n".join(f"| {name} | {figure(value)} |" for name, value in figures.items())
        card += f"\nLast validation during the training:\n\n| figure | value |\n|---|---|\n{rows}\n"
    return card


def _loading(standalone: bool) -> str:
    """The section on loading, which ends the card."""
    if not standalone:
        return LOADING
    needed = importlib.metadata.requires("nirvana") or []
    found = [
        line for line in needed if line.startswith(("torch", "transformers")) and ";" not in line
    ]
    return LOADING_STANDALONE.format(
        requirements=" ".join(f'"{line}"' for line in sorted(found)), code=CODE
    )


def _last_validation(metrics: Path, step: int) -> dict[str, float | None]:
    if not metrics.is_file():
        return {}
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    found = [line["valid"] for line in lines if line["step"] <= step and line.get("valid")]
    return found[-1] if found else {}
