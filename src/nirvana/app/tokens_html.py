"""Tokens of a text, coloured by a number of each, as HTML."""

import html
from collections.abc import Sequence

from nirvana.app.pictures import scale_bar

COLOURS = "viridis"
DARK = 0.5  # luminance below which a token's letters are white


def tokens_html(
    pieces: Sequence[str],
    values: Sequence[float],
    ends: tuple[float, float],
    title: str,
    unit: str,
) -> str:
    """A text whose tokens have colours; the number of each is its tooltip.

    Args:
        pieces: texts of the tokens.
        values: a number for each; none where the model has none.
        ends: of the colour scale.
        title: of the colour bar.
        unit: of the numbers, after a blank, or empty.
    """
    if not values:
        return f"<p>{html.escape(title)}: this model has none.</p>"
    low, high = ends
    marks = "".join(
        _mark(piece, value, (value - low) / ((high - low) or 1.0), unit)
        for piece, value in zip(pieces, values, strict=True)
    )
    bar = scale_bar(COLOURS, f"{low:.3g}{unit}", f"{high:.3g}{unit}", title)
    label = f'tabindex="0" role="group" aria-label="{html.escape(title)}"'
    return f'<div class="tokens" {label}>{marks}</div>{bar}'


def _mark(piece: str, value: float, share: float, unit: str) -> str:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps[COLOURS](share)
    ink = "#fff" if 0.299 * red + 0.587 * green + 0.114 * blue < DARK else "#000"
    style = f"background: rgb({255 * red:.0f} {255 * green:.0f} {255 * blue:.0f}); color: {ink}"
    shown = html.escape(piece).replace("\n", "\u21b5\n")
    return f'<mark style="{style}" title="{value:.4g}{unit}">{shown}</mark>'
