"""Pictures of a comparison: images in one grey scale, error maps in one colour scale."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.files import atomic_file

BACKGROUND, INK, FAINT = "#101216", "#f2f2f2", "#b4bac2"
LABELS = {"ssim": "SSIM {:.3f}", "psnr": "PSNR {:.1f} dB", "nmse": "NMSE {:.4f}"}
ERROR_COLOURS = "inferno"  # brightness alone orders it, so it needs no colour vision

# Inches and points. A picture of five columns fills a slide, where the smallest text is then as
# large as 12 points.
PANEL_WIDTH, GAP = 3.0, 0.12
NAME_SIZE, TEXT_SIZE = 18, 15
LINE = 0.29  # of text, inches

ERROR_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # ends of the error scale, shares of white
BAR_LENGTHS = (100, 50, 20, 10, 5, 2, 1)  # mm
# Cosine from which on an axis of the image is named after the patient's: within 45 degrees.
NAMED = 0.707


@dataclass(frozen=True)
class SliceGeometry:
    """What is known of a slice's place.

    Attributes:
        spacing: of rows and of columns, in mm; None if unknown.
        edges: the patient's side at the left, right, top and bottom edge of the picture, letters of
            R, L, A, P, S (head) and I (feet), or "" for an oblique axis; None if unknown.
    """

    spacing: tuple[float, float] | None = None
    edges: tuple[str, str, str, str] | None = None


def slice_geometry(
    spacing: tuple[float, float, float] | None, affine: np.ndarray | None
) -> SliceGeometry:
    """The geometry of the slices of a scan.

    Args:
        spacing: of slices, rows and columns in mm, or None.
        affine: float64 `[4, 4]`, (slice, row, column) to mm to the patient's right, front and top,
            or None; then no edge is named.
    """
    within = None if spacing is None else (float(spacing[1]), float(spacing[2]))
    if affine is None:
        return SliceGeometry(within)
    (left, right), (top, bottom) = (_ends(affine[:3, axis]) for axis in (2, 1))
    return SliceGeometry(within, (left, right, top, bottom))


def _ends(direction: np.ndarray) -> tuple[str, str]:
    """The patient's sides at the first and at the last index along a direction in RAS+."""
    cosines = direction / max(float(np.linalg.norm(direction)), 1e-12)
    axis = int(np.abs(cosines).argmax())
    if abs(cosines[axis]) < NAMED:
        return "", ""
    first, last = (("L", "R"), ("P", "A"), ("I", "S"))[axis]
    return (first, last) if cosines[axis] > 0 else (last, first)


