"""From a scan to a measurement: its sampling pattern, its coils, the encoding of 3D scans.

    second phase encoding of a 3D scan -> noise whitening -> coil compression

What is done is linear and the same for every method; each step leaves a remark for the user.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import existing_file
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.encoding_3d import without_second_encoding
from nirvana.mri.io import Scan
from nirvana.mri.io.scan import UNREADABLE
from nirvana.mri.physics.coil_matrix import (
    SAMPLES_PER_COIL,
    compression_matrix,
    noise_covariance,
    whitening_matrix,
)
from nirvana.mri.physics.fourier import ifft2c, rss
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.physics.pattern import (
    Extent,
    checked_pattern,
    find_pattern,
    measured_points,
    slice_patterns,
)

MAX_COILS = 32
"""More coils than this are compressed to as many, unless the user gives another number."""


@dataclass(frozen=True)
class CoilOptions:
    """How a scan's coils are combined before any reconstruction.

    Attributes:
        whiten: make the noise of the coils white and equal, where it is known.
        covariance: complex `[coils, coils]` of the noise, in place of what the scan holds.
        count: number of virtual coils; 0 keeps all, None compresses more than `MAX_COILS`.
    """

    whiten: bool = True
    covariance: np.ndarray | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 0:
            raise InputError(f"--coils {self.count} must be 1 or more, or 0 for all")


@dataclass(frozen=True)
class Measurement:
    """A scan, ready for reconstruction.

    Attributes:
        acquisition: its k-space. Of a 3D scan that was undersampled along both phase encodings the
            slices are the planes across the readout.
        along_readout: whether that is so; see `volume_of`.
        readout: the measured part of the readout of such a scan, where one side of it is missing
            and is to be completed after the planes were reconstructed, see `mri.readout`; else
            None.
        whitening: complex64 `[coils, coils]`, the part of the acquisition's coil matrix before
            compression, or None.
        remarks: what was found and done, a sentence each.
        facts: the same as numbers, for records.
    """

    acquisition: Acquisition
    along_readout: bool = False
    readout: Extent | None = None
    whitening: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether all of k-space was measured, so that its image can be a ground truth. Empty
        columns at both sides are zero-padding."""
        return not self.acquisition.has_gaps and not self.missing_sides

    @property
    def missing_sides(self) -> tuple[str, ...]:
        """Which sides of k-space were not measured, a sentence for each axis."""
        extent, found = (
            self.acquisition.extent,
            () if self.readout is None else self.readout.remarks(),
        )
        if extent is None:
            return found
        return (*found, *extent.remarks("partitions" if self.along_readout else "rows"))

    def require_full(self, name: object) -> None:
        """Checks that the scan can be a ground truth.

        Args:
            name: of it, for the error.

        Raises:
            InputError: points or one side of k-space are missing.
        """
        if self.acquisition.has_gaps:
            raise InputError(f"{name} is undersampled; only a fully sampled scan can be scored")
        if self.missing_sides:
            raise InputError(
                f"{name} is no ground truth, one side of its k-space is missing: "
                + "; ".join(self.missing_sides)
            )

    def volume_of(self, images: np.ndarray) -> np.ndarray:
        """Images of the acquisition's slices as a volume in the scan's axes, `[slices, H, W]`."""
        return images.swapaxes(0, 1) if self.along_readout else images

    def undersampled(self, sampling: Sampling, seed: int) -> "Measurement":
        """The same scan with the columns of one seeded mask.

        Raises:
            InputError: it is not fully sampled, or the mask is not possible.
        """
        acquisition = self.acquisition
        self.require_full(acquisition.name)
        mask = sampling.mask(acquisition.size[1], seed).numpy() & acquisition.pattern
        return replace(self, acquisition=replace(acquisition, pattern=mask))

    def target(self) -> np.ndarray:
        """The root sum of squares of all coils, before their compression, which leaves out a little
        of the signal: float32 `[slices, H, W]`."""
        every = replace(self.acquisition, coil_matrix=self.whitening)
        images = [rss(ifft2c(torch.from_numpy(part))).numpy() for part in every.slices()]
        return self.volume_of(np.stack(images))


def measure(
    scan: Scan, options: CoilOptions | None = None, mask: np.ndarray | Tensor | None = None
) -> Measurement:
    """Finds what a scan measured, and combines its coils.

    Args:
        scan: the scan.
        options: how its coils are combined; the defaults of `CoilOptions` when None.
        mask: in place of the scan's own, see `physics.pattern`.

    Raises:
        InputError: the mask does not fit, phase encoding does not run along the last axis, or the
            noise covariance cannot be used.
    """
    options = options or CoilOptions()
    pattern = scan_pattern(scan, mask)
    acquisition = Acquisition(scan.kspace, pattern, reference=scan.calibration, name=scan.name)
    remarks: list[str] = []
    along_readout, readout = False, None
    if scan.volume_encoding == "3D":
        whole = acquisition.find_extent()
        acquisition, along_readout = without_second_encoding(acquisition)
        if along_readout:
            remarks.append(
                "3D: undersampled along both phase encodings; the readout was transformed and the "
                f"{len(acquisition)} planes across it reconstructed one by one"
            )
            if whole.late_echo:
                readout = replace(whole, columns=(0, whole.width), partial_fourier=False)
    whitening, source = _whitening(scan, options, remarks)
    acquisition = replace(acquisition, coil_matrix=whitening)
    acquisition, kept = _compressed(acquisition, whitening, options.count, remarks)
    extent = acquisition.find_extent()
    if extent.is_partial:
        acquisition = replace(acquisition, extent=extent)
    echo = readout if along_readout else extent if extent.late_echo else None
    facts = {
        "coils": scan.kspace.shape[1],
        "virtual_coils": acquisition.num_coils,
        "energy_kept": kept,
        "noise_whitened_by": source,
        "separate_calibration": scan.calibration is not None,
        "partial_fourier": list(extent.columns) if extent.partial_fourier else None,
        "partial_partitions": list(extent.rows) if extent.late_echo and along_readout else None,
        "asymmetric_echo": None if echo is None else list(echo.rows),
    }
    measurement = Measurement(acquisition, along_readout, readout, whitening, facts=facts)
    remarks += measurement.missing_sides
    if slice_patterns(pattern).shape[1] > 1 or along_readout:
        remarks.append(
            "single points are measured, not whole columns: the packaged codec was not trained on "
            "such patterns"
        )
    if scan.calibration is not None:
        remarks.append("coil sensitivities come from the separate reference scan alone")
    return replace(measurement, remarks=tuple(remarks))


