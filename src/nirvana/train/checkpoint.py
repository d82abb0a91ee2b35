"""Checkpoints: folders that are complete or absent, and are verified when read.

`RUN/checkpoints/step-00001000/` holds a `shard-*.safetensors` of each process that wrote it
(trained parameters, buffers, and the optimiser's moments under "parameter:moment") and `state.json`
(step, position in the data, resolved configuration, SHA-256 of the shards). The metadata of a shard
gives the offsets of its tensors in the whole ones, so that any number of processes can read what
any other number wrote. No part of a checkpoint is ever unpickled.
"""

import errno
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from nirvana.errors import InputError
from nirvana.files import publish_folder, sha256, write_json
from nirvana.train.distributed import ProcessContext
from nirvana.train.optim import MuonAndAdamW

_NAME = re.compile(r"step-(\d{8,})")
# Checkpoints of a single process are intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk or the quota is full


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk."""

    folder: Path
    step: int  # steps done
    config: dict[str, Any]  # resolved configuration of the run that wrote it
    position: dict[str, Any]  # which data follow, see `Task.position`
    skipped: int  # steps skipped because loss or gradient was not finite


class Writer:
    """Writes the checkpoints of a run in the background, one at a time.

    As a context manager it waits at the end until the last one is complete.

    Args:
        run: the run's folder.
        model: its trained parameters and persistent buffers are saved; frozen parameters are not,
            since training does not change them.
        parameters: the trained ones by name.
        optimizer: its state is saved.
        config: resolved configuration.
        keep: number of the newest checkpoints that are kept.
        pinned: a step whose checkpoint is kept as well; 0: none.
        replaced: names of checkpoints that are removed once the next one is complete.
        processes: the processes of the run; all of them call every method together.
    """

    def __init__(
        self,
        run: str | Path,
        model: nn.Module,
        parameters: Iterable[tuple[str, nn.Parameter]],
        optimizer: torch.optim.Optimizer | MuonAndAdamW,
        config: dict[str, Any],
        keep: int,
        processes: ProcessContext,
        pinned: int = 0,
        replaced: Iterable[str] = (),
    ) -> None:
        self._run, self._config, self._keep, self._pinned = Path(run), config, keep, pinned
        self._model, self._named = model, list(parameters)
        self._optimizer, self._processes = optimizer, processes
        self._replaced = set(replaced)
        self._writing: Future | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.wait()

    def save(self, step: int, position: dict[str, Any], skipped: int = 0) -> Path:
        """Copies the state of a step and starts writing it in the background.

        Args:
            step: steps done.
            position: see `Task.position`.
            skipped: steps skipped so far.

        Returns:
            The folder, which appears when the checkpoint is complete.

        Raises:
            InputError: when the disk is too full for this checkpoint or the previous one.
        """
        self.wait()
        folder = folder_of(self._run, step)
        partial = folder.with_name(f".{folder.name}.partial")
        if self._processes.is_main:
            for remains in folder.parent.glob(".step-*"):  # a killed process was writing there
                shutil.rmtree(remains)
            partial.mkdir(parents=True)
        self._processes.barrier()
        state = {"step": step, "position": position, "config": self._config, "skipped": skipped}
        with _one_line(folder):
            self._writing = async_save(
                _tensors(self._model, self._named, self._optimizer),
                storage_writer=_Storage(
                    partial, folder, state, self._keep, self._pinned, self._replaced - {folder.name}
                ),
                process_group=self._processes.background,
                no_dist=self._processes.size == 1,
            )  # type: ignore[assignment]
        self._folder, self._replaced = folder, set()
        return folder

    def wait(self) -> None:
        """Waits until the last checkpoint is complete on the disk.

        Raises:
            InputError: when the disk was too full for it.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with _one_line(self._folder):
                writing.result()


class _Storage(HuggingFaceStorageWriter):
    """Writes safetensors shards into a temporary folder and renames it when all are written."""

    def __init__(
        self,
        partial: Path,
        folder: Path,
        state: dict[str, Any],
        keep: int,
        pinned: int,
        replaced: set[str],
    ) -> None:
        super().__init__(str(partial), save_distributed=True)
        self._partial, self._folder, self._state = partial, folder, state
        self._keep, self._pinned, self._replaced = keep, pinned, replaced

    def finish(self, metadata: Any, results: Any) -> None:
        """Publishes the folder; called in the main process, after all have written their shard."""
        sums = {file.name: sha256(file) for file in sorted(self._partial.glob("*.safetensors"))}
        state = {**self._state, "sha256": sums}
        write_json(self._partial / "state.json", {**state, "sum": _sum(state)})
        publish_folder(self._partial, self._folder)
        folders = _folders(self._folder.parents[1])
        # A later checkpoint is damaged, or of the decay of a run that was prolonged: otherwise the
        # run would have resumed from it.
        earlier = [each for each in folders if _step(each) <= self._state["step"]]
        earlier = [each for each in earlier if each.name not in self._replaced]
        pinned = [each for each in earlier if _step(each) == self._pinned]
        for old in set(folders).difference(earlier[: self._keep], pinned):
            shutil.rmtree(old)


@contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Turns a full disk into an `InputError`."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        reasons: list[BaseException] = [error]
        if isinstance(error, CheckpointException):
            reasons += [reason for reason, _ in error.failures.values()]
        for reason in reasons:
            if isinstance(reason, OSError) and reason.errno in FULL:
                raise no_room(folder, reason) from error
        # CheckpointException is a BaseException, which `except Exception` does not catch.
        raise RuntimeError(f"{folder} could not be written") from error


