"""A program that several processes run: a small training which one of them may interrupt.

torchrun processes.py INTERRUPTION STEP CONFIG [--key value ...] [--resume]
"""

import os
import signal
import sys

from nirvana.errors import InputError
from nirvana.train.language import LanguageTask, train


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


if __name__ == "__main__":
    _, kind, at, config, *arguments = sys.argv
    if kind != "none":
        interrupt(kind, int(at))
    resume = "--resume" in arguments
    try:
        train(config, [a for a in arguments if a != "--resume"], resume)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
