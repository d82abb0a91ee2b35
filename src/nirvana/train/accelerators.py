"""Accelerators by name: peak throughput and memory, from their data sheets."""

from dataclasses import dataclass

from nirvana.errors import InputError


@dataclass(frozen=True)
class Accelerator:
    """One device."""

    flops: float  # FLOP/s of dense bf16 matrix products
    memory: int  # bytes, in the largest version
    float8: bool = True  # whether it has matrix products in float8


def _gigabytes(number: int) -> int:
    return number * 10**9


# By a part of the name that the driver gives them; the first that fits.
ACCELERATORS = {
    "H100 PCIe": Accelerator(756e12, _gigabytes(80)),
    "H100 NVL": Accelerator(835e12, _gigabytes(94)),
    "H100": Accelerator(989e12, _gigabytes(80)),
    "GH200": Accelerator(989e12, _gigabytes(96)),
    "H200": Accelerator(989e12, _gigabytes(141)),
    "H800": Accelerator(989e12, _gigabytes(80)),
    "B200": Accelerator(2250e12, _gigabytes(180)),
    "A100": Accelerator(312e12, _gigabytes(80), float8=False),
    "A800": Accelerator(312e12, _gigabytes(80), float8=False),
    "L40S": Accelerator(362e12, _gigabytes(48)),
    "L4": Accelerator(121e12, _gigabytes(24)),
    "4090": Accelerator(165e12, _gigabytes(24)),
}


def find_accelerator(name: str) -> Accelerator | None:
    """Finds an accelerator.

    Args:
        name: as its driver gives it, "NVIDIA H200" for example, or a part of that.

    Returns:
        Its figures; None for an unknown one.
    """
    return next((each for part, each in ACCELERATORS.items() if part in name), None)


def known_accelerator(name: str) -> Accelerator:
    """Finds an accelerator that must be known.

    Args:
        name: see `find_accelerator`.

    Returns:
        Its figures.

    Raises:
        InputError: for an unknown name; the message lists the known ones.
    """
    found = find_accelerator(name)
    if found is None:
        known = ", ".join(ACCELERATORS)
        raise InputError(f"--device-name {name!r} is not known; known are {known}")
    return found
