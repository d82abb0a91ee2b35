"""The results of a scan: its reconstructions by several methods, scores and a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.files import finite
from nirvana.mri.evaluate.compare import Result, Row, run_methods, score_rows
from nirvana.mri.evaluate.figure import panel, slice_geometry
from nirvana.mri.evaluate.metrics import centre_crop, score
from nirvana.mri.io import Scan, files_of, in_file_axes
from nirvana.mri.io.outputs import OutputOptions, Reconstruction, write_images
from nirvana.mri.methods import FOURIER, Method, Progress, fourier_method
from nirvana.mri.pipeline import PreparedScan

TARGET = "fully sampled"


@dataclass(frozen=True)
class Comparison:
    """A scan, reconstructed by several methods.

    Attributes:
        prepared: the scan.
        volumes: method -> its images.
        rows: one for each method, with scores where the fully sampled image is known.
    """

    prepared: PreparedScan
    volumes: dict[str, Result]
    rows: list[Row]

    @property
    def images(self) -> dict[str, np.ndarray]:
        """Name -> float32 `[slices, H, W]`, the fully sampled image, called `TARGET`, first where
        it is known."""
        found = {name: result.images for name, result in self.volumes.items()}
        return found if self.prepared.target is None else {TARGET: self.prepared.target, **found}

    @property
    def shown(self) -> dict[str, np.ndarray]:
        """`images` in the axes of the scan's file."""
        scan = self.prepared.scan
        return {name: in_file_axes(volume, scan)[0] for name, volume in self.images.items()}


def compare_methods(
    prepared: PreparedScan,
    methods: Mapping[str, Method],
    progress: Progress | None = None,
    combined: str | None = None,
) -> Comparison:
    """Reconstructs a scan with every method, and scores the results where the fully sampled image
    is known.

    Args:
        prepared: of `pipeline.prepare`.
        methods: of `comparison_methods`. K-space without gaps leaves them nothing to find, and
            takes `FOURIER` alone.
        progress: see `Progress`.
        combined: name of the method whose complex images are kept.
    """
    if not prepared.measurement.acquisition.has_gaps:
        combined = None if combined is None else FOURIER
        methods = {FOURIER: fourier_method}
    volumes = run_methods(prepared.measurement, methods, progress, combined)
    about: Row = {"volume": prepared.scan.name, "sampled": prepared.sampled}
    if prepared.target is not None:
        return Comparison(prepared, volumes, score_rows(prepared.target, volumes, **about))
    rows = [
        {**about, "method": name, "seconds_per_slice": result.seconds}
        for name, result in volumes.items()
    ]
    return Comparison(prepared, volumes, rows)


def reconstruct_scan(
    prepared: PreparedScan,
    methods: Mapping[str, Method],
    chosen: str,
    folder: Path,
    options: OutputOptions,
    settings: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstructs a scan with every method and writes the results into a folder that exists.

    Args:
        prepared: see `compare_methods`.
        methods: likewise.
        chosen: the one whose images are written.
        folder: written to.
        options: what is written.
        settings: all that determines the images besides the scan, for the records.
        progress: see `Progress`.

    Returns:
        What `metrics.json` is to contain.
    """
    combined = chosen if options.complex_images else None
    found = compare_methods(prepared, methods, progress, combined)
    return write_results(found, chosen, folder, options, settings)


def write_results(
    found: Comparison,
    chosen: str,
    folder: Path,
    options: OutputOptions,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the results of a scan into a folder that exists; see `reconstruct_scan`.

    Args:
        found: of `compare_methods`.
        chosen: the method whose images are written; of k-space without gaps it is `FOURIER`.
        folder: written to.
        options: what is written.
        settings: all that determines the images besides the scan, for the records.

    Returns:
        What `metrics.json` is to contain.
    """
    prepared, rows = found.prepared, found.rows
    scan = prepared.scan
    if FOURIER in found.volumes:
        chosen = FOURIER
        settings = {key: value for key, value in settings.items() if key != "codec"}
    pattern, result = prepared.pattern, found.volumes[chosen]
    written = Reconstruction(scan, pattern, result.images, result.combined, chosen, settings)
    write_images(folder, written, list(files_of([prepared.path])), options)
    if "png" in options.formats:
        draw_middle(folder / "panel.png", found.images, scan, prepared.sampled)
    results = {"scan": str(prepared.path), "volume": scan.name, "codec": settings.get("codec")}
    results |= {"method": chosen, "mask": prepared.drawn, "sampled": prepared.sampled}
    results["columns"] = np.flatnonzero(pattern).tolist() if pattern.ndim == 1 else None
    results |= {"prepared": prepared.measurement.facts, "remarks": list(scan.remarks)}
    return finite({**results, "results": rows})


def draw_middle(path: Path, volumes: Mapping[str, np.ndarray], scan: Scan, sampled: float) -> None:
    """Writes a picture of the middle slice of every method, cropped to the first volume, in the
    axes of the scan's file, and with the scores of this slice where its truth is known.

    Args:
        path: PNG file.
        volumes: method -> real `[slices, H, W]`; the fully sampled image, called `TARGET`, first
            where it is known.
        scan: for its name and geometry.
        sampled: share of k-space, 0..1.
    """
    first, spacing, affine = in_file_axes(next(iter(volumes.values())), scan)
    middle, size = len(first) // 2, first.shape[-2:]
    images = {
        name: centre_crop(in_file_axes(volume, scan)[0][middle], size)
        for name, volume in volumes.items()
    }
    target, scores = images.get(TARGET), None
    if target is not None and target.any():
        scores = {
            name: score(target[None], image[None])
            for name, image in images.items()
            if name != TARGET
        }
    panel(
        path,
        images,
        TARGET if target is not None else None,
        scores,
        f"{scan.name}, slice {middle + 1} of {len(first)}, {sampled:.1%} of k-space sampled",
        slice_geometry(spacing, affine),
    )
