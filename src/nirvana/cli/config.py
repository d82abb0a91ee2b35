"""`nirvana config`: the packaged configurations."""

from pathlib import Path
from typing import Annotated

import typer

from nirvana.errors import InputError
from nirvana.files import atomic_file, writable_file
from nirvana.packaged import config_file, config_names, packaged_config


def _completed(incomplete: str) -> list[str]:
    return [name for name in config_names() if name.startswith(incomplete)]


def _found(path: Path | None) -> Path | None:
    return None if path is None else config_file(path)


ConfigArgument = Annotated[
    Path,
    typer.Argument(
        help="TOML file, or the name of a packaged configuration (see nirvana config).",
        callback=_found,
        autocompletion=_completed,
    ),
]
"""The configuration of a training, as the path of its file."""
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in run.out.")]
AcceptChangesOption = Annotated[
    bool, typer.Option("--accept-changes", help="Resume with other settings or data than before.")
]


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Packaged configuration; all are listed if it is left out.",
            autocompletion=_completed,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; else the standard output.")
    ] = None,
) -> None:
    """Writes a packaged configuration, to be edited and given to a training.

    nirvana config tiny --out my.toml, then nirvana train my.toml
    """
    if name is None:
        if out is not None:
            raise InputError(f"--out needs a NAME, one of {', '.join(config_names())}")
        for each in config_names():
            print(f"{each:<16}{_title(each)}")
        return
    if name not in config_names():
        raise InputError(
            f"no packaged configuration {name!r}; they are {', '.join(config_names())}"
        )
    text = _text(name)
    if out is None:
        print(text, end="")
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} exists; remove it first, or give another file to write")
    with atomic_file(writable_file(out)) as file:
        file.write_text(text, encoding="utf-8")
    print(f"{out}: a copy of the configuration {name}")


def _title(name: str) -> str:
    """The first line of a configuration's comment."""
    return _text(name).splitlines()[0].removeprefix("#").strip()


def _text(name: str) -> str:
    return packaged_config(name).read_text(encoding="utf-8")
