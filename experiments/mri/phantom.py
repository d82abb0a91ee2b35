"""Adds small discs to measured k-space and checks that they, and nothing else, come back.

    python -m experiments.mri.phantom --codec src/nirvana/assets/codec --scans scans.npz

The discs go through the scan's own sensitivities, estimated from all of its samples. What a method
makes of the scan with them, minus what it makes of the scan alone, is compared with what they
change in the fully sampled image. Results are rows of a .jsonl file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.common.results import Row, append_rows
from experiments.mri.measured import method_of, scans
from experiments.mri.methods import CLASSICAL
from experiments.mri.study import SAMPLINGS, Method
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.evaluate.metrics import head_mask
from nirvana.mri.physics.calibration import soft_espirit
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss

RADII = (2.0, 3.0, 4.5)  # pixels
BRIGHTNESS = 0.3  # of the image's brightest pixel
NEAR = 2.0  # pixels around a disc that count as it
MASK_SEED = 0


def discs(target: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Discs at random places in the head, `[H, W]`, and bool `[H, W]` of their surroundings."""
    inside = np.argwhere(head_mask(target)[0])
    middle = inside.mean(0)
    # The inner half of the head, in which a disc lies within tissue.
    inner = inside[np.linalg.norm(inside - middle, axis=1) < 0.5 * np.sqrt(len(inside) / np.pi)]
    rows, columns = np.indices(target.shape[-2:])
    image, around = np.zeros(rows.shape), np.zeros(rows.shape, bool)
    places = np.random.default_rng(seed).choice(inner, len(RADII), replace=False)
    for (row, column), radius in zip(places, RADII, strict=True):
        distance = np.hypot(rows - row, columns - column)
        image = np.maximum(image, np.clip(radius + 0.5 - distance, 0, 1))
        around |= distance <= radius + NEAR
    return BRIGHTNESS * target.max() * image, around


def evaluate(method: Method, files: Sequence[Path]) -> list[Row]:
    """A row for every scan, direction and sampling."""
    rows: list[Row] = []
    for name, direction, kspace in scans(files):
        measured = torch.from_numpy(kspace[:1])
        target = rss(ifft2c(measured)).numpy()
        image, around = discs(target)
        every = torch.ones(1, 1, kspace.shape[-1], dtype=torch.bool)
        maps = soft_espirit(measured, every)[0][:, 0]
        phase = torch.sgn((maps.conj() * ifft2c(measured)).sum(1, keepdim=True))
        added = measured + fft2c(maps * phase * torch.from_numpy(image).float())
        wanted = rss(ifft2c(added)).numpy() - target
        for sampling, settings in SAMPLINGS.items():
            mask = settings.mask(kspace.shape[-1], MASK_SEED).numpy()
            pair = (method(Acquisition(each.numpy(), mask)) for each in (added, measured))
            found = np.subtract(*map(np.asarray, pair))
            brightness = BRIGHTNESS * target.max()
            elsewhere = np.abs(found - wanted)[0][~around]
            rows.append(
                {
                    "scan": name,
                    "direction": direction,
                    "mask": sampling,
                    # the least-squares share of the discs' change that came back
                    "recovered": float((found * wanted)[0][around].sum())
                    / float(np.square(wanted)[0][around].sum()),
                    # relative to the discs' brightness
                    "largest_elsewhere": float(elsewhere.max() / brightness),
                    "rms_elsewhere": float(np.sqrt(np.square(elsewhere).mean()) / brightness),
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    check_outputs({"--results": options.results}, [*options.scans, options.codec, options.peers])
    method = method_of(options)
    found = [{"method": options.method, **row} for row in evaluate(method, options.scans)]
    append_rows(options.results, found)
    for row in found:
        shown = {key: f"{x:.3f}" if isinstance(x, float) else x for key, x in row.items()}
        print(*shown.values(), sep="\t")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.phantom", __doc__)
    parser.add_argument(
        "--method", default="codec", help="without --codec: " + ", ".join(CLASSICAL)
    )
    parser.add_argument("--codec", type=Path, help="folder of a codec")
    parser.add_argument(
        "--peers", type=Path, help="settings by experiments.mri.peers, for ...-best"
    )
    parser.add_argument("--scans", type=Path, nargs="+", required=True, help=".npz files")
    parser.add_argument("--results", type=Path, default=Path("runs/mri-phantom.jsonl"))
    parser.add_argument("--device", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
