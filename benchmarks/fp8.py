"""The loss of trainings in float8 beside bf16: python benchmarks/fp8.py --train DATA --valid DATA

DATA is a folder whose folders are token shards (`nirvana data tokenize`), all of the packaged
`tiny`'s tokenizer. For each seed a model of D 1024 is trained in both precisions, on the same
batches from the same weights. The file of --json gets both curves, and by how much the loss of
float8 is higher, relative to bf16: over the last tenth of the steps, and in bits per byte of the
validation, which is in bf16. Runs that the file has are not run again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from nirvana.bench.measure import environment
from nirvana.errors import InputError, script
from nirvana.files import writable_json, write_json
from nirvana.packaged import packaged_config

PRECISIONS = ("bf16", "fp8")
MODEL = {
    "preset": "340m",
    "vocab_size": 8192,
    "num_hidden_layers": 4,
    "num_prelude_layers": 1,
    "sliding_window": 512,
}
CONTEXT = 2048
LINES = 100  # of a curve


def settings(options: argparse.Namespace, precision: str, seed: int, out: Path) -> dict[str, Any]:
    """The settings of a run that differ from those of the packaged 340m."""
    steps = max(1, options.tokens // (CONTEXT * options.rows))
    sources = {
        kind: {folder.name: str(folder) for folder in sorted(place.iterdir()) if folder.is_dir()}
        for kind, place in (("train", options.train), ("valid", options.valid))
    }
    return {
        **{f"model.{name}": value for name, value in MODEL.items()},
        **{f"data.{kind}": _toml(found) for kind, found in sources.items()},
        "data.weights": _toml(dict.fromkeys(sources["train"], 1.0)),
        "data.context_length": CONTEXT,
        "data.batch_size": options.rows,
        "data.sample_prompts": [],
        "optim.accumulation": 1,
        "optim.lr": 1e-3,
        "optim.min_lr": 1e-4,
        "optim.warmup_steps": steps // 20,
        "run.steps": steps,
        "run.precision": precision,
        "run.seed": seed,
        "run.out": out,
        "run.log_interval": max(1, steps // LINES),
        "run.validation_interval": 0,
        "run.checkpoint_interval": 0,
    }


def train(
    options: argparse.Namespace, precision: str, seed: int, others: list[str]
) -> dict[str, Any]:
    """The row of one run.

    Raises:
        InputError: with the reason if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "nirvana", "train", packaged_config("340m")]
        given = settings(options, precision, seed, out)
        command += [f"--{key}={value}" for key, value in given.items()]
        done = subprocess.run([*command, *others], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"{precision}, seed {seed}: {reason}")
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    steps = given["run.steps"]
    (valid,) = [line["valid"] for line in lines if "valid" in line]
    return {
        "precision": precision,
        "seed": seed,
        "tokens": steps * CONTEXT * options.rows,
        "curve": [[line["step"], line["loss"]] for line in lines],
        "loss": mean(line["loss"] for line in lines if line["step"] > 0.9 * steps),
        "valid": valid,
        "tokens_per_second": lines[len(lines) // 2]["tokens_per_second"],
        "skipped": lines[-1]["skipped"],
    }


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how much float8 exceeds bf16, relative, for each seed that has both."""
    found = {(row["precision"], row["seed"]): row for row in rows}
    differences = []
    for seed in sorted({row["seed"] for row in rows}):
        if all((precision, seed) in found for precision in PRECISIONS):
            plain, rounded = (found[precision, seed] for precision in PRECISIONS)
            name = "mean_bits_per_byte"
            difference = {
                "loss": rounded["loss"] / plain["loss"] - 1,
                name: rounded["valid"][name] / plain["valid"][name] - 1,
            }
            differences.append({"seed": seed} | difference)
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="folder of folders of shards")
    parser.add_argument("--valid", type=Path, required=True, help="the same, scored at the end")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="of a run")
    parser.add_argument("--rows", type=int, default=32, help=f"of {CONTEXT} tokens, of a step")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=writable_json, required=True)
    options, others = parser.parse_known_args()
    for place in (options.train, options.valid):
        if not place.is_dir():
            raise InputError(f"{place}: no such folder")
    rows = json.loads(options.json.read_text())["runs"] if options.json.exists() else []
    done = {(row["seed"], row["precision"]) for row in rows}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed, precision in product(range(options.seeds), PRECISIONS):
        if (seed, precision) in done:
            continue
        rows.append(train(options, precision, seed, others))
        found = {"environment": environment(device), "model": MODEL, "relative": compare(rows)}
        write_json(options.json, found | {"runs": rows})
        print(f"seed {seed}, {precision}: loss {rows[-1]['loss']:.4f}, {rows[-1]['valid']}")
    for each in compare(rows):
        print(each)


def _toml(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{name} = {json.dumps(value)}" for name, value in table.items()) + "}"


if __name__ == "__main__":
    script(main)
