"""Commands about text: tokenize, train, export, generate."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from nirvana.cli.adapt import (
    AdaptOption,
    ChunkOption,
    ParametersOption,
    StepSizesOption,
    StepsOption,
    TaskOption,
    adapt_config,
    require_adapt,
)
from nirvana.cli.config import AcceptChangesOption, ConfigArgument, ResumeOption
from nirvana.cli.console import SEEDS, DeviceOption
from nirvana.errors import InputError
from nirvana.files import decode_utf8
from nirvana.packaged import resolve

data_app = typer.Typer(help="Text to token shards.", no_args_is_help=True)

# Settings are checked against the configuration, not by the command line's parser.
TRAIN_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

Files = Annotated[
    list[Path],
    typer.Argument(
        help=".txt, .md, source code, .jsonl (also .xz, .gz, .zst), .parquet, "
        "or hub:NAME[:CONFIGURATION[:SPLIT]]"
    ),
]


@data_app.command("tokenize")
def tokenize(
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a tokenizer or of token shards, or a packaged model's name; else a "
            "tokenizer is trained."
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of a tokenizer that is trained.")] = 8192,
    workers: Annotated[int, typer.Option(help="Processes; 0: one for each core.")] = 0,
) -> None:
    """Writes the documents of text files or hub data sets as token shards.

    After an interruption, the same command continues where it stopped.
    """
    from nirvana.data.shards import tokenize as write_shards

    counts = write_shards(files, out, tokenizer, vocab_size, workers or os.cpu_count() or 1)
    print(
        f"{out}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.bytes:,} bytes, "
        f"{counts.bytes / counts.tokens:.3f} bytes per token"
    )


@data_app.command("tokenizer")
def tokenizer(
    files: Files,
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens at most.")] = 8192,
) -> None:
    """Trains a byte-level tokenizer, to share between several folders of token shards."""
    from nirvana.data.tokenizer import train_tokenizer

    counts = train_tokenizer(files, out, vocab_size)
    print(f"{out}: a tokenizer from {counts.documents:,} documents, {counts.bytes:,} bytes")


def train(
    ctx: typer.Context,
    config: ConfigArgument,
    resume: ResumeOption = False,
    accept_changes: AcceptChangesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print estimates only.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: plan for so many processes.")
    ] = None,
    device_name: Annotated[
        str | None, typer.Option(help="With --dry-run: plan for this accelerator, as in H200.")
    ] = None,
) -> None:
    """Trains a language model: nirvana train quickstart

    Any setting of the configuration can follow: --optim.lr 1e-3 --run.out runs/one
    """
    from nirvana.config import load_config
    from nirvana.train.accelerators import known_accelerator
    from nirvana.train.config import LanguageConfig

    if not dry_run and (processes is not None or device_name is not None):
        raise InputError(
            "--processes and --device-name are for --dry-run; torchrun starts processes"
        )
    if device_name is not None:
        known_accelerator(device_name)
    load_config(LanguageConfig, config, list(ctx.args))  # refused before torch is imported
    if dry_run:
        from nirvana.train.plan import estimate

        estimate(config, list(ctx.args), processes, device_name)
    else:
        from nirvana.train import language

        language.train(config, list(ctx.args), resume, accept_changes)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, one of its checkpoints, the folder of a model, or a packaged "
            "model's name."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    precision: Annotated[
        str, typer.Option(help="float32 or bf16; else that of the run or the model.")
    ] = "",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder of a tokenizer, or a packaged model's name; else the model's."),
    ] = None,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="Add the model's code: loads without this package."),
    ] = False,
) -> None:
    """Writes a language model as a folder that transformers loads."""
    if precision not in ("", "float32", "bf16"):
        raise InputError(f"--precision {precision!r} must be float32 or bf16")

    from nirvana.train.export import export as write_model

    model = write_model(source, out, precision, tokenizer, standalone)
    print(f"{out}: the model of {model.folder}")


def generate(
    model: Annotated[str, typer.Argument(help="Folder, or the name of a packaged model.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads the standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from so much of the probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.", **SEEDS)] = 0,
    adapt: AdaptOption = False,
    task: TaskOption = None,
    parameters: ParametersOption = None,
    chunk: ChunkOption = None,
    steps: StepsOption = None,
    lr: StepSizesOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Continues a text, and prints each token as it is generated.

    With --adapt the model first adapts to the prompt; weights stay as they are.
    """
    if prompt == "-":
        prompt = _standard_input()
    if not prompt.strip():
        raise InputError("--prompt is empty: give some text to continue")
    for name, value, right, good in (
        ("max-new-tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
        # Less would divide logits beyond the range of float32.
        ("temperature", temperature, "0, or 1e-6 or more", temperature == 0 or temperature >= 1e-6),
        ("top-p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
    ):
        if not good:
            raise InputError(f"--{name} = {value} must be {right}")
    require_adapt(adapt, parameters=parameters, chunk=chunk, steps=steps, lr=lr)
    folder = resolve(model)
    config = adapt_config(folder, parameters, chunk, steps, lr)

    from nirvana.adapt.adaptation import adapt_documents
    from nirvana.adapt.task import load_task
    from nirvana.device import choose_device
    from nirvana.generate.text import prompt_tokens
    from nirvana.model.assets import load_language_model

    learned = None if task is None else load_task(task)
    loaded, tokenizer = load_language_model(folder, choose_device(device))
    tokens = prompt_tokens(tokenizer, prompt)
    if adapt:
        _, learned = adapt_documents(loaded, [tokens], config, learned)
    with nullcontext() if learned is None else learned.applied(loaded):
        continue_text(loaded, tokenizer, tokens, max_new_tokens, temperature, top_p, seed)


def _standard_input() -> str:
    """The text on the standard input, without the line breaks at its end."""
    if sys.stdin is None:
        raise InputError("--prompt -: the standard input is closed")
    try:
        return decode_utf8(sys.stdin.buffer.read(), "--prompt -").rstrip("\r\n")
    except OSError as error:
        reason = error.strerror
        raise InputError(f"--prompt -: the standard input cannot be read: {reason}") from None


def continue_text(
    model: Any, tokenizer: Any, prompt: list[int], *args: Any, **options: Any
) -> None:
    """Prints a continuation of the tokens `prompt`, one by one, until EOS at the latest; see
    `nirvana.generate.text.generate_text`."""
    from transformers import TextStreamer

    from nirvana.generate.text import generate_text

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate_text(model, tokenizer, prompt, *args, streamer=streamer, **options)
