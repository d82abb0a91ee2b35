"""Facts of a slice and the sentences that state them; each determines the other exactly.

A wording is a template for one lesion, one for several, and a sentence for none. Every wording
states the number of lesions before the other facts, because its form depends on it. Place and size
are those of the largest lesion. Sides are the patient's (see `lobes`); where the orientation of the
images is unknown a report has "left or right" in the place of a side.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nirvana.errors import InputError
from nirvana.mri.anatomy.lesions import MAX_COUNT, SIGNALS, TYPES
from nirvana.mri.anatomy.lobes import LOBES, SIDES

SLOTS = ("count", "type", "side", "lobe", "size", "signal")
KINDS = tuple(kind.name for kind in TYPES)
NUMBERS = ("one", "two", "three", "four", "five")
SIZES = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
"""Sizes in mm that longest diameters are rounded to, about evenly spaced in their logarithm."""
LARGEST_SIZE = 200
UNKNOWN_SIDE = "left or right"
assert len(NUMBERS) == MAX_COUNT


@dataclass(frozen=True)
class Facts:
    """The content of a report.

    Attributes:
        finding: whether there is a lesion; without one all other facts are None.
        count: number of lesions, 1 to 5.
        type: one of `KINDS`.
        side: the patient's, "left" or "right", of the largest lesion; None where it is unknown.
        lobe: one of `LOBES`, of the largest lesion.
        size: longest diameter of the largest lesion in whole mm, 1 to 200.
        signal: one of `SIGNALS`, relative to normal brain.

    Raises:
        InputError: a value is none of these, or there are facts without a finding.
    """

    finding: bool
    count: int | None = None
    type: str | None = None
    side: str | None = None
    lobe: str | None = None
    size: int | None = None
    signal: str | None = None

    def __post_init__(self) -> None:
        for slot in SLOTS:
            value = getattr(self, slot)
            if not self.finding:
                if value is not None:
                    raise InputError(f"{slot} = {value!r} without a finding; it must be left out")
            elif slot == "side" and value is None:
                continue
            elif isinstance(value, bool) or value not in VALUES[slot]:
                raise InputError(f"{slot} = {value!r} is no {slot} that a report can have")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


NORMAL = Facts(finding=False)
VALUES: dict[str, tuple | range] = {
    "count": range(1, MAX_COUNT + 1),
    "type": KINDS,
    "side": SIDES,
    "lobe": LOBES,
    "size": range(1, LARGEST_SIZE + 1),
    "signal": SIGNALS,
}
"""Fact -> its possible values."""


@dataclass(frozen=True)
class Wording:
    """Templates; {count} is a word, {Count} the same with a capital, {types} the plural."""

    one: str
    several: str
    none: str


WORDINGS = (
    Wording(
        "{Count} {signal} {type} in the {side} {lobe} lobe, measuring {size} mm.",
        "{Count} {signal} {types}, the largest in the {side} {lobe} lobe, measuring {size} mm.",
        "No focal lesion.",
    ),
    Wording(
        "There is {count} {type} in the {side} {lobe} lobe. It is {signal} and has a diameter of "
        "{size} mm.",
        "There are {count} {types}. The largest lies in the {side} {lobe} lobe, is {signal} and "
        "has a diameter of {size} mm.",
        "There is no focal lesion.",
    ),
    Wording(
        "Focal lesions: {count}. Type: {type}. Side: {side}. Lobe: {lobe}. Size: {size} mm. "
        "Signal: {signal}.",
        "Focal lesions: {count}. Type: {type}. Side of the largest: {side}. Lobe: {lobe}. Size: "
        "{size} mm. Signal: {signal}.",
        "Focal lesions: none.",
    ),
    Wording(
        "{Count} focal lesion of {size} mm, {signal}, consistent with {type}, in the {side} {lobe} "
        "lobe.",
        "{Count} focal lesions, the largest of {size} mm, {signal}, consistent with {type}, in the "
        "{side} {lobe} lobe.",
        "No focal lesions.",
    ),
    Wording(
        "We see {count} focal lesion. On the {side}, in the {lobe} lobe, it is {size} mm wide and "
        "{signal}: {type}.",
        "We see {count} focal lesions. On the {side}, in the {lobe} lobe, the largest is {size} mm "
        "wide and {signal}: {type}.",
        "We see no focal lesion.",
    ),
    Wording(
        "Impression: {count} {type} of the {side} {lobe} lobe ({size} mm, {signal}).",
        "Impression: {count} {types}, the largest of the {side} {lobe} lobe ({size} mm, {signal}).",
        "Impression: no focal lesion.",
    ),
)
FIELD = re.compile(r"\{(\w+)\}")


def rounded(size: float) -> int:
    """The entry of `SIZES` with the smallest ratio to `size` (mm); the smaller one of two."""
    return min(SIZES, key=lambda entry: max(entry / size, size / entry))


def pieces(facts: Facts, wording: int) -> list[tuple[str | None, str]]:
    """The pieces of a report, whose texts join to the whole text.

    Args:
        facts: of the slice.
        wording: an index in `WORDINGS`.

    Returns:
        (fact or None, text) in the order of the text.

    Raises:
        InputError: the wording does not exist.
    """
    if not 0 <= wording < len(WORDINGS):
        raise InputError(f"wording {wording} does not exist; choose 0 to {len(WORDINGS) - 1}")
    chosen = WORDINGS[wording]
    if not facts.finding:
        return [(None, chosen.none)]
    template = chosen.one if facts.count == 1 else chosen.several
    parts: list[tuple[str | None, str]] = []
    for number, part in enumerate(FIELD.split(template)):
        if number % 2 == 0:
            if part:
                parts.append((None, part))
        else:
            slot = _slot(part)
            parts.append((slot, _word(part, getattr(facts, slot))))
    return parts


def write(facts: Facts, wording: int = 0) -> str:
    """The report of `facts` in a wording, an index in `WORDINGS`."""
    return "".join(text for _, text in pieces(facts, wording))


def parse(text: str) -> Facts:
    """The facts of a report in any wording.

    Raises:
        InputError: no wording gives this text.
    """
    return parse_wording(text)[0]


def parse_wording(text: str) -> tuple[Facts, int]:
    """The facts of a report and the index of its wording; see `parse`."""
    for wording, plural, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        values = {_slot(name): _value(name, word) for name, word in match.groupdict().items()}
        if plural is None:
            return NORMAL, wording
        if (values["count"] > 1) == plural and values["size"] <= LARGEST_SIZE:
            return Facts(finding=True, **values), wording
    raise InputError(f"not a report of this grammar: {text[:80]!r}")


def _slot(name: str) -> str:
    """The fact of a template's field."""
    return "type" if name == "types" else name.lower()


