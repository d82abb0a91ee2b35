"""One scan from a file to images: prepare it, reconstruct it with several methods, write the
results."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nirvana.errors import InputError
from nirvana.files import atomic_folder, write_json
from nirvana.mri.classical.bart import bart_pics
from nirvana.mri.classical.common import zero_filled
from nirvana.mri.classical.sigpy import l1_wavelet
from nirvana.mri.classical.sigpy import sense as sense_image
from nirvana.mri.data.scans import is_full, sampled_columns, target_of, undersample_scan
from nirvana.mri.data.simulate import Simulation, simulate_scan
from nirvana.mri.evaluate.compare import Method, finite, run_methods, score_rows
from nirvana.mri.evaluate.figure import panel, slice_geometry
from nirvana.mri.evaluate.metrics import centre_crop, score
from nirvana.mri.io import (
    Scan,
    is_volume,
    read_affine,
    read_scan,
    read_spacing,
    read_volume,
    write_dicom,
    write_nifti,
    write_reconstruction,
)
from nirvana.mri.io.geometry import shifted
from nirvana.mri.model.checkpoint import load_codec
from nirvana.mri.model.codec import CodecModel
from nirvana.mri.physics.fourier import fft2c
from nirvana.mri.physics.masks import (
    Sampling,
    calibration_width,
    require_calibration,
    require_columns,
)

RESULT_FILES = ("dicom", "metrics.json", "panel.png", "reconstruction.h5", "reconstruction.nii.gz")
TARGET, ZERO_FILLED, SENSE = "fully sampled", "zero-filled", "SENSE"
WAVELET, NIRVANA = "L1-wavelet", "Nirvana"
BART: dict[Literal["l1", "l2"], str] = {"l2": "BART SENSE", "l1": "BART L1-wavelet"}

SliceCounter = Callable[[int], None]
"""Called with the number of slices just done."""
Progress = Callable[[str], SliceCounter]
"""Called with a method's name before it runs; returns the counter of its slices."""


@dataclass(frozen=True)
class PreparedScan:
    """A scan ready to be reconstructed.

    Attributes:
        path: the file it was read from.
        scan: the scan as read or simulated.
        kspace: complex64 `[slices, coils, H, W]`, zero outside the mask.
        mask: bool `[W]`.
        target: float32 `[slices, h, w]`, the fully sampled image, or None where it is unknown.
        drawn: the sampling and the seed of the mask, or None where the mask was found in the file.
    """

    path: Path
    scan: Scan
    kspace: Tensor
    mask: Tensor
    target: np.ndarray | None
    drawn: dict[str, Any] | None

    @property
    def sampled(self) -> float:
        """Share of the columns that are sampled, 0..1."""
        return float(self.mask.float().mean())


def reconstruct(
    kspace: Scan | np.ndarray | Tensor,
    mask: np.ndarray | Tensor | None = None,
    *,
    codec: str | Path | CodecModel = "codec",
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    progress: SliceCounter | None = None,
) -> np.ndarray:
    """The magnitude images of a multi-coil Cartesian scan, by a codec.

    Args:
        kspace: a scan, or complex `[slices, coils, H, W]` with the origin at `[H // 2, W // 2]` and
            zeros where nothing was measured.
        mask: bool `[W]`, the measured columns; None finds the columns that are not zero, and of a
            scan takes those of its own mask.
        codec: a loaded codec, or the folder or packaged name of one.
        batch_size: slices at once.
        device: where a codec that is given by name is loaded.
        progress: called with the number of slices just done.

    Returns:
        float32 `[slices, H, W]`, on the scale of the k-space's own root-sum-of-squares images.

    Raises:
        InputError: the codec does not exist, the k-space is not `[slices, coils, H, W]` of whole
            columns, or fewer than two contiguous columns in the middle are measured.
    """
    if not isinstance(kspace, Scan):
        kspace = as_scan(kspace)
    require_columns(kspace.kspace, kspace.name)
    columns = sampled_columns(kspace, mask)
    require_calibration(columns, kspace.name)
    model = codec if isinstance(codec, CodecModel) else load_codec(codec, device)
    measured = torch.from_numpy(kspace.kspace) * columns
    return model.reconstruct(measured, columns, batch_size, progress).numpy()


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


