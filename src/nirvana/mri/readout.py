"""Completion of an asymmetric echo in a 3D scan whose planes across the readout were reconstructed
one by one.

The gaps of the planes must be filled before the coils have images, and only the images of all
planes have a k-space along the readout. For an object without phase, conjugate symmetry along the
readout holds in every line of pixels along it on its own. So the slices of the scan, which hold
these lines, are completed one by one, exactly as those of a 2D scan with an asymmetric echo:

    planes -> coil images of all planes -> for each slice: k-space -> missing side -> images

The coil images of a whole scan are in a temporary file if they are large, see
`encoding_3d.scratch_array`; in memory are those of a plane, and then of a slice.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from nirvana.mri.classical.common import fft2c
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.encoding_3d import scratch_array
from nirvana.mri.data.slice_array import SliceArray
from nirvana.mri.methods import SliceImage, fourier_method
from nirvana.mri.physics.pattern import Extent


def complete_readout(
    planes: Iterable[SliceImage], acquisition: Acquisition, readout: Extent
) -> Iterator[SliceImage]:
    """The slices of a 3D scan, the missing side of their readout completed.

    Args:
        planes: the reconstructed images of all planes across the readout, `[partitions, W]` each.
        acquisition: the planes' k-space, `[H, coils, partitions, W]`.
        readout: the measured part of the readout, along the rows of the slices' k-space.

    Yields:
        The image of each slice, `[H, W]`. Its complex image is combined by the coil images of low
        resolution, whatever the method.
    """
    partitions, width = acquisition.size
    coils, height = acquisition.num_coils, len(acquisition)
    images = scratch_array((height, coils, partitions, width))
    for number, plane in enumerate(planes):
        images[number] = plane.coils()

    measured = np.zeros((height, 1), bool)
    measured[slice(*readout.rows)] = True

    def kspace(index: int) -> np.ndarray:
        # What a method puts on the missing side is left out.
        return fft2c(images[:, :, index].swapaxes(0, 1)).astype(np.complex64) * measured

    slices = SliceArray(kspace, (partitions, coils, height, width))
    every = np.ones(width, bool)
    yield from fourier_method(Acquisition(slices, every, extent=readout, name=acquisition.name))
