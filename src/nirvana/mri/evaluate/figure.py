"""Pictures of a comparison: images in one grey scale, error maps in one colour scale."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nirvana.files import atomic_file

BACKGROUND, INK, FAINT = "#101216", "#f2f2f2", "#9aa0a8"
LABELS = {"ssim": "SSIM {:.3f}", "psnr": "PSNR {:.2f} dB", "nmse": "NMSE {:.4f}"}
PANEL_WIDTH = 3.0


def panel(
    path: str | Path,
    images: Mapping[str, np.ndarray],
    target_name: str | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
) -> None:
    """Writes a PNG, atomically: the images in a row, the target first where there is one, and
    below each of the others |image - target|, all with one scale, whose bar stands below the
    target.

    Args:
        path: the file.
        images: name -> real `[H, W]`, all of one size, magnitude; drawn with row 0 on top.
        target_name: name of the fully sampled image; without one there are no error maps.
        scores: name -> `ssim`, `psnr`, `nmse` (any of them), written under the image.
        title: a line on top.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(images)
    if target_name is not None:
        names = [target_name, *(name for name in names if name != target_name)]
    height, width = images[names[0]].shape
    rows = 1 if target_name is None else 2
    tall = PANEL_WIDTH * height / width
    # Inches: what the text takes is fixed, what the images take follows their shape.
    above, between, side = 0.75 if title else 0.4, 0.12, 0.12
    below = 0.28 if scores else 0.0
    size = (len(names) * (PANEL_WIDTH + side) + side, above + rows * (tall + between) + below)
    figure = Figure(figsize=size, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def axes(column: int, row: int):
        left = side + column * (PANEL_WIDTH + side)
        bottom = size[1] - above - (row + 1) * tall - row * between
        box = (left / size[0], bottom / size[1], PANEL_WIDTH / size[0], tall / size[1])
        return figure.add_axes(box, xticks=[], yticks=[], frame_on=False)

    reference = images[names[0] if target_name is None else target_name]
    white = float(np.quantile(reference, 0.998)) or 1.0
    errors = {
        name: np.abs(images[name] - reference)
        for name in names
        if target_name is not None and name != target_name
    }
    brightest = max((float(np.quantile(e, 0.998)) for e in errors.values()), default=0.0) or white
    for column, name in enumerate(names):
        top = axes(column, 0)
        top.imshow(images[name], cmap="gray", vmin=0, vmax=white, interpolation="lanczos")
        top.set_title(name, color=INK, fontsize=12, pad=6)
        if name in errors:
            lower = axes(column, 1)
            drawn = lower.imshow(errors[name], cmap="inferno", vmin=0, vmax=brightest)
            if column == 1:
                _bar(figure, drawn, axes(0, 1), brightest / white)
        if scores and name in scores:
            text = "   ".join(
                label.format(scores[name][key])
                for key, label in LABELS.items()
                if key in scores[name]
            )
            centre = side + column * (PANEL_WIDTH + side) + PANEL_WIDTH / 2
            figure.text(
                centre / size[0], 0.16 / size[1], text, color=INK, fontsize=8.5, ha="center"
            )
    if title:
        figure.text(side / size[0], 1 - 0.3 / size[1], title, color=FAINT, fontsize=10, ha="left")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor=BACKGROUND)


def _bar(figure, drawn, place, share: float) -> None:
    """The colour bar of the error maps, in the free place below the target."""
    place.set_axis_off()
    inset = place.inset_axes((0.16, 0.46, 0.6, 0.05))
    bar = figure.colorbar(drawn, cax=inset, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.set_ticks([0, drawn.norm.vmax], labels=["0", f"{100 * share:.0f} % of white"])
    bar.ax.tick_params(colors=FAINT, labelsize=9, length=0)
    bar.ax.set_title("absolute error", color=INK, fontsize=10)
