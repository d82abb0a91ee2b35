"""Scans and volumes on disk: k-space and image volumes in, reconstructions out.

Readers check shape and size by the header before they read any data, then that the numbers are
finite and not all zero. They raise an `InputError` of one line otherwise.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from nirvana.errors import InputError
from nirvana.mri.io import bart, fastmri, ismrmrd
from nirvana.mri.io.dicom import write_dicom
from nirvana.mri.io.fastmri import require_simulated, write_reconstruction, write_scan
from nirvana.mri.io.hdf5 import open_hdf5
from nirvana.mri.io.scan import UNREADABLE, Scan, Spacing, existing
from nirvana.mri.io.volume import is_volume, read_affine, read_spacing, read_volume, write_nifti

__all__ = [
    "Scan",
    "Spacing",
    "files_of",
    "find_scans",
    "is_volume",
    "read_affine",
    "read_scan",
    "read_spacing",
    "read_volume",
    "require_simulated",
    "write_dicom",
    "write_nifti",
    "write_reconstruction",
    "write_scan",
]

HDF5_SUFFIXES = (".h5", ".hdf5", ".mrd")


def read_scan(path: str | Path) -> Scan:
    """Reads k-space from fastMRI HDF5, ISMRMRD HDF5 or BART's `.cfl`/`.hdr`.

    fastMRI's datasets: `kspace` complex `[slices, coils, H, W]` or, of a single coil,
    `[slices, H, W]`; optional `reconstruction_rss` or `reconstruction_esc` `[slices, h, w]`, `mask`
    `[W]`, `ismrmrd_header`; optional attributes `name`, `spacing_mm`, `affine` as `write_scan`
    writes them. What is read of ISMRMRD and BART: `ismrmrd.scan_of`, `bart.read_bart`.

    Raises:
        InputError: the file is missing, damaged, or its contents are not such a scan.
    """
    path = existing(path)
    if is_volume(path):
        raise InputError(
            f"{path} is an image volume, not k-space; `nirvana mri simulate` makes k-space of it"
        )
    if path.suffix.lower() in bart.SUFFIXES:
        return bart.read_bart(path)
    import h5py

    if not h5py.is_hdf5(path):
        raise InputError(
            f"{path} is not an HDF5 file; k-space is read from fastMRI or ISMRMRD HDF5 (.h5) and "
            "BART's .cfl"
        )
    with open_hdf5(path) as file:
        try:
            group = None if "kspace" in file.keys() else ismrmrd.group_of(file)  # noqa: SIM118
            return fastmri.scan_of(file, path) if group is None else ismrmrd.scan_of(group, path)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error


def files_of(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that hold the scans: of a BART pair both, whichever is named."""
    for path in paths:
        yield path
        if path.suffix.lower() in bart.SUFFIXES:
            yield from map(path.with_suffix, bart.SUFFIXES)


def find_scans(path: str | Path) -> list[Path]:
    """The scans and volumes that a path names: itself, or those in a folder, by name.

    Subfolders are not searched. Of a pair of BART's files, the `.cfl` stands for both.

    Raises:
        InputError: the path is missing, or a folder that holds none.
    """
    path = Path(path)
    if not path.is_dir():
        return [existing(path)]
    suffixes = (*HDF5_SUFFIXES, ".cfl")
    try:
        files = sorted(path.iterdir())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    found = [file for file in files if is_volume(file) or file.name.lower().endswith(suffixes)]
    found = [existing(file) for file in found if not file.name.startswith(".")]
    if not found:
        raise InputError(
            f"{path} holds no scan; give one with .h5, .mrd, .cfl, .nii, .nii.gz or .npy files"
        )
    return found
