"""How a frozen model adapts to a sample: which parameters, how often, and by which steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from nirvana.config import load_config, require
from nirvana.errors import InputError

GROUPS = {
    "norm": "the gain of every RMSNorm of the residual stream",
    "fast": "the start of the Trigger's fast parameters in every layer that has a Trigger",
    "low_rank": "a low-rank term of the second matrix of every MLP",
}
"""Groups of task parameters."""

STEP_SIZES = {"norm": 0.01, "fast": 0.03, "low_rank": 0.01}
"""Step size of each group where nothing else is chosen."""

FILE = "adapt.json"
"""Name of the file in a model's folder that holds its own `AdaptConfig`."""


@dataclass(frozen=True)
class AdaptConfig:
    """Settings of the adaptation to a sample.

    Attributes:
        parameters: groups of `GROUPS` that are adapted.
        chunk: tokens that are scored with the same task parameters, and then teach the next.
        steps: of the optimiser on each chunk; with 0 the model stays as it is.
        optimizer: "adam" (Kingma and Ba, arXiv 1412.6980), or "sgd".
        lr: step sizes, by the name of a group or of a tensor (`TaskLayout.names`), which goes
            before its group; a negative one turns the step around. `STEP_SIZES` where none is
            given.
        betas: decays of Adam's two moments, in 0..1.
        eps: added to the root of Adam's second moment.
        rank: of "low_rank".
        seed: of the fixed first factor of "low_rank".
    """

    parameters: tuple[str, ...] = ("norm", "fast")
    chunk: int = 128
    steps: int = 1
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: dict[str, float] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        known = ", ".join(GROUPS)
        right = f"different groups of {known}"
        names = self.parameters
        distinct = len(set(names)) == len(names) > 0
        require(distinct and {*names} <= {*GROUPS}, "parameters", ",".join(names), right)
        require(self.chunk >= 1, "chunk", self.chunk, "at least 1")
        require(self.steps >= 0, "steps", self.steps, "at least 0")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "from 0 to below 1")
        require(self.eps > 0, "eps", self.eps, "above 0")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        for name in self.lr:
            group = name.partition("/")[0]
            require(group in names, "lr", name, f"of an adapted group: {', '.join(names)}")
            require(math.isfinite(self.lr[name]), "lr", self.lr[name], "a finite number")

    def step_size(self, name: str) -> float:
        """The step size of a tensor.

        Args:
            name: of the tensor, "GROUP/MODULE".

        Returns:
            its own, else that of its group, else that of `STEP_SIZES`.
        """
        group = name.partition("/")[0]
        return self.lr.get(name, self.lr.get(group, STEP_SIZES[group]))


def config_of(
    folder: Path | None,
    parameters: tuple[str, ...] | None = None,
    chunk: int | None = None,
    steps: int | None = None,
    lr: Mapping[str, float] | None = None,
) -> AdaptConfig:
    """The settings of a model, with some of them replaced.

    Args:
        folder: of the model; its `FILE`, if it has one, holds the settings that suit it.
        parameters: replaces the groups; step sizes of other groups are left out.
        chunk: replaces the length of a chunk.
        steps: replaces the steps on each chunk.
        lr: replaces all step sizes of the groups that it names; under "" those of all groups.

    Returns:
        the settings.

    Raises:
        InputError: for a damaged file, and values that are out of range.
    """
    own = None if folder is None else folder / FILE
    config = AdaptConfig() if own is None or not own.is_file() else load_config(AdaptConfig, own)
    groups = config.parameters if parameters is None else parameters
    sizes = {name: size for name, size in config.lr.items() if name.partition("/")[0] in groups}
    for group, size in (lr or {}).items():
        named = groups if group == "" else (group,)
        sizes = {name: old for name, old in sizes.items() if name.partition("/")[0] not in named}
        sizes |= dict.fromkeys(named, size)
    return replace(
        config,
        parameters=groups,
        chunk=config.chunk if chunk is None else chunk,
        steps=config.steps if steps is None else steps,
        lr=sizes,
    )


def read_step_sizes(text: str) -> dict[str, float]:
    """Reads step sizes as a command line gives them: "0.01", or "norm=0.01,fast=0.03".

    Args:
        text: of the option.

    Returns:
        group -> step size; "" stands for all groups.

    Raises:
        InputError: for another form.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        group, _, number = part.rpartition("=")
        try:
            found[group.strip()] = float(number)
        except ValueError:
            raise InputError(f"--lr {text}: must be a number, or norm=0.01,fast=0.03") from None
    return found
