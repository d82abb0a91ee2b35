"""Commands about MRI: simulate, evaluate, train; and what its other commands share."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nirvana.cli.config import AcceptChangesOption, ConfigArgument, ResumeOption
from nirvana.cli.console import SEEDS, DeviceOption, JsonOption, output
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
from nirvana.files import check_outputs, finite, write_json
from nirvana.progress import ProgressLines

if TYPE_CHECKING:
    from nirvana.mri.data.scans import CoilOptions
    from nirvana.mri.data.simulation.config import Simulation
    from nirvana.mri.io import Scan
    from nirvana.mri.methods import SliceCounter
    from nirvana.mri.physics.masks import Sampling

app = typer.Typer(
    help="MRI: simulate scans, reconstruct, evaluate and report them, train a codec.",
    no_args_is_help=True,
)

FORMATS = (
    "fastMRI or ISMRMRD HDF5, Siemens .dat, BART .cfl, .mat, .npy, .npz; volumes .nii, .nii.gz, "
    ".npy."
)

CodecOption = Annotated[str, typer.Option(help="Folder of a codec, or a packaged one's name.")]
KindOption = Annotated[str, typer.Option("--mask", help="equispaced or random, as in fastMRI.")]
AccelerationOption = Annotated[float, typer.Option(help="All columns over sampled ones.")]
CenterOption = Annotated[float, typer.Option(help="Share of columns in the middle, all sampled.")]
WaveletOption = Annotated[bool, typer.Option(help="Reconstruct with ESPIRiT + L1-wavelet, too.")]
SenseOption = Annotated[bool, typer.Option(help="Reconstruct with ESPIRiT + SENSE, too.")]
BartOption = Annotated[
    bool, typer.Option("--bart", help="Also with BART's program, which must be installed.")
]
GrappaOption = Annotated[bool, typer.Option("--grappa", help="Also with pygrappa's GRAPPA.")]
CoilsOption = Annotated[
    int | None,
    typer.Option(help="Virtual coils to compress to; 0 keeps all. If not given, at most 32."),
]
WhitenOption = Annotated[
    bool, typer.Option(help="Whiten the noise of the coils where the file states it.")
]
CovarianceOption = Annotated[
    Path | None,
    typer.Option(help="Noise covariance of the coils, complex [coils, coils], a .npy file."),
]
SimulatedCoilsOption = Annotated[int, typer.Option(help="Number of simulated coils.")]
SlicesOption = Annotated[
    str, typer.Option(help="How many slices in the middle, 0 for all; or FIRST:LAST, from 1.")
]
NoiseOption = Annotated[
    float | None,
    typer.Option(help="Noise over the brightest voxel; drawn from 0.002 to 0.02 if not given."),
]


@app.command()
def simulate(
    volume: Annotated[Path, typer.Argument(help="Magnitude volume: .nii, .nii.gz or .npy.")],
    out: Annotated[Path, typer.Option(help="HDF5 file to write, as fastMRI's.")],
    simulated_coils: SimulatedCoilsOption = 8,
    noise: NoiseOption = None,
    seed: Annotated[int, typer.Option(help="Of contrast, phase, coils and noise.", **SEEDS)] = 0,
) -> None:
    """Makes a fully sampled multi-coil scan of an image volume."""
    from nirvana.mri.io import files_of, require_simulated, write_scan
    from nirvana.mri.pipeline import simulate_volume

    if out.suffix not in (".h5", ".hdf5") or out.is_dir():
        raise InputError(f"--out {out} must be a file name that ends in .h5")
    check_outputs({"--out": out}, files_of([volume]))
    require_simulated(out)
    scan = simulate_volume(volume, simulation_of(simulated_coils, noise), seed)
    write_scan(out, scan, source=volume.name, simulation_seed=seed)
    slices, coils, height, width = scan.kspace.shape
    print(f"{out}: {slices} slices of {height} x {width}, {coils} coils")


@app.command()
def evaluate(
    scans: Annotated[
        list[Path],
        typer.Argument(help=f"Fully sampled scans, or folders of them: {FORMATS}"),
    ],
    codec: Annotated[
        list[str],
        typer.Option(help="Folder of a codec, or a packaged one's name; may be given many times."),
    ] = ["codec"],  # noqa: B006  (read by typer, never changed)
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[
        int, typer.Option(help="Of the first volume; the next has the next.", **SEEDS)
    ] = 0,
    coils: CoilsOption = None,
    whiten: WhitenOption = True,
    noise_covariance: CovarianceOption = None,
    simulated_coils: SimulatedCoilsOption = 8,
    noise: NoiseOption = None,
    slices: SlicesOption = "0",
    centre: CentreOption = "auto",
    measurement: MeasurementOption = None,
    select: SelectOption = [],  # noqa: B006
    phase_encode: PhaseEncodeOption = "auto",
    variable: VariableOption = None,
    axes: AxesOption = None,
    wavelet: WaveletOption = True,
    sense: SenseOption = False,
    grappa: GrappaOption = False,
    bart: BartOption = False,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Scores zero-filled, classical methods and codecs on undersampled volumes.

    Several codecs are called by the names of their folders, and compared with the first.
    """
    from nirvana.mri.classical.bart import program
    from nirvana.mri.data.scans import measure
    from nirvana.mri.evaluate.compare import evaluate_volume, summarise
    from nirvana.mri.evaluate.tables import rows_table, summary_table
    from nirvana.mri.io import files_of, find_scans
    from nirvana.mri.io.options import parse_slices
    from nirvana.mri.methods import comparison_methods
    from nirvana.mri.pipeline import Preparation, distinct_names, load_full_scan
    from nirvana.packaged import folder_of

    sampling = sampling_of(kind, acceleration, center_fraction)
    reading = read_options(centre, measurement, select, phase_encode, variable, axes)
    chosen = parse_slices(slices)
    if bart:
        program()  # a missing program is reported before anything is read
    scans = [path for given in scans for path in find_scans(given)]
    read = [*files_of(scans), *(folder_of(each, "MRI codec") for each in codec)]
    check_outputs({"--json": json}, [*read, noise_covariance])
    options = coil_options(coils, whiten, noise_covariance)
    how = Preparation(
        simulation_of(simulated_coils, noise), sampling, True, options, reading, chosen
    )

    names = distinct_names(scans)

    def load(path: Path, number: int) -> "Scan":
        scan = load_full_scan(path, how, seed + number)
        # The names that files state may all be the same.
        return replace(scan, name=names[number]) if len(scans) > 1 else scan

    # Reads all of them once before the first reconstruction, so that a wrong file is found before
    # hours of work.
    remarks: dict[str, list[str]] = {}
    for number, path in enumerate(scans):
        scan = load(path, number)
        checked = measure(scan, options).undersampled(sampling, seed + number)
        checked.acquisition.require_calibration()
        remarks[scan.name] = [*scan.remarks, *checked.remarks]
    labels = _labels(codec)
    models = {label: load_model(name, device) for label, name in zip(labels, codec, strict=True)}
    sizes = {label: model.num_trained for label, model in models.items()}
    rows = []
    with progress_bars() as progress:
        for number, path in enumerate(scans):
            scan = load(path, number)
            counters = slice_counters(progress, scan.name, len(scan.kspace))
            methods = comparison_methods(
                models, wavelet=wavelet, sense=sense, grappa=grappa, bart=bart
            )
            scored = evaluate_volume(scan, methods, sampling, seed + number, options, counters)
            rows += [{**row, "parameters": sizes.get(row["method"])} for row in scored]
    summary = summarise(rows, labels[0])
    shares = sorted({f"{row['sampled']:.1%}" for row in rows})
    print(f"{kind} {acceleration:g}x, {', '.join(shares)} of columns sampled")
    for name, remark in ((name, each) for name, own in remarks.items() for each in own):
        print(f"{name}: {remark}")
    console = output()
    console.print(rows_table(rows))
    if len(scans) > 1:
        print(f"mean ± standard deviation, paired Wilcoxon against {labels[0]}: ", end="")
        print(f"{len(scans)} volumes")
        console.print(summary_table(summary))
    if json is not None:
        results = {"codec": codec, "mask": asdict(sampling), "rows": rows, "summary": summary}
        results["remarks"] = remarks
        write_json(json, finite(results))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    config: ConfigArgument,
    resume: ResumeOption = False,
    accept_changes: AcceptChangesOption = False,
) -> None:
    """Trains a codec on a frozen backbone. Any setting can follow: --optim.lr 1e-3"""
    from nirvana.mri.train import task

    task.train(config, list(ctx.args), resume, accept_changes)


