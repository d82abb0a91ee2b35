"""Trainings in two processes, and what they leave in their folders."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """As in `torchrun`: how a sum is cut into threads shows in its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torchrun(program: Path, arguments: Sequence[object]) -> tuple[int, str]:
    """Runs a program in two processes under torchrun: `Forks.together`, with the seconds in which
    each process imports, and also on two GPUs.

    Args:
        program: a file.
        arguments: of the program.

    Returns:
        the exit code, and what both logged.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(program), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def weights(run: Path) -> bytes:
    """The trained model's."""
    return (run / "model" / "model.safetensors").read_bytes()


def curve(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without times and memory."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = ("step", "loss", "lr", "gradient_norm", "valid")
    return [{name: line.get(name) for name in names} for line in lines]
