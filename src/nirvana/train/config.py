"""Typed configurations from TOML or JSON files, with overrides from the command line.

The machinery (`load_config`, `to_dict`) works for any tree of frozen dataclasses; the sections
`OptimConfig` and `RunConfig` are shared by every training in the package.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from nirvana.errors import InputError

if TYPE_CHECKING:
    import torch

# torch and transformers are imported where they are first needed: everything but [model] is checked
# before, so that a wrong setting is refused at once.

T = TypeVar("T")


# Metadata of a field that takes every key which its dataclass does not name itself.
REST = {"rest": True}


@dataclass(frozen=True)
class OptimConfig:
    """[optim]: AdamW and its schedule."""

    lr: float = 1e-3  # highest learning rate, reached at the end of the warm-up
    min_lr: float = 1e-4  # learning rate at the last step, the end of the cosine
    warmup_steps: int = 100  # steps of linear rise from zero
    betas: tuple[float, float] = (0.9, 0.95)  # decay of the first and second moment, 0..1
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices; never on embeddings, norms, biases or scalars
    clip: float = 1.0  # largest norm of the whole gradient; 0 means no clipping
    accumulation: int = 1  # micro batches of one step, shared out among all processes

    def __post_init__(self) -> None:
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, "from 0 to optim.lr")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "at least 0")
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "from 0 to below 1")
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        require(self.clip >= 0, "optim.clip", self.clip, "at least 0")
        require(self.accumulation >= 1, "optim.accumulation", self.accumulation, "at least 1")


@dataclass(frozen=True)
class RunConfig:
    """[run]: where, how long and on what to train."""

    out: str  # folder of this run: configuration, metrics, checkpoints, at last the model
    steps: int  # optimiser steps from the beginning to the end
    seed: int = 0  # of the initial weights and of the order of the data
    device: str = "auto"  # "auto" takes a GPU when there is one; or "cpu", "cuda", "cuda:1"
    precision: Literal["bf16", "float32"] = "bf16"  # bf16 autocast (float32 state), on CUDA only
    compile: bool = True  # torch.compile, on CUDA only
    log_interval: int = 10  # steps between lines of metrics.jsonl
    validation_interval: int = 500  # steps between validations; 0 means only at the end
    checkpoint_interval: int = 500  # steps between checkpoints; 0 means only at the end
    keep_checkpoints: int = 2  # how many of the newest checkpoints stay on the disk
    export_precision: Literal["float32", "bf16"] = "float32"  # of the model written at the end
    most_skipped: int = 5  # steps in a row without a finite loss and gradient that end the run
    wandb: bool = False  # also log to Weights & Biases, which must be installed

    def autocast_dtype(self, device: "torch.device") -> "torch.dtype | None":
        """What products are rounded to on a device, as `precision` asks; None without autocast."""
        import torch

        rounds = self.precision == "bf16" and device.type == "cuda"
        return torch.bfloat16 if rounds else None

    @property
    def export_dtype(self) -> "torch.dtype":
        """`export_precision` as PyTorch calls it."""
        import torch

        return torch.bfloat16 if self.export_precision == "bf16" else torch.float32

    def __post_init__(self) -> None:
        require(bool(self.out), "run.out", self.out, "the name of a folder")
        require(self.steps >= 1, "run.steps", self.steps, "at least 1")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "from 0 to 2^63 - 1")
        require(self.log_interval >= 1, "run.log_interval", self.log_interval, "at least 1")
        for name in ("validation_interval", "checkpoint_interval"):
            require(getattr(self, name) >= 0, f"run.{name}", getattr(self, name), "at least 0")
        for name in ("keep_checkpoints", "most_skipped"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True)
class ParallelConfig:
    """[parallel]: how many processes (torchrun) share the work; none of it changes the result."""

    shard: int = 0  # processes over which one copy of the state is cut; 0: all of them
    reshard: bool = True  # free gathered weights between forward and backward: less memory
    recompute: int = 0  # recompute every n-th block in the backward pass: less memory; 0: none
    tensor: int = 1  # processes that share one product; only 1, see docs/training.md

    def __post_init__(self) -> None:
        require(self.shard >= 0, "parallel.shard", self.shard, "at least 0")
        require(self.recompute >= 0, "parallel.recompute", self.recompute, "at least 0")
        right = (
            "1: in_proj is one fused product, whose parts cannot be cut apart (docs/training.md)"
        )
        require(self.tensor == 1, "parallel.tensor", self.tensor, right)


@dataclass(frozen=True)
class ModelSection:
    """[model]: a preset, and any field of `NirvanaConfig` to override."""

    preset: str = "tiny"
    fields: dict[str, Any] = field(default_factory=dict, metadata=REST)

    def __post_init__(self) -> None:
        from nirvana.model.config import preset

        preset(self.preset, **self.fields)  # wrong settings show before any data is looked at


@dataclass(frozen=True)
class DataSection:
    """[data]: token shards, as written by `nirvana data tokenize`."""

    train: dict[str, str]  # name -> folder of token shards
    valid: dict[str, str] = field(default_factory=dict)  # name -> folder; scored one by one
    # name -> share of the rows of a batch, normalised to sum 1; empty: by number of tokens
    weights: dict[str, float] = field(default_factory=dict)
    context_length: int = 2048  # T, tokens in a row
    batch_size: int = 8  # rows in a micro batch; tokens per step = rows x T x accumulation
    reset: bool = True  # every document starts with a fresh state; false: rows are read through
    workers: int = 2  # threads that read batches ahead; changes no batch
    valid_documents: int = 16  # the first so many documents of every valid folder are scored
    valid_tokens: int = 4096  # and of each of them at most so many tokens
    sample_prompts: list[str] = field(default_factory=list)  # continued at every validation
    sample_tokens: int = 64  # tokens of each continuation

    def __post_init__(self) -> None:
        require(bool(self.train), "data.train", self.train, "a table: name = folder of shards")
        for name in (
            "context_length",
            "batch_size",
            "workers",
            "valid_documents",
            "sample_tokens",
        ):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "at least 1")
        require(self.valid_tokens >= 2, "data.valid_tokens", self.valid_tokens, "at least 2")
        for name, weight in self.weights.items():
            if name not in self.train:
                raise InputError(_unknown(f"data.weights.{name}", "data.weights", self.train))
            require(weight >= 0, f"data.weights.{name}", weight, "at least 0")
        if self.weights:
            missing = [name for name in self.train if name not in self.weights]
            require(not missing, "data.weights", missing, "given for every name in data.train")
            require(sum(self.weights.values()) > 0, "data.weights", self.weights, "not all zero")


@dataclass(frozen=True)
class LanguageConfig:
    """All of a language-model training."""

    data: DataSection
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelSection = field(default_factory=ModelSection)


def load_config(kind: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Reads a configuration file into the dataclass `kind`.

    Args:
        kind: a (nested) dataclass.
        path: a .toml file, or the .json file that a run saved.
        overrides: `["--section.key", "value", ...]`; `--section.key=value` is the same. The value
            is written as in TOML, the quotes of a string may be left out, "none" stands for None.

    Raises:
        InputError: for a file that is not there or not readable, an unknown key (naming the
            nearest one), a missing key, a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a configuration file: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must be a table of sections")
    for keys, value in _overrides(overrides or []):
        _place(tree, keys, value)
    return from_dict(kind, tree, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain data that `load_config` reads back from JSON."""
    values: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            values[item.name] = to_dict(value)
        elif item.metadata.get("rest"):
            values.update(value)
        else:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "section.key: old -> new" for every leaf in which two configurations differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def require(condition: bool, name: str, value: Any, right: str) -> None:
    """Raises an `InputError` that says what a setting must be, unless `condition` holds."""
    if not condition:
        raise InputError(f"configuration: {name} = {value!r} must be {right}")


