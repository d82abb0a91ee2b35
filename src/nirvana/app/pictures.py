"""Slices as pictures in a page: PNG within HTML, so that no file is written for a view."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

QUANTILE = 0.998  # of the brightest pixels, which one vessel must not scale
ERROR_COLOURS = "inferno"
EVIDENCE_COLOURS = "RdBu_r"
STOPS = 17  # colours of a scale bar


@dataclass(frozen=True)
class Window:
    """The grey scale and the part of the images that are shown.

    Attributes:
        level: grey value in the middle, % of white.
        width: of the grey scale, % of white, above 0.
        zoom: 1 shows all.
        row: of the middle of the part, % of the height.
        column: likewise, % of the width.
    """

    level: float = 50.0
    width: float = 100.0
    zoom: float = 1.0
    row: float = 50.0
    column: float = 50.0

    def part(self, image: np.ndarray) -> np.ndarray:
        """The part of an image `[H, W]` that is shown, at least one pixel."""
        shown = []
        for length, middle in zip(image.shape, (self.row, self.column), strict=True):
            count = max(1, min(length, round(length / max(1.0, self.zoom))))
            first = round(middle / 100 * length - count / 2)
            first = min(max(first, 0), length - count)
            shown.append(slice(first, first + count))
        return image[shown[0], shown[1]]

    def grey(self, image: np.ndarray, white: float) -> np.ndarray:
        """uint8 `[h, w]`, the part of an image in the window.

        Args:
            image: real `[H, W]`.
            white: the value that is 100 %.
        """
        low = self.level - self.width / 2
        scaled = (100 * self.part(image) / white - low) / max(self.width, 1e-6)
        return np.round(255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def white_of(volume: np.ndarray) -> float:
    """The value of a volume that is shown as white."""
    return float(np.quantile(volume, QUANTILE)) or 1.0


def coloured(values: np.ndarray, low: float, high: float, colours: str) -> np.ndarray:
    """uint8 `[H, W, 3]`, values in a colour map of matplotlib that runs from `low` to `high`."""
    from matplotlib import colormaps

    scaled = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    return np.round(255 * colormaps[colours](scaled)[..., :3]).astype(np.uint8)


def png(pixels: np.ndarray) -> str:
    """The address of a picture that holds it itself, of uint8 `[H, W]` or `[H, W, 3]`."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", cmap="gray", vmin=0, vmax=255)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def figure(
    pixels: np.ndarray,
    name: str,
    caption: str = "",
    sides: tuple[str, str] | None = None,
    aspect: float = 1.0,
) -> str:
    """A picture with its name and a caption, as HTML.

    Args:
        pixels: see `png`.
        name: above it.
        caption: below it.
        sides: letters at its left and its right.
        aspect: height of a pixel over its width.
    """
    height, width = pixels.shape[0] * aspect, pixels.shape[1]
    letters = ""
    if sides is not None:
        letters = f'<span class="side">{sides[0]}</span><span class="side right">{sides[1]}</span>'
    name, caption = html.escape(name), html.escape(caption)
    return (
        f'<figure><figcaption class="name">{name}</figcaption><div class="picture">'
        f'<img src="{png(pixels)}" alt="{name} {caption}" '
        f'style="aspect-ratio: {width:.4f} / {height:.4f}">{letters}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def scale_bar(colours: str, low: str, high: str, title: str) -> str:
    """A colour bar with its ends and its title, as HTML."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    stops = ", ".join(to_hex(colormaps[colours](i / (STOPS - 1))) for i in range(STOPS))
    words = [html.escape(each) for each in (title, low, high)]
    return (
        f'<div class="scale"><span>{words[0]}</span><span>{words[1]}</span>'
        f'<span class="bar" style="background: linear-gradient(to right, {stops})"></span>'
        f"<span>{words[2]}</span></div>"
    )


def grid(rows: Sequence[Sequence[str]], columns: int, below: str = "") -> str:
    """Figures side by side, as HTML.

    Args:
        rows: of figures; a row may be shorter than `columns`.
        columns: of the grid.
        below: HTML under it.
    """
    cells = [
        cell or "<span></span>" for row in rows for cell in [*row, *[""] * (columns - len(row))]
    ]
    style = f"grid-template-columns: repeat({columns}, minmax(140px, 1fr))"
    inside = f'<div class="grid" style="{style}">{"".join(cells)}</div>'
    return f'<div class="pictures">{inside}{below}</div>'


def side_letters(affine: np.ndarray | None) -> tuple[str, str] | None:
    """The patient's sides at the left and the right of a picture of axial or coronal slices; None
    where they are unknown or elsewhere.

    Args:
        affine: of the volume, see `io.geometry`.
    """
    if affine is None:
        return None
    to_right = affine[0, 2] / (np.linalg.norm(affine[:3, 2]) or 1.0)  # of a step along a row
    if abs(to_right) < 0.7:
        return None
    return ("R", "L") if to_right < 0 else ("L", "R")


def error_scale(shown: Mapping[str, np.ndarray], target: str, white: float) -> float:
    """The end of one colour scale for the errors of all methods and slices, at which the map of the
    smallest errors is readable (`mri.evaluate.figure.error_scale`); larger ones saturate.

    Args:
        shown: name -> real `[slices, H, W]`.
        target: name of the fully sampled images.
        white: the value that is 100 %, see `white_of`.

    Returns:
        A share of white.
    """
    from nirvana.mri.evaluate import figure
    from nirvana.mri.evaluate.metrics import centre_crop

    size = shown[target].shape[-2:]
    return figure.error_scale(
        {
            name: np.abs(centre_crop(volume, size) - shown[target]) / white
            for name, volume in shown.items()
            if name != target
        }
    )
