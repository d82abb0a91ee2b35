"""Commands about MRI: simulate, reconstruct, evaluate, train."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nirvana.cli.config import ConfigArgument
from nirvana.cli.console import SEEDS, DeviceOption, JsonOption, output
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, write_json
from nirvana.progress import ProgressLines

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nirvana.mri.evaluate import Method
    from nirvana.mri.io import Scan
    from nirvana.mri.physics import Sampling
    from nirvana.mri.simulate import Simulation

app = typer.Typer(
    help="MRI: simulate scans, reconstruct and evaluate them, train a codec.", no_args_is_help=True
)

RESULTS = ("dicom", "metrics.json", "panel.png", "reconstruction.h5", "reconstruction.nii.gz")
FORMATS = "fastMRI or ISMRMRD HDF5, BART .cfl, volumes .nii, .nii.gz, .npy."
TARGET, ZERO_FILLED, SENSE = "fully sampled", "zero-filled", "SENSE"
BART = {"l2": "BART SENSE", "l1": "BART L1-wavelet"}
WAVELET, NIRVANA = "L1-wavelet", "Nirvana"

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

    if out.suffix not in (".h5", ".hdf5") or out.is_dir():
        raise InputError(f"--out {out} must be a file name that ends in .h5")
    check_outputs({"--out": out}, files_of([volume]))
    require_simulated(out)
    scan = simulated(volume, _settings(coils, noise), seed)
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
    undersampled already the mask is found, and the mask options have no say. Of an image volume
    a scan is simulated. A folder's scans get a folder each in --out.
    """
    from nirvana.mri import evaluate as ev
    from nirvana.mri.io import files_of, find_scans
    from nirvana.packaged import resolve

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    sampling = _sampling(kind, acceleration, center_fraction)
    settings = _settings(coils, noise)
    paths = find_scans(scan)
    read = [*files_of(paths), resolve(codec, "MRI codec")]
    check_outputs({"--out": out, "--json": json}, read)
    places = _places(scan, paths, out)
    # All of them once before the first is worked on: a mistake shows before hours of work.
    for number, path in enumerate(paths if len(paths) > 1 else []):
        _prepared(path, settings, sampling, seed + number)
    prepared = _prepared(paths[0], settings, sampling, seed)
    model = _load(codec, device)
    reports = []
    with progress_bars() as progress:
        for number, (path, place) in enumerate(zip(paths, places, strict=True)):
            if number:
                prepared = _prepared(path, settings, sampling, seed + number)
            slices = len(prepared.kspace)
            models = {NIRVANA: model}
            name = prepared.scan.name
            methods = comparison(models, wavelet, progress, name, slices, batch_size=batch_size)
            reports.append(_reconstructed(prepared, methods, place, codec))
    rows = [row for report in reports for row in report["results"]]
    report: dict[str, Any] = reports[0]
    if scan.is_dir():
        scored = all("ssim" in row for row in rows)
        report = {"scans": reports, "summary": ev.summarise(rows, NIRVANA) if scored else None}
        report = ev.finite(report)
        write_json(out / "metrics.json", report)
    if json is not None:
        write_json(json, report)
    for one in reports:
        how = "mask found in the file" if one["mask"] is None else f"{kind} mask drawn"
        print(f"{one['volume']}: {how}, {one['sampled']:.1%} of columns sampled")
    output().print(ev.rows_table(rows))
    print(f"{out}: " + ", ".join(sorted(file.name for file in out.iterdir())))


@dataclass(frozen=True)
class Prepared:
    """A scan ready to be reconstructed: k-space `[slices, coils, H, W]`, zero outside the mask,
    bool `[W]`, the truth where there is one, and how the mask was drawn where it was."""

    path: Path
    scan: "Scan"
    kspace: "Tensor"
    mask: "Tensor"
    target: "np.ndarray | None"
    drawn: dict[str, Any] | None


def prepared_scan(
    path: Path,
    kind: str,
    acceleration: float,
    center_fraction: float,
    coils: int,
    noise: float | None,
    seed: int,
) -> Prepared:
    """A scan or volume, undersampled where it is not so already."""
    sampling = _sampling(kind, acceleration, center_fraction)
    return _prepared(path, _settings(coils, noise), sampling, seed)


def _prepared(path: Path, settings: "Simulation", sampling: "Sampling", seed: int) -> Prepared:
    from nirvana.mri import evaluate as ev
    from nirvana.mri.physics import require_calibration

    scan = _scan(path, settings, seed)
    if ev.is_full(scan):
        kspace, mask = ev.undersample(scan, sampling, seed)
        target, drawn = ev.target_of(scan), {**asdict(sampling), "seed": seed}
    else:
        mask = ev.sampled_columns(scan)
        kspace, target, drawn = _masked(scan, mask), scan.target, None
    require_calibration(mask, path)
    return Prepared(path, scan, kspace, mask, target, drawn)


