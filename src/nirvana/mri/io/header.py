"""The ISMRMRD header: XML with the sizes of matrix and field of view.

Only the fields that a 2D Cartesian reconstruction needs are read. A header with a document type is
refused: ISMRMRD's has none, and one could define entities that expand without bound.
"""

from dataclasses import dataclass
from xml.etree import ElementTree

MAX_CHARACTERS = 4 * 2**20


@dataclass(frozen=True)
class Space:
    """Matrix and field of view, mm, along x (readout), y (phase encoding) and z."""

    matrix: tuple[int, int, int]
    fov: tuple[float, float, float]

    @property
    def voxel(self) -> tuple[float, float, float]:
        """Size of a voxel along x, y and z, mm."""
        x, y, z = (extent / number for extent, number in zip(self.fov, self.matrix, strict=True))
        return (x, y, z)


@dataclass(frozen=True)
class Header:
    """The first encoding of a header.

    Attributes:
        encoded: the measured space.
        recon: the space of the scanner's reconstruction, without the readout's oversampling.
        trajectory: "cartesian" or another.
        center: number of the phase-encoding step in the middle of k-space; None where missing.
    """

    encoded: Space
    recon: Space
    trajectory: str
    center: int | None


def parse_header(text: str) -> Header:
    """Reads a header.

    Raises:
        ValueError: it is no such XML, or a field is missing or impossible.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it is {len(text)} characters long, more than {MAX_CHARACTERS}")
    if "<!DOCTYPE" in text:
        raise ValueError("it defines a document type, which no ISMRMRD header does")
    try:
        root = ElementTree.fromstring(text.strip("\0 \n\r\t"))
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML: {error}") from error
    encoding = root.find("{*}encoding")
    if encoding is None:
        raise ValueError("it has no 'encoding'")
    center = encoding.findtext("{*}encodingLimits/{*}kspace_encoding_step_1/{*}center")
    return Header(
        encoded=_space(encoding, "encodedSpace"),
        recon=_space(encoding, "reconSpace"),
        trajectory=encoding.findtext("{*}trajectory", "").strip().lower(),
        center=None if center is None else int(center),
    )


def _space(encoding: ElementTree.Element, name: str) -> Space:
    def numbers(kind: str) -> list[str]:
        found = [encoding.findtext(f"{{*}}{name}/{{*}}{kind}/{{*}}{axis}") for axis in "xyz"]
        if None in found:
            raise ValueError(f"its {name} has no {kind} of x, y and z")
        return [text for text in found if text is not None]

    x, y, z = (int(text) for text in numbers("matrixSize"))
    width, height, depth = (float(text) for text in numbers("fieldOfView_mm"))
    # Written so that NaN fails, too.
    if not (min(x, y, z) >= 1 and all(0 < side < 1e5 for side in (width, height, depth))):
        raise ValueError(f"its {name} has an impossible matrix or field of view")
    return Space((x, y, z), (width, height, depth))
