"""Reports of the slices of one scan: encode it, choose the slices, read them, write the results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_folder, write_json
from nirvana.mri.data.scans import sampled_columns
from nirvana.mri.io import Scan, Spacing
from nirvana.mri.physics.masks import require_calibration, require_columns
from nirvana.mri.pipeline import PreparedScan, SliceCounter, as_scan
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

RESULT_FILES = ("panel.png", "report.json", "report.txt")

Progress = Callable[[str, int], SliceCounter]
"""Called with the name of a part of the work and its number of slices before it begins; returns the
counter of its slices."""


@dataclass(frozen=True)
class ScanReport:
    """The readings of a scan's slices.

    Attributes:
        readings: index of a slice -> its reading, in the order of the slices; never empty.
        images: float32 `[slices, *GRID]`, the combined images in radiological convention, the
            brightest pixel of the zero-filled scan 1.
        view: how the scan's images were turned and resampled.
        brain: where the brain is in `images`; None where none was found.
    """

    readings: dict[int, Reading]
    images: np.ndarray
    view: View
    brain: Brain | None

    @property
    def most_suspicious(self) -> int:
        """Index of the slice with the most probable finding."""
        return max(self.readings, key=lambda index: self.readings[index].finding)

    @property
    def region(self) -> np.ndarray | None:
        """Bool `[*GRID]`, the lobe that the report of the most suspicious slice names; None without
        a brain, a finding or such a lobe in the slice."""
        index = self.most_suspicious
        if self.brain is None:
            return None
        return lobe_region(self.brain, index, self.readings[index].facts)

    @property
    def text(self) -> str:
        """A line for each slice that was read, and the disclaimer."""
        lines = [f"Slice {index + 1}: {reading.text}" for index, reading in self.readings.items()]
        if len(self.readings) < len(self.images):
            lines.append(f"{len(self.readings)} of {len(self.images)} slices were read.")
        return "\n".join([*lines, DISCLAIMER]) + "\n"


def report(
    kspace: Scan | np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    *,
    spacing: Spacing | None = None,
    slices: Sequence[int] | None = None,
    stripped: bool = False,
    reporter: str | Path | Reporter = "reporter",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
) -> ScanReport:
    """Reads the axial slices of a brain scan. Research software, not for diagnosis.

    Args:
        kspace: a scan, or complex `[slices, coils, H, W]` of slices from bottom to top in
            radiological convention, with zeros where nothing was measured.
        mask: bool `[W]`, the measured columns; None finds the columns that are not zero, and of a
            scan takes those of its own mask.
        spacing: of slices, rows and columns in mm; required for an array.
        slices: indices of the slices to read; None reads those at heights that were trained on.
        stripped: the images show the brain without the skull.
        reporter: a loaded reporter, or the folder or packaged name of one.
        batch_size: slices that are encoded at once.
        device: where a reporter that is given by name is loaded.

    Raises:
        InputError: the reporter does not exist, the pixel size is unknown, the slices are not axial
            or do not exist, or the k-space cannot be calibrated.
    """
    if not isinstance(kspace, Scan):
        kspace = as_scan(kspace, spacing=spacing)
    require_columns(kspace.kspace, kspace.name)
    columns = sampled_columns(kspace, mask)
    require_calibration(columns, kspace.name)
    view = view_of(kspace)
    if slices is not None and not slices:
        raise InputError("no slice was chosen; give at least one, or None")
    wrong = [index for index in slices or () if not 0 <= index < len(kspace.kspace)]
    if wrong:
        raise InputError(f"slice {wrong[0]} does not exist; give 0 to {len(kspace.kspace) - 1}")
    if not isinstance(reporter, Reporter):
        reporter = load_reporter(reporter, device)
    measured = torch.from_numpy(kspace.kspace) * columns
    return read_slices(
        reporter, measured, columns, view, slices, stripped=stripped, batch_size=batch_size
    )


def read_slices(
    reporter: Reporter,
    kspace: Tensor,
    mask: Tensor,
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
        kspace: complex `[slices, coils, H, W]`, zero outside the mask.
        mask: bool `[W]`.
        view: of `view_of`.
        slices: indices of the slices to read; None reads those of `readable_slices`.
        stripped: the images show the brain without the skull.
        batch_size: slices that are encoded at once.
        progress: see `Progress`.
    """
    progress = progress or (lambda name, slices: lambda count: None)
    counter = progress("images", len(kspace))
    parts = encode_scan(reporter, kspace, mask, view, batch_size, progress=counter)
    tokens, images = (torch.cat(each) for each in zip(*parts, strict=True))
    volume = images.numpy()
    brain = find_brain(volume, view.spacing[0], stripped)
    chosen = readable_slices(brain, len(kspace)) if slices is None else list(slices)
    readings: dict[int, Reading] = {}
    counter = progress("reports", len(chosen))
    for first in range(0, len(chosen), MAX_SLICES_AT_ONCE):
        part = chosen[first : first + MAX_SLICES_AT_ONCE]
        readings |= zip(part, reporter.read(tokens[part]), strict=True)
        counter(len(part))
    return ScanReport(readings, volume, view, brain)


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
        "orientation": "of the scan" if found.view.known else "assumed radiological",
        "sides": "the patient's",
        "panel": {"slice": chosen + 1, "place_marked": region is not None},
        "slices": [
            {"slice": index + 1, **reading.to_dict()} for index, reading in found.readings.items()
        ],
        **options,
        "note": DISCLAIMER,
    }
    title = f"{prepared.scan.name}, slice {chosen + 1}, {sampled:.1%} of columns sampled"
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