def no_room(path: Path, reason: OSError) -> InputError:
    """Returns the error of a run that can no longer write.

    Args:
        path: file or folder that was being written.
        reason: the error of the operating system.
    """
    return InputError(
        f"{path} cannot be written: {reason.strerror}; complete checkpoints are kept. "
        "Free some space, then continue with --resume"
    )


def folder_of(run: str | Path, step: int) -> Path:
    """Returns the folder of a checkpoint.

    Args:
        run: the run's folder.
        step: steps done.
    """
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def has_checkpoint(run: str | Path) -> bool:
    """Returns whether a run has checkpoints, damaged ones included.

    Args:
        run: the run's folder.
    """
    return bool(_folders(run))


def undamaged(run: str | Path) -> Iterator[Checkpoint]:
    """Reads the checkpoints of a run, the newest first; warns about each damaged one.

    Args:
        run: the run's folder.

    Yields:
        The undamaged ones.

    Raises:
        InputError: when there are checkpoints and every one is damaged.
    """
    folders, found = _folders(run), False
    for folder in folders:
        try:
            checkpoint = read(folder)
        except InputError as error:
            warnings.warn(f"{error}; skipped", stacklevel=2)
        else:
            found = True
            yield checkpoint
    if folders and not found:
        raise InputError(
            f"{Path(run) / 'checkpoints'}: every checkpoint is damaged; train into another folder"
        )


def latest(run: str | Path) -> Checkpoint | None:
    """Finds the newest undamaged checkpoint of a run; warns about each damaged one.

    Args:
        run: the run's folder.

    Returns:
        The checkpoint; None when the run has none at all.

    Raises:
        InputError: when there are checkpoints and every one is damaged.
    """
    return next(undamaged(run), None)


def find_checkpoint(source: str | Path) -> Checkpoint:
    """Finds a checkpoint by a path.

    Args:
        source: a run's folder, for its newest undamaged checkpoint, or the folder of a checkpoint.

    Returns:
        The checkpoint.

    Raises:
        InputError: for a folder that is neither, a run without checkpoints, and damaged ones.
    """
    source = Path(source)
    if (source / "state.json").is_file():
        return read(source)
    if not (source / "checkpoints").is_dir():
        raise InputError(f"{source}: neither a run (with checkpoints/) nor a checkpoint")
    found = latest(source)
    if found is None:
        raise InputError(f"{source}: holds no checkpoint yet")
    return found


def read(folder: str | Path) -> Checkpoint:
    """Reads the state of a checkpoint and verifies the SHA-256 of every file.

    Args:
        folder: of the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        InputError: naming the file that is damaged.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        values = (state[name] for name in ("step", "config", "position", "skipped"))
        checkpoint = Checkpoint(folder, *values)
        if state.pop("sum") != _sum(state):
            raise ValueError("state.json: its SHA-256 is not the recorded one")
        for name, expected in state["sha256"].items():
            if sha256(folder / name) != expected:
                raise ValueError(f"{name}: its SHA-256 is not the recorded one")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is damaged: {error}") from None
    return checkpoint


@torch.no_grad()
def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | MuonAndAdamW | None = None,
    alone: bool = True,
) -> None:
    """Loads a checkpoint into a model and, if given, its optimiser, in place.

    Args:
        checkpoint: see `read` and `latest`.
        model: of the configuration that wrote the checkpoint.
        parameters: the trained ones by name.
        optimizer: over `parameters`; None: its state is not loaded.
        alone: False when all processes of a run call this together, each for its shards.

    Raises:
        InputError: when the checkpoint is of another model.
    """
    named = list(parameters)
    reader = HuggingFaceStorageReader(str(checkpoint.folder))
    saved = reader.read_metadata().state_dict_metadata
    shapes = {name: tuple(value.size) for name, value in saved.items()}  # type: ignore[union-attr]
    moments = [name for name in shapes if ":" in name]
    present = {name: tuple(value.shape) for name, value in _tensors(model, named).items()}
    for name in sorted({*shapes, *present}.difference(moments)):
        there, here = shapes.get(name), present.get(name)
        if there != here:
            raise InputError(
                f"{checkpoint.folder}: {name} has shape {there} there and {here} in the "
                "model of this configuration; give the configuration it was saved with"
            )
    if optimizer is not None:
        parameter = dict(named)
        for full in moments:
            name, _, key = full.rpartition(":")
            like = parameter[name].detach()
            # The fused optimiser keeps its step counters on the parameter's device.
            optimizer.state[parameter[name]][key] = (
                torch.zeros((), device=like.device) if key == "step" else torch.zeros_like(like)
            )
    load(
        _tensors(model, named, optimizer),
        storage_reader=reader,
        no_dist=alone,
    )


def _sum(state: dict[str, Any]) -> str:
    """The SHA-256 of the content of state.json, independent of its whitespace."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _folders(run: str | Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [f for f in (Path(run) / "checkpoints").glob("step-*") if _NAME.fullmatch(f.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _tensors(
    model: nn.Module,
    named: list[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer | MuonAndAdamW | None = None,
) -> dict[str, Tensor]:
    """Trained parameters, persistent buffers and moments by name; views, not copies."""
    tensors = {name: parameter.detach() for name, parameter in named}
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                tensors[name] = value
    if optimizer is not None:
        for name, parameter in named:
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}:{key}"] = value
    # The format's reader cannot address a tensor without a dimension.
    return {name: t.reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
