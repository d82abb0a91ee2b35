"""Tables of scores to print."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nirvana.mri.evaluate.compare import METRICS, Row

FORMATS = {
    "ssim": "{:.4f}",
    "psnr": "{:.2f}",
    "nmse": "{:.4f}",
    "ssim_head": "{:.4f}",
    "psnr_head": "{:.2f}",
    "nmse_head": "{:.4f}",
    "seconds_per_slice": "{:.3f}",
}


def rows_table(rows: Sequence[Row]) -> Table:
    """A table of the rows of `compare.evaluate_volume`."""
    shown = [key for key in FORMATS if all(key in row for row in rows)]
    several = len({row["volume"] for row in rows}) > 1
    sized = any(row.get("parameters") is not None for row in rows)
    table = Table(box=SIMPLE_HEAD)
    if several:
        table.add_column("volume", overflow="fold")
    table.add_column("method", no_wrap=True)
    if sized:
        table.add_column("parameters", justify="right", no_wrap=True)
    for key in shown:
        # On a narrow terminal the names of volumes are folded, the numbers are not.
        longest = max(len(FORMATS[key].format(row[key])) for row in rows)
        table.add_column(heading(key), justify="right", min_width=longest)
    for row in rows:
        cells = ([row["volume"]] if several else []) + [row["method"]]
        if sized:
            number = row.get("parameters")
            cells.append("" if number is None else f"{number / 1e6:.2f} M")
        table.add_row(*cells, *(FORMATS[key].format(row[key]) for key in shown))
    return table


def summary_table(summary: Sequence[Row]) -> Table:
    """A table of the lines of `compare.summarise`: mean, ± standard deviation, p."""
    metrics = [metric for metric in METRICS if all(metric in line for line in summary)]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for metric in metrics:
        table.add_column(heading(metric), justify="right")
    for line in summary:
        table.add_row(line["method"], *(_cell(line[metric], metric) for metric in metrics))
    return table


def _cell(figures: Row, metric: str) -> str:
    text = FORMATS[metric].format(figures["mean"])
    if figures["std"] is not None:
        text += "\n± " + FORMATS[metric].format(figures["std"])
    return text if figures["p"] is None else f"{text}\np = {figures['p']:.3g}"


def heading(key: str) -> str:
    """The heading of a column, with its unit; of two lines where only a part of a slice is scored.

    Args:
        key: of `FORMATS`.
    """
    name, _, where = key.partition("_")
    if key == "seconds_per_slice":
        return "s / slice"
    unit = " dB" if name == "psnr" else ""
    return f"{name.upper()}{unit}" + (f"\n{where}" if where else "")