def panel(
    path: str | Path,
    images: Mapping[str, np.ndarray],
    target_name: str | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    title: str | None = None,
    geometry: SliceGeometry | None = None,
) -> None:
    """Writes a PNG, atomically: the images in a row, the target first where there is one, and
    below each of the others |image - target| on one scale, whose bar stands below the target.

    The error scale ends at the smallest of `ERROR_STEPS` that holds 98 % of the pixels of the
    image with the smallest errors, so that its map is readable; larger errors of other images
    saturate, which the arrow at the end of the bar shows.

    Args:
        path: the file.
        images: name -> real `[H, W]`, all of one size, magnitude; drawn with row 0 on top.
        target_name: name of the fully sampled image; without one there are no error maps.
        scores: name -> `ssim`, `psnr`, `nmse` (any of them) of the slice that is shown, written
            under the image.
        title: a line on top.
        geometry: for a scale bar, the pixels' aspect, and the patient's sides.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(images)
    if target_name is not None:
        names = [target_name, *(name for name in names if name != target_name)]
    geometry = geometry or SliceGeometry()
    height, width = images[names[0]].shape
    row, column = geometry.spacing or (1.0, 1.0)
    rows = 1 if target_name is None else 2
    tall = PANEL_WIDTH * height * row / (width * column)
    lines = max((len(_score_lines(each)) for each in (scores or {}).values()), default=0)
    # What the text takes is fixed, what the images take follows their shape.
    above = 0.5 + (0.4 if title else 0.0)
    below = GAP + LINE * lines
    size = (len(names) * (PANEL_WIDTH + GAP) + GAP, above + rows * (tall + GAP) + below)
    figure = Figure(figsize=size, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def axes(place: int, line: int) -> Any:
        left = GAP + place * (PANEL_WIDTH + GAP)
        bottom = size[1] - above - (line + 1) * tall - line * GAP
        box = (left / size[0], bottom / size[1], PANEL_WIDTH / size[0], tall / size[1])
        return figure.add_axes(box, xticks=[], yticks=[], frame_on=False)

    reference = images[names[0] if target_name is None else target_name]
    white = float(np.quantile(reference, 0.998)) or 1.0
    errors = {
        name: np.abs(images[name] - reference) / white
        for name in names
        if target_name is not None and name != target_name
    }
    top = error_scale(errors)
    for place, name in enumerate(names):
        upper = axes(place, 0)
        upper.imshow(
            images[name], cmap="gray", vmin=0, vmax=white, interpolation="lanczos", aspect="auto"
        )
        upper.set_title(name, color=INK, fontsize=NAME_SIZE, pad=7)
        if place == 0:
            mark_geometry(upper, geometry, width)
        if name in errors:
            drawn = axes(place, 1).imshow(
                errors[name], cmap=ERROR_COLOURS, vmin=0, vmax=top, aspect="auto"
            )
            if place == 1:
                _error_bar(figure, drawn, axes(0, 1), max(e.max() for e in errors.values()) > top)
        if scores and name in scores:
            text = "\n".join(_score_lines(scores[name]))
            centre = GAP + place * (PANEL_WIDTH + GAP) + PANEL_WIDTH / 2
            figure.text(
                centre / size[0], (below - 0.02) / size[1], text, color=INK, fontsize=TEXT_SIZE,
                ha="center", va="top", linespacing=1.25,
            )  # fmt: skip
    if scores:
        figure.text(
            (GAP + PANEL_WIDTH / 2) / size[0], (below - 0.02) / size[1], "scores of\nthis slice",
            color=FAINT, fontsize=TEXT_SIZE, ha="center", va="top", linespacing=1.25,
        )  # fmt: skip
    if title:
        figure.text(
            GAP / size[0], 1 - 0.36 / size[1], title, color=FAINT, fontsize=TEXT_SIZE, ha="left"
        )
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor=BACKGROUND)


def error_scale(errors: Mapping[str, np.ndarray]) -> float:
    """The end of the error scale, a share of white, see `panel`."""
    smallest = min((float(np.quantile(each, 0.98)) for each in errors.values()), default=0.0)
    return next((step for step in ERROR_STEPS if step >= smallest), ERROR_STEPS[-1])


def mark_geometry(axes: Any, geometry: SliceGeometry, width: int) -> None:
    """Adds the patient's sides, and a bar of a round length, to the axes of an image.

    Args:
        axes: of Matplotlib, with the image's pixels as data.
        geometry: of the slice; what is unknown is not drawn.
        width: columns of the image.
    """
    from matplotlib.patheffects import withStroke

    outline = [withStroke(linewidth=3, foreground="black")]
    text = {"color": INK, "fontsize": TEXT_SIZE, "path_effects": outline}
    inside = {**text, "transform": axes.transAxes}
    if geometry.edges is not None:
        left, right, top, bottom = geometry.edges
        for x, y, letter, ha, va in (
            (0.03, 0.5, left, "left", "center"),
            (0.97, 0.5, right, "right", "center"),
            (0.5, 0.97, top, "center", "top"),
            (0.5, 0.03, bottom, "center", "bottom"),
        ):
            axes.text(x, y, letter, ha=ha, va=va, weight="bold", **inside)
    if geometry.spacing is None:
        return
    shown = width * geometry.spacing[1]
    length = next((each for each in BAR_LENGTHS if each <= 0.3 * shown), BAR_LENGTHS[-1])
    share = length / shown
    axes.plot(
        [0.04, 0.04 + share], [0.05, 0.05], color=INK, linewidth=4, solid_capstyle="butt",
        transform=axes.transAxes, path_effects=[withStroke(linewidth=6, foreground="black")],
    )  # fmt: skip
    axes.text(0.04, 0.08, f"{length} mm", ha="left", va="bottom", **inside)


def _score_lines(scores: Mapping[str, float]) -> list[str]:
    return [label.format(scores[key]) for key, label in LABELS.items() if key in scores]


def _error_bar(figure: Any, drawn: Any, place: Any, saturated: bool) -> None:
    """The colour bar of the error maps, in the free place below the target."""
    place.set_axis_off()
    inset = place.inset_axes((0.1, 0.45, 0.8, 0.08))
    bar = figure.colorbar(
        drawn, cax=inset, orientation="horizontal", extend="max" if saturated else "neither"
    )
    top = float(drawn.norm.vmax)
    bar.set_ticks([0, top / 2, top], labels=[f"{100 * x:g} %" for x in (0, top / 2, top)])
    bar.outline.set_edgecolor(FAINT)
    bar.ax.tick_params(colors=INK, labelsize=TEXT_SIZE, length=0)
    bar.ax.set_title("error, share of white", color=INK, fontsize=TEXT_SIZE, pad=8)
