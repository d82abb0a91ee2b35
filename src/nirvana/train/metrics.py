"""Logs of a run: a progress line, metrics.jsonl, TensorBoard, Weights & Biases."""

import hashlib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nirvana.errors import InputError
from nirvana.files import atomic_file
from nirvana.progress import INTERVAL


class MetricsLog:
    """The logs of one run.

    Args:
        folder: the run's folder.
        steps: steps of the whole run.
        unit: what throughput counts.
        notify: receives each message to the user; None prints to standard error.
        active: False in all processes but the main one, which then neither write nor print.
        wandb: whether to log to Weights & Biases as well.

    Raises:
        InputError: when `wandb` is true and the package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        unit: str,
        notify: Callable[[str], None] | None = None,
        active: bool = True,
        wandb: bool = False,
    ) -> None:
        self._file = folder / "metrics.jsonl"
        self._samples = folder / "samples.jsonl"
        self._active = active
        self._wandb = _import_wandb() if wandb and active else None
        self._board_folder = folder / "tensorboard"
        self._steps, self._unit = steps, unit
        self._console = Console(stderr=True, highlight=False)
        self._last_line: float | None = None  # when a line was last printed after a step
        self._notify = notify or (
            lambda text: self._console.print(text, markup=False, soft_wrap=True)
        )
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console, transient=True)

    @contextmanager
    def open(self, start: int) -> Iterator[None]:
        """Opens the logs and shows progress for the duration of the block.

        Args:
            start: steps done before; lines of later steps, written by a run that was killed after
                its last checkpoint, are removed.
        """
        if not self._active:
            yield
            return
        _drop_after(self._file, start)
        _drop_after(self._samples, start)
        self._board = _tensorboard(self._board_folder, start)
        self._run = None
        if self._wandb is not None:
            folder = self._file.parent
            folder.mkdir(parents=True, exist_ok=True)
            # A resumed run continues the same run there: its id is a hash of the folder.
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._run = self._wandb.init(dir=folder, name=folder.name, id=name, resume="allow")
        self._bar = self._progress.add_task(f"step {start}", total=self._steps, completed=start)
        # Without a terminal a bar prints only at the end, so `write` prints a line per log instead.
        try:
            if self._console.is_terminal:
                self._progress.start()
            yield
        finally:
            self._progress.stop()
            if self._board is not None:
                self._board.close()
            if self._run is not None:
                self._run.finish()

    def notify(self, text: str) -> None:
        """Prints a message to the user.

        Args:
            text: one line.
        """
        if self._active:
            self._notify(text)

    def write_samples(self, step: int, samples: dict[str, str | None]) -> None:
        """Appends samples to samples.jsonl.

        Args:
            step: steps done.
            samples: prompt -> continuation, None where there is none.
        """
        if not self._active or not samples:
            return
        with open(self._samples, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "samples": samples}) + "\n")
        if self._board is not None:
            for number, (prompt, text) in enumerate(samples.items()):
                self._board.add_text(f"sample/{number}", f"**{prompt}**{text or ''}", step)

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and shows it.

        Args:
            line: figures, those of `Trainer.metrics` and groups of figures, all finite or None.
        """
        if not self._active:
            return
        with open(self._file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in _flat(line):
                self._board.add_scalar(name, value, line["step"])
        if self._run is not None:
            self._run.log(dict(_flat(line)), step=line["step"])
        self._progress.update(self._bar, completed=line["step"])
        self.status(self._describe(line))
        self._last_line = time.monotonic()
        if not self._console.is_terminal or "valid" in line:
            self.notify(self._describe(line))

    def advance(self, step: int) -> None:
        """Shows that a step is done, without waiting for the device.

        Moves the bar on a terminal; elsewhere prints a plain line after the first step, and when
        the last line is `INTERVAL` seconds old.

        Args:
            step: steps done.
        """
        if not self._active:
            return
        self._progress.update(self._bar, completed=step)
        last = self._last_line
        if not self._console.is_terminal and (last is None or time.monotonic() - last >= INTERVAL):
            self._last_line = time.monotonic()
            self.notify(f"step {step}/{self._steps}")

    def status(self, text: str) -> None:
        """Replaces the text of the progress line.

        Args:
            text: one line.
        """
        if not self._active:
            return
        self._progress.update(self._bar, description=text)

    def _describe(self, line: dict[str, Any]) -> str:
        text = f"step {line['step']}/{self._steps}  loss {figure(line['loss'])}  "
        text += f"lr {line['lr']:.2e}  "
        text += f"{line[f'{self._unit}_per_second']:,.0f} {self._unit}/s"
        text += f"  MFU {line['mfu']:.1%}" if "mfu" in line else ""
        text += f"  {line['memory_gib']:.1f} GiB"
        text += f"  skipped {line['skipped']}" if line["skipped"] else ""
        figures = line.get("valid", {})
        return text + "".join(f"  {name} {figure(value)}" for name, value in figures.items())


def figure(value: float | None) -> str:
    """Returns a figure as text.

    Args:
        value: None for one that is not finite.
    """
    return "not finite" if value is None else f"{value:.4f}"


def finite_or_none(line: dict[str, Any]) -> dict[str, Any]:
    """Replaces figures that are not finite, for which JSON has no number.

    Args:
        line: figures, and groups of figures.

    Returns:
        A copy with None in place of each.
    """
    replaced = {}
    for name, value in line.items():
        if isinstance(value, dict):
            value = finite_or_none(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = None
        replaced[name] = value
    return replaced


def _drop_after(file: Path, start: int) -> None:
    """Removes from a file of JSON lines those of steps after `start`."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing it
    with atomic_file(file) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise InputError("run.wandb = true needs the package wandb: pip install wandb") from None


def _tensorboard(folder: Path, start: int) -> Any:
    """A TensorBoard writer, or None when tensorboard is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _flat(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            present = ((key, each) for key, each in value.items() if each is not None)
            yield from ((f"{name}/{key}", each) for key, each in present)
        elif name != "step" and value is not None:
            yield f"train/{name}", value