def prepare(path: Path, simulation: Simulation, sampling: Sampling, seed: int) -> PreparedScan:
    """Reads a scan, or simulates one of an image volume, and undersamples it unless it is
    undersampled already.

    Args:
        path: file of a scan or of a magnitude volume.
        simulation: how a volume is scanned.
        sampling: of a fully sampled scan.
        seed: of the mask and of a volume's simulation.

    Raises:
        InputError: the file cannot be read, or its mask leaves too few columns in the middle to
            calibrate coils from.
    """
    scan = load_scan(path, simulation, seed)
    if is_full(scan):
        kspace, mask = undersample_scan(scan, sampling, seed)
        target, drawn = target_of(scan), {**asdict(sampling), "seed": seed}
    else:
        mask = sampled_columns(scan)
        if not mask.any():
            raise InputError(f"{scan.name}: its mask keeps no column of k-space")
        kspace, target, drawn = torch.from_numpy(scan.kspace) * mask, scan.target, None
    require_calibration(mask, path)
    return PreparedScan(path, scan, kspace, mask, target, drawn)


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
    mask = torch.ones(kspace.shape[-1], dtype=torch.bool)
    return PreparedScan(path, scan, kspace, mask, None, None)


def load_scan(path: Path, simulation: Simulation, seed: int, slices: int = 0) -> Scan:
    """The scan in a file, or one simulated of the `slices` middle slices of the volume in it."""
    if is_volume(path):
        return simulate_volume(path, simulation, seed, slices)
    scan = read_scan(path)
    require_columns(scan.kspace, path)
    return scan


