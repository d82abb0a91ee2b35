"""Several measurements in one file: which one is the image's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.lines import IMAGE, NOISE, RawLines
from nirvana.mri.io.options import ReadOptions


@dataclass(frozen=True)
class RawMeasurement:
    """A measurement of a raw file: its name and its lines."""

    name: str
    lines: RawLines


def chosen_measurement(
    found: list[RawMeasurement], options: ReadOptions, path: Path
) -> tuple[RawMeasurement, tuple[str, ...]]:
    """The measurement that the options name or, without a name, the one with the most lines of an
    image, the last of several such; and remarks about the others.

    Where it has no noise lines, it gets those of the nearest other measurement that has some of as
    many coils.

    Raises:
        InputError: there is no such measurement.
    """
    index = _index(found, options, path)
    chosen = found[index]
    if len(found) == 1:
        return chosen, ()
    listed = ", ".join(f"{number} {one.name}" for number, one in enumerate(found, start=1))
    remark = (
        f"{len(found)} measurements in the file ({listed}): number {index + 1} is read "
        "(--measurement)"
    )
    return _with_noise(chosen, found, index), (remark,)


def _index(found: list[RawMeasurement], options: ReadOptions, path: Path) -> int:
    names = [one.name for one in found]
    wanted = options.measurement
    if wanted is None:
        lines = [int((one.lines.heads["kind"] == IMAGE).sum()) for one in found]
        return max(range(len(found)), key=lambda number: (lines[number], number))
    if wanted in names:
        return len(names) - 1 - names[::-1].index(wanted)
    if wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    raise InputError(
        f"{path} has no measurement {wanted!r}; --measurement may be 1 to {len(names)} or one of "
        f"{', '.join(names)}"
    )


def _with_noise(chosen: RawMeasurement, found: list[RawMeasurement], index: int) -> RawMeasurement:
    heads = chosen.lines.heads
    images = heads[heads["kind"] == IMAGE]
    if (heads["kind"] == NOISE).any() or not len(images):
        return chosen
    for other in sorted(range(len(found)), key=lambda number: abs(number - index)):
        lines = found[other].lines
        noise = lines.heads[lines.heads["kind"] == NOISE]
        noise = noise[noise["coils"] == images["coils"][0]]
        if len(noise):
            break
    else:
        return chosen
    borrowed = noise.copy()
    borrowed["number"] += int(heads["number"].max()) + 1  # numbers behind those of its own

    def read(part: np.ndarray) -> Iterator[np.ndarray]:
        if len(part) and part["number"][0] >= borrowed["number"][0]:
            back = part.copy()
            back["number"] -= int(heads["number"].max()) + 1
            return lines.read(back)
        return chosen.lines.read(part)

    return replace(chosen, lines=RawLines(np.concatenate([heads, borrowed]), read))
