"""Draws the figures of the pages of concepts: python docs/figures/concepts.py [FOLDER]"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parents[1] / "images"
INK, PAPER, QUIET = "#1b1f24", "#ffffff", "#5b6470"
# Okabe and Ito's colours, which differ for the colour-blind too; pale ones fill boxes.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#007a5a", "#9c4f84"
FILLS = {BLUE: "#dcebf5", ORANGE: "#fbe5d8", GREEN: "#d9efe7", PURPLE: "#f1e1ec", QUIET: "#eceef0"}
SETTINGS: Any = {"svg.hashsalt": "nirvana", "font.size": 12, "mathtext.fontset": "dejavusans"}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose units are inches."""
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5, height: float = 0.6
) -> None:
    """A box with its centre at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, boxstyle=style, facecolor=FILLS[colour], edgecolor=colour, lw=1.6
        )
    )
    axes.text(x, y, text, ha="center", va="center", color=INK, linespacing=1.35)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = INK,
    bend: float = 0.0,
) -> None:
    """An arrow from point to point; `bend` curves it."""
    style = {
        "arrowstyle": "-|>,head_width=0.25,head_length=0.5",
        "color": colour,
        "lw": 1.6,
        "shrinkA": 0,
        "shrinkB": 0,
        "connectionstyle": f"arc3,rad={bend}",
    }
    axes.annotate("", end, start, arrowprops=style)


def chain(axes: Axes, y: float, xs: Sequence[float], widths: Sequence[float]) -> None:
    """Arrows between boxes that stand in a row."""
    for i in range(len(xs) - 1):
        arrow(axes, (xs[i] + widths[i] / 2, y), (xs[i + 1] - widths[i + 1] / 2, y))


def label(axes: Axes, x: float, y: float, text: str, colour: str = INK, **more) -> None:
    axes.text(x, y, text, color=colour, **{"ha": "center", "va": "center", **more})


def overview() -> Figure:
    """A token through the blocks, and a scan through the same blocks, frozen."""
    figure, axes = canvas(11.6, 4.6)
    label(axes, 0.2, 4.32, "A language model", ha="left", weight="bold")
    y, xs = 3.4, [0.9, 2.5, 4.4, 6.5, 9.0, 10.85]
    widths = [1.1, 1.4, 1.6, 1.6, 1.6, 1.2]
    texts = ["token", "embedding", "block 1", "block 2", "block L", "next token"]
    for x, width, text in zip(xs, widths, texts, strict=True):
        box(axes, x, y, text, BLUE if "block" in text else QUIET, width)
    chain(axes, y, xs[:4], widths[:4])
    arrow(axes, (xs[3] + 0.8, y), (7.6, y))
    label(axes, 7.75, y, "…")
    arrow(axes, (7.9, y), (xs[4] - 0.8, y))
    chain(axes, y, xs[4:], widths[4:])
    for left, right in ((xs[2], xs[3]), (xs[3], 7.9), (7.6, xs[4])):
        arrow(axes, (left + 0.5, y + 0.34), (right - 0.5, y + 0.34), ORANGE, bend=-0.28)
    label(axes, 6.7, 4.2, "fast parameters p, moved by each block's Trigger", ORANGE)
    label(
        axes, 6.7, 2.86, "a block: Trigger, Updater, SwiGLU; its state has a constant size", QUIET
    )
    axes.plot([0.2, 11.4], [2.45, 2.45], color=FILLS[QUIET], lw=1.5)
    label(axes, 0.2, 2.12, "A scan, through the same model, frozen", ha="left", weight="bold")
    y, xs = 1.25, [0.9, 2.75, 5.8, 8.95, 10.85]
    widths = [1.1, 1.6, 3.2, 1.6, 1.2]
    box(axes, xs[0], y, "k-space", QUIET, widths[0], 0.9)
    box(axes, xs[1], y, "coils, ViT:\nimage tokens", GREEN, widths[1], 0.9)
    box(
        axes,
        xs[2],
        y,
        "FROZEN blocks 1 … L\n[start, image tokens, end, prompt]",
        BLUE,
        widths[2],
        0.9,
    )
    box(axes, xs[3], y, "decoder,\ncascades", GREEN, widths[3], 0.9)
    box(axes, xs[4], y, "image", QUIET, widths[4], 0.9)
    chain(axes, y, xs, widths)
    arrow(axes, (xs[2], y - 0.45), (xs[2], 0.45))
    label(axes, xs[2], 0.26, "draft of a report, by the model's own head", QUIET)
    label(axes, xs[1], 0.6, "trained", GREEN)
    label(axes, xs[3], 0.6, "trained", GREEN)
    return figure


def trigger() -> Figure:
    """Inside one layer, and how p and m move through layers and tokens."""
    figure, axes = canvas(11.6, 5.0)
    label(axes, 0.2, 4.7, "One token in one layer", ha="left", weight="bold")
    box(axes, 0.95, 2.3, "x, input\nof the layer", QUIET, 1.3, 0.8)
    box(axes, 2.95, 2.3, "$W_{task}$:\nq, k, v", BLUE, 1.3, 0.8)
    arrow(axes, (1.6, 2.3), (2.3, 2.3))
    box(axes, 5.2, 3.45, "loss\n½ ‖ f(k; p) − v ‖²", ORANGE, 2.1, 0.85)
    box(axes, 5.2, 1.15, "task vector\n$h_{task}$ = f(q; p)", GREEN, 2.1, 0.85)
    arrow(axes, (3.6, 2.55), (4.15, 3.3))
    arrow(axes, (3.6, 2.05), (4.15, 1.3))
    label(axes, 3.72, 3.1, "k, v")
    label(axes, 3.75, 1.5, "q")
    box(axes, 5.2, 2.3, "step\np ← p − lr m", ORANGE, 2.1, 0.75)
    arrow(axes, (5.2, 3.02), (5.2, 2.68), ORANGE)
    label(axes, 5.32, 2.86, "gradient g", ORANGE, ha="left")
    arrow(axes, (5.2, 1.92), (5.2, 1.58), ORANGE)
    label(axes, 5.32, 1.75, "moved p", ORANGE, ha="left")
    label(axes, 5.2, 4.25, "p from the layer below", ORANGE)
    arrow(axes, (5.2, 4.12), (5.2, 3.88), ORANGE)
    arrow(axes, (5.2, 0.72), (5.2, 0.42))
    label(axes, 5.2, 0.26, "to the gate of the Updater")
    axes.plot([6.75, 6.75], [0.2, 4.8], color=FILLS[QUIET], lw=1.5)

    label(axes, 7.0, 4.7, "Through layers and tokens", ha="left", weight="bold")
    columns, rows = (8.2, 9.4, 10.6), (1.0, 2.2, 3.4)
    for row in rows:
        for column in columns:
            box(axes, column, row, "step", ORANGE, 0.72, 0.5)
            arrow(axes, (column, row + 0.25), (column, min(row + 0.93, 4.18)), ORANGE)
        for left, right in pairwise(columns):
            arrow(axes, (left + 0.36, row), (right - 0.36, row), PURPLE)
    for column, name in zip(columns, ("token t − 1", "token t", "token t + 1"), strict=True):
        label(axes, column, 0.5, name)
    for row, name in zip(rows, ("layer i", "layer i + 1", "layer i + 2"), strict=True):
        label(axes, 7.68, row, name, QUIET, ha="right", fontsize=10.5)
    label(axes, 9.4, 4.36, "p goes up: the fast weights of a token", ORANGE)
    label(axes, 9.2, 0.18, "m goes right, in one sample: $m_t$ = decay $m_{t-1}$ + $g_t$", PURPLE)
    return figure


def sample() -> Figure:
    """The Trigger of the whole sample: chunks are scored, then teach the task parameters."""
    figure, axes = canvas(11.6, 4.0)
    label(axes, 0.2, 3.75, "One document, chunk by chunk", ha="left", weight="bold")
    chunks, values, top, low = (2.75, 5.85, 8.95), (1.2, 4.3, 7.4, 10.5), 2.45, 0.75
    for i, x in enumerate(chunks, start=1):
        box(axes, x, top, f"FROZEN model\nreads chunk {i}", BLUE, 1.7, 0.8)
        arrow(axes, (x, top + 0.4), (x, top + 0.68))
        label(axes, x, top + 0.82, f"score, with $\\varphi_{i - 1}$")
        arrow(axes, (values[i - 1] + 0.45, low + 0.32), (x - 0.55, top - 0.42), ORANGE)
        arrow(axes, (x + 0.55, top - 0.42), (values[i] - 0.45, low + 0.32), ORANGE)
        label(axes, values[i] - 0.84, 1.55, "gradient", ORANGE, ha="right", fontsize=11)
    for left, right in pairwise(chunks):
        arrow(axes, (left + 0.85, top), (right - 0.85, top), PURPLE)
        label(axes, (left + right) / 2, top + 0.17, "state", PURPLE)
    arrow(axes, (chunks[-1] + 0.85, top), (10.6, top), PURPLE)
    label(axes, 10.8, top, "…", PURPLE)
    for i, x in enumerate(values):
        text = "$\\varphi_0$ = 0" if i == 0 else f"$\\varphi_{i}$"
        box(axes, x, low, text, ORANGE, 1.1, 0.6)
    for left, right in pairwise(values):
        arrow(axes, (left + 0.55, low), (right - 0.55, low), ORANGE)
        label(axes, (left + right) / 2, low - 0.2, "− lr d(g)", ORANGE, fontsize=11)
    label(axes, 5.85, 0.16, "task parameters of this document: a few thousand numbers", ORANGE)
    return figure


def updater() -> Figure:
    """Two branches on shared q, k, v, what each can see, and the gate."""
    figure, axes = canvas(11.6, 4.7)
    label(axes, 0.2, 4.4, "Two memories and a gate", ha="left", weight="bold")
    box(axes, 0.95, 2.3, "x", QUIET, 0.9, 0.6)
    box(axes, 2.45, 2.3, "q, k, v\nshared", BLUE, 1.2, 0.8)
    arrow(axes, (1.4, 2.3), (1.85, 2.3))
    box(axes, 4.75, 3.4, "convolution, delta rule\nstate S, constant size", GREEN, 2.4, 0.85)
    box(axes, 4.75, 1.2, "low-rank terms, attention\nlast W tokens", PURPLE, 2.4, 0.85)
    arrow(axes, (3.05, 2.5), (3.55, 3.25))
    arrow(axes, (3.05, 2.1), (3.55, 1.35))
    box(axes, 6.95, 2.3, "y = t a + (1 − t) b\n+ t (1 − t) ζ", ORANGE, 1.95, 0.85)
    arrow(axes, (5.95, 3.25), (6.6, 2.73))
    arrow(axes, (5.95, 1.35), (6.6, 1.87))
    label(axes, 6.45, 3.18, "b", GREEN, weight="bold")
    label(axes, 6.45, 1.42, "a", PURPLE, weight="bold")
    arrow(axes, (7.1, 0.62), (7.1, 1.86), ORANGE)
    label(axes, 6.5, 0.42, "t = σ($h_{task}$ · w), from the Trigger", ORANGE)
    axes.plot([8.3, 8.3], [0.2, 4.5], color=FILLS[QUIET], lw=1.5)

    label(axes, 8.5, 4.4, "What a token reads", ha="left", weight="bold")
    tokens, window, side = 12, 4, 0.135
    for name, colour, top, strength in (
        ("state S: all before it, fading", GREEN, 3.85, lambda d: 0.82**d),
        ("window W: the last few, exactly", PURPLE, 1.88, lambda d: float(d < window)),
    ):
        for row in range(tokens):
            for column in range(row + 1):
                alpha = 0.12 + 0.88 * strength(row - column) if strength(row - column) else 0.0
                place = (9.1 + column * side, top - (row + 1) * side)
                axes.add_patch(Rectangle(place, side, side, facecolor=colour, alpha=alpha, lw=0))
        axes.add_patch(
            Rectangle(
                (9.1, top - tokens * side), tokens * side, tokens * side, fill=False,
                edgecolor=QUIET, lw=0.8,
            )
        )  # fmt: skip
        label(axes, 9.1, top + 0.16, name, colour, ha="left", fontsize=11)
    label(axes, 8.92, 3.04, "reading token", QUIET, rotation=90, fontsize=9.5)
    label(axes, 9.91, 0.12, "token that is read", QUIET, fontsize=9.5)
    return figure


def codec() -> Figure:
    """K-space to an image, through the frozen model."""
    figure, axes = canvas(11.6, 4.4)
    top, low, lane = 3.35, 1.15, 2.25
    xs, widths = [1.15, 3.35, 5.7, 8.1, 10.5], [1.9, 1.8, 2.1, 1.9, 1.7]
    box(axes, xs[0], top, "k-space y\n[coils, H, W]\nand its mask M", QUIET, widths[0], 1.0)
    box(axes, xs[1], top, "coil\nsensitivities S", GREEN, widths[1], 1.0)
    box(axes, xs[2], top, "combined image,\npatches of 16 x 16", GREEN, widths[2], 1.0)
    box(axes, xs[3], top, "ViT,\nN image tokens", GREEN, widths[3], 1.0)
    chain(axes, top, xs[:4], widths[:4])
    box(axes, xs[4], lane, "FROZEN\nlanguage model\n[start, tokens,\nend, prompt]", BLUE, 1.7, 1.5)
    arrow(axes, (xs[3] + 0.95, top), (xs[4], lane + 0.75), bend=-0.3)
    box(axes, xs[3], low, "image decoder:\ncorrection per coil", GREEN, widths[3], 1.0)
    arrow(axes, (xs[4], lane - 0.75), (xs[3] + 0.95, low), bend=-0.3)
    box(axes, xs[2], low, "cascades\nk − η M (k − y) − U(k)", GREEN, widths[2], 1.0)
    box(axes, xs[1], low, "measured\ncolumns restored", QUIET, widths[1], 1.0)
    box(axes, xs[0], low, "image [H, W],\nroot of the sum\nof squares", QUIET, widths[0], 1.0)
    for i in range(3):
        arrow(axes, (xs[i + 1] - widths[i + 1] / 2, low), (xs[i] + widths[i] / 2, low))
    axes.plot([xs[0], xs[0], xs[2]], [top - 0.5, lane, lane], color=PURPLE, lw=1.6)
    arrow(axes, (xs[1], lane), (xs[1], low + 0.5), PURPLE)
    arrow(axes, (xs[2], lane), (xs[2], low + 0.5), PURPLE)
    label(axes, 3.35, lane + 0.17, "y and M go along", PURPLE)
    arrow(axes, (xs[2] + 0.6, top - 0.5), (xs[3] - 0.4, low + 0.5), GREEN)
    label(axes, 7.35, lane + 0.1, "image", GREEN, ha="left")
    arrow(axes, (xs[4] + 0.35, lane - 0.75), (xs[4] + 0.35, 0.62))
    label(axes, xs[4] + 0.1, 0.42, "words of a report", QUIET)
    label(axes, 0.2, 4.15, "green: trained; blue: never changed, bit for bit", QUIET, ha="left")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview.svg": overview,
    "trigger.svg": trigger,
    "sample.svg": sample,
    "updater.svg": updater,
    "codec.svg": codec,
}


def draw(folder: Path) -> None:
    """Writes all figures as SVG, the same bytes for the same version of Matplotlib."""
    with matplotlib.rc_context(SETTINGS):
        for name, make in FIGURES.items():
            figure = make()
            FigureCanvasSVG(figure)
            figure.savefig(folder / name, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
