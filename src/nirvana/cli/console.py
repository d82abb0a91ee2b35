"""Where the commands print their tables."""

import sys

from rich.console import Console

WIDTH = 160
"""Columns of a table in a file or a pipe, which have no width of their own."""


def output() -> Console:
    """The standard output."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)
