"""Typed configurations: trees of frozen dataclasses read from TOML or JSON, with overrides.

A dataclass is a section and its fields are the keys. `load_config` reads a file and checks every
key and value against the types of the fields; `to_dict` writes the resolved tree back as plain
data. Ranges are checked by each dataclass itself, in `__post_init__`, with `require`.
"""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from nirvana.errors import InputError
from nirvana.files import decode_utf8

T = TypeVar("T")

# Metadata of a field that takes every key which its dataclass does not name itself.
REST = {"rest": True}


def load_config(kind: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Reads a configuration file into the dataclass `kind`.

    Args:
        kind: a (nested) dataclass.
        path: a .toml file, or the .json file that a run saved.
        overrides: `["--section.key", "value", ...]`; `--section.key=value` is the same. The value
            is written as in TOML; the quotes of a string may be left out, "none" stands for None.

    Returns:
        The configuration, every value converted to the type of its field.

    Raises:
        InputError: for a file that is missing or unreadable, an unknown key (the message names the
            closest known one), a missing key, a value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such configuration file")
    text = decode_utf8(path.read_bytes(), path)
    try:
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a configuration file: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must be a table of sections")
    for keys, value in _overrides(overrides or []):
        _place(tree, keys, value)
    return from_dict(kind, tree, "")


def from_dict(kind: type[T], tree: Any, where: str) -> T:
    """Converts plain data, as returned by `to_dict`, to the dataclass `kind`.

    The names of all keys are checked before any value, and values in the order of the fields.

    Args:
        kind: a (nested) dataclass.
        tree: a mapping of keys to plain values.
        where: dotted path of this section, for error messages; "" for the root.

    Returns:
        The dataclass.

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


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to plain data that `load_config` reads back from JSON.

    Args:
        config: a (nested) dataclass.

    Returns:
        Every key, defaults included; tuples become lists.
    """
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
    """Lists the leaves in which two configurations differ.

    Args:
        old: plain data of `to_dict`.
        new: the same.
        prefix: put in front of every key.

    Returns:
        A line "section.key: old -> new" for each, sorted by key.
    """
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines


def require(condition: bool, name: str, value: Any, right: str) -> None:
    """Checks one setting.

    Args:
        condition: whether the value is allowed.
        name: dotted key.
        value: its value, for the message.
        right: which values are allowed, as in "at least 1".

    Raises:
        InputError: unless `condition` holds.
    """
    if not condition:
        raise InputError(f"configuration: {name} = {value!r} must be {right}")


def unknown_key(path: str, where: str, known: Mapping[str, Any]) -> str:
    """Composes the error message for a key that does not exist.

    Args:
        path: dotted path of the key.
        where: dotted path of its section.
        known: the keys that the section has.

    Returns:
        One line with the closest known key, or all of them when none is close.
    """
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    right = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
    return f"configuration: unknown key {path}: {right}"


def _named_fields(kind: Any) -> tuple[dict[str, Field[Any]], str | None]:
    """The fields of a dataclass by name, and the name of the field that takes all other keys."""
    named = {item.name: item for item in fields(kind) if not item.metadata.get("rest")}
    return named, next((item.name for item in fields(kind) if item.metadata.get("rest")), None)


def _check_keys(kind: Any, tree: Any, where: str) -> None:
    """Refuses keys, at any depth, that `kind` does not have."""
    if not isinstance(tree, Mapping):
        raise InputError(f"configuration: {where} = {tree!r} must be a section, [{where}]")
    hints = typing.get_type_hints(kind)
    named, extra = _named_fields(kind)
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        if key not in named and extra is None:
            raise InputError(unknown_key(path, where, named))
        if key in named and is_dataclass(hints[key]):
            _check_keys(hints[key], value, path)


class _Text(str):
    """A value from the command line, not yet parsed to the type of its field."""


def _overrides(arguments: list[str]) -> Iterator[tuple[list[str], _Text]]:
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or len(argument) == 2:
            raise InputError(f"unexpected argument {argument!r}: settings are --section.key value")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(remaining, None)
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


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks `value` against the type `kind`; text from the command line is parsed first."""
    if is_dataclass(kind):
        return from_dict(kind, value, path)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, _Text):
        named = origin is Literal and value in arguments  # there "1" is a name, not a number
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
    right = " or ".join(map(repr, arguments)) if origin is Literal else _describe(kind)
    raise InputError(f"configuration: {path} = {value!r} must be {right}")


def _parse(text: str, wants_text: bool) -> Any:
    if wants_text:
        return str(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return str(text)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return f"a list, each {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(_describe, arguments))}"
    if origin is dict:
        return f"a table, each value {_describe(arguments[1])}"
    return names.get(kind, str(kind))
