"""What every method of reconstruction receives: measured k-space with its sampling pattern.

Slices are made one by one, so that k-space may be larger than the memory. NumPy only:
worker processes of the classical methods import this module and must start without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nirvana.errors import InputError
from nirvana.mri.classical.common import ifft2c
from nirvana.mri.data.slice_array import Kspace
from nirvana.mri.physics.pattern import (
    Extent,
    central_block,
    find_extent,
    pattern_has_gaps,
    slice_pattern,
    slice_patterns,
)

MIN_CALIBRATION = 2  # samples along each axis from which coil sensitivities can be estimated


@dataclass(frozen=True)
class Acquisition:
    """The measured k-space of one scan, or a part of it that is to be reconstructed.

    Attributes:
        kspace: complex `[slices, coils, H, W]`, whose slices may be read when they are used.
        pattern: bool, see `physics.pattern`; what lies outside of it is not used.
        coil_matrix: complex64 `[virtual coils, coils]` that is applied to every sample (noise
            whitening, coil compression), or None.
        reference: complex `[slices, coils, h, w]`, a separate scan from which alone the coil
            sensitivities are estimated, or None.
        extent: the measured part of k-space, where one side of it is missing and is to be
            completed; None where both sides were measured.
        name: of the scan, for errors.
    """

    kspace: Kspace
    pattern: np.ndarray
    coil_matrix: np.ndarray | None = None
    reference: np.ndarray | None = None
    extent: Extent | None = None
    name: str = "k-space"

    def __len__(self) -> int:
        return len(self.kspace)

    @property
    def num_coils(self) -> int:
        """Number of coils that the methods see."""
        return self.kspace.shape[1] if self.coil_matrix is None else len(self.coil_matrix)

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        height, width = self.kspace.shape[-2:]
        return height, width

    def mask(self, index: int) -> np.ndarray:
        """The measured points of a slice, bool `[1, W]` or `[H, W]`."""
        return slice_pattern(self.pattern, index)

    def slice(self, index: int) -> np.ndarray:
        """K-space of a slice, complex64 `[coils, H, W]`, zero where not measured."""
        return self.samples(index) * self.mask(index)

    def samples(self, index: int) -> np.ndarray:
        """The same with whatever the scan's file holds outside of the pattern."""
        return self._combined(self.kspace[index])

    def slices(self) -> Iterator[np.ndarray]:
        """All of `slice`, in order."""
        return (self.slice(index) for index in range(len(self)))

    def calibration(self, index: int) -> np.ndarray:
        """The fully sampled block around the origin from which the coils of a slice are calibrated,
        complex64 `[coils, h, w]` with the origin at `[h // 2, w // 2]`."""
        if self.reference is None:
            rows, columns = central_block(self.mask(index), self.size[0])
            return self._combined(self.kspace[index][:, rows, columns])
        reference = self.reference[index]
        rows, columns = central_block((reference != 0).any(axis=0), reference.shape[1])
        return self._combined(reference[:, rows, columns])

    def _combined(self, samples: np.ndarray) -> np.ndarray:
        """Samples `[coils, h, w]` of the coils that the methods see, complex64."""
        samples = np.asarray(samples, dtype=np.complex64)
        if self.coil_matrix is None:
            return samples
        return np.tensordot(self.coil_matrix, samples, axes=1)

    def require_calibration(self) -> None:
        """Checks that the coils can be calibrated.

        Raises:
            InputError: fewer than two contiguous samples are measured around the origin along an
                axis, in any slice.
        """
        patterns = len(slice_patterns(self.pattern)) if self.reference is None else len(self)
        for index in range(patterns):
            rows, columns = self.calibration(index).shape[1:]
            if min(rows, columns) < MIN_CALIBRATION:
                what = "columns" if len(self.mask(index)) == 1 else "rows and columns"
                raise InputError(
                    f"{self.name}: {min(rows, columns)} contiguous {what} in the middle of k-space "
                    "are sampled; coil sensitivities need at least 2 in the centre"
                )

    def find_extent(self) -> Extent:
        """The measured part of k-space, and whether one side is missing."""
        energy = np.zeros(self.size[0])
        for index, part in enumerate(self.kspace):
            part = np.asarray(part) * self.mask(index)
            energy += np.square(np.abs(part)).sum(axis=(0, 2), dtype=np.float64)
        count = slice_patterns(self.pattern).sum(axis=(0, 2))
        return find_extent(self.pattern, energy / np.maximum(count, 1))

    @property
    def has_gaps(self) -> bool:
        """Whether anything is missing inside the extent."""
        return pattern_has_gaps(self.pattern)

    @cached_property
    def scale(self) -> float:
        """The brightest pixel of the zero-filled root-sum-of-squares images; above 0."""
        brightest = max(np.linalg.norm(ifft2c(part), axis=0).max() for part in self.slices())
        return float(max(brightest, np.finfo(np.float32).tiny))

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise in the real (or imaginary) part of k-space.

        Estimated from the measured samples with the least signal, farthest from the middle (the
        outer eighth of the rows, in the outer half of the sampled columns): the lower quartile of
        the magnitude of complex noise is 0.759 standard deviations. 0 where k-space was
        zero-padded or nothing was measured there.
        """
        height, width = self.size
        late = self.extent is not None and self.extent.late_echo
        first, last = self.extent.rows if self.extent is not None and late else (0, height)
        edge = max(height // 16, 1)
        rows = np.r_[first : first + edge, last - edge : last]
        found = []
        for index, part in enumerate(self.slices()):
            mask = np.broadcast_to(self.mask(index), (height, width))
            distance = np.broadcast_to(np.abs(np.arange(width) - width // 2), mask.shape)
            outer = mask & (distance >= np.median(distance[mask])) if mask.any() else mask
            found.append(np.abs(part[:, rows][:, outer[rows]]).ravel())
        samples = np.concatenate(found)
        if not len(samples):
            return 0.0
        return float(np.quantile(samples, 0.25) / np.sqrt(2 * np.log(4 / 3)))

    @cached_property
    def coil_gram(self) -> np.ndarray:
        """complex128 `[coils, coils]`, sum over the calibration samples k of k_c conj(k_d)."""
        gram = np.zeros((self.num_coils, self.num_coils), np.complex128)
        for index in range(len(self)):
            block = self.calibration(index).reshape(self.num_coils, -1)
            gram += block @ block.conj().T
        return gram
