"""A program that several processes run: a small training which one of them may interrupt.

torchrun processes.py INTERRUPTION STEP CONFIG [--key value ...] [--resume]
"""

import os
import signal
import sys
from functools import partial

import torch

from nirvana.errors import InputError
from nirvana.train import float8, language
from nirvana.train.language import LanguageTask, train
from nirvana.train.trainer import Trainer


def interrupt(kind, at):
    """Makes the last process stop or fail when it fetches the data of a step."""
    original = LanguageTask.batch

    def batch(task, step, micro):
        if step == at and os.environ.get("RANK") == "1":
            if kind == "unreadable":
                raise InputError("shard-7: can no longer be read")
            signal.raise_signal(signal.SIGTERM)  # for every micro batch: repeated at once, as
            # when a scheduler and torchrun both pass it on
        return original(task, step, micro)

    LanguageTask.batch = batch


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
    _, kind, at, config, *arguments = sys.argv
    if kind == "rounded":
        rounded()
    elif kind == "fused":
        fused()
    elif kind == "float8":
        float8_anywhere()
    elif kind != "none":
        interrupt(kind, int(at))
    resume = "--resume" in arguments
    try:
        train(config, [a for a in arguments if a != "--resume"], resume)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
