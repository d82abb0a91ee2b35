"""Runs the study of adaptation; every finished measurement is one row of results.

    python -m experiments.adapt.collect
    python -m experiments.adapt.prepare --data DATA
    python -m experiments.adapt.study --jobs --minutes 9.5     # all that is missing, in this time
    python -m experiments.adapt.page

First the equal models are trained, and step sizes and settings of `tiny` are learned and chosen;
then everything is measured; the cost in time last and alone. With `--jobs` the parts that do not
need each other run beside each other, in processes that share the device. A row that is
there already is not measured again.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.adapt.context import Context
from experiments.adapt.data import FOLDER, RESULTS, TOKENS, load_data
from experiments.adapt.parts import EQUAL, PARTS, WAVES
from experiments.common.program import make_parser
from experiments.common.results import read_rows
from nirvana.bench.measure import environment
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs

MODULE = "experiments.adapt.study"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    check_outputs({"--out": options.out}, [options.data / "documents.json.xz"])
    load_data(options.data)  # unpacked once, before processes share it
    options.models.mkdir(parents=True, exist_ok=True)
    chosen = options.part or [*PARTS]
    trainings = [] if options.part else _train(options)
    code = 0
    for wave in WAVES:
        parts = [part for part in wave if part in chosen]
        if "equal" in wave:
            code |= _wait(trainings)
        if options.jobs and len(parts) > 1:
            code |= _wait([_start(part, options) for part in parts])
        else:
            code |= _run(parts, options)
    print(f"{len(read_rows(options.out))} rows")
    return code


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(MODULE, __doc__)
    parser.add_argument("--part", action="append", choices=[*PARTS], default=[])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--models", type=Path, default=FOLDER / "models", help="folder to write")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--documents", type=int, help="of a domain at most")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a document")
    parser.add_argument("--train-tokens", type=int, default=48_000_000, help="of an equal model")
    parser.add_argument("--batches", type=int, default=25, help="from which step sizes are learned")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    parser.add_argument("--jobs", action="store_true", help="parts beside each other")
    parser.add_argument("--minutes", type=float, help="start no measurement later")
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # of --minutes, for processes
    options = parser.parse_args(arguments)
    if not 512 <= options.tokens <= TOKENS:
        raise InputError(f"--tokens = {options.tokens} must be from 512 to {TOKENS}")
    if options.minutes is not None:
        options.end = time.time() + 60 * options.minutes
    return options


def _run(parts: Sequence[str], options: argparse.Namespace) -> int:
    """Runs parts in this process; one that fails does not cost the others."""
    device = choose_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    context = Context(
        load_data(options.data),
        options.models,
        options.out,
        device,
        about,
        options.documents,
        options.tokens,
        options.batches,
        options.end,
    )
    code = 0
    for part in parts:
        began = time.time()
        try:
            PARTS[part](context)
        except Exception:
            traceback.print_exc()
            print(f"{part}: failed", flush=True)
            code = 1
        print(f"{part}: {time.time() - began:.0f} s", flush=True)
    return code


def _start(part: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts a part in a process of its own."""
    words = ["--part", part]
    for name, value in vars(options).items():
        if name not in ("part", "jobs", "minutes") and value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.Popen([sys.executable, "-m", MODULE, *words])


def _train(options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Starts the training of the equal models that are missing."""
    children = []
    device = choose_device(options.device)
    for variant in EQUAL:
        folder = options.models / variant
        if folder.is_dir():
            continue
        words = ["--variant", variant, "--out", str(folder), "--data", str(options.data)]
        words += ["--tokens", str(options.train_tokens), "--device", str(device)]
        if device.type == "cpu":
            words += ["--rows", "2", "--context", "256", "--size", "toy"]
        command = [sys.executable, "-m", "experiments.adapt.control", *words]
        with open(options.models / f"{variant}.log", "wb") as log:
            children.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    return children


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for processes; 1 if one failed."""
    failed = [child for child in children if child.wait() != 0]
    for child in failed:
        print(f"failed: {child.args}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    script(main)
