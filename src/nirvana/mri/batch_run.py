"""A folder of scans, one after another: resumed after an interruption, shared among processes, and
with files that cannot be reconstructed left out where the user wants that.

Every scan's results are a folder that appears as a whole, with a record of what they were made
from in its `metrics.json`. Nothing else is remembered between runs and nothing is sent between
processes: what is finished is what these folders show.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.files import atomic_folder, replaceable_folder, sole_use, write_json

RESULTS = "metrics.json"
SKIPPED = ".skipped.json"
RECORD = "made_from"
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Share:
    """The scans of a run that one of several processes works on: each `size`-th.

    Attributes:
        rank: of this process among those that one launcher started and ends together.
        world_size: number of these.
        task: of a Slurm array, from 0, whose tasks know nothing of one another.
        tasks: number of these.
    """

    rank: int = 0
    world_size: int = 1
    task: int = 0
    tasks: int = 1

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.tasks * self.world_size

    @property
    def index(self) -> int:
        """Of this process among all."""
        return self.task * self.world_size + self.rank

    def takes(self, number: int) -> bool:
        """Whether the scan of this number, from 0, is one of this process's."""
        return number % self.size == self.index

    @property
    def reports(self) -> bool:
        """Whether this process awaits the others of its launcher and reports for all, scans that
        were left out with an exit code: at the first such code a launcher ends its other processes.
        """
        return self.rank == 0

    def launched(self) -> "list[Share]":
        """The shares of the processes of the same launcher, this one's among them."""
        return [replace(self, rank=rank) for rank in range(self.world_size)]

    def lock(self, out: Path) -> Path:
        """The folder in `out` that is there while a process works on this share."""
        return out / f".process-{self.index + 1}-of-{self.size}"


def share_of(environment: Mapping[str, str]) -> Share:
    """The share of this process: rank RANK of WORLD_SIZE, as torchrun sets them, in each task of a
    Slurm array.

    Args:
        environment: `os.environ`.

    Raises:
        InputError: the tasks of the array are not evenly numbered, so that a process does not know
            which of them it is.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    ranks = number("RANK", 0), number("WORLD_SIZE", 1)
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return Share(*ranks)
    tasks, step = number("SLURM_ARRAY_TASK_COUNT", 1), number("SLURM_ARRAY_TASK_STEP", 1)
    first = number("SLURM_ARRAY_TASK_MIN", 0)
    last = number("SLURM_ARRAY_TASK_MAX", first + (tasks - 1) * step)
    task, uneven = divmod(number("SLURM_ARRAY_TASK_ID", 0) - first, step)
    if uneven or not 0 <= task < tasks or last != first + (tasks - 1) * step:
        raise InputError(
            f"task {environment['SLURM_ARRAY_TASK_ID']} of a Slurm array of {tasks} tasks that are "
            "not evenly numbered; give an array such as 0-7, or --no-share"
        )
    return Share(*ranks, task, tasks)


@dataclass(frozen=True)
class ScanJob:
    """One scan of a run.

    Attributes:
        scan: the file that is named in tables and messages.
        files: all files that hold the scan.
        folder: where its results go.
        number: of the scan in the run, from 0; its seed depends on it.
        settings: all that determines the results besides the files.
    """

    scan: Path
    files: tuple[Path, ...]
    folder: Path
    number: int
    settings: Mapping[str, Any]

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the results are made from: the settings, and size and time of change of the
        files."""
        found = []
        for file in self.files:
            with suppress(OSError):
                status = file.stat()
                found.append([file.name, status.st_size, status.st_mtime_ns])
        return json.loads(json.dumps({"files": found, "settings": dict(self.settings)}))

    @property
    def skipped(self) -> Path:
        """The file with the reason why a scan was left out."""
        return self.folder.with_name(self.folder.name + SKIPPED)

    def finished(self) -> dict[str, Any] | None:
        """The results, where they were made from these files with these settings."""
        return self._made_from_this(self.folder / RESULTS)

    def reason(self) -> str | None:
        """Why the scan was left out by a run with these files and settings; None: it was not."""
        found = self._made_from_this(self.skipped)
        return None if found is None else str(found.get("reason"))

    def _made_from_this(self, file: Path) -> dict[str, Any] | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = isinstance(found, dict) and found.get(RECORD) == self.record
        return found if same else None


@dataclass(frozen=True)
class BatchResult:
    """The results of a run.

    Attributes:
        scans: the contents of each finished scan's `metrics.json`, in the order of the scans.
        skipped: (scan, reason) of those that were left out.
        left: number of scans that other processes have not finished yet.
        kept: number of this process's scans that had been finished before.
    """

    scans: list[dict[str, Any]]
    skipped: list[tuple[Path, str]]
    left: int
    kept: int


