"""Chooses the settings of GRAPPA and BART for each acceleration on simulated training scans.

    python -m experiments.mri.peers DATA/mri/train
    python -m experiments.mri.peers SCANS.npz --methods bart_l1 --out FILE.json

Writes `src/nirvana/mri/classical/peers.json`, which the methods read. Every setting is varied
alone while the others stay, from the first to the last, until none of them gains more; the mean
PSNR over all scans decides. No scan of a test is used. With fully sampled scans in an .npz file
(`experiments.mri.measured`) the search starts from the package's settings and finds the best ones
for these very scans: what a peer could reach at most if its settings were known beforehand.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.mri.measured import scans
from nirvana.errors import InputError, script
from nirvana.files import check_outputs, write_json
from nirvana.mri.classical.bart import bart_pics, program
from nirvana.mri.classical.grappa import grappa
from nirvana.mri.classical.peers import BartSettings, GrappaSettings, chosen_peers
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_volume
from nirvana.mri.methods import classical_method
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import MASK_KINDS, Sampling

OUT = Path(__file__).parents[2] / "src" / "nirvana" / "mri" / "classical" / "peers.json"
VOLUMES = (
    "ms_x07_FLAIR.nii.gz",
    "stroke_clin_T2.nii.gz",
    "niimath_T1brain.nii.gz",
)
ACCELERATIONS = {4.0: 0.08, 8.0: 0.04}  # and the share of columns in the middle
COILS = 8
METHODS = ("bart_l1", "bart_l2", "grappa")
GRAPPA: dict[str, Sequence[Any]] = {
    "regularisation": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    "kernel": ((3, 5), (5, 5), (3, 9)),
    "calibration_rows": (24, 256),
}
BART: dict[str, Sequence[Any]] = {
    "weight": (0.001, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25),
    "crop": (0.0, 0.3, 0.5),
    "iterations": (5, 8, 15, 30, 60),
    "threshold": (0.003, 0.01, 0.02),
}
Problem = tuple[Acquisition, np.ndarray]
Scores = dict[str, float]


def problems(folder: Path, acceleration: float) -> Iterator[Problem]:
    """The middle slice of every training volume, with equispaced and random masks in turn, and its
    target."""
    for number, name in enumerate(VOLUMES):
        volume = read_volume(folder / name)
        middle = volume[len(volume) // 2 : len(volume) // 2 + 1]
        scan = simulate_scan(middle, name, number, Simulation(num_coils=COILS))
        sampling = Sampling(MASK_KINDS[number % 2], acceleration, ACCELERATIONS[acceleration])
        mask = sampling.mask(scan.kspace.shape[-1], number).numpy()
        yield Acquisition(scan.kspace, mask), target_of(scan)


def measured_problems(file: Path, acceleration: float) -> Iterator[Problem]:
    """Measured scans in both directions with an equispaced and a random mask each."""
    for name, _, kspace in scans([file]):
        target = rss(ifft2c(torch.from_numpy(kspace))).numpy()
        for kind in MASK_KINDS:
            sampling = Sampling(kind, acceleration, ACCELERATIONS[acceleration])
            mask = sampling.mask(kspace.shape[-1], 0).numpy()
            yield Acquisition(kspace, mask, name=name), target


def mean_psnr(
    kspace_of: Callable[[Acquisition], Iterable[np.ndarray]], given: Sequence[Problem]
) -> float:
    """Mean PSNR of a method over all problems, dB."""
    method = classical_method(kspace_of)
    scores = [
        score(target, np.stack([image.magnitude for image in method(acquisition)]))["psnr"]
        for acquisition, target in given
    ]
    return float(np.mean(scores))


def choose(
    start: Any, options: dict[str, Sequence[Any]], psnr_of: Callable[[Any], float]
) -> tuple[Any, Scores]:
    """The best settings by coordinate search, and the mean PSNR of every setting that was tried."""
    tried: Scores = {}

    def measured(settings: Any) -> float:
        key = json.dumps(asdict(settings))
        if key not in tried:
            tried[key] = psnr_of(settings)
            print(f"{tried[key]:.2f} dB  {key}", flush=True)
        return tried[key]

    best = start
    while True:
        before = best
        for name, values in options.items():
            around = [best, *(replace(best, **{name: value}) for value in values)]
            best = max(around, key=measured)
        if best == before:
            return best, tried


def chosen(
    given: Sequence[Problem], acceleration: float, starts: dict[str, Any], methods: Sequence[str]
) -> dict[str, Any]:
    """The entry of one acceleration: settings of the methods, mean PSNR with the settings that the
    search starts from and with the best ones."""
    zero_filled = mean_psnr(lambda acquisition: acquisition.slices(), given)
    entry: dict[str, Any] = {"acceleration": acceleration, "psnr": {"zero-filled": zero_filled}}
    entry["psnr_of_start"] = {}
    for name in methods:

        def psnr_of(settings: Any, name: str = name) -> float:
            if name == "grappa":
                return mean_psnr(
                    lambda acquisition: grappa(acquisition, settings, workers=1), given
                )
            norm: Any = settings.norm
            return mean_psnr(lambda acquisition: bart_pics(acquisition, norm, settings), given)

        found, tried = choose(starts[name], GRAPPA if name == "grappa" else BART, psnr_of)
        entry[name] = asdict(found)
        entry["psnr_of_start"][name] = tried[json.dumps(asdict(starts[name]))]
        entry["psnr"][name] = max(tried.values())
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    measured = options.data.suffix == ".npz"
    if measured and options.out == OUT:
        raise InputError("--out: settings for scans of a file are not the package's; name a file")
    if not measured and set(options.methods) != set(METHODS):
        raise InputError(f"--methods: the package needs the settings of {', '.join(METHODS)}")
    volumes = [] if measured else [options.data / name for name in VOLUMES]
    check_outputs({"--out": options.out}, [options.data if measured else None, *volumes])
    program()
    entries = []
    for acceleration in ACCELERATIONS:
        starts: dict[str, Any] = {f"bart_{norm}": BartSettings(norm=norm) for norm in ("l1", "l2")}
        starts["grappa"] = GrappaSettings()
        of_data = problems
        if measured:
            (peers,) = (each for each in chosen_peers() if each.acceleration == acceleration)
            starts, of_data = {name: getattr(peers, name) for name in METHODS}, measured_problems
        given = list(of_data(options.data, acceleration))
        entries.append(chosen(given, acceleration, starts, options.methods))
    how = (
        f"middle slices of {', '.join(VOLUMES)}, {COILS} simulated coils, equispaced and random "
        "masks in turn, seeds 0 to 2; mean PSNR in dB"
    )
    if measured:
        how = f"{options.data.stem}, both directions, an equispaced and a random mask; PSNR in dB"
    write_json(options.out, {"chosen_on": how, "by": "experiments.mri.peers", "chosen": entries})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.peers", __doc__)
    parser.add_argument(
        "data", type=Path, help="folder of the training volumes, or .npz file of measured scans"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
