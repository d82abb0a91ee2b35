"""Chooses the settings of GRAPPA, BART and sigpy for each acceleration on simulated training scans.

    python -m experiments.mri.peers DATA/mri/train
    python -m experiments.mri.peers SCANS.npz --methods bart_l1 l1_wavelet --out FILE.json

Writes `src/nirvana/mri/classical/peers.json`, which the methods read. Every setting is varied
alone while the others stay, from the first to the last, until none of them gains more; the mean
PSNR over all scans decides. No scan of a test is used. With fully sampled scans in an .npz file
(`experiments.mri.measured`) the search starts from the package's settings and finds the best ones
for these very scans: what a peer could reach at most if its settings were known beforehand. A file
that exists keeps the settings of the methods that are not named.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.mri.measured import scans
from experiments.mri.methods import PEERS
from experiments.mri.study import Method, classical
from nirvana.errors import InputError, script
from nirvana.files import check_outputs, write_json
from nirvana.mri.classical.bart import program
from nirvana.mri.classical.peers import (
    BartSettings,
    GrappaSettings,
    Peers,
    SenseSettings,
    WaveletSettings,
    chosen_peers,
)
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.metrics import score
from nirvana.mri.io import read_volume
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
Options = dict[str, Sequence[Any]]
Problem = tuple[Acquisition, np.ndarray]
Scores = dict[str, float]
ESPIRIT: Options = {"crop": (0.0, 0.3, 0.5), "threshold": (0.003, 0.01, 0.02)}
# The values that are tried of each setting.
OPTIONS: dict[type, Options] = {
    GrappaSettings: {
        "regularisation": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "kernel": ((3, 5), (5, 5), (3, 9)),
        "calibration_rows": (24, 256),
    },
    BartSettings: {
        "weight": (0.001, 0.004, 0.008, 0.016, 0.03, 0.06, 0.12, 0.25),
        "crop": (0.0, 0.3, 0.5),
        "iterations": (5, 8, 15, 30, 60),
        "threshold": (0.003, 0.01, 0.02),
    },
    WaveletSettings: {
        "noise_factor": (0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.4),
        "iterations": (8, 15, 30, 80, 160),
        **ESPIRIT,
    },
    SenseSettings: {
        "weight": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        "iterations": (5, 8, 15, 30),
        **ESPIRIT,
    },
}


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


def mean_psnr(method: Method, given: Sequence[Problem]) -> float:
    """Mean PSNR of a method over all problems, dB."""
    return float(np.mean([score(target, method(scan))["psnr"] for scan, target in given]))


def choose(start: Any, options: Options, psnr_of: Callable[[Any], float]) -> tuple[Any, Scores]:
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


def chosen(given: Sequence[Problem], acceleration: float, starts: dict[str, Any]) -> dict[str, Any]:
    """The entry of one acceleration: settings of some methods, mean PSNR with the settings that
    the search starts from and with the best ones."""
    zero_filled = mean_psnr(classical("zero-filled", 1), given)
    entry: dict[str, Any] = {"acceleration": acceleration, "psnr": {"zero-filled": zero_filled}}
    entry["psnr_of_start"] = {}
    for name, start in starts.items():

        def psnr_of(settings: Any, name: str = name) -> float:
            return mean_psnr(classical(PEERS[name], 1, lambda _: settings), given)

        found, tried = choose(start, OPTIONS[type(start)], psnr_of)
        entry[name] = asdict(found)
        entry["psnr_of_start"][name] = tried[json.dumps(asdict(start))]
        entry["psnr"][name] = max(tried.values())
    return entry


def existing(file: Path, chosen_on: str) -> list[dict[str, Any]]:
    """The entries of a file that is to be updated, none without a file.

    Raises:
        InputError: the file cannot be read, or its settings were chosen on other scans.
    """
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries, scans_of_file = content["chosen"], content["chosen_on"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--out: {file} exists and holds no settings: {error}") from error
    if scans_of_file != chosen_on:
        raise InputError(f"--out: the settings in {file} were chosen on {scans_of_file}")
    return entries


def updated(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """An entry with newly chosen settings in place of those of the same methods."""
    scores = {key: {**before.get(key, {}), **after[key]} for key in ("psnr", "psnr_of_start")}
    return {**before, **after, **scores}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    measured = options.data.suffix == ".npz"
    if measured and options.out == OUT:
        raise InputError("--out: settings for scans of a file are not the package's; name a file")
    volumes = [] if measured else [options.data / name for name in VOLUMES]
    check_outputs({"--out": options.out}, [options.data if measured else None, *volumes])
    if any(PEERS[name].startswith("bart") for name in options.methods):
        program()
    how = (
        f"middle slices of {', '.join(VOLUMES)}, {COILS} simulated coils, equispaced and random "
        "masks in turn, seeds 0 to 2; mean PSNR in dB"
    )
    if measured:
        how = f"{options.data.stem}, both directions, an equispaced and a random mask; PSNR in dB"
    before = {entry["acceleration"]: entry for entry in existing(options.out, how)}
    entries = []
    for acceleration in ACCELERATIONS:
        peers, of_data = Peers(acceleration), problems
        if measured:
            (peers,) = (each for each in chosen_peers() if each.acceleration == acceleration)
            of_data = measured_problems
        starts = {name: getattr(peers, name) for name in options.methods}
        entry = chosen(list(of_data(options.data, acceleration)), acceleration, starts)
        entries.append(updated(before.get(acceleration, {}), entry))
    write_json(options.out, {"chosen_on": how, "by": "experiments.mri.peers", "chosen": entries})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.peers", __doc__)
    parser.add_argument(
        "data", type=Path, help="folder of the training volumes, or .npz file of measured scans"
    )
    parser.add_argument("--methods", nargs="+", choices=[*PEERS], default=[*PEERS])
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
