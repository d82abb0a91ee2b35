"""Commands about MRI: simulate, reconstruct, evaluate, train."""

from collections.abc import Callable
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nirvana.cli.config import ConfigArgument
from nirvana.cli.console import SEEDS, DeviceOption, JsonOption, output
from nirvana.errors import InputError
from nirvana.files import check_outputs, replaceable_folder, write_json
from nirvana.progress import ProgressLines

if TYPE_CHECKING:
    from nirvana.mri.data.simulation.config import Simulation
    from nirvana.mri.io import Scan
    from nirvana.mri.physics.masks import Sampling
    from nirvana.mri.pipeline import SliceCounter

app = typer.Typer(
    help="MRI: simulate scans, reconstruct and evaluate them, train a codec.", no_args_is_help=True
)

FORMATS = "fastMRI or ISMRMRD HDF5, BART .cfl, volumes .nii, .nii.gz, .npy."

CodecOption = Annotated[str, typer.Option(help="Folder of a codec, or a packaged one's name.")]
KindOption = Annotated[str, typer.Option("--mask", help="equispaced or random, as in fastMRI.")]
AccelerationOption = Annotated[float, typer.Option(help="All columns over sampled ones.")]
CenterOption = Annotated[float, typer.Option(help="Share of columns in the middle, all sampled.")]
WaveletOption = Annotated[bool, typer.Option(help="Reconstruct with ESPIRiT + L1-wavelet, too.")]
SenseOption = Annotated[bool, typer.Option(help="Reconstruct with ESPIRiT + SENSE, too.")]
BartOption = Annotated[
    bool, typer.Option("--bart", help="Also with BART's program, which must be installed.")
]
CoilsOption = Annotated[int, typer.Option(help="Number of simulated coils.")]
NoiseOption = Annotated[
    float | None,
    typer.Option(help="Noise over the brightest voxel; drawn from 0.002 to 0.02 if not given."),
]


