"""Measures what happens to a scan before and beside the methods: completion of a missing side, coil
compression, and sampling patterns of points.

    python -m experiments.mri.preparation DATA/mri --results experiments/mri/preparation.jsonl

The figures of docs/mri-reconstruction.md are from these rows.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.common.program import make_parser
from experiments.common.results import append_row
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.mri.classical.grappa import grappa
from nirvana.mri.classical.sigpy import l1_wavelet, sense
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import CoilOptions, measure, target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import Scan, read_volume
from nirvana.mri.methods import (
    FOURIER,
    GRAPPA,
    NIRVANA,
    SENSE,
    WAVELET,
    ZERO_FILLED,
    Method,
    classical_method,
    codec_method,
    fourier_method,
)
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.physics.fourier import fft2c, ifft2c, rss
from nirvana.mri.physics.masks import Sampling, sampling_mask
from nirvana.mri.physics.partial_fourier import homodyne, pocs

Row = dict[str, Any]

HEAD, KNEE = "larson_se_t1_sag_data.mat", "larson_coronal_fatsat_2D_knee.mat"
MAPS = "mriphysics_alignedSENSE_xGT.mat"
PRESCAN = "pdawood_iterativeRaki_preScanRefData.npy"
VOLUMES = ("train/ms_x07_FLAIR.nii.gz", "train/niimath_T1brain.nii.gz")
POINT_VOLUMES = ("valid/ms_l04_T1.nii.gz", "valid/ms_l04_FLAIR.nii.gz")


def middle(path: Path) -> np.ndarray:
    """The middle slice of a volume, `[1, H, W]`."""
    volume = read_volume(path)
    return volume[len(volume) // 2 : len(volume) // 2 + 1]


def prescan(data: Path) -> Scan:
    """The measured scan of 16 coils, 64 x 64."""
    kspace = np.load(data / "coils" / PRESCAN, allow_pickle=False).astype(np.complex64)
    if kspace.shape[0] != 16:
        kspace = kspace.transpose(2, 0, 1)
    return Scan(np.ascontiguousarray(kspace[None]), None, None, "prescan, 16 coils, measured")


def scored(scan: Scan, images: np.ndarray) -> float:
    """PSNR against the scan's full image, dB."""
    return score(target_of(scan), images)["psnr"]


def missing_side(data: Path) -> Iterator[Row]:
    """Partial Fourier sampling along W, completed in several ways."""
    from scipy.io import loadmat

    scans = [prescan(data)]
    for file, key in ((HEAD, "data"), (KNEE, "kdata")):
        kspace = np.ascontiguousarray(loadmat(data / "kspace" / file)[key], np.complex64)
        scans.append(Scan(kspace[None, None], None, None, f"{file}, measured"))
    settings = Simulation(noise=(0.004, 0.004))
    for number, name in enumerate(VOLUMES):
        scans.append(simulate_scan(middle(data / name), f"{name}, simulated", number, settings))
    for scan in scans:
        width = scan.kspace.shape[-1]
        for share in (0.6, 0.7, 0.8):
            kept = np.arange(width) < round(share * width)
            measurement = measure(replace(scan, kspace=scan.kspace * kept, target=None))
            extent = measurement.acquisition.extent
            assert extent is not None
            kspace = torch.from_numpy(measurement.acquisition.slice(0))
            found = {
                "zeros": rss(ifft2c(kspace)).numpy()[None],
                "homodyne": rss(homodyne(kspace, extent)).numpy()[None],
                "pocs": rss(ifft2c(pocs(kspace, extent))).numpy()[None],
                "complete": run_methods(measurement, {FOURIER: fourier_method})[FOURIER].images,
            }
            psnr = {name: scored(scan, images) for name, images in found.items()}
            yield {"part": "missing side", "scan": scan.name, "share": share, "psnr": psnr}


