"""Seeds of random numbers that depend on several whole numbers."""

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, such as a run's seed and a step: uint64, every bit of which
    depends on all of them.

    torch's CPU generator uses only the low 32 bits of a seed, so a seed packed as
    (run << 32 | step) would ignore the run.

    Args:
        numbers: at least 0, of any size.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