@app.command()
def simulate(
    volume: Annotated[Path, typer.Argument(help="Magnitude volume: .nii, .nii.gz or .npy.")],
    out: Annotated[Path, typer.Option(help="HDF5 file to write, as fastMRI's.")],
    coils: CoilsOption = 8,
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
    scan = simulate_volume(volume, simulation_of(coils, noise), seed)
    write_scan(out, scan, source=volume.name, simulation_seed=seed)
    slices, coils, height, width = scan.kspace.shape
    print(f"{out}: {slices} slices of {height} x {width}, {coils} coils")


@app.command()
def reconstruct(
    scan: Annotated[Path, typer.Argument(help=f"Scan, full or undersampled, or folder: {FORMATS}")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    codec: CodecOption = "codec",
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[
        int, typer.Option(help="Of the mask; a folder's next scan has the next.", **SEEDS)
    ] = 0,
    coils: CoilsOption = 8,
    noise: NoiseOption = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 4,
    wavelet: WaveletOption = True,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Reconstructs a scan or a folder of them, with a picture beside the classical methods.

    A fully sampled scan is undersampled first, and the results are scored; of a scan that is
    undersampled already the mask is found, and the mask options have no effect. Of an image volume
    a scan is simulated. A folder's scans get a folder each in --out.
    """
    from nirvana.mri.evaluate.compare import finite, summarise
    from nirvana.mri.evaluate.tables import rows_table
    from nirvana.mri.io import files_of, find_scans
    from nirvana.mri.pipeline import NIRVANA, comparison_methods, prepare, reconstruct_scan
    from nirvana.packaged import folder_of

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    sampling = sampling_of(kind, acceleration, center_fraction)
    simulation = simulation_of(coils, noise)
    paths = find_scans(scan)
    folders = _folders(scan, paths, out)
    read = [*files_of(paths), folder_of(codec, "MRI codec")]
    check_outputs({"--out": out, "--json": json}, read)
    # Reads all of them once before the first reconstruction, so that a wrong file is found before
    # hours of work.
    for number, path in enumerate(paths if len(paths) > 1 else []):
        prepare(path, simulation, sampling, seed + number)
    prepared = prepare(paths[0], simulation, sampling, seed)
    model = _load(codec, device)
    scans = []
    with progress_bars() as progress:
        for number, (path, folder) in enumerate(zip(paths, folders, strict=True)):
            if number:
                prepared = prepare(path, simulation, sampling, seed + number)
            counters = slice_counters(progress, prepared.scan.name, len(prepared.kspace))
            methods = comparison_methods(
                {NIRVANA: model}, counters, wavelet=wavelet, batch_size=batch_size
            )
            scans.append(reconstruct_scan(prepared, methods, folder, codec))
    rows = [row for one in scans for row in one["results"]]
    results: dict[str, Any] = scans[0]
    if scan.is_dir():
        scored = all("ssim" in row for row in rows)
        results = {"scans": scans, "summary": summarise(rows, NIRVANA) if scored else None}
        results = finite(results)
        write_json(out / "metrics.json", results)
    if json is not None:
        write_json(json, results)
    for one in scans:
        how = "mask found in the file" if one["mask"] is None else f"{kind} mask drawn"
        print(f"{one['volume']}: {how}, {one['sampled']:.1%} of columns sampled")
    output().print(rows_table(rows))
    print(f"{out}: " + ", ".join(sorted(file.name for file in out.iterdir())))


def _folders(given: Path, paths: list[Path], out: Path) -> list[Path]:
    """The folder that each scan's results go to: `out`, or one in it for each of a folder's."""
    from nirvana.mri.pipeline import RESULT_FILES, stem

    if not given.is_dir():
        return [replaceable_folder(out, RESULT_FILES)]
    stems = [stem(path) for path in paths]
    names = [
        name if stems.count(name) == 1 else path.name
        for name, path in zip(stems, paths, strict=True)
    ]
    out = replaceable_folder(out, [*map(escape, names), "metrics.json"])
    return [replaceable_folder(out / name, RESULT_FILES) for name in names]


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
    coils: CoilsOption = 8,
    noise: NoiseOption = None,
    slices: Annotated[int, typer.Option(help="Middle slices to use; 0 takes all.")] = 0,
    wavelet: WaveletOption = True,
    sense: SenseOption = False,
    bart: BartOption = False,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Scores zero-filled, L1-wavelet and codecs on undersampled volumes.

    Several codecs are called by the names of their folders, and compared with the first.
    """
    from nirvana.mri.classical.bart import program
    from nirvana.mri.evaluate.compare import evaluate_volume, finite, summarise
    from nirvana.mri.evaluate.tables import rows_table, summary_table
    from nirvana.mri.io import files_of, find_scans
    from nirvana.mri.physics.masks import require_calibration
    from nirvana.mri.pipeline import comparison_methods, load_full_scan
    from nirvana.packaged import folder_of

    if slices < 0:
        raise InputError(f"--slices {slices} must be 0 (all) or more")
    sampling = sampling_of(kind, acceleration, center_fraction)
    simulation = simulation_of(coils, noise)
    if bart:
        program()  # a missing program is reported before anything is read
    scans = [path for given in scans for path in find_scans(given)]
    read = [*files_of(scans), *(folder_of(each, "MRI codec") for each in codec)]
    check_outputs({"--json": json}, read)

    def load(path: Path, number: int) -> "Scan":
        return load_full_scan(path, simulation, seed + number, slices)

    # Reads all of them once before the first reconstruction, so that a wrong file is found before
    # hours of work.
    for number, path in enumerate(scans):
        checked = load(path, number)
        require_calibration(sampling.mask(checked.kspace.shape[-1], seed + number), path)
    labels = _labels(codec)
    models = {label: _load(name, device) for label, name in zip(labels, codec, strict=True)}
    sizes = {label: model.num_trained for label, model in models.items()}
    rows = []
    with progress_bars() as progress:
        for number, path in enumerate(scans):
            scan = load(path, number)
            counters = slice_counters(progress, scan.name, len(scan.kspace))
            methods = comparison_methods(models, counters, wavelet=wavelet, sense=sense, bart=bart)
            scored = evaluate_volume(scan, methods, sampling, seed + number)
            rows += [{**row, "parameters": sizes.get(row["method"])} for row in scored]
    summary = summarise(rows, labels[0])
    shares = sorted({f"{row['sampled']:.1%}" for row in rows})
    print(f"{kind} {acceleration:g}x, {', '.join(shares)} of columns sampled")
    console = output()
    console.print(rows_table(rows))
    if len(scans) > 1:
        print(f"mean ± standard deviation, paired Wilcoxon against {labels[0]}: ", end="")
        print(f"{len(scans)} volumes")
        console.print(summary_table(summary))
    if json is not None:
        results = {"codec": codec, "mask": asdict(sampling), "rows": rows, "summary": summary}
        write_json(json, finite(results))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    config: ConfigArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in run.out.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume with other settings or data than before."),
    ] = False,
) -> None:
    """Trains a codec on a frozen backbone. Any setting can follow: --optim.lr 1e-3"""
    from nirvana.mri.train import task

    task.train(config, list(ctx.args), resume, accept_changes)


def simulation_of(coils: int, noise: float | None) -> "Simulation":
    """The simulator's settings that the options give."""
    from nirvana.mri.data.simulation.config import Simulation

    return Simulation(num_coils=coils) if noise is None else Simulation(coils, noise=(noise, noise))


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


def _load(codec: str, device: str) -> Any:
    from nirvana.device import choose_device
    from nirvana.mri.model.checkpoint import load_codec

    return load_codec(codec, choose_device(device))


def _labels(codecs: list[str]) -> list[str]:
    """The codecs' names in tables: Nirvana for a single one, the folders' names for several."""
    from nirvana.mri.pipeline import NIRVANA

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
