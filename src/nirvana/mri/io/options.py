"""How a file is read, where the file alone does not decide it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nirvana.errors import InputError

COUNTERS = ("encoding", "slice", "contrast", "phase", "repetition", "set", "average")
AXES = ("repetition", "slice", "partition", "coil", "row", "column")
"""Axes of an array; partitions are the second phase encoding of a 3D scan."""
MAX_COUNTER = 2**16


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a file, and how; the defaults take what the file states or shows.

    Attributes:
        centre: where the origin of k-space lies in the file: "auto" finds it by the energy,
            "middle" is `[H // 2, W // 2]`, "corner" `[0, 0]`, or row and column of the file.
        measurement: name or number, counted from 1, of one of several in a file; None takes the
            one of the image.
        select: counter -> number, as the file counts, of the image to read; for the rest of
            `COUNTERS` the first one of the file (averages are averaged).
        phase_encode: along what the phase encoding runs in the file; "auto" finds out by the
            missing lines, and takes "columns" where none are missing.
        variable: name of the array in files that hold several.
        axes: meaning of the array's axes in files that do not state it, a word of `AXES` each;
            None decides by their sizes.
    """

    centre: Literal["auto", "middle", "corner"] | tuple[int, int] = "auto"
    measurement: str | None = None
    select: Mapping[str, int] = field(default_factory=dict)
    phase_encode: Literal["auto", "columns", "rows"] = "auto"
    variable: str | None = None
    axes: tuple[str, ...] | None = None


def parse_read_options(
    centre: str,
    measurement: str | None,
    select: Iterable[str],
    phase_encode: str,
    variable: str | None,
    axes: str | None,
) -> ReadOptions:
    """`ReadOptions` of the texts of options, see the functions for each.

    Raises:
        InputError: an option cannot be understood.
    """
    return ReadOptions(
        centre=parse_centre(centre),
        measurement=measurement,
        select=parse_select(select),
        phase_encode=parse_phase_encode(phase_encode),
        variable=variable,
        axes=parse_axes(axes),
    )


@dataclass(frozen=True)
class SliceRange:
    """Some of a volume's slices.

    Attributes:
        middle: how many in the middle; 0 means all.
        ends: first and last slice instead, counted from 1.
    """

    middle: int = 0
    ends: tuple[int, int] | None = None

    def of(self, total: int, name: object) -> slice:
        """The slices of a volume that has `total` of them.

        Args:
            total: number of slices.
            name: of the volume, for the error.

        Raises:
            InputError: the volume does not have them.
        """
        if self.ends is not None:
            first, last = self.ends
            if last > total:
                raise InputError(f"{name} has {total} slices; --slices {first}:{last} is outside")
            return slice(first - 1, last)
        count = min(self.middle or total, total)  # fewer are no error, see `remarks`
        first = (total - count) // 2
        return slice(first, first + count)

    def remarks(self, total: int) -> tuple[str, ...]:
        """What a user must know of the choice: that a volume of `total` slices has fewer."""
        if self.ends is not None or self.middle <= total:
            return ()
        return (f"it has {total} slices, fewer than {self.middle}: all are taken",)


def parse_slices(text: str) -> SliceRange:
    """A `SliceRange` of an option's text, "COUNT" in the middle or "FIRST:LAST".

    Raises:
        InputError: it is neither.
    """
    first, colon, last = text.partition(":")
    if first.isdecimal() and not colon:
        return SliceRange(int(first))
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return SliceRange(ends=(int(first), int(last)))
    raise InputError(
        f"--slices {text} is neither a number of slices in the middle (0 for all) nor FIRST:LAST, "
        "counted from 1"
    )


def parse_centre(text: str) -> Literal["auto", "middle", "corner"] | tuple[int, int]:
    """`ReadOptions.centre` of an option's text, "auto", "middle", "corner" or "ROW,COLUMN".

    Raises:
        InputError: it is none of these.
    """
    for known in ("auto", "middle", "corner"):
        if text == known:
            return known
    numbers = text.split(",")
    if len(numbers) == 2 and all(number.strip().isdecimal() for number in numbers):
        row, column = (int(number) for number in numbers)
        return (row, column)
    raise InputError(f"--centre {text} is none of auto, middle, corner, or ROW,COLUMN as in 0,128")


def parse_phase_encode(text: str) -> Literal["auto", "columns", "rows"]:
    """`ReadOptions.phase_encode` of an option's text.

    Raises:
        InputError: it is none of the three.
    """
    for known in ("auto", "columns", "rows"):
        if text == known:
            return known
    raise InputError(f"--phase-encode {text} is none of auto, columns, rows")


def parse_select(texts: Iterable[str]) -> dict[str, int]:
    """`ReadOptions.select` of texts like "contrast=1" or "contrast=1,repetition=0".

    Raises:
        InputError: a text names no counter or no number, or a counter twice.
    """
    chosen: dict[str, int] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in COUNTERS or not number.isdecimal() or int(number) >= MAX_COUNTER:
            raise InputError(
                f"--select {part} is no COUNTER=NUMBER with one of {', '.join(COUNTERS)}, "
                "as in contrast=1"
            )
        if name in chosen:
            raise InputError(f"--select gives {name} twice")
        chosen[name] = int(number)
    return chosen


def parse_axes(text: str | None) -> tuple[str, ...] | None:
    """`ReadOptions.axes` of a text like "slice,coil,row,column".

    Raises:
        InputError: a word is none of `AXES` or repeated, or row or column is missing.
    """
    if text is None:
        return None
    words = tuple(word.strip() for word in text.split(","))
    wrong = set(words) - set(AXES) or len(set(words)) < len(words)
    if wrong or not {"row", "column"} <= {*words} or {"slice", "partition"} <= {*words}:
        raise InputError(
            f"--axes {text} must list row, column and what else the array has of "
            f"{', '.join(AXES)}, as in row,column,coil"
        )
    return words


def left_out(counter: str, chosen: int, numbers: list[int]) -> str:
    """A remark that of several images one is read.

    Args:
        counter: that differs between them.
        chosen: its number in the one that is read.
        numbers: all of its numbers in the file, ascending.
    """
    plural = "encoding spaces" if counter == "encoding" else f"{counter}s"
    return (
        f"{len(numbers)} {plural} in the file ({listed(numbers)}): {counter} {chosen} is read, the "
        f"rest is left out (--select {counter}=N{'' if counter == 'encoding' else ', --all'})"
    )


def listed(numbers: list[int]) -> str:
    """Ascending numbers in words, not longer than a line."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers[:20])) + (" ..." if len(numbers) > 20 else "")


def suffix_of(options: ReadOptions) -> str:
    """What the name of a scan gets so that those of one file differ."""
    return "".join(f"_{counter}{number}" for counter, number in options.select.items())
