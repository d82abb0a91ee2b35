"""The room of scans: reconstructs one with several methods, shows a slice, writes the results."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from nirvana.app.config import MIB, AppConfig
from nirvana.app.pictures import (
    ERROR_COLOURS,
    Window,
    coloured,
    error_scale,
    figure,
    grid,
    scale_bar,
    side_letters,
    white_of,
)
from nirvana.app.sessions import Session
from nirvana.app.work import Models, Watch
from nirvana.errors import InputError
from nirvana.files import write_json
from nirvana.mri.adapt.adaptation import ADAPTED, AdaptedMethod
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.data.example import SIMULATION, example_volume
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import centre_crop
from nirvana.mri.io import ReadOptions, in_file_axes, is_volume, read_volume
from nirvana.mri.io.options import SliceRange
from nirvana.mri.io.outputs import OutputOptions, parse_formats
from nirvana.mri.io.scan import at_most
from nirvana.mri.methods import GRAPPA, NIRVANA, SENSE, WAVELET, comparison_methods
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.pipeline import Preparation, PreparedScan, prepare
from nirvana.mri.results import TARGET, Comparison, compare_methods, write_results

ROOM = "scan"
BATCH_SIZE = 4  # slices that a codec reconstructs at once
BYTES_PER_POINT = 8  # of complex64 k-space
SCORES = {"ssim": "SSIM {:.3f}", "psnr": "PSNR {:.1f} dB", "nmse": "NMSE {:.4f}"}


@dataclass(frozen=True)
class ScanRequest:
    """What is done to a scan.

    Attributes:
        methods: of `WAVELET`, `SENSE`, `GRAPPA` and `NIRVANA`; zero-filled always is one.
        sampling: of a fully sampled scan, or None, which leaves out nothing.
        seed: of the mask, and of the simulation of a volume.
        slices: which ones.
        reading: how a file of k-space is read.
    """

    methods: Sequence[str] = (NIRVANA,)
    sampling: Sampling | None = field(default_factory=Sampling)
    seed: int = 0
    slices: SliceRange = field(default_factory=SliceRange)
    reading: ReadOptions = field(default_factory=ReadOptions)


@dataclass(frozen=True)
class ScanResult:
    """A reconstructed scan, as its pictures need it.

    Attributes:
        found: the reconstructions.
        request: what was done.
        shown: name -> float32 `[slices, H, W]`, see `Comparison.shown`.
        white: the value that is shown as white.
        error: the end of the colour scale of the errors, a share of white, or None where there is
            no target.
        codec: folder or packaged name of the codec.
    """

    found: Comparison
    request: ScanRequest
    shown: dict[str, np.ndarray]
    white: float
    error: float | None
    codec: str

    @property
    def num_slices(self) -> int:
        """Number of slices that can be shown."""
        return len(next(iter(self.shown.values())))


def prepare_scan(
    session: Session,
    config: AppConfig,
    sampling: Sampling | None,
    seed: int,
    slices: SliceRange,
    reading: ReadOptions,
) -> PreparedScan:
    """The session's upload, or the example, ready to be reconstructed.

    Args:
        session: of the page.
        config: its limits.
        sampling: see `ScanRequest`; this and the next three.
        seed: see above.
        slices: see above.
        reading: see above.

    Raises:
        InputError: the file is no scan, or larger than the page reads.
    """
    path = session.scan or example_volume()
    simulation = SIMULATION if session.scan is None else Simulation()
    how = Preparation(
        simulation,
        sampling or Sampling(acceleration=1.0),
        sampling is not None,
        None,
        reading,
        slices,
    )
    with at_most(config.max_bytes):
        if is_volume(path):
            _require_room(path, simulation.num_coils, slices, config)
        return prepare(path, how, seed)


def _require_room(path: Path, coils: int, slices: SliceRange, config: AppConfig) -> None:
    """Refuses a volume whose simulated scan would be larger than what is read of a file."""
    shape = read_volume(path).shape
    count = len(range(shape[0])[slices.of(shape[0], path)])
    size = count * coils * shape[1] * shape[2] * BYTES_PER_POINT
    if size > config.max_bytes:
        raise InputError(
            f"{path}: a scan of {coils} coils simulated of {count} slices of {shape[1]} x "
            f"{shape[2]} takes {size / MIB:.0f} MiB; this page computes at most {config.max_mb}: "
            "choose fewer slices"
        )


def reconstruct(session: Session, models: Models, request: ScanRequest, watch: Watch) -> ScanResult:
    """Reconstructs the session's scan, and keeps the result in the session.

    Args:
        session: of the page.
        models: of the page.
        request: what is done.
        watch: progress and limits.

    Raises:
        InputError: the scan cannot be read or reconstructed, or a limit was reached.
    """
    watch.show("reading the scan")
    prepared = prepare_scan(
        *(session, models.config, request.sampling, request.seed, request.slices, request.reading)
    )
    chosen = request.methods
    codecs = {}
    if {NIRVANA, ADAPTED} & set(chosen) and prepared.measurement.acquisition.has_gaps:
        watch.show("loading the codec")
        codecs = {name: models.codec() for name in (NIRVANA, ADAPTED) if name in chosen}
    methods = comparison_methods(
        codecs,
        wavelet=WAVELET in chosen,
        sense=SENSE in chosen,
        grappa=GRAPPA in chosen,
        batch_size=BATCH_SIZE,
    )
    names = list(methods)
    adapt = ScanAdaptConfig(seed=request.seed)
    if ADAPTED in methods:
        adapted = AdaptedMethod(codecs[ADAPTED], BATCH_SIZE, adapt)
        methods[ADAPTED] = adapted

    def progress(name: str):
        number = names.index(name) if name in names else 0
        share = (number / len(names), (number + 1) / len(names))
        if name != ADAPTED:
            return watch.counter(f"{name}, slices", prepared.num_slices, *share)
        half = sum(share) / 2
        adapted.progress = watch.counter(f"{name}, steps", adapt.total_steps, share[0], half)
        slices = cache(
            lambda: watch.counter(f"{name}, slices", prepared.num_slices, half, share[1])
        )
        return lambda done: slices()(done)  # whose line is shown when the steps are done

    found = compare_methods(prepared, methods, progress)
    shown = found.shown
    white = white_of(next(iter(shown.values())))
    result = ScanResult(
        found,
        request,
        shown,
        white,
        error_scale(shown, TARGET, white) if TARGET in shown else None,
        models.config.codec,
    )
    watch.check()
    session.results[ROOM] = result
    return result


def result_of(session: Session) -> ScanResult:
    """What `reconstruct` kept.

    Raises:
        InputError: nothing yet.
    """
    if ROOM not in session.results:
        raise InputError("nothing was reconstructed yet: choose a scan and press Reconstruct")
    return session.results[ROOM]


def slice_html(result: ScanResult, number: int, window: Window) -> str:
    """One slice by every method, and below each its error, all on one scale.

    Args:
        result: of `reconstruct`.
        number: of the slice, counted from 1.
        window: grey scale and part.
    """
    index = min(max(number, 1), result.num_slices) - 1
    first = next(iter(result.shown.values()))
    size, white = first.shape[-2:], result.white
    _, spacing, affine = in_file_axes(first, result.found.prepared.scan)
    aspect = 1.0 if spacing is None else spacing[1] / spacing[2]
    sides = side_letters(affine)
    images = {name: centre_crop(volume[index], size) for name, volume in result.shown.items()}
    scores = _slice_scores(result, index)
    pictures = [
        figure(window.grey(image, white), name, scores.get(name, ""), sides, aspect)
        for name, image in images.items()
    ]
    rows, below = [pictures], ""
    if result.error is not None:
        errors = [""]
        for name in list(images)[1:]:
            error = window.part(np.abs(images[name] - images[TARGET])) / white
            pixels = coloured(error, 0, result.error, ERROR_COLOURS)
            errors.append(figure(pixels, f"error of {name}", aspect=aspect))
        rows.append(errors)
        end = f"{100 * result.error:.0f} % of white, and more"
        title = "absolute error, one scale for all methods and slices"
        below = scale_bar(ERROR_COLOURS, "0", end, title)
    return grid(rows, len(pictures), below)


def _slice_scores(result: ScanResult, index: int) -> dict[str, str]:
    """Method -> the scores of the slice that is shown, in words."""
    from nirvana.mri.evaluate.metrics import score

    if TARGET not in result.shown:
        return {}
    found = {}
    target = result.shown[TARGET][index : index + 1]
    if not target.any():
        return {}
    for name, volume in result.shown.items():
        if name != TARGET:
            values = score(target, volume[index : index + 1])
            words = (form.format(values[key]) for key, form in SCORES.items())
            found[name] = "this slice: " + ", ".join(words)
    return found


def table_of(result: ScanResult) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the volume's scores, as the command line prints them."""
    from nirvana.mri.evaluate.tables import FORMATS, heading

    rows = result.found.rows
    keys = [key for key in FORMATS if all(key in row for row in rows)]
    headings = ["method", *(heading(key).replace("\n", " ") for key in keys)]
    return headings, [
        [row["method"], *(FORMATS[key].format(row[key]) for key in keys)] for row in rows
    ]


