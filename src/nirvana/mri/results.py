"""The results of a scan: its reconstructions by several methods, scores and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.mri.evaluate.compare import finite, run_methods, score_rows
from nirvana.mri.evaluate.figure import panel, slice_geometry
from nirvana.mri.evaluate.metrics import centre_crop, score
from nirvana.mri.io import Scan, files_of, in_file_axes
from nirvana.mri.io.outputs import OutputOptions, Reconstruction, write_images
from nirvana.mri.methods import FOURIER, Method, Progress, fourier_method
from nirvana.mri.pipeline import PreparedScan

TARGET = "fully sampled"


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
        prepared: of `pipeline.prepare`.
        methods: of `comparison_methods`. K-space without gaps leaves them nothing to find, and
            takes `FOURIER` alone.
        chosen: the one whose images are written.
        folder: written to.
        options: what is written.
        settings: all that determines the images besides the scan, for the records.
        progress: see `Progress`.

    Returns:
        What `metrics.json` is to contain.
    """
    scan, target = prepared.scan, prepared.target
    if not prepared.measurement.acquisition.has_gaps:
        chosen, methods = FOURIER, {FOURIER: fourier_method}
        settings = {key: value for key, value in settings.items() if key != "codec"}
    combined = chosen if options.complex_images else None
    volumes = run_methods(prepared.measurement, methods, progress, combined)
    about: dict[str, Any] = {"volume": scan.name, "sampled": prepared.sampled}
    if target is not None:
        rows = score_rows(target, volumes, **about)
    else:
        rows = [
            {**about, "method": name, "seconds_per_slice": result.seconds}
            for name, result in volumes.items()
        ]
    pattern, result = prepared.pattern, volumes[chosen]
    found = Reconstruction(scan, pattern, result.images, result.combined, chosen, settings)
    write_images(folder, found, list(files_of([prepared.path])), options)
    if "png" in options.formats:
        images = {name: result.images for name, result in volumes.items()}
        shown = images if target is None else {TARGET: target, **images}
        draw_middle(folder / "panel.png", shown, scan, prepared.sampled)
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
