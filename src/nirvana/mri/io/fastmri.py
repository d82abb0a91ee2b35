"""Reads and writes fastMRI's HDF5."""

from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file, writable_file
from nirvana.mri.io.geometry import is_affine, spacing_of
from nirvana.mri.io.hdf5 import dataset, open_hdf5, text
from nirvana.mri.io.header import parse_header
from nirvana.mri.io.scan import Scan, Spacing, check_size, checked_kspace

SIMULATION_SEED = "simulation_seed"  # the attribute by which a simulated scan is known
TARGETS = ("reconstruction_rss", "reconstruction_esc")


def scan_of(file: Any, path: Path) -> Scan:
    """The scan in an open file; see `nirvana.mri.io.read_scan`.

    Raises:
        InputError: its contents are no such scan.
    """
    kspace = _kspace(file, path)
    targets = ((dataset(file, key, path), key) for key in TARGETS)
    target = next(
        (_target(x, key, path, kspace.shape) for x, key in targets if x is not None), None
    )
    header = text(file, "ismrmrd_header", path)
    affine = _attribute(file, "affine", (4, 4), path)
    if affine is not None and not is_affine(affine):
        raise InputError(f"{path}: its attribute 'affine' {affine.tolist()} places no voxels")
    return Scan(
        kspace=kspace,
        mask=_mask(file, path, kspace.shape[-1]),
        target=target,
        name=_name(file, path),
        spacing=_spacing(file, path, affine, header, kspace.shape[-2]),
        header=header,
        affine=affine,
    )


def _kspace(file: Any, path: Path) -> np.ndarray:
    found = dataset(file, "kspace", path)
    if found is None:
        names = ", ".join(sorted(file)) or "nothing"
        raise InputError(f"{path} has no dataset 'kspace'; it holds {names}")
    if found.dtype.kind != "c":
        raise InputError(f"{path}: 'kspace' is {found.dtype}; it must be complex")
    if found.ndim not in (3, 4):
        raise InputError(
            f"{path}: 'kspace' has shape {found.shape}; it must be [slices, coils, H, W], or "
            "[slices, H, W] of a single coil"
        )
    shape = found.shape if found.ndim == 4 else (len(found), 1, *found.shape[1:])
    check_size(path, shape, 8)
    return checked_kspace(path, _read(found, np.complex64).reshape(shape), "'kspace'")


def _read(found: Any, dtype: Any) -> np.ndarray:
    """All of a dataset, converted while it is read, whatever its byte order and precision."""
    values = np.empty(found.shape, dtype)
    if found.size:
        found.read_direct(values)
    return values


def _mask(file: Any, path: Path, width: int) -> np.ndarray | None:
    found = dataset(file, "mask", path)
    if found is None:
        return None
    if found.dtype.kind not in "biuf":
        raise InputError(f"{path}: 'mask' is {found.dtype}; it must be numbers or booleans")
    if found.size != width:
        raise InputError(
            f"{path}: 'mask' has {found.size} columns and 'kspace' {width}; they must agree"
        )
    mask = np.asarray(found[()]).reshape(-1)
    if not np.isfinite(mask).all():
        raise InputError(f"{path}: 'mask' holds NaN or infinite values")
    return mask != 0


def _target(found: Any, name: str, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    fits = found.ndim == 3 and len(found) == shape[0] and 0 not in found.shape
    if not fits or found.shape[1] > shape[2] or found.shape[2] > shape[3]:
        raise InputError(
            f"{path}: '{name}' has shape {found.shape}; for this 'kspace' it must be "
            f"[{shape[0]}, h <= {shape[2]}, w <= {shape[3]}]"
        )
    if found.dtype.kind not in "biuf":
        raise InputError(f"{path}: '{name}' is {found.dtype}; it must be real numbers")
    target = _read(found, np.float32)
    if not np.isfinite(target).all():
        raise InputError(f"{path}: '{name}' holds NaN or infinite values")
    if not target.max() > 0:
        raise InputError(f"{path}: '{name}' holds no value above zero")
    return target


def _name(file: Any, path: Path) -> str:
    name = file.attrs.get("name", path.stem)
    return name if isinstance(name, str) else path.stem


def _spacing(
    file: Any, path: Path, affine: np.ndarray | None, header: str | None, height: int
) -> Spacing | None:
    """The spacing by nirvana's own attributes, else by the header of fastMRI's files."""
    own = _attribute(file, "spacing_mm", (3,), path)
    if own is not None:
        if not (own > 0).all():
            raise InputError(f"{path}: its attribute 'spacing_mm' {own.tolist()} must be positive")
        slices, rows, columns = (float(value) for value in own)
        return (slices, rows, columns)
    if affine is not None:
        return spacing_of(affine)
    try:
        encoded = parse_header(header or "").encoded
    except ValueError:
        return None  # reconstruction needs no header, and some files' are only a stub
    rows, columns, slices = encoded.voxel
    return (slices, rows, columns) if encoded.matrix[0] == height else None


def _attribute(file: Any, key: str, shape: tuple[int, ...], path: Path) -> np.ndarray | None:
    values = file.attrs.get(key)
    if values is None:
        return None
    array = np.asarray(values)
    if array.shape != shape or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"{path}: its attribute '{key}' must be {shape} finite numbers")
    return array.astype(np.float64)


