"""The options of commands that read scans: where a file alone does not decide how it is read."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nirvana.mri.io import ReadOptions

CentreOption = Annotated[
    str, typer.Option(help="Origin of k-space in the file: auto, middle, corner, or ROW,COLUMN.")
]
MeasurementOption = Annotated[
    str | None,
    typer.Option(help="Name or number (from 1) of a measurement, of a file with several."),
]
SelectOption = Annotated[
    list[str],
    typer.Option(help="Image to read, by the file's counters, such as contrast=1; repeatable."),
]
AllOption = Annotated[
    bool, typer.Option("--all", help="Every contrast, phase, repetition and set of a file.")
]
PhaseEncodeOption = Annotated[
    str, typer.Option(help="Phase encoding in the file: auto, or along its columns or rows.")
]
VariableOption = Annotated[
    str | None, typer.Option(help="Name of the array, of a file with several (HDF5, .mat, .npz).")
]
AxesOption = Annotated[
    str | None,
    typer.Option(help="Meaning of an array's axes (.mat, .npy, .npz, HDF5): row,column,coil,slice"),
]


def read_options(
    centre: str,
    measurement: str | None,
    select: list[str],
    phase_encode: str,
    variable: str | None,
    axes: str | None,
) -> "ReadOptions":
    """How the options of a command want scans to be read.

    Raises:
        InputError: an option cannot be understood.
    """
    from nirvana.mri.io.options import parse_read_options

    return parse_read_options(centre, measurement, select, phase_encode, variable, axes)
