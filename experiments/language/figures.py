"""The study's pictures."""

from pathlib import Path
from typing import Any

from nirvana.files import atomic_file


def draw_gates(trigger: dict[str, Any], path: Path, title: str) -> None:
    """Gate and step length over the position in the document: one column for each layer, one line
    for each domain.

    Args:
        trigger: "trigger" of a row, see `probe.probe_trigger`.
        path: of the .png to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = trigger["places"]
    names = {
        "gates": "gate t, the share of the window branch",
        "steps": "norm of the Trigger's step",
    }
    layers = len(next(iter(trigger["gates"].values())))
    figure, axes = pyplot.subplots(
        2, layers, figsize=(3 * layers, 5), sharex=True, sharey="row", squeeze=False
    )
    for row, (name, label) in zip(axes, names.items(), strict=True):
        for layer, axis in enumerate(row):
            for domain, curves in trigger[name].items():
                points = [
                    (stop, *point)
                    for stop, point in zip(places[1:], curves[layer], strict=True)
                    if point
                ]
                if points:
                    x, mean, error = zip(*points, strict=True)
                    bars = [2 * each for each in error]
                    axis.errorbar(x, mean, bars, marker=".", capsize=2, linewidth=1, label=domain)
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(label)
    for layer, (top, bottom) in enumerate(zip(*axes, strict=True)):
        top.set_title(f"layer with Trigger {layer + 1}")
        bottom.set_xlabel("tokens, up to")
    axes[0][-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    pyplot.close(figure)
