"""CUDA graphs of what a model computes again and again on inputs of one shape."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

KEPT = 4  # graphs at most: each holds the memory of one run


class Graphs:
    """Runs a function of tensors, as a CUDA graph from the second time that a shape comes.

    A codec's forward is thousands of small kernels, and launching them takes several times as long
    as they do. What comes once is not worth a capture. A copy of a model captures its own.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple, Callable[..., Tensor] | None] = OrderedDict()

    def __reduce__(self) -> tuple:
        return Graphs, ()

    def __call__(
        self, model: nn.Module, function: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor:
        """
        Args:
            model: whose weights the function reads; where they lie elsewhere than at the capture,
                there is another graph.
            function: of the inputs alone, without gradients and random numbers.

        Returns: what the next call with inputs of these shapes overwrites.
        """
        weights = (*model.parameters(), *model.buffers())
        key = (
            *(x.data_ptr() for x in weights),
            *((x.shape, x.dtype) for x in inputs),
        )
        if key not in self._kept:
            if len(self._kept) == KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = None
            return function(*inputs)
        replay = self._kept[key]
        if replay is None:
            replay = self._kept[key] = capture(function, inputs)
        return replay(*inputs)


def capturable() -> bool:
    """Whether what runs here may become a graph: not under autocast, which frees the cast weights
    that a graph would read again, and not among several processes, whose models lie in parts."""
    several = dist.is_available() and dist.is_initialized()
    return not (several or torch.is_autocast_enabled("cuda"))


def capture(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The function as one CUDA graph."""
    kept = tuple(x.clone() for x in inputs)
    with torch.cuda.device(kept[0].device):  # whose streams are meant, current or not
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a first run sets up what no capture can
            function(*kept)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*kept)

    def replay(*inputs: Tensor) -> Tensor:
        for old, new in zip(kept, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return output

    return replay


def capture_training(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The module with forward and backward as CUDA graphs, under the autocast of now.

    Each forward is followed by its backward before the next. What the backward writes the next one
    writes over: gradients must not be summed over several. Weights may change in place.

    Args:
        module: of tensors alone, without random numbers.
        inputs: what it will be called with, in shape and dtype.
    """
    kind = inputs[0].device.type
    casts: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,  # a graph would read cast weights that have been freed
    }
    alone = _Autocast(module, kind, casts)
    with torch.autocast(kind, enabled=False):
        kept = tuple(x.clone() for x in inputs)  # later inputs are written over these
        return torch.cuda.make_graphed_callables(alone, kept, allow_unused_input=True)


class _Autocast(nn.Module):
    """A module in an autocast of its own."""

    def __init__(self, module: nn.Module, kind: str, casts: dict[str, Any]):
        super().__init__()
        self.module, self.kind, self.casts = module, kind, casts

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self.kind, **self.casts):
            return self.module(*inputs)
