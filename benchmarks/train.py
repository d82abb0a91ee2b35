"""Times a whole training, as `nirvana train` runs it, on packed documents with state reset.

    python benchmarks/train.py --preset 1.3b --out benchmarks/results/train-1.3b [--key value ...]

OUT gets `metrics.jsonl` of the run and `summary.json`: median tokens per second, MFU and peak
memory, without the first tenth of the steps, in which blocks are compiled. Whatever else is given
overrides a setting of the packaged configuration PRESET.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import name_of
from recipe import configuration, overrides, write_shards

from nirvana.errors import script
from nirvana.files import atomic_file, writable_json, write_json
from nirvana.train.language import train


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a whole training.")
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options, others = parser.parse_known_args()
    path = configuration(options.preset)
    writable_json(options.out / "summary.json")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = overrides(
            write_shards(folder),
            folder / "run",
            options.steps,
            max(1, options.steps // 10),
            options.batch_size,
            options.accumulation,
        )
        train(path, [*settings, *others])
        with atomic_file(options.out / "metrics.jsonl") as file:
            shutil.copyfile(folder / "run/metrics.jsonl", file)
        config = json.loads((folder / "run/config.json").read_text())
    summary: dict[str, Any] = summarize(options.out / "metrics.jsonl", options.steps)
    cuda = torch.cuda.is_available() and config["run"]["device"] != "cpu"
    summary["device"] = name_of(torch.device("cuda" if cuda else "cpu"))
    summary["torch"] = torch.__version__
    summary["tokens_per_step"] = (
        config["data"]["context_length"] * options.batch_size * options.accumulation
    )
    write_json(options.out / "summary.json", summary)
    print(json.dumps(summary, indent=2))


def summarize(metrics: Path, steps: int) -> dict[str, Any]:
    """Medians over the lines after the first tenth."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["step"] > steps / 10]
    summary = {
        "steps": steps,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in kept),
        "memory_gib": max(line["memory_gib"] for line in kept),
        "last_loss": lines[-1]["loss"],
        "skipped": lines[-1]["skipped"],
    }
    if "mfu" in kept[-1]:
        summary["mfu"] = statistics.median(line["mfu"] for line in kept)
    return summary


if __name__ == "__main__":
    script(main)