def _word(name: str, value: Any) -> str:
    """The text of a fact in a template's field."""
    if name == "count":
        return NUMBERS[value - 1]
    if name == "Count":
        return NUMBERS[value - 1].capitalize()
    if name == "types":
        return _plural(value)
    if name == "side" and value is None:
        return UNKNOWN_SIDE
    return str(value)


def _plural(kind: str) -> str:
    if kind == "encephalomalacia":
        return "areas of encephalomalacia"
    return kind + ("es" if kind.endswith("s") else "s")


def _value(name: str, word: str) -> Any:
    """The inverse of `_word`."""
    if name in ("count", "Count"):
        return NUMBERS.index(word.lower()) + 1
    if name == "types":
        return next(kind for kind in KINDS if _plural(kind) == word)
    if word == UNKNOWN_SIDE:
        return None
    return int(word) if name == "size" else word


def _patterns() -> Iterator[tuple[int, bool | None, re.Pattern[str]]]:
    """(wording, whether it is the plural, pattern); the sentence without finding has None."""
    for number, wording in enumerate(WORDINGS):
        yield number, None, re.compile(re.escape(wording.none))
        for plural, template in ((False, wording.one), (True, wording.several)):
            parts = FIELD.split(template)
            for index in range(1, len(parts), 2):
                name = parts[index]
                parts[index] = f"(?P<{name}>{'|'.join(_words(name))})"
            parts[::2] = map(re.escape, parts[::2])
            yield number, plural, re.compile("".join(parts))


def _words(name: str) -> list[str]:
    """Patterns of the possible texts of a field; sizes have no leading zeros."""
    if name == "size":
        return ["[1-9][0-9]{0,2}"]
    if name == "side":
        return [UNKNOWN_SIDE, *SIDES]
    return [re.escape(_word(name, value)) for value in VALUES[_slot(name)]]


_PATTERNS = tuple(_patterns())
