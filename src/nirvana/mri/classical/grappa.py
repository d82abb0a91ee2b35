"""GRAPPA (Griswold et al., 2002) by pygrappa.

Only NumPy is imported at the top: worker processes import this module and must start without
torch.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nirvana.mri.classical.common import central_rows
from nirvana.mri.classical.peers import GrappaSettings, peers_for
from nirvana.mri.classical.workers import map_slices
from nirvana.mri.data.acquisition import Acquisition

Task = tuple[np.ndarray, np.ndarray, np.ndarray, GrappaSettings]


def grappa(
    acquisition: Acquisition,
    settings: GrappaSettings | None = None,
    *,
    workers: int | None = None,
) -> Iterator[np.ndarray]:
    """Missing samples as sums of measured neighbours of all coils, with weights that are fitted on
    the calibration samples for every arrangement of neighbours.

    Args:
        acquisition: the measured k-space.
        settings: see `GrappaSettings`; None takes those chosen for this acceleration.
        workers: see `workers.map_slices`.

    Yields:
        complex64 `[coils, H, W]` for each slice, measured samples as they were; samples without a
        measured neighbour in reach of the kernel stay zero.

    Raises:
        InputError: the coils cannot be calibrated.
    """
    acquisition.require_calibration()
    settings = settings or peers_for(acquisition.pattern).grappa

    def tasks() -> Iterator[Task]:
        for index, kspace in enumerate(acquisition.slices()):
            yield kspace, acquisition.mask(index), acquisition.calibration(index), settings

    yield from map_slices(_filled, tasks(), len(acquisition), workers)


def _filled(task: Task) -> np.ndarray:
    from pygrappa import mdgrappa

    kspace, mask, calibration, settings = task
    if not kspace.any() or not calibration.any():
        return kspace
    # pygrappa zero-pads the calibration by half a kernel and fits the weights there, too, so the
    # more rows it has, the smaller is their share.
    block = central_rows(calibration, settings.calibration_rows)
    # It regularises by the size of its data, and fits in double precision.
    options = {"kernel_size": settings.kernel, "lamda": settings.regularisation}
    with np.errstate(invalid="ignore"):  # for samples without a measured neighbour, which stay zero
        filled: Any = mdgrappa(kspace, block, coil_axis=0, **options)
    return np.where(mask, kspace, filled).astype(np.complex64)
