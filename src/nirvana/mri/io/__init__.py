"""Scans and volumes on disk: k-space and image volumes in, reconstructions out.

Readers check shape and size by the header before they read any data, then that the numbers are
finite and not all zero. They raise an `InputError` of one line otherwise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nirvana.errors import InputError
from nirvana.files import existing_file
from nirvana.mri.io import bart
from nirvana.mri.io.compressed import unpacked
from nirvana.mri.io.dicom import Series, write_dicom
from nirvana.mri.io.fastmri import require_simulated, write_reconstruction, write_scan
from nirvana.mri.io.formats import SUFFIXES, format_of
from nirvana.mri.io.options import ReadOptions
from nirvana.mri.io.scan import Encoding, Scan, Spacing, Study, in_file_axes
from nirvana.mri.io.volume import is_volume, read_affine, read_spacing, read_volume, write_nifti

__all__ = [
    "Encoding",
    "ReadOptions",
    "Scan",
    "Series",
    "Spacing",
    "Study",
    "files_of",
    "find_scans",
    "in_file_axes",
    "is_volume",
    "read_affine",
    "read_scan",
    "read_spacing",
    "read_volume",
    "require_simulated",
    "selections_of",
    "write_dicom",
    "write_nifti",
    "write_reconstruction",
    "write_scan",
]


def read_scan(path: str | Path, options: ReadOptions | None = None) -> Scan:
    """Reads k-space from a file of any of the formats of `formats.FORMATS`, or one of them
    compressed by gzip.

    Its `remarks` state what the reader found and the file does not state, and what it left out.
    2D k-space of more than a gibibyte stays in the file, and each slice is read when it is used
    (`slice_array.SliceArray`).

    Args:
        path: the file.
        options: see `ReadOptions`.

    Raises:
        InputError: the file is missing, damaged, or its contents are not such a scan.
    """
    path, options = _kspace_file(path), options or ReadOptions()
    with unpacked(path, _partners(path)) as file:
        found = format_of(file)
        found.check_options(options, path)
        scan = found.read(file, options)
        if file == path:
            return scan
        return replace(scan, kspace=np.asarray(scan.kspace))  # the unpacked copy is removed


def selections_of(path: str | Path, options: ReadOptions | None = None) -> list[ReadOptions]:
    """Options that read each image of a file: each contrast, phase, repetition and set that
    `options` leave open. Images of different selections have different names.

    Args:
        path: the file; an image volume has one image.
        options: see `ReadOptions`.

    Raises:
        InputError: the file is missing, damaged, or its contents are not such a scan.
    """
    options = options or ReadOptions()
    if is_volume(path):
        return [options]
    path = _kspace_file(path)
    with unpacked(path, _partners(path)) as file:
        found = format_of(file)
        found.check_options(options, path)
        return [replace(options, select=select) for select in found.selections(file, options)]


def _kspace_file(path: str | Path) -> Path:
    path = existing_file(path)
    if is_volume(path):
        raise InputError(
            f"{path} is an image volume, not k-space; `nirvana mri simulate` makes k-space of it"
        )
    return path


def _partners(path: Path) -> tuple[Path, ...]:
    """The other file of a compressed BART pair."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if plain is path or plain.suffix.lower() not in bart.SUFFIXES:
        return ()
    named = (plain.with_suffix(suffix) for suffix in bart.SUFFIXES if suffix != plain.suffix)
    beside = [each for name in named for each in (name, Path(f"{name}.gz")) if each.is_file()]
    return tuple(beside[:1])


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that hold the scans: of a BART pair both, whichever is named."""
    for path in paths:
        yield path
        if path.suffix.lower() in bart.SUFFIXES:
            yield from map(path.with_suffix, bart.SUFFIXES)
        yield from _partners(path)


def find_scans(path: str | Path) -> list[Path]:
    """The scans and volumes that a path names: itself, or those in a folder, by name.

    Subfolders are not searched. Of a pair of BART's files, the `.cfl` stands for both. Whether a
    file of a folder can be read is found out when it is read.

    Raises:
        InputError: the path is missing, or a folder that holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return [existing_file(path)]
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    suffixes = tuple(suffix for suffix in SUFFIXES if suffix != ".hdr")
    suffixes += tuple(f"{suffix}.gz" for suffix in suffixes)
    found = [file for file in files if is_volume(file) or file.name.lower().endswith(suffixes)]
    found = [file for file in found if not file.name.startswith(".")]
    if not found:
        raise InputError(
            f"{path} holds no scan; give one with files that end in {', '.join(SUFFIXES)}, .nii"
        )
    return found
