"""A program that several processes run: a small training which one of them may interrupt.

torchrun processes.py TRAINING INTERRUPTION STEP CONFIG [--key value ...] [--resume]
"""

import importlib
import os
import signal
import sys
from functools import partial

import torch

from nirvana.errors import InputError
from nirvana.train import float8, language
from nirvana.train.trainer import Trainer

TRAININGS = {
    "language": ("nirvana.train.language", "LanguageTask", "train"),
    "distillation": ("nirvana.train.distill", "DistillTask", "distill"),
    "codec": ("nirvana.mri.train.task", "ReconstructionTask", "train"),
}
"""Module, task and function of each."""


def interrupt(kind, at, task_class):
    """Makes the last process stop or fail when it fetches the data of a step."""
    original = task_class.batch

    def batch(task, step, micro):
        if step == at and os.environ.get("RANK") == "1":
            if kind == "unreadable":
                raise InputError("shard-7: can no longer be read")
            signal.raise_signal(signal.SIGTERM)  # for every micro batch: repeated at once, as
            # when a scheduler and torchrun both pass it on
        return original(task, step, micro)

    task_class.batch = batch


def rounded():
    """What `run.precision = "bf16"` is on a GPU, on the CPU."""
    Trainer.autocast = lambda trainer: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    language.parallelize = partial(replaced, language.parallelize)


def fused():
    """The optimiser that CUDA has, and products rounded as there."""
    rounded()
    torch.optim.AdamW = partial(in_fused_form, torch.optim.AdamW)


def float8_anywhere():
    """Products in float8 on the CPU, too."""
    float8.has_float8 = lambda device: True


def in_fused_form(original, groups, **options):
    """AdamW in its fused form, whatever the configuration."""
    return original(groups, **{**options, "fused": True})


def replaced(original, *arguments):
    """`parallelize` with products rounded to bfloat16."""
    original(*arguments[:-1], torch.bfloat16)


if __name__ == "__main__":
    _, training, kind, at, config, *arguments = sys.argv
    module, task_class, train = TRAININGS[training]
    module = importlib.import_module(module)
    if kind == "rounded":
        rounded()
    elif kind == "fused":
        fused()
    elif kind == "float8":
        float8_anywhere()
    elif kind != "none":
        interrupt(kind, int(at), getattr(module, task_class))
    resume = "--resume" in arguments
    try:
        getattr(module, train)(config, [a for a in arguments if a != "--resume"], resume)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
