"""What ships with the package under a name: checkpoints, configurations and token shards.

Nothing here imports torch, so that a wrong name is refused at once.
"""

from importlib import resources
from pathlib import Path

from nirvana.errors import InputError

PACKAGED = {"tiny": "language model", "codec": "MRI codec", "reporter": "MRI reporter"}
"""The kind of every packaged checkpoint."""


def packaged(name: str) -> Path:
    """The folder of a packaged checkpoint, whatever folders the user has."""
    return _folder("assets") / name


def folder_of(name: str | Path, kind: str = "language model") -> Path:
    """The folder that `name` means, see `resolve`, whatever it holds and whether or not it is
    there."""
    if PACKAGED.get(str(name)) == kind and not Path(name).is_dir():
        return packaged(str(name))
    return Path(name)


def resolve(name: str | Path, kind: str = "language model") -> Path:
    """The folder of a checkpoint, given as an existing folder or as a packaged checkpoint's name.

    Args:
        kind: one of the values of `PACKAGED`; the error names it.

    Raises:
        InputError: for a name that is neither, or a folder without a configuration or weights.
    """
    folder = folder_of(name, kind)
    if not folder.exists():
        names = [each for each, of_kind in PACKAGED.items() if of_kind == kind]
        raise InputError(f"no {kind} {str(name)!r}: give a folder, or {' or '.join(names)}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {kind}: it has no config.json")
    if not any(folder.glob("model*.safetensors")):
        raise InputError(f"{folder} holds no {kind}: it has no weights (model.safetensors)")
    return folder


def local_or_packaged(path: str | Path) -> Path:
    """The folder `path`; if it does not exist, the packaged folder of that name, if there is one.

    Args:
        path: a folder of the user's, or a name such as `tiny` or `quickstart/train`.
    """
    path = Path(path)
    named = not path.exists() and not path.is_absolute() and ".." not in path.parts
    return packaged(str(path)) if named and packaged(str(path)).is_dir() else path


def config_names() -> list[str]:
    """The names of the packaged configurations, sorted."""
    return sorted(file.stem for file in _folder("configs").glob("*.toml"))


def config_file(name: str | Path) -> Path:
    """A configuration file, given as an existing file or as a packaged configuration's name.

    Raises:
        InputError: for a name that is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if str(name) in config_names():
        return packaged_config(str(name))
    names = ", ".join(config_names())
    raise InputError(f"{name}: no such configuration file; the packaged ones are {names}")


def packaged_config(name: str) -> Path:
    """The file of a packaged configuration, whatever files the user has."""
    return _folder("configs") / f"{name}.toml"


def _folder(name: str) -> Path:
    return Path(str(resources.files("nirvana") / name))
