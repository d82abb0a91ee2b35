"""What a training is about; language models and MRI specialists differ only in this."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.train.world import World


class Task(ABC):
    """A model, its data and its loss.

    Attributes:
        model: lies on its device; its trained parameters and buffers go into checkpoints.
        unit: what throughput counts, in the plural: "tokens", "samples".
        units_per_step: how many of them one optimiser step reads, in all processes together.
        flops_per_step: floating-point operations of a step, forward and backward; 0: not known.
        undecayed: names of parameters that take no weight decay, beside biases, norms, embeddings
            and whatever has fewer than two dimensions.
    """

    model: nn.Module
    unit: str
    units_per_step: int
    flops_per_step: float = 0.0
    undecayed: Collection[str] = ()

    def prepare(self, world: World, compiled: bool) -> None:
        """Makes the model ready for the processes that train it; called once, before anything is
        built upon its parameters.

        Args:
            compiled: compile what is worth it.
        """
        if world.size > 1:
            raise InputError(f"this training runs in one process; {world.size} were started")

    def trainable(self) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters to train, named as in `model`, in a fixed order."""
        return self.model.named_parameters()

    def begin(self, folder: Path) -> None:  # noqa: B027  (most tasks have nothing to add)
        """Adds to the run's folder what belongs there; called by the first process."""

    def position(self, step: int) -> dict[str, Any]:
        """Plain data that says which data follow after `step` updates; kept in every checkpoint,
        and compared on resumption."""
        return {"step": step}

    @abstractmethod
    def batch(self, step: int, micro: int) -> Any:
        """The data of one micro batch, a function of `step` (from 0) and `micro`
        (0..accumulation-1) alone.

        Raises:
            InputError: when it cannot be read.
        """

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of one micro batch, and scalars to log (detached, on the device).

        A function of the batch, of the weights and of torch's random generators, which the loop
        seeds anew for every micro batch: then a resumed run goes on as if it had not stopped.
        """

    def observe(self, batch: Any) -> dict[str, dict[str, float]]:
        """Groups of figures about the model's inside on a micro batch; called at every log, in eval
        mode without gradients. All processes call it, each with a batch of its own."""
        return {}

    def validate(self) -> dict[str, float]:
        """Figures to log; called in eval mode without gradients, by all processes alike."""
        return {}

    def samples(self) -> dict[str, str]:
        """Prompts and what the model makes of them; called after `validate`, in the same way."""
        return {}

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the trained model into `folder`, which does not exist yet or is replaced; called
        once, by the first process, after the last checkpoint is whole."""