def array_scans(data: Path) -> Iterator[Scan]:
    """Slices under 32 measured coil maps, with noise, and the prescan."""
    from scipy.io import loadmat

    maps = loadmat(data / "coils" / MAPS)["S"].squeeze().transpose(2, 0, 1)
    maps = torch.from_numpy(maps / np.sqrt((np.abs(maps) ** 2).sum(0)).mean())
    generator = torch.Generator().manual_seed(0)
    for name in VOLUMES:
        image = torch.from_numpy(middle(data / name).copy())[None]
        image = F.interpolate(image, maps.shape[1:], mode="area")[0, 0]
        kspace = fft2c((maps * image).to(torch.complex64))[None]
        noise = torch.randn(kspace.shape, dtype=kspace.dtype, generator=generator)
        kspace = kspace + 0.01 * 2**0.5 * noise
        yield Scan(kspace.numpy(), None, None, f"{name}, 32 measured coil maps")
    yield prescan(data)


def compression(data: Path, methods: dict[str, Method]) -> Iterator[Row]:
    """Fewer virtual coils at 4x equispaced, against the image of all coils."""
    for scan in array_scans(data):
        for count in (0, 24, 16, 12, 8, 4):
            if count >= scan.kspace.shape[1]:
                continue
            full = measure(scan, CoilOptions(count=count))
            results = run_methods(full.undersampled(Sampling(), 0), methods)
            yield {
                "part": "compression",
                "scan": scan.name,
                "virtual_coils": full.acquisition.num_coils,
                "energy_kept": full.facts["energy_kept"],
                "psnr": {name: scored(scan, each.images) for name, each in results.items()},
                "seconds": {name: each.seconds for name, each in results.items()},
            }


def patterns(size: tuple[int, int], acceleration: float) -> Iterator[tuple[str, np.ndarray]]:
    """Patterns of about the same number of samples: columns, and three kinds of points."""
    from sigpy.mri import poisson

    height, width = size
    center = 0.32 / acceleration
    yield "columns, equispaced", sampling_mask("equispaced", width, acceleration, center, 0).numpy()
    block = np.zeros(size, bool)
    block[height // 2 - 12 : height // 2 + 12, width // 2 - 12 : width // 2 + 12] = True
    yield "points, Poisson disc", block | poisson(size, acceleration, (24, 24), seed=0).astype(bool)
    random = np.random.default_rng(0).random(size) < 1 / acceleration
    yield "points, uniformly random", block | random
    rows = 2 if acceleration <= 4 else 4
    regular = np.zeros(size, bool)
    regular[::rows, :: round(acceleration / rows)] = True
    yield f"points, every {rows} x {round(acceleration / rows)}", block | regular


def points(data: Path, methods: dict[str, Method]) -> Iterator[Row]:
    """Patterns of points, which no codec was trained on, beside columns."""
    for number, name in enumerate(POINT_VOLUMES):
        scan = simulate_scan(middle(data / name), name, number, Simulation())
        for acceleration in (4.0, 8.0):
            for kind, pattern in patterns(scan.kspace.shape[-2:], acceleration):  # type: ignore[arg-type]
                acquisition = Acquisition(scan.kspace, pattern)
                results = run_methods(replace(measure(scan), acquisition=acquisition), methods)
                yield {
                    "part": "points",
                    "scan": name,
                    "pattern": kind,
                    "acceleration": acceleration,
                    "sampled": float(pattern.mean()),
                    "psnr": {key: scored(scan, each.images) for key, each in results.items()},
                }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    check_outputs({"--results": options.results}, [options.data])
    torch.set_num_threads(options.threads)
    codec = codec_method(load_codec(), 1)
    few: dict[str, Method] = {
        ZERO_FILLED: fourier_method,
        SENSE: classical_method(lambda acquisition: sense(acquisition, workers=1)),
        NIRVANA: codec,
    }
    every = {
        **few,
        WAVELET: classical_method(lambda acquisition: l1_wavelet(acquisition, workers=1)),
    }
    parts = {
        "missing side": lambda: missing_side(options.data),
        "compression": lambda: compression(options.data, few),
        "points": lambda: points(options.data, every),
        "points by GRAPPA": lambda: points(
            options.data,
            {GRAPPA: classical_method(lambda acquisition: grappa(acquisition, workers=1))},
        ),
    }
    for row in parts[options.part]():
        append_row(options.results, row)
        print(row, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.preparation", __doc__)
    parser.add_argument("data", type=Path, help="folder of the MRI data")
    parts = ["missing side", "compression", "points", "points by GRAPPA"]
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
