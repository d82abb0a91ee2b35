"""Packs the real data of the MRI study into one small file that needs no image reader.

    python -m experiments.mri.prepare DATA [--out data/mri-study.npz]

DATA holds train, valid and test, each with `<person>_<contrast>.nii.gz`, kspace and coils. Kept are
8-bit slices: of training volumes evenly spaced ones, and of those with cubic voxels sagittal and
coronal ones, too; of the others the middle ones. Names of arrays: `train/NAME`, `valid/NAME`,
`test/NAME` uint8 `[slices, H, W]`, `kspace/NAME` complex64 `[slices, coils, H, W]`, measured, and
`coils/NAME` complex64 `[coils, h, w]`, sensitivities of measured arrays.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.program import make_parser
from nirvana.errors import script
from nirvana.files import atomic_file, check_outputs
from nirvana.mri.io import read_spacing, read_volume

AXIAL, OTHER, TESTED = 26, 8, 8  # slices of a volume
COIL_GRID = 48  # points along each side of the sensitivities
CUBIC = 1.3  # most that the longest side of a voxel may exceed the shortest
CONTENT = 0.08  # least share of pixels above 5 % of the maximum
MASKS = ("lesion", "change", "autoseg", "label", "brainmask", "gm", "wm")  # no images


def volumes(folder: Path) -> dict[str, Path]:
    """Image volumes of a folder by name."""
    files = sorted(folder.glob("*.nii.gz"))
    named = {file.name.removesuffix(".nii.gz"): file for file in files}
    return {name: file for name, file in named.items() if not name.endswith(MASKS)}


def spread(volume: np.ndarray, count: int) -> np.ndarray:
    """At most `count` evenly spaced slices with content, 8 bits, cropped to it."""
    shown = np.flatnonzero((volume > 0.05).mean((1, 2)) > CONTENT)
    chosen = volume[
        shown[np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)]
    ]
    return cut(np.round(chosen * 255).astype(np.uint8))


def cut(slices: np.ndarray, margin: int = 6) -> np.ndarray:
    """Crops the empty border that all slices share, up to a margin."""
    bright = slices > 12
    rows, columns = np.flatnonzero(bright.any((0, 2))), np.flatnonzero(bright.any((0, 1)))
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    return slices[:, top : rows[-1] + margin + 1, left : columns[-1] + margin + 1]


def training(file: Path) -> dict[str, np.ndarray]:
    """Slices of a training volume in up to three directions."""
    volume, spacing = read_volume(file), read_spacing(file)
    parts = {"axial": spread(volume, AXIAL)}
    if spacing is not None and max(spacing) < CUBIC * min(spacing):
        # Upside down, as slices are numbered from below.
        parts["coronal"] = spread(volume.transpose(1, 0, 2)[:, ::-1], OTHER)
        parts["sagittal"] = spread(volume.transpose(2, 0, 1)[:, ::-1], OTHER)
    return parts


def middle(file: Path) -> np.ndarray:
    """The middle slices of a volume, with all of their background."""
    volume = read_volume(file)
    first = max(len(volume) - TESTED, 0) // 2
    return np.round(volume[first : first + TESTED] * 255).astype(np.uint8)


def measured(folder: Path) -> dict[str, np.ndarray]:
    """Fully sampled k-space as `[1, 1, H, W]`, H the readout, its oversampling cut off."""
    from scipy.io import loadmat

    head = loadmat(folder / "larson_se_t1_sag_data.mat")["data"]
    knee = loadmat(folder / "larson_coronal_fatsat_2D_knee.mat")["kdata"].T
    axes = (0,)
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(knee, axes), axis=0, norm="ortho"), axes)
    quarter = len(image) // 4
    image = image[quarter : len(image) - quarter]
    knee = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, axes), axis=0, norm="ortho"), axes)
    kept = {"head_sagittal": head, "knee_coronal": knee}
    return {name: x.astype(np.complex64)[None, None] for name, x in kept.items()}


def sensitivities(folder: Path) -> dict[str, np.ndarray]:
    """Sensitivities of measured arrays on `COIL_GRID` points: maps that their source gives, and
    those of a fully sampled scan by `soft_espirit`."""
    import torch
    from scipy.io import loadmat

    from nirvana.mri.data.simulation.coils import resized
    from nirvana.mri.physics.calibration import soft_espirit

    maps = loadmat(folder / "mriphysics_alignedSENSE_xGT.mat")["S"][:, :, 0].transpose(2, 0, 1)
    scan = torch.from_numpy(np.load(folder / "pdawood_iterativeRaki_preScanRefData.npy"))[None]
    every = torch.ones(1, 1, scan.shape[-1], dtype=torch.bool)
    found = {
        "aligned_sense": torch.from_numpy(maps.astype(np.complex64))[None],
        "iterative_raki": soft_espirit(scan, every)[0][:, 0],
    }
    size = (COIL_GRID, COIL_GRID)
    return {name: resized(each, size)[0].numpy() for name, each in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("experiments.mri.prepare", __doc__)
    parser.add_argument("data", type=Path, help="folder with train, valid, test, kspace, coils")
    parser.add_argument("--out", type=Path, default=Path("data/mri-study.npz"))
    options = parser.parse_args(arguments)
    parts = ("train", "valid", "test", "kspace", "coils")
    check_outputs({"--out": options.out}, [options.data / part for part in parts])
    found: dict[str, np.ndarray] = {}
    for name, file in volumes(options.data / "train").items():
        for direction, slices in training(file).items():
            found[f"train/{name}_{direction}"] = slices
    for part in ("valid", "test"):
        for name, file in volumes(options.data / part).items():
            found[f"{part}/{name}"] = middle(file)
    for name, kspace in measured(options.data / "kspace").items():
        found[f"kspace/{name}"] = kspace
    for name, maps in sensitivities(options.data / "coils").items():
        found[f"coils/{name}"] = maps
    named: dict[str, Any] = {**found}  # numpy types its keywords as options
    with atomic_file(options.out) as temporary:
        np.savez_compressed(temporary, **named)
    slices = sum(len(x) for name, x in found.items() if name.startswith("train/"))
    print(f"{options.out}: {len(found)} arrays, {slices} training slices, ", end="")
    print(f"{options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    script(main)
