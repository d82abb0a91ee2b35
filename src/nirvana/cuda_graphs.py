"""CUDA graphs: record a computation once, replay it as one launch.

A model that consists of thousands of small kernels spends several times longer on launching them
than on running them; a graph launches all of them at once. A graph reads and writes fixed memory:
inputs are copied into it, weights may change in place but not move.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

MAX_GRAPHS = 4  # of a `GraphCache`: each holds the memory of one run


def capturable() -> bool:
    """Whether a computation may be captured here: not under autocast, which frees the cast weights
    that a graph would read again, and not in one of several processes, whose sharded weights
    move."""
    several = dist.is_available() and dist.is_initialized()
    return not (several or torch.is_autocast_enabled("cuda"))


def record(
    function: Callable[[], T], device: torch.device, warmups: int = 1, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Records a function without arguments as a CUDA graph.

    Args:
        function: reads and writes tensors whose memory stays where it is. It runs `warmups` times
            before it is recorded; what it changes by that is the caller's to restore.
        device: CUDA device of these tensors, which need not be the current one.
        warmups: runs before the recording, on a side stream, which set up what cannot be set up
            during a capture (cuBLAS workspaces, compiled kernels).
        pool: of `torch.cuda.graph_pool_handle`, whose memory graphs share that do not need each
            other's results; None for memory of its own.

    Returns:
        The graph, and the function's result, whose tensors each replay overwrites.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmups):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = function()
    return graph, output


def capture(function: Callable[..., T], inputs: Sequence[Tensor]) -> Callable[..., T]:
    """Captures a function of tensors for inference.

    Args:
        function: of the inputs alone, without gradients and random numbers.
        inputs: CUDA tensors of the shapes and dtypes that it will be called with.

    Returns:
        The function as one CUDA graph. Each call overwrites the result of the one before.
    """
    static = tuple(x.clone() for x in inputs)
    graph, output = record(lambda: function(*static), static[0].device)

    def replay(*inputs: Tensor) -> T:
        for buffer, new in zip(static, inputs, strict=True):
            buffer.copy_(new)
        graph.replay()
        return output

    return replay


def capture_training(
    module: nn.Module, inputs: Sequence[Tensor], pool: Any = None
) -> Callable[..., Any]:
    """Captures a module's forward and backward, under the autocast that is active now.

    Each forward must be followed by its backward before the next forward. A backward overwrites
    the gradients of the one before, so they cannot be accumulated over several.

    Args:
        module: of tensors alone, without random numbers.
        inputs: CUDA tensors of the shapes and dtypes that it will be called with.
        pool: of `torch.cuda.graph_pool_handle`, whose memory graphs share that never run between
            another's forward and backward; None for memory of its own.

    Returns:
        The module's forward as a CUDA graph with a gradient. Weights may change in place.
    """
    kind = inputs[0].device.type
    casts: dict[str, Any] = {
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,  # a graph would read cast weights that have been freed
    }
    # A wrapper for each capture: capturing replaces the forward of the module it is given.
    wrapped = _Autocast(module, kind, casts)
    with torch.autocast(kind, enabled=False):
        static = tuple(x.clone() for x in inputs)  # later inputs are copied into these
        return torch.cuda.make_graphed_callables(
            wrapped, static, allow_unused_input=True, pool=pool
        )


def places(model: nn.Module) -> tuple[int, ...]:
    """The addresses of a model's weights and buffers, which its graphs read."""
    return tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))


class RecentGraphs(OrderedDict):
    """The last graphs of a model by what they were captured for; the oldest one makes room.

    A copy is empty, so that a copied model captures its own.

    Args:
        limit: the largest number of graphs.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __reduce__(self) -> tuple:
        return RecentGraphs, (self.limit,)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key not in self and len(self) == self.limit:
            self.popitem(last=False)
        super().__setitem__(key, value)


class GraphCache:
    """Runs a function of tensors for inference, as a CUDA graph from the second call with inputs of
    the same shapes on; a shape that occurs once is not worth a capture. The graphs of the last
    `MAX_GRAPHS` shapes are kept.
    """

    def __init__(self) -> None:
        self._graphs = RecentGraphs(MAX_GRAPHS)

    def __call__(self, model: nn.Module, function: Callable[..., T], *inputs: Tensor) -> T:
        """Runs the function.

        Args:
            model: whose weights the function reads; where they have moved since the capture, a new
                graph is captured.
            function: of the inputs alone, without gradients and random numbers.
            *inputs: CUDA tensors.

        Returns:
            The result, which the next call with inputs of these shapes overwrites.
        """
        key = (*places(model), *_shapes(inputs))
        if key not in self._graphs:
            self._graphs[key] = None
            return function(*inputs)
        replay = self._graphs[key]
        if replay is None:
            replay = self._graphs[key] = capture(function, inputs)
        return replay(*inputs)


class TrainingGraphs:
    """Runs a module in a training, as a CUDA graph of forward and backward for each combination of
    its inputs' shapes; see `capture_training`. The graphs share their memory: a step's forward and
    backward are done, and its gradients used, before the next step.

    Args:
        module: of tensors alone, without random numbers.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._graphs: dict[tuple, Callable[..., Any]] = {}
        self._pool: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        key = _shapes(inputs)
        if key not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = capture_training(self.module, inputs, self._pool)
        return self._graphs[key](*inputs)


def _shapes(inputs: Sequence[Tensor]) -> tuple:
    return tuple((x.shape, x.dtype) for x in inputs)


class _Autocast(nn.Module):
    """A module in an autocast of its own."""

    def __init__(self, module: nn.Module, kind: str, casts: dict[str, Any]):
        super().__init__()
        self.module, self.kind, self.casts = module, kind, casts

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self.kind, **self.casts):
            return self.module(*inputs)
