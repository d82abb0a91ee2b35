"""A task of two layers for tests of the loop; also a program that trains it, to be killed."""

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nirvana.train.config import OptimConfig, RunConfig
from nirvana.train.loop import fit

OPTIM = OptimConfig(lr=0.05, min_lr=0.01, warmup_steps=2, accumulation=2)


class StandIn:
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

    def loss(self, step, micro):
        factor = self.hooks[step]() if micro == 0 and step in self.hooks else None
        generator = torch.Generator().manual_seed(100 * step + micro)
        x = torch.randn(4, 3, generator=generator)
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        loss = loss if factor is None else loss * factor
        return loss, {"twice": 2 * loss.detach()}

    def validate(self):
        assert not self.model.training
        return {"noise": float(torch.rand(()))}

    def compile(self):
        self.compiled += 1

    def export(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "exported").touch()


def run_config(out, **more):
    config = RunConfig(
        out=str(out), steps=12, device="cpu", precision="float32", compile=False, log_interval=1
    )
    return replace(config, **more)


def train(out, hooks=None, resume=False, **more):
    """Trains a stand-in; returns it, the outcome, and what was said."""
    task, said = StandIn(hooks), []
    outcome = fit(task, OPTIM, run_config(out, **more), {"a": 1}, resume, said.append)
    return task, outcome, said


def stop():
    """A hook that asks the run to stop, as a job scheduler does."""
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    train(Path(sys.argv[1]), {step: lambda: time.sleep(0.05) for step in range(10**4)}, steps=10**4)
