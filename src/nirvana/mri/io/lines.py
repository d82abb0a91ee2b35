"""The measured lines of a raw file, in one form for all formats, and the choice of one image's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.io.options import ReadOptions, left_out, listed

MAX_LINES = 2**22

ASIDE, IMAGE, CALIBRATION, NOISE, NAVIGATOR = range(5)
"""What a line was measured for; calibration lines that also belong to the image are `IMAGE`."""

IMAGES = ("contrast", "phase", "repetition", "set")
"""Counters of which every number is an image of its own."""

VECTORS = ("position", "read_dir", "phase_dir", "slice_dir")
HEAD = np.dtype(
    [
        *((name, "i8") for name in ("number", "kind", "encoding", "step_1", "step_2", "slice")),
        *((name, "i8") for name in (*IMAGES, "average")),
        *((name, "i8") for name in ("coils", "samples", "center", "discard_pre", "discard_post")),
        ("reversed", "?"),
        *((name, "f8", 3) for name in VECTORS),
    ]
)
"""A line: its number in the file; its kind; its encoding space, phase-encoding steps, slice and
other counters; numbers of coils and samples, number of the sample in the middle of k-space, samples
to leave out at both ends; whether it was read backwards; and, in mm and LPS+, where the middle of
its slice lies and the directions of readout, phase encoding and slice."""


@dataclass(frozen=True)
class RawLines:
    """All lines of a measurement.

    Attributes:
        heads: `HEAD` `[N]`, in the order of the file.
        read: takes `HEAD` `[n]`, a part of them in the order of the file, and yields each one's
            samples, complex64 `[coils, samples]`, as they were measured.
    """

    heads: np.ndarray
    read: Callable[[np.ndarray], Iterator[np.ndarray]]


@dataclass(frozen=True)
class ChosenLines:
    """The lines of one image, and what was measured along with it.

    Attributes:
        image: `HEAD` `[N]`, of one encoding space and one number of every counter in `IMAGES`.
        calibration: `HEAD` `[N]`, measured for calibration only.
        noise: `HEAD` `[N]`, without a signal.
        navigators: `HEAD` `[N]`, without phase encoding, for the correction of echo-planar lines.
        remarks: what was left out.
    """

    image: np.ndarray
    calibration: np.ndarray
    noise: np.ndarray
    navigators: np.ndarray
    remarks: tuple[str, ...]

    @property
    def coils(self) -> int:
        """Number of coils."""
        return int(self.image["coils"][0])


def check_number(path: Path, count: int) -> None:
    """Refuses a number of lines that no scan has, before any of them is read."""
    if not 1 <= count <= MAX_LINES:
        raise InputError(f"{path} claims {count} lines; possible are 1 to {MAX_LINES}")


def choose(heads: np.ndarray, options: ReadOptions, path: Path) -> ChosenLines:
    """The lines of the image that the options select.

    Raises:
        InputError: there are none, or they have different numbers of coils.
    """
    image = heads[heads["kind"] == IMAGE]
    if not len(image):
        raise InputError(f"{path} holds no line of an image, only noise or navigators")
    select, remarks = options.select, []
    for counter in ("encoding", *IMAGES):
        image, remark = _only(image, counter, select.get(counter), path)
        remarks += remark
    for counter in ("slice", "average"):  # without a selection all of them belong to the image
        if counter in select:
            image, _ = _only(image, counter, select[counter], path)
    coils = int(image["coils"][0])
    if (image["coils"] != coils).any():
        raise InputError(f"{path}: its lines have different numbers of coils; they must agree")

    def others(kind: int) -> np.ndarray:
        return heads[(heads["kind"] == kind) & (heads["coils"] == coils)]

    noise = others(NOISE)
    if not len(noise) and (heads["kind"] == NOISE).any():
        remarks.append("its noise lines have another number of coils and are left out")
    navigators = others(NAVIGATOR)
    for counter in ("encoding", *IMAGES):
        same = navigators[counter] == image[counter][0]
        # Navigators of another image are better than none: the phase of a readout's two
        # directions belongs to the gradients.
        navigators = navigators[same] if same.any() else navigators
    return ChosenLines(image, others(CALIBRATION), noise, navigators, tuple(remarks))


def _only(
    image: np.ndarray, counter: str, chosen: int | None, path: Path
) -> tuple[np.ndarray, list[str]]:
    """The lines with one number of a counter, the lowest one by default, and a remark if others are
    left out."""
    numbers = np.unique(image[counter]).tolist()
    if chosen is not None and chosen not in numbers:
        raise InputError(
            f"{path} has no {counter} {chosen}; --select {counter} may be {listed(numbers)}"
        )
    number = numbers[0] if chosen is None else chosen
    remarks = [left_out(counter, number, numbers)] if len(numbers) > 1 else []
    return image[image[counter] == number], remarks


def selections(heads: np.ndarray, options: ReadOptions, path: Path) -> list[dict[str, int]]:
    """A selection for each image in a file that the options leave open; see `choose`."""
    image = heads[heads["kind"] == IMAGE]
    if not len(image):
        raise InputError(f"{path} holds no line of an image, only noise or navigators")
    encoding = options.select.get("encoding", int(image["encoding"].min()))
    image = image[image["encoding"] == encoding]
    for counter, number in options.select.items():
        image, _ = _only(image, counter, number, path)
    several = [counter for counter in IMAGES if len(np.unique(image[counter])) > 1]
    if not several:
        return [dict(options.select)]
    rows = np.unique(np.stack([image[counter] for counter in several], axis=1), axis=0)
    return [{**options.select, **dict(zip(several, row, strict=True))} for row in rows.tolist()]
