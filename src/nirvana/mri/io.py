"""Scans and volumes on disk: fastMRI HDF5, NIfTI, `.npy`.

Everything a reader hands out was checked: shape and size from the header before anything is read,
then that the numbers are finite and not all zero. What is wrong is told in one line (`InputError`).
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file

Spacing = tuple[float, float, float]

MIN_SIDE, MAX_SIDE = 8, 8192
MAX_COILS, MAX_SLICES = 1024, 8192
MAX_BYTES = 64 * 2**30
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".npy")


@dataclass(frozen=True)
class Scan:
    """One multi-coil Cartesian scan.

    Attributes:
        kspace: complex64 `[slices, coils, H, W]`, W the phase-encoding direction.
        mask: bool `[W]` that came with the file, or None.
        target: float32 `[slices, h, w]` magnitude (root sum of squares), h <= H, w <= W, or None.
        name: what the scan is called.
        spacing: of slices, rows, columns in mm, where known.
        header: the ISMRMRD header as text, where there is one.
    """

    kspace: np.ndarray
    mask: np.ndarray | None
    target: np.ndarray | None
    name: str
    spacing: Spacing | None = None
    header: str | None = None


def is_volume(path: str | Path) -> bool:
    """Whether the name is one that `read_volume` reads."""
    return Path(path).name.lower().endswith(VOLUME_SUFFIXES)


def read_scan(path: str | Path) -> Scan:
    """Reads k-space from a fastMRI HDF5 file.

    Datasets: `kspace` complex `[slices, coils, H, W]` or, of a single coil, `[slices, H, W]`;
    optional `reconstruction_rss` or `reconstruction_esc` `[slices, h, w]`, `mask` `[W]`,
    `ismrmrd_header`.

    Raises:
        InputError: the file is missing, no HDF5, or its contents are not such a scan.
    """
    import h5py

    path = _existing(path)
    if is_volume(path):
        raise InputError(
            f"{path} is an image volume, not k-space; `nirvana mri simulate` makes k-space of it"
        )
    if not h5py.is_hdf5(path):
        raise InputError(f"{path} is not an HDF5 file; k-space is read from fastMRI HDF5 (.h5)")
    try:
        with h5py.File(path, "r") as file:
            return _scan(file, path)
    except OSError as error:
        raise InputError(f"{path} cannot be read, it seems damaged: {error}") from error


def _scan(file: Any, path: Path) -> Scan:
    kspace = _kspace(file, path)
    width = kspace.shape[-1]
    mask = None
    if "mask" in file:
        mask = np.asarray(file["mask"][()]).reshape(-1) != 0
        if len(mask) != width:
            raise InputError(
                f"{path}: 'mask' has {len(mask)} columns and 'kspace' {width}; they must agree"
            )
    target = next((_target(file[key], path, kspace.shape) for key in _TARGETS if key in file), None)
    spacing = file.attrs.get("spacing_mm")
    header = file["ismrmrd_header"][()] if "ismrmrd_header" in file else None
    return Scan(
        kspace=kspace,
        mask=mask,
        target=target,
        name=str(file.attrs.get("name", path.stem)),
        spacing=None if spacing is None else _spacing(spacing),
        header=header.decode("utf-8", "replace") if isinstance(header, bytes) else header,
    )


_TARGETS = ("reconstruction_rss", "reconstruction_esc")


def _kspace(file: Any, path: Path) -> np.ndarray:
    import h5py

    dataset = file.get("kspace")
    if not isinstance(dataset, h5py.Dataset):
        found = ", ".join(sorted(file)) or "nothing"
        raise InputError(f"{path} has no dataset 'kspace'; it holds {found}")
    if dataset.dtype.kind != "c":
        raise InputError(f"{path}: 'kspace' is {dataset.dtype}; it must be complex")
    if dataset.ndim not in (3, 4):
        raise InputError(
            f"{path}: 'kspace' has shape {dataset.shape}; it must be [slices, coils, H, W], or "
            "[slices, H, W] of a single coil"
        )
    shape = dataset.shape if dataset.ndim == 4 else (len(dataset), 1, *dataset.shape[1:])
    _check_size(path, shape, 8)
    kspace = np.asarray(dataset[()], dtype=np.complex64).reshape(shape)
    if not np.isfinite(kspace).all():
        raise InputError(f"{path}: 'kspace' holds NaN or infinite values")
    if not kspace.any():
        raise InputError(f"{path}: 'kspace' is zero everywhere")
    return kspace


def _target(dataset: Any, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    name = dataset.name.strip("/")
    fits = dataset.ndim == 3 and len(dataset) == shape[0]
    if not fits or dataset.shape[1] > shape[2] or dataset.shape[2] > shape[3]:
        raise InputError(
            f"{path}: '{name}' has shape {dataset.shape}; for this 'kspace' it must be "
            f"[{shape[0]}, h <= {shape[2]}, w <= {shape[3]}]"
        )
    target = np.asarray(dataset[()], dtype=np.float32)
    if not np.isfinite(target).all():
        raise InputError(f"{path}: '{name}' holds NaN or infinite values")
    return target


def read_volume(path: str | Path) -> np.ndarray:
    """Reads a magnitude volume from NIfTI (`.nii`, `.nii.gz`) or `.npy`.

    A NIfTI image is brought to the closest canonical orientation; slices lie along its third axis,
    from inferior to superior, and each is turned so that a picture of it (first row on top) stands
    upright in radiological convention: anterior on top, the patient's right on the left. Of a
    series of volumes the first is read. `.npy` is taken as it is, `[slices, H, W]`.

    Returns:
        float32 `[slices, H, W]`, divided by its maximum; negative values become 0.

    Raises:
        InputError: the file is missing, damaged, or no such volume.
    """
    path = _existing(path)
    if not is_volume(path):
        raise InputError(f"{path} is no image volume; give {', '.join(VOLUME_SUFFIXES)}")
    volume = _read_npy(path) if path.name.lower().endswith(".npy") else _read_nifti(path)
    if not np.isfinite(volume).all():
        raise InputError(f"{path} holds NaN or infinite values")
    peak = volume.max()
    if not peak > 0:
        raise InputError(f"{path} is empty: no value is above zero")
    return np.clip(volume / peak, 0, 1).astype(np.float32)


def read_spacing(path: str | Path) -> Spacing | None:
    """Distance of slices, rows, columns of `read_volume`'s result, in mm; None where unknown."""
    path = _existing(path)
    if path.name.lower().endswith(".npy"):
        return None
    image, orientation = _open_nifti(path)
    columns, rows, slices = _canonical(image.header.get_zooms(), orientation)
    return _spacing((slices, rows, columns))


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an array of numbers: {error}") from error
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}; it must be real [slices, H, W]"
        )
    _check_size(path, (array.shape[0], 1, *array.shape[1:]), 4)
    return np.asarray(array, dtype=np.float32)


