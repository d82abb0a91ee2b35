"""Scores one method on measured, fully sampled scans that are undersampled afterwards.

    python -m experiments.mri.measured --method bart-l1-wavelet --scans scans.npz
    python -m experiments.mri.measured --method codec --codec FOLDER --scans scans.npz
    python -m experiments.mri.measured --method bart-l1-wavelet-best --peers FILE --scans scans.npz

An .npz file holds scans by name, complex `[slices, coils, H, W]` with the centre of k-space near
the middle. Every scan is scored as it is and transposed, with phase encoding along the other axis,
under the four samplings of the study and `MASKS` masks each; with `--points` under masks of points,
as if both axes were phase-encoded, and as it is alone. Results are rows of a .jsonl file, one for
each scan, direction and mask.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.common.program import make_parser
from experiments.common.results import Row, append_rows, read_rows
from experiments.mri.methods import CLASSICAL, PEERS
from experiments.mri.study import SAMPLINGS, Method, classical, codec_method
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.mri.classical.peers import nearest_acceleration, settings_of
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.point_masks import POINT_KINDS, PointSampling

BEST = "-best"  # after the name of a method with settings of a file
MASKS = 3  # seeds of each sampling
POINTS = {
    f"{kind} points {acceleration:g}x": PointSampling(kind, acceleration)
    for kind in POINT_KINDS
    for acceleration in (4.0, 8.0)
}


def scans(files: Sequence[Path]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, direction and k-space of all scans.

    Raises:
        InputError: a file cannot be read, or holds something else.
    """
    for file in files:
        try:
            archive = np.load(file, allow_pickle=False)
            named = {name: archive[name] for name in archive.files}
        except UNREADABLE as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        for name, values in named.items():
            if values.ndim != 4 or values.dtype.kind != "c":
                raise InputError(f"{file}: {name} is not complex [slices, coils, H, W]")
            kspace = values.astype(np.complex64)
            yield name, "columns", kspace
            yield name, "rows", np.ascontiguousarray(kspace.swapaxes(-2, -1))


def evaluate(
    method: Method, files: Sequence[Path], masks: int = MASKS, points: bool = False
) -> Iterator[Row]:
    """A row of scores for every scan, direction and mask.

    Args:
        method: that is scored.
        files: of the scans.
        masks: seeds of each sampling.
        points: the samplings of `POINTS`, which are the same in both directions, in place of those
            of columns.
    """
    for name, direction, kspace in scans(files):
        if points and direction != "columns":
            continue
        target = rss(ifft2c(torch.from_numpy(kspace))).numpy()
        inside = head_mask(target)
        height, width = kspace.shape[-2:]
        for sampling in POINTS if points else SAMPLINGS:
            for seed in range(masks):
                if points:
                    mask, _ = POINTS[sampling].mask((height, width), seed)
                else:
                    mask = SAMPLINGS[sampling].mask(width, seed)
                started = time.perf_counter()
                image = method(Acquisition(kspace, mask.numpy(), name=name))
                row = {"scan": name, "direction": direction, "coils": kspace.shape[1]}
                row |= {"mask": sampling, "mask_seed": seed}
                row["seconds_per_slice"] = (time.perf_counter() - started) / len(kspace)
                yield {**row, **score(target, np.asarray(image), inside)}


def tuned(name: str, file: Path) -> Method:
    """A classical method with the settings of the nearest acceleration in a file of
    `experiments.mri.peers`.

    Args:
        name: of the method, followed by `BEST`.
        file: of the settings.

    Raises:
        InputError: there is no such method, or the file cannot be read or lacks its settings.
    """
    keys = {method + BEST: key for key, method in PEERS.items()}
    if name not in keys:
        raise InputError(f"--peers: --method {name} is none of {', '.join(keys)}")
    key = keys[name]
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["chosen"]
        found = {entry["acceleration"]: settings_of(entry, key) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--peers: {file} holds no settings of {key}: {error}") from error
    return classical(
        PEERS[key],
        1,
        lambda acquisition: found[nearest_acceleration(acquisition.pattern, found)],
    )


def print_table(rows: Sequence[Row]) -> None:
    """Mean PSNR and SSIM over the masks of every method, scan and direction."""
    samplings = dict.fromkeys(row["mask"] for row in rows)
    table = Table("scan", "direction", "method", *samplings)
    keys = dict.fromkeys((row["scan"], row["direction"], row["method"]) for row in rows)
    for key in keys:
        cells = []
        for sampling in samplings:
            own = [
                row
                for row in rows
                if (row["scan"], row["direction"], row["method"]) == key and row["mask"] == sampling
            ]
            means = [np.mean([row[name] for row in own]) for name in ("psnr", "ssim") if own]
            cells.append("{:.2f} {:.4f}".format(*means) if own else "")
        table.add_row(*key, *cells)
    Console(width=140).print(table)


def method_of(options: argparse.Namespace) -> Method:
    """The method that options name: a codec's folder, or a classical method.

    Raises:
        InputError: they name neither.
    """
    if options.peers is not None:
        return tuned(options.method, options.peers)
    if options.codec is None:
        if options.method not in CLASSICAL:
            raise InputError(
                f"--method {options.method} needs --codec, or one of {', '.join(CLASSICAL)}"
            )
        return classical(options.method, 1)
    return codec_method(load_codec(options.codec, choose_device(options.device)))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    inputs = [*options.scans, options.codec, options.peers]
    check_outputs({"--results": options.results}, inputs)
    method = method_of(options)
    found = evaluate(method, options.scans, points=options.points)
    rows = [{"method": options.method, **row} for row in found]
    append_rows(options.results, rows)
    print_table(read_rows(options.results))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.measured", __doc__)
    parser.add_argument(
        "--method", required=True, help="name in the rows; without --codec: " + ", ".join(CLASSICAL)
    )
    parser.add_argument("--codec", type=Path, help="folder of a codec")
    parser.add_argument(
        "--peers", type=Path, help="settings by experiments.mri.peers, for ...-best"
    )
    parser.add_argument("--scans", type=Path, nargs="+", required=True, help=".npz files")
    parser.add_argument("--points", action="store_true", help="masks of points")
    parser.add_argument("--results", type=Path, default=Path("runs/mri-measured.jsonl"))
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
