"""Steps on the task parameters of several samples at once, each as if it were alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nirvana.adapt.config import AdaptConfig
from nirvana.adapt.parameters import TaskLayout


class TaskOptimizer:
    """Task parameters phi and the state of their optimiser, row by row.

        sgd     d = g
        adam    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
                d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        phi <- phi - lr d

    t counts a row's own steps: a row whose sample has ended takes none, so that a sample's task
    parameters do not depend on the longer ones beside it.

    Args:
        layout: of the task parameters.
        config: the optimiser and its step sizes.
        start: `[rows, N]`, phi before the first step; float32, or float64 for a float64 model.
    """

    def __init__(self, layout: TaskLayout, config: AdaptConfig, start: Tensor):
        self.layout, self.config = layout, config
        self.values = start.clone()
        sizes = torch.tensor([config.step_size(name) for name in layout.names])
        self.lr = layout.expand(sizes).to(start)
        self._first = torch.zeros_like(start)
        self._second = torch.zeros_like(start)
        self._count = start.new_zeros(len(start), 1)

    def direction(self, gradient: Tensor, active: Tensor) -> Tensor:
        """Takes a gradient into the optimiser's state.

        Args:
            gradient: `[rows, N]`.
            active: bool `[rows]`; the state of other rows stays as it is.

        Returns:
            d, `[rows, N]`, zero in rows that are not active.
        """
        active = active[:, None]
        if self.config.optimizer == "sgd":
            return gradient * active
        first, second = self.config.betas
        self._count = self._count + active
        decayed = torch.lerp(gradient, self._first, first)
        self._first = torch.where(active, decayed, self._first)
        decayed = torch.lerp(gradient.square(), self._second, second)
        self._second = torch.where(active, decayed, self._second)
        count = self._count.clamp(min=1)
        mean = self._first / (1 - first**count)
        root = (self._second / (1 - second**count)).sqrt()
        return mean / (root + self.config.eps) * active

    def step(self, gradient: Tensor, active: Tensor) -> None:
        """Changes the task parameters of the active rows.

        Args:
            gradient: `[rows, N]`, of the rows' losses.
            active: bool `[rows]`.
        """
        self.values = self.values - self.lr * self.direction(gradient, active)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that a step reads: the task parameters, the step sizes and the optimiser's state."""
        return self.values, self.lr, self._first, self._second, self._count

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Goes on from other values.

        Args:
            tensors: as of `tensors`.
        """
        self.values, self.lr, self._first, self._second, self._count = tensors
