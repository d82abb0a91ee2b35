"""Reports of the slices of one scan: encode it, choose the slices, read them, write the results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_folder, write_json
from nirvana.mri.data.scans import Measurement, measure
from nirvana.mri.io import Scan, Spacing
from nirvana.mri.methods import SliceCounter
from nirvana.mri.physics.fourier import rss
from nirvana.mri.pipeline import PreparedScan, as_scan
from nirvana.mri.reports.encode import View, encode_scan, view_of
from nirvana.mri.reports.figure import report_panel
from nirvana.mri.reports.localize import Brain, find_brain, lobe_region, readable_slices
from nirvana.mri.reports.reporter import (
    DISCLAIMER,
    MAX_SLICES_AT_ONCE,
    Reading,
    Reporter,
    load_reporter,
)

UNKNOWN_ORIENTATION = "The scan does not state its orientation: which side is left is unknown."
RESULT_FILES = ("panel.png", "report.json", "report.txt")

Progress = Callable[[str, int], SliceCounter]
"""Called with the name of a part of the work and its number of slices before it begins; returns the
counter of its slices."""


@dataclass(frozen=True)
class ScanReport:
    """The readings of a scan's slices.

    Attributes:
        readings: index of a slice -> its reading, in the order of the slices; never empty. Without
            sides where the scan's orientation is unknown.
        images: float32 `[slices, *GRID]`, the combined images in radiological convention, the
            brightest pixel of the zero-filled scan 1.
        view: how the scan's images were turned and resampled.
        brain: where the brain is in `images`; None where none was found.
        region: bool `[*GRID]`, the lobe that the report of the most suspicious slice names, as it
            lies in the image; None without a brain, a finding or such a lobe in the slice.
        combined: float32 `[slices, 2, *GRID]`, real and imaginary part of `images`, of which the
            reporter's tokens are made.
    """

    readings: dict[int, Reading]
    images: np.ndarray
    view: View
    brain: Brain | None
    region: np.ndarray | None
    combined: Tensor

    @property
    def most_suspicious(self) -> int:
        """Index of the slice with the most probable finding."""
        return _most_suspicious(self.readings)

    @property
    def text(self) -> str:
        """A line for each slice that was read, and the disclaimer."""
        lines = [f"Slice {index + 1}: {reading.text}" for index, reading in self.readings.items()]
        if len(self.readings) < len(self.images):
            lines.append(f"{len(self.readings)} of {len(self.images)} slices were read.")
        if not self.view.known:
            lines.append(UNKNOWN_ORIENTATION)
        return "\n".join([*lines, DISCLAIMER]) + "\n"


def report(
    kspace: Scan | np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    *,
    spacing: Spacing | None = None,
    slices: Sequence[int] | None = None,
    stripped: bool = False,
    radiological: bool = False,
    reporter: str | Path | Reporter = "reporter",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
) -> ScanReport:
    """Reads the axial slices of a brain scan. Research software, not for diagnosis.

    Args:
        kspace: a scan, or complex `[slices, coils, H, W]` of slices from bottom to top, anterior
            on top, with zeros where nothing was measured.
        mask: bool `[W]`, `[H, W]`, `[slices, W]` or `[slices, H, W]`, the measured points; None
            finds those that are not zero, and of a scan takes those of its own mask.
        spacing: of slices, rows and columns in mm; required for an array.
        slices: indices of the slices to read; None reads those at heights that were trained on.
        stripped: the images show the brain without the skull.
        radiological: an array, or a scan without an orientation, has the patient's right on the
            left; if that is not known, the report names no sides.
        reporter: a loaded reporter, or the folder or packaged name of one.
        batch_size: slices that are encoded at once.
        device: where a reporter that is given by name is loaded.

    Raises:
        InputError: the reporter does not exist, the pixel size is unknown, the slices are not axial
            or do not exist, or the k-space cannot be calibrated.
    """
    if not isinstance(kspace, Scan):
        kspace = as_scan(kspace, spacing=spacing)
    measurement = measure(kspace, mask=mask)
    measurement.acquisition.require_calibration()
    view = view_of(kspace, radiological)
    if slices is not None and not slices:
        raise InputError("no slice was chosen; give at least one, or None")
    wrong = [index for index in slices or () if not 0 <= index < len(kspace.kspace)]
    if wrong:
        raise InputError(f"slice {wrong[0]} does not exist; give 0 to {len(kspace.kspace) - 1}")
    if not isinstance(reporter, Reporter):
        reporter = load_reporter(reporter, device)
    return read_slices(
        reporter, measurement, view, slices, stripped=stripped, batch_size=batch_size
    )


def read_slices(
    reporter: Reporter,
    measurement: Measurement,
    view: View,
    slices: Sequence[int] | None = None,
    *,
    stripped: bool = False,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> ScanReport:
    """Encodes a whole scan and reads some of its slices.

    Args:
        reporter: see `load_reporter`.
        measurement: the scan.
        view: of `view_of`.
        slices: indices of the slices to read; None reads those of `readable_slices`.
        stripped: the images show the brain without the skull.
        batch_size: slices that are encoded at once.
        progress: see `Progress`.

    Raises:
        InputError: the scan's slices are planes across the readout.
    """
    acquisition = measurement.acquisition
    if measurement.along_readout:
        raise InputError(
            f"{acquisition.name}: a 3D scan that is undersampled along both phase encodings has no "
            "axial slices before it is reconstructed; reconstruct it and give the images (--image)"
        )
    progress = progress or (lambda name, slices: lambda count: None)
    counter = progress("images", len(acquisition))
    parts = encode_scan(reporter, acquisition, view, batch_size, progress=counter)
    tokens, combined = (torch.cat(each) for each in zip(*parts, strict=True))
    volume = rss(combined).numpy()
    brain = find_brain(volume, view.spacing[0], stripped)
    chosen = readable_slices(brain, len(acquisition)) if slices is None else list(slices)
    readings: dict[int, Reading] = {}
    counter = progress("reports", len(chosen))
    for first in range(0, len(chosen), MAX_SLICES_AT_ONCE):
        part = chosen[first : first + MAX_SLICES_AT_ONCE]
        readings |= zip(part, reporter.read(tokens[part]), strict=True)
        counter(len(part))
    suspicious = _most_suspicious(readings)
    facts = readings[suspicious].facts
    region = None if brain is None else lobe_region(brain, suspicious, facts)
    if not view.known:
        readings = {index: reading.without_side() for index, reading in readings.items()}
    return ScanReport(readings, volume, view, brain, region, combined)


def _most_suspicious(readings: Mapping[int, Reading]) -> int:
    """Index of the slice with the most probable finding."""
    return max(readings, key=lambda index: readings[index].finding)


def write_scan_report(
    found: ScanReport, out: Path, prepared: PreparedScan, codec: str, **options: Any
) -> None:
    """Writes the folder of a scan's report, as a whole.

    Args:
        found: of `read_slices`.
        out: the folder.
        prepared: the scan that was read.
        codec: the reporter's name, for the records.
        **options: further entries of `report.json`.
    """
    chosen, region = found.most_suspicious, found.region
    sampled = prepared.sampled
    described = {
        "scan": str(prepared.path),
        "codec": codec,
        "mask": prepared.drawn,
        "sampled": sampled,
        "slices_of_scan": len(found.images),
        "orientation": found.view.orientation,
        "sides": "the patient's" if found.view.known else "unknown",
        "panel": {"slice": chosen + 1, "place_marked": region is not None},
        "slices": [
            {"slice": index + 1, **reading.to_dict()} for index, reading in found.readings.items()
        ],
        **options,
        "note": DISCLAIMER,
    }
    title = f"{prepared.scan.name}, slice {chosen + 1}, {sampled:.1%} of k-space sampled"
    with atomic_folder(out) as folder:
        (folder / "report.txt").write_text(found.text, encoding="utf-8")
        report_panel(
            folder / "panel.png",
            found.images[chosen],
            found.readings[chosen],
            region,
            title,
            found.view.known,
        )
        write_json(folder / "report.json", described)
