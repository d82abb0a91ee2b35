"""What task parameters did, by layer and by position: data, and a picture of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.adapt.adaptation import start_optimizer
from nirvana.adapt.chunks import Chunk, read_documents
from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.parameters import TaskLayout
from nirvana.adapt.task import Task
from nirvana.files import atomic_file


@dataclass(frozen=True)
class DocumentTrace:
    """The adaptation to one document, chunk by chunk.

    Attributes:
        starts: `[chunks]`, index of each chunk's first predicted token.
        tokens: `[chunks]`, predicted tokens.
        nll: `[chunks]`, their -ln p in nats, summed, as scored before they taught.
        frozen: `[chunks]`, the same without task parameters.
        without: layer -> `[chunks]`, the same with all but that layer's task parameters; "final"
            for those behind the layers.
        size: tensor -> `[chunks]`, root mean square of the task parameters that scored the chunk.
        step: tensor -> `[chunks]`, root mean square of what the chunk changed.
    """

    starts: list[int]
    tokens: list[int]
    nll: list[float]
    frozen: list[float]
    without: dict[str, list[float]]
    size: dict[str, list[float]]
    step: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the trace as plain data, rounded to seven digits."""
        return {name: _rounded(value) for name, value in vars(self).items()}


def trace_documents(
    model: PreTrainedModel,
    documents: Sequence[Tensor | Sequence[int]],
    config: AdaptConfig,
    task: Task | None = None,
) -> tuple[list[Tensor], list[DocumentTrace]]:
    """Adapts to documents, and reads them again without the task parameters of each layer.

    Args:
        model: see `nirvana.adapt.adapt`.
        documents: see `nirvana.adapt.adapt_documents`.
        config: the settings.
        task: the start of the task parameters; None: zero.

    Returns:
        -ln p of each document's tokens, as `adapt_documents` returns it; and the traces.

    Raises:
        InputError: see `nirvana.adapt.adapt`.
        ValueError: see `nirvana.adapt.adapt`.
    """
    chunks: list[Chunk] = []
    optimizer = start_optimizer(model, config, task, len(documents))
    layout = optimizer.layout
    scores = read_documents(model, documents, optimizer, chunks.append)
    values = [chunk.before for chunk in chunks]
    names = [layer_name(layout, number) for number in range(len(layout.tensors))]
    nll = {}
    for name in ("", *dict.fromkeys(names)):
        kept = torch.tensor([bool(name) and each != name for each in names])
        mask = layout.expand(kept.to(values[0])) if values else torch.zeros(0)
        nll[name] = _replayed(model, documents, config, [each * mask for each in values])
    found = []
    for row, document in enumerate(documents):
        count = -(-(len(document) - 1) // config.chunk)
        own = chunks[:count]
        found.append(
            DocumentTrace(
                starts=[chunk.start for chunk in own],
                tokens=[int(chunk.scored[row].sum()) for chunk in own],
                nll=[float(chunk.nll[row].sum()) for chunk in own],
                frozen=nll[""][row][:count],
                without={name: nll[name][row][:count] for name in nll if name},
                size=_sizes(layout, [chunk.before[row] for chunk in own]),
                step=_sizes(layout, [chunk.after[row] - chunk.before[row] for chunk in own]),
            )
        )
    return scores, found


def layer_name(layout: TaskLayout, number: int) -> str:
    """The layer of a tensor, as text; "final" for one behind the layers.

    Args:
        layout: of the task parameters.
        number: of the tensor.

    Returns:
        the name.
    """
    layer = layout.tensors[number].layer
    return "final" if layer is None else str(layer)


def _replayed(
    model: PreTrainedModel,
    documents: Sequence[Tensor | Sequence[int]],
    config: AdaptConfig,
    values: list[Tensor],
) -> list[list[float]]:
    """Sums of -ln p of each document's chunks, chunk i read with values[i] and nothing learned."""
    still = AdaptConfig(**{**vars(config), "steps": 0})
    optimizer = start_optimizer(model, still, None, len(documents))
    sums: list[Tensor] = []

    def note(chunk: Chunk) -> None:
        sums.append(chunk.nll.sum(1))
        optimizer.values = values[min(len(sums), len(values) - 1)]

    if values:
        optimizer.values = values[0]
    read_documents(model, documents, optimizer, note)
    together = torch.stack(sums, 1) if sums else torch.zeros(len(documents), 0)
    return together.tolist()


def _sizes(layout: TaskLayout, vectors: list[Tensor]) -> dict[str, list[float]]:
    """Root mean squares of the tensors in vectors `[N]`, by name."""
    if not vectors:
        return {name: [] for name in layout.names}
    parts = layout.split(torch.stack(vectors).float().cpu())
    return {
        name: part.flatten(1).square().mean(1).sqrt().tolist()
        for name, part in zip(layout.names, parts, strict=True)
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def draw_trace(traces: Sequence[DocumentTrace], path: str | Path) -> None:
    """Draws the mean over documents as a PNG picture: bits by position, frozen and adapted; the
    bits that each layer's task parameters save; and their size. A position is drawn while at least
    half of the documents reach it.

    Args:
        traces: at least one, of documents with at least one chunk, all of one model and settings.
        path: file to write, atomically.

    Raises:
        ModuleNotFoundError: without matplotlib.
    """
    from matplotlib.figure import Figure

    count = sorted(len(each.starts) for each in traces)[len(traces) // 2]
    starts = next(each.starts[:count] for each in traces if len(each.starts) >= count)
    tokens = _mean(traces, lambda each: each.tokens, count)
    nll = _mean(traces, lambda each: each.nll, count)
    frozen = _mean(traces, lambda each: each.frozen, count)
    layers = list(traces[0].without)
    saved = torch.stack(
        [_mean(traces, lambda each, n=name: each.without[n], count) - nll for name in layers]
    )
    names = list(traces[0].size)
    sizes = torch.stack([_mean(traces, lambda each, n=name: each.size[n], count) for name in names])
    bits = 1 / (tokens * torch.log(torch.tensor(2.0)))
    figure = Figure(figsize=(9, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 2, 3])
    top.plot(starts, (frozen * bits).numpy(), color="0.5", label="frozen")
    top.plot(starts, (nll * bits).numpy(), color="C0", label="adapted")
    top.set_ylabel("bits a token")
    top.legend()
    extent = (starts[0], starts[-1] + float(tokens[-1]))
    for axes, table, rows, label, colours in (
        (middle, saved * bits, layers, "bits a token saved by the layer", "RdBu"),
        (bottom, sizes, names, "root mean square of the task parameters", "viridis"),
    ):
        largest = float(table.abs().max()) or 1.0
        image = axes.imshow(
            table.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            vmin=-largest if colours == "RdBu" else 0,
            vmax=largest,
            extent=(*extent, len(rows) - 0.5, -0.5),
        )
        axes.set_yticks(range(len(rows)), rows, fontsize=6)
        figure.colorbar(image, ax=axes, label=label)
    bottom.set_xlabel("position in the document, tokens")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _mean(traces: Sequence[DocumentTrace], take: Any, count: int) -> Tensor:
    """The mean of a column over the documents that reach each position, `[count]`."""
    columns = [take(each)[:count] for each in traces]
    return torch.tensor(
        [
            sum(column[i] for column in columns if len(column) > i)
            / sum(len(column) > i for column in columns)
            for i in range(count)
        ]
    )
