"""Markdown tables and how figures are written in them."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, with an empty line before it and a line break at its end.

    Raises:
        ValueError: for a row that has more or fewer cells than the head.
    """
    lines = [list(map(str, head)), ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    wrong = next((line for line in lines if len(line) != len(head)), None)
    if wrong is not None:
        raise ValueError(f"a table of {len(head)} columns has a row of {len(wrong)}: {wrong}")
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def show_p(p: float | None) -> str:
    """A p value in two significant digits; "-" for None, "< 0.001" below that."""
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"
