"""Settings of the peers that other projects wrote, chosen for each acceleration on training scans.

`peers.json` is written by `python -m experiments.mri.peers`, which states on what and how the
settings were chosen. NumPy only: worker processes import this module and must start without torch.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
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
class EspiritSettings:
    """Settings of `espirit.espirit_maps`.

    Attributes:
        kernel: side of ESPIRiT's kernels in k-space samples.
        threshold: smallest singular value kept of the calibration matrix, relative to the
            largest.
        crop: sensitivities are zero where ESPIRiT's eigenvalue is below this; 0 keeps them
            everywhere.
        calibration_rows: number of k-space rows of the calibration region.
    """

    kernel: int = 6
    threshold: float = 0.02
    crop: float = 0.5
    calibration_rows: int = 24


@dataclass(frozen=True)
class WaveletSettings(EspiritSettings):
    """Settings of `sigpy.l1_wavelet`: those of ESPIRiT and the following.

    Attributes:
        noise_factor: weight of the L1 norm in standard deviations of the k-space noise.
        min_weight: least such weight, relative to the brightest voxel of the zero-filled volume.
        iterations: FISTA steps. Early stopping is part of the regularisation: running to
            convergence amplifies noise between aliases.
        wavelet: name of the wavelet, for PyWavelets.
    """

    noise_factor: float = 0.15
    min_weight: float = 1.5e-4
    iterations: int = 80
    wavelet: str = "db4"


@dataclass(frozen=True)
class SenseSettings(EspiritSettings):
    """Settings of `sigpy.sense`: those of ESPIRiT and the following.

    Attributes:
        weight: of the squared norm.
        iterations: steps of the conjugate gradients.
    """

    weight: float = 1e-2
    iterations: int = 15


@dataclass(frozen=True)
class Peers:
    """The settings for one acceleration; the defaults are those that the search starts from.

    Attributes:
        acceleration: all points of k-space over the sampled ones.
        grappa: of GRAPPA.
        bart_l1: of BART with wavelets.
        bart_l2: of BART's SENSE.
        l1_wavelet: of sigpy with wavelets.
        sense: of sigpy's SENSE.
    """

    acceleration: float
    grappa: GrappaSettings = GrappaSettings()
    bart_l1: BartSettings = BartSettings()
    bart_l2: BartSettings = BartSettings(norm="l2")
    l1_wavelet: WaveletSettings = WaveletSettings()
    sense: SenseSettings = SenseSettings()

    def bart(self, norm: Literal["l1", "l2"]) -> BartSettings:
        """BART's settings with this regularisation."""
        return self.bart_l1 if norm == "l1" else self.bart_l2


def peers_for(pattern: np.ndarray) -> Peers:
    """The settings that were chosen for the acceleration nearest to that of a sampling pattern."""
    by_acceleration = {peers.acceleration: peers for peers in chosen_peers()}
    return by_acceleration[nearest_acceleration(pattern, by_acceleration)]


def nearest_acceleration(pattern: np.ndarray, accelerations: Iterable[float]) -> float:
    """The one of some accelerations whose ratio to that of a sampling pattern is nearest to 1."""
    own = 1 / max(float(pattern.mean()), 1e-6)
    return min(accelerations, key=lambda acceleration: abs(math.log(acceleration / own)))


@cache
def chosen_peers() -> tuple[Peers, ...]:
    """The settings for every acceleration in `peers.json`."""
    text = resources.files("nirvana.mri.classical").joinpath("peers.json").read_text("utf-8")
    names = [field.name for field in fields(Peers) if field.name != "acceleration"]
    return tuple(
        Peers(entry["acceleration"], **{name: settings_of(entry, name) for name in names})
        for entry in json.loads(text)["chosen"]
    )


def settings_of(entry: dict[str, Any], name: str) -> Any:
    """The settings of one peer in an entry of a file that `experiments.mri.peers` wrote."""
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in entry[name].items()}
    return replace(getattr(Peers(entry["acceleration"]), name), **values)
