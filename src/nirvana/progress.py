"""Progress on standard error: bars on a terminal, plain lines in a file or a pipe."""

import time
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

INTERVAL = 10.0
"""Seconds between two plain lines about one task."""


class ProgressLines(Progress):
    """rich's progress bars on a terminal, and lines such as `tokenizing: 3/10` elsewhere.

    A line is printed when a task is added, when it is complete, and in between at most every
    `interval` seconds.

    Args:
        columns: of the bars, see `rich.progress`.
        interval: seconds between two lines about one task.
        disable: show nothing.
    """

    def __init__(
        self, *columns: str | ProgressColumn, interval: float = INTERVAL, disable: bool = False
    ) -> None:
        console = Console(stderr=True, highlight=False)
        super().__init__(*columns, console=console, transient=True, disable=disable)
        self._interval = interval
        self._printed: dict[TaskID, tuple[float, str]] = {}

    def start(self) -> None:
        """Shows the bars on a terminal."""
        if self.console.is_terminal:
            super().start()

    def stop(self) -> None:
        """Removes the bars from a terminal."""
        if self.console.is_terminal:
            super().stop()

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """See `rich.progress.Progress.add_task`; without a `total` there is none."""
        task = super().add_task(description, *args, **{"total": None, **fields})
        self._print(task)
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress.advance`."""
        super().advance(task_id, advance)
        self._print(task_id)

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """See `rich.progress.Progress.update`."""
        super().update(task_id, **fields)
        self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        if self.console.is_terminal or self.disable:
            return
        task = self._tasks[task_id]
        text = task.description
        if task.total:
            text += f": {task.completed:,.0f}/{task.total:,.0f}"
        now = time.monotonic()
        printed_at, printed = self._printed.get(task_id, (-self._interval, ""))
        due = task.finished or now - printed_at >= self._interval or task_id not in self._printed
        if due and text != printed:
            self._printed[task_id] = now, text
            self.console.print(text, markup=False, soft_wrap=True)
