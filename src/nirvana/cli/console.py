"""Where the commands print and write their tables."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nirvana.files import writable_json

WIDTH = 160
"""Columns of a table in a file or a pipe, which have no width of their own."""
SEEDS: dict[str, Any] = {"min": 0, "max": 2**62}
"""What generators take, and some more that are counted from there."""


def output() -> Console:
    """The standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _asked(path: Path | None) -> Path | None:
    """Before the work whose results go there."""
    return None if path is None else writable_json(path)


JsonOption = Annotated[
    Path | None, typer.Option(help="Write the results here, too.", callback=_asked)
]
