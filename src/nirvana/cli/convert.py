"""`nirvana convert`: checkpoints of the authors' format to ours, and back."""

from pathlib import Path
from typing import Annotated

import typer

from nirvana.errors import InputError
from nirvana.packaged import local_or_packaged


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with config.json and safetensors; with --reverse also a packaged model's "
            "name."
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    window: Annotated[
        str, typer.Option(help="Tokens that a token sees; none for all, as the released code does.")
    ] = "configured",
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Ours to the authors' format.")
    ] = False,
) -> None:
    """Converts a checkpoint of the authors' format."""
    size: int | str | None = None if window == "none" else window
    if size not in (None, "configured"):
        if not window.isdecimal():
            raise InputError(f"--window {window} must be a number of tokens, or none")
        size = int(window)
    if reverse:
        source = local_or_packaged(source)

    from nirvana.model.convert import convert as convert_folder

    print(convert_folder(source, destination, size, reverse))