def simulation_of(coils: int, noise: float | None) -> "Simulation":
    """The simulator's settings that the options give."""
    from nirvana.mri.data.simulation.config import Simulation

    return Simulation(num_coils=coils) if noise is None else Simulation(coils, noise=(noise, noise))


def coil_options(count: int | None, whiten: bool, covariance: Path | None) -> "CoilOptions":
    """How the options combine the coils.

    Raises:
        InputError: the number is negative, or the file holds no square matrix of finite numbers.
    """
    from nirvana.mri.data.scans import CoilOptions, read_covariance

    given = None if covariance is None else read_covariance(covariance)
    return CoilOptions(whiten, given, count)


def sampling_of(kind: str, acceleration: float, center_fraction: float) -> "Sampling":
    """The sampling that the options give.

    Raises:
        InputError: for an unknown kind of mask.
    """
    from nirvana.mri.physics.masks import MASK_KINDS, Sampling

    for known in MASK_KINDS:
        if kind == known:
            return Sampling(known, acceleration, center_fraction)
    raise InputError(f"--mask {kind} is unknown; choose one of {', '.join(MASK_KINDS)}")


def load_model(codec: str, device: str) -> Any:
    """A codec, on a device by name.

    Raises:
        InputError: there is no such codec or device.
    """
    from nirvana.device import choose_device
    from nirvana.mri.model.checkpoint import load_codec

    return load_codec(codec, choose_device(device))


def _labels(codecs: list[str]) -> list[str]:
    """The codecs' names in tables: Nirvana for a single one, the folders' names for several."""
    from nirvana.mri.methods import NIRVANA

    if len(codecs) == 1:
        return [NIRVANA]
    names = [Path(codec).name for codec in codecs]
    if len(set(codecs)) < len(codecs):
        raise InputError("--codec was given twice with the same name")
    return names if len(set(names)) == len(names) else codecs


def slice_counters(progress: Progress, name: str, slices: int) -> Callable[[str], "SliceCounter"]:
    """A line of progress over the slices of a scan for each method, when the method begins."""

    def counter(method: str) -> "SliceCounter":
        task = progress.add_task(f"{name}: {method}", total=slices)
        return lambda done: progress.advance(task, done)

    return counter


def progress_bars() -> Progress:
    """Progress on the standard error: bars that are removed at the end, or plain lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return ProgressLines(*columns, TimeRemainingColumn())
