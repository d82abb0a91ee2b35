"""Measures time and memory of a codec on slices of a scan.

    python -m experiments.mri.speed --codec FOLDER
    python -m experiments.mri.speed --device cpu --threads 2 --slices 2

Appends a row to a .jsonl file: seconds of a single slice and of each slice in a volume, and peaks
of memory.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common.program import make_parser
from experiments.common.results import append_row
from nirvana.bench.measure import commit
from nirvana.device import choose_device
from nirvana.errors import script
from nirvana.files import check_outputs
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling


def peak_memory(device: torch.device) -> float | None:
    """Peak of tensor memory on a GPU, GiB; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def speed(
    model: CodecModel, side: int, coils: int, slices: int, repeats: int = 3
) -> dict[str, float | None]:
    """Seconds and memory of square slices after a warm-up.

    Args:
        model: the codec, on the device that is measured.
        side: H and W.
        coils: number of coils.
        slices: of the volume, which is reconstructed in one batch.
        repeats: runs, of which the median counts.

    Returns:
        `seconds` of a single slice, `seconds_in_volume` of each slice of the volume, and
        `memory_gib`, see `peak_memory`.
    """
    device = model.device
    kspace = fft2c(torch.rand(slices, coils, side, side).to(torch.complex64))
    mask = Sampling().mask(side, 0)
    kspace *= mask

    def seconds(volume: Tensor) -> float:
        times = []
        for _ in range(1 + repeats):  # the first warms up
            started = time.perf_counter()
            model.reconstruct(volume, mask, batch_size=slices)
            times.append(time.perf_counter() - started)
        return float(np.median(times[1:]))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return {
        "side": side,
        "coils": coils,
        "seconds": seconds(kspace[:1]),
        "seconds_in_volume": seconds(kspace) / slices,
        "memory_gib": peak_memory(device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    check_outputs({"--results": options.results}, [options.codec])
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_codec(options.codec, choose_device(options.device))
    cuda = model.device.type == "cuda"
    row = {
        "method": options.method,
        "commit": options.commit or commit() or "unknown",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(model.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "slices": options.slices,
        **speed(model, options.side, options.coils, options.slices, options.repeats),
        # of the whole process, in KiB on Linux
        "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    append_row(options.results, row)
    print(row)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The program's options."""
    parser = make_parser("experiments.mri.speed", __doc__)
    parser.add_argument("--method", default="codec", help="name in the row")
    parser.add_argument("--codec", default="codec", help="folder of a codec, or a packaged one")
    parser.add_argument("--side", type=int, default=320, help="height and width")
    parser.add_argument("--coils", type=int, default=16)
    parser.add_argument("--slices", type=int, default=8, help="of the volume, in one batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; default: PyTorch's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--results", type=Path, default=Path("runs/mri-speed.jsonl"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    script(main)