def _read_nifti(path: Path) -> np.ndarray:
    import nibabel

    image, orientation = _open_nifti(path)
    try:
        data = image.dataobj[..., 0] if len(image.shape) == 4 else image.dataobj[...]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{path} cannot be read, it seems cut off: {error}") from error
    # Canonical axes point to the right, to the front and up. A picture has its first row on top
    # and its first column on the left, where radiologists put the patient's right.
    canonical = nibabel.apply_orientation(data, orientation)
    return np.asarray(canonical, dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0)


def _open_nifti(path: Path) -> tuple[Any, np.ndarray]:
    """The image, header checked and data unread, and how its axes lie in RAS+ (nibabel's form)."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    unreadable = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)
    try:
        image: Any = nibabel.load(path)
    except unreadable as error:
        raise InputError(f"{path} is no readable NIfTI image: {error}") from error
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise InputError(f"{path} has shape {image.shape}; it must be a volume or a series of them")
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path} holds {image.get_data_dtype()}; it must be real numbers")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise InputError(f"{path}: its affine {image.affine.tolist()} gives no orientation")
    orientation = nibabel.io_orientation(image.affine)
    columns, rows, slices = _canonical(image.shape, orientation)
    _check_size(path, (slices, 1, rows, columns), 4)
    return image, orientation


def _canonical(values: Any, orientation: np.ndarray) -> list[Any]:
    """What belongs to the first three axes of the file, in the order of the RAS+ axes."""
    order = np.argsort(orientation[:, 0])
    return [values[axis] for axis in order]


def write_scan(path: str | Path, scan: Scan, **attributes: str | float) -> None:
    """Writes a scan as fastMRI HDF5, atomically; `read_scan` and fastMRI's own loader read it.

    Args:
        path: the file.
        scan: what to write; without a header of its own it gets a minimal ISMRMRD one.
        attributes: further attributes of the file, e.g. the seed of a simulation.
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


def write_reconstruction(
    path: str | Path, volume: np.ndarray, scan: Scan, mask: np.ndarray, **attributes: str | float
) -> None:
    """Writes a reconstructed volume as HDF5, atomically.

    Dataset `reconstruction` float32 `[slices, H, W]` on the scale of the k-space's own images,
    `mask` bool `[W]`; attributes `name`, `spacing_mm` (slices, rows, columns, where known),
    `sampled` (share of columns), `acceleration` (its inverse) and those handed in.

    Args:
        path: the file.
        volume: real `[slices, H, W]`.
        scan: what it was reconstructed from.
        mask: bool `[W]`, the columns that were used.
        attributes: further attributes, e.g. the method's name.
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
    for key, value in attributes.items():
        file.attrs[key] = value


def _ismrmrd_header(scan: Scan) -> str:
    """The fields of an ISMRMRD header that fastMRI's loader asks for: matrix sizes and limits."""
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


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return path


def _check_size(path: Path, shape: tuple[int, ...], item_bytes: int) -> None:
    """Refuses a `[slices, coils, H, W]` that cannot be a scan, before any of it is read."""
    slices, coils, height, width = shape
    if not (1 <= slices <= MAX_SLICES and 1 <= coils <= MAX_COILS):
        raise InputError(
            f"{path} claims {slices} slices of {coils} coils; possible are 1 to {MAX_SLICES} and "
            f"1 to {MAX_COILS}"
        )
    if min(height, width) < MIN_SIDE or max(height, width) > MAX_SIDE:
        raise InputError(
            f"{path} claims slices of {height} x {width}; possible are {MIN_SIDE} to {MAX_SIDE} "
            "along each side"
        )
    size = slices * coils * height * width * item_bytes
    if size > MAX_BYTES:
        raise InputError(
            f"{path} claims {size / 2**30:.0f} GiB of data; at most {MAX_BYTES // 2**30} GiB "
            "are read"
        )


def _spacing(values: Any) -> Spacing:
    slices, rows, columns = (float(value) for value in values)
    return (slices, rows, columns)
