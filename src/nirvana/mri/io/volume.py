"""Image volumes: NIfTI in and out, `.npy` in."""

import gzip
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nirvana.errors import InputError
from nirvana.files import atomic_file, existing_file
from nirvana.mri.io.compressed import unpacked
from nirvana.mri.io.numpy_files import NPY, is_complex_npy, open_npy
from nirvana.mri.io.scan import UNREADABLE, Spacing, check_size, check_stored

SUFFIXES = (".nii", ".nii.gz", *NPY)


def is_volume(path: str | Path) -> bool:
    """Whether the file is one that `read_volume` reads: by its name, and of `.npy` by its kind of
    numbers, since complex ones are k-space."""
    path = Path(path)
    name = path.name.lower()
    return name.endswith(SUFFIXES) and not (name.endswith(NPY) and is_complex_npy(path))


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
    path = existing_file(path)
    if not is_volume(path):
        raise InputError(f"{path} is no image volume; give {', '.join(SUFFIXES)}")
    volume = _read_npy(path) if path.name.lower().endswith(NPY) else _read_nifti(path)
    if not np.isfinite(volume).all():
        raise InputError(f"{path} holds NaN or infinite values")
    peak = volume.max()
    if not peak > 0:
        raise InputError(f"{path} is empty: no value is above zero")
    return np.clip(volume / peak, 0, 1).astype(np.float32)


def read_spacing(path: str | Path) -> Spacing | None:
    """Distance of slices, rows, columns of `read_volume`'s result, in mm; None where unknown."""
    path = existing_file(path)
    if path.name.lower().endswith(NPY):
        return None
    image, orientation = _open_nifti(path)
    columns, rows, slices = _canonical(image.header.get_zooms(), orientation)
    return (float(slices), float(rows), float(columns))


def read_affine(path: str | Path) -> np.ndarray | None:
    """The affine of `read_volume`'s result (see `geometry`); None where the orientation is unknown:
    for `.npy`, and for NIfTI whose codes of qform and sform are both 0, which has sizes of voxels
    alone."""
    import nibabel

    path = existing_file(path)
    if path.name.lower().endswith(NPY):
        return None
    image, orientation = _open_nifti(path)
    if not (image.header["qform_code"] or image.header["sform_code"]):
        return None
    shape = image.shape[:3]
    canonical = image.affine @ nibabel.orientations.inv_ornt_aff(orientation, shape)
    columns, rows, _ = _canonical(shape, orientation)
    picture = np.zeros((4, 4))  # canonical index of (slice, row, column), see `_read_nifti`
    picture[0, 2], picture[0, 3] = -1, columns - 1
    picture[1, 1], picture[1, 3] = -1, rows - 1
    picture[2, 0] = picture[3, 3] = 1
    return canonical @ picture


def _read_npy(path: Path) -> np.ndarray:
    with unpacked(path) as file:
        array = np.array(open_npy(file))
    if array.ndim != 3 or array.dtype.kind not in "biuf":
        raise InputError(
            f"{path} holds {array.dtype} {array.shape}; it must be real [slices, H, W]"
        )
    check_size(path, (array.shape[0], 1, *array.shape[1:]), 4)
    with np.errstate(over="ignore"):  # infinite values are refused where the volume is checked
        return np.asarray(array, dtype=np.float32)


def _read_nifti(path: Path) -> np.ndarray:
    import nibabel

    image, orientation = _open_nifti(path)
    try:
        data = image.dataobj[..., 0] if len(image.shape) == 4 else image.dataobj[...]
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read, it seems cut off: {error}") from error
    # Canonical axes point to the right, to the front and up. A picture has its first row on top
    # and its first column on the left, where radiologists put the patient's right.
    canonical = nibabel.apply_orientation(data, orientation)
    with np.errstate(over="ignore"):
        return np.asarray(canonical, dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0)


def _open_nifti(path: Path) -> tuple[Any, np.ndarray]:
    """The image, header checked and data unread, and how its axes lie in RAS+ (nibabel's form)."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.imageglobals import logger
    from nibabel.spatialimages import HeaderDataError

    try:
        with _quiet(logger):  # what nibabel doubts is refused below, or harmless
            image: Any = nibabel.load(path)
    except (ImageFileError, HeaderDataError, *UNREADABLE) as error:
        raise InputError(f"{path} is no readable NIfTI image: {error}") from error
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise InputError(f"{path} has shape {image.shape}; it must be a volume or a series of them")
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(f"{path} holds {image.get_data_dtype()}; it must be real numbers")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise InputError(f"{path}: its affine {image.affine.tolist()} gives no orientation")
    orientation = nibabel.io_orientation(image.affine)
    columns, rows, slices = _canonical(image.shape, orientation)
    check_size(path, (slices, 1, rows, columns), 4)
    claimed = slices * rows * columns * image.get_data_dtype().itemsize
    check_stored(path, claimed, compressed=path.suffix.lower() == ".gz")
    return image, orientation


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _canonical(values: Any, orientation: np.ndarray) -> list[Any]:
    """What belongs to the first three axes of the file, in the order of the RAS+ axes."""
    order = np.argsort(orientation[:, 0])
    return [values[axis] for axis in order]


def write_nifti(
    path: str | Path, volume: np.ndarray, affine: np.ndarray | None, spacing: Spacing | None = None
) -> None:
    """Writes `[slices, H, W]` as float32 NIfTI, atomically, axes in closest canonical order.

    Of a volume that was read from a canonical file, every voxel has the index it had there, and the
    file the affine it had there. Without an affine the orientation is marked as unknown, and a
    volume that was read from such a file has the index it had there, too.

    Args:
        path: the file, `.nii` or `.nii.gz`.
        volume: real `[slices, H, W]`; it is read slice by slice.
        affine: see `geometry`.
        spacing: of slices, rows, columns in mm, in place of an affine.
    """
    import nibabel

    data = np.asarray(volume, dtype=np.float32).transpose(2, 1, 0)
    if affine is None:
        slices, rows, columns = spacing or (1.0, 1.0, 1.0)
        # Readers of such files draw the second axis upwards, as `read_volume` does.
        image = nibabel.Nifti1Image(data[:, ::-1], None)
        image.header.set_zooms((columns, rows, slices))
    else:
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, affine[:, [2, 1, 0, 3]]))
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        if Path(path).suffix.lower() == ".gz":
            # Without name and time the same image gives the same bytes.
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)