def write_scan(path: str | Path, scan: Scan, **attributes: str | float) -> None:
    """Writes a scan as fastMRI HDF5, atomically; `read_scan` and fastMRI's own loader read it.

    Args:
        path: the file.
        scan: the scan; without a header of its own it gets a minimal ISMRMRD header.
        **attributes: further attributes of the file, e.g. the seed of a simulation.
    """
    import h5py

    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file["kspace"] = scan.kspace.astype(np.complex64)
        file["ismrmrd_header"] = (scan.header or _ismrmrd_header(scan)).encode()
        if scan.mask is not None:
            file["mask"] = scan.mask.astype(np.float32)
        if scan.target is not None:
            file["reconstruction_rss"] = scan.target.astype(np.float32)
            file.attrs["max"] = float(scan.target.max())
            file.attrs["norm"] = float(np.linalg.norm(scan.target))
        file.attrs["patient_id"] = scan.name
        file.attrs["acquisition"] = "unknown"
        _write_attributes(file, scan, attributes)


def require_simulated(path: Path) -> None:
    """Refuses to replace a file that is there, unless a simulation wrote it.

    Raises:
        InputError: for an existing file without a simulation's seed, or a place where no file can
            be written.
    """
    if not writable_file(path).exists():
        return
    try:
        with open_hdf5(path) as file:
            simulated = SIMULATION_SEED in file.attrs
    except InputError:
        simulated = False
    if not simulated:
        raise InputError(f"{path} exists and is no simulated scan; give another file to write")


def write_reconstruction(
    path: str | Path, volume: np.ndarray, scan: Scan, mask: np.ndarray, **attributes: str | float
) -> None:
    """Writes a reconstructed volume as HDF5, atomically.

    Dataset `reconstruction` float32 `[slices, H, W]` on the scale of the k-space's own images,
    `mask` bool `[W]`; attributes `name`, `spacing_mm` (slices, rows, columns) and `affine` (see
    `Scan`) where known, `sampled` (share of columns), `acceleration` (its inverse) and
    `attributes`.

    Args:
        path: the file.
        volume: real `[slices, H, W]`.
        scan: that was reconstructed.
        mask: bool `[W]`, the columns that were used.
        **attributes: further attributes, e.g. the method's name.
    """
    import h5py

    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file["reconstruction"] = np.asarray(volume, dtype=np.float32)
        file["mask"] = np.asarray(mask, dtype=bool)
        file.attrs["sampled"] = float(np.mean(mask))
        file.attrs["acceleration"] = 1 / float(np.mean(mask))
        _write_attributes(file, scan, attributes)


def _write_attributes(file: Any, scan: Scan, attributes: dict[str, str | float]) -> None:
    file.attrs["name"] = scan.name
    if scan.spacing is not None:
        file.attrs["spacing_mm"] = scan.spacing
    if scan.affine is not None:
        file.attrs["affine"] = scan.affine
    for key, value in attributes.items():
        file.attrs[key] = value


def _ismrmrd_header(scan: Scan) -> str:
    """The fields of an ISMRMRD header that fastMRI's loader reads: matrix sizes and limits."""
    slices, coils, height, width = scan.kspace.shape
    rows, columns = (height, width) if scan.target is None else scan.target.shape[-2:]
    thickness, row, column = scan.spacing or (1.0, 1.0, 1.0)

    def space(name: str, rows: int, columns: int) -> str:
        return (
            f"<{name}><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>"
            f"<fieldOfView_mm><x>{rows * row:g}</x><y>{columns * column:g}</y>"
            f"<z>{thickness:g}</z></fieldOfView_mm></{name}>"
        )

    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<acquisitionSystemInformation>"
        f"<receiverChannels>{coils}</receiverChannels></acquisitionSystemInformation>"
        "<experimentalConditions><H1resonanceFrequency_Hz>0</H1resonanceFrequency_Hz>"
        "</experimentalConditions><encoding>"
        + space("encodedSpace", height, width)
        + space("reconSpace", rows, columns)
        + "<trajectory>cartesian</trajectory><encodingLimits><kspace_encoding_step_1>"
        f"<minimum>0</minimum><maximum>{width - 1}</maximum><center>{width // 2}</center>"
        "</kspace_encoding_step_1>"
        f"<slice><minimum>0</minimum><maximum>{slices - 1}</maximum><center>0</center></slice>"
        "</encodingLimits></encoding></ismrmrdHeader>\n"
    )