def read_covariance(path: Path) -> np.ndarray:
    """The noise covariance in a `.npy` file, complex128 `[coils, coils]`.

    Raises:
        InputError: the file cannot be read, or holds no square matrix of finite numbers.
    """
    path = existing_file(path)
    try:
        matrix = np.load(path, allow_pickle=False)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a .npy file: {error}") from error
    if not isinstance(matrix, np.ndarray) or matrix.dtype.kind not in "iufc":
        raise InputError(f"{path} holds no array of numbers; a .npy file [coils, coils] is needed")
    if matrix.ndim != 2 or len(set(matrix.shape)) != 1 or not np.isfinite(matrix).all():
        raise InputError(f"{path} is {matrix.shape}; a finite matrix [coils, coils] is needed")
    return matrix.astype(np.complex128)


def scan_pattern(scan: Scan, mask: np.ndarray | Tensor | None = None) -> np.ndarray:
    """The points that a scan measured: those of its mask that hold anything but zero.

    Args:
        scan: the scan.
        mask: in place of the scan's own mask.

    Returns:
        Bool in the simplest form, see `physics.pattern`.

    Raises:
        InputError: the mask does not fit or keeps nothing, or rows are missing.
    """
    points = measured_points(scan.kspace)
    given = scan.mask if mask is None else mask
    if given is not None:
        array = given.cpu().numpy() if isinstance(given, Tensor) else given
        points &= slice_patterns(checked_pattern(array, scan.kspace.shape, scan.name))
    return find_pattern(points, scan.name)


def is_full(scan: Scan) -> bool:
    """Whether all of a scan's k-space was measured, see `Measurement.is_full`."""
    acquisition = Acquisition(scan.kspace, scan_pattern(scan))
    return not acquisition.has_gaps and not acquisition.find_extent().is_partial


def target_of(scan: Scan, measurement: Measurement | None = None) -> np.ndarray:
    """The image that a full scan is scored against, float32 `[slices, h, w]`.

    Args:
        scan: the scan.
        measurement: of it, if its coils were combined.

    Returns:
        The scan's own target; where it has none, or the noise was whitened, which weights the coils
        anew, the root sum of squares of its coil images.
    """
    if scan.target is not None and (measurement is None or measurement.whitening is None):
        return scan.target
    return (measurement or Measurement(Acquisition(scan.kspace, np.ones(1, bool)))).target()


def _whitening(
    scan: Scan, options: CoilOptions, remarks: list[str]
) -> tuple[np.ndarray | None, str | None]:
    """The matrix that whitens a scan's noise and where the noise is known from; adds a remark."""
    coils = scan.kspace.shape[1]
    if not options.whiten:
        return None, None
    if options.covariance is not None:
        covariance, source = options.covariance, "the given covariance"
    elif scan.noise_covariance is not None:
        covariance, source = scan.noise_covariance, "the file's covariance"
    elif scan.noise is not None:
        samples = scan.noise.shape[1]
        if samples < SAMPLES_PER_COIL * coils:
            remarks.append(
                f"noise was not whitened: {samples} samples of it are too few for {coils} coils"
            )
            return None, None
        covariance, source = noise_covariance(scan.noise), f"{samples} samples of noise"
    else:
        return None, None
    if len(covariance) != coils:
        raise InputError(
            f"{scan.name}: the noise covariance is of {len(covariance)} coils, the scan of {coils}"
        )
    matrix = whitening_matrix(covariance, scan.name)
    deviations = np.sqrt(np.real(np.diagonal(covariance)))
    remark = f"noise was whitened by {source}"
    ratio = deviations.max() / max(np.median(deviations), np.finfo(float).tiny)
    if ratio > 3:
        remark += f"; the noisiest coil has {ratio:.0f} times the median's"
    if len(matrix) < coils:
        remark += f"; {coils - len(matrix)} coils without noise were left out"
    remarks.append(remark)
    return matrix, source


def _compressed(
    acquisition: Acquisition, whitening: np.ndarray | None, count: int | None, remarks: list[str]
) -> tuple[Acquisition, float]:
    """The acquisition with at most so many virtual coils, and the share of energy that they keep;
    adds a remark."""
    have = acquisition.num_coils
    wanted = have if count == 0 else MAX_COILS if count is None else count
    if wanted >= have:
        return acquisition, 1.0
    matrix, share = compression_matrix(acquisition.coil_gram, wanted)
    remarks.append(
        f"{have} coils were compressed to {wanted}, with {share:.2%} of the energy in the middle "
        "of k-space"
    )
    combined = matrix if whitening is None else matrix @ whitening
    return replace(acquisition, coil_matrix=combined), share
