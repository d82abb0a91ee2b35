"""The settings of an adaptation to a scan."""

from dataclasses import dataclass
from typing import Literal

from nirvana.errors import InputError


@dataclass(frozen=True)
class ScanAdaptConfig:
    """How a codec adapts to a scan.

    Attributes:
        parameters: what is learned: "gains", a factor for every channel of the convolutions, the
            gains of norms, biases and weights of the data; "backbone", the norms of the frozen
            language model; "all", every weight of the codec.
        steps: of each fold; 0 leaves the codec as it is.
        lr: step size of Adam.
        folds: copies of the codec, each of which learns from all lines outside of the middle but
            its share, which it predicts in the end.
        hidden_share: of the lines that are learned from, those that a step hides, 0..1.
        repeat_weight: of the loss of the scan's repetition with another pattern, beside the error
            of hidden lines; 0 is zero-shot self-supervised learning.
        check_every: steps between two looks at a fold's lines.
        least_gain: dB that the lower bound of the gain at these lines must exceed; otherwise the
            codec stays as it was.
        slices: of the scan that are learned from, evenly spread.
        weight_power: p in the weight 1 / (energy + noise)^p of a squared difference.
        seed: of the choice of lines.

    Raises:
        InputError: a setting is outside of its range.
    """

    parameters: Literal["gains", "backbone", "all"] = "gains"
    steps: int = 16
    lr: float = 3e-3
    folds: int = 3
    hidden_share: float = 0.1
    repeat_weight: float = 3.0
    check_every: int = 8
    least_gain: float = 0.05
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
        if not self.lr > 0:
            raise InputError(f"adapt.lr = {self.lr} must be above 0")
        for name in ("least_gain", "repeat_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"adapt.{name} = {getattr(self, name)} must be at least 0")
        if not 0 <= self.weight_power <= 1:
            raise InputError(f"adapt.weight_power = {self.weight_power} must be between 0 and 1")
        if self.parameters not in ("gains", "backbone", "all"):
            raise InputError(
                f"adapt.parameters = {self.parameters!r} must be 'gains', 'backbone' or 'all'"
            )

    @property
    def total_steps(self) -> int:
        """Steps of all folds together."""
        return self.folds * self.steps
