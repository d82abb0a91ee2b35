"""What the training loop needs to know of a training: its model, its data and its loss."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.train.checkpoint import find_checkpoint, restore
from nirvana.train.distributed import ProcessContext
from nirvana.train.optim import is_decayed


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        model: on its device; its trained parameters and buffers are saved in checkpoints.
        unit: what throughput counts, in the plural: "tokens", "samples".
        units_per_step: units that one optimiser step reads, in all processes together.
        flops_per_step: floating-point operations of a step, forward and backward; 0: unknown.
        undecayed: names of parameters that take no weight decay, beside biases, norms, embeddings
            and whatever has fewer than two dimensions.
    """

    model: nn.Module
    unit: str
    units_per_step: int
    flops_per_step: float = 0.0
    undecayed: Collection[str] = ()

    def verify(self) -> None:  # noqa: B027  (most tasks have recorded no sums)
        """Compares the data with their recorded checksums; one process of each machine calls it,
        before anything is written.

        Raises:
            InputError: naming the file that is damaged.
        """

    def initialize(self, initial: str) -> None:
        """Loads the weights that a new run starts from; called before `prepare`.

        Args:
            initial: `run.initial`, not empty. Here a run or one of its checkpoints; tasks with
                models in folders of their own read these as well.

        Raises:
            InputError: for weights that do not exist or do not fit the model.
        """
        found = find_checkpoint(initial)
        try:
            restore(found, self.model, self.trainable())
        except InputError as error:
            raise InputError(f"run.initial = {initial!r} does not fit: {error}") from error

    def prepare(self, processes: ProcessContext, compiled: bool) -> None:
        """Prepares the model for the processes that train it.

        Called once, before the optimiser and the checkpoint writer use its parameters.

        Args:
            processes: the processes of the run.
            compiled: whether to compile what benefits from it.

        Raises:
            InputError: for a number of processes that the task does not support.
        """
        if processes.size > 1:
            raise InputError(f"this training runs in one process; {processes.size} were started")

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Returns the parameters to train, named as in `model`, in a fixed order."""
        return self.model.named_parameters()

    def matrices(self) -> set[str]:
        """Returns the names of the trained parameters that Muon updates if it is chosen: weights of
        linear maps with more than one row and column; neither embeddings nor stacked matrices."""
        linear = {part.weight for part in self.model.modules() if isinstance(part, nn.Linear)}
        return {
            name
            for name, parameter in self.trainable()
            if parameter in linear and min(parameter.shape) > 1
            if name not in self.undecayed and is_decayed(name, parameter)
        }

    def begin(self, folder: Path) -> None:  # noqa: B027  (most tasks have nothing to add)
        """Writes the task's own files into the run's folder; called by the main process.

        Args:
            folder: `run.out`.
        """

    def position(self, step: int) -> dict[str, Any]:
        """Describes which data follow after a number of steps.

        Args:
            step: steps done.

        Returns:
            Plain data, saved in every checkpoint and compared when a run is resumed.
        """
        return {"step": step}

    @abstractmethod
    def batch(self, step: int, micro: int) -> Any:
        """Returns the data of one micro batch, a function of `step` and `micro` alone.

        Args:
            step: from 0.
            micro: 0 to accumulation - 1.

        Raises:
            InputError: when the data cannot be read.
        """

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of one micro batch.

        It must depend only on the batch, the weights and torch's random generators, which the loop
        seeds for every micro batch: a resumed run then continues exactly.

        Args:
            batch: what `batch` returned.

        Returns:
            The mean loss, a scalar, and scalars to log (detached, on the device).
        """

    def observe(self, batch: Any) -> dict[str, dict[str, float]]:
        """Computes figures of the model's internal state; called at every log.

        All processes call it, in eval mode without gradients, each with its own batch.

        Args:
            batch: a micro batch.

        Returns:
            Group -> name -> figure.
        """
        return {}

    def validate(self) -> dict[str, float]:
        """Computes validation figures; all processes call it, in eval mode without gradients.

        Returns:
            Name -> figure.
        """
        return {}

    def samples(self) -> dict[str, str | None]:
        """Generates samples; called after `validate`, in the same way.

        Returns:
            Prompt -> the model's continuation; None if its logits are not finite.
        """
        return {}

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the trained model.

        Called once, by the main process, after the last checkpoint is complete.

        Args:
            folder: to write; it does not exist, or is replaced.
        """
