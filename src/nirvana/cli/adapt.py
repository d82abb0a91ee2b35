"""Commands of adaptation (adapt, task info, task merge), and their options elsewhere."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from nirvana.cli.console import DeviceOption, JsonOption, output
from nirvana.data.hub import local_path
from nirvana.errors import InputError
from nirvana.files import check_outputs, replaceable_file, write_json
from nirvana.packaged import folder_of, resolve

TASK_MARK = b"nirvana task"
"""Bytes in the head of every task file, in its metadata."""

task_app = typer.Typer(help="Task files: what they hold; several as one.", no_args_is_help=True)


def _task_output(path: Path | None) -> Path | None:
    return path and replaceable_file(path, lambda head: TASK_MARK in head, "a task")


AdaptOption = Annotated[
    bool, typer.Option("--adapt", help="Adapt to the text while reading it; see docs/adaptation.md")
]
TaskOption = Annotated[
    Path | None, typer.Option(help="Task file: the model with it, or the start of --adapt.")
]
ParametersOption = Annotated[
    str | None, typer.Option(help="What adapts: norm, fast, low_rank, with commas between.")
]
ChunkOption = Annotated[
    int | None, typer.Option(help="Tokens that are scored before they teach the next ones.")
]
StepsOption = Annotated[int | None, typer.Option(help="Steps of the optimiser on each chunk.")]
StepSizesOption = Annotated[
    str | None,
    typer.Option("--lr", help="Step size; one for all, or norm=0.01,fast=0.03. Else the model's."),
]


def adapt_config(
    folder: Path, parameters: str | None, chunk: int | None, steps: int | None, lr: str | None
) -> Any:
    """The model's own settings, with those of the command line in their place.

    Args:
        folder: of the model.
        parameters: of the option, or None.
        chunk: of the option, or None.
        steps: of the option, or None.
        lr: of the option, or None.

    Returns:
        an `AdaptConfig`.

    Raises:
        InputError: for values that are out of range.
    """
    from nirvana.adapt.config import config_of, read_step_sizes

    groups = None if parameters is None else tuple(g.strip() for g in parameters.split(","))
    return config_of(folder, groups, chunk, steps, None if lr is None else read_step_sizes(lr))


def require_adapt(adapt: bool, **options: Any) -> None:
    """Refuses options of adaptation without --adapt.

    Args:
        adapt: whether it is given.
        options: by name; None for one that is not given.

    Raises:
        InputError: for one that is given without --adapt.
    """
    for name, value in options.items():
        if value is not None and not adapt:
            raise InputError(f"--{name} has no effect without --adapt")


def adapt(
    model: Annotated[str, typer.Argument(help="Folder, or the name of a packaged model.")],
    files: Annotated[
        list[Path], typer.Argument(help="Text files of one domain, as of nirvana eval.")
    ],
    out: Annotated[
        Path, typer.Option(help="Task file to write, .safetensors.", callback=_task_output)
    ],
    task: Annotated[Path | None, typer.Option(help="Task file to start from; else zero.")] = None,
    parameters: ParametersOption = None,
    chunk: ChunkOption = None,
    steps: StepsOption = None,
    lr: StepSizesOption = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each file at most.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents read side by side.")] = 8,
    json: JsonOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Learns the task parameters of a domain from its texts and writes them as a task file.

    The weights stay as they are. The bits per byte that are printed were scored before the text
    taught anything. Docs: docs/adaptation.md.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must be a file name that ends in .safetensors")
    for name, value in (("limit", limit), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"--{name} = {value} must be at least 1")
    check_outputs({"--out": out, "--json": json}, [folder_of(model), *map(local_path, files), task])
    folder = resolve(model)
    config = adapt_config(folder, parameters, chunk, steps, lr)

    from nirvana.adapt.task import load_task, save_task
    from nirvana.device import choose_device
    from nirvana.evaluate.adapted import learn_domain
    from nirvana.model.assets import load_language_model

    start = None if task is None else load_task(task)
    loaded, tokenizer = load_language_model(folder, choose_device(device))
    learned, halves = learn_domain(loaded, tokenizer, files, config, start, limit, batch_size)
    save_task(learned, out)
    first, second = halves
    both = first + second
    each = (
        f"{first.bits_per_byte:.4f} in the first half, {second.bits_per_byte:.4f} in the second"
        if first.documents > 0
        else f"{both.bits_per_byte:.4f}"
    )
    print(
        f"{out}: {learned.values.shape[1]:,} numbers, learned from {both.documents:,} documents, "
        f"{both.tokens:,} tokens; bits per byte as they were read: {each}"
    )
    if json is not None:
        figures = {"first_half": first.to_dict(), "second_half": second.to_dict()}
        write_json(json, {"model": model, "task": learned.about, **figures})


@task_app.command("info")
def info(
    file: Annotated[Path, typer.Argument(help="Task file.")],
    model: Annotated[
        str | None, typer.Option(help="Folder, or a packaged model's name: is it the task's model?")
    ] = None,
) -> None:
    """Prints what a task file holds."""
    folder = None if model is None else resolve(model)

    from nirvana.adapt.task import load_task

    task = load_task(file)
    if folder is not None:
        from nirvana.model.assets import load_language_model

        task.require(load_language_model(folder)[0])
    print(f"{file}: {task.values.shape[1]:,} numbers of the model {task.model[:16]}")
    for name, value in {**vars(task.config), **task.about}.items():
        print(f"{name} = {value}")
    table = Table(Column("tensor", overflow="fold"), "shape", "root mean square")
    for each, part in zip(task.layout.tensors, task.layout.split(task.values), strict=True):
        size = part.square().mean().sqrt()
        table.add_row(each.name, " x ".join(map(str, each.shape)), f"{size:.4f}")
    output().print(table)


@task_app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Task files of one model.")],
    out: Annotated[
        Path, typer.Option(help="Task file to write, .safetensors.", callback=_task_output)
    ],
    weights: Annotated[
        str | None, typer.Option(help="Weight of each file, as 1,0.5; else equal ones.")
    ] = None,
) -> None:
    """Writes the weighted mean of several task files as one."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out} must be a file name that ends in .safetensors")
    check_outputs({"--out": out}, files)
    try:
        shares = None if weights is None else [float(each) for each in weights.split(",")]
    except ValueError:
        raise InputError(f"--weights {weights} must be numbers: 1,0.5") from None

    from nirvana.adapt.task import load_task, merge_tasks, save_task

    save_task(merge_tasks([load_task(file) for file in files], shares), out)
    print(f"{out}: {len(files)} tasks in one")
