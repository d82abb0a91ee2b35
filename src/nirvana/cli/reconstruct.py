"""`nirvana mri reconstruct`: scans to images, one or a folder of them."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from nirvana.cli import mri
from nirvana.cli.console import SEEDS, DeviceOption, JsonOption, output
from nirvana.cli.mri import (
    FORMATS,
    CenterOption,
    CodecOption,
    CoilsOption,
    CovarianceOption,
    KindOption,
    NoiseOption,
    SimulatedCoilsOption,
    SlicesOption,
    WaveletOption,
    WhitenOption,
    coil_options,
    progress_bars,
    sampling_of,
    simulation_of,
    slice_counters,
)
from nirvana.cli.reading import (
    AllOption,
    AxesOption,
    CentreOption,
    MeasurementOption,
    PhaseEncodeOption,
    SelectOption,
    VariableOption,
    read_options,
)
from nirvana.errors import InputError
from nirvana.files import check_outputs, finite, replaceable_folder, sha256, write_json

if TYPE_CHECKING:
    from nirvana.mri.batch_run import BatchResult
    from nirvana.mri.io import ReadOptions

MethodOption = Annotated[
    str,
    typer.Option(
        help="Whose images are written: nirvana (the codec), l1-wavelet, sense, grappa, "
        "zero-filled, bart-sense or bart-l1-wavelet."
    ),
]
ComplexOption = Annotated[
    bool, typer.Option("--complex", help="Also write complex images, as phases in NIfTI and DICOM.")
]
FormatsOption = Annotated[
    str, typer.Option(help="What to write, names with commas: hdf5, nifti, dicom, cfl, png.")
]
AdaptOption = Annotated[
    bool,
    typer.Option(
        "--adapt",
        help="First adapt the codec to the scan, by predicting measured lines that are held back.",
    ),
]
AdaptParametersOption = Annotated[
    str, typer.Option(help="What --adapt learns: gains, backbone or all.")
]
AdaptStepsOption = Annotated[
    int, typer.Option(help="Steps of --adapt in each of its three folds.", min=0)
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Keep results in --out that the same settings made.")
]
SkipOption = Annotated[
    bool, typer.Option("--skip", help="Leave out files that cannot be used, and list them.")
]
ShareOption = Annotated[
    bool,
    typer.Option(help="Under torchrun or in a Slurm array, each process takes a part of a folder."),
]


def reconstruct(
    scan: Annotated[Path, typer.Argument(help=f"Scan, full or undersampled, or folder: {FORMATS}")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    method: MethodOption = "nirvana",
    codec: CodecOption = "codec",
    acceleration: Annotated[
        float | None,
        typer.Option(
            help="Undersample a fully sampled scan: all columns over kept ones. If not given, all "
            "that was measured is used, and 4 of an image volume."
        ),
    ] = None,
    kind: KindOption = "equispaced",
    center_fraction: CenterOption = 0.08,
    seed: Annotated[
        int, typer.Option(help="Of the mask; a folder's next file has the next.", **SEEDS)
    ] = 0,
    coils: CoilsOption = None,
    whiten: WhitenOption = True,
    noise_covariance: CovarianceOption = None,
    slices: SlicesOption = "0",
    every: AllOption = False,
    centre: CentreOption = "auto",
    measurement: MeasurementOption = None,
    select: SelectOption = [],  # noqa: B006  (read by typer, never changed)
    phase_encode: PhaseEncodeOption = "auto",
    variable: VariableOption = None,
    axes: AxesOption = None,
    simulated_coils: SimulatedCoilsOption = 8,
    noise: NoiseOption = None,
    wavelet: WaveletOption = True,
    adapt: AdaptOption = False,
    adapt_parameters: AdaptParametersOption = "all",
    adapt_steps: AdaptStepsOption = 32,
    formats: FormatsOption = "hdf5,nifti,dicom,png",
    complex_images: ComplexOption = False,
    resume: ResumeOption = False,
    skip: SkipOption = False,
    share: ShareOption = True,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 4,
    device: DeviceOption = "auto",
    json: JsonOption = None,
) -> None:
    """Reconstructs a scan or a folder of them, with a picture beside the classical methods.

    Of an undersampled scan the mask is found, and the mask options have no effect. A fully sampled
    scan is reconstructed from all that was measured; with --acceleration it is undersampled first,
    and the results are scored. A missing side of k-space (partial Fourier, asymmetric echo) is
    completed. Of an image volume a scan is simulated, undersampled and scored. Each image of a
    folder, or of a file with --all, gets a folder in --out, which is complete or absent.
    """
    from nirvana.mri.batch_run import ScanJob, Share, local_device, run_batch, share_of
    from nirvana.mri.io import files_of, find_scans
    from nirvana.mri.io.options import parse_slices
    from nirvana.mri.io.outputs import OutputOptions, parse_formats
    from nirvana.packaged import folder_of

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    outputs = OutputOptions(parse_formats(formats), complex_images)
    reading = read_options(centre, measurement, select, phase_encode, variable, axes)
    chosen_slices = parse_slices(slices)
    ours = share_of(os.environ) if share else Share()
    weights = folder_of(codec, "MRI codec") if method == "nirvana" else None
    if adapt and weights is None:
        raise InputError(f"--adapt is for --method nirvana, not {method}")
    paths = find_scans(scan)
    check_outputs({"--out": out, "--json": json}, [*files_of(paths), weights, noise_covariance])
    several = scan.is_dir() or every
    images = _images(paths, reading, every, skip and several)
    folders = _folders(images, out, several, every)

    from nirvana.mri.adapt.adaptation import ADAPTED, AdaptedMethod
    from nirvana.mri.adapt.config import ScanAdaptConfig
    from nirvana.mri.classical.bart import program
    from nirvana.mri.methods import BART, NIRVANA, comparison_methods, method_named
    from nirvana.mri.pipeline import Preparation, PreparedScan, prepare
    from nirvana.mri.results import reconstruct_scan

    how = Preparation(
        simulation=simulation_of(simulated_coils, noise),
        sampling=sampling_of(kind, 4.0 if acceleration is None else acceleration, center_fraction),
        undersample=acceleration is not None,
        coils=coil_options(coils, whiten, noise_covariance),
        slices=chosen_slices,
    )
    chosen = method_named(method)
    adapting = ScanAdaptConfig(adapt_parameters, adapt_steps) if adapt else None  # type: ignore[arg-type]
    if chosen in BART.values():
        program()  # a missing program is reported before anything is read
    common = {
        "method": method,
        "wavelet": wavelet,
        **{key: value for key, value in asdict(how).items() if key not in ("coils", "reading")},
        "coils": coils,
        "adapt": None if adapting is None else asdict(adapting),
        "whiten": whiten and (noise_covariance is None or sha256(noise_covariance)),
        **asdict(outputs),
    }
    codecs = {}
    if weights is not None:
        codecs[NIRVANA] = mri.load_model(codec, local_device(device))
        sums = {file.name: sha256(file) for file in sorted(weights.glob("*.safetensors"))}
        common |= {"codec": codec, "weights": sums}
    jobs = [
        ScanJob(
            scan=image.path,
            files=tuple(files_of([image.path])),
            folder=folder,
            number=number,
            settings={**common, "seed": seed + image.file, "reading": asdict(image.reading)},
        )
        for number, (image, folder) in enumerate(zip(images, folders, strict=True))
    ]
    methods = comparison_methods(codecs, wavelet=wavelet, also=chosen, batch_size=batch_size)

    def prepared(job: ScanJob) -> PreparedScan:
        image = images[job.number]
        return prepare(image.path, replace(how, reading=image.reading), seed + image.file)

    def work(job: ScanJob, folder: Path) -> dict[str, Any]:
        given = prepared(job)
        # The names that files state may all be the same.
        name = job.folder.name if several else given.scan.name
        counters = slice_counters(bars, name, given.num_slices)
        applied, written, adapted = methods, chosen, None
        if adapting is not None and given.measurement.acquisition.has_gaps:
            task = bars.add_task(f"{name}: adapting", total=adapting.total_steps)
            own = replace(adapting, seed=seed + images[job.number].file)
            adapted = AdaptedMethod(
                codecs[NIRVANA], batch_size, own, progress=lambda done: bars.advance(task, done)
            )
            applied, written = {**methods, ADAPTED: adapted}, ADAPTED
        results = reconstruct_scan(given, applied, written, folder, outputs, job.settings, counters)
        record = {} if adapted is None else {"adaptation": adapted.record}
        return _named(results, name) | record

    with progress_bars() as bars:
        found = run_batch(
            *(jobs, prepared, work),
            out=out if several else None,
            resume=resume,
            skip=skip and several,
            share=ours,
            notify=lambda line: bars.console.print(line, markup=False, soft_wrap=True),
        )
    if ours.reports:
        if not found.left:
            results = _summary(found) if several else found.scans[0]
            if several:
                write_json(out / "metrics.json", results)
            if json is not None:
                write_json(json, results)
        _print(found, out)
        if found.skipped:
            raise typer.Exit(2)


class _Image(NamedTuple):
    """One image of a run."""

    path: Path
    file: int  # number of the file, from 0
    reading: "ReadOptions"


def _images(paths: list[Path], reading: "ReadOptions", every: bool, skip: bool) -> list[_Image]:
    """One image of each file, or every one. Of a file that cannot be read and is to be left out,
    one: the reason is found when it is its turn."""
    from nirvana.mri.io import selections_of

    images = []
    for number, path in enumerate(paths):
        readings = [reading]
        if every:
            try:
                readings = selections_of(path, reading)
            except InputError:
                if not skip:
                    raise
        images += [_Image(path, number, each) for each in readings]
    return images


def _folders(images: list[_Image], out: Path, several: bool, every: bool) -> list[Path]:
    """The folder that each image's results go to: `out`, or one in it."""
    from nirvana.mri.batch_run import batch_folder
    from nirvana.mri.io.options import suffix_of
    from nirvana.mri.io.outputs import RESULT_FILES
    from nirvana.mri.pipeline import distinct_names

    if not several:
        return [replaceable_folder(out, RESULT_FILES)]
    suffixes = [suffix_of(image.reading) if every else "" for image in images]
    names = distinct_names([image.path for image in images], suffixes)
    out = batch_folder(out, names)
    return [replaceable_folder(out / name, RESULT_FILES) for name in names]