def describe(result: ScanResult) -> list[str]:
    """Lines about the scan: its size, its sampling, and the remarks of its reader."""
    prepared = result.found.prepared
    slices, height, width = next(iter(result.shown.values())).shape
    drawn = prepared.drawn
    origin = "as measured" if drawn is None else f"{drawn['kind']} mask drawn"
    lines = [
        f"{prepared.scan.name}: {slices} slices of {height} x {width}, {origin}, "
        f"{prepared.sampled:.1%} of k-space sampled"
    ]
    return lines + list(prepared.scan.remarks)


def write_files(session: Session, formats: str, watch: Watch) -> list[Path]:
    """Writes every method's images as files to download, in place of those before.

    Args:
        session: with a result.
        formats: see `io.outputs.parse_formats`.
        watch: progress and limits.

    Returns:
        For each method a file of every format (DICOM's as a ZIP archive), the picture, the
        figures, and a ZIP archive of all.

    Raises:
        InputError: there is no result, or no format.
    """
    result = result_of(session)
    options = OutputOptions(parse_formats(formats))
    names = [name for name in result.shown if name != TARGET]
    folder = session.new_folder("files")
    settings = {"request": asdict(result.request)}
    counter = watch.counter("writing, methods", len(names))
    written: list[Path] = []
    whole = folder / "all"
    for name in names:
        own = whole / name.lower().replace(" ", "-")
        own.mkdir(parents=True)
        # The picture shows every method and is written once.
        kinds = tuple(kind for kind in options.formats if kind != "png" or name == names[-1])
        codec = {"codec": result.codec} if name == NIRVANA else {}
        figures = write_results(
            result.found, name, own, replace(options, formats=kinds), settings | codec
        )
        written += _collect(own, folder)
        counter(1)
    figures["scan"] = result.found.prepared.path.name
    figures.pop("method")
    write_json(whole / "metrics.json", figures)
    shutil.copyfile(whole / "metrics.json", folder / "metrics.json")
    panel = folder / "panel.png"
    archive = Path(shutil.make_archive(str(folder / "all-results"), "zip", whole))
    shutil.rmtree(whole)
    written = [file for file in written if file != panel]
    return [archive, *([panel] if panel.exists() else []), folder / "metrics.json", *written]


def _collect(own: Path, folder: Path) -> list[Path]:
    """Copies a method's files to one folder under names of their own, folders as ZIP archives."""
    found = []
    for file in sorted(own.iterdir()):
        if file.is_dir():
            base = folder / f"{own.name}-{file.name}"
            found.append(Path(shutil.make_archive(str(base), "zip", file)))
        elif file.name == "panel.png":
            found.append(Path(shutil.copyfile(file, folder / file.name)))
        else:
            name = file.name.replace("reconstruction", own.name, 1)
            found.append(Path(shutil.copyfile(file, folder / name)))
    return found
