"""Times training on 1, 2, 4 or 8 GPUs of one host, once it is shown to compute the same on each.

    python benchmarks/scaling.py --gpus 1,2 --out benchmarks/results/scaling [--key value ...]

Starts torchrun for every count: documents packed into rows, a micro batch of 4 x 4096 tokens on
each GPU, FSDP2. N GPUs have to pass a gate first: the losses of one process that computes the same
N micro batches a step, and, from a checkpoint written on N and resumed on N / 2, those of the run
that went on. Without it there is no figure of N. One GPU is always measured, since
efficiency is against it. `OUT/summary.json` is written after each count. Whatever else is given
overrides a setting of the packaged configuration PRESET.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measured import ERROR, Measurement
from recipe import configuration, overrides, write_shards
from torch.cuda import nccl

from nirvana.config import load_config
from nirvana.device import HAS_KERNELS
from nirvana.errors import InputError, script
from nirvana.files import writable_json, write_json
from nirvana.train.config import LanguageConfig

PROGRAM = Path(__file__).with_name("measured.py")
COUNTS = (1, 2, 4, 8)
PROFILED = 3  # steps, after the timed ones
WARMUP = 4  # times the steps, for the learning rate to rise to the configuration's
OURS = (
    "optim.accumulation",
    "optim.warmup_steps",
    "parallel.shard",
    "run.checkpoint_interval",
    "run.device",
    "run.log_interval",
    "run.out",
    "run.steps",
    "run.validation_interval",
)
KERNEL_SHARES = ("communication", "exposed", "idle")


class GateError(Exception):
    """Several processes do not compute what one computes."""


class Study:
    """All trainings of one call.

    Args:
        options: of the command line.
        others: settings that override the configuration's.
        folder: for what is deleted at the end: data, runs, checkpoints.

    Raises:
        InputError: for settings that are wrong or belong to this program.
    """

    def __init__(self, options: argparse.Namespace, others: list[str], folder: Path) -> None:
        for argument in others:
            name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
            if name in OURS:
                raise InputError(f"--{name} is set by this program; see --help for what is not")
        self.options, self.others, self.folder = options, others, folder
        self.config = configuration(options.preset)
        self.stop = options.steps + PROFILED
        # The next multiple, where another would be written, lies behind the end.
        self.saved = self.stop // 2 + 1
        self.shards = folder / "shards"
        checked = load_config(LanguageConfig, self.config, self.arguments("checked", 1))
        most = max(options.gpus) * checked.data.batch_size * self.stop
        self.tokens = most * checked.data.context_length

    def arguments(self, out: str, accumulation: int, *more: str) -> list[str]:
        """Settings of a training into a folder of that name."""
        steps = self.stop + 1  # never reached: no checkpoint and no model at the end
        batch_size, gate = self.options.batch_size, self.options.gate
        # Where the loss falls steeply, what rounding changes doubles with every step.
        warmup = WARMUP * steps
        settings = overrides(
            self.shards, self.folder / out, steps, warmup, batch_size, accumulation
        )
        ours = [f"--run.log_interval={gate}", f"--run.device={self.options.device}"]
        return [*settings, *ours, *more, *self.others]

    def plan(
        self, name: str, out: str, accumulation: int, stop: int, *more: str, **others: Any
    ) -> Measurement:
        """One training."""
        arguments = self.arguments(out, accumulation, *more)
        return Measurement(
            name, str(self.config), arguments, str(self.folder / out), stop, **others
        )

    def alone(self) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """The figures of one process, and for each other count what its losses must be."""
        timed = self.plan("timed", "1", 1, self.stop, profiled=self.options.steps)
        references = {
            gpus: self.plan("reference", f"1-of-{gpus}", gpus, self.options.gate)
            for gpus in self.options.gpus
            if gpus > 1
        }
        self.launch(1, [timed, *references.values()])
        found = {gpus: self.read(plan, 1)[0] for gpus, plan in references.items()}
        return self.figures(self.read(timed, 1), 1, 0, saved=False), found

    def together(self, gpus: int, shard: int, reference: dict[str, Any]) -> dict[str, Any]:
        """Gate and figures of one count.

        Args:
            shard: `parallel.shard`.
            reference: what one process found with the same micro batches.

        Returns:
            an entry of the summary; without figures where the gate failed.
        """
        out = f"{gpus}-{shard}"
        sharding = f"--parallel.shard={shard}"
        saving = f"--run.checkpoint_interval={self.saved}"
        timed = self.plan(
            "timed",
            out,
            gpus,
            self.stop,
            sharding,
            saving,
            saved=self.saved,
            profiled=self.options.steps,
        )
        self.launch(gpus, [timed])
        found = self.read(timed, gpus)
        tolerance = self.options.tolerance
        entry: dict[str, Any] = {"gpus": gpus, "shard": shard}
        entry["gate"] = compare(found, [reference], 0, self.options.gate, tolerance)
        entry["gate"]["skipped"] = self.skipped(out)
        entry["gate"]["passed"] &= entry["gate"]["skipped"] == 0
        if not entry["gate"]["passed"]:
            return entry
        half, num_steps = gpus // 2, self.options.gate // 2
        stop = self.saved + num_steps
        sharding = f"--parallel.shard={shard if shard < half else 0}"
        resumed = self.plan("resumed", out, gpus, stop, sharding, saving, resume=True)
        self.launch(half, [resumed])
        entry["resumed"] = compare(
            self.read(resumed, half), found, self.saved, num_steps, tolerance
        )
        entry["resumed"]["gpus"] = half
        shutil.rmtree(self.folder / out)
        return entry | self.figures(found, gpus, shard) if entry["resumed"]["passed"] else entry

    def launch(self, gpus: int, plans: list[Measurement]) -> None:
        """Makes trainings with so many processes.

        Raises:
            InputError: what one of them found wrong with the input.
            ChildProcessError: when one of them failed otherwise.
        """
        path = self.folder / "plan.json"
        write_json(path, [dataclasses.asdict(plan) for plan in plans])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(gpus), str(PROGRAM), str(path)]
        names = ", ".join(f"{Path(plan.out).name} {plan.name}" for plan in plans)
        print(f"{gpus} of {max(self.options.gpus)} processes: {names}", file=sys.stderr)
        with subprocess.Popen(command) as running:
            try:
                code = running.wait()
            except BaseException:
                running.terminate()  # torchrun ends its processes, which it would not if killed
                raise
        if (self.folder / ERROR).exists():
            raise InputError((self.folder / ERROR).read_text(encoding="utf-8"))
        if code:
            raise ChildProcessError(f"training on {gpus} processes failed, see above")

    def read(self, plan: Measurement, gpus: int) -> list[dict[str, Any]]:
        """What each process found."""
        texts = [plan.result(rank).read_text(encoding="utf-8") for rank in range(gpus)]
        return [json.loads(text) for text in texts]

    def skipped(self, out: str) -> int:
        """Steps that were not finite, by the run's own count."""
        lines = (self.folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["skipped"]

    def figures(
        self, found: list[dict[str, Any]], gpus: int, shard: int, saved: bool = True
    ) -> dict[str, Any]:
        """Medians over the timed steps; shares are means over the processes."""
        steps, gate = self.options.steps, self.options.gate
        # A step's time lasts until the next begins: with a log or a checkpoint, if one follows.
        timed = [
            step
            for step in range(steps // 4, steps)
            if (step + 1) % gate and not (saved and step + 1 == self.saved)
        ]
        seconds = [max(each["seconds"][step] for each in found) for step in timed]
        median = statistics.median(seconds)
        kernels = [each["kernels"] for each in found if each["kernels"] is not None]
        return {
            "gpus": gpus,
            "shard": shard,
            "device": found[0]["device"],
            "tokens_per_step": found[0]["tokens_per_step"],
            "tokens_per_second": found[0]["tokens_per_step"] / median,
            "step_seconds": {
                "median": median,
                "least": min(seconds),
                "most": max(seconds),
                "steps": len(seconds),
            },
            "memory_gib": max(each["memory_gib"] for each in found),
            **{
                share: statistics.mean(each[share] for each in kernels) if kernels else None
                for share in KERNEL_SHARES
            },
            "kernels": kernels,
        }


def compare(
    found: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    first: int,
    num_steps: int,
    tolerance: float,
) -> dict[str, Any]:
    """Whether the losses of some steps are the same, relative to their size."""
    ours, theirs = (losses(each, first, num_steps) for each in (found, reference))
    pairs = list(zip(ours, theirs, strict=True))
    absolute = [abs(a - b) for a, b in pairs]
    relative = [difference / abs(b) for difference, (_, b) in zip(absolute, pairs, strict=True)]
    # Each on its own: a NaN is within no tolerance, and would not always be the maximum.
    passed = all(difference <= tolerance for difference in relative)
    finite = all(difference < float("inf") for difference in relative)
    return {
        "passed": passed,
        "tolerance": tolerance,
        "largest_relative": max(relative) if finite else None,
        "largest_absolute": max(absolute) if finite else None,
        "first_step": first,
        "losses": [a if abs(a) < float("inf") else None for a in ours],
        "reference": [b if abs(b) < float("inf") else None for b in theirs],
    }


def losses(found: list[dict[str, Any]], first: int, num_steps: int) -> list[float]:
    """The mean loss of each of some steps, over the micro batches of all processes."""
    means = []
    for step in range(first, first + num_steps):
        parts = [loss for each in found for loss in each["losses"][step - each["first"]]]
        means.append(statistics.fmean(parts))
    return means


def table(entries: list[dict[str, Any]]) -> str:
    """A short one, for people."""
    names = ("GPUs", "shard", "tokens/s", "efficiency", "GiB", *KERNEL_SHARES)
    rows: list[tuple[str, ...]] = [names]
    for entry in entries:
        shares = (entry[share] for share in KERNEL_SHARES)
        rows.append(
            (
                str(entry["gpus"]),
                str(entry["shard"] or entry["gpus"]),
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['efficiency']:.1%}",
                f"{entry['memory_gib']:.1f}",
                *("-" if share is None else f"{share:.1%}" for share in shares),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def run(options: argparse.Namespace, others: list[str]) -> None:
    """Everything.

    Raises:
        InputError: for wrong options or settings.
        GateError: after the summary, which names the gate, was written.
    """
    check(options)
    writable_json(options.out / "summary.json")
    on_cuda = options.device != "cpu" and torch.cuda.is_available()
    entries: list[dict[str, Any]] = []
    summary = {
        "preset": options.preset,
        "settings": others,
        "torch": torch.__version__,
        "nccl": list(nccl.version()) if on_cuda else None,
        "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE"),
        "complete": False,
        "entries": entries,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        study = Study(options, others, Path(name))
        write_shards(study.folder, study.tokens // 1000 + 10)
        alone, references = study.alone()
        entries.append({**alone, "efficiency": 1.0})
        for gpus in options.gpus[1:]:
            for shard in (0, options.hybrid) if 0 < options.hybrid < gpus else (0,):
                write_json(options.out / "summary.json", summary)
                entry = study.together(gpus, shard, references[gpus])
                entries.append(entry)
                for gate in ("gate", "resumed"):
                    if not entry[gate]["passed"]:
                        write_json(options.out / "summary.json", summary)
                        raise GateError(
                            f"{gpus} processes do not compute what one computes ({gate}), so "
                            f"there is no figure of them: see {options.out / 'summary.json'}"
                        )
                rate = alone["tokens_per_second"] * gpus
                entry["efficiency"] = entry["tokens_per_second"] / rate
    summary["complete"] = True
    write_json(options.out / "summary.json", summary)
    print(table(entries))


def check(options: argparse.Namespace) -> None:
    """Raises an `InputError` for options that this machine or the program does not allow."""
    wrong = [count for count in options.gpus if count not in COUNTS]
    if wrong:
        raise InputError(f"--gpus {wrong[0]}: must be among {', '.join(map(str, COUNTS))}")
    options.gpus = sorted({1, *options.gpus})
    if options.gate < 2 or options.steps < options.gate:
        raise InputError(f"--gate {options.gate}: must be from 2 to --steps, {options.steps}")
    if options.hybrid and options.hybrid not in COUNTS:
        raise InputError(f"--hybrid {options.hybrid}: must be among 1, 2, 4, 8")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here")
    if options.device == "cpu" or not torch.cuda.is_available():
        return
    here = torch.cuda.device_count()
    if max(options.gpus) > here:
        raise InputError(f"--gpus {max(options.gpus)}: there are {here} here")
    if not HAS_KERNELS:
        missing = "the kernels that are to be measured are missing"
        raise InputError(f"{missing}: pip install 'nirvana[cuda]'")


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and the rest of it."""
    parser = argparse.ArgumentParser(description="Times training on several GPUs of one host.")
    add = parser.add_argument
    add("--gpus", type=numbers, default=[1, 2], help="counts, of 1, 2, 4 and 8; default 1,2")
    add("--preset", default="1.3b", help="packaged configuration to train; default 1.3b")
    add("--batch-size", type=int, default=4, help="rows of a micro batch; default 4")
    add("--steps", type=int, default=40, help="steps, the last three quarters timed; default 40")
    add("--gate", type=int, default=20, help="steps whose losses must agree; default 20")
    add("--tolerance", type=float, default=1e-3, help="of losses, relative; default 1e-3")
    add("--hybrid", type=int, default=0, help="counts above it also with copies cut in so many")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu for a dry run")
    add("--out", type=Path, required=True, help="folder of summary.json")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    # As from the keyboard: processes end, and gigabytes of temporary files go.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        script(lambda: run(*parse(sys.argv[1:])))
    except (GateError, ChildProcessError) as error:
        sys.exit(str(error))
