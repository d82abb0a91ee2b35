"""The formats of k-space files, and which one a file has."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana.errors import InputError
from nirvana.mri.io import bart, fastmri, ismrmrd, matlab, numpy_files, twix
from nirvana.mri.io.arrays import AUXILIARY, ArrayFile, array_selections, read_arrays
from nirvana.mri.io.hdf5 import open_hdf5, variables_of
from nirvana.mri.io.options import ReadOptions
from nirvana.mri.io.scan import UNREADABLE, Scan

HDF5_SUFFIXES = (".h5", ".hdf5", ".mrd")
SUFFIXES = (*HDF5_SUFFIXES, *bart.SUFFIXES, ".mat", ".npz", ".npy", ".dat")


@dataclass(frozen=True)
class Format:
    """A format of k-space files.

    Attributes:
        name: of the format.
        options: names of the fields of `ReadOptions` that have a meaning for it, of those that
            have one for some formats only.
        read: the scan in a file.
        selections: `ReadOptions.select` of each image in a file.
    """

    name: str
    options: frozenset[str]
    read: Callable[[Path, ReadOptions], Scan]
    selections: Callable[[Path, ReadOptions], list[dict[str, int]]]

    def check_options(self, options: ReadOptions, path: Path) -> None:
        """Refuses an option that has no meaning for the format.

        Raises:
            InputError: one was given.
        """
        given = {
            "measurement": options.measurement is not None,
            "phase_encode": options.phase_encode == "rows",
            "variable": options.variable is not None,
            "axes": options.axes is not None,
        }
        for name, is_given in given.items():
            if is_given and name not in self.options:
                option = name.replace("_", "-")
                raise InputError(f"{path} is {self.name}, for which --{option} has no meaning")


def _of_arrays(name: str, opened: Callable[[Path], ArrayFile]) -> Format:
    return Format(
        name,
        frozenset({"phase_encode", "variable", "axes"}),
        lambda path, options: read_arrays(opened(path), options, path.stem),
        lambda path, options: array_selections(opened(path), options),
    )


def _in_hdf5(name: str, options: set[str], use: Callable[..., Any]) -> Format:
    """A format within HDF5; `use(file, path, options, wants_scan)` works on the open file."""

    def run(path: Path, given: ReadOptions, wants_scan: bool) -> Any:
        with open_hdf5(path) as file:
            try:
                return use(file, path, given, wants_scan)
            except InputError:
                raise
            except UNREADABLE as error:
                raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error

    return Format(
        name,
        frozenset(options),
        lambda path, given: run(path, given, True),
        lambda path, given: run(path, given, False),
    )


def _fastmri(file: Any, path: Path, options: ReadOptions, wants_scan: bool) -> Any:
    if wants_scan:
        return fastmri.scan_of(file, path, options)
    return array_selections(fastmri.array_file(file, path), options)


def _ismrmrd(file: Any, path: Path, options: ReadOptions, wants_scan: bool) -> Any:
    groups = ismrmrd.groups_of(file)
    use = ismrmrd.read_ismrmrd if wants_scan else ismrmrd.selections_in
    return use(groups, path, options)


def _matlab_hdf5(file: Any, path: Path, options: ReadOptions, wants_scan: bool) -> Any:
    arrays = ArrayFile(path, variables_of(file, path, AUXILIARY, is_matlab=True), "F")
    if wants_scan:
        return read_arrays(arrays, options, path.stem)
    return array_selections(arrays, options)


ARRAY_OPTIONS = {"phase_encode", "variable", "axes"}
FASTMRI = _in_hdf5("fastMRI's HDF5", ARRAY_OPTIONS, _fastmri)
ISMRMRD = _in_hdf5("ISMRMRD", {"measurement"}, _ismrmrd)
MATLAB_HDF5 = _in_hdf5("MATLAB 7.3", ARRAY_OPTIONS, _matlab_hdf5)
MATLAB = _of_arrays("MATLAB", matlab.matlab_file)
NPY = _of_arrays("NumPy", numpy_files.npy_file)
NPZ = _of_arrays("NumPy", numpy_files.npz_file)
BART = Format("BART", frozenset({"phase_encode"}), bart.read_bart, bart.bart_selections)
TWIX = Format("Siemens raw data", frozenset({"measurement"}), twix.read_twix, twix.twix_selections)


def format_of(path: Path) -> Format:
    """The format of a file that exists.

    Raises:
        InputError: it has none of these.
    """
    import h5py

    suffix = path.suffix.lower()
    by_name = {".npy": NPY, ".npz": NPZ, ".dat": TWIX, **dict.fromkeys(bart.SUFFIXES, BART)}
    if suffix in by_name:
        return by_name[suffix]
    if not h5py.is_hdf5(path):
        if suffix == ".mat":
            return MATLAB
        raise InputError(
            f"{path} is not an HDF5 file; k-space is read from fastMRI's and ISMRMRD's HDF5 (.h5), "
            "Siemens raw data (.dat), BART (.cfl), MATLAB (.mat) and NumPy (.npy, .npz)"
        )
    if suffix == ".mat":
        return MATLAB_HDF5
    with open_hdf5(path) as file:
        try:
            is_ismrmrd = "kspace" not in file.keys() and ismrmrd.groups_of(file)  # noqa: SIM118
        except UNREADABLE as error:
            raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error
    return ISMRMRD if is_ismrmrd else FASTMRI
