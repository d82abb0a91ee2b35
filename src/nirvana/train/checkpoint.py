"""Checkpoints: folders that are whole or absent, and are known to be undamaged when read.

`RUN/checkpoints/step-00001000/` holds `model.safetensors` (what is trained, and buffers),
`optimizer.safetensors` (its moments), `random.safetensors` (states of the random generators) and
`state.json` (step, resolved configuration, SHA-256 of the other files).
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nirvana.errors import InputError
from nirvana.files import atomic_folder, write_json
from nirvana.train.tokenize import sha256

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    folder: Path
    step: int  # updates done
    config: dict[str, Any]  # resolved configuration of the run that wrote it


def save(
    run: str | Path,
    step: int,
    model: nn.Module,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest `keep`.

    Args:
        run: the run's folder.
        step: updates done.
        model: its trained parameters and its persistent buffers are saved; frozen parameters are
            not, because training leaves them as they were built.
        parameters: the trained ones by name, in the order in which the optimiser got them.
        config: resolved configuration.

    Returns:
        The checkpoint's folder.
    """
    named = list(parameters)
    folder = Path(run) / "checkpoints" / f"step-{step:08d}"
    with atomic_folder(folder) as temporary:
        tensors = {name: t.contiguous() for name, t in _model_tensors(model, named).items()}
        save_file(tensors, temporary / "model.safetensors")
        save_file(_optimizer_tensors(optimizer, named), temporary / "optimizer.safetensors")
        save_file(_random_states(), temporary / "random.safetensors")
        sums = {file.name: sha256(file) for file in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / "state.json", {"step": step, "config": config, "sha256": sums})
    folders = _folders(run)
    # A later step than this one was damaged, or the run would have resumed there.
    whole = [each for each in folders if _step(each) <= step]
    for old in set(folders).difference(whole[:keep]):
        shutil.rmtree(old)
    for remains in folder.parent.glob(".step-*"):  # of a save that was killed
        shutil.rmtree(remains)
    return folder


def latest(run: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None when the run has none at all.

    A damaged one is named in a warning, and the one before it is taken.

    Raises:
        InputError: when there are checkpoints and every one is damaged.
    """
    folders = _folders(run)
    for folder in folders:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            for name, expected in state["sha256"].items():
                if sha256(folder / name) != expected:
                    raise ValueError(f"{name}: its SHA-256 is not the recorded one")
            return Checkpoint(folder, state["step"], state["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{folder} is damaged and passed over: {error}", stacklevel=2)
    if folders:
        raise InputError(
            f"{Path(run) / 'checkpoints'}: every checkpoint is damaged; train into another folder"
        )
    return None


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Puts a checkpoint's values into model, optimiser and random generators, in place.

    Raises:
        InputError: when the checkpoint is of another model.
    """
    named = list(parameters)
    saved = load_file(checkpoint.folder / "model.safetensors")
    present = _model_tensors(model, named)
    for name in sorted({*saved, *present}):
        shapes = [tuple(each[name].shape) if name in each else None for each in (saved, present)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{checkpoint.folder}: {name} has shape {shapes[0]} there and {shapes[1]} in the "
                "model of this configuration; resume with the configuration it was saved with"
            )
    for name, tensor in present.items():
        tensor.copy_(saved[name])
    _restore_optimizer(load_file(checkpoint.folder / "optimizer.safetensors"), optimizer, named)
    random = load_file(checkpoint.folder / "random.safetensors")
    torch.set_rng_state(random["cpu"])
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{index}" in random:
            torch.cuda.set_rng_state(random[f"cuda.{index}"], index)


def _folders(run: str | Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folders = [f for f in (Path(run) / "checkpoints").glob("step-*") if _NAME.fullmatch(f.name)]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _model_tensors(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers, under one name each."""
    tensors = {name: parameter.detach() for name, parameter in named}
    taken = {id(parameter) for parameter in model.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in taken:
            tensors[name] = value
    return tensors


def _optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": value.contiguous()
        for name, parameter in named
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(
    saved: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    named: list[tuple[str, nn.Parameter]],
) -> None:
    names = {id(parameter): name for name, parameter in named}
    states: dict[str, dict[str, Tensor]] = {}
    for full, value in saved.items():
        name, _, key = full.rpartition(":")
        states.setdefault(name, {})[key] = value
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {i: states[name] for i, name in enumerate(order) if name in states}
    # The library puts each tensor where its parameter lies.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states