def _named(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Results of a scan under the name that distinguishes it in a run."""
    rows = [{**row, "volume": name} for row in results["results"]]
    return {**results, "volume": name, "results": rows}


def _summary(found: "BatchResult") -> dict[str, Any]:
    """The contents of a folder's `metrics.json`."""
    from nirvana.mri.evaluate.compare import summarise

    rows, written = _rows(found), {one["method"] for one in found.scans}
    scored = len(written) == 1 and all("ssim" in row for row in rows)
    return finite(
        {
            "scans": found.scans,
            "skipped": [{"scan": str(path), "reason": reason} for path, reason in found.skipped],
            "summary": summarise(rows, *written) if scored else None,
        }
    )


def _rows(found: "BatchResult") -> list[dict[str, Any]]:
    return [row for one in found.scans for row in one["results"]]


def _print(found: "BatchResult", out: Path) -> None:
    """Prints a line for each scan, the table, and what was left out."""
    from nirvana.mri.batch_run import left_out
    from nirvana.mri.evaluate.tables import rows_table

    for one in found.scans:
        drawn = one["mask"]
        origin = "as measured" if drawn is None else f"{drawn['kind']} mask drawn"
        print(f"{one['volume']}: {origin}, {one['sampled']:.1%} of k-space sampled")
        for remark in one["remarks"]:
            print(f"{one['volume']}: {remark}")
    if found.scans:
        output().print(rows_table(_rows(found)))
    if found.kept:
        print(f"{found.kept} of these were finished before")
    if found.left:
        print(f"{found.left} scans are left to other processes, or to --resume")
    if out.is_dir():
        print(f"{out}: " + ", ".join(sorted(file.name for file in out.iterdir())))
    for path, reason in found.skipped:
        print(f"nirvana: {left_out(path, reason)}", file=sys.stderr)
