"""A task of two layers for tests of the loop; also a program that trains it, to be killed."""

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.distributed import ProcessContext
from nirvana.train.loop import fit
from nirvana.train.task import Task

OPTIM = OptimConfig(lr=0.05, min_lr=0.01, warmup_steps=2, accumulation=2)


class StandIn(Task):
    """Regression with dropout, batch norm (buffers) and a frozen part."""

    unit = "samples"
    units_per_step = 8

    def __init__(self, hooks=None):
        torch.manual_seed(3)
        self.model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Linear(1, 1)
        )
        self.model[4].requires_grad_(False)
        self.hooks = hooks or {}
        self.compiled = 0

    def trainable(self):
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def batch(self, step, micro):
        generator = torch.Generator().manual_seed(100 * step + micro)
        return step, micro, torch.randn(4, 3, generator=generator)

    def loss(self, batch):
        step, micro, x = batch
        factor = self.hooks[step]() if micro == 0 and step in self.hooks else None
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss = loss if factor is None else loss * factor
        return loss, {"twice": 2 * loss.detach()}

    def validate(self):
        assert not self.model.training
        return {"noise": float(torch.rand(()))}

    def prepare(self, processes, compiled):
        self.compiled += compiled

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "exported").touch()


def run_config(out, **more):
    config = RunConfig(
        out=str(out), steps=12, device="cpu", precision="float32", compile=False, log_interval=1
    )
    return replace(config, **more)


ALONE = ProcessContext(torch.device("cpu"))


def train(out, hooks=None, resume=False, config=None, accept_changes=False, optim=OPTIM, **more):
    """Trains a stand-in; returns it, the outcome, and the lines that were logged."""
    task, logged = StandIn(hooks), []
    run, config = run_config(out, **more), config or {"a": 1}
    outcome = fit(task, optim, run, config, resume, ALONE, logged.append, accept_changes)
    return task, outcome, logged


def stop():
    """A hook that signals the run to stop, as a job scheduler does."""
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    train(Path(sys.argv[1]), {step: lambda: time.sleep(0.05) for step in range(10**4)}, steps=10**4)