class _Text(str):
    """A value from the command line, whose type is still to be read off the field it is for."""


def _overrides(arguments: list[str]) -> Iterator[tuple[list[str], _Text]]:
    rest_of = iter(arguments)
    for argument in rest_of:
        if not argument.startswith("--") or len(argument) == 2:
            raise InputError(f"unexpected argument {argument!r}: settings are --section.key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest_of, None)
            if value is None:
                raise InputError(f"--{key} needs a value")
        yield key.replace("-", "_").split("."), _Text(value)


def _place(tree: dict[str, Any], keys: list[str], value: _Text) -> None:
    name = ".".join(keys)
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise InputError(f"--{name}: {key!r} is a value, not a section")
    tree[keys[-1]] = value


def from_dict(kind: type[T], tree: Any, where: str) -> T:
    """Plain data, as `to_dict` gives it, as the dataclass `kind`; `where` names it in errors.

    The names of all keys are checked before any value, and values in the order of the fields.

    Raises:
        InputError: see `load_config`.
    """
    _check_keys(kind, tree, where)
    hints = typing.get_type_hints(kind)
    named, extra = _named_fields(kind)
    values: dict[str, Any] = {}
    for key, item in named.items():
        path = f"{where}.{key}" if where else key
        if key in tree:
            values[key] = _convert(hints[key], tree[key], path)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"configuration: {path} is missing")
    if extra is not None:
        prefix = f"{where}." if where else ""
        others = {key: value for key, value in tree.items() if key not in named}
        values[extra] = {key: _convert(Any, value, prefix + key) for key, value in others.items()}
    return kind(**values)


