"""The picture of a report: a slice with the region that the report names."""

import textwrap
from pathlib import Path

import numpy as np

from nirvana.files import atomic_file
from nirvana.mri.evaluate.figure import (
    BACKGROUND,
    FAINT,
    INK,
    TEXT_SIZE,
    SliceGeometry,
    mark_geometry,
)
from nirvana.mri.reports.reporter import DISCLAIMER, Reading

MARK = "#ffb000"
HEIGHT, TEXT_WIDTH = 5.0, 5.6  # of the slice, and of the text beside it, inches
CHARACTERS = 44  # in a line of the text
SIDES = ("R", "L", "A", "P")


def report_panel(
    path: str | Path,
    image: np.ndarray,
    reading: Reading,
    marked: np.ndarray | None,
    title: str,
    sides_known: bool = True,
) -> None:
    """Writes a PNG, atomically: the slice in radiological convention with its finding's lobe
    outlined, the report, the probability of each fact, and the disclaimer.

    Args:
        path: PNG file.
        image: real `[H, W]`.
        reading: of the slice.
        marked: bool `[H, W]` of `localize.lobe_region`, or None.
        title: a line on top.
        sides_known: whether the scan's orientation is known; the patient's sides are marked only
            then.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = image.shape
    wide = HEIGHT * width / height
    heading = textwrap.wrap(title, int(8 * (wide + TEXT_WIDTH)))
    above = 0.2 + 0.3 * len(heading)
    size = (wide + TEXT_WIDTH, HEIGHT + above)
    figure = Figure(figsize=size, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, wide / size[0], HEIGHT / size[1]), xticks=[], yticks=[])
    axes.set_frame_on(False)
    axes.imshow(image, cmap="gray", vmin=0, vmax=float(np.quantile(image, 0.998)) or 1.0)
    if marked is not None:
        axes.contour(marked, [0.5], colors=MARK, linewidths=2)
    mark_geometry(axes, SliceGeometry(edges=SIDES if sides_known else None), width)
    figure.text(
        0.01, 1 - 0.1 / size[1], "\n".join(heading), color=FAINT, fontsize=TEXT_SIZE, va="top"
    )
    lines = [*textwrap.wrap(reading.text, CHARACTERS), ""]
    if reading.facts.finding:
        place = "outlined" if marked is not None else "not outlined: it is not in this slice"
        sides = "R and L are the patient's" if sides_known else "which side is left is unknown"
        lines += [*textwrap.wrap(f"The lobe is {place}; {sides}.", CHARACTERS), ""]
    left = (wide + 0.25) / size[0]
    figure.text(
        left, 1 - (above + 0.2) / size[1], "\n".join(lines), color=INK, fontsize=TEXT_SIZE,
        va="top", linespacing=1.35,
    )  # fmt: skip
    _draw_facts(figure, reading, (left, 0.75 / size[1]), size)
    figure.text(left, 0.22 / size[1], DISCLAIMER, color=MARK, fontsize=TEXT_SIZE)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor=BACKGROUND)


def _draw_facts(figure, reading: Reading, corner: tuple[float, float], size) -> None:
    """A line for each fact above a corner: name, value, and a bar as long as its probability."""
    described = reading.to_dict()
    rows = [
        (name, str(described["facts"][name]), probability)
        for name, probability in described["probability"].items()
    ]
    line = 0.31 / size[1]
    inch = 1 / size[0]
    for i, (name, value, probability) in enumerate(reversed(rows)):
        x, y = corner[0], corner[1] + i * line
        figure.text(x, y, name, color=FAINT, fontsize=TEXT_SIZE - 1)
        figure.text(x + 0.85 * inch, y, value, color=INK, fontsize=TEXT_SIZE - 1)
        bar = figure.add_axes((x + 3.3 * inch, y, 1.2 * inch, 0.15 / size[1]), xlim=(0, 1))
        bar.barh([0], [probability], color=MARK)
        bar.set(xticks=[], yticks=[], facecolor="#30343a")
        bar.set_frame_on(True)
        for spine in bar.spines.values():
            spine.set_visible(False)
        figure.text(x + 4.6 * inch, y, f"{probability:.0%}", color=INK, fontsize=TEXT_SIZE - 1)
