"""Adapts a codec to measured scans and scores its images before and after.

    python -m experiments.mri.adaptation --method codec --codec FOLDER --scans SCANS.npz
    python -m experiments.mri.adaptation --method codec --codec FOLDER --parameters gains ...
    python -m experiments.mri.adaptation --method scratch --codec FOLDER --scratch 300 ...

Scans, directions and masks are those of `experiments.mri.measured`. The adaptation sees the
measured lines alone, the scores compare with all of them. `--scratch` adapts random weights of the
same parts, as zero-shot self-supervised learning does. Every row is written as soon as it is
measured; rows that the results hold are not measured again.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from experiments.common.program import make_parser
from experiments.common.results import Row, append_row, read_rows
from experiments.mri.measured import MASKS, scans
from experiments.mri.study import SAMPLINGS, codec_method
from nirvana.bench.measure import commit
from nirvana.device import choose_device
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.mri.adapt.adaptation import AdaptedMethod
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.evaluate.metrics import head_mask, score
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import ifft2c, rss

SCRATCH_LR, SCRATCH_LOOKS = 5e-4, 8
KEY = ("method", "parameters", "lr", "scan", "direction", "mask", "mask_seed")


def config_of(options: argparse.Namespace) -> ScanAdaptConfig:
    """How the codec adapts."""
    if options.scratch:
        lr = options.lr or SCRATCH_LR
        steps, every = options.scratch, max(options.scratch // SCRATCH_LOOKS, 1)
        return ScanAdaptConfig("all", steps, lr, check_every=every)
    return ScanAdaptConfig(options.parameters, options.steps, options.lr)


def problems(options: argparse.Namespace) -> Iterator[tuple[Row, Acquisition, np.ndarray]]:
    """What names a row, the undersampled scan and its target; one mask of every scan first."""
    chosen = list(scans(options.scans))
    for seed in range(options.masks):
        for sampling in options.samplings:
            for name, direction, kspace in chosen:
                target = rss(ifft2c(torch.from_numpy(kspace))).numpy()
                mask = SAMPLINGS[sampling].mask(kspace.shape[-1], seed).numpy()
                row = {"scan": name, "direction": direction, "coils": kspace.shape[1]}
                row |= {"mask": sampling, "mask_seed": seed}
                yield row, Acquisition(kspace, mask, name=name), target


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    check_outputs({"--results": options.results}, [*options.scans, options.codec])
    model = load_codec(options.codec, choose_device(options.device))
    if options.scratch:
        torch.manual_seed(0)
        model = CodecModel(model.config, model.backbone).to(model.device).eval()
    config = config_of(options)
    about: Row = {"method": options.method, "parameters": config.parameters, "lr": config.step_size}
    about |= {"config": asdict(config), "commit": options.commit or commit() or "unknown"}
    done = {tuple(row[name] for name in KEY) for row in read_rows(options.results)}
    for named, acquisition, target in problems(options):
        row = about | named
        if tuple(row[name] for name in KEY) in done:
            continue
        adapted, inside = AdaptedMethod(model, 4, config), head_mask(target)
        row["before"] = score(target, codec_method(model)(acquisition), inside)
        started = time.perf_counter()
        images = np.stack([each.magnitude for each in adapted(acquisition)])
        row["seconds"] = time.perf_counter() - started
        row["after"] = score(target, images, inside)
        row["record"] = {name: x for name, x in adapted.record.items() if name != "config"}
        append_row(options.results, row)
        gain = row["after"]["psnr"] - row["before"]["psnr"]
        shown = (row[name] for name in KEY)
        print(*shown, f"{row['before']['psnr']:.2f} {gain:+.3f} dB", sep="\t", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.adaptation", __doc__)
    parser.add_argument("--method", required=True, help="name in the rows")
    parser.add_argument("--codec", required=True, help="folder of a codec, or a packaged one")
    parser.add_argument(
        "--parameters", default=ScanAdaptConfig.parameters, choices=("gains", "backbone", "all")
    )
    parser.add_argument("--lr", type=float, help="step size; default: that of the parameters")
    parser.add_argument("--steps", type=int, default=ScanAdaptConfig.steps, help="of each fold")
    parser.add_argument(
        "--scratch", type=int, default=0, help="steps of each fold by which random weights adapt"
    )
    parser.add_argument("--scans", type=Path, nargs="+", required=True, help=".npz files")
    parser.add_argument("--samplings", nargs="+", default=[*SAMPLINGS], choices=[*SAMPLINGS])
    parser.add_argument("--masks", type=int, default=MASKS, help="seeds of each sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--results", type=Path, default=Path("runs/mri-adaptation.jsonl"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
