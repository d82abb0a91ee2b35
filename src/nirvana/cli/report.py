"""`nirvana mri report`: what a codec that learned from reports says about a scan."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nirvana.cli.console import SEEDS, DeviceOption
from nirvana.cli.mri import (
    FORMATS,
    AccelerationOption,
    CenterOption,
    CoilsOption,
    KindOption,
    NoiseOption,
    Prepared,
    prepared_scan,
    progress_bars,
)
from nirvana.errors import InputError
from nirvana.files import atomic_folder, check_outputs, replaceable_folder, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nirvana.mri.report.encode import View
    from nirvana.mri.report.reporter import Reading, Reporter

RESULTS = ("panel.png", "report.json", "report.txt")


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
    kind: KindOption = "equispaced",
    acceleration: AccelerationOption = 4.0,
    center_fraction: CenterOption = 0.08,
    seed: Annotated[
        int, typer.Option(help="Of the mask and of a volume's simulation.", **SEEDS)
    ] = 0,
    coils: CoilsOption = 8,
    noise: NoiseOption = None,
    batch_size: Annotated[int, typer.Option(help="Slices at once.")] = 4,
    device: DeviceOption = "auto",
) -> None:
    """Writes a report of every axial slice of the cerebrum, its facts with their probabilities, and
    a picture.

    A fully sampled scan is undersampled first; of an image volume a scan is simulated, unless it is
    a reconstruction (--image). Research software, not for diagnosis.
    """
    from nirvana.mri.io import files_of
    from nirvana.mri.report.encode import view_of
    from nirvana.mri.report.figure import report_panel
    from nirvana.mri.report.place import find_brain, place, readable
    from nirvana.mri.report.reporter import DISCLAIMER, load_reporter
    from nirvana.packaged import packaged
    from nirvana.train.world import choose_device

    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} must be 1 or more")
    if every and slice_number:
        raise InputError(f"--every reads all slices, --slice {slice_number} one; give one of them")
    check_outputs({"--out": out}, [*files_of([scan]), codec or packaged("reporter")])
    out = replaceable_folder(out, RESULTS)
    if image:
        given = _as_scan(scan)
    else:
        given = prepared_scan(scan, kind, acceleration, center_fraction, coils, noise, seed)
    view = view_of(given.scan)
    slices = len(given.kspace)
    if not 0 <= slice_number <= slices:
        raise InputError(f"--slice {slice_number} must be 1 to {slices}, or 0 for many")
    reporter = load_reporter(codec or packaged("reporter"), choose_device(device))
    tokens, volume = _encoded(reporter, given, view, batch_size)
    brain = find_brain(volume, view.spacing[0], stripped)
    if slice_number:
        wanted = [slice_number - 1]
    else:
        wanted = list(range(slices)) if every else readable(brain, slices)
    readings = _read(reporter, tokens, wanted)
    chosen = max(readings, key=lambda number: readings[number].finding)
    reading = readings[chosen]
    marked = None if brain is None else place(brain, chosen, reading.facts)
    text = _text(readings, slices, DISCLAIMER)
    with atomic_folder(out) as folder:
        (folder / "report.txt").write_text(text, encoding="utf-8")
        title = f"{given.scan.name}, slice {chosen + 1}, {_sampled(given)} of columns sampled"
        report_panel(folder / "panel.png", volume[chosen], reading, marked, title)
        described = _described(scan, codec, given, view, readings, chosen, marked is not None)
        asked = {"image": image, "stripped": stripped, "note": DISCLAIMER}
        write_json(folder / "report.json", {**described, **asked})
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


def _encoded(
    reporter: "Reporter", given: Prepared, view: "View", batch_size: int
) -> "tuple[Tensor, np.ndarray]":
    """Tokens `[slices, N, D]` and pictures `[slices, H, W]` of a scan."""
    import torch

    from nirvana.mri.report.encode import encode_scan

    with progress_bars() as progress:
        task = progress.add_task(f"{given.scan.name}: images", total=len(given.kspace))
        parts = encode_scan(
            *(reporter, given.kspace, given.mask, view, batch_size),
            progress=lambda count: progress.advance(task, count),
        )
        tokens, pictures = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(pictures).numpy()


def _read(reporter: "Reporter", tokens: "Tensor", wanted: list[int]) -> "dict[int, Reading]":
    """Readings of some slices."""
    from nirvana.mri.report.reporter import READING

    readings: dict[int, Reading] = {}
    with progress_bars() as progress:
        task = progress.add_task("reports", total=len(wanted))
        for first in range(0, len(wanted), READING):
            part = wanted[first : first + READING]
            readings |= zip(part, reporter.read(tokens[part]), strict=True)
            progress.advance(task, len(part))
    return readings


def _text(readings: "dict[int, Reading]", slices: int, note: str) -> str:
    lines = [f"Slice {number + 1}: {reading.text}" for number, reading in readings.items()]
    if len(readings) < slices:
        lines.append(f"{len(readings)} of {slices} slices were read.")
    return "\n".join([*lines, note]) + "\n"


def _sampled(given: Prepared) -> str:
    return f"{float(given.mask.float().mean()):.1%}"


def _described(
    path: Path,
    codec: Path | None,
    given: Prepared,
    view: "View",
    readings: "dict[int, Reading]",
    chosen: int,
    marked: bool,
) -> dict[str, Any]:
    """What report.json says."""
    return {
        "scan": str(path),
        "codec": "the packaged reporter" if codec is None else str(codec),
        "mask": given.drawn,
        "sampled": float(given.mask.float().mean()),
        "slices_of_scan": len(given.kspace),
        "orientation": "of the scan" if view.known else "assumed radiological",
        "sides": "the patient's",
        "panel": {"slice": chosen + 1, "place_marked": marked},
        "slices": [
            {"slice": number + 1, **reading.to_dict()} for number, reading in readings.items()
        ],
    }
