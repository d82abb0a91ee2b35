"""Trains one model for a short time on simulated scans and scores it on measured ones.

    python -m experiments.mri.short_trainings --method short-codec --without phase --scans SCANS.npz
    python -m experiments.mri.short_trainings --method short-e2e-varnet --seed 1 --scans SCANS.npz

What a group of properties of measured scans is worth is the difference between a training without
it and one with all of them: `VARIANTS` names the groups. Seeds change data and weights. All runs of
a comparison need equal `--steps`. Methods beside the codec and its peers are the codec with one
part or one way of training more (`experiments.mri.methods.SHORT`). A finished run is not repeated;
its row has the scores on all scans of the .npz files (`experiments.mri.measured`), under masks of
columns and of points, and, with `--simulated`, on the study's test volumes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.common.results import Row, append_row, read_rows
from experiments.mri import measured, study
from experiments.mri.methods import SHORT
from nirvana.bench.measure import commit
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs
from nirvana.mri.data.simulation.config import PROPERTIES
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.model.checkpoint import load_codec, save_codec

NOTHING = "nothing"
ARRAYS = "arrays"  # sensitivities of measured coils, which are data and no setting
VARIANTS: dict[str, tuple[str, ...]] = {
    NOTHING: (),
    "everything": (*PROPERTIES, ARRAYS),
    "fine_phase": ("fine_phase",),
    "other_phase": ("tissue_phase", "cavity_phase", "fat", "ramp", "phase"),
    "coils": ("birdcage", "loops", "shading", ARRAYS),
    "noise": ("noise", "noise_spread", "noise_correlation", "prewhitened"),
    "scanner": ("kspace_filter", "zero_padding", "partial_fourier"),
    "scalp": ("scalp",),
    "flow": ("vessels", "pulsation"),
    "wrap": ("wrap",),
}
"""The settings that a training leaves out, by the name of the group."""


def training_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options of the study's training."""
    left_out = VARIANTS[options.without]
    given = ["--method", options.method, "--seed", str(options.seed)]
    given += ["--steps", str(options.steps), "--data", str(options.data)]
    given += ["--out", str(options.out / options.without), "--device", options.device]
    given += ["--without", *(name for name in left_out if name != ARRAYS)]
    switches = {
        "--no-arrays": ARRAYS in left_out,
        "--no-graphs": options.no_graphs,
        "--tiny": options.tiny,
    }
    return study.parse([*given, *(name for name, on in switches.items() if on)])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    check_outputs({"--results": options.results}, [options.data, *options.scans])
    key = (options.method, options.without, options.seed)
    for row in read_rows(options.results):
        if key == (row["method"], row["without"], row["seed"]):
            print(f"{', '.join(map(str, key))}: already done, see {options.results}")
            return
    try:
        archive = np.load(options.data, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(f"--data: {options.data} cannot be read: {error}") from error
    model, facts = study.train(training_options(options), archive)
    folder = options.out / options.without / f"codec-{options.method}-{options.seed}"
    save_codec(model, folder, torch.float16)
    row: Row = {"method": options.method, "without": options.without, "seed": options.seed}
    row["commit"] = options.commit or commit() or "unknown"
    row |= {"torch": torch.__version__, **facts}
    # The saved codec is scored, in half precision.
    trained = load_codec(folder, choose_device(options.device))
    cuda = trained.device.type == "cuda"
    row["device"] = torch.cuda.get_device_name(trained.device) if cuda else "cpu"
    method = study.codec_method(trained, 8)
    row["scans"] = [
        scored
        for points in (False, True)
        for scored in measured.evaluate(method, options.scans, options.masks, points)
    ]
    if options.simulated:
        row["volumes"] = study.evaluate(method, archive, 1 if options.tiny else 0)
    append_row(options.results, row)
    measured.print_table([{"method": " ".join(map(str, key)), **each} for each in row["scans"]])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.short_trainings", __doc__)
    parser.add_argument("--method", required=True, choices=[*SHORT])
    parser.add_argument("--without", default=NOTHING, choices=[*VARIANTS], help="what is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data", type=Path, default=Path("data/mri-study.npz"))
    parser.add_argument("--scans", type=Path, nargs="+", required=True, help=".npz files")
    parser.add_argument("--masks", type=int, default=measured.MASKS, help="seeds of each sampling")
    parser.add_argument(
        "--simulated", action="store_true", help="score it on the study's test volumes, too"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/mri-short"), help="folder of runs")
    parser.add_argument(
        "--results", type=Path, default=Path("runs/mri-short/short-trainings.jsonl.xz")
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a minute on any machine, for a test")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
