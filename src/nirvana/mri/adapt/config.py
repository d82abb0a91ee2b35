"""The settings of an adaptation to a scan."""

from dataclasses import dataclass
from typing import Literal

from nirvana.errors import InputError

STEP_SIZES = {"gains": 3e-3, "backbone": 1e-3, "all": 3e-5}


@dataclass(frozen=True)
class ScanAdaptConfig:
    """How a codec adapts to a scan.

    Attributes:
        parameters: what is learned: "gains", a factor for every channel of the convolutions, the
            gains of norms, biases and weights of the data; "backbone", the norms of the frozen
            language model; "all", every weight of the codec.
        steps: of each fold; 0 leaves the codec as it is.
        lr: step size of Adam; None for that of the parameters in `STEP_SIZES`.
        folds: copies of the codec, each of which learns from all lines outside of the middle but
            its share, which it predicts in the end.
        hidden_share: of the lines that are learned from, those that a step hides, 0..1.
        check_every: steps between two looks at a fold's lines.
        slices: of the scan that are learned from, evenly spread.
        weight_power: p in the weight 1 / (energy + noise)^p of a squared difference.
        seed: of the choice of lines.

    Raises:
        InputError: a setting is outside of its range.
    """

    parameters: Literal["gains", "backbone", "all"] = "all"
    steps: int = 32
    lr: float | None = None
    folds: int = 3
    hidden_share: float = 0.1
    check_every: int = 8
    slices: int = 4
    weight_power: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 0, "folds": 2, "check_every": 1, "slices": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"adapt.{name} = {getattr(self, name)} must be at least {bound}")
        if not 0 < self.hidden_share < 1:
            raise InputError(f"adapt.hidden_share = {self.hidden_share} must be between 0 and 1")
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"adapt.lr = {self.lr} must be above 0")
        if not 0 <= self.weight_power <= 1:
            raise InputError(f"adapt.weight_power = {self.weight_power} must be between 0 and 1")
        if self.parameters not in ("gains", "backbone", "all"):
            raise InputError(
                f"adapt.parameters = {self.parameters!r} must be 'gains', 'backbone' or 'all'"
            )

    @property
    def step_size(self) -> float:
        """Adam's step size."""
        return STEP_SIZES[self.parameters] if self.lr is None else self.lr

    @property
    def total_steps(self) -> int:
        """Steps of all folds together."""
        return self.folds * self.steps
