"""`nirvana adopt`: a pretrained Transformer as a Nirvana model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nirvana.errors import InputError


class Branches(StrEnum):
    """What the layers of the result have."""

    window = "window"
    both = "both"
    linear = "linear"


def adopt(
    teacher: Annotated[
        Path,
        typer.Argument(
            metavar="TEACHER",
            help="Folder of a Llama, Mistral, Qwen2, Qwen2.5, Qwen3 or SmolLM model, or a .gguf "
            "file.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    branches: Annotated[
        Branches,
        typer.Option(help="window: the teacher itself; both: beside a linear branch; linear."),
    ] = Branches.both,
    window: Annotated[
        str,
        typer.Option(
            help="Tokens that a token sees; none: as the teacher. By default 512 with both "
            "branches, else none."
        ),
    ] = "default",
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First tokens that stay visible; by default 4 with a window that the teacher "
            "lacks.",
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bf16; else that of the teacher.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the new weights.")] = 0,
) -> None:
    """Writes a pretrained Transformer as a Nirvana model."""
    if precision not in ("", "float32", "bf16"):
        raise InputError(f"--precision {precision!r} must be float32 or bf16")
    size: int | str | None = None if window == "none" else window
    if size not in (None, "default"):
        if not window.isdecimal():
            raise InputError(f"--window {window} must be a number of tokens, or none")
        size = int(window)
    if not teacher.exists():
        raise InputError(f"no model {str(teacher)!r}: give a folder, or a .gguf file")

    from nirvana.model.adopt import REPORT
    from nirvana.model.adopt import adopt as write_model

    report = write_model(teacher, out, branches.value, size, sinks, precision, seed)
    width = "no window" if report["window"] is None else f"a window of {report['window']}"
    print(f"{out}: {report['family']}, branches {report['branches']}, {width}")
    print(
        f"mapped: {report['mapped parameters']:,} of {report['parameters']:,} parameters; new: "
        f"{report['new parameters']:,}"
    )
    for name, each in report["new"].items():
        if ".layers." not in name or ".layers.0." in name:
            print(f"  {name} {each['shape']}: {each['initial']}")
    print(f"untrained it computes {report['step 0']}; tokenizer: {report['tokenizer']}")
    print(f"all names: {out / REPORT}")
