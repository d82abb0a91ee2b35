"""Reading and learning a chunk as one CUDA graph.

A chunk is short, and its scores and gradient are thousands of small kernels, which take longer to
launch than to run. One graph reads the first chunk of every document; and since the state of a
model with a window has the same shapes as soon as the window is full, another reads all chunks from
there on.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from nirvana.adapt.optimizer import TaskOptimizer
from nirvana.cuda_graphs import RecentGraphs, capturable, places, record
from nirvana.model.nirvana import NirvanaForCausalLM
from nirvana.model.state import State
from nirvana.model.updater import Updater

GRAPHS = 4
"""Graphs that a model keeps, which share the memory of one chunk."""

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
    if len({weight.device for weight in model.parameters()}) > 1:
        return "it lies on several devices"
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
        graphs: whether CUDA graphs may do it: where there is no `refusal`.
    """

    def __init__(
        self, model: PreTrainedModel, learn: Learn, optimizer: TaskOptimizer, graphs: bool
    ) -> None:
        self._learn, self._optimizer = learn, optimizer
        self._state, self._before = None, None
        self._kept: RecentGraphs | None = None
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
        read = self._find(part, scored) or self._learn
        self._before = _shapes(self._state)
        nll, gradient, self._state = read(part, scored, self._optimizer, self._state)
        return nll, gradient

    def _find(self, part: Tensor, scored: Tensor) -> "ChunkGraph | None":
        """The graph for a chunk after the current state, captured where one like it was read."""
        if self._kept is None:
            return None
        task, shapes = self._optimizer.tensors(), _shapes(self._state)
        key = (*self._key, _shapes((part, scored, task)), shapes)
        if self._kept.get(key) is None and (self._state is None or shapes == self._before):
            graph = None
            if key in self._kept:
                pool = next((each.pool for each in self._kept.values() if each), None)
                given = part, scored, self._optimizer, self._state
                graph = ChunkGraph(self._learn, *given, pool)
            self._kept[key] = graph
        return self._kept.get(key)


class ChunkGraph:
    """A chunk's reading and learning, captured.

    Args:
        learn: reads a chunk and teaches, with the hooks that are in force now.
        part: tokens, of the shape of all chunks.
        scored: their mask.
        optimizer: with the settings and shapes of all optimisers that it will teach.
        state: before the chunk.
        pool: of another graph of the model, whose memory this one shares; None: of its own.
    """

    def __init__(
        self,
        learn: Learn,
        part: Tensor,
        scored: Tensor,
        optimizer: TaskOptimizer,
        state: State | None,
        pool: Any,
    ) -> None:
        own = copy.copy(optimizer)
        self._learn = learn  # holds the fixed factors of "low_rank", which the graph reads
        self._given = pytree.tree_map(_clone, (part, scored, optimizer.tensors(), state))

        def read() -> tuple[Tensor, Tensor, tuple[Tensor, ...], State]:
            part, scored, task, state = self._given
            own.load(task)
            nll, gradient, after = learn(part, scored, own, state)
            return nll, gradient, own.tensors(), after

        self._graph, self._results = record(read, part.device, pool=pool)
        self.pool = self._graph.pool()

    def __call__(
        self, part: Tensor, scored: Tensor, optimizer: TaskOptimizer, state: State | None
    ) -> tuple[Tensor, Tensor, State]:
        """Reads a chunk and teaches.

        Args:
            part: `[B, c + 1]`.
            scored: bool `[B, c]`.
            optimizer: that is taught.
            state: before the chunk.

        Returns:
            -ln p `[B, c]`, its gradient `[rows, N]`, and the state after the chunk, which the next
            replay of a graph of the pool overwrites.
        """
        _copy(self._given, (part, scored, optimizer.tensors(), state))
        self._graph.replay()
        nll, gradient, task, after = self._results
        optimizer.load([x.clone() for x in task])
        return nll.clone(), gradient.clone(), after


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
    old, new = zip(*(pair for pair in pairs if isinstance(pair[0], Tensor)), strict=True)
    torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
