"""Task parameters: small tensors, one set for each sample, that are added to shared weights.

With phi a sample's task parameters, zero where nothing is adapted:

    norm       y <- y (1 + phi)            output of an RMSNorm of the residual stream; phi [D]
    fast       p <- p + phi                fast parameters before a layer's Trigger; phi [4, R]
    low_rank   y <- y + (x A) phi          output of an MLP's second matrix; phi [r, D], and A
                                           [F, r] a fixed random matrix

All tensors of a sample are one vector of N numbers, so that an optimiser's step is one operation.
They reach the model through hooks: without task parameters it computes as if this module did not
exist, and models of other architectures are adapted in the same way.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.adapt.config import AdaptConfig
from nirvana.errors import InputError
from nirvana.model.updater import Updater
from nirvana.ops import at_least_float32, no_autocast


@dataclass(frozen=True)
class TaskTensor:
    """One tensor of the task parameters.

    Attributes:
        group: of `nirvana.adapt.config.GROUPS`.
        module: name of the module whose computation it changes.
        shape: of one sample's tensor.
    """

    group: str
    module: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """ "GROUP/MODULE"."""
        return f"{self.group}/{self.module}"

    @property
    def layer(self) -> int | None:
        """The number in the module's name; None for one outside of the layers."""
        return next((int(part) for part in self.module.split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class TaskLayout:
    """Which tensors a vector of task parameters holds, in order.

    Attributes:
        tensors: of one sample.
        seed: of the fixed factors of "low_rank".
    """

    tensors: tuple[TaskTensor, ...]
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors."""
        return tuple(each.name for each in self.tensors)

    @property
    def sizes(self) -> list[int]:
        """The numbers of each tensor."""
        return [math.prod(each.shape) for each in self.tensors]

    def split(self, values: Tensor) -> list[Tensor]:
        """Cuts vectors `[rows, N]` into tensors `[rows, *shape]`.

        Args:
            values: `[rows, N]`.

        Returns:
            the tensors, in order; views.
        """
        parts = values.split(self.sizes, dim=1)
        return [
            part.unflatten(1, each.shape) for part, each in zip(parts, self.tensors, strict=True)
        ]

    def expand(self, numbers: Tensor) -> Tensor:
        """Repeats one number for each tensor over its entries.

        Args:
            numbers: `[tensors]`.

        Returns:
            `[N]`.
        """
        sizes = torch.tensor(self.sizes, device=numbers.device)
        return numbers.repeat_interleave(sizes, output_size=sum(self.sizes))


def task_layout(model: PreTrainedModel, config: AdaptConfig) -> TaskLayout:
    """Finds the task parameters of a model.

    Args:
        model: a causal language model of transformers.
        config: names the groups.

    Returns:
        their layout, in the order of the model's modules.

    Raises:
        InputError: for a group that the model does not have.
    """
    embedding: Any = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    sizes = {"norm": (width,), "low_rank": (config.rank, width)}
    if "fast" in config.parameters:
        sizes["fast"] = (4, getattr(model.config, "bank_size", 0))
    found = [
        TaskTensor(group, name, sizes[group])
        for name, module in model.named_modules()
        for group in config.parameters
        if _belongs(module, name, group, width)
    ]
    missing = set(config.parameters) - {each.group for each in found}
    if missing:
        raise InputError(
            f"the model has no task parameters of the group {', '.join(sorted(missing))}: a "
            f"{type(model).__name__} of this configuration has no such module"
        )
    return TaskLayout(tuple(found), config.seed)


def _belongs(module: nn.Module, name: str, group: str, width: int) -> bool:
    """Whether a group has a tensor for a module of a model of hidden size `width`."""
    if group == "norm":
        weight = getattr(module, "weight", None)
        normalises = type(module).__name__.endswith("RMSNorm")
        return normalises and weight is not None and tuple(weight.shape) == (width,)
    if group == "fast":
        return isinstance(module, Updater) and module.has_trigger
    return isinstance(module, nn.Linear) and name.endswith("mlp.down_proj")


class TaskHooks:
    """Lets a model compute with task parameters, in a `with` block or between `add` and `remove`.

    Args:
        model: the model; its weights stay as they are.
        layout: of the task parameters.

    Raises:
        ValueError: for a model with compiled blocks, whose code would not notice the hooks.
    """

    def __init__(self, model: nn.Module, layout: TaskLayout):
        if any(module._compiled_call_impl is not None for module in model.modules()):
            raise ValueError(
                "task parameters cannot be added to compiled modules: load the model anew"
            )
        self.model, self.layout = model, layout
        self._parts: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def set(self, values: Tensor) -> None:
        """Chooses the task parameters of the next forwards.

        Args:
            values: `[B, N]`, one vector for each row of the batch, or `[1, N]` for all rows.
        """
        self._parts = dict(zip(self.layout.names, self.layout.split(values), strict=True))

    def add(self) -> None:
        """Lets the model compute with the task parameters."""
        self._forget_graphs()
        for number, each in enumerate(self.layout.tensors):
            module = self.model.get_submodule(each.module)
            if each.group == "norm":
                hook = module.register_forward_hook(self._norm(each.name))
            elif each.group == "fast":
                hook = module.register_forward_pre_hook(self._fast(each.name))
            else:
                assert isinstance(module, nn.Linear)
                self._factors[each.name] = _factor(module, each, self.layout.seed + number)
                hook = module.register_forward_hook(self._low_rank(each.name))
            self._handles.append(hook)

    def remove(self) -> None:
        """Lets the model compute without them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget_graphs()

    def __enter__(self) -> "TaskHooks":
        self.add()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.remove()

    def _forget_graphs(self) -> None:
        """Drops what `generate` has compiled: that code would not notice a change of hooks."""
        if "_compiled_call" in vars(self.model) and "torch._dynamo" in sys.modules:
            del self.model._compiled_call
            torch.compiler.reset()

    def _part(self, name: str, x: Tensor) -> Tensor:
        """The tensor for a batch x, on its device."""
        part, rows = self._parts[name], x.shape[0]
        if part.shape[0] not in (1, rows):
            raise ValueError(f"{part.shape[0]} rows of task parameters for a batch of {rows} rows")
        return part.to(x.device)

    def _norm(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            # In bfloat16 a gain of 1.003 would be 1: the product is rounded, not the factor.
            with no_autocast(y.device):
                gain = self._part(name, y)[:, None]
                return (at_least_float32(y) * (1 + gain)).to(y.dtype)

        return hook

    def _fast(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            x, fast, *rest = args
            return x, fast + self._part(name, fast)[:, None], *rest

        return hook

    def _low_rank(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            (x,) = args
            part = self._part(name, y).to(y.dtype)
            return y + (x @ self._factors[name].to(x)) @ part

        return hook


def _factor(module: nn.Linear, tensor: TaskTensor, seed: int) -> Tensor:
    """The fixed factor A of a low-rank term, `[F, r]`; the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    factor = torch.randn(
        module.in_features, tensor.shape[0], generator=generator, dtype=torch.float32, device="cpu"
    )
    return (factor * module.in_features**-0.5).to(module.weight.device)
