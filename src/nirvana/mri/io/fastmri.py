"""Reads and writes fastMRI's HDF5."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file, writable_file
from nirvana.mri.io.arrange import arranged
from nirvana.mri.io.arrays import AUXILIARY, ArrayFile, ArrayKspace, read_kspace
from nirvana.mri.io.geometry import is_affine, spacing_of
from nirvana.mri.io.hdf5 import dataset, open_hdf5, text, variables_of
from nirvana.mri.io.header import Header, parse_header
from nirvana.mri.io.options import ReadOptions, suffix_of
from nirvana.mri.io.scan import Encoding, Scan, Spacing, Study, check_bytes, in_file_axes

SIMULATION_SEED = "simulation_seed"  # the attribute by which a simulated scan is known
TARGETS = ("reconstruction_rss", "reconstruction_esc")
"""Of many coils and of one: fastMRI's single-coil files have both, and the root sum of squares in
them is of all the coils that the single one was emulated from."""
USUAL_AXES = {3: ("slice", "row", "column"), 4: ("slice", "coil", "row", "column")}


def scan_of(file: Any, path: Path, options: ReadOptions) -> Scan:
    """The scan in an open file; see `nirvana.mri.io.read_scan`.

    Raises:
        InputError: its contents are no such scan.
    """
    kspace = read_kspace(array_file(file, path), options)
    header = text(file, "ismrmrd_header", path)
    affine = _attribute(file, "affine", (4, 4), path)
    if affine is not None and not is_affine(affine):
        raise InputError(f"{path}: its attribute 'affine' {affine.tolist()} places no voxels")
    try:
        parsed = parse_header(header or "")
    except ValueError:
        parsed = None  # reconstruction needs no header, and some files' are only a stub
    scan = Scan(
        kspace=kspace.values,
        mask=None,
        target=None,
        name=_name(file, path) + suffix_of(options),
        spacing=_spacing(file, path, affine, parsed, kspace.values.shape[-2]),
        header=header,
        affine=affine,
        remarks=kspace.remarks,
        study=Study() if parsed is None else parsed.study,
        encoding=Encoding() if parsed is None else parsed.encodings[0].facts(),
    )
    scan = kspace.completed(scan)
    if file.attrs.get("volume_encoding") == "3D":
        scan = replace(scan, volume_encoding="3D")
    target = _target(file, path, kspace, options)
    return arranged(scan, options, path, kspace.mask(), target)


def array_file(file: Any, path: Path) -> ArrayFile:
    """The arrays of an open file, unread, with fastMRI's meaning of their axes."""
    return ArrayFile(path, variables_of(file, path, AUXILIARY), "C", USUAL_AXES)


def _target(file: Any, path: Path, kspace: ArrayKspace, options: ReadOptions) -> np.ndarray | None:
    """The target, float32 `[slices, h, w]`; None where there is none."""
    for name in TARGETS if "coil" in kspace.axes else TARGETS[::-1]:
        found = dataset(file, name, path)
        if found is None:
            continue
        if found.dtype.kind not in "biuf":
            raise InputError(f"{path}: '{name}' is {found.dtype}; it must be real numbers")
        check_bytes(path, found.shape, 4)
        target = np.empty(found.shape, np.float32)
        if found.size:
            found.read_direct(target)
        if not np.isfinite(target).all():
            raise InputError(f"{path}: '{name}' holds NaN or infinite values")
        if not target.max(initial=0) > 0:
            raise InputError(f"{path}: '{name}' holds no value above zero")
        chosen = options.select.get("slice")
        return target if chosen is None or target.ndim != 3 else target[chosen : chosen + 1]
    return None


def _name(file: Any, path: Path) -> str:
    name = file.attrs.get("name", path.stem)
    return name if isinstance(name, str) else path.stem


def _spacing(
    file: Any, path: Path, affine: np.ndarray | None, header: Header | None, height: int
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
    if header is None:
        return None
    encoded = header.encodings[0].encoded
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

    The phase encoding runs along the columns of the file, whatever it did in the scan's own.

    Args:
        path: the file.
        scan: the scan; without a header of its own it gets a minimal ISMRMRD header.
        **attributes: further attributes of the file, e.g. the seed of a simulation.
    """
    import h5py

    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        kspace = file.create_dataset("kspace", scan.kspace.shape, np.complex64)
        for number, part in enumerate(scan.kspace):
            kspace[number] = part
        file["ismrmrd_header"] = (scan.header or _ismrmrd_header(scan)).encode()
        if scan.mask is not None:
            file["mask"] = scan.mask.astype(np.float32)
        for name in ("noise", "noise_covariance", "calibration"):
            if (values := getattr(scan, name)) is not None:
                file[name] = values
        file.attrs["volume_encoding"] = scan.volume_encoding
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
    path: str | Path,
    volume: np.ndarray,
    scan: Scan,
    mask: np.ndarray,
    combined: np.ndarray | None = None,
    **attributes: str | float,
) -> None:
    """Writes a reconstructed volume as HDF5, atomically, in the axes of the scan's file.

    Dataset `reconstruction` float32 `[slices, H, W]` on the scale of the k-space's own images,
    `reconstruction_complex` complex64 of the same shape where there is one, `mask` bool, which
    broadcasts to these; attributes `name`, `spacing_mm` (slices, rows, columns) and `affine` (see
    `Scan`) where known, `sampled` (share of the samples), `acceleration` (its inverse) and
    `attributes`.

    Args:
        path: the file.
        volume: real `[slices, H, W]`.
        scan: that was reconstructed.
        mask: bool, broadcastable to `[slices, H, W]`, the samples that were used.
        combined: complex `[slices, H, W]`, or None.
        **attributes: further attributes, e.g. the method's name.
    """
    import h5py

    volume, spacing, affine = in_file_axes(volume, scan)
    turned = scan.phase_encode == "rows"
    mask = np.asarray(mask, dtype=bool)
    with atomic_file(path) as temporary, h5py.File(temporary, "w") as file:
        file["reconstruction"] = np.asarray(volume, dtype=np.float32)
        if combined is not None:
            image = in_file_axes(combined, scan)[0]
            file["reconstruction_complex"] = np.asarray(image, dtype=np.complex64)
        file["mask"] = np.atleast_2d(mask).swapaxes(-2, -1) if turned else mask
        file.attrs["sampled"] = float(np.mean(mask))
        file.attrs["acceleration"] = 1 / float(np.mean(mask))
        _write_attributes(file, replace(scan, spacing=spacing, affine=affine), attributes)


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