def run_batch(
    jobs: Sequence[ScanJob],
    check: Callable[[ScanJob], object],
    work: Callable[[ScanJob, Path], dict[str, Any]],
    *,
    out: Path | None = None,
    resume: bool = False,
    skip: bool = False,
    share: Share | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> BatchResult:
    """Works on this process's share of the scans.

    Args:
        jobs: all scans of the run, the same in every process.
        check: raises an `InputError` for a scan that cannot be reconstructed; called for all scans
            of the share before the first of several is worked on, unless `skip`.
        work: writes a scan's results into a folder that exists, without `metrics.json`, and
            returns what that is to contain.
        out: the folder in which the scans' folders are; None for a single scan that has none.
        resume: keep the results of scans that are finished.
        skip: leave out scans for which `work` raises an `InputError`.
        share: of this process; None takes all scans.
        notify: called with a line when a scan is left out.

    Returns:
        The results of the whole run, as far as they are there.

    Raises:
        InputError: of the first scan that cannot be reconstructed, unless `skip`; or another
            process works on the same share.
    """
    share = share or Share()
    own = [job for job in jobs if share.takes(job.number)]
    todo = [job for job in own if not (resume and job.finished())]
    for job in todo if len(todo) > 1 and not skip else ():
        check(job)
    with nullcontext() if out is None else _sole_share(out, own, share):
        if out is not None and share.index == 0:
            known = {job.skipped for job in jobs}
            for gone in set(out.glob(f"*{SKIPPED}")) - known:  # of files that were removed
                gone.unlink()
        for job in todo:
            if out is not None:
                job.skipped.unlink(missing_ok=True)
            try:
                with atomic_folder(job.folder) as folder:
                    results = {**work(job, folder), RECORD: job.record}
                    write_json(folder / RESULTS, results)
            except InputError as error:
                if not skip:
                    raise
                notify(left_out(job.scan, str(error)))
                described = {"scan": str(job.scan), "reason": str(error), RECORD: job.record}
                write_json(job.skipped, described)
    if out is not None and share.reports:
        for other in share.launched():
            theirs = [job for job in jobs if other.takes(job.number)]
            while other.lock(out).exists() or not all(map(_is_done, theirs)):
                time.sleep(SECONDS_BETWEEN_LOOKS)
    return _collected(jobs, len(own) - len(todo))


def left_out(scan: Path, reason: str) -> str:
    """The line about a scan that was left out, which names it once."""
    return "left out: " + (reason if str(scan) in reason else f"{scan}: {reason}")


def _is_done(job: ScanJob) -> bool:
    return job.finished() is not None or job.reason() is not None


def _collected(jobs: Iterable[ScanJob], kept: int) -> BatchResult:
    scans, skipped, left = [], [], 0
    for job in jobs:
        reason = job.reason()
        if reason is not None:
            skipped.append((job.scan, reason))
        elif found := job.finished():
            scans.append(found)
        else:
            left += 1
    return BatchResult(scans, skipped, left, kept)


def batch_folder(out: Path, names: Sequence[str]) -> Path:
    """The folder of a run, absolute, if the results of scans of these names may go there.

    Raises:
        InputError: as `files.replaceable_folder`.
    """
    patterns = [RESULTS, f".{RESULTS}.*", ".process-*", f"*{SKIPPED}"]
    for name in map(escape, names):
        patterns += [name, f".{name}.*"]
    return replaceable_folder(out, patterns)


@contextmanager
def _sole_share(out: Path, own: Iterable[ScanJob], share: Share) -> Iterator[None]:
    """Keeps other processes out of this process's share while the block runs, and removes what
    killed ones have left half-written."""
    lock = share.lock(out)
    with sole_use(lock):
        for ended in out.glob(".process-*"):
            with suppress(InputError), sole_use(ended):
                shutil.rmtree(ended)
        for job in own:
            for half in out.glob(f".{escape(job.folder.name)}.*"):
                if half.is_dir():
                    shutil.rmtree(half)
                else:
                    half.unlink()
        try:
            yield
        finally:
            shutil.rmtree(lock)
            with suppress(OSError):  # unless something was written there
                out.rmdir()


def local_device(name: str) -> str:
    """The device of this process: of those of a machine that share a run, each takes a GPU.

    Args:
        name: see `device.choose_device`.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{local}" if name == "cuda" or torch.cuda.is_available() else name
