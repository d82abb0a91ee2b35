"""AdamW and Muon on the quickstart, each at several learning rates: python benchmarks/optimisers.py

Trains the packaged quickstart (200 steps, CPU) for each optimiser, rate and seed, one thread a run,
and writes a row for each: bits per byte of the validation novel at half of the steps and at the
end, and the mean loss of the last ten steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from nirvana.errors import InputError, script
from nirvana.files import writable_json, write_json

NAMES = ("adamw", "muon")
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)


def train(name: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """The row of one run."""
    out = folder / f"{name}-{rate}-{seed}"
    settings = {
        "run.out": out,
        "run.seed": seed,
        "optim.name": name,
        "optim.lr": rate,
        "optim.min_lr": rate / 10,
        "data.sample_prompts": [],
    }
    command = [sys.executable, "-m", "nirvana", "train", "quickstart"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name}, {rate}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    scored = [line for line in lines if "valid" in line]
    half, end = (line["valid"]["novels_bits_per_byte"] for line in scored)
    row = {"name": name, "lr": rate, "seed": seed, "loss": scored[-1]["loss"]}
    return row | {"bits_per_byte_at_half": half, "bits_per_byte": end}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of each optimiser and rate")
    parser.add_argument("--at-once", type=int, default=1, help="runs at the same time")
    parser.add_argument("--json", type=writable_json, required=True, help="the rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.at_once) as pool:
        runs = list(product(NAMES, RATES, range(given.seeds)))
        rows = list(pool.map(lambda run: train(run[0], run[1], run[2], Path(folder)), runs))
    write_json(given.json, rows)
    for name, rate in product(NAMES, RATES):
        found = [r["bits_per_byte"] for r in rows if (r["name"], r["lr"]) == (name, rate)]
        print(f"{name:6} {rate:<7g} {sum(found) / len(found):.3f}  {[round(x, 3) for x in found]}")


if __name__ == "__main__":
    script(main)
