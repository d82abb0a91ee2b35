"""Positions of a volume's voxels in the patient.

An affine is float64 `[4, 4]` and maps the index (slice, row, column) of a `[slices, H, W]` volume
to mm to the patient's right, front and top (RAS+, NIfTI's axes). DICOM's and ISMRMRD's axes, LPS+,
have the opposite direction along the first two.
"""

import numpy as np

from nirvana.mri.io.scan import Spacing

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def shifted(affine: np.ndarray, slices: int = 0, rows: int = 0, columns: int = 0) -> np.ndarray:
    """The affine of `volume[slices:, rows:, columns:]`."""
    result = affine.copy()
    result[:, 3] = affine @ np.array([slices, rows, columns, 1.0])
    return result


def resampled(affine: np.ndarray, axis: int, old: int, new: int) -> np.ndarray:
    """The affine of an image of the same field of view with `new` voxels along an axis, where it
    had `old`; the voxel in the middle, where an image's origin lies, stays where it is."""
    result = affine.copy()
    result[:, axis] *= old / new
    result[:, 3] += affine[:, axis] * (old // 2) - result[:, axis] * (new // 2)
    return result


def spacing_of(affine: np.ndarray) -> Spacing:
    """Distance of neighbouring slices, rows and columns, mm."""
    slices, rows, columns = np.linalg.norm(affine[:3, :3], axis=0)
    return (float(slices), float(rows), float(columns))


def is_affine(values: np.ndarray) -> bool:
    """Whether an array is an invertible affine."""
    return (
        values.shape == (4, 4)
        and bool(np.isfinite(values).all())
        and np.array_equal(values[3], [0, 0, 0, 1])
        and np.linalg.matrix_rank(values[:3, :3]) == 3
    )
