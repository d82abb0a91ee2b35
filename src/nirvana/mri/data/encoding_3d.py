"""The second phase encoding of 3D scans, transformed away so that slices remain.

Where all partitions were measured alike, the transform along them gives slices as a 2D scan's.
Otherwise the readout is transformed: it is fully sampled, so the planes across it are independent,
each with the same pattern of points along both phase encodings.
"""

import math
import tempfile
from dataclasses import replace

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.physics.pattern import has_gaps, is_one_sided, slice_patterns

IN_MEMORY = 2**30  # bytes of an array; larger ones are put into a temporary file


def without_second_encoding(acquisition: Acquisition) -> tuple[Acquisition, bool]:
    """The slices of a 3D scan.

    Args:
        acquisition: of k-space `[partitions, coils, H, W]` and whole readouts.

    Returns:
        The slices, and whether they are planes across the readout: k-space
        `[H, coils, partitions, W]`.

    Raises:
        InputError: single points of the readout are missing.
    """
    pattern, kspace = acquisition.pattern, np.asarray(acquisition.kspace)
    if pattern.ndim == 2 or slice_patterns(pattern).shape[1] > 1:
        raise InputError(
            f"{acquisition.name}: a 3D scan whose readouts have holes; along H all samples of a "
            "readout must be measured"
        )
    partitions = np.array([part.any() for part in kspace])
    if pattern.ndim == 1 and not has_gaps(partitions) and not is_one_sided(partitions):
        slices = _transformed(kspace, 0, kspace.shape)
        reference = acquisition.reference
        if reference is not None:
            shape = (len(kspace), *reference.shape[1:])
            reference = _transformed(_resized(reference, 0, len(kspace)), 0, shape)
        return replace(acquisition, kspace=slices, reference=reference), False
    columns = slice_patterns(pattern)[:, 0] & partitions[:, None]
    _, coils, height, width = kspace.shape
    planes = _transformed(kspace, 2, (height, coils, len(kspace), width))
    reference = acquisition.reference
    if reference is not None:
        shape = (height, coils, len(reference), reference.shape[3])
        reference = _transformed(_resized(reference, 2, height), 2, shape)
    return replace(acquisition, kspace=planes, pattern=columns, reference=reference), True


def scratch_array(shape: tuple[int, ...]) -> np.ndarray:
    """A complex64 array without values: in a temporary file if it is large, else in memory. The
    file is gone as soon as the array is."""
    if 8 * math.prod(shape) <= IN_MEMORY:
        return np.empty(shape, np.complex64)
    with tempfile.TemporaryFile(prefix="nirvana-") as file:
        return np.memmap(file, np.complex64, "w+", shape=shape)


def _transformed(kspace: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """K-space `[partitions, coils, H, W]` in image space along an axis, which becomes the first of
    the result: the centred, orthonormal transform, coil by coil."""
    out = scratch_array(shape)
    along = 0 if axis == 0 else 1  # in the k-space of one coil, [partitions, H, W]
    for coil in range(shape[1]):
        part = np.fft.ifftshift(np.asarray(kspace[:, coil], np.complex64), axes=along)
        image = np.fft.fftshift(np.fft.ifft(part, axis=along, norm="ortho"), axes=along)
        out[:, coil] = image if axis == 0 else image.swapaxes(0, 1)
    return out


def _resized(kspace: np.ndarray, axis: int, length: int) -> np.ndarray:
    """K-space zero-padded or cropped along an axis about its origin, without a change of the
    image's scale, which sensitivities do not need."""
    have = kspace.shape[axis]
    kspace = np.moveaxis(kspace, axis, 0)
    out = np.zeros((length, *kspace.shape[1:]), kspace.dtype)
    first = length // 2 - have // 2
    into = slice(max(first, 0), min(first + have, length))
    out[into] = kspace[into.start - first : into.stop - first]
    return np.moveaxis(out, 0, axis)
