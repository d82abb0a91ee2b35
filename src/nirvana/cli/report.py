"""`nirvana mri report`: what a codec that learned from reports says about a scan."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nirvana.cli.mri import (
    FORMATS,
    AccelerationOption,
    CenterOption,
    CoilsOption,
    DeviceOption,
    KindOption,
    NoiseOption,
    Prepared,
    prepared_scan,
    progress_bars,
)
from nirvana.errors import InputError
from nirvana.files import atomic_folder, replaceable_folder, write_json

if TYPE_CHECKING:
    import numpy as np

    from nirvana.mri.report.encode import View
    from nirvana.mri.report.reporter import Reading

RESULTS = ("panel.png", "report.json", "report.txt")


def report(
    scan: Annotated[Path, typer.Argument(help=f"Scan, full or undersampled: {FORMATS}")],
    codec: Annotated[str, typer.Option(help="Folder of a codec that was trained on reports.")],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced as a whole.")],
    image: Annotated[
        bool, typer.Option("--image", help="SCAN is a reconstruction; read its images as they are.")
    ] = False,
    slice_number: Annotated[
        int, typer.Option("--slice", help="Read this slice alone, counted from 1; 0 reads all.")
    ] = 0,
    stripped: Annotated[
        bool, typer.Option("--stripped", help="The images show the brain without the skull.")
    ] = False,
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[int, typer.Option(help="Of the mask and of a volume's simulation.")] = 0,
    coils: CoilsOption = 8,
    noise: NoiseOption = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 4,
    device: DeviceOption = "auto",
) -> None:
    """Writes a report of every axial slice, its facts with their probabilities, and a picture.

    A fully sampled scan is undersampled first; of an image volume a scan is simulated, unless it is
    a reconstruction (--image). Research software, not for diagnosis.
    """
    from nirvana.mri.report.encode import encode_scan, view_of
    from nirvana.mri.report.figure import place, report_panel
    from nirvana.mri.report.reporter import DISCLAIMER, load_reporter
    from nirvana.train.world import choose_device

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    out = replaceable_folder(out, RESULTS)
    if image:
        given = _as_scan(scan)
    else:
        given = prepared_scan(scan, kind, acceleration, center_fraction, coils, noise, seed)
    view = view_of(given.scan)
    slices = len(given.kspace)
    if not 0 <= slice_number <= slices:
        raise InputError(f"--slice {slice_number} must be 1 to {slices}, or 0 for all")
    reporter = load_reporter(codec, choose_device(device))
    readings: dict[int, Reading] = {}
    pictures: list[np.ndarray] = []
    with progress_bars() as progress:
        task = progress.add_task(given.scan.name, total=slices)
        batches = encode_scan(reporter.model, given.kspace, given.mask, view, batch_size)
        for tokens, images in batches:
            wanted = [i for i in range(len(images)) if slice_number in (0, len(pictures) + i + 1)]
            if wanted:
                for i, reading in zip(wanted, reporter.read(tokens[wanted]), strict=True):
                    readings[len(pictures) + i] = reading
            pictures += list(images.numpy())
            progress.advance(task, len(images))
    chosen = max(readings, key=lambda number: readings[number].finding)
    reading = readings[chosen]
    volume = _stack(pictures)
    marked = place(volume, chosen, view.spacing[0], reading.facts, stripped)
    text = _text(readings, DISCLAIMER)
    with atomic_folder(out) as folder:
        (folder / "report.txt").write_text(text, encoding="utf-8")
        title = f"{given.scan.name}, slice {chosen + 1}, {_sampled(given)} of columns sampled"
        report_panel(folder / "panel.png", volume[chosen], reading, marked, title)
        described = _described(scan, codec, given, view, readings, chosen, marked is not None)
        write_json(folder / "report.json", {**described, "note": DISCLAIMER})
    if not view.known:
        print("the scan does not say how the patient lay: sides assume radiological pictures")
    print(text, end="")
    print(f"{out}: {', '.join(RESULTS)}")


def _as_scan(path: Path) -> Prepared:
    """A reconstruction as a fully sampled scan of one even coil."""
    import torch

    from nirvana.mri.io import Scan, is_volume, read_affine, read_spacing, read_volume
    from nirvana.mri.physics import fft2c

    if not is_volume(path):
        raise InputError(f"--image takes a volume (.nii, .nii.gz, .npy), not {path}")
    images = torch.from_numpy(read_volume(path).copy())
    kspace = fft2c(images[:, None].to(torch.complex64))
    scan = Scan(kspace.numpy(), None, None, path.name.split(".")[0], read_spacing(path))
    scan = replace(scan, affine=read_affine(path))
    mask = torch.ones(kspace.shape[-1], dtype=torch.bool)
    return Prepared(path, scan, kspace, mask, None, None)


def _text(readings: "dict[int, Reading]", note: str) -> str:
    lines = [f"Slice {number + 1}: {reading.text}" for number, reading in readings.items()]
    return "\n".join([*lines, note]) + "\n"


def _sampled(given: Prepared) -> str:
    return f"{float(given.mask.float().mean()):.1%}"


def _described(
    path: Path,
    codec: str,
    given: Prepared,
    view: "View",
    readings: "dict[int, Reading]",
    chosen: int,
    marked: bool,
) -> dict[str, Any]:
    """What report.json says."""
    return {
        "scan": str(path),
        "codec": codec,
        "mask": given.drawn,
        "sampled": float(given.mask.float().mean()),
        "orientation": "of the scan" if view.known else "assumed radiological",
        "sides": "the patient's",
        "panel": {"slice": chosen + 1, "place_marked": marked},
        "slices": [
            {"slice": number + 1, **reading.to_dict()} for number, reading in readings.items()
        ],
    }


def _stack(pictures: "list[np.ndarray]") -> "np.ndarray":
    import numpy as np

    return np.stack(pictures)