def _reconstructed(
    given: Prepared, methods: "dict[str, Method]", out: Path, codec: str
) -> dict[str, Any]:
    """Runs the methods, writes the folder of results, and returns what its metrics.json says."""
    from nirvana.mri import evaluate as ev
    from nirvana.mri.io import write_dicom, write_nifti, write_reconstruction

    scan, target = given.scan, given.target
    results = ev.run_methods(given.kspace, given.mask, methods)
    sampled = float(given.mask.float().mean())
    facts: dict[str, Any] = {"volume": scan.name, "sampled": sampled}
    if target is not None:
        rows = ev.score_rows(target, results, **facts)
    else:
        rows = [
            {**facts, "method": name, "seconds_per_slice": seconds}
            for name, (_, seconds) in results.items()
        ]
    columns = given.mask.nonzero().flatten().tolist()
    report = {"scan": str(given.path), "volume": scan.name, "codec": codec, "mask": given.drawn}
    report = ev.finite({**report, "sampled": sampled, "columns": columns, "results": rows})
    images = {name: volume for name, (volume, _) in results.items()}
    image, mask = images[NIRVANA], given.mask.numpy()
    with atomic_folder(out) as folder:
        write_reconstruction(
            folder / "reconstruction.h5",
            image,
            scan,
            mask,
            method="nirvana",
            codec=codec,
            source=given.path.name,
        )
        write_nifti(folder / "reconstruction.nii.gz", image, scan.affine, scan.spacing)
        (folder / "dicom").mkdir()
        write_dicom(folder / "dicom", image, scan, f"nirvana {codec}, {sampled:.1%} sampled")
        draw_middle(folder / "panel.png", target, images, rows, scan.name, sampled)
        write_json(folder / "metrics.json", report)
    return report


def _places(given: Path, paths: list[Path], out: Path) -> list[Path]:
    """The folder that each scan's results go to: `out`, or one in it for each of a folder's."""
    if not given.is_dir():
        return [replaceable_folder(out, RESULTS)]
    stems = [_stem(path) for path in paths]
    names = [
        stem if stems.count(stem) == 1 else path.name
        for stem, path in zip(stems, paths, strict=True)
    ]
    out = replaceable_folder(out, [*map(escape, names), "metrics.json"])
    return [replaceable_folder(out / name, RESULTS) for name in names]


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


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
    from nirvana.mri import evaluate as ev
    from nirvana.mri.io import files_of, find_scans
    from nirvana.mri.physics import require_calibration
    from nirvana.mri.toolbox import program
    from nirvana.packaged import resolve

    if slices < 0:
        raise InputError(f"--slices {slices} must be 0 (all) or more")
    sampling = _sampling(kind, acceleration, center_fraction)
    settings = _settings(coils, noise)
    if bart:
        program()  # told before anything is read
    scans = [path for given in scans for path in find_scans(given)]
    read = [*files_of(scans), *(resolve(each, "MRI codec") for each in codec)]
    check_outputs({"--json": json}, read)

    def load(path: Path, number: int) -> "Scan":
        return _full_scan(path, settings, seed + number, slices)

    # All of them once before the first is worked on: a mistake shows before hours of work.
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
            methods = comparison(
                models, wavelet, progress, scan.name, len(scan.kspace), sense, bart
            )
            scored = ev.evaluate_volume(scan, methods, sampling, seed + number)
            rows += [{**row, "parameters": sizes.get(row["method"])} for row in scored]
    summary = ev.summarise(rows, labels[0])
    shares = sorted({f"{row['sampled']:.1%}" for row in rows})
    print(f"{kind} {acceleration:g}x, {', '.join(shares)} of columns sampled")
    console = output()
    console.print(ev.rows_table(rows))
    if len(scans) > 1:
        print(f"mean ± standard deviation, paired Wilcoxon against {labels[0]}: ", end="")
        print(f"{len(scans)} volumes")
        console.print(ev.summary_table(summary))
    if json is not None:
        report = {"codec": codec, "mask": asdict(sampling), "rows": rows, "summary": summary}
        write_json(json, ev.finite(report))


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
    from nirvana.mri.train import train as train_codec

    train_codec(config, list(ctx.args), resume, accept_changes)


def _settings(coils: int, noise: float | None) -> "Simulation":
    from nirvana.mri.simulate import Simulation

    return Simulation(num_coils=coils) if noise is None else Simulation(coils, noise=(noise, noise))


def _sampling(kind: str, acceleration: float, center_fraction: float) -> "Sampling":
    from nirvana.mri.physics import MASK_KINDS, Sampling

    for known in MASK_KINDS:
        if kind == known:
            return Sampling(known, acceleration, center_fraction)
    raise InputError(f"--mask {kind} is unknown; choose one of {', '.join(MASK_KINDS)}")