def _named_fields(kind: Any) -> tuple[dict[str, Field[Any]], str | None]:
    """The fields of a dataclass by name, and the name of the field that takes all other keys."""
    named = {item.name: item for item in fields(kind) if not item.metadata.get("rest")}
    return named, next((i.name for i in fields(kind) if i.metadata.get("rest")), None)


def _check_keys(kind: Any, tree: Any, where: str) -> None:
    """Refuses keys, at any depth, that `kind` does not have."""
    if not isinstance(tree, Mapping):
        raise InputError(f"configuration: {where} = {tree!r} must be a section, [{where}]")
    hints = typing.get_type_hints(kind)
    named, extra = _named_fields(kind)
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        if key not in named and extra is None:
            raise InputError(_unknown(path, where, named))
        if key in named and is_dataclass(hints[key]):
            _check_keys(hints[key], value, path)


def _unknown(path: str, where: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    right = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"configuration: unknown key {path}: {right}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks `value` against the type `kind`; text from the command line is parsed first."""
    if is_dataclass(kind):
        return from_dict(kind, value, path)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, _Text):
        named = origin is Literal and value in arguments  # "1" is a name there, no number
        value = _parse(value, wants_text=kind is str or named)
    if kind is Any:
        return None if value == "none" else value
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "none":
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        return _convert(kinds[0], value, path)
    if origin is Literal and value in arguments:
        return value
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(arguments[1], each, f"{path}.{key}") for key, each in value.items()}
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], each, path) for each in value]
    if origin is tuple and arguments[-1] is ... and isinstance(value, list):
        return tuple(_convert(arguments[0], each, path) for each in value)
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_convert(each, v, path) for each, v in zip(arguments, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), path, value, "finite")
        return float(value)
    if origin is None and type(value) is kind:
        return value
    right = " or ".join(map(repr, arguments)) if origin is Literal else _spell(kind)
    raise InputError(f"configuration: {path} = {value!r} must be {right}")


def _parse(text: str, wants_text: bool) -> Any:
    if wants_text:
        return str(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _spell(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return f"a list, each {_spell(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(_spell, arguments))}"
    if origin is dict:
        return f"a table, each value {_spell(arguments[1])}"
    return names.get(kind, str(kind))
