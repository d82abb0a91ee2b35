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
        steps: at most; 0 leaves the codec as it is.
        lr: step size of Adam.
        loss_share: of the lines that are learned from, those that a step predicts, 0..1.
        stop_share: of the lines outside of the middle, those that decide when to stop, 0..1.
        check_every: steps between two looks at these.
        patience: looks without a gain after which it stops.
        least_gain: relative gain at the lines of `stop_share` below which the codec stays as it
            was.
        slices: of the scan that are learned from, evenly spread.
        weight_power: p in the weight 1 / (energy + noise)^p of a squared difference.
        seed: of the choice of lines.

    Raises:
        InputError: a setting is outside of its range.
    """

    parameters: Literal["gains", "backbone", "all"] = "gains"
    steps: int = 48
    lr: float = 1e-3
    loss_share: float = 0.3
    stop_share: float = 0.2
    check_every: int = 8
    patience: int = 2
    least_gain: float = 0.01
    slices: int = 4
    weight_power: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"steps": 0, "check_every": 1, "patience": 1, "slices": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"adapt.{name} = {getattr(self, name)} must be at least {least}")
        for name in ("loss_share", "stop_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"adapt.{name} = {getattr(self, name)} must be between 0 and 1")
        if not self.lr > 0:
            raise InputError(f"adapt.lr = {self.lr} must be above 0")
        if not (0 <= self.least_gain < 1 and 0 <= self.weight_power <= 1):
            raise InputError("adapt.least_gain and adapt.weight_power must be between 0 and 1")
        if self.parameters not in ("gains", "backbone", "all"):
            raise InputError(
                f"adapt.parameters = {self.parameters!r} must be 'gains', 'backbone' or 'all'"
            )