def simulated(path: Path, settings: "Simulation", seed: int, slices: int = 0) -> "Scan":
    """A scan of an image volume, or of its `slices` middle slices."""
    from nirvana.mri.io import read_affine, read_spacing, read_volume
    from nirvana.mri.io.geometry import shifted
    from nirvana.mri.simulate import simulate_scan

    whole, affine = read_volume(path), read_affine(path)
    volume = _middle(whole, slices)
    if not volume.any():
        raise InputError(f"{path}: its {slices} middle slices are empty; give a larger --slices")
    if affine is not None:
        affine = shifted(affine, slices=(len(whole) - len(volume)) // 2)
    scan = simulate_scan(volume, _stem(path), seed, settings, read_spacing(path))
    return replace(scan, affine=affine)


def _scan(path: Path, settings: "Simulation", seed: int, slices: int = 0) -> "Scan":
    """The scan in a file, or one simulated of the volume in it."""
    from nirvana.mri.io import is_volume, read_scan
    from nirvana.mri.physics import require_columns

    if is_volume(path):
        return simulated(path, settings, seed, slices)
    scan = read_scan(path)
    require_columns(scan.kspace, path)
    return scan


def _full_scan(path: Path, settings: "Simulation", seed: int, slices: int) -> "Scan":
    from nirvana.mri.evaluate import is_full
    from nirvana.mri.io import is_volume
    from nirvana.mri.io.geometry import shifted

    scan = _scan(path, settings, seed, slices)
    if is_volume(path):
        return scan
    if not is_full(scan):
        raise InputError(f"{path} is undersampled; only a fully sampled scan can be scored")
    kspace = _middle(scan.kspace, slices)
    target = None if scan.target is None else _middle(scan.target, slices)
    affine = scan.affine
    if affine is not None:
        affine = shifted(affine, slices=(len(scan.kspace) - len(kspace)) // 2)
    return replace(scan, kspace=kspace, target=target, affine=affine)


def _middle(volume: "np.ndarray", slices: int) -> "np.ndarray":
    """The `slices` middle ones along the first axis, all for 0."""
    if slices == 0 or slices >= len(volume):
        return volume
    first = (len(volume) - slices) // 2
    return volume[first : first + slices]


def _masked(scan: "Scan", mask: "Tensor") -> "Tensor":
    import torch

    if not mask.any():
        raise InputError(f"{scan.name}: its mask keeps no column of k-space")
    return torch.from_numpy(scan.kspace) * mask


def _load(codec: str, device: str) -> Any:
    from nirvana.mri.model import load_codec
    from nirvana.train.world import choose_device

    return load_codec(codec, choose_device(device))


def _labels(codecs: list[str]) -> list[str]:
    """What codecs are called in tables: a single one Nirvana, several by their folders."""
    if len(codecs) == 1:
        return [NIRVANA]
    names = [Path(codec).name for codec in codecs]
    if len(set(codecs)) < len(codecs):
        raise InputError("--codec was given twice with the same name")
    return names if len(set(names)) == len(names) else codecs


def comparison(
    models: dict[str, Any],
    wavelet: bool,
    progress: Progress,
    name: str,
    slices: int,
    sense: bool = False,
    bart: bool = False,
    batch_size: int = 4,
) -> dict[str, "Method"]:
    """What is compared, each with a line of progress of its own."""
    from nirvana.mri.baselines import l1_wavelet, zero_filled
    from nirvana.mri.baselines import sense as sense_image
    from nirvana.mri.physics import calibration_width
    from nirvana.mri.toolbox import bart_pics

    def reporter(method: str) -> Callable[[int], None]:
        task = progress.add_task(f"{name}: {method}", total=slices)
        return lambda done: progress.advance(task, done)

    def with_wavelet(kspace: "Tensor", mask: "Tensor") -> Any:
        return l1_wavelet(kspace, mask, calibration_width(mask), progress=reporter(WAVELET))

    def with_sense(kspace: "Tensor", mask: "Tensor") -> Any:
        return sense_image(kspace, mask, calibration_width(mask), progress=reporter(SENSE))

    def with_bart(norm: Any) -> "Method":
        report = reporter(BART[norm])
        return lambda kspace, mask: bart_pics(
            kspace, mask, calibration_width(mask), norm, progress=report
        )

    def with_codec(label: str, model: Any) -> "Method":
        return lambda kspace, mask: model.reconstruct(kspace, mask, batch_size, reporter(label))

    methods: dict[str, Method] = {ZERO_FILLED: zero_filled}
    if sense:
        methods[SENSE] = with_sense
    if wavelet:
        methods[WAVELET] = with_wavelet
    if bart:
        methods |= {name: with_bart(norm) for norm, name in BART.items()}
    return methods | {label: with_codec(label, model) for label, model in models.items()}


def progress_bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return ProgressLines(*columns, TimeRemainingColumn())


def draw_middle(
    path: Path,
    target: "np.ndarray | None",
    volumes: "dict[str, np.ndarray]",
    rows: list[dict[str, Any]],
    name: str,
    sampled: float,
) -> None:
    """The middle slice of every method, and of the target, cropped to the target."""
    from nirvana.mri.figure import panel
    from nirvana.mri.metrics import centre_crop

    shown = dict(volumes) if target is None else {TARGET: target, **volumes}
    size = next(iter(shown.values())).shape[-2:]
    middle = len(next(iter(shown.values()))) // 2
    panel(
        path,
        {key: centre_crop(volume[middle], size) for key, volume in shown.items()},
        None if target is None else TARGET,
        None if target is None else {row["method"]: row for row in rows},
        f"{name}, slice {middle + 1}, {sampled:.1%} of columns sampled",
    )
