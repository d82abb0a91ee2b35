"""Documents from data sets of the Hugging Face hub, through `datasets`.

A source is written `hub:NAME[@REVISION][:CONFIGURATION[:SPLIT]]`, as in
`hub:HuggingFaceFW/fineweb-edu:sample-10BT`; the default split is "train". NAME may also be a local
folder that `datasets` can read. The files are streamed; no code of a data set is executed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

PREFIX = "hub:"


def is_hub(source: object) -> bool:
    """Returns whether a source is a data set of the hub, or a part of one."""
    return str(source).startswith(PREFIX)


def local_path(source: str | Path) -> Path:
    """Returns the path that a source may name on the disk.

    Args:
        source: a file, or `hub:NAME...`.

    Returns:
        The file, or NAME as a folder, which need not exist.

    Raises:
        InputError: for a source that starts with `hub:` and has another form.
    """
    if not is_hub(source):
        return Path(source)
    return Path(_names(str(source))[0])


def split_source(source: str) -> list[str]:
    """Splits a data set into parts that can be read independently.

    Args:
        source: `hub:NAME...`.

    Returns:
        One source for each file that the data set streams from, in order.

    Raises:
        InputError: for a data set that cannot be found or read.
    """
    count = _load(source).num_shards
    return [f"{source}#{i}/{count}" for i in range(count)]


def read_hub(source: str) -> Iterator[tuple[str, Any]]:
    """Yields the texts of a data set or of one of its parts.

    Args:
        source: `hub:NAME...`, or an item of `split_source`.

    Yields:
        Source and record number for error messages, and the field "text", of any type.

    Raises:
        InputError: for a data set that cannot be read, or has no column "text".
    """
    name, _, part = source.partition("#")
    data = _load(name)
    if part:
        index, _, count = part.partition("/")
        data = data.shard(int(count), int(index))
    try:
        for number, record in enumerate(data):
            if "text" not in record:
                raise InputError(f'{name}: has no column "text", but {", ".join(record)}')
            yield f"{source}, record {number}", record["text"]
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: cannot be read: {_first_line(error)}") from error


def _load(source: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source}: data sets of the hub need the package datasets") from None
    name, revision, configuration, split = _names(source)
    try:
        return load_dataset(
            name,
            configuration or None,
            split=split or "train",
            revision=revision or None,
            streaming=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{source}: cannot be opened: {_first_line(error)}") from error


def _names(source: str) -> tuple[str, str, str, str]:
    """Name, revision, configuration and split of a source; "" for each that is not given."""
    name, configuration, split, *rest = [*source.removeprefix(PREFIX).split(":"), "", ""]
    if not name or any(rest):
        raise InputError(f"{source}: must be hub:NAME[@REVISION][:CONFIGURATION[:SPLIT]]")
    name, _, revision = name.partition("@")
    return name, revision, configuration, split


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
