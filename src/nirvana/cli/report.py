"""`nirvana mri report`: reports of a scan's slices by a codec that was trained on reports."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from nirvana.cli.console import SEEDS, DeviceOption
from nirvana.cli.mri import (
    FORMATS,
    AccelerationOption,
    CenterOption,
    KindOption,
    NoiseOption,
    SimulatedCoilsOption,
    progress_bars,
    sampling_of,
    simulation_of,
)
from nirvana.cli.reading import (
    AxesOption,
    CentreOption,
    MeasurementOption,
    PhaseEncodeOption,
    SelectOption,
    VariableOption,
    read_options,
)
from nirvana.errors import InputError
from nirvana.files import check_outputs, replaceable_folder

if TYPE_CHECKING:
    from nirvana.mri.methods import SliceCounter


def report(
    scan: Annotated[Path, typer.Argument(help=f"Scan, full or undersampled: {FORMATS}")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    codec: Annotated[
        Path | None,
        typer.Option(help="Folder of a codec trained on reports; the packaged one if not given."),
    ] = None,
    image: Annotated[
        bool, typer.Option("--image", help="SCAN is a reconstruction; read its images as they are.")
    ] = False,
    slice_number: Annotated[
        int, typer.Option("--slice", help="Read this slice alone, counted from 1; 0 reads many.")
    ] = 0,
    every: Annotated[
        bool,
        typer.Option(
            "--every", help="Read also slices above and below the heights that were learned."
        ),
    ] = False,
    stripped: Annotated[
        bool, typer.Option("--stripped", help="The images show the brain without the skull.")
    ] = False,
    radiological: Annotated[
        bool,
        typer.Option(
            "--radiological",
            help="A scan that does not state its orientation has the patient's right on the left.",
        ),
    ] = False,
    centre: CentreOption = "auto",
    measurement: MeasurementOption = None,
    select: SelectOption = [],  # noqa: B006  (read by typer, never changed)
    phase_encode: PhaseEncodeOption = "auto",
    variable: VariableOption = None,
    axes: AxesOption = None,
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[
        int, typer.Option(help="Of the mask and of a volume's simulation.", **SEEDS)
    ] = 0,
    simulated_coils: SimulatedCoilsOption = 8,
    noise: NoiseOption = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 4,
    device: DeviceOption = "auto",
) -> None:
    """Writes a report of every axial slice of the cerebrum, its facts with their probabilities, and
    a picture.

    A fully sampled scan is undersampled first; of an image volume a scan is simulated, unless it is
    a reconstruction (--image). Research software, not for diagnosis.
    """
    from nirvana.device import choose_device
    from nirvana.mri.io import files_of
    from nirvana.mri.pipeline import Preparation, prepare, prepare_images
    from nirvana.mri.reports.encode import view_of
    from nirvana.mri.reports.reporter import load_reporter
    from nirvana.mri.reports.scan_report import RESULT_FILES, read_slices, write_scan_report
    from nirvana.packaged import packaged

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    if every and slice_number:
        raise InputError(f"--every reads all slices, --slice {slice_number} one; give one of them")
    check_outputs({"--out": out}, [*files_of([scan]), codec or packaged("reporter")])
    out = replaceable_folder(out, RESULT_FILES)
    if image:
        given = prepare_images(scan)
    else:
        how = Preparation(
            simulation_of(simulated_coils, noise),
            sampling_of(kind, acceleration, center_fraction),
            undersample=True,
            reading=read_options(centre, measurement, select, phase_encode, variable, axes),
        )
        given = prepare(scan, how, seed)
    view = view_of(given.scan, radiological)
    count = given.num_slices
    if not 0 <= slice_number <= count:
        raise InputError(f"--slice {slice_number} must be 1 to {count}, or 0 for many")
    slices = [slice_number - 1] if slice_number else range(count) if every else None
    reporter = load_reporter(codec or packaged("reporter"), choose_device(device))
    with progress_bars() as bars:
        found = read_slices(
            *(reporter, given.measurement, view, slices),
            stripped=stripped,
            batch_size=batch_size,
            progress=_counters(bars, given.scan.name),
        )
    name = "the packaged reporter" if codec is None else str(codec)
    write_scan_report(found, out, given, name, image=image, stripped=stripped)
    for remark in given.scan.remarks:
        print(f"{given.scan.name}: {remark}")
    print(found.text, end="")
    print(f"{out}: {', '.join(RESULT_FILES)}")


def _counters(bars: Progress, name: str) -> Callable[[str, int], "SliceCounter"]:
    """A line of progress for each part of the work on a scan."""

    def counter(part: str, total: int) -> "SliceCounter":
        task = bars.add_task(f"{name}: {part}", total=total)
        return lambda done: bars.advance(task, done)

    return counter
