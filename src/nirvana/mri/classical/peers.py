"""Settings of the peers that other projects wrote, chosen for each acceleration on training scans.

`peers.json` is written by `python -m experiments.mri.peers`, which states on what and how the
settings were chosen. NumPy only: worker processes import this module and must start without torch.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class GrappaSettings:
    """Settings of `grappa.grappa`.

    Attributes:
        kernel: rows and columns of the kernel.
        regularisation: pygrappa's `lamda`, relative to the mean eigenvalue of the normal matrix.
        calibration_rows: number of k-space rows of the calibration region.
    """

    kernel: tuple[int, int] = (5, 5)
    regularisation: float = 0.01
    calibration_rows: int = 256


@dataclass(frozen=True)
class BartSettings:
    """Settings of `bart.bart_pics`.

    Attributes:
        maps: sets of sensitivities, `ecalib -m`.
        threshold: `ecalib -t`.
        crop: `ecalib -c`; 0 keeps the sensitivities everywhere.
        weight: `pics -r`; BART scales the data before it applies.
        iterations: `pics -i`; few of them are part of the regularisation.
        norm: `pics -l1` or `-l2`.
        kernel: side of ESPIRiT's kernels, BART's own default.
        calibration_rows: of the calibration region at most, BART's own default.
    """

    maps: int = 1
    threshold: float = 0.02
    crop: float = 0.0
    weight: float = 0.006
    iterations: int = 30
    norm: Literal["l1", "l2"] = "l1"
    kernel: int = 6
    calibration_rows: int = 24

    @property
    def ecalib(self) -> tuple[str, ...]:
        """Options of `bart ecalib`."""
        return ("-m", str(self.maps), "-t", f"{self.threshold:g}", "-c", f"{self.crop:g}")

    @property
    def pics(self) -> tuple[str, ...]:
        """Options of `bart pics`."""
        return (f"-{self.norm}", "-r", f"{self.weight:g}", "-i", str(self.iterations))


@dataclass(frozen=True)
class Peers:
    """The settings for one acceleration.

    Attributes:
        acceleration: all points of k-space over the sampled ones.
        grappa: of GRAPPA.
        bart_l1: of BART with wavelets.
        bart_l2: of BART's SENSE.
    """

    acceleration: float
    grappa: GrappaSettings
    bart_l1: BartSettings
    bart_l2: BartSettings

    def bart(self, norm: Literal["l1", "l2"]) -> BartSettings:
        """BART's settings with this regularisation."""
        return self.bart_l1 if norm == "l1" else self.bart_l2


def peers_for(pattern: np.ndarray) -> Peers:
    """The settings that were chosen for the acceleration nearest to that of a sampling pattern."""
    acceleration = 1 / max(float(pattern.mean()), 1e-6)
    return min(chosen_peers(), key=lambda peers: abs(math.log(peers.acceleration / acceleration)))


@cache
def chosen_peers() -> tuple[Peers, ...]:
    """The settings for every acceleration in `peers.json`."""
    text = resources.files("nirvana.mri.classical").joinpath("peers.json").read_text("utf-8")
    return tuple(_peers(entry) for entry in json.loads(text)["chosen"])


def _peers(entry: dict[str, Any]) -> Peers:
    grappa = GrappaSettings(**{**entry["grappa"], "kernel": tuple(entry["grappa"]["kernel"])})
    bart_l1, bart_l2 = (BartSettings(**entry[key]) for key in ("bart_l1", "bart_l2"))
    return Peers(entry["acceleration"], grappa, bart_l1, bart_l2)
