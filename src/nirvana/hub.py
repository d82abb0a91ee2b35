"""Documents out of data sets of the Hugging Face hub, through `datasets`.

A source is written `hub:NAME[@REVISION][:CONFIGURATION[:SPLIT]]`, the split being "train" unless it
says otherwise: `hub:HuggingFaceFW/fineweb-edu:sample-10BT`. NAME may also be a local folder that
`datasets` can read. The data set's files are read as a stream, nothing of it is executed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nirvana.errors import InputError

PREFIX = "hub:"


def is_hub(source: object) -> bool:
    """Whether a source is a data set of the hub, or a part of one."""
    return str(source).startswith(PREFIX)


def local_path(source: str | Path) -> Path:
    """What a source names on the disk: a file, or of `hub:NAME` the folder NAME, if it is one."""
    if not is_hub(source):
        return Path(source)
    return Path(_names(str(source))[0])


def split_source(source: str) -> list[str]:
    """The parts of a data set, one for each file that it streams from, in their order; each is a
    source again.

    Raises:
        InputError: for a data set that cannot be found or read.
    """
    count = _load(source).num_shards
    return [f"{source}#{i}/{count}" for i in range(count)]


def read_hub(source: str) -> Iterator[tuple[str, Any]]:
    """(where, text) of every record of a data set or of one of its parts.

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
    """Name, revision, configuration and split of a source; empty where it does not give one."""
    name, configuration, split, *rest = [*source.removeprefix(PREFIX).split(":"), "", ""]
    if not name or any(rest):
        raise InputError(f"{source}: must be hub:NAME[@REVISION][:CONFIGURATION[:SPLIT]]")
    name, _, revision = name.partition("@")
    return name, revision, configuration, split


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
