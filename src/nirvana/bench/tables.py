"""Results as tables for a terminal."""

from collections.abc import Callable
from typing import Any

from rich.table import Column, Table

FORMATS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", lambda n: f"{n / 1e6:,.0f} M"),
    "tokens_per_second": ("tokens/s", lambda rate: f"{rate:,.0f}"),
    "ms": ("ms", lambda ms: f"{ms:,.2f}"),
    "peak_bytes": ("peak, GiB", lambda n: f"{n / 2**30:.2f}"),
    "share_of_floor": ("of floor", lambda share: f"{share:.0%}"),
    "gradient_error": ("gradient error", lambda error: f"{error:.1%}"),
    "time_share_of_trigger": ("Trigger's time", lambda share: f"{share:.1%}"),
    "memory_share_of_trigger": ("memory", lambda share: f"{share:.1%}"),
}


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Lays out rows as a table, one line each; columns without values are left out.

    Args:
        rows: of `nirvana.bench.run.measure`.

    Returns:
        the table.
    """
    kept = [name for name in FORMATS if any(name in row for row in rows)]
    heads = [Column(FORMATS[name][0], justify="right") for name in kept]
    table = Table("part", "B x T", "model", *heads, Column("not measured", overflow="fold"))
    for row in rows:
        how = f", {row['how']}" if "how" in row else ""
        cells = (FORMATS[name][1](row[name]) if name in row else "" for name in kept)
        size = f"{row['batch']} x {row['tokens']:,}"
        table.add_row(row["part"], size, row["model"] + how, *cells, row.get("failed", ""))
    return table
