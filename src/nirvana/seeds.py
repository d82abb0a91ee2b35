"""Seeds of random numbers that depend on several whole numbers."""

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, such as a run's seed and a step: uint64, every bit of which
    depends on all of them.

    PyTorch's generators on the CPU listen to the lowest 32 bits of a seed alone, so numbers that
    stand side by side in it are not all heard.

    Args:
        numbers: at least 0, of any size.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
