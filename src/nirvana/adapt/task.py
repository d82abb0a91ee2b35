"""Task files: what a frozen model learned from a sample or a domain, in some kilobytes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.adapt.config import GROUPS, AdaptConfig
from nirvana.adapt.parameters import TaskHooks, TaskLayout, TaskTensor
from nirvana.config import from_dict, to_dict
from nirvana.errors import InputError
from nirvana.files import atomic_file
from nirvana.model.backbone import fingerprint

FORMAT = "nirvana task 1"
_IDENTITIES: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = WeakKeyDictionary()
"""The digest of each model in use, and the state of the weights that it belongs to."""


@dataclass(frozen=True)
class Task:
    """Task parameters of samples, and the model that they belong to.

    Attributes:
        layout: of the tensors.
        values: `[rows, N]`, float32; one row for each sample.
        model: SHA-256 over the weights of the model, rounded to bfloat16 (`fingerprint`).
        config: the settings with which they were learned.
        about: facts of their making: tokens, documents, the files' names.
    """

    layout: TaskLayout
    values: Tensor
    model: str
    config: AdaptConfig
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        layout: TaskLayout,
        values: Tensor,
        config: AdaptConfig,
        **about: Any,
    ) -> "Task":
        """Task parameters that a model has learned.

        Args:
            model: the model.
            layout: of the task parameters.
            values: `[rows, N]`.
            config: the settings.
            about: facts of their making.

        Returns:
            the task.
        """
        return cls(layout, values.detach(), identity(model), config, about)

    def __len__(self) -> int:
        return len(self.values)

    def row(self, number: int) -> "Task":
        """The task parameters of one sample.

        Args:
            number: of the row.

        Returns:
            a task of one row.
        """
        return replace(self, values=self.values[number : number + 1])

    def applied(self, model: PreTrainedModel) -> TaskHooks:
        """What lets the model compute with these task parameters: in a `with` block, or from its
        `add()` on.

        Args:
            model: the model to which they belong. A batch must have as many rows as the task, or
                the task one row.

        Returns:
            the hooks.

        Raises:
            InputError: for another model, and for values that are not finite.
        """
        self.require(model)
        self.require_finite()
        hooks = TaskHooks(model, self.layout)
        hooks.set(self.values)
        return hooks

    def require_finite(self) -> None:
        """Refuses what an adaptation with too large steps leaves behind.

        Raises:
            InputError: for values that are not finite.
        """
        if not self.values.isfinite().all():
            raise InputError(
                "the task parameters are not finite: the adaptation diverged; give a smaller "
                "step size (lr)"
            )

    def require(self, model: PreTrainedModel) -> None:
        """Refuses another model.

        Args:
            model: any model.

        Raises:
            InputError: unless its weights are those with which the task was learned.
        """
        if identity(model) != self.model:
            raise InputError(
                "the task was learned on another model: its task parameters mean nothing here"
            )

    def values_for(self, layout: TaskLayout) -> Tensor:
        """The values in the order of another layout; zero for groups that the task does not have.

        Args:
            layout: of the same model.

        Returns:
            `[rows, N]`.

        Raises:
            InputError: for tensors that the layout lacks, and another low-rank factor.
        """
        own = dict(zip(self.layout.names, self.layout.split(self.values), strict=True))
        known = {each.name: each.shape for each in layout.tensors}
        for each in self.layout.tensors:
            if known.get(each.name) != each.shape:
                raise InputError(
                    f"the task has {each.name} {list(each.shape)}, which is not adapted here: "
                    f"adapt its groups, {','.join(self.config.parameters)}"
                )
        if any(each.group == "low_rank" for each in self.layout.tensors) and (
            layout.seed != self.layout.seed
        ):
            raise InputError("the task's low-rank terms have other fixed factors (seed)")
        parts = [own.get(name) for name in layout.names]
        rows = len(self.values)
        filled = [
            self.values.new_zeros(rows, size) if part is None else part.flatten(1)
            for part, size in zip(parts, layout.sizes, strict=True)
        ]
        return torch.cat(filled, 1)


def identity(model: PreTrainedModel) -> str:
    """SHA-256 over a model's weights, rounded to bfloat16.

    Args:
        model: any model.

    Returns:
        the digest, hexadecimal; computed once for each state of the weights.
    """
    version = [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
    known = _IDENTITIES.get(model)
    if known is None or known[0] != version:
        known = _IDENTITIES[model] = version, fingerprint(model)
    return known[1]


def save_task(task: Task, path: str | Path) -> None:
    """Writes a task of one row as a safetensors file, atomically.

    Args:
        task: the task.
        path: file to write.

    Raises:
        InputError: where no file can be made, and for values that are not finite.
        ValueError: for a task of several rows.
    """
    if len(task) != 1:
        raise ValueError(f"a task file holds one row, not {len(task)}: save task.row(i)")
    task.require_finite()
    parts = task.layout.split(task.values.float().cpu())
    tensors = {
        each.name: part[0].contiguous()
        for each, part in zip(task.layout.tensors, parts, strict=True)
    }
    metadata = {
        "format": FORMAT,
        "model": task.model,
        "order": json.dumps(task.layout.names),
        "config": json.dumps(to_dict(task.config)),
        "about": json.dumps(task.about),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_task(path: str | Path) -> Task:
    """Reads a task file.

    Args:
        path: of a file that `save_task` wrote.

    Returns:
        the task, on the CPU.

    Raises:
        InputError: for a missing file and one of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such task file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} is no task file: write one with nirvana adapt")
            names = json.loads(metadata["order"])
            tensors = [file.get_tensor(name) for name in names]
            config = from_dict(AdaptConfig, json.loads(metadata["config"]), "")
            about = json.loads(metadata["about"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is no task file, or a damaged one: {reason}") from None
    found = []
    for name, tensor in zip(names, tensors, strict=True):
        group, _, module = name.partition("/")
        if group not in GROUPS or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise InputError(f"{path}: {name} is no task parameter")
        found.append(TaskTensor(group, module, tuple(tensor.shape)))
    values = torch.cat([tensor.float().flatten() for tensor in tensors])[None]
    return Task(TaskLayout(tuple(found), config.seed), values, metadata["model"], config, about)


def merge_tasks(tasks: Sequence[Task], weights: Sequence[float] | None = None) -> Task:
    """The weighted mean of tasks of one model.

    Args:
        tasks: at least one, of one row each, with the same tensors.
        weights: of the tasks, finite, with a sum other than 0; None: equal ones.

    Returns:
        a task of one row.

    Raises:
        InputError: for tasks of different models or with different tensors, and wrong weights.
    """
    first = tasks[0]
    for other in tasks[1:]:
        if other.model != first.model:
            raise InputError("the tasks belong to different models")
        if other.layout != first.layout:
            raise InputError("the tasks have different task parameters")
    shares = torch.tensor(weights or [1.0] * len(tasks), dtype=torch.float64)
    if len(shares) != len(tasks) or shares.sum() == 0 or not shares.isfinite().all():
        raise InputError(f"{len(tasks)} tasks need as many finite weights, whose sum is not 0")
    shares = shares / shares.sum()
    values = torch.einsum("n,nrk->rk", shares, torch.stack([t.values.double() for t in tasks]))
    about = {
        "merged": [task.about for task in tasks],
        "weights": [round(float(share), 6) for share in shares],
    }
    return replace(first, values=values.to(first.values.dtype), about=about)
