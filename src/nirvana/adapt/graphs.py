"""Reading and learning a chunk as one CUDA graph.

A chunk is short, and its scores and gradient are thousands of small kernels, which take longer to
launch than to run. The state of a model with a window has the same shapes after every chunk but the
first ones, so one graph reads all later chunks, and those of the next documents.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from nirvana.adapt.optimizer import TaskOptimizer
from nirvana.adapt.state import CarriedCache
from nirvana.cuda_graphs import RecentGraphs, capturable, places, record
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.model.state import State
from nirvana.model.updater import Updater

logger = logging.getLogger(__name__)

GRAPHS = 2
"""Graphs that a model keeps, each with the memory of one chunk."""

Carried = State | CarriedCache | None
Learn = Callable[[Tensor, Tensor, TaskOptimizer, Any], tuple[Tensor, Tensor, Any]]
"""Reads tokens `[B, c + 1]`, of which those of the mask `[B, c]` are scored, after a state, and
teaches an optimiser: -ln p `[B, c]`, the gradient `[rows, N]`, and the state after the chunk."""


def refusal(model: PreTrainedModel) -> str | None:
    """Why the chunks of a model are not read by a graph; None where they are.

    Args:
        model: a causal language model of transformers, before task parameters are added to it.
    """
    if not isinstance(model, NirvanaForCausalLM):
        return "its state is a cache that grows"
    if model.device.type != "cuda":
        return "it is not on a GPU"
    if not capturable():
        return "autocast, or one of several processes"
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return "it has hooks, which a graph would not call"
    foreign = [part for part in model.modules() if not _is_known(part)]
    if foreign or any(type(weight) is not nn.Parameter for weight in model.parameters()):
        return "it has adapters, or quantised or replaced layers"
    if any(part.window_kept is not None for part in model.modules() if isinstance(part, Updater)):
        return "a share of its window branches is dropped"
    return None


def _is_known(part: nn.Module) -> bool:
    return type(part).__module__.partition(".")[0] in ("nirvana", "torch")


class ChunkReader:
    """Reads chunk after chunk, each from the state that the one before left.

    Args:
        model: the model.
        learn: reads a chunk and teaches.
        optimizer: that is taught.
        graphs: whether a CUDA graph may do it: where there is no `refusal`.
    """

    def __init__(
        self, model: PreTrainedModel, learn: Learn, optimizer: TaskOptimizer, graphs: bool
    ) -> None:
        self._learn, self._optimizer, self._state = learn, optimizer, None
        self._graph: ChunkGraph | None = None
        self._steady, self._kept, self._key = False, None, ()
        if graphs:
            self._kept = vars(model).setdefault("_chunk_graphs", RecentGraphs(GRAPHS))
            self._key = (*places(model), *_settings(model), _numbers(optimizer))

    def __call__(self, part: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Reads the next chunk of every row.

        Args:
            part: `[B, c + 1]`, the chunk's tokens and the one before.
            scored: bool `[B, c]`.

        Returns:
            -ln p `[B, c]` and its gradient `[rows, N]`, both before the first step.
        """
        optimizer = self._optimizer
        if self._graph is None:
            self._graph = self._find(part, scored)
        if self._graph is not None:
            return self._graph(part, scored, optimizer)
        before = self._state
        nll, gradient, self._state = self._learn(part, scored, optimizer, before)
        self._steady = _shapes(before) == _shapes(self._state)
        return nll, gradient

    def _find(self, part: Tensor, scored: Tensor) -> "ChunkGraph | None":
        """The graph for a chunk after the current state, captured if this is worth it."""
        if self._kept is None or self._state is None:
            return None
        key = (*self._key, _shapes((part, scored, self._optimizer.tensors(), self._state)))
        if key not in self._kept:
            if not self._steady:
                return None
            self._kept[key] = ChunkGraph(self._learn, part, scored, self._optimizer, self._state)
        graph = self._kept[key]
        graph.start(self._state)
        self._state = None  # it goes on in the graph's memory
        return graph


class ChunkGraph:
    """A chunk's reading and learning, captured; the state stays in the graph's memory.

    Args:
        learn: reads a chunk and teaches, with the hooks that are in force now.
        part: tokens, of the shape of all chunks.
        scored: their mask.
        optimizer: with the settings and shapes of all optimisers that it will teach.
        state: before the chunk, with the shapes of the one after.
    """

    def __init__(
        self, learn: Learn, part: Tensor, scored: Tensor, optimizer: TaskOptimizer, state: State
    ) -> None:
        own = copy.copy(optimizer)
        self._learn = learn  # holds the fixed factors of "low_rank", which the graph reads
        self._given = pytree.tree_map(_clone, (part, scored, optimizer.tensors()))
        self._state = pytree.tree_map(_clone, state)

        def read() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            part, scored, task = self._given
            own.load(task)
            nll, gradient, after = learn(part, scored, own, self._state)
            _copy(self._state, after)
            return nll, gradient, own.tensors()

        self._graph, self._results = record(read, part.device)

    def start(self, state: State) -> None:
        """Lets the next chunk follow a state.

        Args:
            state: of the shapes that were captured.
        """
        _copy(self._state, state)

    def __call__(
        self, part: Tensor, scored: Tensor, optimizer: TaskOptimizer
    ) -> tuple[Tensor, Tensor]:
        """Reads a chunk and teaches; see `ChunkReader`.

        Args:
            part: `[B, c + 1]`.
            scored: bool `[B, c]`.
            optimizer: that is taught.

        Returns:
            -ln p `[B, c]` and its gradient `[rows, N]`.
        """
        _copy(self._given, (part, scored, optimizer.tensors()))
        self._graph.replay()
        nll, gradient, task = pytree.tree_map(_clone, self._results)
        optimizer.load(task)
        return nll, gradient


def _settings(model: Any) -> tuple[Any, ...]:
    """What a model computes with beside its weights, and a user may change."""
    triggers = [layer.updater.trigger for layer in model.model.layers if layer.updater.has_trigger]
    return tuple((each.enabled, each.fixed_lr, each.fixed_decay) for each in triggers)


def _numbers(optimizer: TaskOptimizer) -> tuple[Any, ...]:
    """What an optimiser computes with beside its tensors."""
    config = optimizer.config
    return optimizer.layout, config.steps, config.optimizer, config.betas, config.eps, config.chunk


def _shapes(values: Any) -> tuple[Any, ...]:
    """The form of a tree of tensors, with their shapes and dtypes."""
    leaves, form = pytree.tree_flatten(values)
    described = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    return str(form), *described


def _clone(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def _copy(into: Any, source: Any) -> None:
    """Copies the tensors of a tree into those of another of the same form."""
    pairs = zip(pytree.tree_leaves(into), pytree.tree_leaves(source), strict=True)
    for old, new in pairs:
        if isinstance(old, Tensor):
            old.copy_(new)
