"""One scan from a file to images: prepare it and reconstruct it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.mri.adapt.adaptation import AdaptedMethod
from nirvana.mri.adapt.config import ScanAdaptConfig
from nirvana.mri.data.acquisition import Acquisition
from nirvana.mri.data.scans import CoilOptions, Measurement, measure, target_of
from nirvana.mri.data.simulate import simulate_scan
from nirvana.mri.data.simulation.config import Simulation
from nirvana.mri.evaluate.compare import run_methods
from nirvana.mri.io import (
    Scan,
    is_volume,
    read_affine,
    read_scan,
    read_spacing,
    read_volume,
)
from nirvana.mri.io.geometry import shifted
from nirvana.mri.io.options import ReadOptions, SliceRange
from nirvana.mri.methods import (
    NIRVANA,
    Method,
    SliceCounter,
    codec_method,
    comparison_methods,
    fourier_method,
    method_named,
)
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import Sampling
from nirvana.mri.physics.pattern import sampled_share


@dataclass(frozen=True)
class Preparation:
    """How files become scans that are ready to be reconstructed.

    Attributes:
        simulation: how an image volume is scanned.
        sampling: the undersampling of a fully sampled scan.
        undersample: whether a measured scan is undersampled; one that is simulated of a volume
            always is, because nothing of it was measured.
        coils: how the coils are combined.
        reading: how a file of k-space is read.
        slices: which ones are reconstructed.
    """

    simulation: Simulation
    sampling: Sampling
    undersample: bool = False
    coils: CoilOptions | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    slices: SliceRange = field(default_factory=SliceRange)


@dataclass(frozen=True)
class PreparedScan:
    """A scan ready to be reconstructed.

    Attributes:
        path: the file it was read from.
        scan: the scan as read or simulated, with the remarks of its preparation.
        measurement: what of it is reconstructed.
        target: float32 `[slices, h, w]`, the fully sampled image, or None where it is unknown.
        drawn: the sampling and the seed of the mask, or None where nothing was left out.
    """

    path: Path
    scan: Scan
    measurement: Measurement
    target: np.ndarray | None
    drawn: dict[str, Any] | None

    @property
    def pattern(self) -> np.ndarray:
        """The points that are used, bool, see `physics.pattern`."""
        return self.measurement.acquisition.pattern

    @property
    def sampled(self) -> float:
        """Share of k-space that is sampled, 0..1."""
        return sampled_share(self.pattern)

    @property
    def num_slices(self) -> int:
        """Number of slices that are reconstructed one by one."""
        return len(self.measurement.acquisition)


def reconstruct(
    kspace: Scan | np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    *,
    method: str = "nirvana",
    codec: str | Path | CodecModel = "codec",
    adapt: ScanAdaptConfig | None = None,
    complex_images: bool = False,
    coils: CoilOptions | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: SliceCounter | None = None,
) -> np.ndarray:
    """The images of a multi-coil Cartesian scan.

    K-space without gaps needs no method: its images are its Fourier transform, after a missing side
    (partial Fourier, asymmetric echo) was completed.

    Args:
        kspace: a scan, or complex `[slices, coils, H, W]` with the origin at `[H // 2, W // 2]` and
            zeros where nothing was measured.
        mask: bool `[W]`, `[H, W]`, `[slices, W]` or `[slices, H, W]`, the measured points; None
            finds those that are not zero, and of a scan takes those of its own mask.
        method: of undersampled k-space: "nirvana" (a codec), "l1-wavelet", "sense", "grappa",
            "zero-filled", "bart-sense" or "bart-l1-wavelet".
        codec: a loaded codec, or the folder or packaged name of one.
        adapt: first adapt the codec to the scan with these settings, `ScanAdaptConfig()`; None
            takes it as it is.
        complex_images: return complex images, see `sense.combine_coils`, in place of magnitudes.
        coils: whether the noise is whitened, and the number of virtual coils.
        batch_size: slices that a codec reconstructs at once.
        device: where a codec that is given by name is loaded.
        progress: called with the number of slices just done.

    Returns:
        float32 `[slices, H, W]`, root sum of squares of the coil images on the scale of the
        k-space; or complex64.

    Raises:
        InputError: the method or codec does not exist, the k-space or mask has another shape, or
            fewer than two contiguous samples in the middle are measured; `adapt` with another
            method, or for a scan that `adapt_to_scan` refuses.
    """
    label = method_named(method)
    if adapt is not None and label != NIRVANA:
        raise InputError(f"adapt is for method 'nirvana', not {method!r}")
    scan = kspace if isinstance(kspace, Scan) else as_scan(kspace)
    measurement = measure(scan, coils, mask)
    function: Method = fourier_method
    if measurement.acquisition.has_gaps:
        measurement.acquisition.require_calibration()
        if label == NIRVANA:
            model = codec if isinstance(codec, CodecModel) else load_codec(codec, device)
            function = codec_method(model, batch_size)
            if adapt is not None:
                function = AdaptedMethod(model, batch_size, adapt)
        else:
            function = comparison_methods({}, wavelet=False, also=label)[label]
    count = progress or (lambda done: None)
    wanted = label if complex_images else None
    found = run_methods(measurement, {label: function}, lambda name: count, wanted)[label]
    return found.images if found.combined is None else found.combined


def as_scan(kspace: np.ndarray | Tensor, **fields: Any) -> Scan:
    """A scan of k-space in memory.

    Args:
        kspace: complex `[slices, coils, H, W]`.
        **fields: further fields of `Scan`.

    Raises:
        InputError: it has another shape, is not complex, or holds NaN or infinite values.
    """
    array = kspace.detach().cpu().numpy() if isinstance(kspace, Tensor) else np.asarray(kspace)
    if array.ndim != 4 or array.dtype.kind != "c":
        raise InputError(
            f"k-space is {array.dtype} {array.shape}; it must be complex [slices, coils, H, W]"
        )
    if not np.isfinite(array).all():
        raise InputError("k-space holds NaN or infinite values")
    array = np.ascontiguousarray(array, dtype=np.complex64)
    return Scan(**{"kspace": array, "mask": None, "target": None, "name": "k-space", **fields})


def prepare(path: Path, how: Preparation, seed: int) -> PreparedScan:
    """Reads a scan, or simulates one of an image volume.

    Args:
        path: file of a scan or of a magnitude volume.
        how: what is done to it.
        seed: of the mask and of a volume's simulation.

    Raises:
        InputError: the file cannot be read, or its mask leaves too few samples in the middle to
            calibrate coils from.
    """
    scan = load_scan(path, how, seed)
    measurement = measure(scan, how.coils)
    target = drawn = None
    if measurement.is_full:
        if how.undersample or is_volume(path):
            target = target_of(scan, measurement)
            measurement = measurement.undersampled(how.sampling, seed)
            drawn = {**asdict(how.sampling), "seed": seed}
    elif not measurement.missing_sides and measurement.whitening is None:
        target = scan.target
    if measurement.acquisition.has_gaps:
        measurement.acquisition.require_calibration()
    scan = replace(scan, remarks=(*scan.remarks, *measurement.remarks))
    return PreparedScan(path, scan, measurement, target, drawn)


def prepare_images(path: Path) -> PreparedScan:
    """A volume of reconstructed images as a fully sampled scan of one coil of even sensitivity.

    Args:
        path: file of a magnitude volume.

    Raises:
        InputError: the file is no volume or cannot be read.
    """
    if not is_volume(path):
        raise InputError(f"--image takes a volume (.nii, .nii.gz, .npy), not {path}")
    images = torch.from_numpy(read_volume(path).copy())
    kspace = fft2c(images[:, None].to(torch.complex64))
    name, spacing, affine = path.name.split(".")[0], read_spacing(path), read_affine(path)
    scan = Scan(kspace.numpy(), None, None, name, spacing, affine=affine)
    mask = np.ones(kspace.shape[-1], dtype=bool)
    return PreparedScan(path, scan, Measurement(Acquisition(scan.kspace, mask)), None, None)


def load_scan(path: Path, how: Preparation, seed: int) -> Scan:
    """The scan in a file, or one simulated of the volume in it; of either the chosen slices.

    Raises:
        InputError: the file cannot be read, or does not have these slices.
    """
    if is_volume(path):
        return simulate_volume(path, how.simulation, seed, how.slices)
    return _cut(read_scan(path, how.reading), how.slices)


def load_full_scan(path: Path, how: Preparation, seed: int) -> Scan:
    """A fully sampled scan, or one simulated of a volume; of either the chosen slices.

    Raises:
        InputError: the file cannot be read, does not have these slices, or its scan is
            undersampled.
    """
    scan = load_scan(path, how, seed)
    if not is_volume(path):
        measure(scan).require_full(path)
    return scan


def simulate_volume(
    path: Path, simulation: Simulation, seed: int, slices: SliceRange | None = None
) -> Scan:
    """A scan simulated of an image volume, or of some of its slices.

    Raises:
        InputError: the file cannot be read, or these slices are empty or not there.
    """
    whole, affine = read_volume(path), read_affine(path)
    slices = slices or SliceRange()
    chosen = slices.of(len(whole), path)
    if not whole[chosen].any():
        raise InputError(f"{path}: the slices of --slices are empty; give others")
    if affine is not None:
        affine = shifted(affine, slices=chosen.start)
    scan = simulate_scan(whole[chosen], stem(path), seed, simulation, read_spacing(path))
    return replace(scan, affine=affine, remarks=(*scan.remarks, *slices.remarks(len(whole))))


def _cut(scan: Scan, slices: SliceRange) -> Scan:
    """Some slices of a scan."""
    if slices == SliceRange():
        return scan
    if scan.volume_encoding == "3D":
        raise InputError(
            f"{scan.name} is a 3D scan, which is reconstructed as a whole: no --slices"
        )
    chosen = slices.of(len(scan.kspace), scan.name)
    by_slice = scan.mask is not None and scan.mask.ndim == 3 and len(scan.mask) > 1
    return replace(
        scan,
        kspace=scan.kspace[chosen],
        mask=scan.mask[chosen] if scan.mask is not None and by_slice else scan.mask,
        target=None if scan.target is None else scan.target[chosen],
        calibration=None if scan.calibration is None else scan.calibration[chosen],
        affine=None if scan.affine is None else shifted(scan.affine, slices=chosen.start),
        remarks=(*scan.remarks, *slices.remarks(len(scan.kspace))),
    )


def stem(path: Path) -> str:
    """The file's name without its suffix, `.nii.gz` counting as one."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def distinct_names(paths: Sequence[Path], ends: Sequence[str] | None = None) -> list[str]:
    """A name for each file of a run: its stem, or as much more of its path as makes it unique.

    Args:
        paths: the files.
        ends: what follows each name; None: nothing.
    """
    ends = [""] * len(paths) if ends is None else ends
    forms = [
        [shorten(path) + end for path, end in zip(paths, ends, strict=True)]
        for shorten in (stem, lambda path: path.name, str)
    ]
    counts = [Counter(names) for names in forms]
    return [
        next((name for name, count in zip(each, counts, strict=True) if count[name] == 1), each[-1])
        for each in zip(*forms, strict=True)
    ]
