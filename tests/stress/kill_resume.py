"""Kills a training outright, again and again, and compares what it resumes to with a run in peace.

    python tests/stress/kill_resume.py --kills 20 [--processes 2] [--seed 0]

A small language model is trained on the CPU through the command line, with a checkpoint after every
second step. SIGKILL comes at a random moment after the first new step: while a step is computed or
while a checkpoint is being written. After each resumption that got anywhere, and at the end, every
line of the loss curve must equal, to the bit, that of the run that was never killed; and no more
steps than lie between two checkpoints may have been lost. Exit code 0 when all of this held.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKPOINT_INTERVAL = 2
STEPS = 120
CONFIG = """
[model]
hidden_size = 128
num_hidden_layers = 4
num_attention_heads = 4
sliding_window = 32
[data]
train = {{ a = "{shards}" }}
context_length = 128
batch_size = 2
[optim]
lr = 3e-3
warmup_steps = 10
accumulation = 2
[run]
out = "{out}"
steps = {steps}
device = "cpu"
precision = "float32"
compile = false
log_interval = 1
validation_interval = 0
checkpoint_interval = {interval}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills and resumes a training.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return stress(Path(folder), options.kills, options.processes, random.Random(options.seed))


def stress(folder: Path, kills: int, processes: int, chance: random.Random) -> int:
    reference = curve(finish(write_config(folder, "reference"), processes))
    good = writing = runs = 0
    most_lost = 0
    number = 0
    while number < kills:
        runs += 1
        config = write_config(folder, f"run-{runs}")
        out = folder / f"run-{runs}"
        while number < kills:
            process, before = start(config, processes), curve(out)
            while process.poll() is None and curve(out)[-1:] in ([], before[-1:]):
                time.sleep(0.01)
            time.sleep(chance.random() * 1.5)
            if process.poll() is not None:
                break  # finished before it could be killed
            kill(process)
            number += 1
            reached, saved = curve(out), newest(out)
            half = any((out / "checkpoints").glob(".step-*"))
            writing += half
            lost = (reached[-1][0] if reached else 0) - saved
            most_lost = max(most_lost, lost)
            same = reached == reference[: len(reached)]
            # A checkpoint is copied at its step and written while the next steps go on.
            good += same and lost <= 2 * CHECKPOINT_INTERVAL
            print(
                f"kill {number}: after step {reached[-1][0] if reached else 0}, checkpoint of "
                f"{saved}{', another half written' if half else ''}: "
                f"{'the same curve' if same else 'ANOTHER CURVE'}",
                flush=True,
            )
        if curve(finish(config, processes)) != reference:
            print(f"run {runs} ended with another curve than the reference")
            return 1
    print(
        f"{good} of {kills} kills resumed to the identical loss curve ({STEPS} steps, {runs} runs, "
        f"{processes} processes); {writing} fell while a checkpoint was being written; at most "
        f"{most_lost} steps were lost"
    )
    return 0 if good == kills else 1


def write_config(folder: Path, name: str) -> Path:
    shards = folder / "shards"
    if not shards.is_dir():
        chance = random.Random(0)
        words = ["tide", "stone", "river", "lamp", "seven", "green", "walks", "sings", "under"]
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            for _ in range(400):
                text = " ".join(chance.choices(words, k=60))
                file.write(json.dumps({"text": text}) + "\n")
        tokenize = ["data", "tokenize", folder / "text.jsonl", "--out", shards]
        subprocess.run([*command(1, folder), *tokenize, "--vocab-size", "300"], check=True)
    path = folder / f"{name}.toml"
    path.write_text(
        CONFIG.format(shards=shards, out=folder / name, steps=STEPS, interval=CHECKPOINT_INTERVAL)
    )
    return path


def command(processes: int, folder: Path) -> list[str]:
    script = folder / "program.py"
    script.write_text("from nirvana.cli import main; main()")
    if processes == 1:
        return [sys.executable, str(script)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *torchrun, str(script)]


def start(config: Path, processes: int) -> subprocess.Popen:
    """A run that goes on from its newest checkpoint."""
    log = open(config.with_suffix(".log"), "ab")  # noqa: SIM115  (the run writes to it)
    return subprocess.Popen(
        [*command(processes, config.parent), "train", str(config), "--resume"],
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a run and to all that it has started."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    doomed = [process.pid]
    for parent in doomed:
        doomed += [child for child, of in pairs if of == parent]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(config: Path, processes: int) -> Path:
    """The folder of a run that was let come to its end."""
    process = start(config, processes)
    if process.wait() != 0:
        raise RuntimeError(config.with_suffix(".log").read_text())
    return config.with_suffix("")


def curve(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every whole line that a run has written."""
    file = out / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # was being written when the run was killed
        found.append((values["step"], values["loss"], values["gradient_norm"]))
    return found


def newest(out: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [file.name for file in (out / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


if __name__ == "__main__":
    sys.exit(main())
