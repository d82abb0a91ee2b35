"""Commands about MRI: simulate, reconstruct, evaluate, train."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nirvana.errors import InputError
from nirvana.files import atomic_folder, replaceable_folder, write_json

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

RESULTS = ("reconstruction.h5", "panel.png", "metrics.json")
TARGET, ZERO_FILLED, WAVELET, NIRVANA = "fully sampled", "zero-filled", "L1-wavelet", "Nirvana"

CodecOption = Annotated[str, typer.Option(help="Folder of a codec, or a packaged one's name.")]
KindOption = Annotated[str, typer.Option("--mask", help="equispaced or random, as in fastMRI.")]
AccelerationOption = Annotated[float, typer.Option(help="All columns over sampled ones.")]
CenterOption = Annotated[float, typer.Option(help="Share of columns in the middle, all sampled.")]
WaveletOption = Annotated[bool, typer.Option(help="Reconstruct with ESPIRiT + L1-wavelet, too.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
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
    seed: Annotated[int, typer.Option(help="Of contrast, phase, coils and noise.")] = 0,
) -> None:
    """Makes a fully sampled multi-coil scan of an image volume."""
    from nirvana.mri.io import write_scan

    if out.suffix not in (".h5", ".hdf5") or out.is_dir():
        raise InputError(f"--out {out} must be a file name that ends in .h5")
    scan = simulated(volume, _settings(coils, noise), seed)
    write_scan(out, scan, source=volume.name, simulation_seed=seed)
    slices, coils, height, width = scan.kspace.shape
    print(f"{out}: {slices} slices of {height} x {width}, {coils} coils")


@app.command()
def reconstruct(
    scan: Annotated[Path, typer.Argument(help="fastMRI HDF5 file, full or undersampled.")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    codec: CodecOption = "codec",
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[int, typer.Option(help="Of the mask.")] = 0,
    wavelet: WaveletOption = True,
    device: DeviceOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures here, too.")] = None,
) -> None:
    """Reconstructs a scan, with a picture beside the classical methods.

    A fully sampled scan is undersampled first, and the results are scored; of a scan that is
    undersampled already the mask is found, and the mask options have no say.
    """
    from nirvana.mri import evaluate as ev
    from nirvana.mri.io import read_scan, write_reconstruction
    from nirvana.mri.physics import require_calibration

    out = replaceable_folder(out, RESULTS)
    loaded = read_scan(scan)
    full = ev.is_full(loaded)
    sampling = _sampling(kind, acceleration, center_fraction)
    if full:
        kspace, mask = ev.undersample(loaded, sampling, seed)
    else:
        mask = ev.sampled_columns(loaded)
        kspace = _masked(loaded, mask)
    require_calibration(mask, scan)
    model = _load(codec, device)

    with progress_bars() as progress:
        methods = comparison(model, wavelet, progress, loaded.name, len(kspace))
        results = ev.run_methods(kspace, mask, methods)
    sampled = float(mask.float().mean())
    facts: dict[str, Any] = {"volume": loaded.name, "sampled": sampled}
    target = ev.target_of(loaded) if full else loaded.target
    if target is not None:
        rows = ev.score_rows(target, results, **facts)
    else:
        rows = [
            {**facts, "method": name, "seconds_per_slice": seconds}
            for name, (_, seconds) in results.items()
        ]
    drawn = {**asdict(sampling), "seed": seed} if full else None
    report = {"scan": str(scan), "codec": codec, "mask": drawn, "sampled": sampled}
    report = ev.finite({**report, "columns": mask.nonzero().flatten().tolist(), "results": rows})

    with atomic_folder(out) as folder:
        write_reconstruction(
            folder / "reconstruction.h5",
            results[NIRVANA][0],
            loaded,
            mask.numpy(),
            method="nirvana",
            codec=codec,
            source=scan.name,
        )
        images = {name: volume for name, (volume, _) in results.items()}
        draw_middle(folder / "panel.png", target, images, rows, loaded.name, sampled)
        if target is not None:
            write_json(folder / "metrics.json", report)
    if json is not None:
        write_json(json, report)
    how = f"{kind} mask drawn" if full else "mask found in the file"
    print(f"{loaded.name}: {how}, {sampled:.1%} of columns sampled")
    Console().print(ev.rows_table(rows))
    print(f"{out}: " + ", ".join(sorted(file.name for file in out.iterdir())))


@app.command()
def evaluate(
    scans: Annotated[
        list[Path],
        typer.Argument(help="Fully sampled scans (.h5), or volumes to simulate (.nii.gz, .npy)."),
    ],
    codec: CodecOption = "codec",
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[int, typer.Option(help="Of the first volume; the next has the next.")] = 0,
    coils: CoilsOption = 8,
    noise: NoiseOption = None,
    slices: Annotated[int, typer.Option(help="Middle slices to use; 0 takes all.")] = 0,
    wavelet: WaveletOption = True,
    device: DeviceOption = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the results here, too.")] = None,
) -> None:
    """Scores zero-filled, L1-wavelet and Nirvana on undersampled volumes."""
    from nirvana.mri import evaluate as ev
    from nirvana.mri.physics import require_calibration

    if slices < 0:
        raise InputError(f"--slices {slices} must be 0 (all) or more")
    sampling = _sampling(kind, acceleration, center_fraction)
    settings = _settings(coils, noise)

    def load(path: Path, number: int) -> "Scan":
        return _full_scan(path, settings, seed + number, slices)

    # All of them once before the first is worked on: a mistake shows before hours of work.
    for number, path in enumerate(scans):
        checked = load(path, number)
        require_calibration(sampling.mask(checked.kspace.shape[-1], seed + number), path)
    model = _load(codec, device)
    rows = []
    with progress_bars() as progress:
        for number, path in enumerate(scans):
            scan = load(path, number)
            methods = comparison(model, wavelet, progress, scan.name, len(scan.kspace))
            rows += ev.evaluate_volume(scan, methods, sampling, seed + number)
    summary = ev.summarise(rows, NIRVANA)
    shares = sorted({f"{row['sampled']:.1%}" for row in rows})
    print(f"{kind} {acceleration:g}x, {', '.join(shares)} of columns sampled")
    console = Console()
    console.print(ev.rows_table(rows))
    if len(scans) > 1:
        print(f"mean ± standard deviation, paired Wilcoxon against {NIRVANA}: {len(scans)} volumes")
        console.print(ev.summary_table(summary))
    if json is not None:
        report = {"codec": codec, "mask": asdict(sampling), "rows": rows, "summary": summary}
        write_json(json, ev.finite(report))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML file, see configs/.")],
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
    from nirvana.mri.io import read_spacing, read_volume
    from nirvana.mri.simulate import simulate_scan

    volume = _middle(read_volume(path), slices)
    if not volume.any():
        raise InputError(f"{path}: its {slices} middle slices are empty; give a larger --slices")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return simulate_scan(volume, name, seed, settings, read_spacing(path))


def _full_scan(path: Path, settings: "Simulation", seed: int, slices: int) -> "Scan":
    from nirvana.mri.evaluate import is_full
    from nirvana.mri.io import is_volume, read_scan

    if is_volume(path):
        return simulated(path, settings, seed, slices)
    scan = read_scan(path)
    if not is_full(scan):
        raise InputError(f"{path} is undersampled; only a fully sampled scan can be scored")
    target = None if scan.target is None else _middle(scan.target, slices)
    return replace(scan, kspace=_middle(scan.kspace, slices), target=target)


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


def comparison(
    model: Any, wavelet: bool, progress: Progress, name: str, slices: int
) -> dict[str, "Method"]:
    """What is compared, each with a line of progress of its own."""
    from nirvana.mri.baselines import l1_wavelet, zero_filled
    from nirvana.mri.physics import calibration_width

    def reporter(method: str) -> Callable[[int], None]:
        task = progress.add_task(f"{name}: {method}", total=slices)
        return lambda done: progress.advance(task, done)

    def with_wavelet(kspace: "Tensor", mask: "Tensor") -> Any:
        return l1_wavelet(kspace, mask, calibration_width(mask), progress=reporter(WAVELET))

    def with_nirvana(kspace: "Tensor", mask: "Tensor") -> Any:
        return model.reconstruct(kspace, mask, progress=reporter(NIRVANA))

    methods: dict[str, Method] = {ZERO_FILLED: zero_filled}
    if wavelet:
        methods[WAVELET] = with_wavelet
    return {**methods, NIRVANA: with_nirvana}


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


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
