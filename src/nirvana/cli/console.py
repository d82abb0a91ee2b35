"""Options that several commands have, and the console that prints their tables."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nirvana.errors import InputError
from nirvana.files import writable_json

WIDTH = 160
"""Columns of a table in a file or a pipe, which have no width of their own."""
SEEDS: dict[str, Any] = {"min": 0, "max": 2**62}
"""The range of an option that is a seed; torch's generators take what a few more add to it."""


def output() -> Console:
    """A console on the standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _writable(path: Path | None) -> Path | None:
    """Checks the file of --json before the work starts."""
    return None if path is None else writable_json(path)


JsonOption = Annotated[
    Path | None, typer.Option(help="Also write the results to this file.", callback=_writable)
]


def _device(name: str | None) -> str | None:
    """Checks the form of a device's name without importing torch, which takes seconds."""
    if name is not None and not re.fullmatch(r"(auto|(cpu|cuda|mps|xpu)(:\d+)?)", name):
        raise InputError(f"device {name!r} cannot be used: give auto, cpu, cuda, cuda:1 ...")
    return name


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...", callback=_device)]