def load_full_scan(path: Path, simulation: Simulation, seed: int, slices: int) -> Scan:
    """The `slices` middle slices (0: all) of a fully sampled scan, or of one simulated of a volume.

    Raises:
        InputError: the file cannot be read, or its scan is undersampled.
    """
    scan = load_scan(path, simulation, seed, slices)
    if is_volume(path):
        return scan
    if not is_full(scan):
        raise InputError(f"{path} is undersampled; only a fully sampled scan can be scored")
    kspace = middle_slices(scan.kspace, slices)
    target = None if scan.target is None else middle_slices(scan.target, slices)
    affine = scan.affine
    if affine is not None:
        affine = shifted(affine, slices=(len(scan.kspace) - len(kspace)) // 2)
    return replace(scan, kspace=kspace, target=target, affine=affine)


def simulate_volume(path: Path, simulation: Simulation, seed: int, slices: int = 0) -> Scan:
    """A scan simulated of an image volume, or of its `slices` middle slices (0: all).

    Raises:
        InputError: the file cannot be read, or these slices are empty.
    """
    whole, affine = read_volume(path), read_affine(path)
    volume = middle_slices(whole, slices)
    if not volume.any():
        raise InputError(f"{path}: its {slices} middle slices are empty; give a larger --slices")
    if affine is not None:
        affine = shifted(affine, slices=(len(whole) - len(volume)) // 2)
    scan = simulate_scan(volume, stem(path), seed, simulation, read_spacing(path))
    return replace(scan, affine=affine)


def stem(path: Path) -> str:
    """The file's name without its suffix, `.nii.gz` counting as one."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def middle_slices(volume: np.ndarray, count: int) -> np.ndarray:
    """The `count` middle ones along the first axis; all for 0."""
    if count == 0 or count >= len(volume):
        return volume
    first = (len(volume) - count) // 2
    return volume[first : first + count]


def comparison_methods(
    codecs: Mapping[str, Any],
    progress: Progress,
    *,
    wavelet: bool = True,
    sense: bool = False,
    bart: bool = False,
    batch_size: int = 4,
) -> dict[str, Method]:
    """The methods that are compared, in the order of the tables: zero-filled, classical, codecs.

    Args:
        codecs: name in the tables -> `CodecModel`.
        progress: see `Progress`.
        wavelet: with ESPIRiT + L1-wavelet.
        sense: with ESPIRiT + SENSE.
        bart: with BART's two reconstructions.
        batch_size: slices that a codec reconstructs at once.

    Returns:
        Name -> function of (k-space complex64 `[slices, coils, H, W]`, mask bool `[W]`).
    """

    def with_wavelet(kspace: Tensor, mask: Tensor) -> Any:
        return l1_wavelet(kspace, mask, calibration_width(mask), progress=progress(WAVELET))

    def with_sense(kspace: Tensor, mask: Tensor) -> Any:
        return sense_image(kspace, mask, calibration_width(mask), progress=progress(SENSE))

    def with_bart(norm: Literal["l1", "l2"]) -> Method:
        counter = progress(BART[norm])
        return lambda kspace, mask: bart_pics(
            kspace, mask, calibration_width(mask), norm, progress=counter
        )

    def with_codec(label: str, model: Any) -> Method:
        return lambda kspace, mask: model.reconstruct(kspace, mask, batch_size, progress(label))

    methods: dict[str, Method] = {ZERO_FILLED: zero_filled}
    if sense:
        methods[SENSE] = with_sense
    if wavelet:
        methods[WAVELET] = with_wavelet
    if bart:
        methods |= {name: with_bart(norm) for norm, name in BART.items()}
    return methods | {label: with_codec(label, model) for label, model in codecs.items()}


def reconstruct_scan(
    prepared: PreparedScan, methods: Mapping[str, Method], out: Path, codec: str
) -> dict[str, Any]:
    """Reconstructs a scan with every method and writes the folder of results, as a whole.

    Args:
        prepared: of `prepare`.
        methods: of `comparison_methods`; that of `NIRVANA` gives the images that are written.
        out: the folder.
        codec: the codec's name, for the records.

    Returns:
        The contents of `metrics.json`.
    """
    scan, target = prepared.scan, prepared.target
    volumes = run_methods(prepared.kspace, prepared.mask, methods)
    about: dict[str, Any] = {"volume": scan.name, "sampled": prepared.sampled}
    if target is not None:
        rows = score_rows(target, volumes, **about)
    else:
        rows = [
            {**about, "method": name, "seconds_per_slice": seconds}
            for name, (_, seconds) in volumes.items()
        ]
    columns = prepared.mask.nonzero().flatten().tolist()
    results = {"scan": str(prepared.path), "volume": scan.name, "codec": codec}
    results |= {"mask": prepared.drawn, "sampled": prepared.sampled, "columns": columns}
    results = finite({**results, "results": rows})
    images = {name: volume for name, (volume, _) in volumes.items()}
    image = images[NIRVANA]
    with atomic_folder(out) as folder:
        write_reconstruction(
            folder / "reconstruction.h5",
            image,
            scan,
            prepared.mask.numpy(),
            method="nirvana",
            codec=codec,
            source=prepared.path.name,
        )
        write_nifti(folder / "reconstruction.nii.gz", image, scan.affine, scan.spacing)
        (folder / "dicom").mkdir()
        description = f"nirvana {codec}, {prepared.sampled:.1%} sampled"
        write_dicom(folder / "dicom", image, scan, description)
        draw_middle(folder / "panel.png", target, images, scan, prepared.sampled)
        write_json(folder / "metrics.json", results)
    return results


def draw_middle(
    path: Path,
    target: np.ndarray | None,
    volumes: Mapping[str, np.ndarray],
    scan: Scan,
    sampled: float,
) -> None:
    """Writes a picture of the middle slice of every method, cropped to the target, with the scores
    of this slice.

    Args:
        path: PNG file.
        target: real `[slices, h, w]`, or None where it is unknown.
        volumes: method -> real `[slices, H, W]`.
        scan: for its name and geometry.
        sampled: share of the columns, 0..1.
    """
    shown = dict(volumes) if target is None else {TARGET: target, **volumes}
    size = next(iter(shown.values())).shape[-2:]
    slices = len(next(iter(shown.values())))
    middle = slices // 2
    images = {key: centre_crop(volume[middle], size) for key, volume in shown.items()}
    scores = None
    if target is not None and target[middle].any():
        scores = {
            key: score(target[middle][None], image[None])
            for key, image in images.items()
            if key != TARGET
        }
    panel(
        path,
        images,
        None if target is None else TARGET,
        scores,
        f"{scan.name}, slice {middle + 1} of {slices}, {sampled:.1%} of columns sampled",
        slice_geometry(scan.spacing, scan.affine),
    )
