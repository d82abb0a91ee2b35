"""The picture of a report: a slice with the region that the report names."""

from pathlib import Path

import numpy as np

from nirvana.files import atomic_file
from nirvana.mri.evaluate.figure import BACKGROUND, FAINT, INK
from nirvana.mri.reports.reporter import DISCLAIMER, Reading

MARK = "#ffb000"
WIDTH = 4.6


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
        sides_known: whether the patient's right and left are marked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height, width = image.shape
    tall = WIDTH * height / width
    size = (WIDTH + 4.4, tall + 0.5)
    figure = Figure(figsize=size, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, WIDTH / size[0], tall / size[1]), xticks=[], yticks=[])
    axes.set_frame_on(False)
    axes.imshow(image, cmap="gray", vmin=0, vmax=float(np.quantile(image, 0.998)) or 1.0)
    if marked is not None:
        axes.contour(marked, [0.5], colors=MARK, linewidths=1.4)
    for x, letter in ((0.02, "R"), (0.98, "L")) if sides_known else ():  # the patient's
        axes.text(
            x, 0.5, letter, color=INK, fontsize=13, transform=axes.transAxes, va="center",
            ha="left" if letter == "R" else "right",
        )  # fmt: skip
    left = (WIDTH + 0.2) / size[0]
    figure.text(0.01, 1 - 0.32 / size[1], title, color=FAINT, fontsize=10)
    lines = _wrapped(reading.text, 44)
    lines += ["", *_facts(reading)]
    if reading.facts.finding:
        outline = "its lobe is outlined" if marked is not None else "its lobe could not be outlined"
        sides = "R and L are the patient's" if sides_known else "which side is left is unknown"
        lines += ["", *_wrapped(f"({outline}; {sides})", 44)]
    figure.text(
        left, 1 - 0.75 / size[1], "\n".join(lines), color=INK, fontsize=11, va="top",
        linespacing=1.5,
    )  # fmt: skip
    figure.text(left, 0.2 / size[1], DISCLAIMER, color=MARK, fontsize=11)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor=BACKGROUND)


def _facts(reading: Reading) -> list[str]:
    described = reading.to_dict()
    return [
        f"{name}: {described['facts'][name]}   {probability:.0%}"
        for name, probability in described["probability"].items()
    ]


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
