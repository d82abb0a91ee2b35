"""Slices of a scan in worker processes of one thread each.

NumPy only: worker processes import this module and must start without torch.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def map_slices(
    function: Callable[[T], R], tasks: Iterable[T], count: int, workers: int | None
) -> Iterator[R]:
    """`map` over tasks that are made one by one, in this process or in worker processes.

    Processes are started by "spawn": a script that calls this needs the usual
    `if __name__ == "__main__":`, or `workers=1`, which starts none.

    Args:
        function: of the module level.
        tasks: its arguments; only a few more than there are workers exist at a time.
        count: number of tasks.
        workers: processes; at most, and by default, one for each core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, cores or 1, count)
    if workers <= 1:
        yield from map(function, tasks)
        return
    waiting: deque[Future[Any]] = deque()
    with _pool(workers) as pool:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    before = {key: os.environ.get(key) for key in THREAD_SETTINGS}
    # The numerical libraries read these when they are loaded, so they must be set in the
    # environment that the workers inherit.
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
