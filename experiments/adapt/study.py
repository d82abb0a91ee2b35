"""Runs the study of adaptation; every finished measurement is one row of results.

    python -m experiments.adapt.collect
    python -m experiments.adapt.prepare --data DATA
    python -m experiments.adapt.study --minutes 9.5          # all that is missing, in this time
    python -m experiments.adapt.page

The parts, in order: `train` the equal models (beside the rest, in processes of their own), learn
the `steps` of `tiny`, `select` settings on validation documents, then `test`, `lora`, `recall`,
`long` and `time`. A row that is there already is not measured again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.adapt import parts
from experiments.adapt.context import Context
from experiments.adapt.data import FOLDER, RESULTS, TOKENS, load_data
from experiments.common.program import make_parser
from experiments.common.results import read_rows
from nirvana.bench.measure import environment
from nirvana.device import choose_device
from nirvana.errors import InputError, script
from nirvana.files import check_outputs

MODULE = "experiments.adapt.study"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(MODULE, __doc__)
    parser.add_argument("--part", action="append", choices=[*parts.PARTS], default=[])
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--models", type=Path, default=FOLDER / "models", help="folder to write")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--documents", type=int, help="of a domain at most")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a document")
    parser.add_argument("--train-tokens", type=int, default=48_000_000, help="of an equal model")
    parser.add_argument("--batches", type=int, default=60, help="from which step sizes are learned")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of the code, for the record, where there is no git")
    parser.add_argument("--minutes", type=float, help="start no measurement later")
    options = parser.parse_args(arguments)
    if options.tokens % TOKENS and options.tokens > TOKENS:
        raise InputError(f"--tokens = {options.tokens} must be at most {TOKENS}")
    check_outputs({"--out": options.out}, [options.data / "documents.json.xz"])
    device = choose_device(options.device)
    about = environment(device)
    about["commit"] = about["commit"] or options.commit
    torch.backends.cuda.matmul.allow_tf32 = True
    context = Context(
        load_data(options.data),
        options.models,
        options.out,
        device,
        about,
        options.documents,
        options.tokens,
        None if options.minutes is None else time.monotonic() + 60 * options.minutes,
    )
    chosen = options.part or [*parts.PARTS]
    children = _train(options, context) if "train" in chosen else {}
    code = 0
    for name in chosen:
        began = time.monotonic()
        if name == "train":
            continue
        if name in parts.NEEDS_EQUAL_MODELS:
            code |= _wait(children)
        if name == "steps":
            parts.steps(context, options.batches)
        else:
            parts.PARTS[name](context)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    code |= _wait(children)
    print(json.dumps({"rows": len(read_rows(options.out)), "peak": about.get("gpu")}))
    return code


def _train(options: object, context: Context) -> dict[str, subprocess.Popen[bytes]]:
    """Starts the training of the equal models that are missing."""
    children = {}
    for variant in parts.EQUAL:
        folder = context.models / variant
        if folder.is_dir():
            continue
        words = ["--variant", variant, "--out", str(folder), "--data", str(options.data)]  # type: ignore[attr-defined]
        words += ["--tokens", str(options.train_tokens), "--device", str(context.device)]  # type: ignore[attr-defined]
        if context.device.type == "cpu":
            words += ["--rows", "2", "--context", "256", "--size", "toy"]
        context.models.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "experiments.adapt.control", *words]
        with open(context.models / f"{variant}.log", "wb") as log:
            children[variant] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return children


def _wait(children: dict[str, subprocess.Popen[bytes]]) -> int:
    """Waits for the trainings; returns 1 if one failed."""
    failed = [variant for variant, child in children.items() if child.wait() != 0]
    for variant in failed:
        print(f"{variant}: the training failed, see its log", flush=True)
    children.clear()
    return 1 if failed else 0


if __name__ == "__main__":
    script(main)
