"""Two hundred uploads that are damaged or made to harm, through the callbacks of the page."""

import gzip
import io
import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra app")

import gradio as gr

from helpers.app_rooms import Rooms
from helpers.scan_files import MAKERS, damaged
from nirvana.app.page import FAULT

COUNT = 200
SUFFIXES = (".h5", ".npy", ".npz", ".mat", ".dat", ".nii", ".nii.gz", ".cfl", ".pkl", ".dcm")
MEMORY = 64 * 2**20
MARK = "this-was-executed"


class Harmful:
    """An object whose unpickling makes a file."""

    def __reduce__(self):
        return (open, (MARK, "w"))


def npy_header(shape: tuple[int, ...]) -> bytes:
    """A `.npy` file that claims a shape and holds next to nothing."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<c8", "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue() + bytes(64)


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def harmful() -> Iterator[tuple[str, bytes]]:
    """Name and content of files that no damage by chance makes."""
    objects = io.BytesIO()
    np.save(objects, np.array([Harmful()], dtype=object), allow_pickle=True)
    pickled = pickle.dumps(Harmful())
    for suffix in (
        ".h5",
        ".npy",
        ".npz",
        ".mat",
        ".dat",
        ".nii",
        ".nii.gz",
        ".cfl",
        ".pkl",
        ".dcm",
    ):
        yield f"pickle{suffix}", pickled
        yield f"empty{suffix}", b""
        yield f"noise{suffix}", random.Random(suffix).randbytes(4000)
    yield "objects.npy", objects.getvalue()
    yield "objects.npz", zipped("kspace.npy", objects.getvalue())
    for shape in ((2**40, 8, 8, 8), (1, 1, 2**31, 2**31), (0, 0, 0, 0), (8, 8), (1,) * 32):
        yield "shape.npy", npy_header(shape)
        yield "shape.npz", zipped("kspace.npy", npy_header(shape))
    large = npy_header((64, 64, 512, 512)) + bytes(100 * 2**20)
    yield "bomb.npz", zipped("kspace.npy", large)
    yield "bomb.h5.gz", gzip.compress(large)
    yield "bomb.nii.gz", gzip.compress(large)
    yield "bomb.npy.gz", gzip.compress(large)
    yield "up.npz", zipped("../../up.npy", npy_header((1, 1, 8, 8)))
    yield "garbage.dcm", bytes(128) + b"DICM" + random.Random(0).randbytes(2000)
    yield "<img src=x onerror=alert(1)>.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)
    yield "{{value}}${1+1}.h5", b"no scan"


def uploads() -> list[tuple[str, bytes]]:
    """All of them: the harmful ones, and damaged files of every format."""
    found = list(harmful())
    whole: dict[str, bytes] = {}
    names = list(MAKERS)
    folder = Path(os.environ["NIRVANA_CACHE"]) / "whole"
    folder.mkdir(exist_ok=True)
    while len(found) < COUNT:
        number = len(found)
        name = names[number % len(names)]
        if name not in whole:
            whole[name] = MAKERS[name](folder / name).read_bytes()
        found.append((name, damaged(whole[name], random.Random(f"app-{number}"))))
    return found


def test_hostile_uploads_end_in_one_line(
    rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = uploads()
    assert len(given) == COUNT
    refused = 0
    for number, (name, content) in enumerate(given):
        file = tmp_path / str(number) / name
        file.parent.mkdir()
        file.write_bytes(content)
        files = [file]
        if name == "bart.cfl":  # with the header of a sound one
            header = file.with_suffix(".hdr")
            header.write_text("# Dimensions\n12 16 1 2 1 1 1 1 1 1 1 1 1 2 1 1\n")
            files.append(header)
        tracemalloc.start()
        try:
            rooms.upload("a", *files)
            rooms.reconstruct("a")
        except gr.Error as error:
            line = str(error.message)
            assert line != FAULT, f"{number}: {name}"
            assert "\n" not in line
            assert "<" not in line
            assert str(tmp_path) not in line, line
            refused += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY, f"{number}: {name}: {peak / 2**20:.0f} MiB"
        file.unlink()
    assert COUNT // 2 < refused < COUNT  # some damage leaves a scan
    assert not list(tmp_path.rglob(MARK))
    rooms.page.sessions.close_all()
    assert not [file for file in rooms.root.rglob("*") if file.is_file()]
