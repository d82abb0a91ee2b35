"""Folders in fsspec's file system in memory, memory://."""

from pathlib import Path

import fsspec


def upload(folder: Path, target: str) -> fsspec.AbstractFileSystem:
    """Copies a folder to a path of the file system, in place of what is there."""
    system = fsspec.filesystem("memory")
    if system.exists(target):
        system.rm(target, recursive=True)
    for file in folder.rglob("*"):
        if file.is_file():
            path = f"{target}/{file.relative_to(folder).as_posix()}"
            system.pipe_file(path, file.read_bytes())
    return system
